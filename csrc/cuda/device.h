// What the CUDA kernels are written in: threads, barriers, shuffles, shared memory of a cluster, loads and stores, and
// float and double as the value types of divergence.h.
//
// Compiled by nvcc this is the device. Compiled as C++ the same names come from tests/cuda/host.h, where the threads
// are fibers of one processor, every access to memory is checked, and a barrier that some thread does not reach is an
// error: so the kernels run in every test run, GPU or none.
#pragma once

#include <cstdint>
#include <cstring>

#include "loss.h"

#if defined(__CUDACC__)

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define REPTILE_EXT_DEVICE __device__ __forceinline__
#define REPTILE_EXT_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads)
// With all registers of a multiprocessor, where the compiler would leave half of them to another block.
#define REPTILE_EXT_LONE_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads, 1)
#define REPTILE_EXT_ARGUMENT const __grid_constant__
// A function of its own, once for all kernels of a file that call it.
#define REPTILE_EXT_DEVICE_CALL __device__ __noinline__
#define REPTILE_EXT_UNROLL _Pragma("unroll")
#define REPTILE_EXT_NO_UNROLL _Pragma("unroll 1")

namespace reptile_ext {
namespace {

REPTILE_EXT_DEVICE int thread_rank() { return int(threadIdx.x); }
REPTILE_EXT_DEVICE int block_threads() { return int(blockDim.x); }
REPTILE_EXT_DEVICE int64_t block_rank() { return blockIdx.x; }
REPTILE_EXT_DEVICE int64_t num_blocks() { return gridDim.x; }
REPTILE_EXT_DEVICE void sync_block() { __syncthreads(); }

// The value of the lane whose number differs in `mask`. All lanes of a warp take part.
template <class V>
REPTILE_EXT_DEVICE V shuffle_xor(V x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class V>
REPTILE_EXT_DEVICE V shuffle_from(V x, int lane) {
  return __shfl_sync(0xffffffffu, x, lane);
}

// Blocks of one cluster. Before sm_90 there are none, and the plan never asks for one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
REPTILE_EXT_DEVICE int cluster_rank() { return int(cooperative_groups::this_cluster().block_rank()); }
REPTILE_EXT_DEVICE void sync_cluster() { cooperative_groups::this_cluster().sync(); }
template <class T>
REPTILE_EXT_DEVICE T* of_peer(T* shared, int rank) {
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
}
#else
REPTILE_EXT_DEVICE int cluster_rank() { return 0; }
REPTILE_EXT_DEVICE void sync_cluster() {}
template <class T>
REPTILE_EXT_DEVICE T* of_peer(T* shared, int) {
  return shared;
}
#endif

REPTILE_EXT_DEVICE void sync_warp() { __syncwarp(); }
// A bit for each lane of the warp.
REPTILE_EXT_DEVICE uint32_t ballot(bool x) { return __ballot_sync(0xffffffffu, x); }

// Says how often what follows runs, to who counts instructions (tests/cuda/budget.py); not where time matters.
enum Mark { kMarkRare, kMarkOneWarp, kMarkOneIn32, kMarkCluster, kMarkWarps, kMarkOnce = 7 };
template <int kMark>
REPTILE_EXT_DEVICE void mark() {
  asm volatile("pmevent %0;" ::"n"(kMark));
}

// The block's shared memory.
template <class T>
REPTILE_EXT_DEVICE T& shared_memory() {
  __shared__ alignas(T) unsigned char bytes[sizeof(T)];
  return *reinterpret_cast<T*>(bytes);
}
// ... of a size that the launch says, instead.
REPTILE_EXT_DEVICE char* dynamic_shared(int) {
  extern __shared__ __align__(128) char of_launch[];
  return of_launch;
}
template <class T>
REPTILE_EXT_DEVICE T load_shared(const T* p) {
  return *p;
}
template <class T>
REPTILE_EXT_DEVICE void store_shared(T* p, T x) {
  *p = x;
}
// What was there before. The other threads' bits are kept.
REPTILE_EXT_DEVICE uint32_t set_shared_bits(uint32_t* p, uint32_t bits) { return atomicOr(p, bits); }

// Device memory. Logits and gradients are touched once and not kept in the caches for others (.cs).
struct alignas(16) Bits128 {
  uint32_t word[4];
};
REPTILE_EXT_DEVICE Bits128 load_128(const void* p) {
  const uint4 x = __ldcs(static_cast<const uint4*>(p));
  return {{x.x, x.y, x.z, x.w}};
}
REPTILE_EXT_DEVICE Bits128 load_128_again(const void* p) {
  const uint4 x = *static_cast<const uint4*>(p);
  return {{x.x, x.y, x.z, x.w}};
}
REPTILE_EXT_DEVICE void store_128(void* p, const Bits128& x) {
  __stcs(static_cast<uint4*>(p), make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]));
}
template <class T>
REPTILE_EXT_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
REPTILE_EXT_DEVICE void store(T* p, T x) {
  *p = x;
}

// Counts the calling block; whether all `count` blocks have been counted. To who is told so, what a thread had stored
// before it counted its block is visible.
REPTILE_EXT_DEVICE bool arrive_last(uint32_t* arrived, uint32_t count) {
  __threadfence();
  const uint32_t before = atomicAdd(arrived, 1u);
  __threadfence();
  return before + 1 == count;
}
REPTILE_EXT_DEVICE double load_of_other_block(const double* p) { return __ldcg(p); }

REPTILE_EXT_DEVICE Bits128 load_shared_any_128(const void* p) {
  const uint4 x = *static_cast<const uint4*>(p);
  return {{x.x, x.y, x.z, x.w}};
}
REPTILE_EXT_DEVICE void store_shared_128(void* p, const Bits128& x) {
  *static_cast<uint4*>(p) = make_uint4(x.word[0], x.word[1], x.word[2], x.word[3]);
}

// Copies from device memory to shared memory that go on by themselves. Sizes and addresses are multiples of 16.
//
// sm_90 and later: whole ranges, by one thread. A phase ends when expect_bytes was called once and as many bytes have
// come; whoever waits for it says whether it is an odd one.
struct Phase {
  uint64_t state;
};
REPTILE_EXT_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool has_code_for(bool bulk_copies) { return bulk_copies; }
REPTILE_EXT_DEVICE void init_phase(Phase* phase) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(phase)) : "memory");
}
// After the last init_phase, before a barrier.
REPTILE_EXT_DEVICE void fence_phases() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
REPTILE_EXT_DEVICE void expect_bytes(Phase* phase, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(phase)), "r"(bytes)
               : "memory");
}
#define REPTILE_EXT_WAIT(scope)                            \
  asm volatile(                                            \
      "{\n.reg .pred done;\n"                              \
      "AGAIN: mbarrier.try_wait.parity.acquire." scope     \
      ".shared::cta.b64 done, [%0], %1;\n"                 \
      "@!done bra AGAIN;\n}" ::"r"(shared_address(phase)), \
      "r"(parity)                                          \
      : "memory")
REPTILE_EXT_DEVICE void wait_for(Phase* phase, uint32_t parity) { REPTILE_EXT_WAIT("cta"); }
// ... for what peers have told; empties the L1.
REPTILE_EXT_DEVICE void wait_for_peers(Phase* phase, uint32_t parity) { REPTILE_EXT_WAIT("cluster"); }
#undef REPTILE_EXT_WAIT
REPTILE_EXT_DEVICE void copy_bulk(void* shared, const void* device, uint32_t bytes, Phase* phase) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(device)), "r"(bytes), "r"(shared_address(phase))
               : "memory");
}
// Before a copy over what this thread has written there.
REPTILE_EXT_DEVICE void fence_copies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// To the same place of a peer's shared memory, whose phase counts the 16 bytes.
REPTILE_EXT_DEVICE void tell_128(void* shared, int rank, const Bits128& x, Phase* phase) {
  uint32_t to, of_peer;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(shared)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(of_peer) : "r"(shared_address(phase)), "r"(rank));
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(to),
               "r"(x.word[0]), "r"(x.word[1]), "r"(x.word[2]), "r"(x.word[3]), "r"(of_peer)
               : "memory");
}
#else
constexpr bool has_code_for(bool bulk_copies) { return !bulk_copies; }
REPTILE_EXT_DEVICE void init_phase(Phase*) {}
REPTILE_EXT_DEVICE void fence_phases() {}
REPTILE_EXT_DEVICE void expect_bytes(Phase*, uint32_t) {}
REPTILE_EXT_DEVICE void wait_for(Phase*, uint32_t) {}
REPTILE_EXT_DEVICE void wait_for_peers(Phase*, uint32_t) {}
REPTILE_EXT_DEVICE void copy_bulk(void*, const void*, uint32_t, Phase*) {}
REPTILE_EXT_DEVICE void fence_copies() {}
REPTILE_EXT_DEVICE void tell_128(void*, int, const Bits128&, Phase*) {}
#endif
// Before: 16 bytes, for the thread that asks for them alone. Between two calls of end_copies lies a group of copies;
// all but the last kGroups of them have come.
REPTILE_EXT_DEVICE void copy_128(void* shared, const void* device) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(__cvta_generic_to_global(device))
               : "memory");
}
REPTILE_EXT_DEVICE void end_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroups>
REPTILE_EXT_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

REPTILE_EXT_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
REPTILE_EXT_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
REPTILE_EXT_DEVICE float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
REPTILE_EXT_DEVICE uint16_t half_of(float x) { return __half_as_ushort(__float2half_rn(x)); }
REPTILE_EXT_DEVICE uint16_t bfloat16_of(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
// Two at a time, the first in the low half.
template <class Pair>
REPTILE_EXT_DEVICE uint32_t bits_of_pair(Pair pair) {
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
template <class Pair>
REPTILE_EXT_DEVICE Pair pair_of_bits(uint32_t bits) {
  Pair pair;
  memcpy(&pair, &bits, 4);
  return pair;
}
REPTILE_EXT_DEVICE uint32_t bfloat16s_of(float x, float y) { return bits_of_pair(__floats2bfloat162_rn(x, y)); }
REPTILE_EXT_DEVICE uint32_t halves_of(float x, float y) { return bits_of_pair(__floats2half2_rn(x, y)); }
// The larger ones; of a NaN and a number, the number.
REPTILE_EXT_DEVICE uint32_t larger_bfloat16s(uint32_t a, uint32_t b) {
  return bits_of_pair(__hmax2(pair_of_bits<__nv_bfloat162>(a), pair_of_bits<__nv_bfloat162>(b)));
}
REPTILE_EXT_DEVICE uint32_t larger_halves(uint32_t a, uint32_t b) {
  return bits_of_pair(__hmax2(pair_of_bits<__half2>(a), pair_of_bits<__half2>(b)));
}

// Results below the smallest normal number are 0, as divergence.h has it on the CPU. 2 ulp, and exact at integers.
REPTILE_EXT_DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
REPTILE_EXT_DEVICE double exp2(double x) { return ::exp2(x); }
REPTILE_EXT_DEVICE float log2_approximately(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
REPTILE_EXT_DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
REPTILE_EXT_DEVICE double reciprocal(double x) { return 1 / x; }
REPTILE_EXT_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
REPTILE_EXT_DEVICE double fma(double a, double b, double c) { return __fma_rn(a, b, c); }
// The larger one; of a NaN and a number, either.
REPTILE_EXT_DEVICE float any_max(float a, float b) { return fmaxf(a, b); }
REPTILE_EXT_DEVICE double any_max(double a, double b) { return fmax(a, b); }
REPTILE_EXT_DEVICE double log_of(double x) { return ::log(x); }
REPTILE_EXT_DEVICE double log1p_of(double x) { return ::log1p(x); }

REPTILE_EXT_DEVICE float sqrt_of(float x) { return __fsqrt_rn(x); }
REPTILE_EXT_DEVICE double sqrt_of(double x) { return __dsqrt_rn(x); }
// x, or −x where s is negative: where its sign bit is set.
REPTILE_EXT_DEVICE float magnitude(float x) { return ::fabsf(x); }
REPTILE_EXT_DEVICE double magnitude(double x) { return ::fabs(x); }
REPTILE_EXT_DEVICE float times_sign_of(float x, float s) {
  return __uint_as_float(__float_as_uint(x) ^ (__float_as_uint(s) & 0x80000000u));
}
REPTILE_EXT_DEVICE double times_sign_of(double x, double s) {
  return __longlong_as_double(__double_as_longlong(x) ^ (__double_as_longlong(s) & INT64_MIN));
}

inline cudaLaunchConfig_t config_of(const LaunchShape& shape, cudaLaunchAttribute& attribute, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(shape.blocks));
  config.blockDim = dim3(unsigned(shape.threads));
  config.dynamicSmemBytes = size_t(shape.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(shape.cluster_blocks);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = shape.cluster_blocks > 1 ? 1 : 0;
  return config;
}

// Starts a kernel; null, or what CUDA says is wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, void* stream,
                   const Arguments&... arguments) {
  cudaLaunchAttribute attribute;
  const cudaLaunchConfig_t config = config_of(shape, attribute, stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

const char* set_bytes_to_zero(void* p, size_t bytes, void* stream) {
  const cudaError_t error = cudaMemsetAsync(p, 0, bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

// Of a kernel whose blocks each go over many rows: no more blocks than are resident at once, which the device is asked
// for, once a thread and shape. Also allows it its shared memory.
template <class... Parameters>
const char* limit_to_resident(void (*kernel)(Parameters...), LaunchShape& shape) {
  struct Known {
    const void* kernel = nullptr;
    int device = -1, threads = 0, cluster_blocks = 0, shared_bytes = 0;
    int64_t blocks = 0;
  };
  thread_local Known known[8];
  thread_local int next = 0;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  const void* const function = reinterpret_cast<const void*>(kernel);
  for (const Known& k : known) {
    if (k.kernel == function && k.device == device && k.threads == shape.threads &&
        k.cluster_blocks == shape.cluster_blocks && k.shared_bytes == shape.shared_bytes) {
      if (k.blocks < shape.blocks) shape.blocks = k.blocks;
      return nullptr;
    }
  }
  Known found{function, device, shape.threads, shape.cluster_blocks, shape.shared_bytes, 0};
  // As much as there is: what is allowed is the function's own, for every later launch of any shape by any thread.
  int most = 0;
  cudaFuncAttributes attributes = {};
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, function);
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 most - int(attributes.sharedSizeBytes));
  }
  int count = 0;
  if (error == cudaSuccess && shape.cluster_blocks > 1) {
    cudaLaunchAttribute attribute;
    const cudaLaunchConfig_t config = config_of(shape, attribute, nullptr);
    error = cudaOccupancyMaxActiveClusters(&count, function, &config);
    found.blocks = int64_t(count) * shape.cluster_blocks;
  } else if (error == cudaSuccess) {
    int multiprocessors = 0;
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    if (error == cudaSuccess) {
      error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, shape.threads, size_t(shape.shared_bytes));
    }
    found.blocks = int64_t(count) * multiprocessors;
  }
  if (error != cudaSuccess) return cudaGetErrorString(error);
  if (found.blocks == 0) return "a kernel that does not fit this device";
  known[next] = found;
  next = (next + 1) % 8;
  if (found.blocks < shape.blocks) shape.blocks = found.blocks;
  return nullptr;
}

}  // namespace
}  // namespace reptile_ext

#else
#include "host.h"
#endif

namespace reptile_ext {
namespace {

// ------------------------------------------------------------------------ float and double as V of divergence.h

template <class V>
REPTILE_EXT_DEVICE V negative_infinity() {
  return V(-__builtin_inff());
}

// As the vector instructions have it: a NaN in b is kept.
REPTILE_EXT_DEVICE float max(float a, float b) { return a > b ? a : b; }
REPTILE_EXT_DEVICE double max(double a, double b) { return a > b ? a : b; }
REPTILE_EXT_DEVICE float smallest_normal(float) { return 0x1p-126f; }
REPTILE_EXT_DEVICE double smallest_normal(double) { return 0x1p-1022; }

template <class V>
REPTILE_EXT_DEVICE V where_positive(V e, V d) {
  return e <= V(0) ? V(0) : d;
}
template <class V>
REPTILE_EXT_DEVICE V add_product_where_positive(V sum, V e, V d) {
  if (!(e <= V(0))) sum = fma(e, d, sum);  // one instruction less than with where_positive
  return sum;
}
template <class V>
REPTILE_EXT_DEVICE V where_not_masked(V z, V d) {
  return z == negative_infinity<V>() ? V(0) : d;
}
template <class V>
REPTILE_EXT_DEVICE V with_sign_of(V d, V x) {
  return d == V(0) ? V(0) : d < V(0) ? V(0) - x : x;
}

// Whether the sign bit is set.
template <class V>
REPTILE_EXT_DEVICE bool is_negative(V x) {
  return times_sign_of(V(1), x) < V(0);
}
// −|x|
template <class V>
REPTILE_EXT_DEVICE V negative_magnitude(V x) {
  return V(0) - times_sign_of(x, x);
}

// a / b for 1 ≤ b ≤ 2^125: exactly 1 of equal ones, and to the last bit or nearly so of others. The compiler's own has
// a call in it for all the rest, which costs a kernel its registers.
REPTILE_EXT_DEVICE float quotient(float a, float b) {
  const float over_b = reciprocal(b), near = a * over_b;
  const float q = fma(fma(-near, b, a), over_b, near);
  return q == q ? q : near;  // of an infinity, the remainder is NaN
}
REPTILE_EXT_DEVICE double quotient(double a, double b) { return a / b; }

// n / size for n ≥ 0, size > 0. By 32 bits where these are enough; else by what a float tells of the quotient, again
// and again, for the same reason.
REPTILE_EXT_DEVICE int64_t quotient(int64_t n, int64_t size) {
  if (uint64_t(n | size) >> 32 == 0) return int64_t(uint32_t(n) / uint32_t(size));
  const float over_size = reciprocal(float(size));
  int64_t found = 0;
  for (int64_t rest = n; rest < 0 || rest >= size;) {
    int64_t step = int64_t(float(rest) * over_size);
    if (step == 0) step = rest < 0 ? -1 : 1;
    found += step;
    rest -= step * size;
  }
  return found;
}

// log ((1 + u) / (1 − u)) for |u| ≤ ⅓; exactly 0 at 0. The polynomial is that of the CPU (cpu/simd/storage.h).
REPTILE_EXT_DEVICE float twice_atanh(float u) {
  const float x = u * u;
  float p = fma(0.28178334f, x, 0.279606f);
  p = fma(p, x, 0.4002491f);
  p = fma(p, x, 0.66666317f);
  return u * fma(p, x, 2.0f);
}
REPTILE_EXT_DEVICE double twice_atanh(double u) { return log1p_of(2 * u / (1 - u)); }

// log2 w, w > 0. Where d = w − 1 is small, from it: a polynomial with the first coefficient exact, so that the error,
// 5e-7 at most, goes with d³. Beyond, the instruction, whose error of up to 2^−22 is 3e-6 of the logarithm or less.
REPTILE_EXT_DEVICE float log2_of_ratio(float w, float d) {
  float near = fma(-0.361674845f, d, 0.481834352f);
  near = fma(near, d, -0.721346915f);
  near = fma(near, d, 1.44269502f) * d;
  const float far = log2_approximately(w);
  return magnitude(d) < 0.0625f ? near : far;
}
REPTILE_EXT_DEVICE double log2_of_ratio(double w, double d) {
  return (magnitude(d) < 0.25 ? log1p_of(d) : log_of(w)) * 1.44269504088896340735992468100;
}

}  // namespace
}  // namespace reptile_ext
