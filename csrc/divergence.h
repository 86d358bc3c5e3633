// THE MATHS, once. One functor a divergence, templated on the value type: a SIMD vector on the CPU, a float on CUDA.
//
// Notation (docs/maths.md derives all of it). For one row, with reference points m_s, m_t near the rows' maxima:
//
//     a = (s − m_s) / T_s · log2 e      e_s = 2^a      Z_s = Σ e_s      q = e_s / Z_s      x = log q
//     b = (t − m_t) / T_t · log2 e      e_t = 2^b      Z_t = Σ e_t      p = e_t / Z_t      y = log p
//
// so that y − x = ln 2 · (b − a) + log Z_s − log Z_t. A driver goes over a row twice:
//
//     first pass    e_s, e_t from the logits; Z_s and Z_t; the functor's `add` gathers what its value needs
//     in between    `value` turns the sums into D
//     second pass   the functor's `gradient` from q and p, for every class
//
// What a functor of value type V has to have, all static:
//
//     kSums                                       how many sums over the classes its value needs
//     add(V (&sums)[kSums], e_s, e_t, a, b)       one class (one vector of classes) of the first pass
//     value(const double (&sums)[kSums], row)     D of the row, before it is cut off at 0
//     gradient(q, p)                              T_s · ∂D/∂s of a class. Every such gradient is homogeneous of degree
//                                                 1 in (q, p), so the driver passes both already multiplied by the
//                                                 row's coefficient
//
// This serves the divergences whose value needs one pass. Those over normalised probabilities (a mixture of p and q, |p
// − q|) need a pass over q and p in between, from the scratch the first pass leaves, and reverse KL's gradient needs x
// − y beside q and p: the driver's passes get those when the first such divergence comes.
//
// The sums stay the driver's: it holds them in a vector whose lanes are classes of one row, or rows side by side, adds
// up blocks of a long row to bound the rounding error, and reduces them.
//
// V brings +, −, ·, fma, and add_product_where_positive(acc, e, d) = acc + (e > 0 ? e·d : 0), which keeps a class
// without mass out of a sum whatever d is (−inf − −inf is NaN).
//
// Equal logits must give exactly 0: everything here subtracts like from like, and the build forbids the compiler to
// fuse a product into a difference (-ffp-contract=off), which would round one side and not the other.
#pragma once

#include "rows.h"

namespace reptile_ext {
namespace {

constexpr double kLn2 = 0.693147180559945309417232121458;
constexpr double kLog2E = 1.44269504088896340735992468100;

// What the first pass knows of a row once it is summed up.
struct RowStats {
  double z_s, z_t;          // Σ e_s, Σ e_t
  double log_z_s, log_z_t;  // their natural logarithms
};

// Forward KL, Σ p (y − x).
//     sum       Σ e_t (b − a)
//     value     ln 2 · sum / Z_t + log Z_s − log Z_t
//     gradient  q − p
template <class V>
struct ForwardKl {
  static constexpr int kSums = 1;
  static void add(V (&sums)[kSums], V /*e_s*/, V e_t, V a, V b) {
    sums[0] = add_product_where_positive(sums[0], e_t, b - a);
  }
  static double value(const double (&sums)[kSums], const RowStats& row) {
    return kLn2 * sums[0] / row.z_t + (row.log_z_s - row.log_z_t);
  }
  static V gradient(V q, V p) { return q - p; }
};

// The registry: calls `visit` with the functor of a kind. A new divergence is one line here.
template <class V, class Visitor>
inline void with_divergence(Divergence kind, Visitor&& visit) {
  switch (kind) {
    case Divergence::kForwardKl:
      return visit(ForwardKl<V>{});
  }
}

}  // namespace
}  // namespace reptile_ext
