// The small kernels (what the loss is divided by, its sum, a gradient times a factor), and what chooses among those of
// loss_rows.cu.

#include "storage.h"

#include "../divergence.h"

namespace reptile_ext {

const char* launch_ring_float32(const DeviceLoss& loss, const Plan& plan, void* stream);
const char* launch_ring_bfloat16(const DeviceLoss& loss, const Plan& plan, void* stream);
const char* launch_ring_float16(const DeviceLoss& loss, const Plan& plan, void* stream);
const char* launch_any_float(const DeviceLoss& loss, const Plan& plan, void* stream);
const char* launch_any_double(const DeviceLoss& loss, const Plan& plan, void* stream);
const char* launch_sparse_float(const DeviceSparse& problem, const SparsePlan& plan, void* stream);
const char* launch_sparse_double(const DeviceSparse& problem, const SparsePlan& plan, void* stream);

namespace {

bool is_double(const LossProblem& p) {
  return p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
}

REPTILE_EXT_DEVICE double weight_of(const DeviceLoss& device, int64_t n) {
  const LossProblem& p = device.problem;
  if (p.labels && load(p.labels + n) == device.ignore_index) return 0;
  return p.weights ? load(p.weights + n) : 1.0;
}

// Sums of the rows' losses, or weights, a tile of rows a block: of millions of rows one block would be busy for longer
// than the loss takes. A tile is the same on every device, and so is the order of the additions.
REPTILE_EXT_KERNEL(kMaxBlockThreads)
tile_sums_kernel(REPTILE_EXT_ARGUMENT DeviceLoss device, bool of_losses, double* out) {
  Team<double> block = whole_block(shared_memory<Exchange<double>>());
  const LossProblem& p = device.problem;
  double sum = 0;
  REPTILE_EXT_UNROLL
  for (int i = 0; i < kRowsPerTile; i += kMaxBlockThreads) {  // loads that do not wait for one another
    const int64_t n = block_rank() * kRowsPerTile + i + thread_rank();
    if (n < p.num_rows) sum += of_losses ? load(p.row_losses + n) : weight_of(device, n);
  }
  sum = sum_of(block, sum);
  if (thread_rank() == 0) store(out + block_rank(), sum);
}

// What a mean is divided by; one block, so that it comes out the same in every run.
REPTILE_EXT_KERNEL(kMaxBlockThreads)
divisor_kernel(REPTILE_EXT_ARGUMENT DeviceLoss device, const double* denominator, double* out) {
  Team<double> block = whole_block(shared_memory<Exchange<double>>());
  const LossProblem& p = device.problem;
  double total = 0;
  for (int64_t n = thread_rank(); n < p.num_rows; n += block_threads()) total += weight_of(device, n);
  total = sum_of(block, total);
  if (thread_rank() == 0) {
    store(out, total == 0 ? 1.0 : denominator ? load(denominator) : total);
    if (device.arrived) store(device.arrived, uint32_t(0));
  }
}

// The loss from the rows' losses: their sum, by one block, or each.
REPTILE_EXT_KERNEL(kMaxBlockThreads)
losses_kernel(REPTILE_EXT_ARGUMENT DeviceLoss device, bool each, bool is_double, void* out) {
  Team<double> block = whole_block(shared_memory<Exchange<double>>());
  const LossProblem& p = device.problem;
  const double factor = device.divisor ? p.gradient_scale / load(device.divisor) : p.gradient_scale;
  double sum = 0;
  for (int64_t n = block_rank() * block_threads() + thread_rank(); n < p.num_rows;
       n += num_blocks() * block_threads()) {
    const double loss = load(p.row_losses + n);
    sum += loss;
    if (each) store_loss(out, is_double, n, loss * factor);
  }
  if (each) return;
  sum = sum_of(block, sum);
  if (thread_rank() == 0) store_loss(out, is_double, 0, sum * factor);
}

// gradient · factor, where the gradient lies: one read and one write of each element, or nothing where the factor is 1,
// which is what loss.backward() brings. The host never asks. Ignored rows and the classes past vocab_size are 0
// already, and stay so even times an infinity.
template <class V>
REPTILE_EXT_KERNEL(kMaxBlockThreads)
scale_kernel(REPTILE_EXT_ARGUMENT DeviceLoss device, const Plan plan, const void* factors, bool factors_are_double,
             bool is_uniform) {
  const LossProblem& p = device.problem;
  const auto factor_of = [&](int64_t n) {
    return factors_are_double ? load(static_cast<const double*>(factors) + n)
                              : double(load(static_cast<const float*>(factors) + n));
  };
  if (is_uniform && factor_of(0) == 1) return;  // all threads of the grid
  Team<V> team{nullptr, plan.team_threads, thread_rank() % plan.team_threads, 1, 0};
  const int64_t rows_per_block = plan.rows_per_block();
  for (int64_t base = block_rank() * rows_per_block; base < p.num_rows; base += num_blocks() * rows_per_block) {
    const int64_t n = base + thread_rank() / plan.team_threads;
    if (n >= p.num_rows || !row_counts(device, n)) continue;
    const double factor = factor_of(is_uniform ? 0 : n);
    if (factor == 1) continue;
    const Place place(p, n);
    MemoryRow<V>(p, place).each(team, [&](int64_t chunk, const V(&g)[kChunk], const V(&)[kChunk]) {
      V scaled[kChunk];
      for (int i = 0; i < kChunk; ++i) scaled[i] = g[i] * V(factor);
      store_gradient(p.gradient, place, chunk, scaled);
    });
  }
}

}  // namespace

#if defined(__CUDACC__)
const char* properties_of(int device, DeviceProperties& found) {
  int major = 0;
  cudaFuncAttributes code = {};
  cudaError_t error = cudaDeviceGetAttribute(&found.num_multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, divisor_kernel);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&found.shared_block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&found.shared_all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  // Code compiled for an older device and translated for this one knows no clusters.
  found.has_clusters = major >= 9 && code.ptxVersion >= 90;
  return nullptr;
}

const char* use_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

// `loss` with rows that are tiles of its own.
const char* sum_tiles(const DeviceLoss& loss, bool of_losses, double* tiles, DeviceLoss& of_tiles, void* stream) {
  of_tiles.problem.num_rows = num_row_tiles(loss.problem.num_rows);
  of_tiles.problem.gradient_scale = loss.problem.gradient_scale;
  of_tiles.divisor = loss.divisor;
  of_tiles.arrived = loss.arrived;
  of_tiles.problem.weights = of_tiles.problem.row_losses = tiles;
  return launch(&tile_sums_kernel, {of_tiles.problem.num_rows, kMaxBlockThreads}, stream, loss, of_losses, tiles);
}

const char* launch_divisor(const DeviceLoss& loss, const double* denominator, double* tiles, double* out,
                           void* stream) {
  if (loss.problem.num_rows <= kRowsPerTile) {
    return launch(&divisor_kernel, {1, kMaxBlockThreads}, stream, loss, denominator, out);
  }
  DeviceLoss of_tiles;
  const char* error = sum_tiles(loss, false, tiles, of_tiles, stream);
  return error ? error : launch(&divisor_kernel, {1, kMaxBlockThreads}, stream, of_tiles, denominator, out);
}

const char* set_to_zero(uint32_t* number, void* stream) { return set_bytes_to_zero(number, sizeof(*number), stream); }

const char* launch_losses(const DeviceLoss& loss, bool each, bool is_double, double* tiles, void* out, void* stream) {
  if (!each && loss.problem.num_rows > kRowsPerTile) {
    DeviceLoss of_tiles;
    const char* error = sum_tiles(loss, true, tiles, of_tiles, stream);
    return error ? error : launch(&losses_kernel, {1, kMaxBlockThreads}, stream, of_tiles, each, is_double, out);
  }
  const int64_t blocks = each ? (loss.problem.num_rows + kMaxBlockThreads - 1) / kMaxBlockThreads : 1;
  if (blocks == 0) return nullptr;
  constexpr int64_t kMostBlocks = 1024;
  return launch(&losses_kernel, {blocks < kMostBlocks ? blocks : kMostBlocks, kMaxBlockThreads}, stream, loss, each,
                is_double, out);
}

const char* launch_loss(DeviceLoss loss, const Plan& plan, void* stream) {
  LossProblem& p = loss.problem;
  if (p.num_rows == 0) return nullptr;
  if (!(p.soft_scale > 0)) {  // the teacher is unused; the student in its place is at a distance of 0
    p.teacher = p.student;
    p.teacher_temperature = p.student_temperature;
    p.divergence = Divergence::kForwardKl;
  }
  if (is_double(p)) return launch_any_double(loss, plan, stream);
  if (plan.source == Plan::Source::kMemory) return launch_any_float(loss, plan, stream);
  if (p.student.dtype == DType::kFloat32) return launch_ring_float32(loss, plan, stream);
  return p.student.dtype == DType::kBFloat16 ? launch_ring_bfloat16(loss, plan, stream)
                                             : launch_ring_float16(loss, plan, stream);
}

const char* launch_sparse(const DeviceSparse& problem, const SparsePlan& plan, void* stream) {
  if (problem.rows.problem.num_rows == 0) return nullptr;
  return problem.is_double() ? launch_sparse_double(problem, plan, stream) : launch_sparse_float(problem, plan, stream);
}

const char* launch_scale(const DeviceLoss& loss, const void* factors, bool factors_are_double, bool is_uniform,
                         const DeviceProperties& properties, void* stream) {
  DeviceLoss device = loss;
  LossProblem& p = device.problem;
  if (p.num_rows == 0 || p.vocab_size == 0) return nullptr;
  p.student = p.teacher = p.gradient;
  const Plan plan = plan_of(p, properties);
  const int64_t most = int64_t(properties.num_multiprocessors) * (2 * kMaxBlockThreads / 256);
  Plan simple;  // one block a row or more rows a block, and no clusters: nobody waits for anybody
  // A power of two, so that teams divide the block: a thread of no team would scale the next block's row once more.
  while (simple.team_threads < plan.team_threads && simple.team_threads < simple.block_threads) {
    simple.team_threads *= 2;
  }
  const int64_t needed = (p.num_rows + simple.rows_per_block() - 1) / simple.rows_per_block();
  simple.grid_blocks = needed < most ? needed : most;
  if (p.gradient.dtype == DType::kFloat64) {
    return launch(&scale_kernel<double>, {simple.grid_blocks, simple.block_threads}, stream, device, simple, factors,
                  factors_are_double, is_uniform);
  }
  return launch(&scale_kernel<float>, {simple.grid_blocks, simple.block_threads}, stream, device, simple, factors,
                factors_are_double, is_uniform);
}

}  // namespace reptile_ext
