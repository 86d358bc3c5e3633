// AVX2, FMA and F16C.
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
inline Float operator/(Float a, Float b) { return _mm256_div_ps(a.v, b.v); }
inline Float sqrt(Float a) { return _mm256_sqrt_ps(a.v); }
// x, or −x where s is negative (its sign bit set).
inline Float times_sign_of(Float x, Float s) { return _mm256_xor_ps(x.v, _mm256_and_ps(s.v, _mm256_set1_ps(-0.0f))); }
inline Float negative_magnitude(Float x) { return _mm256_or_ps(x.v, _mm256_set1_ps(-0.0f)); }
// a where s is negative (its sign bit set), else b.
inline Float where_negative(Float s, Float a, Float b) { return _mm256_blendv_ps(b.v, a.v, s.v); }
// x, or NaN where s or t is NaN or +inf.
inline Float unless_broken(Float x, Float s, Float t) {
  const __m256 infinity = _mm256_set1_ps(-kNegInf);
  const __m256 broken_s = _mm256_cmp_ps(s.v, infinity, _CMP_NLT_UQ),
               broken_t = _mm256_cmp_ps(t.v, infinity, _CMP_NLT_UQ);
  return _mm256_or_ps(x.v, _mm256_or_ps(broken_s, broken_t));
}
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
// a where |x| < 0.2, else b.
inline Float where_small(Float x, Float a, Float b) {
  return _mm256_blendv_ps(b.v, a.v, _mm256_fmsub_ps(x.v, x.v, _mm256_set1_ps(0.04f)));  // by the sign bit
}
inline Float smallest_normal(Float) { return Float(0x1p-126f); }
inline Float reciprocal(Float a) { return _mm256_div_ps(_mm256_set1_ps(1), a.v); }
// w = f · 2^k with f in [¾, 1½). Of 0, 2^−127.
inline void split(Float w, Float& f, Float& k) {
  const __m256i bits = _mm256_castps_si256(w.v);
  const __m256i above = _mm256_sub_epi32(bits, _mm256_set1_epi32(int(kSplitF)));
  f.v = _mm256_castsi256_ps(_mm256_sub_epi32(bits, _mm256_and_si256(above, _mm256_set1_epi32(int(0xff800000)))));
  k.v = _mm256_cvtepi32_ps(_mm256_srai_epi32(above, 23));
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
inline Double operator/(Double a, Double b) { return _mm256_div_pd(a.v, b.v); }
inline Double sqrt(Double a) { return _mm256_sqrt_pd(a.v); }
inline Double times_sign_of(Double x, Double s) { return _mm256_xor_pd(x.v, _mm256_and_pd(s.v, _mm256_set1_pd(-0.0))); }
inline Double negative_magnitude(Double x) { return _mm256_or_pd(x.v, _mm256_set1_pd(-0.0)); }
inline Double where_negative(Double s, Double a, Double b) { return _mm256_blendv_pd(b.v, a.v, s.v); }
inline Double unless_broken(Double x, Double s, Double t) {
  const __m256d infinity = _mm256_set1_pd(-kNegInf);
  const __m256d broken_s = _mm256_cmp_pd(s.v, infinity, _CMP_NLT_UQ),
                broken_t = _mm256_cmp_pd(t.v, infinity, _CMP_NLT_UQ);
  return _mm256_or_pd(x.v, _mm256_or_pd(broken_s, broken_t));
}
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
  return _mm256_blendv_pd(b.v, a.v, _mm256_fmsub_pd(x.v, x.v, _mm256_set1_pd(0.04)));
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

}  // namespace
