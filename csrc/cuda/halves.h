// The two halves of the loss of a row, by a team of threads.
//
//     row_stats       reference points and sums over the classes: maxima, first pass, mixture pass
//     row_gradient    from these to the loss and, by the last pass, the gradient
//
// The fused kernels do one after the other. Called apart (Part in rows.h), with stats in between that were combined
// with those of other classes, each call makes one pass:
//
//     kMaxima         maxima          writes 3 numbers a row, in double precision
//     kSums           first pass      reads them, writes 10
//     kMixtureSums    mixture pass    reads Z_s and Z_t, writes 2; no pass for a divergence without one
//     kGradient       last pass       reads all 15, writes loss and gradient
//
// These are the kernels for rows of any layout; dense rows whose parts are not called apart have ring_rows.cu.
#pragma once

#include "passes.h"

namespace reptile_ext {
namespace {

// Of the halves apart, −1 is a class that is not among those at hand.
REPTILE_EXT_DEVICE bool has_wrong_label(const LossProblem& p, int64_t n) {
  if (!p.labels) return false;
  const int64_t label = load(p.labels + n);
  return label < (p.part == Part::kLoss ? 0 : -1) || label >= p.vocab_size;
}

// The memory of a part's numbers, each [num_rows, count]; of the parts with a loss, the rows' losses.
struct PartNumbers {
  double* data;
  int count;
};
REPTILE_EXT_DEVICE PartNumbers numbers_of(const LossProblem& p, Part part) {
  switch (part) {
    case Part::kMaxima:
      return {p.maxima, kNumMaxima};
    case Part::kSums:
      return {p.sums, kNumSums};
    case Part::kMixtureSums:
      return {p.mixture_sums, kNumMixtureSums};
    default:
      return {p.row_losses, p.row_losses ? 1 : 0};  // none where the kernel adds them up
  }
}

// Of an ignored row: 0, whatever is asked for, and a gradient of 0.
template <class V>
REPTILE_EXT_DEVICE void write_ignored(const LossProblem& p, const Team<V>& team, const Place& place, int64_t n) {
  if (team.global_rank() == 0) {
    const PartNumbers numbers = numbers_of(p, p.part);
    for (int i = 0; i < numbers.count; ++i) store(numbers.data + n * numbers.count + i, 0.0);
  }
  if (p.gradient.data) clear(p, place, team, 0);
}

// Of a row that counts: what its team has found. A label that is no class breaks the row wherever its classes are: its
// numbers are NaN here, and so is every sum that they are added to.
template <int kCount, class V>
REPTILE_EXT_DEVICE void write_stats(const double (&values)[kCount], const Team<V>& team, const TeamRow& row,
                                    double* memory) {
  if (!row.counts || team.global_rank() != 0) return;
  for (int i = 0; i < kCount; ++i) store(memory + row.n * kCount + i, row.is_broken ? kNaN : values[i]);
}

// A row's sums as the halves exchange them (rows.h). What the divergence does not use is 0.
template <class D, class V>
REPTILE_EXT_DEVICE void sums_in_double(const RowStats<D, V>& stats, double (&sums)[kNumSums]) {
  for (int i = 0; i < kMaxSums; ++i) sums[i] = 0;
  for (int i = 0; i < D::kSums; ++i) sums[i] = double(stats.sums[i]);
  for (int i = 0; i < 3; ++i) sums[kZ1 + i] = double(stats.sums[D::kSums + i]);
  sums[kStudentLabel] = double(stats.student_label);
  sums[kTeacherLabel] = double(stats.teacher_label);
}
// ... and its mixture sums; they have come times Z_s.
template <class D, class V>
REPTILE_EXT_DEVICE void mixture_in_double(const RowStats<D, V>& stats, double z_s, double (&mixture)[kNumMixtureSums]) {
  for (double& sum : mixture) sum = 0;
  for (int i = 0; i < D::kMixtureSums; ++i) mixture[i] = double(stats.mixture[i]) / z_s;
}

// The first half: all of it, or what the part asks for, which is written and ends the row. For the last pass it leaves
// reference points and Z_s / Z_t in `stats`, computed or from memory.
template <class D, class V, class Source>
REPTILE_EXT_DEVICE void row_stats(const DeviceLoss& device, const Call<V>& call, Team<V>& team, Source& source,
                                  const Place& place, const TeamRow& row, RowStats<D, V>& stats) {
  const LossProblem& p = device.problem;
  const Part part = p.part;
  const bool fused = part == Part::kLoss;

  // The label's logits, before the gradient is written over them.
  const bool has_label = row.label >= 0 && (call.hard || D::kExcludesLabel);
  const bool needs_label = has_label && (fused || part == Part::kMaxima || part == Part::kSums);
  stats.student_label =
      needs_label ? load_class<V>(p.student, place.student + row.label * p.student.class_stride) : V(0);
  stats.teacher_label = needs_label && D::kExcludesLabel
                            ? load_class<V>(p.teacher, place.teacher + row.label * p.teacher.class_stride)
                            : V(0);

  if (fused || part == Part::kMaxima) {
    V m[2];
    maxima_pass<D>(team, source, place, row, m);
    stats.m_s = m[0];
    stats.m_t = m[1];
    stats.m_1 = D::kExcludesLabel && has_label ? max(m[0], stats.student_label) : m[0];
    if (!fused) {
      const double maxima[kNumMaxima] = {double(m[0]), double(m[1]), double(stats.m_1)};
      return write_stats(maxima, team, row, p.maxima);
    }
  } else {
    const auto maximum = [&](int i) { return row.counts ? V(load(p.maxima + row.n * kNumMaxima + i)) : V(0); };
    stats.m_s = maximum(0);
    stats.m_t = maximum(1);
    stats.m_1 = maximum(2);
  }
  if (D::kExcludesLabel) {  // no other class may be left; then all exponentials are to be 0, not NaN
    stats.m_s = where_not_masked(stats.m_s, stats.m_s);
    stats.m_t = where_not_masked(stats.m_t, stats.m_t);
  }
  if (D::kRawLogits) stats.m_s = stats.m_t = V(0);

  if (fused || part == Part::kSums) {
    first_pass(call, team, source, place, row, stats);
    if (!fused) {
      double sums[kNumSums];
      sums_in_double(stats, sums);
      return write_stats(sums, team, row, p.sums);
    }
  }

  if constexpr (D::kMixtureSums > 0) {
    const auto sum = [&](int i) {
      return fused ? double(stats.sums[i]) : row.counts ? load(p.sums + row.n * kNumSums + i) : 1.0;
    };
    const double z_s = sum(0);
    stats.ratio = V(z_s / sum(1));
    if (fused || part == Part::kMixtureSums) mixture_pass(call, team, source, place, row, stats);
    if (part == Part::kMixtureSums) {
      double mixture[kNumMixtureSums];
      mixture_in_double(stats, z_s, mixture);
      return write_stats(mixture, team, row, p.mixture_sums);
    }
  } else if (part == Part::kMixtureSums) {
    const double mixture[kNumMixtureSums] = {};
    write_stats(mixture, team, row, p.mixture_sums);
  }
}

// The second half. The loss and the coefficients of the gradient take a few logarithms a row: one thread of each block
// computes them, in double precision, and tells the others.
template <class D, class V, class Source>
REPTILE_EXT_DEVICE void row_gradient(const DeviceLoss& device, const Call<V>& call, Team<V>& team, const Source& source,
                                     const Place& place, const TeamRow& row, const RowStats<D, V>& stats) {
  using G = typename D::Gradient;
  using At = Coefficients<G>;
  const LossProblem& p = device.problem;

  V numbers[At::kCount];
  for (V& number : numbers) number = V(0);
  if (team.rank == 0 && row.counts) {
    const auto weight = [&] { return p.weights ? load(p.weights + row.n) : 1.0; };  // a load is less than two registers
    double scale = weight() * p.gradient_scale;
    if (device.divisor) scale /= load(device.divisor);
    if (p.grad_output) scale *= load(p.grad_output + (p.grad_output_is_uniform ? 0 : row.n));

    double sums[kNumSums], mixture[kNumMixtureSums];
    if (p.part == Part::kLoss) {
      sums_in_double(stats, sums);
      mixture_in_double(stats, sums[0], mixture);
    } else {
      for (int i = 0; i < kNumSums; ++i) sums[i] = load(p.sums + row.n * kNumSums + i);
      for (int i = 0; i < kNumMixtureSums; ++i) mixture[i] = load(p.mixture_sums + row.n * kNumMixtureSums + i);
    }
    Row<double> of_row{sums, mixture, p.beta, p.one_minus_beta, 0, 0, 0, 0, 0};
    if (D::kExcludesLabel) {
      of_row.a_label = (sums[kStudentLabel] - double(stats.m_s)) * (kLog2E / p.student_temperature);
      of_row.b_label = (sums[kTeacherLabel] - double(stats.m_t)) * (kLog2E / p.teacher_temperature);
    }
    double k[G::kCoefficients];
    double value = D::finish(of_row, scale * p.soft_scale / p.student_temperature, k);
    if (value < 0) value = 0;  // rounding alone; a NaN stays
    // All of a broken row's gradient is NaN, wherever in the row it broke.
    if (row.is_broken) value = kNaN;
    for (int i = 0; i < G::kCoefficients; ++i) numbers[i] = V(value == value ? k[i] : kNaN);
    numbers[At::kIsBounded] = V(of_row.unbounded == kInf ? 0 : 1);
    double loss = p.soft_scale * value;
    if (call.hard) {
      const double a_label = (sums[kStudentLabel] - double(stats.m_1)) * kLog2E;
      const HardLabel hard =
          hard_label(sums[kZ1], sums[kA1], sums[kCount1], a_label, p.label_smoothing, scale * p.hard_weight);
      loss += p.hard_weight * hard.loss;
      numbers[At::kToQ1] = V(hard.to_q1);
      numbers[At::kUniform] = V(hard.uniform);
      numbers[At::kHit] = V(hard.hit);
    }
    if (team.block == 0 && device.sum) {
      double* const so_far = team.exchange->losses + thread_rank() / team.threads;
      store_shared(so_far, load_shared(so_far) + weight() * loss);
    } else if (team.block == 0) {
      store(p.row_losses + row.n, weight() * loss);
    }
  }
  if (!p.gradient.data) return;
  team.broadcast(numbers);
  if (!row.counts) return;
  last_pass<D>(p.gradient, call, team, source, place, row, stats, numbers);
  clear(p, place, team, place.vocab_size);
}

// All that is asked for of one row. The threads of a team without one (`counts` false) come along for the exchanges.
template <class D, class V, class Source>
REPTILE_EXT_DEVICE void loss_of_row(const DeviceLoss& device, const Call<V>& call, Team<V>& team, Source& source,
                                    const Place& place, const TeamRow& row) {
  RowStats<D, V> stats;
  row_stats<D, V>(device, call, team, source, place, row, stats);
  const Part part = device.problem.part;
  if (part == Part::kLoss || part == Part::kGradient) {
    row_gradient<D, V>(device, call, team, source, place, row, stats);
  }
}

}  // namespace
}  // namespace reptile_ext
