// The two halves of the loss of a tile of rows.
//
//     row_stats       reference points and sums over the classes: first pass, mixture pass, the cross entropy's pass
//     row_gradient    from these to the loss and, by the last pass, the gradient
//
// The fused call does one after the other, and the second finds what the first has left in scratch. Called apart (Part
// in rows.h), with stats in between that were combined with those of other classes, row_gradient has the passes of
// row_stats done again, from the combined reference points, for the sake of the scratch.
//
// The reference point m of a row is the maximum of its first kProbe classes, not of the whole row: what it must prevent
// is overflow, and for that it need not be exact. A row whose sums come out beyond kTame (the maximum is more than 60
// powers of two above the probe's) or not finite is done again with its exact maximum. Reference points that are
// combined are exact.
#pragma once

#include "passes.h"

namespace reptile_ext {
namespace {

// Numbers of the rows of a tile: over all classes that are compared, once they are combined. Rows lie as in
// LossProblem.
template <class V>
struct RowStats {
  Pair<V> maxima[kNumMaxima];
  double sums[kMaxLanes][kNumSums], mixture[kMaxLanes][kNumMixtureSums];
};

// Which rows of a tile count, and their labels.
struct TileRows {
  int64_t first;  // of the problem
  int num;
  bool counts[kMaxLanes];
  const int64_t* labels;  // null: none; −1: a class that is not at hand

  TileRows(const LossProblem& p, int num_rows, int64_t first)
      : first(first), num(num_rows), labels(p.labels ? p.labels + first : nullptr) {
    for (int r = 0; r < num; ++r) counts[r] = !p.weights || p.weights[first + r] != 0;
  }
  bool has_label(int r) const { return labels && counts[r] && labels[r] >= 0; }
};

// Halves that are called apart read and write the problem's row stats.

template <int kCount>
REPTILE_EXT_OUT_OF_LINE void read_rows(const double* memory, const TileRows& rows, double (*values)[kCount]) {
  std::memcpy(values, memory + rows.first * kCount, size_t(rows.num) * sizeof(*values));
}

template <int kCount>
REPTILE_EXT_OUT_OF_LINE void write_rows(const double (*values)[kCount], const TileRows& rows, double* memory) {
  for (int r = 0; r < rows.num; ++r) {
    if (rows.counts[r]) std::memcpy(memory + (rows.first + r) * kCount, values[r], sizeof(values[r]));
  }
}

template <class In, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE void read_maxima(const LossProblem& p, const Tile<In>& tile, const TileRows& rows,
                                         RowStats<V>& stats) {
  double values[kMaxLanes][kNumMaxima], column[kMaxLanes];
  read_rows(p.maxima, rows, values);
  for (int i = 0; i < kNumMaxima; ++i) {
    for (int r = 0; r < rows.num; ++r) column[r] = values[r][i];
    stats.maxima[i] = spread(tile, column);
  }
}

// Exact ones, of the classes at hand.
template <class In, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE void write_maxima(const LossProblem& p, const Tile<In>& tile, const TileRows& rows,
                                          int64_t hidden) {
  double values[kMaxLanes][kNumMaxima];
  for (int i = 0; i < kNumMaxima; ++i) {
    const bool teacher = i == 1;
    const In* z = teacher ? tile.teacher : tile.student;
    const Pair<V> m = tile.folded ? Pair<V>(row_max(z, p.vocab_size, i == 2 ? -1 : hidden))
                                  : column_max(tile, z, teacher ? tile.teacher_step : tile.student_step);
    gather(tile, m, &values[0][i], kNumMaxima);
  }
  write_rows(values, rows, p.maxima);
}

// ------------------------------------------------------------------------------------------------- the first half

// The first pass; from the reference points if they are `given`, else from good ones, which it sets.
template <class D, class In, class V = Arithmetic<In>>
Sums<V, D::kSums> first_pass_in_range(const Call<typename V::Scalar>& call, const Tile<In>& tile, int64_t vocab_size,
                                      int64_t hidden, bool given, Pair<V>& m_s, Pair<V>& m_t) {
  using Scalar = typename V::Scalar;
  if (!tile.folded && !D::kRawLogits && !given) {
    m_s = column_max(tile, tile.student, tile.student_step);
    m_t = column_max(tile, tile.teacher, tile.teacher_step);
  }
  if (!tile.folded || D::kRawLogits || given) return first_pass<D>(call, tile, m_s, m_t, hidden);
  for (bool exact = vocab_size <= kProbe;; exact = true) {
    const int64_t probed = exact ? vocab_size : kProbe;
    Scalar s = row_max(tile.student, probed, hidden), t = row_max(tile.teacher, probed, hidden);
    if (!exact && !(s > kNegInf && t > kNegInf)) continue;  // the probe saw only masked classes, or a NaN
    m_s = Pair<V>(s);
    m_t = Pair<V>(t);
    if (D::kExcludesLabel) zero_if_masked(m_s, m_t);
    const Sums<V, D::kSums> sums = first_pass<D>(call, tile, m_s, m_t, hidden);
    double z[2];
    gather_sums(tile, sums.of(0), &z[0]);
    gather_sums(tile, sums.of(1), &z[1]);
    if (exact || (is_tame(z[0]) && is_tame(z[1]))) return sums;
  }
}

// The cross entropy's pass, from a good reference point, which it sets unless that is `given`. Where T_s = 1 the first
// pass has done most of it.
template <class In, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE Sums<V, 3> hard_pass_in_range(const Call<typename V::Scalar>& call, const Tile<In>& tile,
                                                      int64_t vocab_size, bool given, Pair<V>& m) {
  for (bool exact = vocab_size <= kProbe;; exact = true) {
    if (!given) {
      m = tile.folded ? Pair<V>(row_max(tile.student, exact ? vocab_size : kProbe, -1))
                      : column_max(tile, tile.student, tile.student_step);
    }
    const Sums<V, 3> sums = hard_pass(call, tile, m, !call.shares_exp);
    if (given || !tile.folded || exact) return sums;
    double z;
    gather_sums(tile, sums.of(0), &z);
    if (is_tame(z)) return sums;
  }
}

// The first half. Of what is asked for by itself, it goes to the problem's memory; the parts before that come from
// there. Ignored rows share the lanes and the arithmetic and nothing else: no lane sees another.
template <class D, class In, class V = Arithmetic<In>>
void row_stats(const Call<typename V::Scalar>& call, const LossProblem& p, const Tile<In>& tile, const TileRows& rows,
               RowStats<V>& stats) {
  using Scalar = typename V::Scalar;
  const int64_t hidden = D::kExcludesLabel ? rows.labels[0] : -1;
  if (p.part == Part::kMaxima) return write_maxima(p, tile, rows, hidden);
  const bool apart = p.part != Part::kLoss;
  Pair<V>&m_s = stats.maxima[0], &m_t = stats.maxima[1], &m_1 = stats.maxima[2];
  if (apart) {
    std::memset(stats.sums, 0, sizeof(stats.sums));
    read_maxima(p, tile, rows, stats);
    if (D::kExcludesLabel) zero_if_masked(m_s, m_t);
  }
  if (!apart || D::kRawLogits) m_s = m_t = Pair<V>(Scalar(0));

  if (call.hard || D::kExcludesLabel) {  // before a gradient is written over them
    for (int r = 0; r < tile.rows; ++r) {
      if (!rows.has_label(r)) continue;
      const int64_t label = rows.labels[r];
      stats.sums[r][kStudentLabel] = to_float(tile.student[tile.folded ? label : label * tile.student_step + r]);
      if (D::kExcludesLabel) stats.sums[r][kTeacherLabel] = to_float(tile.teacher[label]);
    }
  }
  {
    const Sums<V, D::kSums> total = first_pass_in_range<D>(call, tile, p.vocab_size, hidden, apart, m_s, m_t);
    for (int i = 0; i < D::kSums; ++i) gather_sums(tile, total.of(i), &stats.sums[0][i], kNumSums);
  }
  if (call.hard) {
    if (call.shares_exp) m_1 = m_s;
    if (call.smooth || !call.shares_exp) {
      const Sums<V, 3> total = hard_pass_in_range(call, tile, p.vocab_size, apart || call.shares_exp, m_1);
      for (int i = 0; i < 3; ++i) gather_sums(tile, total.of(i), &stats.sums[0][kZ1 + i], kNumSums);
    }
    if (call.shares_exp) {
      for (int r = 0; r < tile.rows; ++r) stats.sums[r][kZ1] = stats.sums[r][0];
    }
  }
  if (p.part == Part::kSums) return write_rows(stats.sums, rows, p.sums);
  if (apart) read_rows(p.sums, rows, stats.sums);

  if constexpr (D::kMixtureSums > 0) {
    double ratio[kMaxLanes];
    for (int r = 0; r < tile.rows; ++r) ratio[r] = stats.sums[r][0] / stats.sums[r][1];
    const auto total = mixture_pass<D, V>(call, tile.num_pairs, spread(tile, ratio));
    for (int i = 0; i < D::kMixtureSums; ++i) {
      gather_sums(tile, total.of(i), &stats.mixture[0][i], kNumMixtureSums);
      for (int r = 0; r < tile.rows; ++r) stats.mixture[r][i] /= stats.sums[r][0];
    }
    if (p.part == Part::kMixtureSums) return write_rows(stats.mixture, rows, p.mixture_sums);
    if (apart) read_rows(p.mixture_sums, rows, stats.mixture);
  }
}

// ------------------------------------------------------------------------------------------------ the second half

// What the last pass needs of the rows of a tile.
template <int kCount>
struct Coefficients {
  double k[kCount][kMaxLanes];                                            // of the divergence's gradient
  double to_q1[kMaxLanes], uniform[kMaxLanes], hard_at_label[kMaxLanes];  // of the cross entropy's (HardLabel)
  bool is_unbounded[kMaxLanes];
};

// From the sums to the loss of each row and the coefficients of its gradient.
template <class D, class V>
void finish_rows(const LossProblem& p, const TileRows& rows, const RowStats<V>& stats,
                 const double (&reference)[kNumMaxima][kMaxLanes], Coefficients<D::Gradient::kCoefficients>& out) {
  constexpr int kCount = D::Gradient::kCoefficients;
  for (int r = 0; r < rows.num; ++r) {
    const int64_t n = rows.first + r;
    p.row_losses[n] = out.to_q1[r] = out.uniform[r] = 0;
    out.is_unbounded[r] = false;
    for (auto& coefficient : out.k) coefficient[r] = 0;
    if (!rows.counts[r]) continue;
    const double weight = p.weights ? p.weights[n] : 1.0;
    double scale = weight * p.gradient_scale;
    if (p.grad_output) scale *= p.grad_output[p.grad_output_is_uniform ? 0 : n];

    const double* sums = stats.sums[r];
    Row<double> row{sums, stats.mixture[r], p.beta, p.one_minus_beta, 0, 0, 0, 0, 0};
    if (D::kExcludesLabel) {
      row.a_label = (sums[kStudentLabel] - reference[0][r]) * (kLog2E / p.student_temperature);
      row.b_label = (sums[kTeacherLabel] - reference[1][r]) * (kLog2E / p.teacher_temperature);
    }
    double k[kCount];
    double value = D::finish(row, scale * p.soft_scale / p.student_temperature, k);
    if (value < 0) value = 0;  // rounding alone; a NaN stays
    double loss = p.soft_scale * value;
    // All of a broken row's gradient is NaN, wherever in the row it broke.
    for (int i = 0; i < kCount; ++i) out.k[i][r] = value == value ? k[i] : value;
    out.is_unbounded[r] = row.unbounded == kInf;

    if (p.hard_weight > 0) {
      const double a_label = (sums[kStudentLabel] - reference[2][r]) * kLog2E;
      const HardLabel hard =
          hard_label(sums[kZ1], sums[kA1], sums[kCount1], a_label, p.label_smoothing, scale * p.hard_weight);
      out.to_q1[r] = hard.to_q1;
      out.uniform[r] = hard.uniform;
      out.hard_at_label[r] =
          __builtin_exp2(a_label) * hard.to_q1 - hard.hit - (sums[kStudentLabel] == kNegInf ? 0 : hard.uniform);
      loss += p.hard_weight * hard.loss;
    }
    p.row_losses[n] = weight * loss;
  }
}

// The last pass does not know where the label is; its class gets a gradient of its own, in one rounding. The last
// coefficient of a divergence that leaves the label out of its sums is that gradient. What is written as the gradient
// of ignored rows has no meaning.
template <class G, bool kExcludesLabel, class In, class V = Arithmetic<In>>
void write_gradient(const Call<typename V::Scalar>& call, const Tile<In>& tile, const TileRows& rows,
                    const Coefficients<G::kCoefficients>& of) {
  using Scalar = typename V::Scalar;
  constexpr int kPair = 2 * V::kLanes;
  double at_label[kMaxLanes];
  for (int r = 0; (call.hard || kExcludesLabel) && r < tile.rows; ++r) {
    if (!rows.has_label(r)) continue;
    if constexpr (kExcludesLabel) {
      at_label[r] = of.k[G::kCoefficients - 1][r];
    } else {
      const int64_t label = rows.labels[r], element = tile.folded ? label % kPair : r;
      const int64_t at = (tile.folded ? label / kPair : label) * kPair + lane_of_element<In>(int(element));
      V kept[G::kKept], coefficient[G::kCoefficients];
      for (int i = 0; i < G::kKept; ++i) kept[i] = V(call.kept[i][at]);
      for (int i = 0; i < G::kCoefficients; ++i) coefficient[i] = V(Scalar(of.k[i][r]));
      Scalar lanes[V::kLanes];
      G::gradient(kept, coefficient).store(lanes);
      at_label[r] = lanes[0];
    }
    if (call.hard) at_label[r] += of.hard_at_label[r];
  }
  Pair<V> coefficients[G::kCoefficients];
  for (int i = 0; i < G::kCoefficients; ++i) coefficients[i] = spread(tile, of.k[i]);
  if (call.hard) {
    last_pass<G, true>(call, tile, coefficients, spread(tile, of.to_q1), spread(tile, of.uniform));
  } else {
    last_pass<G, false>(call, tile, coefficients, Pair<V>(), Pair<V>());
  }
  for (int r = 0; (call.hard || kExcludesLabel) && r < tile.rows; ++r) {
    if (!rows.has_label(r)) continue;  // an ignored row's may be any number
    const int64_t label = tile.folded ? rows.labels[r] : rows.labels[r] * tile.gradient_step + r;
    from_float(Scalar(at_label[r]), tile.gradient + label);
  }
}

template <class D, class In, class V = Arithmetic<In>>
void row_gradient(const Call<typename V::Scalar>& call, const LossProblem& p, const Tile<In>& tile,
                  const TileRows& rows, const RowStats<V>& stats) {
  using G = typename D::Gradient;
  double reference[kNumMaxima][kMaxLanes];
  if (D::kExcludesLabel) {
    gather(tile, stats.maxima[0], reference[0]);
    gather(tile, stats.maxima[1], reference[1]);
  }
  if (call.hard) gather(tile, stats.maxima[2], reference[2]);
  Coefficients<G::kCoefficients> of;
  finish_rows<D>(p, rows, stats, reference, of);
  if (!tile.gradient) return;
  if constexpr (D::kUnbounded >= 0) {
    constexpr int kPair = 2 * V::kLanes;
    for (int r = 0; r < tile.rows; ++r) {
      for (int64_t i = 0; of.is_unbounded[r] && i < tile.num_pairs * kPair; ++i) {
        if (tile.folded || i % kPair == lane_of_element<In>(r)) call.kept[D::kUnbounded][i] = 0;
      }
    }
  }
  write_gradient<G, D::kExcludesLabel>(call, tile, rows, of);
}

template <class D, class In, class V = Arithmetic<In>>
void loss_of_tile(const Call<typename V::Scalar>& call, const LossProblem& p, const Tile<In>& tile, int64_t first) {
  const TileRows rows(p, tile.rows, first);
  RowStats<V> stats;
  row_stats<D>(call, p, tile, rows, stats);
  if (p.part == Part::kLoss || p.part == Part::kGradient) row_gradient<D>(call, p, tile, rows, stats);
}

}  // namespace
}  // namespace reptile_ext
