// The operators: schemas, checks, allocation, threads. The work is done by the row drivers of csrc/cpu.
//
// distillation_loss returns the loss and d loss / d student, computed in one go; distillation_loss_ writes that
// gradient over the student's logits and returns the loss; scale_gradient_ is the backward pass, what is left of it.
// Where a gradient is computed in the backward pass only, `upstream` is what comes from above and multiplies it.
// Python checks and words the arguments
// (reptile_ext/arguments.py); what is checked here again is what memory safety hangs on, because anybody may call
// torch.ops.reptile_ext.* directly.

#include "stable_abi.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../cpu/dispatch.h"
#include "../rows.h"

namespace reptile_ext {
namespace {

using torch::stable::Tensor;

// A message that begins with labels, weight, denominator or inplace becomes a ValueError in Python (functional.py).
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

// Memory of this thread that is kept from call to call: a few rows of exponentials.
void* thread_scratch(size_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<void, Free> memory;
  thread_local size_t capacity = 0;
  if (bytes > capacity) {
    memory.reset();
    capacity = 0;
    const size_t rounded = (bytes + 4095) / 4096 * 4096;
    memory.reset(std::aligned_alloc(4096, rounded));
    if (!memory) fail("out of memory for " + std::to_string(rounded) + " bytes of scratch");
    capacity = rounded;
  }
  return memory.get();
}

// A fresh gradient costs more in page faults than in arithmetic; with huge pages there are 512 times fewer of them.
void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: errors are fine
#endif
}

// Calls f(begin, end) over [0, n) in chunks that threads fetch as they get free: rows that are masked cost nothing, so
// equal shares would not be equal work. Results do not depend on who does which row.
template <class F>
void parallel_rows(int64_t n, int64_t chunk, const F& f) {
  uint32_t num_threads = 1;
  if (n > chunk) TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&num_threads));
  if (num_threads <= 1) {
    if (n > 0) f(int64_t(0), n);
    return;
  }
  struct Shared {
    const F& f;
    int64_t n, chunk;
    std::atomic<int64_t> next{0};
    std::exception_ptr error;
    std::mutex mutex;
  } shared{f, n, chunk, {}, nullptr, {}};
  const auto work = [](int64_t, int64_t, void* context) {
    Shared& s = *static_cast<Shared*>(context);
    try {
      for (int64_t begin; (begin = s.next.fetch_add(s.chunk)) < s.n;) s.f(begin, std::min(begin + s.chunk, s.n));
    } catch (...) {  // may not cross the C boundary
      std::lock_guard<std::mutex> lock(s.mutex);
      s.error = std::current_exception();
    }
  };
  const int64_t workers = std::min<int64_t>(num_threads, (n + chunk - 1) / chunk);
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, workers, 1, work, &shared));
  if (shared.error) std::rethrow_exception(shared.error);
}

struct Arguments {
  const Tensor& student;
  const Tensor& teacher;
  const std::optional<Tensor>& labels;
  const std::optional<Tensor>& weight;
  const std::optional<Tensor>& denominator;
  const std::optional<Tensor>& upstream;
  int64_t divergence;
  double beta, omega, student_temperature, teacher_temperature, soft_scale, hard_weight, label_smoothing;
  int64_t ignore_index, reduction;
  double scale;
  int64_t dim;
};

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

// Weights of the rows, 0 for those that are out; empty if all are in with weight 1. Checks the labels, before
// anything is written.
std::vector<double> row_weights(const Arguments& a, const LossProblem& p, double* total) {
  const int64_t n = p.num_rows;
  *total = double(n);
  if (!a.labels && !a.weight) return {};
  std::vector<double> weights(size_t(n), 1.0);
  if (a.weight) {
    std::copy_n(weight_data(*a.weight, n), n, weights.begin());
    for (double w : weights) {
      if (!(w >= 0 && w < std::numeric_limits<double>::infinity())) {
        fail("weight must be finite and not negative; got " + std::to_string(w));
      }
    }
  }
  if (p.labels) {
    for (int64_t r = 0; r < n; ++r) {
      const int64_t label = p.labels[r];
      if (label == a.ignore_index) {
        weights[r] = 0;
      } else if (weights[r] != 0 && (label < 0 || label >= p.vocab_size)) {
        fail("labels must lie in [0, " + std::to_string(p.vocab_size) +
             ") or equal ignore_index=" + std::to_string(a.ignore_index) + "; got " + std::to_string(label));
      }
    }
  }
  *total = 0;
  for (double w : weights) *total += w;
  return weights;
}

Tensor new_tensor(int64_t ndim, const int64_t* sizes, int32_t dtype) {
  std::vector<int64_t> strides(static_cast<size_t>(ndim), 1);
  for (int64_t d = ndim - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(sizes[d + 1], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(ndim, sizes, strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Rows that one thread takes at a time.
int64_t rows_per_task(int64_t vocab_size) {
  constexpr int64_t kPairsPerTask = 1 << 15;  // below this, waking a thread costs more than it does
  const int64_t rows = std::max<int64_t>(1, kPairsPerTask / vocab_size);
  return rows > 64 ? rows / 64 * 64 : rows;  // whole pairs of vectors of rows that lie side by side
}

// The loss; the gradient goes to `gradient` (the student's own view: in place) unless that is null.
Tensor run(const Arguments& a, const View& student, const View* gradient) {
  const View teacher(a.teacher);
  const int64_t ndim = student.ndim, dim = a.dim < 0 ? a.dim + ndim : a.dim;
  if (ndim < 1 || teacher.ndim != ndim || dim < 0 || dim >= ndim) fail("teacher or dim does not fit student");
  LossProblem p;
  std::vector<int64_t> leading;
  for (int64_t d = 0; d < ndim; ++d) {
    if (d == dim) continue;
    if (teacher.sizes[d] != student.sizes[d]) fail("teacher must have the shape of student outside dim");
    leading.push_back(student.sizes[d]);
  }
  if (student.sizes[dim] < 1 || teacher.sizes[dim] < 1) fail("student and teacher need at least one class");
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

  if (a.divergence < 0 || a.divergence >= kNumDivergences) fail("divergence is unknown");
  p.divergence = Divergence(a.divergence);
  p.beta = a.beta;
  p.omega = a.omega;
  if (!(a.student_temperature > 0) || !(a.teacher_temperature > 0)) fail("temperature must be positive");
  p.student_temperature = a.student_temperature;
  p.teacher_temperature = a.teacher_temperature;
  p.soft_scale = a.soft_scale;
  p.hard_weight = a.hard_weight;
  p.label_smoothing = a.label_smoothing;
  if (a.labels) {
    p.labels = label_data(*a.labels, p.num_rows);
  } else if (a.hard_weight > 0 || needs_labels(p.divergence)) {
    fail("labels are needed for hard_weight > 0 and for dkd");
  }

  double total = 0;
  const std::vector<double> weights = row_weights(a, p, &total);
  if (!weights.empty()) p.weights = weights.data();
  // The loss is scale / divisor · Σ w ℓ.
  double divisor = 1;
  if (a.denominator) {
    const View view(*a.denominator);
    if (view.dtype != aoti_torch_dtype_float64() || view.ndim != 0) fail("denominator must be a 0-d float64 tensor");
    divisor = *static_cast<const double*>(view.data);
    if (total == 0) {
      divisor = 1;  // no row in: the loss is 0, whatever it is to be divided by
    } else if (!(divisor > 0 && divisor < std::numeric_limits<double>::infinity())) {
      fail("denominator must be positive and finite; got " + std::to_string(divisor));
    }
  } else if (a.reduction == int64_t(Reduction::kMean)) {
    divisor = total == 0 ? 1 : total;  // no row in: the loss is 0, not NaN
  }
  p.gradient_scale = a.scale / divisor;

  if (a.upstream) {
    const View view(*a.upstream);
    if (view.dtype != aoti_torch_dtype_float64()) fail("upstream must be float64");
    p.upstream_is_uniform = view.ndim == 0;
    check_vector(view, p.upstream_is_uniform ? 1 : p.num_rows, "upstream");
    p.upstream = static_cast<const double*>(view.data);
  }

  const bool is_double = p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
  const int32_t loss_dtype = is_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const bool none = a.reduction == int64_t(Reduction::kNone);
  Tensor loss = new_tensor(none ? int64_t(leading.size()) : 0, leading.data(), loss_dtype);

  const Kernels& kernels = *current_instruction_set().kernels;
  std::vector<double> row_losses(static_cast<size_t>(p.num_rows));
  p.row_losses = row_losses.data();
  const size_t scratch = kernels.scratch_bytes(p);
  parallel_rows(p.num_rows, rows_per_task(p.vocab_size),
                [&](int64_t begin, int64_t end) { kernels.loss_rows(p, begin, end, thread_scratch(scratch)); });

  void* out = View(loss).data;
  const auto write = [&](int64_t i, double value) {
    if (is_double) {
      static_cast<double*>(out)[i] = value;
    } else {
      static_cast<float*>(out)[i] = static_cast<float>(value);
    }
  };
  if (none) {
    for (int64_t r = 0; r < p.num_rows; ++r) write(r, row_losses[r] * p.gradient_scale);
  } else {
    double sum = 0;  // in row order, whoever computed the rows
    for (double row_loss : row_losses) sum += row_loss;
    write(0, sum * p.gradient_scale);
  }
  return loss;
}

#define REPTILE_EXT_PARAMETERS                                                                                         \
  const Tensor &student, const Tensor &teacher, const std::optional<Tensor>&labels,                                    \
      const std::optional<Tensor>&weight, const std::optional<Tensor>&denominator,                                     \
      const std::optional<Tensor>&upstream, int64_t divergence, double beta, double omega, double student_temperature, \
      double teacher_temperature, double soft_scale, double hard_weight, double label_smoothing, int64_t ignore_index, \
      int64_t reduction, double scale, int64_t dim
#define REPTILE_EXT_ARGUMENTS                                                                              \
  Arguments {                                                                                              \
    student, teacher, labels, weight, denominator, upstream, divergence, beta, omega, student_temperature, \
        teacher_temperature, soft_scale, hard_weight, label_smoothing, ignore_index, reduction, scale, dim \
  }

std::tuple<Tensor, Tensor> distillation_loss(REPTILE_EXT_PARAMETERS, bool needs_gradient) {
  const Arguments arguments = REPTILE_EXT_ARGUMENTS;
  const View view(student);
  if (!needs_gradient) {
    const int64_t nothing[1] = {0};
    return {run(arguments, view, nullptr), new_tensor(1, nothing, view.dtype)};
  }
  size_t bytes = size_of(dtype_of(view, "student"));
  for (int64_t d = 0; d < view.ndim; ++d) bytes *= size_t(view.sizes[d]);
  Tensor gradient = [&] {
    try {
      return torch::stable::empty_like(student);
    } catch (const std::exception&) {
      fail("not enough memory for the gradient of student_logits, " + std::to_string(bytes) +
           " bytes; inplace=True needs none");
    }
  }();
  const View gradient_view(gradient);
  advise_huge_pages(gradient_view.data, bytes);
  Tensor loss = run(arguments, view, &gradient_view);
  return {std::move(loss), std::move(gradient)};
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

Tensor distillation_loss_(REPTILE_EXT_PARAMETERS) {
  const View view(student), other(teacher);
  if (!view.is_empty()) {
    if (may_overlap_itself(view)) {
      fail("inplace=True needs student_logits whose elements do not share memory; got an expanded or overlapping view");
    }
    // Student and teacher may be the very same tensor, but not two views of one memory: a row's gradient would
    // overwrite what another row still has to read.
    const bool same = view.data == other.data && view.dtype == other.dtype && view.ndim == other.ndim &&
                      std::equal(view.strides, view.strides + view.ndim, other.strides);
    const auto [s_begin, s_end] = byte_range(view, "student");
    const auto [t_begin, t_end] = byte_range(other, "teacher");
    if (!same && s_begin < t_end && t_begin < s_end) {
      fail("inplace=True needs teacher_logits in memory of its own; got a view of the memory of student_logits");
    }
  }
  return run(REPTILE_EXT_ARGUMENTS, view, &view);
}

// gradient · factor, where the gradient lies: one factor for all, or one a row. Nothing to do where it is 1. What is
// out, rows by `labels` and `weight` and classes from `vocab_size` on, is 0 and stays 0, even times an infinity or NaN.
void scale_gradient_(const Tensor& gradient, const Tensor& factor, const std::optional<Tensor>& labels,
                     const std::optional<Tensor>& weight, int64_t ignore_index, int64_t vocab_size, int64_t dim) {
  const View view(gradient), factor_view(factor);
  if (dim < 0) dim += view.ndim;
  if (dim < 0 || dim >= view.ndim) fail("dim does not fit gradient");
  LossProblem p;
  p.vocab_size = p.gradient_size = std::min(view.sizes[dim], std::max<int64_t>(vocab_size, 0));
  set_rows(p, view, view, &view, dim);
  p.gradient.data = view.data;
  p.gradient.dtype = dtype_of(view, "gradient");
  p.gradient.class_stride = view.sizes[dim] == 1 ? 1 : view.strides[dim];
  bool is_uniform = factor_view.ndim == 0;
  std::vector<double> factors(is_uniform ? 1 : static_cast<size_t>(p.num_rows));
  check_vector(factor_view, is_uniform ? 1 : p.num_rows, "factor");
  if (factor_view.dtype == aoti_torch_dtype_float64()) {
    std::copy_n(static_cast<const double*>(factor_view.data), factors.size(), factors.begin());
  } else if (factor_view.dtype == aoti_torch_dtype_float32()) {
    std::copy_n(static_cast<const float*>(factor_view.data), factors.size(), factors.begin());
  } else {
    fail("factor must be float32 or float64");
  }
  if (std::all_of(factors.begin(), factors.end(), [](double f) { return f == 1; })) return;
  const bool finite = std::all_of(factors.begin(), factors.end(), [](double f) { return std::isfinite(f); });
  if (!finite && (labels || weight)) {
    if (is_uniform) factors.resize(static_cast<size_t>(p.num_rows), factors[0]);
    is_uniform = false;
    if (labels) {
      const int64_t* data = label_data(*labels, p.num_rows);
      for (int64_t r = 0; r < p.num_rows; ++r) factors[r] = data[r] == ignore_index ? 0 : factors[r];
    }
    if (weight) {
      const double* data = weight_data(*weight, p.num_rows);
      for (int64_t r = 0; r < p.num_rows; ++r) factors[r] = data[r] == 0 ? 0 : factors[r];
    }
  }
  const Kernels& kernels = *current_instruction_set().kernels;
  parallel_rows(p.num_rows, rows_per_task(std::max<int64_t>(1, p.gradient_size)),
                [&](int64_t begin, int64_t end) { kernels.scale_rows(p, factors.data(), is_uniform, begin, end); });
}

}  // namespace
}  // namespace reptile_ext

#define REPTILE_EXT_SCHEMA_TAIL                                                                                   \
  "Tensor teacher, Tensor? labels, Tensor? weight, Tensor? denominator, Tensor? upstream, int kind, float beta, " \
  "float omega, "                                                                                                 \
  "float student_temperature, float teacher_temperature, float soft_scale, float hard_weight, float "             \
  "label_smoothing, int ignore_index, int reduction, float scale, int dim"

STABLE_TORCH_LIBRARY(reptile_ext, m) {
  m.def("distillation_loss(Tensor student, " REPTILE_EXT_SCHEMA_TAIL
        ", bool needs_gradient) -> (Tensor loss, Tensor gradient)");
  m.def("distillation_loss_(Tensor(a!) student, " REPTILE_EXT_SCHEMA_TAIL ") -> Tensor");
  m.def(
      "scale_gradient_(Tensor(a!) gradient, Tensor factor, Tensor? labels, Tensor? weight, int ignore_index, int "
      "vocab_size, int dim) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(reptile_ext, CPU, m) {
  m.impl("distillation_loss", TORCH_BOX(&reptile_ext::distillation_loss));
  m.impl("distillation_loss_", TORCH_BOX(&reptile_ext::distillation_loss_));
  m.impl("scale_gradient_", TORCH_BOX(&reptile_ext::scale_gradient_));
}

// For the test-suite and `reptile doctor`, through ctypes: the set in use; with a name, use that one from now on. Null
// if there is no such set on this machine; `error`, of `size` bytes, then says so.
extern "C" __attribute__((visibility("default"))) const char* reptile_ext_instruction_set(const char* name, char* error,
                                                                                          size_t size) {
  try {
    return (name ? reptile_ext::select_instruction_set(name) : reptile_ext::current_instruction_set()).name;
  } catch (const std::exception& exception) {
    std::strncpy(error, exception.what(), size - 1);
    error[size - 1] = 0;
    return nullptr;
  }
}
