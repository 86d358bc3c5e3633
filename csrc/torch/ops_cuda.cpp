// The operators on CUDA: allocation, device and stream, launches. The work is done by csrc/cuda.
//
// Nothing here waits for the device, so a call can be captured in a CUDA graph: values of labels, weights and
// denominator are read by kernels alone. A label out of range makes its row NaN instead of an error.
//
// A library of its own (_cuda), loaded only where torch has CUDA. The test-suite compiles this file with
// REPTILE_EXT_ON_HOST and the kernels for tests/cuda/host.h: the same operators, of tensors on the CPU, in a namespace
// of their own.

#include "sparse.h"

#include <optional>

#include "../cuda/loss.h"

#if defined(REPTILE_EXT_ON_HOST)
#include "operators_on_host.h"
#endif

namespace reptile_ext {
namespace {

void check_launch(const char* error) {
  if (error) fail(std::string("CUDA: ") + error);
}

#if !defined(REPTILE_EXT_ON_HOST)

// The tensors' device for as long as this lives, and torch's current stream on it.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : device{aoti_torch_device_type_cuda(), 0} {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor.get(), &device.index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_device_guard(device.index, &guard_));
    check_launch(use_device(device.index));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device.index, &stream));
  }
  ~OnDevice() { aoti_torch_delete_device_guard(guard_); }
  OnDevice(const OnDevice&) = delete;

  DeviceProperties properties() const {
    thread_local std::vector<std::optional<DeviceProperties>> known;
    const size_t index = size_t(device.index);
    if (index >= known.size()) known.resize(index + 1);
    if (!known[index]) {
      DeviceProperties found;
      check_launch(properties_of(device.index, found));
      known[index] = found;
    }
    return *known[index];
  }

  void names(const void*, size_t) const {}

  Device device;
  void* stream = nullptr;

 private:
  DeviceGuardHandle guard_ = nullptr;
};

#endif

template <class T>
T* data_of(const Tensor& tensor) {
  return static_cast<T*>(View(tensor).data);
}

// A pointer to another device's memory, or to the host's, would end the process's use of the GPU.
void check_device(const Tensor& student, const Tensor& other, const char* name) {
  int32_t types[2], indices[2];
  const AtenTensorHandle handles[2] = {student.get(), other.get()};
  for (int i = 0; i < 2; ++i) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(handles[i], &types[i]));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(handles[i], &indices[i]));
  }
  if (types[0] != types[1] || indices[0] != indices[1]) fail(std::string(name) + " must be on the device of student");
}

// Of a tensor, every byte from the first to the last element.
void name_view(const OnDevice& place, const View& view, const char* name) {
  if (view.is_empty()) return;
  const auto [begin, end] = byte_range(view, name);
  place.names(begin, size_t(end - begin));
}

// The problem on its device, for every part, and the names of its memory but the row stats. `leading` becomes the shape
// without the class dimension.
DeviceLoss device_loss(const OnDevice& place, const Arguments& a, const View& student, const View* gradient,
                       std::vector<int64_t>& leading, Part part) {
  check_device(a.student, a.teacher, "teacher");
  if (a.labels) check_device(a.student, *a.labels, "labels");
  if (a.weight) check_device(a.student, *a.weight, "weight");
  if (a.denominator) check_device(a.student, *a.denominator, "denominator");
  if (a.grad_output) check_device(a.student, *a.grad_output, "grad_output");
  DeviceLoss loss;
  LossProblem& p = loss.problem;
  p = problem_of(a, student, gradient, leading, part);
  loss.ignore_index = a.ignore_index;
  if (a.weight) p.weights = weight_data(*a.weight, p.num_rows);
  const size_t rows = size_t(p.num_rows);
  name_view(place, student, "student");
  name_view(place, View(a.teacher), "teacher");
  if (gradient) name_view(place, *gradient, "gradient");
  place.names(p.labels, rows * 8);
  place.names(p.weights, rows * 8);
  place.names(p.grad_output, (p.grad_output_is_uniform ? 1 : rows) * 8);
  return loss;
}

void name_stats(const OnDevice& place, const LossProblem& p) {
  place.names(p.maxima, size_t(p.num_rows) * kNumMaxima * 8);
  place.names(p.sums, size_t(p.num_rows) * kNumSums * 8);
  place.names(p.mixture_sums, size_t(p.num_rows) * kNumMixtureSums * 8);
}

// The loss of rows [leading], and what it is divided by; `launch_rows` launches the kernel of the rows, of grid_blocks
// at most, which adds up their losses or leaves them in row_losses.
template <class Launch>
Tensor loss_of_rows(const OnDevice& place, const Arguments& a, DeviceLoss& loss, bool in_double,
                    const std::vector<int64_t>& leading, int64_t grid_blocks, const Launch& launch_rows) {
  LossProblem& p = loss.problem;
  const size_t rows = size_t(p.num_rows);
  const bool none = a.reduction == int64_t(Reduction::kNone), mean = a.reduction == int64_t(Reduction::kMean);
  const bool adds_up = !none && p.num_rows > 0;  // the kernel of the rows; of no row there is none
  // The divisor, how many blocks have ended, sums of tiles of rows, and a loss of each block or of each row.
  const int64_t num_tiles = num_row_tiles(p.num_rows);
  const int64_t sizes[1] = {2 + num_tiles + (adds_up ? grid_blocks : p.num_rows)};
  const Tensor scratch = new_tensor(place.device, 1, sizes, aoti_torch_dtype_float64());
  double* const divisor = data_of<double>(scratch);
  double* const tiles = divisor + 2;
  place.names(divisor, size_t(sizes[0]) * 8);
  const int32_t dtype = in_double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  Tensor result = new_tensor(place.device, none ? int64_t(leading.size()) : 0, leading.data(), dtype);
  place.names(View(result).data, (none ? rows : 1) * (in_double ? 8 : 4));
  if (adds_up) {
    loss.sum = View(result).data;
    loss.sum_is_double = in_double;
    loss.of_blocks = tiles + num_tiles;
    loss.arrived = reinterpret_cast<uint32_t*>(divisor + 1);
  } else {
    p.row_losses = tiles + num_tiles;
  }
  p.gradient_scale = a.scale;
  if (a.denominator || (mean && (p.labels || p.weights))) {
    const double* denominator = a.denominator ? denominator_data(*a.denominator) : nullptr;
    place.names(denominator, 8);
    check_launch(launch_divisor(loss, denominator, tiles, divisor, place.stream));
    loss.divisor = divisor;
  } else {
    if (mean && p.num_rows > 0) p.gradient_scale /= double(p.num_rows);
    if (adds_up) check_launch(set_to_zero(loss.arrived, place.stream));
  }

  check_launch(launch_rows());
  if (!adds_up) check_launch(launch_losses(loss, none, in_double, tiles, View(result).data, place.stream));
  return result;
}

Tensor run(const Arguments& a, const View& student, const View* gradient, const Combined* combined) {
  const OnDevice place(a.student);
  std::vector<int64_t> leading;
  DeviceLoss loss = device_loss(place, a, student, gradient, leading, combined ? Part::kGradient : Part::kLoss);
  LossProblem& p = loss.problem;
  if (combined) {
    check_device(a.student, combined->maxima, "maxima");
    check_device(a.student, combined->sums, "sums");
    check_device(a.student, combined->mixture_sums, "mixture_sums");
    combined->put_into(p);
    name_stats(place, p);
  }
  const Plan plan = plan_of(p, place.properties());
  return loss_of_rows(place, a, loss, is_double(p), leading, plan.grid_blocks,
                      [&] { return launch_loss(loss, plan, place.stream); });
}

Tensor run_stats(const Arguments& a, const View& student, Part part, int count, const OptionalTensor& maxima,
                 const OptionalTensor& sums) {
  if (maxima) check_device(a.student, *maxima, "maxima");
  if (sums) check_device(a.student, *sums, "sums");
  const OnDevice place(a.student);
  std::vector<int64_t> leading;
  DeviceLoss loss = device_loss(place, a, student, nullptr, leading, part);
  LossProblem& p = loss.problem;
  Stats stats = stats_of(p, part, count, maxima, sums, place.device);
  name_stats(place, p);
  check_launch(launch_loss(loss, plan_of(p, place.properties()), place.stream));
  return std::move(stats.tensor);
}

// The problem's tensors: on one device, and named.
void name_elements(const OnDevice& place, const Tensor& first,
                   std::initializer_list<std::pair<const Tensor*, const char*>> others) {
  for (const auto& [tensor, name] : others) {
    if (!tensor) continue;
    check_device(first, *tensor, name);
    name_view(place, View(*tensor), name);
  }
}
const Tensor* pointer_to(const OptionalTensor& tensor) { return tensor ? &*tensor : nullptr; }

Tensor run_binary(const Arguments& a, const OptionalTensor& pos_weight, const View& student, const View* gradient) {
  const OnDevice place(a.student);
  name_elements(place, a.student,
                {{&a.student, "student"},
                 {&a.teacher, "teacher"},
                 {pointer_to(a.labels), "labels"},
                 {pointer_to(a.weight), "weight"},
                 {pointer_to(pos_weight), "pos_weight"},
                 {pointer_to(a.denominator), "denominator"},
                 {pointer_to(a.grad_output), "grad_output"}});
  DeviceBinary binary;
  BinaryProblem& p = binary.problem;
  Tensor result = binary_problem(a, pos_weight, student, gradient, place.device, p);
  const View result_view(result);
  if (gradient) name_view(place, *gradient, "gradient");
  name_view(place, result_view, "loss");
  binary.factor = uniform_grad_output(a);

  // Sums of tiles, behind them the divisor, and sums of tiles of tiles.
  const int64_t tiles = num_tiles(p), sizes[1] = {tiles + 1 + num_row_tiles(tiles)};
  const Tensor scratch = new_tensor(place.device, 1, sizes, aoti_torch_dtype_float64());
  p.sums = data_of<double>(scratch);
  place.names(p.sums, size_t(sizes[0]) * 8);
  double* const divisor = p.sums + tiles;
  double* const tiles_of_tiles = divisor + 1;
  const bool mean = a.reduction == int64_t(Reduction::kMean);
  // To the launchers of rows' numbers a tile is a row.
  DeviceLoss of_tiles;
  of_tiles.problem.num_rows = p.num_elements > 0 ? tiles : 0;
  p.scale = a.scale;
  if ((a.denominator || mean) && (p.labels.data || p.weight.data)) {
    check_launch(launch_binary_weights(binary, place.properties(), place.stream));
    of_tiles.problem.weights = p.sums;
    const double* const denominator = a.denominator ? denominator_data(*a.denominator) : nullptr;
    check_launch(launch_divisor(of_tiles, denominator, tiles_of_tiles, divisor, place.stream));
    binary.divisor = divisor;
  } else if (a.denominator && p.num_elements > 0) {
    binary.divisor = denominator_data(*a.denominator);
  } else if (mean && p.num_elements > 0) {
    p.scale /= double(p.num_elements);
  }
  check_launch(launch_binary(binary, place.properties(), place.stream));
  if (a.reduction == int64_t(Reduction::kNone)) return result;
  of_tiles.problem.row_losses = p.sums;
  of_tiles.problem.gradient_scale = p.scale;
  of_tiles.divisor = binary.divisor;
  const bool in_double = result_view.dtype == aoti_torch_dtype_float64();
  check_launch(launch_losses(of_tiles, false, in_double, tiles_of_tiles, result_view.data, place.stream));
  return result;
}

Tensor run_sparse(const Arguments& a, const Tensor& indices, const Tensor& log_probs, int64_t tail, bool truncate,
                  const View& student, const View* gradient) {
  check_device(a.student, indices, "indices");
  check_device(a.student, log_probs, "log-probabilities");
  const OnDevice place(a.student);
  std::vector<int64_t> leading;
  DeviceSparse problem;
  const SparseProblem sparse = sparse_problem_of(a, indices, log_probs, tail, student, gradient, leading);
  leading.clear();
  problem.rows = device_loss(place, a, student, gradient, leading, Part::kLoss);
  problem.tail = sparse.tail;
  problem.k = sparse.k;
  problem.indices = sparse.indices;
  problem.log_probs = sparse.log_probs.data;
  problem.log_probs_dtype = sparse.log_probs.dtype;
  problem.truncate = truncate;
  name_view(place, View(log_probs), "log-probabilities");
  place.names(sparse.indices, size_t(sparse.rows.num_rows * sparse.k) * sizeof(int64_t));
  const SparsePlan plan = plan_of(problem, place.properties());
  return loss_of_rows(place, a, problem.rows, problem.is_double(), leading, plan.grid_blocks,
                      [&] { return launch_sparse(problem, plan, place.stream); });
}

Device device_of(const Tensor& tensor) { return OnDevice(tensor).device; }
Tensor new_gradient(const Tensor& student) { return fresh_gradient(student); }

void scale_gradient_(const Tensor& gradient, const Tensor& factor, const std::optional<Tensor>& labels,
                     const std::optional<Tensor>& weight, int64_t ignore_index, int64_t vocab_size, int64_t dim) {
  check_device(gradient, factor, "factor");
  if (labels) check_device(gradient, *labels, "labels");
  if (weight) check_device(gradient, *weight, "weight");
  const OnDevice place(gradient);
  const View view(gradient), factor_view(factor);
  DeviceLoss loss;
  LossProblem& p = loss.problem;
  p = scale_problem(view, factor_view, vocab_size, dim);
  loss.ignore_index = ignore_index;
  if (labels) p.labels = label_data(*labels, p.num_rows);
  if (weight) p.weights = weight_data(*weight, p.num_rows);
  const size_t rows = size_t(p.num_rows);
  const bool is_double = factor_view.dtype == aoti_torch_dtype_float64(), is_uniform = factor_view.ndim == 0;
  name_view(place, view, "gradient");
  place.names(p.labels, rows * 8);
  place.names(p.weights, rows * 8);
  place.names(factor_view.data, (is_uniform ? 1 : rows) * (is_double ? 8 : 4));
  check_launch(launch_scale(loss, factor_view.data, is_double, is_uniform, place.properties(), place.stream));
}

void scale_elements_(const Tensor& gradient, const Tensor& factor, const std::optional<Tensor>& labels,
                     const std::optional<Tensor>& weight, int64_t ignore_index) {
  const OnDevice place(gradient);
  name_elements(
      place, gradient,
      {{&gradient, "gradient"}, {&factor, "factor"}, {pointer_to(labels), "labels"}, {pointer_to(weight), "weight"}});
  const View factor_view(factor);
  DeviceBinary binary;
  binary.problem = scale_elements_problem(View(gradient), factor_view, labels, weight, ignore_index);
  check_launch(launch_binary_scale(binary, factor_view.ndim == 0, place.properties(), place.stream));
}

}  // namespace
}  // namespace reptile_ext

#if !defined(REPTILE_EXT_ON_HOST)
STABLE_TORCH_LIBRARY_IMPL(reptile_ext, CUDA, m) {
  REPTILE_EXT_IMPLEMENT(m);
  REPTILE_EXT_IMPLEMENT_SPARSE(m);
}
#else
STABLE_TORCH_LIBRARY(reptile_ext_on_host, m) {
  REPTILE_EXT_DEFINE(m);
  REPTILE_EXT_DEFINE_SPARSE(m);
}
STABLE_TORCH_LIBRARY_IMPL(reptile_ext_on_host, CPU, m) {
  REPTILE_EXT_IMPLEMENT(m);
  REPTILE_EXT_IMPLEMENT_SPARSE(m);
}
#endif

#if !defined(REPTILE_EXT_ON_HOST)
// Through ctypes: null, or why the kernels do not run on a device (too old, or its driver is).
extern "C" __attribute__((visibility("default"))) const char* reptile_ext_cuda_problem(int device) {
  reptile_ext::DeviceProperties unused;
  return reptile_ext::properties_of(device, unused);
}
#endif
