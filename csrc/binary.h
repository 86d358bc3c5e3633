// Loss and gradient of elements that each are a distribution of their own: a logit z is a row [z, 0] of two classes.
//
// The divergences are the functors of divergence.h; an element is a lane of V. Of its two classes the one that the
// student finds less likely is called minor: its exponent is −|s| / T_s, the other's 0, so that an element costs one
// exponential a model, not two. The gradient is taken at the minor class, where no digits are lost to a probability
// near 1, and has the other sign at the other.
//
//     a         −|s| / T_s · log2 e, of the major class 0
//     along     the teacher's logit of the major class against the minor one: t if s ≥ 0, else −t
//     Z         1 + 2^a, from 1 to 2
//
// Beside what divergence.h asks for, V brings / and
//
//     times_sign_of(x, s)         x, or −x where s is negative (its sign bit set)
//     where_negative(s, a, b)     a where s is negative, else b
//     negative_magnitude(x)       −|x|
//     unless_broken(x, s, t)      x, or NaN where s or t is NaN or +inf
#pragma once

#include "divergence.h"

namespace reptile_ext {
namespace {

// What the divergence of every element takes.
template <class V>
struct SoftNumbers {
  V k_s, k_t;  // what logits are multiplied with: log2 e / temperature, or 1 / temperature if D::kRawLogits
  V beta, one_minus_beta;
  V to_loss, to_gradient;  // factors; of the gradient without 1 / T_s in k_s
};

// The divergence and its gradient by s.
template <class D, class V>
REPTILE_EXT_FN __attribute__((always_inline)) void soft_element(const SoftNumbers<V>& numbers, V s, V t, V& loss,
                                                                V& gradient) {
  using G = typename D::Gradient;
  const V k_s = numbers.k_s, k_t = numbers.k_t, beta = numbers.beta, one_minus_beta = numbers.one_minus_beta;
  const V zero = V(0), one = V(1);
  V sums[D::kSums] = {}, minor[D::kKept], major[D::kKept];
  V e_s = zero, e_t = zero;
  if constexpr (D::kRawLogits) {
    D::first(s * k_s, t * k_t, zero, zero, sums, minor);
    D::first(zero, zero, zero, zero, sums, major);
  } else {
    const V along = times_sign_of(t, s);
    const V a = negative_magnitude(s) * k_s, least = negative_magnitude(t) * k_t;
    e_s = D::exponential(a);
    e_t = D::exponential(least);
    // The class that the teacher finds less likely has `least` and e_t, the other 0 and 1.
    const V b = where_negative(along, zero, least), b_major = where_negative(along, least, zero);
    const V of_minor = where_negative(along, one, e_t), of_major = where_negative(along, e_t, one);
    D::first(a, b, e_s, of_minor, sums, minor);
    D::first(zero, b_major, one, of_major, sums, major);
  }
  V mixture[D::kMixtureSums > 0 ? D::kMixtureSums : 1] = {};
  if constexpr (D::kMixtureSums > 0) {
    const V ratio = sums[0] / sums[1], over_z = reciprocal(sums[0]);  // exactly 1 of equal sums
    const V p = minor[1] * ratio, p_major = major[1] * ratio, difference = p - minor[0];
    D::mix(minor[0], p, difference, beta, one_minus_beta, mixture, minor);
    D::mix(major[0], p_major, zero - difference, beta, one_minus_beta, mixture, major);
    for (int i = 0; i < D::kMixtureSums; ++i) mixture[i] = mixture[i] * over_z;
  }
  Row<V> row{sums, mixture, beta, one_minus_beta, zero, zero, e_s, e_t, zero};
  V k[G::kCoefficients];
  // At the minor class, against the sign of s.
  const V scale = D::kRawLogits ? numbers.to_gradient : zero - numbers.to_gradient;
  loss = unless_broken(numbers.to_loss * max(zero, D::finish(row, scale, k)), s, t);
  if constexpr (D::kUnbounded >= 0) minor[D::kUnbounded] = row.if_bounded(minor[D::kUnbounded]);
  gradient = G::gradient(minor, k);
  if constexpr (!D::kRawLogits) gradient = times_sign_of(gradient, s);
  gradient = unless_broken(gradient, s, t);
}

// Adds the binary cross entropy of a label y from 0 to 1, w y softplus(−s) + (1 − y) softplus(s), and its gradient,
// (1 − y) σ(s) − w y σ(−s), where w is pos_weight and `hit` is w y.
template <class V>
REPTILE_EXT_FN __attribute__((always_inline)) void add_hard_element(V to_loss, V to_gradient, V s, V y, V hit, V& loss,
                                                                    V& gradient) {
  const V zero = V(0), one = V(1), k = V(typename V::Scalar(kLog2E)), miss = one - y;
  const V e = exp2(negative_magnitude(s) * k);
  const V log_z = log_of_sum(one + e, e);
  V entropy = add_product_where_positive(zero, hit, max(zero - s, zero) + log_z);
  entropy = add_product_where_positive(entropy, miss, max(s, zero) + log_z);
  const V likely = reciprocal(one + e), unlikely = e * likely;
  const V q = max(where_positive(s, likely), unlikely), not_q = max(where_positive(zero - s, likely), unlikely);
  loss = loss + unless_broken(to_loss * entropy, s, s);
  gradient = gradient + unless_broken(to_gradient * (miss * q - hit * not_q), s, s);
}

}  // namespace
}  // namespace reptile_ext
