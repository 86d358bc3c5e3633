// What is right: one row of SPEC.md, section 1, in double arithmetic and as plainly as it can be written; and how near
// to it a kernel has to be.
//
// A result is compared within   unit · size + slack:
//
//     unit     the relative error of an exponential. Its exponent is rounded three times on each side, so it grows with
//              how far apart the logits are: 4 ε (spread + 16), ε = 2^-24 or 2^-53. The reference point of a row of
//              more than 512 classes may lie 60 powers of two, 42 in units of the logits, below the maximum.
//     size     what the terms of the result amount to before they cancel
//     slack    where a result jumps: at p = q in the total variation, and at a class whose exponential is denormal,
//              which may or may not count as mass (docs/maths.md, "Infinities")
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "../../csrc/divergence.h"
#include "../../csrc/rows.h"

namespace reptile_ext {

using Numbers = std::vector<double>;
using Sum = long double;  // of many terms, which in double would add up to more than a kernel's error

struct Range {
  double largest, smallest, epsilon;  // finite; normal; relative error of a rounding
};
inline Range range_of(DType dtype) {
  constexpr Range kRanges[] = {{FLT_MAX, 0x1p-126, 0x1p-24},
                               {0x1.fep127, 0x1p-126, 0x1p-8},
                               {65504, 0x1p-14, 0x1p-11},
                               {DBL_MAX, 0x1p-1022, 0x1p-53}};  // in the order of DType
  return kRanges[int(dtype)];
}

// What is fuzzed: the divergences whose formulas stand here a second time. A new one joins by a case in `compute`.
constexpr Divergence kKnown[] = {
    Divergence::kForwardKl,
    Divergence::kReverseKl,
    Divergence::kSymmetricKl,
    Divergence::kSoftCrossEntropy,
    Divergence::kMirroredSoftCrossEntropy,
    Divergence::kJsd,
    Divergence::kSkewKl,
    Divergence::kSkewReverseKl,
    Divergence::kTvd,
    Divergence::kHellinger,
    Divergence::kMse,
    Divergence::kDkd,
    Divergence::kMirroredDkd,
};

struct ExactRow {
  bool is_broken = false;    // loss and gradient are NaN; nothing of what follows is set
  bool is_in_range = false;  // the arithmetic has room for the logits and factors: no NaN, no false infinity
  bool is_moderate = false;  // and the digits to compare with this
  double unit = 0;
  double loss = 0, loss_size = 0, loss_slack = 0;
  Numbers gradient, gradient_size, gradient_slack;
};

inline double times(double mass, double u) { return mass == 0 ? 0 : mass * u; }

// A side of a row: log_softmax of its logits over the temperature, over all classes but `hidden`.
struct Softmax {
  Numbers z, log_p, p;                        // z: logits less the highest of them, over the temperature
  double top = -kInf, bottom = kInf;          // of the logits; the lowest that is not masked
  double log_sum = 0, spread = 0, reach = 0;  // log Σ exp z; of z; the largest logit, over the temperature or not
  bool is_broken = false, is_empty = false;   // empty: every class is masked or hidden

  Softmax(const Numbers& logits, double temperature, int64_t hidden = -1) : z(logits), log_p(z), p(z) {
    if (hidden >= 0) z[hidden] = -kInf;
    for (double x : z) {
      is_broken |= std::isnan(x) || x == kInf;
      top = std::max(top, x);
      if (x > -kInf) bottom = std::min(bottom, x);
    }
    is_empty = top == -kInf;
    is_broken |= is_empty && hidden < 0;
    if (is_empty || is_broken) top = 0;
    spread = (top - bottom) / temperature;
    reach = std::max(std::fabs(top), std::fabs(bottom)) / std::min(temperature, 1.0);
    Sum sum = 0;
    for (double& x : z) sum += std::exp(x = (x - top) / temperature);
    log_sum = double(std::log(sum));
    for (size_t v = 0; v < z.size(); ++v) {
      log_p[v] = is_empty ? -kInf : z[v] - log_sum;
      p[v] = std::exp(log_p[v]);
    }
  }
  bool is_masked(size_t v) const { return z[v] == -kInf; }
};

// D of a row and T_s ∂D/∂s, with their sizes and slacks.
class SoftPart {
 public:
  Sum value = 0;
  double size = 1, slack = 0;
  Numbers gradient, gradient_size, gradient_slack;
  bool is_ambiguous = false;  // whether D is infinite hangs on a class on the brink of having mass

  SoftPart(const LossProblem& problem, const Numbers& student, const Numbers& teacher, int64_t label)
      : gradient(student.size(), 0),
        gradient_size(gradient),
        gradient_slack(gradient),
        problem_(problem),
        is_double_(problem.student.dtype == DType::kFloat64 || problem.teacher.dtype == DType::kFloat64),
        n_(student.size()),
        s_(student, problem.student_temperature, needs_labels(problem.divergence) ? label : -1),
        t_(teacher, problem.teacher_temperature, needs_labels(problem.divergence) ? label : -1) {
    compute(student, teacher, label);
  }

 private:
  const LossProblem& problem_;
  const bool is_double_;
  const size_t n_;
  const Softmax s_, t_;  // without the label's class for dkd
  const Numbers &q = s_.p, &p = t_.p, &x = s_.log_p, &y = t_.log_p;

  // The divergences of kKnown.
  void compute(const Numbers& student, const Numbers& teacher, int64_t label) {
    switch (problem_.divergence) {
      case Divergence::kForwardKl:
        return kullback_leibler(1, 0);
      case Divergence::kReverseKl:
        return kullback_leibler(0, 1);
      case Divergence::kSymmetricKl:
        return kullback_leibler(problem_.one_minus_beta, problem_.beta);
      case Divergence::kSoftCrossEntropy:
        return soft_cross_entropy();
      case Divergence::kMirroredSoftCrossEntropy:
        return mirrored_soft_cross_entropy();
      case Divergence::kJsd:
        return jsd();
      case Divergence::kSkewKl:
        return skew_kl();
      case Divergence::kSkewReverseKl:
        return skew_reverse_kl();
      case Divergence::kTvd:
        return tvd();
      case Divergence::kHellinger:
        return hellinger();
      case Divergence::kMse:
        return mse(student, teacher);
      case Divergence::kDkd:
      case Divergence::kMirroredDkd:
        return dkd(student, teacher, label);
      default:
        std::abort();
    }
  }

  // Whether the exponential of a class may be less than a normal number.
  bool is_light(const Softmax& side, size_t v) const { return side.z[v] < (is_double_ ? -706 : -86); }

  // Σ p (y − x), p being `from`. A class at −inf on the other side alone makes it infinite if it has mass.
  struct Kl {
    Sum value = 0;
    double slack = 0;
  };
  Kl kl(const Softmax& from, const Softmax& to) {
    Kl kl;
    for (size_t v = 0; v < n_; ++v) {
      if (from.is_masked(v)) continue;
      const bool is_light = this->is_light(from, v);
      if (!to.is_masked(v)) {
        const double term = times(from.p[v], from.log_p[v] - to.log_p[v]);
        kl.value += term;
        if (is_light) kl.slack += std::fabs(term);
      } else if (!is_light) {
        kl.value = kInf;
      } else if (from.z[v] > (is_double_ ? -760 : -135)) {
        is_ambiguous = true;
      }
    }
    return kl;
  }

  // The gradient of a divergence whose ∂f/∂x is q u: q (u − Σ q u), each term good to `unit` and `absolute` more.
  void add_centred(const Numbers& u, double factor, double absolute) {
    Sum mean = 0;
    double slack = 0;
    for (size_t v = 0; v < n_; ++v) {
      mean += times(q[v], u[v]);
      if (is_light(s_, v)) slack += std::fabs(times(q[v], u[v]));
    }
    for (size_t v = 0; v < n_; ++v) {
      gradient[v] += factor * times(q[v], u[v] - double(mean));
      const double own = std::fabs(factor) * times(q[v], std::fabs(u[v]) + std::fabs(double(mean)) + absolute);
      gradient_size[v] += own;
      gradient_slack[v] += std::fabs(factor) * q[v] * slack + (is_light(s_, v) ? 2 * own : 0);
    }
  }
  // log of q / p, 0 where either has nothing.
  Numbers log_ratios() const {
    Numbers u(n_);
    for (size_t v = 0; v < n_; ++v) u[v] = s_.is_masked(v) || t_.is_masked(v) ? 0 : x[v] - y[v];
    return u;
  }

  // forward · Σ p (y − x) + reverse · Σ q (x − y). An infinite reverse part has a gradient of 0.
  void kullback_leibler(double forward, double reverse) {
    const Kl of_p = forward > 0 ? kl(t_, s_) : Kl(), of_q = reverse > 0 ? kl(s_, t_) : Kl();
    value = times(forward, double(of_p.value)) + times(reverse, double(of_q.value));
    size = times(forward, 1 + double(of_p.value)) + times(reverse, 1 + double(of_q.value));
    slack = forward * of_p.slack + reverse * of_q.slack;
    for (size_t v = 0; v < n_; ++v) {
      gradient[v] += forward * (q[v] - p[v]);
      gradient_size[v] += forward * (q[v] + p[v]);
    }
    if (reverse > 0 && of_q.value < kInf) add_centred(log_ratios(), reverse, 1);
  }

  // −Σ p x = Σ p (y − x) − Σ p y
  void soft_cross_entropy() {
    kullback_leibler(1, 0);
    for (size_t v = 0; v < n_; ++v) value -= times(p[v], y[v]);
    size = 1 + double(value);
  }
  // −Σ q y
  void mirrored_soft_cross_entropy() {
    const Kl of_q = kl(s_, t_);
    value = of_q.value;
    slack = of_q.slack;
    Numbers u(n_);
    for (size_t v = 0; v < n_; ++v) {
      value -= times(q[v], x[v]);
      u[v] = t_.is_masked(v) ? 0 : -y[v];
    }
    size = 1 + double(value);
    if (value < kInf) add_centred(u, 1, 1);
  }

  // Through a mixture m = a p + b q, by z = (p − q) / m: p/m = 1 + b z and q/m = 1 − a z. Calls visit(v, z, log p/m,
  // log q/m). Near β = 0 and β = 1 these divergences are flat: an error in p and q counts for β (1−β) or (1−β) of it.
  // Where m is denormal, a logarithm may be off by some 90.
  template <class Visitor>
  void through_mixture(double a, double b, Visitor&& visit) {
    const auto log_of = [](double log_w, double w_minus_1) {
      return std::fabs(w_minus_1) < 0.5 ? std::log1p(w_minus_1) : log_w;
    };
    for (size_t v = 0; v < n_; ++v) {
      const double m = a * p[v] + b * q[v];
      if (m == 0) continue;
      const bool is_light = m < (is_double_ ? 0x1p-1015 : 0x1p-120);
      if (is_light) slack += 100 * (p[v] + q[v]);
      if (is_light) gradient_slack[v] += 100 * q[v];
      const double z = (p[v] - q[v]) / m;
      visit(v, z, p[v] == 0 ? 0 : log_of(y[v] - std::log(m), b * z),
            q[v] == 0 ? 0 : log_of(x[v] - std::log(m), -a * z));
    }
  }
  void add_size_of_mixture(double flatness) {
    size = 8 * flatness + double(value);
    for (size_t v = 0; v < n_; ++v) {
      gradient_size[v] += 4 * flatness * (p[v] + q[v]);
      gradient_slack[v] += q[v] * slack;
    }
  }
  // β Σ p (y − log m) + (1−β) Σ q (x − log m), m = β p + (1−β) q;   ∂f/∂x = (1−β) q log(q/m)
  void jsd() {
    const double beta = problem_.beta, one_minus_beta = problem_.one_minus_beta;
    Numbers u(n_);
    through_mixture(beta, one_minus_beta, [&](size_t v, double, double log_p, double log_q) {
      value += beta * p[v] * log_p + one_minus_beta * q[v] * log_q;
      u[v] = log_q;
    });
    add_centred(u, one_minus_beta, 0);
    add_size_of_mixture(beta * one_minus_beta);
  }
  // Σ p (y − log m), m = β p + (1−β) q;   ∂f/∂x = −(1−β) q p/m = −(1−β) q (1 + (1−β) z)
  void skew_kl() {
    const double one_minus_beta = problem_.one_minus_beta;
    Numbers u(n_);
    through_mixture(problem_.beta, one_minus_beta, [&](size_t v, double z, double log_p, double) {
      value += p[v] * log_p;
      u[v] = z;
    });
    add_centred(u, -one_minus_beta * one_minus_beta, 0);
    add_size_of_mixture(one_minus_beta);
  }
  // Σ q (x − log m), m = β q + (1−β) p;   ∂f/∂x = q (log(q/m) + 1 − β q/m) = q (log(q/m) + β (1−β) z + 1 − β)
  void skew_reverse_kl() {
    const double beta = problem_.beta, one_minus_beta = problem_.one_minus_beta;
    Numbers u(n_);
    through_mixture(one_minus_beta, beta, [&](size_t v, double z, double, double log_q) {
      value += q[v] * log_q;
      u[v] = log_q + beta * one_minus_beta * z;
    });
    add_centred(u, 1, 0);
    add_size_of_mixture(one_minus_beta);
  }

  // ½ Σ |p − q|;   ∂f/∂x = ½ q sign(q − p), which rounding may decide where they are equal but for that.
  void tvd() {
    Numbers u(n_);
    std::vector<bool> is_tie(n_);
    double ties = 0;
    for (size_t v = 0; v < n_; ++v) {
      value += std::fabs(p[v] - q[v]) / 2;
      u[v] = q[v] > p[v] ? 0.5 : q[v] < p[v] ? -0.5 : 0;
      is_tie[v] = std::fabs(p[v] - q[v]) <= (is_double_ ? 0x1p-39 : 0x1p-10) * (p[v] + q[v]);
      if (is_tie[v]) ties += q[v];
    }
    add_centred(u, 1, 0);
    for (size_t v = 0; v < n_; ++v) gradient_slack[v] += q[v] * (ties + is_tie[v]);
  }

  // 1 − Σ sqrt(p q);   ∂f/∂x = −½ sqrt(p q)
  void hellinger() {
    Sum overlap = 0;
    for (size_t v = 0; v < n_; ++v) overlap += std::exp((x[v] + y[v]) / 2);
    value = 1 - overlap;
    for (size_t v = 0; v < n_; ++v) {
      const double root = std::exp((x[v] + y[v]) / 2);
      gradient[v] = (q[v] * double(overlap) - root) / 2;
      gradient_size[v] = q[v] + root;
    }
  }

  // The mean of (s/T_s − t/T_t)², without the classes that are masked on both sides; on one side alone: infinite, and
  // no gradient there.
  void mse(const Numbers& student, const Numbers& teacher) {
    Sum sum = 0;
    double count = 0, sizes = 0;
    for (size_t v = 0; v < n_; ++v) {
      if (s_.is_masked(v) || t_.is_masked(v)) continue;
      const double a = student[v] / problem_.student_temperature, b = teacher[v] / problem_.teacher_temperature;
      gradient[v] = 2 * (a - b);
      gradient_size[v] = 2 * (std::fabs(a) + std::fabs(b));
      sum += (a - b) * (a - b);
      sizes += gradient_size[v] * gradient_size[v] / 4;
      ++count;
    }
    value = sum / count;
    size = sizes / count;
    for (size_t v = 0; v < n_; ++v) {
      if (s_.is_masked(v) != t_.is_masked(v)) value = kInf;
      gradient[v] /= std::max(count, 1.0);
      gradient_size[v] /= std::max(count, 1.0);
    }
  }

  // TCKD + β NCKD. The label against the others: KL of σ(v) from σ(w), v and w being log-odds. The others among
  // themselves: Σ p̂ (ŷ − x̂), 0 where there are none. Mirrored: roles exchanged, gradient still the student's.
  void dkd(const Numbers& student, const Numbers& teacher, int64_t label) {
    const auto softplus = [](double v) { return std::max(v, 0.0) + std::log1p(std::exp(-std::fabs(v))); };
    const auto sigmoid = [](double v) { return 1 / (1 + std::exp(-v)); };
    const auto binary_kl = [&](double v, double w) {
      return times(sigmoid(v), softplus(-w) - softplus(-v)) + times(sigmoid(-v), softplus(w) - softplus(v));
    };
    const bool is_mirrored = problem_.divergence == Divergence::kMirroredDkd;
    const double beta = problem_.beta;
    const auto log_odds = [&](const Softmax& others, double logit, double temperature) {
      return others.is_empty ? kInf : (logit - others.top) / temperature - others.log_sum;
    };
    const double v = log_odds(s_, student[label], problem_.student_temperature);
    const double w = log_odds(t_, teacher[label], problem_.teacher_temperature);
    // Where σ underflows, a class is on the brink as well.
    const auto is_far = [](double odds) { return std::fabs(odds) > 600 && std::fabs(odds) < kInf; };
    is_ambiguous = (is_far(v) && std::isinf(w)) || (is_far(w) && std::isinf(v));

    const Softmax &from = is_mirrored ? s_ : t_, &to = is_mirrored ? t_ : s_;
    const Kl others = beta > 0 && !from.is_empty ? kl(from, to) : Kl();
    const double apart = is_mirrored ? binary_kl(v, w) : binary_kl(w, v);
    value = apart + times(beta, double(others.value));
    size = 1 + apart + times(beta, 1 + double(others.value));
    slack = beta * others.slack;

    // δ = σ(v) − σ(w) at the label, or γ = σ(v) σ(−v) (v − w); what it is there is taken from the others by their q̂.
    const double slope = sigmoid(v) * sigmoid(-v);
    double at_label, label_size;
    if (is_mirrored) {
      at_label = std::isinf(times(slope, v - w)) ? 0 : times(slope, v - w);
      label_size = std::fabs(at_label) + slope;
      if (beta > 0 && others.value < kInf) add_centred(log_ratios(), beta, 1);
    } else {
      at_label = v > 0 && w > 0 ? sigmoid(-w) - sigmoid(-v) : sigmoid(v) - sigmoid(w);
      label_size = slope + sigmoid(w) * sigmoid(-w);
      for (size_t u = 0; u < n_ && !t_.is_empty; ++u) {
        gradient[u] += beta * (q[u] - p[u]);
        gradient_size[u] += beta * (q[u] + p[u]);
      }
    }
    for (size_t u = 0; u < n_; ++u) {
      gradient[u] -= at_label * q[u];
      gradient_size[u] += (std::fabs(at_label) + label_size) * q[u];
    }
    gradient[label] = at_label;
    gradient_size[label] = label_size;
  }
};

// Cross entropy at temperature 1, smoothed over the classes that are not masked. `spread` grows to that of its logits.
inline void add_cross_entropy(ExactRow& row, const LossProblem& problem, const Numbers& student, int64_t label,
                              double weight, double hard_scale, double& spread) {
  const Softmax s_1(student, 1);
  spread = std::max(spread, s_1.spread);
  Sum sum = 0;
  double count = 0;
  for (size_t v = 0; v < student.size(); ++v) {
    if (s_1.is_masked(v)) continue;
    sum -= s_1.log_p[v];
    ++count;
  }
  const double smoothing = problem.label_smoothing;
  const double ce = times(1 - smoothing, -s_1.log_p[label]) + smoothing * double(sum) / count;
  row.loss += weight * problem.hard_weight * ce;
  row.loss_size += weight * problem.hard_weight * (1 + ce);
  for (size_t v = 0; v < student.size(); ++v) {
    const double target = (int64_t(v) == label ? 1 - smoothing : 0) + (s_1.is_masked(v) ? 0 : smoothing / count);
    row.gradient[v] += hard_scale * (s_1.p[v] - target);
    row.gradient_size[v] += std::fabs(hard_scale) * (s_1.p[v] + target);
  }
}

// Of the problem, the numbers and the dtypes of student and teacher are read; of the teacher, nothing if there is
// no soft part.
inline ExactRow exact_row(const LossProblem& problem, const Numbers& student, const Numbers& teacher, int64_t label,
                          double weight, double grad_output) {
  ExactRow row;
  const size_t n = student.size();
  const bool is_soft = problem.soft_scale > 0, is_hard = problem.hard_weight > 0;
  const bool is_double = problem.student.dtype == DType::kFloat64 || problem.teacher.dtype == DType::kFloat64;
  const Softmax s(student, problem.student_temperature), t(is_soft ? teacher : student, problem.teacher_temperature);
  row.is_broken = s.is_broken || (is_soft && t.is_broken);
  if (row.is_broken) return row;

  const double scale = weight * problem.gradient_scale * grad_output;
  const double soft_scale = scale * problem.soft_scale / problem.student_temperature;
  const double of_dkd = needs_labels(problem.divergence) ? std::max(problem.beta, 1.0) : 1;
  const double hard_scale = scale * problem.hard_weight;
  const double factor = std::max(of_dkd * std::fabs(soft_scale), std::fabs(hard_scale));
  // Sums go over n classes, of exponentials that may be as large as 2^60, or of squares; differences may be twice a
  // logit.
  const double room = double(n) * (n > 512 ? 0x1p60 : 1) * 8;
  const double reach = std::max(s.reach, is_soft ? t.reach : 0);
  const double largest = reach * std::max({1.0, factor, problem.divergence == Divergence::kMse && is_soft ? reach : 0});
  const bool is_zero_times_inf = is_hard && problem.label_smoothing == 1 && std::isinf(student[label]);
  row.is_in_range = largest < (is_double ? DBL_MAX : FLT_MAX) / room && factor < 1e30 && !is_zero_times_inf;
  if (!row.is_in_range) return row;

  double spread = std::max(s.spread, is_soft ? t.spread : 0);
  row.gradient.assign(n, 0);
  row.gradient_size = row.gradient_slack = row.gradient;
  bool is_ambiguous = false;
  if (is_soft) {
    const SoftPart soft(problem, student, teacher, label);
    row.loss = weight * problem.soft_scale * std::max(double(soft.value), 0.0);
    row.loss_size = weight * problem.soft_scale * soft.size;
    row.loss_slack = weight * problem.soft_scale * soft.slack;
    for (size_t v = 0; v < n; ++v) {
      row.gradient[v] = soft_scale * soft.gradient[v];
      row.gradient_size[v] = std::fabs(soft_scale) * soft.gradient_size[v];
      row.gradient_slack[v] = std::fabs(soft_scale) * soft.gradient_slack[v];
    }
    is_ambiguous = soft.is_ambiguous;
  }
  if (is_hard) add_cross_entropy(row, problem, student, label, weight, hard_scale, spread);
  const double underflow = is_double ? 1e-290 : 1e-30;
  row.loss_slack += weight * (problem.soft_scale + problem.hard_weight) * underflow;
  for (double& slack : row.gradient_slack) slack += factor * underflow;

  row.unit = (is_double ? 0x1p-53 : 0x1p-24) * 4 * (spread + (n > 512 ? 42 : 0) + 16);
  const bool is_mse_far = problem.divergence == Divergence::kMse && is_soft && reach > 1e6;
  const bool is_factor_tame = factor == 0 || (factor > 1e-12 && factor < 1e12);
  row.is_moderate = spread < 2000 && is_factor_tame && !is_mse_far && !is_ambiguous;
  return row;
}

// A row of a sparse teacher: classes, −1 for none, and the logarithms of their probabilities.
struct SparseTeacher {
  std::vector<int64_t> ids;
  Numbers log_probs;
  DType dtype;
};

// By the definitions of docs/maths.md, "Sparse teachers": a row of the listed classes and, last, of all others as one.
// "renormalize" is the row of all classes, nothing of the teacher in the others, and shows that this is the same.
//
// The kernel computes the few classes in float64, the exponentials of the others in the arithmetic of the logits. So
// `unit` is that of these, whose reference point may lie 42 above the highest of them, being another class.
inline ExactRow exact_sparse_row(const LossProblem& problem, Tail tail, const Numbers& student,
                                 const SparseTeacher& teacher, int64_t label, double weight, double grad_output) {
  ExactRow row;
  const size_t n = student.size();
  // Of a row that lists only what the student does not have, nothing is known.
  const int64_t vocab_size = int64_t(n);
  const auto any_id = [&](auto&& is) { return std::any_of(teacher.ids.begin(), teacher.ids.end(), is); };
  const bool is_cut = any_id([&](int64_t id) { return id >= vocab_size; }) &&
                      !any_id([&](int64_t id) { return id >= 0 && id < vocab_size; });
  const bool is_soft = problem.soft_scale > 0 && !is_cut, is_hard = problem.hard_weight > 0;
  const bool is_double = problem.student.dtype == DType::kFloat64 || teacher.dtype == DType::kFloat64;

  std::vector<size_t> listed;
  Numbers y;
  std::vector<bool> is_listed(n);
  Sum mass = 0, dropped = 0, of_logarithms = 0;
  for (size_t i = 0; i < teacher.ids.size(); ++i) {
    const int64_t id = teacher.ids[i];
    if (id < 0) continue;
    const double log_prob = teacher.log_probs[i], p = std::exp(log_prob);
    (id < vocab_size ? mass : dropped) += p;
    if (id >= vocab_size) continue;
    listed.push_back(size_t(id));
    y.push_back(log_prob);
    is_listed[size_t(id)] = true;
    of_logarithms -= times(p, log_prob);
  }
  Numbers others;
  for (size_t v = 0; v < n; ++v) {
    if (!is_listed[v]) others.push_back(student[v]);
  }
  const bool is_all = others.empty();
  if (is_all) others.push_back(-kInf);
  const double t_s = problem.student_temperature;
  const Softmax s(student, t_s), rest(others, t_s, is_all ? 0 : -1);
  const bool has_rest = rest.top > -kInf && !(is_all || rest.is_empty);

  row.is_broken = s.is_broken;
  double r = 0, share = 1;
  bool is_on_the_brink = false;  // a difference of two numbers, of which rounding leaves no digits
  if (is_soft) {
    if (tail == Tail::kBucket && !is_all) {
      r = double(1 - dropped - mass);
      const double eps = 2 * range_of(teacher.dtype).epsilon, computed = std::min(eps, 0x1p-23);
      const double rounding = double(2 * eps * of_logarithms + 16 * computed * (1 + of_logarithms));
      if (!has_rest && r < rounding) r = 0;
      is_on_the_brink = std::fabs(double(1 - dropped - mass)) < 1e-6 || std::fabs(r - rounding) < 1e-12;
      r = r < 0 ? 0 : r;
    }
    if (tail == Tail::kZero) {
      share = double(dropped > 0 ? mass / std::max(1 - dropped, mass) : mass);
      is_on_the_brink = std::fabs(double(1 - dropped)) < 1e-6;
    }
    double of_listed = -kInf;
    for (size_t v : listed) of_listed = std::max(of_listed, student[v]);
    if (tail == Tail::kRestrict && of_listed == -kInf) row.is_broken = true;
    const bool is_nothing = std::all_of(y.begin(), y.end(), [](double log_prob) { return log_prob == -kInf; });
    if ((tail == Tail::kRestrict || tail == Tail::kRenormalize) && is_nothing) row.is_broken = true;
    if (tail == Tail::kBucket && is_nothing && r == 0 && !is_on_the_brink) row.is_broken = true;
    if (std::isnan(r + double(mass) + share)) row.is_broken = true;
  }
  if (row.is_broken) return row;

  const double scale = weight * problem.gradient_scale * grad_output;
  const double soft_scale = scale * problem.soft_scale / t_s, hard_scale = scale * problem.hard_weight;
  const double factor = std::max(std::fabs(soft_scale), std::fabs(hard_scale));
  // Sums of exponentials may be as large as 2^60 times their number, and as small as 2^-60.
  const double largest = s.reach * std::max(1.0, factor) * double(n) * 0x1p63;
  const bool is_zero_times_inf = is_hard && problem.label_smoothing == 1 && std::isinf(student[size_t(label)]);
  // A teacher without mass, or with none in the student's classes, is NaN; or not, if rounding leaves some.
  const bool may_be_nothing = is_on_the_brink && (tail == Tail::kZero || mass == 0);
  row.is_in_range = largest < (is_double ? DBL_MAX : FLT_MAX) && factor < 1e12 && !is_zero_times_inf && !may_be_nothing;
  if (!row.is_in_range) return row;

  // Logits are taken relative to those outside of the list, where there are any.
  double spread = is_double ? s.spread : has_rest ? rest.spread : 0;
  if (!has_rest) spread += std::fabs(s.top) / std::min(t_s, 1.0);
  row.gradient.assign(n, 0);
  row.gradient_size = row.gradient_slack = row.gradient;
  bool is_ambiguous = false;
  if (is_soft && share > 0) {
    LossProblem few = problem;
    few.student.dtype = few.teacher.dtype = DType::kFloat64;
    few.teacher_temperature = 1;
    Numbers of_student, of_teacher;
    if (tail == Tail::kRenormalize) {
      of_student = student;
      of_teacher.assign(n, -kInf);
      for (size_t i = 0; i < listed.size(); ++i) of_teacher[listed[i]] = y[i];
    } else {
      for (size_t v : listed) of_student.push_back(student[v] - s.top);  // no digits lost to what they have in common
      of_teacher = y;
      if (has_rest || r > 0) {
        const bool is_left_out = tail == Tail::kRestrict || !has_rest;
        of_student.push_back(is_left_out ? -kInf : rest.top - s.top + t_s * rest.log_sum);
        of_teacher.push_back(r > 0 ? std::log(r) : -kInf);
      }
    }
    const SoftPart soft(few, of_student, of_teacher, 0);
    const double log_share = tail == Tail::kZero && problem.divergence == Divergence::kForwardKl ? std::log(share) : 0;
    const double to_loss = weight * problem.soft_scale * share, to_gradient = soft_scale * share;
    row.loss = to_loss * (std::max(double(soft.value), 0.0) + log_share);
    row.loss_size = to_loss * (soft.size + std::fabs(log_share));
    row.loss_slack = to_loss * soft.slack;
    // An exponential is 0 below the least normal number; their sum is 2^-60 at least.
    const double least = is_double ? 0x1p-962 : 0x1p-66;
    const auto set = [&](size_t v, size_t i, double part, double underflow) {
      row.gradient[v] = to_gradient * times(part, soft.gradient[i]);
      row.gradient_size[v] = std::fabs(to_gradient) * part * (soft.gradient_size[i] + std::fabs(soft.gradient[i]));
      row.gradient_slack[v] =
          std::fabs(to_gradient) * (part * soft.gradient_slack[i] + underflow * std::fabs(soft.gradient[i]));
    };
    if (tail == Tail::kRenormalize) {
      for (size_t v = 0; v < n; ++v) {
        set(v, v, 1, 0);
        row.gradient_slack[v] += std::fabs(to_gradient) * least;
      }
    } else {
      for (size_t i = 0; i < listed.size(); ++i) set(listed[i], i, 1, 0);
      for (size_t v = 0, i = 0; has_rest && v < n; ++v) {
        if (!is_listed[v]) set(v, listed.size(), rest.p[i++], least);
      }
    }
    is_ambiguous = soft.is_ambiguous;
    if (is_on_the_brink) {
      row.loss_slack = kInf;
      row.gradient_slack.assign(n, kInf);
    }
  }
  if (is_hard) add_cross_entropy(row, problem, student, label, weight, hard_scale, spread);
  const double underflow = is_double ? 1e-290 : 1e-30;
  row.loss_slack += weight * (problem.soft_scale + problem.hard_weight) * underflow;
  for (double& slack : row.gradient_slack) slack += factor * underflow;

  row.unit = (is_double ? 0x1p-53 : 0x1p-24) * 4 * (spread + 42 + 16);
  // What 1 less a sum of probabilities is off by.
  const double left = tail == Tail::kZero ? double(1 - dropped) : r;
  if (is_soft && left > 0) row.unit += 0x1p-53 * 16 / left;
  row.is_moderate = s.spread < 2000 && (factor == 0 || factor > 1e-12) && !is_ambiguous;
  return row;
}

// A result of one element and how near to it a kernel has to be.
struct ExactNumber {
  double value = 0, size = 0, slack = 0;
  ExactNumber& operator+=(const ExactNumber& other) {
    value += other.value;
    size += other.size;
    slack += other.slack;
    return *this;
  }
};
struct ExactElement {
  bool is_broken = false, is_in_range = false, is_moderate = false;  // as of a row
  double unit = 0;
  ExactNumber loss, gradient;  // the loss: times the weight, not times gradient_scale
};

// An element of a binary loss (SPEC.md, section 8): its soft part is the row [z, 0] of two classes, of which it has the
// gradient of z; of mse the mean over the two, which options.py doubles. Looks at the same of `problem` as
// `exact_row`. The sizes are those of the class that the student finds less likely, so near a probability of 1 the
// gradient has to be as exact as near 0.
inline ExactElement exact_element(const LossProblem& problem, double student, double teacher, double label,
                                  double pos_weight, double weight, double grad_output) {
  LossProblem soft = problem;
  soft.hard_weight = 0;
  const bool is_mse = problem.divergence == Divergence::kMse, is_turned = student > 0 && !is_mse;
  const auto row_of = [&](double z) { return is_turned ? Numbers{0, z} : Numbers{z, 0}; };
  const ExactRow row = exact_row(soft, row_of(student), row_of(teacher), 0, weight, grad_output);
  ExactElement e;
  e.is_broken = row.is_broken;
  // grad_output is the last factor; before it there has to be room as well.
  e.is_in_range = row.is_in_range && (std::fabs(grad_output) >= 1 ||
                                      exact_row(soft, row_of(student), row_of(teacher), 0, weight, 1).is_in_range);
  if (e.is_broken || !e.is_in_range) return e;
  e.is_moderate = row.is_moderate;
  e.unit = row.unit;
  e.loss = {row.loss, row.loss_size, row.loss_slack};
  e.gradient = {(is_turned ? -row.gradient[0] : row.gradient[0]), row.gradient_size[0], row.gradient_slack[0]};
  if (problem.hard_weight > 0) {  // y w softplus(−s) + (1 − y) softplus(s)
    const bool is_double = problem.student.dtype == DType::kFloat64 || problem.teacher.dtype == DType::kFloat64;
    const auto softplus = [](double v) { return std::max(v, 0.0) + std::log1p(std::exp(-std::fabs(v))); };
    const double q = 1 / (1 + std::exp(-student)), not_q = 1 / (1 + std::exp(student));
    const double hit = label * pos_weight, miss = 1 - label;
    const double ce = times(hit, softplus(-student)) + times(miss, softplus(student));
    const double underflow = (is_double ? 1e-290 : 1e-30) * (1 + hit);
    const double to_loss = weight * problem.hard_weight;
    const double to_gradient = to_loss * problem.gradient_scale * grad_output;
    // 1 − y is as exact as y, whose rounding counts where softplus(s) is large.
    const double rounded = label > 0 ? times(softplus(student), 1) : 0;
    e.loss += {to_loss * ce, to_loss * (1 + hit + ce + (std::isinf(rounded) ? 0 : rounded)), to_loss * underflow};
    e.gradient += {to_gradient * (miss * q - hit * not_q), std::fabs(to_gradient) * (q + hit * not_q),
                   std::fabs(to_gradient) * underflow};
    if (std::isfinite(student)) {
      e.unit = std::max(e.unit, (is_double ? 0x1p-53 : 0x1p-24) * 4 * (std::fabs(student) + 16));
      e.is_moderate &= std::fabs(student) < 2000;
    }
    const double factor = std::fabs(to_gradient) * (1 + hit), reach = std::max(1.0, std::fabs(grad_output));
    const double largest = std::isfinite(student) ? std::fabs(student) * std::max(factor, 1 + hit) * reach : 0;
    e.is_in_range = factor * reach < 1e30 && largest < (is_double ? DBL_MAX : FLT_MAX) / 8;
    e.is_moderate &= factor == 0 || (factor > 1e-12 && factor < 1e12);
  }
  return e;
}

}  // namespace reptile_ext
