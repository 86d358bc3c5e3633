// What the operators of every device share: a tensor's description, the arguments, their checks, and the LossProblem
// that they make. Python checks and words the arguments (reptile_ext/checks.py); what is checked here again is what
// memory safety hangs on, because anybody may call torch.ops.reptile_ext.* directly.
#pragma once

#include "stable_abi.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../divergence.h"

namespace reptile_ext {
namespace {

using torch::stable::Tensor;

// A message that begins with labels, weight, denominator, inplace or teacher_… becomes a ValueError in Python
// (functional.py).
[[noreturn]] void fail(const std::string& message) { throw std::runtime_error(message); }

// A tensor's description, looked up once.
struct View {
  int64_t ndim;
  int64_t *sizes, *strides;
  int32_t dtype;
  void* data;

  explicit View(const Tensor& tensor) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor.get(), &ndim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(tensor.get(), &data));
  }
  bool is_empty() const {
    return std::any_of(sizes, sizes + ndim, [](int64_t size) { return size == 0; });
  }
  bool is_contiguous() const {
    if (is_empty()) return true;
    int64_t expected = 1;
    for (int64_t d = ndim - 1; d >= 0; --d) {
      if (sizes[d] != 1 && strides[d] != expected) return false;
      expected *= sizes[d];
    }
    return true;
  }
};

DType dtype_of(const View& view, const char* name) {
  if (view.dtype == aoti_torch_dtype_float32()) return DType::kFloat32;
  if (view.dtype == aoti_torch_dtype_bfloat16()) return DType::kBFloat16;
  if (view.dtype == aoti_torch_dtype_float16()) return DType::kFloat16;
  if (view.dtype == aoti_torch_dtype_float64()) return DType::kFloat64;
  fail(std::string(name) + " must be float32, bfloat16, float16 or float64");
}

// THE ARGUMENTS of the operators, once: C++ type, name, type in the schema. From this list come the struct below, the
// operators' parameters and their schemas; Python reads names and order from the schema (ops.py).
using OptionalTensor = std::optional<Tensor>;
#define REPTILE_EXT_SHARED(X)               \
  X(Tensor, teacher, "Tensor")              \
  X(OptionalTensor, labels, "Tensor?")      \
  X(OptionalTensor, weight, "Tensor?")      \
  X(OptionalTensor, denominator, "Tensor?") \
  X(OptionalTensor, grad_output, "Tensor?") \
  X(int64_t, divergence, "int")             \
  X(double, beta, "float")                  \
  X(double, one_minus_beta, "float")        \
  X(double, student_temperature, "float")   \
  X(double, teacher_temperature, "float")   \
  X(double, soft_scale, "float")            \
  X(double, hard_weight, "float")           \
  X(double, label_smoothing, "float")       \
  X(int64_t, ignore_index, "int")           \
  X(int64_t, reduction, "int")              \
  X(double, scale, "float")                 \
  X(int64_t, dim, "int")

#define REPTILE_EXT_FIELD(type, name, schema) const type& name;
struct Arguments {
  const Tensor& student;
  REPTILE_EXT_SHARED(REPTILE_EXT_FIELD)
};
#undef REPTILE_EXT_FIELD
#define REPTILE_EXT_PARAMETER(type, name, schema) , const type& name
#define REPTILE_EXT_PARAMETERS const Tensor& student REPTILE_EXT_SHARED(REPTILE_EXT_PARAMETER)
#define REPTILE_EXT_VALUE_OF(type, name, schema) , name
#define REPTILE_EXT_ARGUMENTS \
  Arguments { student REPTILE_EXT_SHARED(REPTILE_EXT_VALUE_OF) }
#define REPTILE_EXT_SCHEMA_OF(type, name, schema) ", " schema " " #name
#define REPTILE_EXT_SCHEMA REPTILE_EXT_SHARED(REPTILE_EXT_SCHEMA_OF)

#define REPTILE_EXT_DEFINE(m)                                                                                         \
  m.def("distillation_loss(Tensor student" REPTILE_EXT_SCHEMA                                                         \
        ", bool needs_gradient) -> (Tensor loss, Tensor gradient)");                                                  \
  m.def("distillation_loss_(Tensor(a!) student" REPTILE_EXT_SCHEMA ") -> Tensor");                                    \
  m.def("row_stats(Tensor student" REPTILE_EXT_SCHEMA ", Tensor? maxima, Tensor? sums) -> Tensor");                   \
  m.def("row_gradient(Tensor student" REPTILE_EXT_SCHEMA                                                              \
        ", Tensor maxima, Tensor sums, Tensor mixture_sums, bool needs_gradient) -> (Tensor loss, Tensor gradient)"); \
  m.def("row_gradient_(Tensor(a!) student" REPTILE_EXT_SCHEMA                                                         \
        ", Tensor maxima, Tensor sums, Tensor mixture_sums) -> Tensor");                                              \
  m.def(                                                                                                              \
      "scale_gradient_(Tensor(a!) gradient, Tensor factor, Tensor? labels, Tensor? weight, int ignore_index, int "    \
      "vocab_size, int dim) -> ()");                                                                                  \
  m.def("binary_distillation_loss(Tensor student" REPTILE_EXT_SCHEMA                                                  \
        ", Tensor? pos_weight, bool needs_gradient) -> (Tensor loss, Tensor gradient)");                              \
  m.def("binary_distillation_loss_(Tensor(a!) student" REPTILE_EXT_SCHEMA ", Tensor? pos_weight) -> Tensor");         \
  m.def("scale_elements_(Tensor(a!) gradient, Tensor factor, Tensor? labels, Tensor? weight, int ignore_index) -> ()")
#define REPTILE_EXT_DEFINE_SPARSE(m)                                                                          \
  m.def("sparse_distillation_loss(Tensor student" REPTILE_EXT_SCHEMA                                          \
        ", Tensor indices, int tail, bool truncate, bool needs_gradient) -> (Tensor loss, Tensor gradient)"); \
  m.def("sparse_distillation_loss_(Tensor(a!) student" REPTILE_EXT_SCHEMA                                     \
        ", Tensor indices, int tail, bool truncate) -> Tensor")
#define REPTILE_EXT_IMPLEMENT_SPARSE(m)                                                  \
  m.impl("sparse_distillation_loss", TORCH_BOX(&reptile_ext::sparse_distillation_loss)); \
  m.impl("sparse_distillation_loss_", TORCH_BOX(&reptile_ext::sparse_distillation_loss_))
#define REPTILE_EXT_IMPLEMENT(m)                                                           \
  m.impl("distillation_loss", TORCH_BOX(&reptile_ext::distillation_loss));                 \
  m.impl("distillation_loss_", TORCH_BOX(&reptile_ext::distillation_loss_));               \
  m.impl("row_stats", TORCH_BOX(&reptile_ext::row_stats));                                 \
  m.impl("row_gradient", TORCH_BOX(&reptile_ext::row_gradient));                           \
  m.impl("row_gradient_", TORCH_BOX(&reptile_ext::row_gradient_));                         \
  m.impl("scale_gradient_", TORCH_BOX(&reptile_ext::scale_gradient_));                     \
  m.impl("binary_distillation_loss", TORCH_BOX(&reptile_ext::binary_distillation_loss));   \
  m.impl("binary_distillation_loss_", TORCH_BOX(&reptile_ext::binary_distillation_loss_)); \
  m.impl("scale_elements_", TORCH_BOX(&reptile_ext::scale_elements_))

// The leading shape of the operands, class dimension left out and neighbours merged where every operand allows it.
void set_rows(LossProblem& p, const View& student, const View& teacher, const View* gradient, int64_t dim) {
  p.num_rows = 1;
  for (int64_t d = 0; d < student.ndim; ++d) {
    if (d != dim) p.num_rows *= student.sizes[d];
  }
  if (p.num_rows == 0) return;
  const auto mergeable = [&](const Operand& operand, int64_t stride, int64_t size) {
    return operand.row_strides[p.num_row_dims - 1] == stride * size;
  };
  for (int64_t d = 0; d < student.ndim; ++d) {
    if (d == dim) continue;
    const int64_t size = student.sizes[d];
    if (size == 1) continue;
    const int64_t g_stride = gradient ? gradient->strides[d] : student.strides[d];
    if (p.num_row_dims > 0 && mergeable(p.student, student.strides[d], size) &&
        mergeable(p.teacher, teacher.strides[d], size) && mergeable(p.gradient, g_stride, size)) {
      p.row_sizes[p.num_row_dims - 1] *= size;
    } else {
      if (p.num_row_dims == kMaxRowDims) fail("student has too many dimensions");
      p.row_sizes[p.num_row_dims++] = size;
    }
    p.student.row_strides[p.num_row_dims - 1] = student.strides[d];
    p.teacher.row_strides[p.num_row_dims - 1] = teacher.strides[d];
    p.gradient.row_strides[p.num_row_dims - 1] = g_stride;
  }
}

// A tensor with one element for each of n rows, one after the other.
void check_vector(const View& view, int64_t n, const char* name) {
  int64_t numel = 1;
  for (int64_t d = 0; d < view.ndim; ++d) numel *= view.sizes[d];
  if (numel != n) fail(std::string(name) + " must have one element a row");
  if (!view.is_contiguous()) fail(std::string(name) + " must be contiguous");
}

const int64_t* label_data(const Tensor& labels, int64_t n) {
  const View view(labels);
  check_vector(view, n, "labels");
  if (view.dtype != aoti_torch_dtype_int64()) fail("labels must be int64");
  return static_cast<const int64_t*>(view.data);
}

const double* weight_data(const Tensor& weight, int64_t n) {
  const View view(weight);
  check_vector(view, n, "weight");
  if (view.dtype != aoti_torch_dtype_float64()) fail("weight must be float64");
  return static_cast<const double*>(view.data);
}

struct Device {
  int32_t type, index;
};

Tensor new_tensor(Device device, int64_t ndim, const int64_t* sizes, int32_t dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(ndim), 1);
  for (int64_t d = ndim - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides.data(), dtype, device.type, device.index, &handle));
  return Tensor(handle);
}

size_t bytes_of(const View& view, const char* name) {
  size_t bytes = size_of(dtype_of(view, name));
  for (int64_t d = 0; d < view.ndim; ++d) bytes *= size_t(view.sizes[d]);
  return bytes;
}

Tensor fresh_gradient(const Tensor& student) {
  try {
    return torch::stable::empty_like(student);
  } catch (const std::exception&) {
    fail("not enough memory for the gradient of student_logits, " + std::to_string(bytes_of(View(student), "student")) +
         " bytes; inplace=True needs none");
  }
}

// What rows and elements take alike.
template <class Problem>
void set_numbers(Problem& p, const Arguments& a) {
  if (a.divergence < 0 || a.divergence >= kNumDivergences) fail("divergence is unknown");
  p.divergence = Divergence(a.divergence);
  p.beta = a.beta;
  p.one_minus_beta = a.one_minus_beta;
  if (!(a.student_temperature > 0) || !(a.teacher_temperature > 0)) fail("temperature must be positive");
  p.student_temperature = a.student_temperature;
  p.teacher_temperature = a.teacher_temperature;
  p.soft_scale = a.soft_scale;
  p.hard_weight = a.hard_weight;
}

// All but the weights and what the sum is divided by. The values of labels may be on a device that the host cannot
// read. `leading` becomes the shape without the class dimension.
LossProblem problem_of(const Arguments& a, const View& student, const View* gradient, std::vector<int64_t>& leading,
                       Part part) {
  const View teacher(a.teacher);
  const int64_t ndim = student.ndim, dim = a.dim < 0 ? a.dim + ndim : a.dim;
  if (ndim < 1 || teacher.ndim != ndim || dim < 0 || dim >= ndim) fail("teacher or dim does not fit student");
  LossProblem p;
  for (int64_t d = 0; d < ndim; ++d) {
    if (d == dim) continue;
    if (teacher.sizes[d] != student.sizes[d]) fail("teacher must have the shape of student outside dim");
    leading.push_back(student.sizes[d]);
  }
  p.part = part;
  if (part == Part::kLoss && (student.sizes[dim] < 1 || teacher.sizes[dim] < 1)) {
    fail("student and teacher need at least one class");
  }
  p.vocab_size = std::min(student.sizes[dim], teacher.sizes[dim]);
  p.gradient_size = student.sizes[dim];
  set_rows(p, student, teacher, gradient, dim);
  const auto fill = [dim](Operand& operand, const View& view, const char* name) {
    operand.data = view.data;
    operand.dtype = dtype_of(view, name);
    operand.class_stride = view.strides[dim];
  };
  fill(p.student, student, "student");
  fill(p.teacher, teacher, "teacher");
  if (gradient) fill(p.gradient, *gradient, "gradient");
  // A row of one class may carry any stride; the class stride is then of no consequence.
  if (student.sizes[dim] == 1) p.student.class_stride = p.gradient.class_stride = 1;
  if (teacher.sizes[dim] == 1) p.teacher.class_stride = 1;

  set_numbers(p, a);
  p.label_smoothing = a.label_smoothing;
  if (!a.labels && (a.hard_weight > 0 || needs_labels(p.divergence))) {
    fail("labels are needed for hard_weight > 0 and for dkd");
  }
  if (a.labels) p.labels = label_data(*a.labels, p.num_rows);
  if (a.grad_output) {
    const View view(*a.grad_output);
    if (view.dtype != aoti_torch_dtype_float64()) fail("grad_output must be float64");
    p.grad_output_is_uniform = view.ndim == 0;
    check_vector(view, p.grad_output_is_uniform ? 1 : p.num_rows, "grad_output");
    p.grad_output = static_cast<const double*>(view.data);
  }
  return p;
}

// A gradient that is to be multiplied by `factor`, of its first `vocab_size` classes.
LossProblem scale_problem(const View& gradient, const View& factor, int64_t vocab_size, int64_t dim) {
  if (dim < 0) dim += gradient.ndim;
  if (dim < 0 || dim >= gradient.ndim) fail("dim does not fit gradient");
  LossProblem p;
  p.vocab_size = p.gradient_size = std::min(gradient.sizes[dim], std::max<int64_t>(vocab_size, 0));
  set_rows(p, gradient, gradient, &gradient, dim);
  p.gradient.data = gradient.data;
  p.gradient.dtype = dtype_of(gradient, "gradient");
  p.gradient.class_stride = gradient.sizes[dim] == 1 ? 1 : gradient.strides[dim];
  check_vector(factor, factor.ndim == 0 ? 1 : p.num_rows, "factor");
  if (factor.dtype != aoti_torch_dtype_float64() && factor.dtype != aoti_torch_dtype_float32()) {
    fail("factor must be float32 or float64");
  }
  return p;
}

bool is_double(const LossProblem& p) {
  return p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
}

// What is combined from the row stats of several calls: [rows, count] in float64.
double* stats_data(const Tensor& stats, int64_t num_rows, int count, const char* name) {
  const View view(stats);
  if (view.dtype != aoti_torch_dtype_float64() || view.ndim != 2 || view.sizes[0] != num_rows ||
      view.sizes[1] != count || !view.is_contiguous()) {
    fail(std::string(name) + " must be contiguous float64 [rows, " + std::to_string(count) + "]");
  }
  return static_cast<double*>(view.data);
}

// A tensor for row stats of one part, and where the problem has it and what it starts from.
struct Stats {
  Tensor tensor;
  double* data;
};
Stats stats_of(LossProblem& p, Part part, int count, const std::optional<Tensor>& maxima,
               const std::optional<Tensor>& sums, Device device) {
  const int64_t sizes[2] = {p.num_rows, count};
  Stats stats{new_tensor(device, 2, sizes, aoti_torch_dtype_float64()), nullptr};
  stats.data = static_cast<double*>(View(stats.tensor).data);
  p.maxima = part == Part::kMaxima ? stats.data : stats_data(*maxima, p.num_rows, kNumMaxima, "maxima");
  if (part == Part::kSums) p.sums = stats.data;
  if (part == Part::kMixtureSums) {
    p.sums = stats_data(*sums, p.num_rows, kNumSums, "sums");
    p.mixture_sums = stats.data;
  }
  return stats;
}

// Row stats of all classes, which row_gradient starts from.
struct Combined {
  const Tensor &maxima, &sums, &mixture_sums;

  void put_into(LossProblem& p) const {
    p.maxima = stats_data(maxima, p.num_rows, kNumMaxima, "maxima");
    p.sums = stats_data(sums, p.num_rows, kNumSums, "sums");
    p.mixture_sums = stats_data(mixture_sums, p.num_rows, kNumMixtureSums, "mixture_sums");
  }
};

const double* denominator_data(const Tensor& denominator) {
  const View view(denominator);
  if (view.dtype != aoti_torch_dtype_float64() || view.ndim != 0) fail("denominator must be a 0-d float64 tensor");
  return static_cast<const double*>(view.data);
}

// Whether two elements of a tensor may share memory: with dimensions in the order of their strides, each has to step
// over all that the smaller ones span.
bool may_overlap_itself(const View& view) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < view.ndim; ++d) {
    if (view.sizes[d] > 1) dims.emplace_back(view.strides[d], view.sizes[d]);
  }
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;
  for (const auto& [stride, size] : dims) {
    if (stride < span) return true;
    span += stride * (size - 1);
  }
  return false;
}

// First and one past the last byte of a tensor's elements.
std::pair<const char*, const char*> byte_range(const View& view, const char* name) {
  int64_t last = 0;
  for (int64_t d = 0; d < view.ndim; ++d) last += (view.sizes[d] - 1) * view.strides[d];
  const char* begin = static_cast<const char*>(view.data);
  return {begin, begin + (last + 1) * int64_t(size_of(dtype_of(view, name)))};
}

bool may_share_memory(const View& floats, const View& indices) {
  if (floats.is_empty() || indices.is_empty()) return false;
  int64_t count = 1;
  for (int64_t d = 0; d < indices.ndim; ++d) count *= indices.sizes[d];
  const auto [begin, end] = byte_range(floats, "student");
  const char* first = static_cast<const char*>(indices.data);
  return begin < first + count * int64_t(sizeof(int64_t)) && first < end;
}

void check_inplace(const View& view, const View& other, const std::string& name = "teacher_logits") {
  if (view.is_empty()) return;
  if (may_overlap_itself(view)) {
    fail("inplace=True needs student_logits whose elements do not share memory; got an expanded or overlapping view");
  }
  // Student and teacher may be the very same tensor, but not two views of one memory: a row's gradient would
  // overwrite what another row still has to read.
  const bool same = view.data == other.data && view.dtype == other.dtype && view.ndim == other.ndim &&
                    std::equal(view.strides, view.strides + view.ndim, other.strides);
  const auto [s_begin, s_end] = byte_range(view, "student");
  const auto [t_begin, t_end] = byte_range(other, name.c_str());
  if (!same && s_begin < t_end && t_begin < s_end) {
    fail("inplace=True needs " + name + " in memory of its own; got a view of the memory of student_logits");
  }
}

// -------------------------------------------------------------------------------- teachers that are k classes a row

// All but the weights, what the sum is divided by, and whether the values of the indices are right. The arguments have
// the student in the teacher's place.
SparseProblem sparse_problem_of(const Arguments& a, const Tensor& indices, const Tensor& log_probs, int64_t tail,
                                const View& student, const View* gradient, std::vector<int64_t>& leading) {
  SparseProblem p;
  p.rows = problem_of(a, student, gradient, leading, Part::kLoss);
  if (tail < 0 || tail > int64_t(Tail::kZero)) fail("tail is unknown");
  if (needs_labels(p.rows.divergence) || p.rows.divergence == Divergence::kMse) {
    fail("divergence must be one of probabilities, without a label among them");
  }
  p.tail = Tail(tail);
  const View ids(indices), y(log_probs);
  if (ids.ndim < 1 || ids.ndim != y.ndim || !std::equal(ids.sizes, ids.sizes + ids.ndim, y.sizes)) {
    fail("indices and log-probabilities must have one shape");
  }
  p.k = ids.sizes[ids.ndim - 1];
  if (p.k < 1 || p.k > kMostListed) fail("indices must list 1 to 4096 classes a row");
  check_vector(ids, p.rows.num_rows * p.k, "indices");
  check_vector(y, p.rows.num_rows * p.k, "log-probabilities");
  if (ids.dtype != aoti_torch_dtype_int64()) fail("indices must be int64");
  p.indices = static_cast<const int64_t*>(ids.data);
  p.log_probs.data = y.data;
  p.log_probs.dtype = dtype_of(y, "log-probabilities");
  if (p.log_probs.dtype == DType::kFloat64) p.rows.teacher.dtype = DType::kFloat64;  // the results' dtype
  if (gradient && gradient->data == student.data) {
    check_inplace(student, y, "teacher_log_probs");
    if (may_share_memory(student, ids)) fail("inplace=True needs teacher_indices in memory of their own");
  }
  return p;
}

// ------------------------------------------------------------------------ elements that are distributions of their own

// Tensors of the first one's shape, null for none, in the order in which that one lies in memory.
struct ElementTensor {
  Elements* elements;
  const View* view;
  const char* name;
};
void set_elements(BinaryProblem& p, const View& shape, const std::vector<ElementTensor>& tensors) {
  p.num_elements = 1;
  std::vector<int64_t> order;
  for (int64_t d = 0; d < shape.ndim; ++d) {
    p.num_elements *= shape.sizes[d];
    if (shape.sizes[d] != 1) order.push_back(d);
  }
  for (const auto& [elements, view, name] : tensors) {
    if (view->ndim != shape.ndim || !std::equal(view->sizes, view->sizes + view->ndim, shape.sizes)) {
      fail(std::string(name) + " must have the shape of " + tensors[0].name);
    }
    elements->data = view->data;
    elements->dtype = dtype_of(*view, name);
  }
  if (p.num_elements == 0) return;
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return shape.strides[a] > shape.strides[b]; });
  for (int64_t d : order) {
    const int64_t size = shape.sizes[d];
    const bool merges = p.num_dims > 0 && std::all_of(tensors.begin(), tensors.end(), [&](const ElementTensor& t) {
                          return t.elements->strides[p.num_dims - 1] == t.view->strides[d] * size;
                        });
    if (!merges && p.num_dims == kMaxElementDims) fail("student has too many dimensions");
    if (!merges) p.sizes[p.num_dims++] = 1;
    p.sizes[p.num_dims - 1] *= size;
    for (const ElementTensor& t : tensors) t.elements->strides[p.num_dims - 1] = t.view->strides[d];
  }
  if (p.num_dims == 0) p.sizes[p.num_dims++] = 1;
}

// A grad_output that is one number for all elements; null if it is one an element, or there is none.
const double* uniform_grad_output(const Arguments& a) {
  if (!a.grad_output) return nullptr;
  const View view(*a.grad_output);
  return view.ndim == 0 && View(a.student).ndim > 0 ? static_cast<const double*>(view.data) : nullptr;
}

// All of the binary loss's problem but what its sum is divided by; returns a tensor for the loss, which the problem has
// if it is one an element.
Tensor binary_problem(const Arguments& a, const OptionalTensor& pos_weight, const View& student, const View* gradient,
                      Device device, BinaryProblem& p) {
  set_numbers(p, a);
  if (needs_labels(p.divergence)) fail("divergence must be one of two classes");
  p.ignore_index = double(a.ignore_index);
  if (!a.labels && a.hard_weight > 0) fail("labels are needed for hard_weight > 0");

  const bool none = a.reduction == int64_t(Reduction::kNone);
  const View teacher(a.teacher);
  const bool in_double =
      dtype_of(student, "student") == DType::kFloat64 || dtype_of(teacher, "teacher") == DType::kFloat64;
  Tensor loss = new_tensor(device, none ? student.ndim : 0, student.sizes,
                           in_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32());
  const View loss_view(loss);
  std::vector<View> views;
  views.reserve(4);
  std::vector<ElementTensor> tensors = {{&p.student, &student, "student"}, {&p.teacher, &teacher, "teacher"}};
  if (gradient) tensors.push_back({&p.gradient, gradient, "gradient"});
  if (none) tensors.push_back({&p.losses, &loss_view, "loss"});
  const auto add = [&](Elements& elements, const Tensor& tensor, const char* name) {
    views.emplace_back(tensor);
    tensors.push_back({&elements, &views.back(), name});
  };
  if (a.labels) add(p.labels, *a.labels, "labels");
  if (a.weight) add(p.weight, *a.weight, "weight");
  if (pos_weight && a.hard_weight > 0) add(p.pos_weight, *pos_weight, "pos_weight");
  if (a.grad_output) {
    if (View(*a.grad_output).dtype != aoti_torch_dtype_float64()) fail("grad_output must be float64");
    if (!uniform_grad_output(a)) add(p.grad_output, *a.grad_output, "grad_output");
  }
  set_elements(p, student, tensors);
  if (gradient && gradient->data == student.data) {
    for (const ElementTensor& t : tensors) {
      if (t.view != gradient) check_inplace(student, *t.view, t.name);
    }
  }
  return loss;
}

// A gradient that is to be multiplied by `factor`, one for all or one an element.
BinaryProblem scale_elements_problem(const View& view, const View& factor_view, const OptionalTensor& labels,
                                     const OptionalTensor& weight, int64_t ignore_index) {
  // One factor for all is an operand that stays where it is.
  std::vector<int64_t> no_strides(size_t(view.ndim), 0);
  View broadcast = factor_view;
  if (factor_view.ndim == 0) {
    broadcast.ndim = view.ndim;
    broadcast.sizes = view.sizes;
    broadcast.strides = no_strides.data();
  }
  BinaryProblem p;
  std::vector<View> views;
  views.reserve(2);
  std::vector<ElementTensor> tensors = {{&p.gradient, &view, "gradient"}, {&p.grad_output, &broadcast, "factor"}};
  const auto add = [&](Elements& elements, const Tensor& tensor, const char* name) {
    views.emplace_back(tensor);
    tensors.push_back({&elements, &views.back(), name});
  };
  if (labels) add(p.labels, *labels, "labels");
  if (weight) add(p.weight, *weight, "weight");
  p.ignore_index = double(ignore_index);
  set_elements(p, view, tensors);
  return p;
}

}  // namespace
}  // namespace reptile_ext
