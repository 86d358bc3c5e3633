// 16-byte vectors of GCC and Clang: SSE2, NEON, …
#pragma once

#include "storage.h"

namespace {

// Whether a pair of bfloat16 vectors holds even elements in its first half and odd ones in its second.
constexpr bool kInterleavesBFloat16 = false;
// Whether fma rounds once.
constexpr bool kFusesMultiplyAdd = false;

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
  friend Vector operator/(Vector a, Vector b) { return a.v / b.v; }
  friend Vector sqrt(Vector a) {
    for (int i = 0; i < kLanes; ++i) a.v[i] = sizeof(T) == 8 ? __builtin_sqrt(a.v[i]) : __builtin_sqrtf(float(a.v[i]));
    return a;
  }
  // x, or −x where s is negative (its sign bit set).
  friend Vector times_sign_of(Vector x, Vector s) {
    constexpr Int kSign = Int(uint64_t(1) << (8 * sizeof(T) - 1));
    Bits x_bits, s_bits;
    std::memcpy(&x_bits, &x.v, 16);
    std::memcpy(&s_bits, &s.v, 16);
    x_bits ^= s_bits & kSign;
    std::memcpy(&x.v, &x_bits, 16);
    return x;
  }
  friend Vector negative_magnitude(Vector x) { return x.v < Reg{} ? x.v : -x.v; }
  // a where s is negative (its sign bit set), else b.
  friend Vector where_negative(Vector s, Vector a, Vector b) {
    Bits bits;
    std::memcpy(&bits, &s.v, 16);
    return bits < Bits{} ? a.v : b.v;
  }
  // x, or NaN where s or t is NaN or +inf.
  friend Vector unless_broken(Vector x, Vector s, Vector t) {
    const Reg infinity = Vector(T(-kNegInf)).v;
    return ((s.v < infinity) & (t.v < infinity)) != 0 ? x.v : Vector(T(kNan)).v;
  }
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
  // a where |x| < 0.2, else b.
  friend Vector where_small(Vector x, Vector a, Vector b) {
    const Reg magnitude = x.v < Reg{} ? -x.v : x.v;
    return magnitude < Vector(T(0.2)).v ? a.v : b.v;
  }
  friend Vector smallest_normal(Vector) { return Vector(sizeof(T) == 8 ? T(0x1p-1022) : T(0x1p-126)); }
  friend Vector reciprocal(Vector a) { return Vector(T(1)).v / a.v; }
  // w = f · 2^k with f in [¾, 1½), of double [√½, √2). Of 0, one below the smallest exponent.
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

}  // namespace
