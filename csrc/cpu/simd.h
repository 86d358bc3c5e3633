// The thin layer between the row driver and an instruction set: a vector of floats, a vector of doubles, and the
// loads and stores that widen bfloat16 and float16 on the way.
//
// Compiled once per instruction set; which one is decided by the flags of the translation unit. Everything is in an
// anonymous namespace, so no function compiled for a new processor can be picked by the linker for an old one.
//
// Vectors are loaded and stored two at a time ("a pair", 2 · kLanes elements), because two vectors of float make one
// register of bfloat16. Which element sits in which lane of the pair is the layout's own business (bfloat16 splits
// into even and odd elements, which needs no shuffle); it is the same in load2 and store2, and nothing else may care.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

// Storage of the two 16-bit formats; never computed with.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline double to_float(double x) { return x; }
inline float to_float(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
inline float to_float(Float16 x) {
  // Place the 15 magnitude bits where float32 has them and let a product by 2^112 fix the exponent (denormals too).
  uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13;
  float f;
  std::memcpy(&f, &magnitude, 4);
  f *= 0x1p112f;
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;  // inf and NaN keep their exponent of all ones
  bits |= uint32_t(x.bits & 0x8000) << 16;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline void from_float(float x, float* out) { *out = x; }
inline void from_float(double x, double* out) { *out = x; }
inline void from_float(double x, float* out) { *out = float(x); }
inline void from_float(float x, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // Round to nearest even; a NaN stays a (quiet) NaN instead of rounding up to infinity.
  out->bits = x != x ? uint16_t(bits >> 16 | 0x40) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline void from_float(float x, Float16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00;  // NaN
  } else if (bits >= 0x477ff000) {
    half = 0x7c00;  // rounds to infinity
  } else if (bits < 0x38800000) {
    // A denormal: adding 0.5 makes the float unit round at the right bit.
    float f;
    std::memcpy(&f, &bits, 4);
    f += 0.5f;
    std::memcpy(&half, &f, 4);
    half -= 0x3f000000;
  } else {
    half = (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13;
  }
  out->bits = uint16_t(half | sign);
}

// Coefficients of 2^f on [0, 1), ascending, the first exactly 1; minimax of the relative error (Remez, 60 digits).
// float: 8.2e-8 before rounding, 1.4e-7 as evaluated. double: 3.2e-18 before rounding.
constexpr float kExp2f[6] = {1.0f, 0.693151295f, 0.240164444f, 0.0557999127f, 0.00901703071f, 0.00186713005f};
constexpr double kExp2d[12] = {1.0,
                               0.69314718055994592839,
                               0.24022650695906330315,
                               0.055504108665602238723,
                               0.0096181290995508956128,
                               0.0013333558629562675936,
                               0.00015403512309733948746,
                               0.00001525317505379524616,
                               1.3208367308220049348e-6,
                               1.025321230405209001e-7,
                               6.5595298355172712178e-9,
                               6.2634652734225902742e-10};
// Coefficients of log(1 + t) / t on [−¼, ½], ascending, the first exactly 1; minimax of the relative error, 2.8e-8
// before rounding.
constexpr float kLog1pf[9] = {1.0f,         -0.500000606f, 0.333335486f,  -0.249934423f, 0.199770773f,
                              -0.16822811f, 0.149839154f,  -0.120673714f, 0.0541325287f};
// Coefficients of (2 atanh s − 2 s) / s³ in s² for |s| ≤ (√2 − 1) / (√2 + 1), ascending; 1.2e-18.
constexpr double kAtanhd[7] = {0.66666666666667344128, 0.39999999999414675746, 0.28571428742388012491,
                               0.22222198573157717871, 0.18183564327007024527, 0.15314050539471847141,
                               0.1479594974650411203};
// To take a logarithm, a number is split where its fraction is ¾ (float) or √½ (double) instead of 1.
constexpr uint32_t kSplitF = 0x3f400000, kOneF = 0x3f800000;
constexpr uint64_t kSplitD = 0x3fe6a09e667f3bcd, kOneD = 0x3ff0000000000000;
constexpr float kNegInf = -__builtin_inff();

#if defined(__AVX512F__)
// ---------------------------------------------------------------------------------------------------- AVX-512

struct Float {
  using Scalar = float;
  static constexpr int kLanes = 16;
  __m512 v;
  Float() = default;
  Float(__m512 x) : v(x) {}
  explicit Float(float x) : v(_mm512_set1_ps(x)) {}
  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
};
inline Float operator+(Float a, Float b) { return _mm512_add_ps(a.v, b.v); }
inline Float operator-(Float a, Float b) { return _mm512_sub_ps(a.v, b.v); }
inline Float operator*(Float a, Float b) { return _mm512_mul_ps(a.v, b.v); }
inline Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
inline Float max(Float a, Float b) { return _mm512_max_ps(a.v, b.v); }
// acc + e·d in the lanes where e > 0 or is NaN; d may be anything elsewhere. A denormal e counts as 0, as it is in the
// other instruction sets: they must agree on which class has mass.
inline Float add_product_where_positive(Float acc, Float e, Float d) {
  return _mm512_mask3_fmadd_ps(e.v, d.v, acc.v, _mm512_cmp_ps_mask(e.v, _mm512_set1_ps(0x1p-126f), _CMP_NLT_UQ));
}
inline Float where_positive(Float e, Float d) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(e.v, _mm512_set1_ps(0x1p-126f), _CMP_NLT_UQ), d.v);
}
inline Float with_sign_of(Float d, Float x) {
  const __m512 signed_x = _mm512_xor_ps(x.v, _mm512_and_ps(d.v, _mm512_set1_ps(-0.0f)));
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(d.v, _mm512_setzero_ps(), _CMP_NEQ_UQ), signed_x);
}
// a where |x| < ¼, else b.
inline Float where_small(Float x, Float a, Float b) {
  return _mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(_mm512_abs_ps(x.v), _mm512_set1_ps(0.25f), _CMP_LT_OQ), a.v);
}
inline Float smallest_normal(Float) { return Float(0x1p-126f); }
inline Float reciprocal(Float a) {
  // 14 bits and a Newton step; the instruction that divides takes four times as long.
  const __m512 r = _mm512_rcp14_ps(a.v);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1)), r, r);
}
// w = f · 2^k with f in [¾, 1½).
inline void split(Float w, Float& f, Float& k) {
  f.v = _mm512_getmant_ps(w.v, _MM_MANT_NORM_p75_1p5, _MM_MANT_SIGN_zero);
  k.v = _mm512_getexp_ps(_mm512_mul_ps(w.v, _mm512_set1_ps(4.0f / 3)));
}
// a where x > −inf (or NaN), else 0.
inline Float where_not_masked(Float x, Float a) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(kNegInf), _CMP_NEQ_UQ), a.v);
}
inline float reduce_max(Float a) { return _mm512_reduce_max_ps(a.v); }
inline double reduce_add(Float a) {
  const __m512d lo = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
  const __m512d hi = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
  return _mm512_reduce_add_pd(_mm512_add_pd(lo, hi));
}
inline Float exp2(Float a) {
  // scalef is p · 2^n with overflow to inf and underflow to 0; for a = −inf it is 0 although f and p are NaN then.
  // (Its kin vreduceps would save the subtraction, but on Zen 4 the exponential takes 1.8 times as long with it.)
  const __m512 n = _mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_sub_ps(a.v, n);
  __m512 p = _mm512_set1_ps(kExp2f[5]);
  for (int i = 4; i >= 0; --i) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(kExp2f[i]));
  return _mm512_scalef_ps(p, n);
}

struct Double {
  using Scalar = double;
  static constexpr int kLanes = 8;
  __m512d v;
  Double() = default;
  Double(__m512d x) : v(x) {}
  explicit Double(double x) : v(_mm512_set1_pd(x)) {}
  static Double load(const double* p) { return _mm512_loadu_pd(p); }
  void store(double* p) const { _mm512_storeu_pd(p, v); }
};
inline Double operator+(Double a, Double b) { return _mm512_add_pd(a.v, b.v); }
inline Double operator-(Double a, Double b) { return _mm512_sub_pd(a.v, b.v); }
inline Double operator*(Double a, Double b) { return _mm512_mul_pd(a.v, b.v); }
inline Double fma(Double a, Double b, Double c) { return _mm512_fmadd_pd(a.v, b.v, c.v); }
inline Double max(Double a, Double b) { return _mm512_max_pd(a.v, b.v); }
inline Double add_product_where_positive(Double acc, Double e, Double d) {
  return _mm512_mask3_fmadd_pd(e.v, d.v, acc.v, _mm512_cmp_pd_mask(e.v, _mm512_set1_pd(0x1p-1022), _CMP_NLT_UQ));
}
inline Double where_positive(Double e, Double d) {
  return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(e.v, _mm512_set1_pd(0x1p-1022), _CMP_NLT_UQ), d.v);
}
inline Double with_sign_of(Double d, Double x) {
  const __m512d signed_x = _mm512_xor_pd(x.v, _mm512_and_pd(d.v, _mm512_set1_pd(-0.0)));
  return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(d.v, _mm512_setzero_pd(), _CMP_NEQ_UQ), signed_x);
}
inline Double where_small(Double x, Double a, Double b) {
  return _mm512_mask_mov_pd(b.v, _mm512_cmp_pd_mask(_mm512_abs_pd(x.v), _mm512_set1_pd(0.25), _CMP_LT_OQ), a.v);
}
inline Double smallest_normal(Double) { return Double(0x1p-1022); }
inline Double reciprocal(Double a) { return _mm512_div_pd(_mm512_set1_pd(1), a.v); }
inline void split(Double w, Double& f, Double& k) {
  const __m512i bits = _mm512_add_epi64(_mm512_castpd_si512(w.v), _mm512_set1_epi64(int64_t(kOneD - kSplitD)));
  const __m512i fraction = _mm512_and_si512(bits, _mm512_set1_epi64(0xfffffffffffff));
  f.v = _mm512_castsi512_pd(_mm512_add_epi64(fraction, _mm512_set1_epi64(int64_t(kSplitD))));
  k.v = _mm512_cvtepi64_pd(_mm512_sub_epi64(_mm512_srli_epi64(bits, 52), _mm512_set1_epi64(1023)));
}
inline Double where_not_masked(Double x, Double a) {
  return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(x.v, _mm512_set1_pd(kNegInf), _CMP_NEQ_UQ), a.v);
}
inline double reduce_max(Double a) { return _mm512_reduce_max_pd(a.v); }
inline double reduce_add(Double a) { return _mm512_reduce_add_pd(a.v); }
inline Double exp2(Double a) {
  const __m512d n = _mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const __m512d f = _mm512_sub_pd(a.v, n);
  __m512d p = _mm512_set1_pd(kExp2d[11]);
  for (int i = 10; i >= 0; --i) p = _mm512_fmadd_pd(p, f, _mm512_set1_pd(kExp2d[i]));
  return _mm512_scalef_pd(p, n);
}

// bfloat16: even elements in a, odd ones in b. A bfloat16 is the upper half of a float.
inline void split_bf16(__m512i x, Float& a, Float& b) {
  a.v = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  b.v = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000))));
}
inline __m512i join_bf16(Float a, Float b) {
#if defined(__AVX512BF16__)
  // The instruction packs two vectors one after the other; one permutation interleaves them.
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512i packed = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
  return _mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), packed);
#else
  const auto round = [](__m512 x) {  // nearest even, the result in the upper half
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, is_nan, _mm512_set1_epi32(0x7fc00000));
  };
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(round(a.v), 16), round(b.v));
#endif
}

inline void load2(const float* p, Float& a, Float& b) {
  a = Float::load(p);
  b = Float::load(p + 16);
}
inline void load2(const double* p, Double& a, Double& b) {
  a = Double::load(p);
  b = Double::load(p + 8);
}
inline void load2(const BFloat16* p, Float& a, Float& b) { split_bf16(_mm512_loadu_si512(p), a, b); }
inline void load2(const Float16* p, Float& a, Float& b) {
  a.v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
  b.v = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(p + 16)));
}
inline void store2(float* p, Float a, Float b) {
  a.store(p);
  b.store(p + 16);
}
inline void store2(double* p, Double a, Double b) {
  a.store(p);
  b.store(p + 8);
}
inline void store2(BFloat16* p, Float a, Float b) { _mm512_storeu_si512(p, join_bf16(a, b)); }
inline void store2(Float16* p, Float a, Float b) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm256_storeu_si256((__m256i*)(p + 16), _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
// Past the caches, for memory that will not be read soon. p is aligned to 64 bytes.
inline void stream2(float* p, Float a, Float b) {
  _mm512_stream_ps(p, a.v);
  _mm512_stream_ps(p + 16, b.v);
}
inline void stream2(double* p, Double a, Double b) {
  _mm512_stream_pd(p, a.v);
  _mm512_stream_pd(p + 8, b.v);
}
inline void stream2(BFloat16* p, Float a, Float b) { _mm512_stream_si512((__m512i*)p, join_bf16(a, b)); }
inline void stream2(Float16* p, Float a, Float b) {
  const __m256i lo = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i hi = _mm512_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm512_stream_si512((__m512i*)p, _mm512_inserti64x4(_mm512_castsi256_si512(lo), hi, 1));
}
inline void stream_fence() { _mm_sfence(); }

#elif defined(__AVX2__)
// ------------------------------------------------------------------------------------------- AVX2 + FMA + F16C

struct Float {
  using Scalar = float;
  static constexpr int kLanes = 8;
  __m256 v;
  Float() = default;
  Float(__m256 x) : v(x) {}
  explicit Float(float x) : v(_mm256_set1_ps(x)) {}
  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
};
inline Float operator+(Float a, Float b) { return _mm256_add_ps(a.v, b.v); }
inline Float operator-(Float a, Float b) { return _mm256_sub_ps(a.v, b.v); }
inline Float operator*(Float a, Float b) { return _mm256_mul_ps(a.v, b.v); }
inline Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
inline Float max(Float a, Float b) { return _mm256_max_ps(a.v, b.v); }
inline Float add_product_where_positive(Float acc, Float e, Float d) {
  const __m256 positive = _mm256_cmp_ps(e.v, _mm256_setzero_ps(), _CMP_NLE_UQ);
  return _mm256_fmadd_ps(e.v, _mm256_and_ps(d.v, positive), acc.v);
}
inline Float where_positive(Float e, Float d) {
  return _mm256_and_ps(d.v, _mm256_cmp_ps(e.v, _mm256_setzero_ps(), _CMP_NLE_UQ));
}
inline Float with_sign_of(Float d, Float x) {
  const __m256 signed_x = _mm256_xor_ps(x.v, _mm256_and_ps(d.v, _mm256_set1_ps(-0.0f)));
  return _mm256_and_ps(signed_x, _mm256_cmp_ps(d.v, _mm256_setzero_ps(), _CMP_NEQ_UQ));
}
// a where |x| < ¼, else b.
inline Float where_small(Float x, Float a, Float b) {
  const __m256 magnitude = _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x.v);
  return _mm256_blendv_ps(b.v, a.v, _mm256_cmp_ps(magnitude, _mm256_set1_ps(0.25f), _CMP_LT_OQ));
}
inline Float smallest_normal(Float) { return Float(0x1p-126f); }
inline Float reciprocal(Float a) { return _mm256_div_ps(_mm256_set1_ps(1), a.v); }
// w = f · 2^k with f in [¾, 1½).
inline void split(Float w, Float& f, Float& k) {
  const __m256i bits = _mm256_add_epi32(_mm256_castps_si256(w.v), _mm256_set1_epi32(int(kOneF - kSplitF)));
  const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffff));
  f.v = _mm256_castsi256_ps(_mm256_add_epi32(fraction, _mm256_set1_epi32(int(kSplitF))));
  k.v = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127)));
}
inline Float where_not_masked(Float x, Float a) {
  return _mm256_and_ps(_mm256_cmp_ps(x.v, _mm256_set1_ps(kNegInf), _CMP_NEQ_UQ), a.v);
}
inline float reduce_max(Float a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline double reduce_add_pd(__m256d d) {
  const __m128d h = _mm_add_pd(_mm256_castpd256_pd128(d), _mm256_extractf128_pd(d, 1));
  return _mm_cvtsd_f64(_mm_add_sd(h, _mm_unpackhi_pd(h, h)));
}
inline double reduce_add(Float a) {
  return reduce_add_pd(
      _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(a.v)), _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1))));
}
inline Float exp2(Float a) {
  // Clamped so that the exponent field is 0 (result 0) below −127 and all ones (result inf) above 128. The second
  // operand of min and max is the one that comes through when either is NaN.
  const __m256 x = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), a.v));
  const __m256 n = _mm256_floor_ps(x);
  const __m256 f = _mm256_sub_ps(x, n);
  __m256 p = _mm256_set1_ps(kExp2f[5]);
  for (int i = 4; i >= 0; --i) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(kExp2f[i]));
  const __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvttps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(exponent));
}

struct Double {
  using Scalar = double;
  static constexpr int kLanes = 4;
  __m256d v;
  Double() = default;
  Double(__m256d x) : v(x) {}
  explicit Double(double x) : v(_mm256_set1_pd(x)) {}
  static Double load(const double* p) { return _mm256_loadu_pd(p); }
  void store(double* p) const { _mm256_storeu_pd(p, v); }
};
inline Double operator+(Double a, Double b) { return _mm256_add_pd(a.v, b.v); }
inline Double operator-(Double a, Double b) { return _mm256_sub_pd(a.v, b.v); }
inline Double operator*(Double a, Double b) { return _mm256_mul_pd(a.v, b.v); }
inline Double fma(Double a, Double b, Double c) { return _mm256_fmadd_pd(a.v, b.v, c.v); }
inline Double max(Double a, Double b) { return _mm256_max_pd(a.v, b.v); }
inline Double add_product_where_positive(Double acc, Double e, Double d) {
  const __m256d positive = _mm256_cmp_pd(e.v, _mm256_setzero_pd(), _CMP_NLE_UQ);
  return _mm256_fmadd_pd(e.v, _mm256_and_pd(d.v, positive), acc.v);
}
inline Double where_positive(Double e, Double d) {
  return _mm256_and_pd(d.v, _mm256_cmp_pd(e.v, _mm256_setzero_pd(), _CMP_NLE_UQ));
}
inline Double with_sign_of(Double d, Double x) {
  const __m256d signed_x = _mm256_xor_pd(x.v, _mm256_and_pd(d.v, _mm256_set1_pd(-0.0)));
  return _mm256_and_pd(signed_x, _mm256_cmp_pd(d.v, _mm256_setzero_pd(), _CMP_NEQ_UQ));
}
inline Double where_small(Double x, Double a, Double b) {
  const __m256d magnitude = _mm256_andnot_pd(_mm256_set1_pd(-0.0), x.v);
  return _mm256_blendv_pd(b.v, a.v, _mm256_cmp_pd(magnitude, _mm256_set1_pd(0.25), _CMP_LT_OQ));
}
inline Double smallest_normal(Double) { return Double(0x1p-1022); }
inline Double reciprocal(Double a) { return _mm256_div_pd(_mm256_set1_pd(1), a.v); }
inline void split(Double w, Double& f, Double& k) {
  const __m256i bits = _mm256_add_epi64(_mm256_castpd_si256(w.v), _mm256_set1_epi64x(int64_t(kOneD - kSplitD)));
  const __m256i fraction = _mm256_and_si256(bits, _mm256_set1_epi64x(0xfffffffffffff));
  f.v = _mm256_castsi256_pd(_mm256_add_epi64(fraction, _mm256_set1_epi64x(int64_t(kSplitD))));
  // An integer below 2^52 in the low bits of 2^52 reads as 2^52 plus that integer.
  const __m256i exponent = _mm256_or_si256(_mm256_srli_epi64(bits, 52), _mm256_set1_epi64x(0x4330000000000000));
  k.v = _mm256_sub_pd(_mm256_castsi256_pd(exponent), _mm256_set1_pd(0x1p52 + 1023));
}
inline Double where_not_masked(Double x, Double a) {
  return _mm256_and_pd(_mm256_cmp_pd(x.v, _mm256_set1_pd(kNegInf), _CMP_NEQ_UQ), a.v);
}
inline double reduce_max(Double a) {
  const __m128d m = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(m, _mm_unpackhi_pd(m, m)));
}
inline double reduce_add(Double a) { return reduce_add_pd(a.v); }
inline Double exp2(Double a) {
  const __m256d x = _mm256_min_pd(_mm256_set1_pd(1024.0), _mm256_max_pd(_mm256_set1_pd(-1023.0), a.v));
  const __m256d n = _mm256_floor_pd(x);
  const __m256d f = _mm256_sub_pd(x, n);
  __m256d p = _mm256_set1_pd(kExp2d[11]);
  for (int i = 10; i >= 0; --i) p = _mm256_fmadd_pd(p, f, _mm256_set1_pd(kExp2d[i]));
  const __m256i wide = _mm256_cvtepi32_epi64(_mm_add_epi32(_mm256_cvttpd_epi32(n), _mm_set1_epi32(1023)));
  return _mm256_mul_pd(p, _mm256_castsi256_pd(_mm256_slli_epi64(wide, 52)));
}

inline void load2(const float* p, Float& a, Float& b) {
  a = Float::load(p);
  b = Float::load(p + 8);
}
inline void load2(const double* p, Double& a, Double& b) {
  a = Double::load(p);
  b = Double::load(p + 4);
}
inline void load2(const BFloat16* p, Float& a, Float& b) {
  const __m256i x = _mm256_loadu_si256((const __m256i*)p);
  a.v = _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
  b.v = _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000))));
}
inline void load2(const Float16* p, Float& a, Float& b) {
  a.v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
  b.v = _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)));
}
inline __m256i join_bf16(Float a, Float b) {
  const auto round = [](__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 is_nan = _mm256_cmp_ps(x, x, _CMP_UNORD_Q);
    return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), _mm256_castps_si256(is_nan));
  };
  return _mm256_blend_epi16(_mm256_srli_epi32(round(a.v), 16), round(b.v), 0xaa);
}
inline void store2(float* p, Float a, Float b) {
  a.store(p);
  b.store(p + 8);
}
inline void store2(double* p, Double a, Double b) {
  a.store(p);
  b.store(p + 4);
}
inline void store2(BFloat16* p, Float a, Float b) { _mm256_storeu_si256((__m256i*)p, join_bf16(a, b)); }
inline void store2(Float16* p, Float a, Float b) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void stream2(float* p, Float a, Float b) {
  _mm256_stream_ps(p, a.v);
  _mm256_stream_ps(p + 8, b.v);
}
inline void stream2(double* p, Double a, Double b) {
  _mm256_stream_pd(p, a.v);
  _mm256_stream_pd(p + 4, b.v);
}
inline void stream2(BFloat16* p, Float a, Float b) { _mm256_stream_si256((__m256i*)p, join_bf16(a, b)); }
inline void stream2(Float16* p, Float a, Float b) {
  const __m128i lo = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m128i hi = _mm256_cvtps_ph(b.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_stream_si256((__m256i*)p, _mm256_set_m128i(hi, lo));
}
inline void stream_fence() { _mm_sfence(); }

#else
// ----------------------------------------------- portable: 16-byte vectors of GCC and Clang (SSE2, NEON, …)

typedef float Floats __attribute__((vector_size(16)));
typedef int32_t FloatBits __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));
typedef int64_t DoubleBits __attribute__((vector_size(16)));

// The bits of a NaN may overflow; of what comes out nothing is expected.
inline FloatBits add_bits(FloatBits a, int32_t b) {
  typedef uint32_t Unsigned __attribute__((vector_size(16)));
  return FloatBits(Unsigned(a) + uint32_t(b));
}
inline DoubleBits add_bits(DoubleBits a, int64_t b) {
  typedef uint64_t Unsigned __attribute__((vector_size(16)));
  return DoubleBits(Unsigned(a) + uint64_t(b));
}

template <class T, class Int, class Reg, class Bits>
struct Vector {
  using Scalar = T;
  static constexpr int kLanes = 16 / sizeof(T);
  Reg v;
  Vector() = default;
  Vector(Reg x) : v(x) {}
  explicit Vector(T x) : v(x - Reg{}) {}
  static Vector load(const T* p) {
    Reg r;
    std::memcpy(&r, p, 16);
    return r;
  }
  void store(T* p) const { std::memcpy(p, &v, 16); }
  friend Vector operator+(Vector a, Vector b) { return a.v + b.v; }
  friend Vector operator-(Vector a, Vector b) { return a.v - b.v; }
  friend Vector operator*(Vector a, Vector b) { return a.v * b.v; }
  friend Vector fma(Vector a, Vector b, Vector c) { return a.v * b.v + c.v; }
  friend Vector max(Vector a, Vector b) { return a.v > b.v ? a.v : b.v; }
  friend Vector add_product_where_positive(Vector acc, Vector e, Vector d) {
    return acc.v + e.v * (e.v <= Reg{} ? Reg{} : d.v);
  }
  friend Vector where_positive(Vector e, Vector d) { return e.v <= Reg{} ? Reg{} : d.v; }
  friend Vector with_sign_of(Vector d, Vector x) {
    const Reg zero_or_x = d.v == Reg{} ? Reg{} : x.v;
    return d.v < Reg{} ? -zero_or_x : zero_or_x;
  }
  // a where |x| < ¼, else b.
  friend Vector where_small(Vector x, Vector a, Vector b) {
    const Reg magnitude = x.v < Reg{} ? -x.v : x.v;
    return magnitude < Vector(T(0.25)).v ? a.v : b.v;
  }
  friend Vector smallest_normal(Vector) { return Vector(sizeof(T) == 8 ? T(0x1p-1022) : T(0x1p-126)); }
  friend Vector reciprocal(Vector a) { return Vector(T(1)).v / a.v; }
  // w = f · 2^k with f in [¾, 1½), of double [√½, √2).
  friend void split(Vector w, Vector& f, Vector& k) {
    constexpr bool kDouble = sizeof(T) == 8;
    constexpr int kShift = kDouble ? 52 : 23;
    constexpr Int kSplit = kDouble ? Int(kSplitD) : Int(kSplitF), kOne = kDouble ? Int(kOneD) : Int(kOneF);
    Bits bits;
    std::memcpy(&bits, &w.v, 16);
    bits = add_bits(bits, kOne - kSplit);
    const Bits fraction = (bits & ((Int(1) << kShift) - 1)) + kSplit;
    std::memcpy(&f.v, &fraction, 16);
    k.v = __builtin_convertvector((bits >> kShift) - (kDouble ? 1023 : 127), Reg);
  }
  friend Vector where_not_masked(Vector x, Vector a) { return x.v == Vector(T(kNegInf)).v ? Reg{} : a.v; }
  friend T reduce_max(Vector a) {
    T m = a.v[0];
    for (int i = 1; i < kLanes; ++i) m = a.v[i] > m ? a.v[i] : m;
    return m;
  }
  friend double reduce_add(Vector a) {
    double sum = 0;
    for (int i = 0; i < kLanes; ++i) sum += a.v[i];
    return sum;
  }
  friend Vector exp2(Vector a) {
    constexpr bool kDouble = sizeof(T) == 8;
    constexpr Int kBias = kDouble ? 1023 : 127;
    const Reg lo = Vector(T(-kBias)).v, hi = Vector(T(kBias + 1)).v;
    Reg x = a.v < lo ? lo : a.v;  // as in the AVX2 version; a NaN fails both comparisons and stays
    x = x > hi ? hi : x;
    // The conversion truncates; of a NaN it is anything, and the polynomial is NaN whatever it is.
    const Reg whole = x == x ? x : Reg{};
    Bits n = __builtin_convertvector(whole, Bits);
    n += __builtin_convertvector(n, Reg) > whole;  // a true comparison is −1: floor
    const Reg f = x - __builtin_convertvector(n, Reg);
    Reg p;
    if constexpr (kDouble) {
      p = Vector(T(kExp2d[11])).v;
      for (int i = 10; i >= 0; --i) p = p * f + T(kExp2d[i]);
    } else {
      p = Vector(T(kExp2f[5])).v;
      for (int i = 4; i >= 0; --i) p = p * f + T(kExp2f[i]);
    }
    const Bits exponent = (n + kBias) << (kDouble ? 52 : 23);
    Reg scale;
    std::memcpy(&scale, &exponent, 16);
    return p * scale;
  }
};
using Float = Vector<float, int32_t, Floats, FloatBits>;
using Double = Vector<double, int64_t, Doubles, DoubleBits>;

template <class T, class V>
inline void load2(const T* p, V& a, V& b) {
  typename V::Scalar lanes[2 * V::kLanes];
  for (int i = 0; i < 2 * V::kLanes; ++i) lanes[i] = to_float(p[i]);
  a = V::load(lanes);
  b = V::load(lanes + V::kLanes);
}
template <class T, class V>
inline void store2(T* p, V a, V b) {
  for (int i = 0; i < V::kLanes; ++i) {
    from_float(a.v[i], p + i);
    from_float(b.v[i], p + i + V::kLanes);
  }
}
template <class T, class V>
inline void stream2(T* p, V a, V b) {
  store2(p, a, b);
}
inline void stream_fence() {}
#endif

// log w for w ≥ 0, and w − 1 as exactly as the caller knows it, which counts where it is small; finite at w = 0.
inline Float log_of_ratio(Float w, Float w_minus_1) {
  Float f, k;
  split(max(smallest_normal(w), w), f, k);
  const Float t = where_small(w_minus_1, w_minus_1, f - Float(1));
  k = where_small(w_minus_1, Float(0), k);
  Float p = Float(kLog1pf[8]);
  for (int i = 7; i >= 0; --i) p = fma(p, t, Float(kLog1pf[i]));
  return fma(k, Float(0.693147181f), t * p);
}
inline Double log_of_ratio(Double w, Double w_minus_1) {
  Double f, k;
  split(max(smallest_normal(w), w), f, k);
  const Double t = where_small(w_minus_1, w_minus_1, f - Double(1));
  k = where_small(w_minus_1, Double(0), k);
  const Double s = t * reciprocal(t + Double(2));
  const Double s2 = s * s;
  Double p = Double(kAtanhd[6]);
  for (int i = 5; i >= 0; --i) p = fma(p, s2, Double(kAtanhd[i]));
  return fma(k, Double(0.693147180559945309417), fma(s * s2, p, s + s));
}

// The arithmetic type of a storage type.
template <class T>
struct ArithmeticOf {
  using Type = Float;
};
template <>
struct ArithmeticOf<double> {
  using Type = Double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::Type;

template <class T>
struct IsBFloat16 {
  static constexpr bool value = false;
};
template <>
struct IsBFloat16<BFloat16> {
  static constexpr bool value = true;
};

// Where element e of a pair is, counted over the lanes of its first half, then of the second. Only a driver with
// something to say to single lanes asks.
template <class T>
constexpr int lane_of_element(int e) {
#if defined(__AVX2__) || defined(__AVX512F__)
  constexpr bool kInterleaved = IsBFloat16<T>::value;
#else
  constexpr bool kInterleaved = false;
#endif
  return kInterleaved ? e % 2 * Arithmetic<T>::kLanes + e / 2 : e;
}

inline void set_negative_infinity(float* p) { *p = kNegInf; }
inline void set_negative_infinity(double* p) { *p = kNegInf; }
inline void set_negative_infinity(BFloat16* p) { p->bits = 0xff80; }
inline void set_negative_infinity(Float16* p) { p->bits = 0xfc00; }

// The last n < 2 · kLanes elements of a row. Dead lanes hold −inf, which is what a masked class holds, so the code
// that follows needs no second version of itself.
#if defined(__AVX512F__)
inline void load2_tail(const float* p, int n, Float& a, Float& b) {
  const uint32_t live = (1u << n) - 1;
  const __m512 dead = _mm512_set1_ps(kNegInf);
  a.v = _mm512_mask_loadu_ps(dead, __mmask16(live), p);
  b.v = _mm512_mask_loadu_ps(dead, __mmask16(live >> 16), p + 16);
}
inline void load2_tail(const double* p, int n, Double& a, Double& b) {
  const uint32_t live = (1u << n) - 1;
  const __m512d dead = _mm512_set1_pd(kNegInf);
  a.v = _mm512_mask_loadu_pd(dead, __mmask8(live), p);
  b.v = _mm512_mask_loadu_pd(dead, __mmask8(live >> 8), p + 8);
}
inline void load2_tail(const BFloat16* p, int n, Float& a, Float& b) {
  const __m512i dead = _mm512_set1_epi16(int16_t(0xff80));
  split_bf16(_mm512_mask_loadu_epi16(dead, (1u << n) - 1, p), a, b);
}
inline void load2_tail(const Float16* p, int n, Float& a, Float& b) {
  const uint32_t live = (1u << n) - 1;
  const __m256i dead = _mm256_set1_epi16(int16_t(0xfc00));
  a.v = _mm512_cvtph_ps(_mm256_mask_loadu_epi16(dead, __mmask16(live), p));
  b.v = _mm512_cvtph_ps(_mm256_mask_loadu_epi16(dead, __mmask16(live >> 16), p + 16));
}
#else
template <class T, class V>
inline void load2_tail(const T* p, int n, V& a, V& b) {
  alignas(64) T buffer[2 * V::kLanes];
  for (int i = 0; i < 2 * V::kLanes; ++i) set_negative_infinity(buffer + i);
  std::memcpy(buffer, p, size_t(n) * sizeof(T));
  load2(buffer, a, b);
}
#endif
template <class T, class V>
inline void store2_tail(T* p, int n, V a, V b) {
  alignas(64) T buffer[2 * V::kLanes];
  store2(buffer, a, b);
  std::memcpy(p, buffer, size_t(n) * sizeof(T));
}

}  // namespace
