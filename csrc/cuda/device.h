// What the CUDA kernels are written in: threads, barriers, shuffles, shared memory of a cluster, loads and stores, and
// float and double as the value types of divergence.h.
//
// Compiled by nvcc this is the device. Compiled as C++ the same names come from tests/cuda/host.h, where the threads
// are fibers of one processor, every access to memory is checked, and a barrier that some thread does not reach is an
// error: so the kernels run in every test run, GPU or none.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define REPTILE_EXT_DEVICE __device__ __forceinline__
#define REPTILE_EXT_KERNEL(max_threads) __global__ void __launch_bounds__(max_threads)
#define REPTILE_EXT_ARGUMENT const __grid_constant__
#define REPTILE_EXT_UNROLL _Pragma("unroll")

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

// The block's shared memory.
template <class T>
REPTILE_EXT_DEVICE T& shared_memory() {
  __shared__ alignas(T) unsigned char bytes[sizeof(T)];
  return *reinterpret_cast<T*>(bytes);
}
template <class T>
REPTILE_EXT_DEVICE T load_shared(const T* p) {
  return *p;
}
template <class T>
REPTILE_EXT_DEVICE void store_shared(T* p, T x) {
  *p = x;
}

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
// Asks for memory to be in the L2 when it is wanted, in one instruction however much it is; sm_90 and later. Both
// numbers are multiples of 16.
REPTILE_EXT_DEVICE void prefetch_to_l2(const void* p, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(p)), "r"(bytes) : "memory");
#endif
}
template <class T>
REPTILE_EXT_DEVICE T load(const T* p) {
  return *p;
}
template <class T>
REPTILE_EXT_DEVICE void store(T* p, T x) {
  *p = x;
}

REPTILE_EXT_DEVICE float float_of_bits(uint32_t bits) { return __uint_as_float(bits); }
REPTILE_EXT_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
REPTILE_EXT_DEVICE float float_of_half(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
REPTILE_EXT_DEVICE uint16_t half_of(float x) { return __half_as_ushort(__float2half_rn(x)); }
REPTILE_EXT_DEVICE uint16_t bfloat16_of(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

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
REPTILE_EXT_DEVICE float times_sign_of(float x, float s) {
  return __uint_as_float(__float_as_uint(x) ^ (__float_as_uint(s) & 0x80000000u));
}
REPTILE_EXT_DEVICE double times_sign_of(double x, double s) {
  return __longlong_as_double(__double_as_longlong(x) ^ (__double_as_longlong(s) & INT64_MIN));
}

// Starts a kernel; null, or what CUDA says is wrong.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t grid, int block, int cluster, void* stream,
                   const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(grid));
  config.blockDim = dim3(unsigned(block));
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
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
  return fma(e, where_positive(e, d), sum);
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

// log w. Where w − 1 is small, from it: 2 artanh(d / (2 + d)), which has the precision of d.
REPTILE_EXT_DEVICE float log_of_ratio(float w, float w_minus_1) {
  const float near = twice_atanh(w_minus_1 * reciprocal(w_minus_1 + 2.0f));
  const float far = log2_approximately(max(smallest_normal(w), w)) * 0.693147181f;
  return w_minus_1 < 0.25f && w_minus_1 > -0.25f ? near : far;
}
REPTILE_EXT_DEVICE double log_of_ratio(double w, double w_minus_1) {
  const bool near = w_minus_1 < 0.25 && w_minus_1 > -0.25;
  return near ? log1p_of(w_minus_1) : log_of(max(smallest_normal(w), w));
}

}  // namespace
}  // namespace reptile_ext
