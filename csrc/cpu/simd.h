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

#include "../rows.h"

#if defined(__AVX512F__)
#include "simd/avx512.h"
#elif defined(__AVX2__)
#include "simd/avx2.h"
#else
#include "simd/portable.h"
#endif

namespace {

// log2 w for normal w > 0, and w − 1 as exactly as the caller knows it, which counts where it is small.
inline Float log2_of_ratio(Float w, Float w_minus_1) {
  Float f, k;
  split(w, f, k);
  const Float t = where_small(w_minus_1, w_minus_1, f - Float(1)), t2 = t * t;
  k = where_small(w_minus_1, Float(0), k);                // w may be another number of those that are nearly 0
  Float even = Float(kLog2f[8]), odd = Float(kLog2f[7]);  // two chains: half the time until the result
  for (int i = 6; i >= 0; i -= 2) even = fma(even, t2, Float(kLog2f[i]));
  for (int i = 5; i >= 1; i -= 2) odd = fma(odd, t2, Float(kLog2f[i]));
  return k + fma(t2, odd, t * even);
}
inline Double log2_of_ratio(Double w, Double w_minus_1) {
  Double f, k;
  split(w, f, k);
  const Double t = where_small(w_minus_1, w_minus_1, f - Double(1));
  k = where_small(w_minus_1, Double(0), k);
  const Double s = t * reciprocal(t + Double(2));
  const Double s2 = s * s;
  Double p = Double(kAtanhd[6]);
  for (int i = 5; i >= 0; --i) p = fma(p, s2, Double(kAtanhd[i]));
  return k + fma(s * s2, p, s * Double(kTwoLog2E));
}

// log ((1 + u) / (1 − u)) for |u| ≤ ⅓; exactly 0 at 0.
inline Float twice_atanh(Float u) {
  const Float x = u * u;
  Float p = Float(kTwiceAtanhf[4]);
  for (int i = 3; i >= 0; --i) p = fma(p, x, Float(kTwiceAtanhf[i]));
  return u * p;
}
inline Double twice_atanh(Double u) {
  const Double x = u * u;
  Double p = Double(kTwiceAtanhd[10]);
  for (int i = 9; i >= 0; --i) p = fma(p, x, Double(kTwiceAtanhd[i]));
  return u * p;
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
  constexpr bool kInterleaved = kInterleavesBFloat16 && IsBFloat16<T>::value;
  return kInterleaved ? e % 2 * Arithmetic<T>::kLanes + e / 2 : e;
}

inline void set_negative_infinity(float* p) { *p = kNegInf; }
inline void set_negative_infinity(double* p) { *p = kNegInf; }
inline void set_negative_infinity(BFloat16* p) { p->bits = 0xff80; }
inline void set_negative_infinity(Float16* p) { p->bits = 0xfc00; }

// Calls visit(T*) with data as its storage type.
template <class Operand, class Visitor>
inline void with_type(const Operand& operand, Visitor&& visit) {
  switch (operand.dtype) {
    case reptile_ext::DType::kFloat32:
      return visit(static_cast<float*>(operand.data));
    case reptile_ext::DType::kBFloat16:
      return visit(static_cast<BFloat16*>(operand.data));
    case reptile_ext::DType::kFloat16:
      return visit(static_cast<Float16*>(operand.data));
    case reptile_ext::DType::kFloat64:
      return visit(static_cast<double*>(operand.data));
  }
}

// The last n < 2 · kLanes elements of a row. Dead lanes hold −inf, which is what a masked class holds, so the code
// that follows needs no second version of itself.
#if !defined(REPTILE_EXT_HAS_LOAD2_TAIL)
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
