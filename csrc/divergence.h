// THE MATHS, once. One functor a divergence, templated on the value type: a SIMD vector on the CPU, a float on CUDA.
//
// Notation (docs/maths.md derives all of it). For one row, with reference points m_s, m_t near the rows' maxima:
//
//     a = (s − m_s) / T_s · log2 e      e_s = 2^a      Z_s = Σ e_s      q = e_s / Z_s      x = log q
//     b = (t − m_t) / T_t · log2 e      e_t = 2^b      Z_t = Σ e_t      p = e_t / Z_t      y = log p
//
// so that y − x = ln 2 · (b − a) + log Z_s − log Z_t. A driver goes over a row twice, or three times:
//
//     first pass     `first`: from a and b of a class, what is added up over the classes, and what is kept of the class
//     mixture pass   `mix`, if kMixtureSums > 0: from q and p of a class, further sums, and another value to keep
//     in between     `finish`: from the sums, the value D and the coefficients k of the gradient
//     last pass      `gradient`, of what was kept and of k, for every class
//
// What a functor has, all static; `Defaults` holds what most of them share:
//
//     kSums, kKept, kCoefficients      how many sums the first pass takes, values it keeps of a class, coefficients
//     exponential(a)                   e_s of a, e_t of b
//     first(a, b, e_s, e_t, sums, kept)    adds to sums, sets kept; sums[0] and sums[1] are Z_s and Z_t (but for mse)
//     kMixtureSums                     0: no mixture pass
//     kMixtureKeeps                    whether mix changes kept[1]
//     mix(q, p, p − q, β, 1 − β, sums, kept)    all three may come times a common number, which the driver takes out
//                                      of the sums; the difference is as exact as the driver has it
//     finish(row, scale, k)            D before it is cut off at 0; k for a gradient of scale · T_s · ∂D/∂s. T is
//                                      double, of one row, or a vector of rows of two classes (cpu/binary.cpp)
//     Gradient                         the type whose gradient(kept, k) is used: functors of one form share it
//     kMoves                           whether a part of a row may be summed from reference points of its own (CUDA):
//     move(by, sums)                   the part's sums become those from the row's points (Move)
//     move_kept(by, k)                 coefficients for values that were kept from the part's points
//
// Almost every gradient has one of two forms. With g = ∂f/∂x, T_s ∂D/∂s = g − q Σ g, and so
//
//     Difference    a·q − b·p
//     Centred       k_0 q (u − C), C = Σ q u: the mean under q is taken off, which is what g − q Σ g does to g = q u
//     Affine        the same as q (k_0 u + k_1), k_1 = −k_0 C: an instruction less, and as exact where u is small;
//     where
//                   it is large and nearly C, for a class that has all the mass, k_0 C must not be rounded
//
// V brings +, −, ·, fma, max, exp2, reciprocal, smallest_normal and
//
//     where_positive(e, d)                       d where e > 0 (or NaN), else 0: a class without mass adds nothing
//     add_product_where_positive(acc, e, d)      acc + e · where_positive(e, d)
//     where_not_masked(z, d)                     d where z > −inf (or NaN), else 0
//     with_sign_of(d, x)                         x, −x or 0 as d is positive, negative or 0
//     log2_of_ratio(w, w − 1)                    log2 w, w > 0, from w − 1 where that is small, and so exactly 0 at 0
//     twice_atanh(u)                             log ((1 + u) / (1 − u)), |u| ≤ ⅓: log (z / w) of u = (z − w) /
//     (z + w); of rows of two classes alone, whose sums are from 1 to 2
//
// Equal logits must give exactly 0: everything here subtracts like from like, and the build forbids the compiler to
// fuse a product into a difference (-ffp-contract=off), which would round one side and not the other.
#pragma once

#include "rows.h"

namespace reptile_ext {
namespace {

// The C library's, by names that mean the same in device code. <cmath> would bring its templates in (simd.h).
#if defined(__CUDACC__)
#define REPTILE_EXT_FN __device__ inline
#define REPTILE_EXT_HOST_FN __host__ __device__ inline
using ::exp;
using ::log;
using ::log1p;
using ::sqrt;
#else
#define REPTILE_EXT_FN inline
#define REPTILE_EXT_HOST_FN inline
inline double exp(double x) { return __builtin_exp(x); }
inline double log(double x) { return __builtin_log(x); }
inline double log1p(double x) { return __builtin_log1p(x); }
inline double sqrt(double x) { return __builtin_sqrt(x); }
#endif
#if !defined(REPTILE_EXT_DEVICE)  // where float and double are V, they have these (cuda/device.h)
inline double max(double a, double b) { return a > b ? a : b; }
inline double where_positive(double e, double d) { return e <= 0 ? 0 : d; }
inline double where_not_masked(double z, double d) { return z == -__builtin_inf() ? 0 : d; }
#endif

constexpr double kLn2 = 0.693147180559945309417232121458;
constexpr double kLog2E = 1.44269504088896340735992468100;
constexpr double kInf = __builtin_inf();
constexpr double kNaN = __builtin_nan("");

// What a row's sums are asked for. Of rows of two classes Z − 1 is known, and better than from Z.
REPTILE_EXT_FN double over(double z) { return 1 / z; }
REPTILE_EXT_FN double log_of_sum(double z, double /*z_minus_1*/) { return log(z); }
REPTILE_EXT_FN double log_of_quotient(double z, double w, double, double) { return log(z) - log(w); }
template <class T>
REPTILE_EXT_FN T over(T z) {
  return reciprocal(z);
}
template <class T>
REPTILE_EXT_FN T log_of_sum(T z, T z_minus_1) {
  return twice_atanh(z_minus_1 * reciprocal(z + T(1)));
}
template <class T>
REPTILE_EXT_FN T log_of_quotient(T z, T w, T z_minus_1, T w_minus_1) {
  return twice_atanh((z_minus_1 - w_minus_1) * reciprocal(z + w));
}

// Z_s / Z_t.
template <class T>
REPTILE_EXT_FN T ratio_of(T z, T w) {
  return z / w;
}
#if defined(REPTILE_EXT_DEVICE)
REPTILE_EXT_DEVICE float ratio_of(float z, float w) { return quotient(z, w); }
#endif

// What `finish` knows of a row.
template <class T>
struct Row {
  const T* sums;               // of the first pass
  const T* mixture;            // of the mixture pass
  T beta, one_minus_beta;      // β and 1 − β
  T a_label, b_label;          // a and b of the label's class, if kExcludesLabel
  T z_s_minus_1, z_t_minus_1;  // of rows of two classes alone
  // Set by `finish` to +inf where D is, because the teacher has no mass where the student has some. The gradient would
  // be infinite too; it is taken as 0, and to that end the driver sets kept[kUnbounded] of the row to 0.
  T unbounded;

  REPTILE_EXT_FN T z_s() const { return sums[0]; }
  REPTILE_EXT_FN T z_t() const { return sums[1]; }
  REPTILE_EXT_FN T over_z_s() const { return over(sums[0]); }
  REPTILE_EXT_FN T over_z_t() const { return over(sums[1]); }
  REPTILE_EXT_FN T log_z_s() const { return log_of_sum(sums[0], z_s_minus_1); }
  REPTILE_EXT_FN T log_z_t() const { return log_of_sum(sums[1], z_t_minus_1); }
  // log (Z_s / Z_t)
  REPTILE_EXT_FN T log_z_s_to_z_t() const { return log_of_quotient(sums[0], sums[1], z_s_minus_1, z_t_minus_1); }
  // `centre`, the mean of the kept values under q, or 0 where the row is unbounded.
  REPTILE_EXT_FN T if_bounded(T centre) const { return where_not_masked(T(0) - unbounded, centre); }
};

// From the reference points of a part of a row to the row's: d = (m_part − m_row) / T · log2 e ≤ 0 and f = 2^d. A part
// without any logit above −inf has d = 0.
template <class V>
struct Move {
  V d_s = V(0), d_t = V(0), f_s = V(1), f_t = V(1);
};

struct Defaults {
  static constexpr int kMixtureSums = 0;
  static constexpr bool kMixtureKeeps = false;
  static constexpr int kUnbounded = -1;          // which kept value may be infinite
  static constexpr bool kRawLogits = false;      // a = s / T_s, b = t / T_t
  static constexpr bool kExcludesLabel = false;  // the label's class is hidden from `first`
  static constexpr bool kKeepsExp = true;        // kept[0] is e_s, of all classes
  template <class V>
  static REPTILE_EXT_FN V exponential(V a) {
    return exp2(a);
  }
  static constexpr bool kMoves = false;  // has move and move_kept; else a row's parts need its reference points first
};

template <class V>
REPTILE_EXT_FN void move_exponentials(const Move<V>& by, V* sums) {
  sums[0] = sums[0] * by.f_s;
  sums[1] = sums[1] * by.f_t;
}

// Σ e · y, where y too moves by d: e·f (y + d) of every class. 0 where nothing is left of e, whatever y is.
template <class V>
REPTILE_EXT_FN V move_sum(V sum, V z, V f, V d) {
  return f * where_positive(f, add_product_where_positive(sum, z, d));
}

template <class V>
REPTILE_EXT_FN void add_exponentials(V e_s, V e_t, V* sums) {
  sums[0] = sums[0] + e_s;
  sums[1] = sums[1] + e_t;
}

template <class V>
struct Difference {
  static constexpr int kKept = 2, kCoefficients = 2;
  static REPTILE_EXT_FN V gradient(const V (&kept)[2], const V (&k)[2]) { return kept[0] * k[0] - kept[1] * k[1]; }
  static REPTILE_EXT_FN void move_kept(const Move<V>& by, V (&k)[2]) {
    k[0] = k[0] * by.f_s;
    k[1] = k[1] * by.f_t;
  }
};

template <class V>
struct Centred {
  static constexpr int kKept = 2, kCoefficients = 2;
  static REPTILE_EXT_FN V gradient(const V (&kept)[2], const V (&k)[2]) { return kept[0] * k[0] * (kept[1] - k[1]); }
};

template <class V>
struct Affine {
  static constexpr int kKept = 2, kCoefficients = 2;
  static REPTILE_EXT_FN V gradient(const V (&kept)[2], const V (&k)[2]) { return kept[0] * fma(kept[1], k[0], k[1]); }
  template <class T>
  static REPTILE_EXT_FN void set(T k_0, T centre, T (&k)[2]) {
    k[0] = k_0;
    k[1] = T(0) - k_0 * centre;
  }
};

// ------------------------------------------------------------------------------------------- Kullback and Leibler's

// Forward KL, Σ p (y − x).
//     sums      Z_s, Z_t, Σ e_t (b − a)
//     value     ln 2 · sum / Z_t + log Z_s − log Z_t
//     gradient  q − p
template <class V>
struct ForwardKl : Defaults {
  using Gradient = Difference<V>;
  static constexpr bool kMoves = true;
  static constexpr int kSums = 3, kKept = 2;
  static REPTILE_EXT_FN void first(V a, V b, V e_s, V e_t, V (&sums)[kSums], V (&kept)[kKept]) {
    add_exponentials(e_s, e_t, sums);
    kept[0] = e_s;
    kept[1] = e_t;
    sums[2] = add_product_where_positive(sums[2], kept[1], b - a);
  }
  static REPTILE_EXT_FN void move(const Move<V>& by, V (&sums)[kSums]) {
    sums[2] = move_sum(sums[2], sums[1], by.f_t, by.d_t - by.d_s);
    move_exponentials(by, sums);
  }
  static REPTILE_EXT_FN void move_kept(const Move<V>& by, V (&k)[2]) { Difference<V>::move_kept(by, k); }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[2]) {
    k[0] = scale * row.over_z_s();
    k[1] = scale * row.over_z_t();
    return T(kLn2) * row.sums[2] * row.over_z_t() + row.log_z_s_to_z_t();
  }
};

// Reverse KL, Σ q (x − y).
//     sums      Z_s, Z_t, Σ e_s (a − b)
//     value     ln 2 · C + log Z_t − log Z_s,   C = sum / Z_s
//     gradient  q (x − y − D) = ln 2 · q (a − b − C)
template <class V>
struct ReverseKl : Defaults {
  using Gradient = Centred<V>;
  static constexpr bool kMoves = true;
  static constexpr int kSums = 3, kKept = 2, kUnbounded = 1;
  static REPTILE_EXT_FN void first(V a, V b, V e_s, V e_t, V (&sums)[kSums], V (&kept)[kKept]) {
    add_exponentials(e_s, e_t, sums);
    kept[0] = e_s;
    kept[1] = where_positive(kept[0], a - b);
    sums[2] = add_product_where_positive(sums[2], kept[0], a - b);
  }
  static REPTILE_EXT_FN void move(const Move<V>& by, V (&sums)[kSums]) {
    sums[2] = move_sum(sums[2], sums[0], by.f_s, by.d_s - by.d_t);
    move_exponentials(by, sums);
  }
  static REPTILE_EXT_FN void move_kept(const Move<V>& by, V (&k)[2]) {
    k[0] = k[0] * by.f_s;
    k[1] = k[1] - (by.d_s - by.d_t);
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[2]) {
    const T centre = row.sums[2] * row.over_z_s();
    row.unbounded = centre;
    k[0] = scale * T(kLn2) * row.over_z_s();
    k[1] = row.if_bounded(centre);
    return T(kLn2) * centre - row.log_z_s_to_z_t();
  }
};

// Symmetric KL, (1−β) · forward KL + β · reverse KL, 0 < β < 1.
template <class V>
struct SymmetricKl : Defaults {
  using Gradient = SymmetricKl;
  static constexpr bool kMoves = true;
  static constexpr int kSums = 4, kKept = 3, kCoefficients = 4, kUnbounded = 2;
  static REPTILE_EXT_FN void first(V a, V b, V e_s, V e_t, V (&sums)[kSums], V (&kept)[kKept]) {
    add_exponentials(e_s, e_t, sums);
    kept[0] = e_s;
    kept[1] = e_t;
    sums[2] = add_product_where_positive(sums[2], kept[1], b - a);
    kept[2] = where_positive(kept[0], a - b);
    sums[3] = fma(kept[0], kept[2], sums[3]);
  }
  static REPTILE_EXT_FN void move(const Move<V>& by, V (&sums)[kSums]) {
    sums[2] = move_sum(sums[2], sums[1], by.f_t, by.d_t - by.d_s);
    sums[3] = move_sum(sums[3], sums[0], by.f_s, by.d_s - by.d_t);
    move_exponentials(by, sums);
  }
  static REPTILE_EXT_FN void move_kept(const Move<V>& by, V (&k)[kCoefficients]) {
    k[0] = k[0] * by.f_s;
    k[1] = k[1] * by.f_t;
    k[2] = k[2] * by.f_s;
    k[3] = k[3] - (by.d_s - by.d_t);
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[kCoefficients]) {
    const T centre = row.sums[3] * row.over_z_s();
    const T difference = row.log_z_s_to_z_t();
    row.unbounded = centre;
    k[0] = scale * row.one_minus_beta * row.over_z_s();
    k[1] = scale * row.one_minus_beta * row.over_z_t();
    k[2] = scale * row.beta * T(kLn2) * row.over_z_s();
    k[3] = row.if_bounded(centre);
    return row.one_minus_beta * (T(kLn2) * row.sums[2] * row.over_z_t() + difference) +
           row.beta * (T(kLn2) * centre - difference);
  }
  static REPTILE_EXT_FN V gradient(const V (&kept)[kKept], const V (&k)[kCoefficients]) {
    return kept[0] * fma(kept[2] - k[3], k[2], k[0]) - kept[1] * k[1];
  }
};

// Cross entropy of the teacher's distribution, −Σ p x.
//     sums      Z_s, Z_t, Σ e_t a
//     value     log Z_s − ln 2 · sum / Z_t
//     gradient  q − p
template <class V>
struct SoftCrossEntropy : Defaults {
  using Gradient = Difference<V>;
  static constexpr bool kMoves = true;
  static constexpr int kSums = 3, kKept = 2;
  static REPTILE_EXT_FN void first(V a, V /*b*/, V e_s, V e_t, V (&sums)[kSums], V (&kept)[kKept]) {
    add_exponentials(e_s, e_t, sums);
    kept[0] = e_s;
    kept[1] = e_t;
    sums[2] = add_product_where_positive(sums[2], kept[1], a);
  }
  static REPTILE_EXT_FN void move(const Move<V>& by, V (&sums)[kSums]) {
    sums[2] = move_sum(sums[2], sums[1], by.f_t, by.d_s);
    move_exponentials(by, sums);
  }
  static REPTILE_EXT_FN void move_kept(const Move<V>& by, V (&k)[2]) { Difference<V>::move_kept(by, k); }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[2]) {
    k[0] = scale * row.over_z_s();
    k[1] = scale * row.over_z_t();
    return row.log_z_s() - T(kLn2) * row.sums[2] * row.over_z_t();
  }
};

// −Σ q y: the above with the roles exchanged, whose gradient is that of a trainable teacher.
//     sums      Z_s, Z_t, Σ e_s b
//     gradient  −ln 2 · q (b − C),   C = sum / Z_s
template <class V>
struct MirroredSoftCrossEntropy : Defaults {
  using Gradient = Centred<V>;
  static constexpr int kSums = 3, kKept = 2, kUnbounded = 1;
  static REPTILE_EXT_FN void first(V /*a*/, V b, V e_s, V e_t, V (&sums)[kSums], V (&kept)[kKept]) {
    add_exponentials(e_s, e_t, sums);
    kept[0] = e_s;
    kept[1] = where_positive(kept[0], b);
    sums[2] = add_product_where_positive(sums[2], kept[0], b);
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[2]) {
    const T centre = row.sums[2] * row.over_z_s();
    row.unbounded = T(0) - centre;
    k[0] = (T(0) - scale) * T(kLn2) * row.over_z_s();
    k[1] = row.if_bounded(centre);
    return row.log_z_t() - T(kLn2) * centre;
  }
};

// ------------------------------------------------------------------------------- through a mixture m of p and q
//
// All of them are written over z = (p − q) / m, which is exactly 0 where p = q and bounded everywhere: with
// m = β p + (1−β) q,
//
//     p / m = 1 + (1−β) z          q / m = 1 − β z
//
// and both have their logarithm from log2_of_ratio. Near equality, where a difference of logarithms would be all
// rounding error, these are as good as z is; so are the limits β → 0 and β → 1.

template <class V>
struct MixtureDefaults : Defaults {
  using Gradient = Affine<V>;
  static constexpr int kSums = 2, kKept = 2, kMixtureSums = 2;
  static constexpr bool kMixtureKeeps = true, kMoves = true;  // what is kept moves before the mixture pass
  static REPTILE_EXT_FN void move(const Move<V>& by, V (&sums)[kSums]) { move_exponentials(by, sums); }
  static REPTILE_EXT_FN void first(V /*a*/, V /*b*/, V e_s, V e_t, V (&sums)[kSums], V (&kept)[kKept]) {
    add_exponentials(e_s, e_t, sums);
    kept[0] = e_s;
    kept[1] = e_t;
  }
  // 1 / m of m = w_p p + w_q q. The smallest number, which otherwise is lost in rounding, keeps it divisible where p
  // and q have no mass, and a ratio of them, p / m or q / m, from a logarithm of −inf.
  static REPTILE_EXT_FN V over_mixture(V p, V w_p, V q, V w_q) {
    return reciprocal(fma(w_p, p, fma(w_q, q, smallest_normal(q))));
  }
  static REPTILE_EXT_FN V to_mixture(V p, V over_m) { return fma(p, over_m, smallest_normal(p)); }
  // The value, or NaN: log2_of_ratio may have swallowed one that the second sum has, through z.
  template <class T>
  static REPTILE_EXT_FN T unless_broken(const Row<T>& row, T value) {
    return value + (row.mixture[1] - row.mixture[1]);
  }
};

// Generalised Jensen-Shannon, β Σ p (y − log m) + (1−β) Σ q (x − log m), 0 < β < 1.
//     mixture   K_p = Σ p log2(p/m), K_q = Σ q log2(q/m)
//     value     ln 2 · (β K_p + (1−β) K_q)
//     gradient  (1−β) ln 2 · q (log2(q/m) − K_q)
template <class V>
struct Jsd : MixtureDefaults<V> {
  static REPTILE_EXT_FN void mix(V q, V p, V p_minus_q, V beta, V one_minus_beta, V (&sums)[2], V (&kept)[2]) {
    const V over_m = Jsd::over_mixture(p, beta, q, one_minus_beta);
    const V z = p_minus_q * over_m;
    const V log2_p = log2_of_ratio(Jsd::to_mixture(p, over_m), one_minus_beta * z);
    const V log2_q = log2_of_ratio(Jsd::to_mixture(q, over_m), (V(0) - beta) * z);
    sums[0] = fma(p, log2_p, sums[0]);
    sums[1] = fma(q, log2_q, sums[1]);
    kept[1] = log2_q;
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[2]) {
    Affine<V>::set(scale * row.one_minus_beta * T(kLn2) * row.over_z_s(), row.mixture[1], k);
    return T(kLn2) * (row.beta * row.mixture[0] + row.one_minus_beta * row.mixture[1]);
  }
};

// Skewed KL, Σ p (y − log m), m = β p + (1−β) q, 0 < β < 1.
//     mixture   Σ p log2(p/m), Σ q z
//     gradient  −(1−β) (p q / m − q Σ p q / m) = −(1−β)² q (z − Σ q z)
template <class V>
struct SkewKl : MixtureDefaults<V> {
  static REPTILE_EXT_FN void mix(V q, V p, V p_minus_q, V beta, V one_minus_beta, V (&sums)[2], V (&kept)[2]) {
    const V over_m = SkewKl::over_mixture(p, beta, q, one_minus_beta);
    const V z = p_minus_q * over_m;
    sums[0] = fma(p, log2_of_ratio(SkewKl::to_mixture(p, over_m), one_minus_beta * z), sums[0]);
    sums[1] = fma(q, z, sums[1]);
    kept[1] = z;
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[2]) {
    const T k_0 = (T(0) - scale) * row.one_minus_beta * row.one_minus_beta * row.over_z_s();
    Affine<V>::set(k_0, row.mixture[1], k);
    return MixtureDefaults<V>::unless_broken(row, T(kLn2) * row.mixture[0]);
  }
};

// Skewed reverse KL, Σ q (x − log m), m = β q + (1−β) p, 0 < β < 1.
//     mixture   Σ q log2(q/m), Σ q u with u = log2(q/m) + log2 e · β (1−β) z
//     gradient  ln 2 · q (u − Σ q u):   ∂f/∂x = q (log(q/m) + 1 − β q/m), and q/m = 1 − (1−β) z
template <class V>
struct SkewReverseKl : MixtureDefaults<V> {
  static REPTILE_EXT_FN void mix(V q, V p, V p_minus_q, V beta, V one_minus_beta, V (&sums)[2], V (&kept)[2]) {
    const V over_m = SkewReverseKl::over_mixture(q, beta, p, one_minus_beta);
    const V z = p_minus_q * over_m;
    const V log2_q = log2_of_ratio(SkewReverseKl::to_mixture(q, over_m), (V(0) - one_minus_beta) * z);
    kept[1] = fma(beta * one_minus_beta * V(kLog2E), z, log2_q);
    sums[0] = fma(q, log2_q, sums[0]);
    sums[1] = fma(q, kept[1], sums[1]);
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[2]) {
    Affine<V>::set(scale * T(kLn2) * row.over_z_s(), row.mixture[1], k);
    return MixtureDefaults<V>::unless_broken(row, T(kLn2) * row.mixture[0]);
  }
};

// ------------------------------------------------------------------------------------------------- distances

// Total variation, ½ Σ |p − q|.
//     mixture   Σ |p − q|, G = Σ q sign(q − p)
//     gradient  ½ q (sign(q − p) − G), with sign 0 at q = p
template <class V>
struct Tvd : MixtureDefaults<V> {
  using Gradient = Tvd;
  static constexpr bool kMixtureKeeps = false;
  static constexpr int kCoefficients = 3;
  static REPTILE_EXT_FN void mix(V q, V /*p*/, V p_minus_q, V /*beta*/, V /*one_minus_beta*/, V (&sums)[2],
                                 V (& /*kept*/)[2]) {
    const V d = V(0) - p_minus_q;
    sums[0] = sums[0] + max(d, V(0) - d);
    sums[1] = sums[1] + with_sign_of(d, q);
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[kCoefficients]) {
    k[0] = ratio_of(row.z_s(), row.z_t());  // as in the mixture pass: the sign must come out the same
    k[1] = scale * T(0.5) * row.over_z_s();
    k[2] = row.mixture[1];
    return T(0) - max(T(-1), T(-0.5) * row.mixture[0]);  // at most 1
  }
  static REPTILE_EXT_FN V gradient(const V (&kept)[2], const V (&k)[kCoefficients]) {
    return (with_sign_of(kept[0] - kept[1] * k[0], kept[0]) - kept[0] * k[2]) * k[1];
  }
};

// Squared Hellinger distance, 1 − B, B = Σ sqrt(p q). Kept are the roots of e_s and e_t, which are exponentials too.
//     sums      Z_s, Z_t, Σ sqrt(e_s e_t)
//     gradient  −½ (sqrt(p q) − q B)
template <class V>
struct Hellinger : Defaults {
  using Gradient = Hellinger;
  static constexpr bool kMoves = true;
  static constexpr int kSums = 3, kKept = 2, kCoefficients = 2;
  static constexpr bool kKeepsExp = false;
  static REPTILE_EXT_FN V exponential(V a) { return exp2(a * V(0.5f)); }
  static REPTILE_EXT_FN void first(V /*a*/, V /*b*/, V e_s, V e_t, V (&sums)[kSums], V (&kept)[kKept]) {
    kept[0] = e_s;
    kept[1] = e_t;
    sums[0] = fma(kept[0], kept[0], sums[0]);
    sums[1] = fma(kept[1], kept[1], sums[1]);
    sums[2] = fma(kept[0], kept[1], sums[2]);
  }
  static REPTILE_EXT_FN void move(const Move<V>& by, V (&sums)[kSums]) {
    sums[2] = sums[2] * exp2(fma(V(0.5f), by.d_s, V(0.5f) * by.d_t));
    move_exponentials(by, sums);
  }
  static REPTILE_EXT_FN void move_kept(const Move<V>& by, V (&k)[kCoefficients]) {
    k[0] = k[0] * by.f_s;
    // Of equal rows, both factors are the same product.
    k[1] = k[1] * (by.f_s == by.f_t ? by.f_s : exp2(fma(V(0.5f), by.d_s, V(0.5f) * by.d_t)));
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[kCoefficients]) {
    const T root = sqrt(row.z_s() * row.z_t());  // exactly Z where both are Z
    const T overlap = row.sums[2] / root;
    k[0] = scale * T(0.5) * overlap / row.z_s();
    k[1] = scale * T(0.5) / root;
    return T(1) - overlap;
  }
  static REPTILE_EXT_FN V gradient(const V (&kept)[kKept], const V (&k)[kCoefficients]) {
    return kept[0] * (kept[0] * k[0] - kept[1] * k[1]);
  }
};

// Logit matching, the mean of (s/T_s − t/T_t)² over the classes. A class masked on both sides is not in the mean; on
// one side alone it is infinitely far, and its gradient is taken as 0.
//     sums      Σ d², how many are not masked in s, in t, in both; and a sum that is NaN if a logit is NaN or +inf
//     gradient  2 d / n
template <class V>
struct Mse : Defaults {
  using Gradient = Mse;
  static constexpr int kSums = 5, kKept = 1, kCoefficients = 1;
  static constexpr bool kRawLogits = true, kKeepsExp = false, kMoves = true;  // without reference points
  static REPTILE_EXT_FN void first(V a, V b, V /*e_s*/, V /*e_t*/, V (&sums)[kSums], V (&kept)[kKept]) {
    kept[0] = where_not_masked(a, where_not_masked(b, a - b));
    sums[0] = fma(kept[0], kept[0], sums[0]);
    sums[1] = sums[1] + where_not_masked(a, V(1));
    sums[2] = sums[2] + where_not_masked(b, V(1));
    sums[3] = sums[3] + where_not_masked(a, where_not_masked(b, V(1)));
    sums[4] = sums[4] + (where_not_masked(a, a - a) + where_not_masked(b, b - b));
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[kCoefficients]) {
    const T n_s = row.sums[1], n_t = row.sums[2], n = row.sums[3];
    const T over_n = over(max(T(1), n));
    k[0] = T(2) * scale * over_n;
    const T apart = where_positive((n_s - n) + (n_t - n), T(kInf));
    const T empty = where_positive(T(1) - n_s, T(kNaN)) + where_positive(T(1) - n_t, T(kNaN));
    return row.sums[0] * over_n + apart + (empty + row.sums[4]);
  }
  static REPTILE_EXT_FN V gradient(const V (&kept)[kKept], const V (&k)[kCoefficients]) { return kept[0] * k[0]; }
};

// ------------------------------------------------------------------------------------- decoupled KD (Zhao et al. 2022)

REPTILE_EXT_FN double softplus(double v) { return (v > 0 ? v : 0) + log1p(exp(v > 0 ? -v : v)); }
REPTILE_EXT_FN double sigmoid(double v) { return 1 / (1 + exp(-v)); }

// Two-class KL of probabilities σ(v), σ(w): σ(v) log(σ(v)/σ(w)) + σ(−v) log(σ(−v)/σ(−w)).
REPTILE_EXT_FN double binary_kl(double v, double w) {
  const double hit = sigmoid(v), miss = sigmoid(-v);
  return (hit == 0 ? 0 : hit * (softplus(-w) - softplus(-v))) + (miss == 0 ? 0 : miss * (softplus(w) - softplus(v)));
}

// The log-odds of the label's class against all others, whose sum of exponentials is z; NaN for a logit of +inf.
REPTILE_EXT_FN double log_odds(double exponent, double z) { return exponent < kInf ? kLn2 * exponent - log(z) : kNaN; }

// TCKD + β NCKD: KL of "the label or another class", and KL among the other classes, of distributions p̂, q̂.
//     sums      N_s, N_t, Σ e_t (b − a), all without the label's class
//     value     binary KL of the log-odds + β (ln 2 · sum / N_t + log N_s − log N_t)
//     gradient  q_label − p_label =: δ at the label, β (q̂ − p̂) − δ q̂ elsewhere
template <class V>
struct Dkd : ForwardKl<V> {
  static constexpr int kCoefficients = 3;  // the last is the label's gradient
  static constexpr bool kExcludesLabel = true, kKeepsExp = false, kMoves = false;
  struct Gradient {
    static constexpr int kKept = 2, kCoefficients = 3;
    static REPTILE_EXT_FN V gradient(const V (&kept)[2], const V (&k)[3]) { return kept[0] * k[0] - kept[1] * k[1]; }
  };
  static REPTILE_EXT_FN double finish(Row<double>& row, double scale, double (&k)[3]) {
    const double n_s = row.z_s(), n_t = row.z_t();
    const double odds_s = log_odds(row.a_label, n_s), odds_t = log_odds(row.b_label, n_t);
    const bool likely = odds_s > 0 && odds_t > 0;  // then the difference of what is left is the more exact
    const double delta = likely ? sigmoid(-odds_t) - sigmoid(-odds_s) : sigmoid(odds_s) - sigmoid(odds_t);
    const double beta = n_t == 0 ? 0 : row.beta;  // NCKD is 0 whatever the student's others are
    k[0] = n_s == 0 ? 0 * delta : scale * (beta - delta) / n_s;
    k[1] = n_t == 0 ? 0 * delta : scale * beta / n_t;
    k[2] = scale * delta;
    double others = 0;
    if (n_t != 0 && row.beta > 0) {
      others = n_s == 0 ? kInf : kLn2 * row.sums[2] / n_t + (log(n_s) - log(n_t));
      if (others < 0) others = 0;
    }
    return binary_kl(odds_t, odds_s) + row.beta * others;
  }
};

// The above with the roles exchanged, whose gradient is that of a trainable teacher.
//     sums      N_s, N_t, Σ e_s (a − b), all without the label's class
//     gradient  γ = q_label (1 − q_label) (log-odds of s − log-odds of t) at the label,
//               β ln 2 · q̂ (a − b − C) − γ q̂ elsewhere,   C = sum / N_s
template <class V>
struct MirroredDkd : ReverseKl<V> {
  static constexpr int kCoefficients = 4;  // the last is the label's gradient
  static constexpr bool kExcludesLabel = true, kKeepsExp = false, kMoves = false;
  struct Gradient {
    static constexpr int kKept = 2, kCoefficients = 4;
    static REPTILE_EXT_FN V gradient(const V (&kept)[2], const V (&k)[4]) {
      return kept[0] * (k[0] * (kept[1] - k[1]) - k[2]);
    }
  };
  static REPTILE_EXT_FN double finish(Row<double>& row, double scale, double (&k)[4]) {
    const double n_s = row.z_s(), n_t = row.z_t();
    const double odds_s = log_odds(row.a_label, n_s), odds_t = log_odds(row.b_label, n_t);
    const double hit = sigmoid(odds_s), miss = sigmoid(-odds_s);
    const double centre = n_s == 0 ? 0 : row.sums[2] / n_s;
    row.unbounded = centre;
    double gamma = hit == 0 || miss == 0 ? 0 : hit * miss * (odds_s - odds_t);
    if (gamma == kInf || gamma == -kInf) gamma = 0;
    k[0] = n_s == 0 ? 0 : scale * row.beta * kLn2 / n_s;
    k[1] = row.if_bounded(centre);
    k[2] = n_s == 0 ? 0 : scale * gamma / n_s;
    k[3] = scale * gamma;
    double others = 0;
    if (n_s != 0 && row.beta > 0) {
      others = n_t == 0 ? kInf : kLn2 * centre + (log(n_t) - log(n_s));
      if (others < 0) others = 0;
    }
    return binary_kl(odds_s, odds_t) + row.beta * others;
  }
};

// ----------------------------------------------------------------------------------------------------- hard labels

// Cross entropy of a row's label at temperature 1, smoothed over the classes that are not masked, and its gradient:
//     q_1 (1 / z at e_1)  −  uniform, of a class that is not masked  −  hit, of the label's class
struct HardLabel {
  double loss;
  double to_q1, uniform, hit;  // times the row's factor
};

template <class T>
struct HardFactors {
  T to_q1, uniform, hit;
};
template <class T>
REPTILE_EXT_FN HardFactors<T> hard_factors(T z, T count, T smoothing, T factor) {
  return {factor * over(z), smoothing > 0 ? factor * smoothing * over(count) : T(0), factor * (T(1) - smoothing)};
}

// Of z = Σ e_1, a_sum = Σ a_1 and count of the classes that are not masked (of use with smoothing alone), and a_1 of
// the label's class; `factor` multiplies the gradient.
REPTILE_EXT_FN HardLabel hard_label(double z, double a_sum, double count, double a_label, double smoothing,
                                    double factor) {
  const double log_z = log(z);
  HardLabel result{log_z - kLn2 * a_label, factor / z, 0, factor * (1 - smoothing)};
  if (smoothing > 0) {
    const double uniformly = log_z - kLn2 * a_sum / count;  // the label may be masked: infinity, of which 0 parts
    result.loss = smoothing < 1 ? (1 - smoothing) * result.loss + smoothing * uniformly : uniformly;
    result.uniform = factor * smoothing / count;
  }
  return result;
}

// -------------------------------------------------------------------------------------------------------- the registry

// THE REGISTRY: the name that Python knows a divergence by (options.py), and its functor. A new one is a functor above
// and a line here.
#define REPTILE_EXT_DIVERGENCES(X)                         \
  X(forward_kl, ForwardKl)                                 \
  X(reverse_kl, ReverseKl)                                 \
  X(symmetric_kl, SymmetricKl)                             \
  X(jsd, Jsd)                                              \
  X(skew_kl, SkewKl)                                       \
  X(skew_reverse_kl, SkewReverseKl)                        \
  X(tvd, Tvd)                                              \
  X(hellinger, Hellinger)                                  \
  X(soft_cross_entropy, SoftCrossEntropy)                  \
  X(mse, Mse)                                              \
  X(dkd, Dkd)                                              \
  X(mirrored_soft_cross_entropy, MirroredSoftCrossEntropy) \
  X(mirrored_dkd, MirroredDkd)

}  // namespace

enum class Divergence : int {
#define REPTILE_EXT_NUMBER(name, Functor) k##Functor,
  REPTILE_EXT_DIVERGENCES(REPTILE_EXT_NUMBER)
#undef REPTILE_EXT_NUMBER
};

namespace {

#define REPTILE_EXT_NAME(name, Functor) #name,
constexpr const char* kDivergenceNames[] = {REPTILE_EXT_DIVERGENCES(REPTILE_EXT_NAME)};
#undef REPTILE_EXT_NAME
constexpr int kNumDivergences = int(sizeof(kDivergenceNames) / sizeof(kDivergenceNames[0]));

// Calls visit(functor) for a kind; on the host, too.
template <class V, class Visitor>
REPTILE_EXT_HOST_FN void with_divergence(Divergence kind, Visitor&& visit) {
  switch (kind) {
#define REPTILE_EXT_CASE(name, Functor) \
  case Divergence::k##Functor:          \
    return visit(Functor<V>{});
    REPTILE_EXT_DIVERGENCES(REPTILE_EXT_CASE)
#undef REPTILE_EXT_CASE
  }
}

constexpr bool needs_labels(Divergence kind) {
  switch (kind) {
#define REPTILE_EXT_CASE(name, Functor) \
  case Divergence::k##Functor:          \
    return Functor<float>::kExcludesLabel;
    REPTILE_EXT_DIVERGENCES(REPTILE_EXT_CASE)
#undef REPTILE_EXT_CASE
  }
  return false;
}

}  // namespace
}  // namespace reptile_ext
