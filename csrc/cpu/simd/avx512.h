// AVX-512 (F, BW, DQ, VL), with bfloat16 instructions where the flags have them.
#pragma once

#include <immintrin.h>

#include "storage.h"

namespace {

// Whether a pair of bfloat16 vectors holds even elements in its first half and odd ones in its second.
constexpr bool kInterleavesBFloat16 = true;
// Whether fma rounds once.
constexpr bool kFusesMultiplyAdd = true;

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
inline Float operator/(Float a, Float b) { return _mm512_div_ps(a.v, b.v); }
inline Float sqrt(Float a) { return _mm512_sqrt_ps(a.v); }
// x, or −x where s is negative (its sign bit set).
inline Float times_sign_of(Float x, Float s) {
  const __m512i x_bits = _mm512_castps_si512(x.v), s_bits = _mm512_castps_si512(s.v);
  const __m512i sign = _mm512_set1_epi32(int(0x80000000));
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(x_bits, s_bits, sign, 0x78));  // x ^ (s & sign)
}
inline Float negative_magnitude(Float x) { return _mm512_or_ps(x.v, _mm512_set1_ps(-0.0f)); }
// a where s is negative (its sign bit set), else b.
inline Float where_negative(Float s, Float a, Float b) {
  return _mm512_mask_mov_ps(b.v, _mm512_movepi32_mask(_mm512_castps_si512(s.v)), a.v);
}
// x, or NaN where s or t is NaN or +inf.
constexpr int kNanOrInf = 0x01 | 0x08 | 0x80;  // quiet NaN, +inf, signalling NaN
inline Float unless_broken(Float x, Float s, Float t) {
  const __mmask16 broken = _mm512_fpclass_ps_mask(s.v, kNanOrInf) | _mm512_fpclass_ps_mask(t.v, kNanOrInf);
  return _mm512_mask_mov_ps(x.v, broken, _mm512_set1_ps(kNan));
}
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
// a where |x| < 0.2, else b.
inline Float where_small(Float x, Float a, Float b) {
  return _mm512_mask_mov_ps(b.v, _mm512_cmp_ps_mask(_mm512_abs_ps(x.v), _mm512_set1_ps(0.2f), _CMP_LT_OQ), a.v);
}
inline Float smallest_normal(Float) { return Float(0x1p-126f); }
inline Float reciprocal(Float a) {
  // 14 bits and a Newton step; the instruction that divides takes four times as long.
  const __m512 r = _mm512_rcp14_ps(a.v);
  return _mm512_fmadd_ps(_mm512_fnmadd_ps(a.v, r, _mm512_set1_ps(1)), r, r);
}
// w = f · 2^k with f in [¾, 1½). Of 0, the smallest normal number's.
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
inline Double operator/(Double a, Double b) { return _mm512_div_pd(a.v, b.v); }
inline Double sqrt(Double a) { return _mm512_sqrt_pd(a.v); }
inline Double times_sign_of(Double x, Double s) { return _mm512_xor_pd(x.v, _mm512_and_pd(s.v, _mm512_set1_pd(-0.0))); }
inline Double negative_magnitude(Double x) { return _mm512_or_pd(x.v, _mm512_set1_pd(-0.0)); }
inline Double where_negative(Double s, Double a, Double b) {
  return _mm512_mask_mov_pd(b.v, _mm512_movepi64_mask(_mm512_castpd_si512(s.v)), a.v);
}
inline Double unless_broken(Double x, Double s, Double t) {
  const __mmask8 broken = _mm512_fpclass_pd_mask(s.v, kNanOrInf) | _mm512_fpclass_pd_mask(t.v, kNanOrInf);
  return _mm512_mask_mov_pd(x.v, broken, _mm512_set1_pd(kNan));
}
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
  return _mm512_mask_mov_pd(b.v, _mm512_cmp_pd_mask(_mm512_abs_pd(x.v), _mm512_set1_pd(0.2), _CMP_LT_OQ), a.v);
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

// The last n < 2 · kLanes elements of a row, as in simd.h, in one masked load.
#define REPTILE_EXT_HAS_LOAD2_TAIL
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

}  // namespace
