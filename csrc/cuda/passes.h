// The passes over a row, which a team of threads makes together. halves.h puts them together.
//
//     maxima          of both rows: reference points m_s, m_t of the exponentials
//     first pass      the divergence's sums, of a = (s − m_s) / T_s · log2 e and b likewise, with the cross entropy's
//     mixture pass    of the divergences over normalised probabilities: sums of q and p
//     last pass       the gradient
//
// After each of the first three, an exchange between the threads of the team gives its result to all of them. Every
// pass goes over the logits and computes the exponentials again: four a pair of logits for forward KL, two in the first
// pass and two in the last. To keep them would take twice the registers of two 16-bit logits.
//
// A thread adds up kBlockChunks chunks, 128 classes, before they are added to its sums of the row: the error of a sum
// grows with the number of additions one after the other, and so it stays that of a few hundred at any vocabulary.
#pragma once

#include "storage.h"

#include "../divergence.h"

namespace reptile_ext {
namespace {

constexpr int kBlockChunks = 16;

// The row that a team is at.
struct TeamRow {
  int64_t n;
  bool counts;     // false: an ignored row, or none. Nothing of it is read; its team takes part in exchanges alone
  bool is_broken;  // its label is no class: all of its results are NaN
  int64_t label;   // −1: none, or not a class at hand
};

// Numbers of a row, over all classes that are compared; every thread of the team has them.
template <class D, class V>
struct RowStats {
  static_assert(D::kSums <= kMaxSums && D::kMixtureSums <= kNumMixtureSums);
  V m_s, m_t, m_1;                 // reference points: of student, of teacher, of the student in the cross entropy
  V sums[D::kSums + 3];            // the divergence's; Σ e_1, Σ a_1 and number of the classes that are not masked
  V mixture[D::kMixtureSums + 1];  // times Z_s; one more, as an array cannot have none
  V ratio;                         // Z_s / Z_t
  V student_label, teacher_label;  // logits of the label's class
};

// What the last pass needs of a row, in one array, because that is what threads exchange: the coefficients k of the
// gradient, and behind them
template <class G>
struct Coefficients {
  static constexpr int kIsBounded = G::kCoefficients;  // 0: kept[kUnbounded] is taken as 0; else 1
  static constexpr int kToQ1 = kIsBounded + 1, kUniform = kIsBounded + 2, kHit = kIsBounded + 3;  // HardLabel
  static constexpr int kCount = kIsBounded + 4;
};

// Visits the chunks of this thread, with `begin` before and `end` after every kBlockChunks of them.
template <class V, class Source, class Begin, class Visit, class End>
REPTILE_EXT_DEVICE void each_in_blocks(const Source& source, const Team<V>& team, Begin begin, Visit visit, End end) {
  int filled = 0;
  source.each(team, [&](int64_t chunk, const V(&s)[kChunk], const V(&t)[kChunk]) {
    if (filled == 0) begin();
    visit(chunk, s, t);
    if (++filled == kBlockChunks) {
      end();
      filled = 0;
    }
  });
  if (filled > 0) end();
}

// What `D::first` adds to the sums for class v, and keeps of it.
template <class D, class V>
REPTILE_EXT_DEVICE void first(const Call<V>& call, const TeamRow& row, const RowStats<D, V>& stats, int64_t v, V s, V t,
                              V (&sums)[D::kSums], V (&kept)[D::kKept]) {
  if (D::kExcludesLabel && v == row.label) s = t = negative_infinity<V>();
  const V a = (s - stats.m_s) * call.k_s, b = (t - stats.m_t) * call.k_t;
  D::first(a, b, D::exponential(a), D::exponential(b), sums, kept);
}

// The cross entropy's exponent of a class, at temperature 1.
template <class D, class V>
REPTILE_EXT_DEVICE V hard_exponent(const RowStats<D, V>& stats, V s) {
  return (s - stats.m_1) * V(kLog2E);
}

// Maxima of student and teacher, without the label's class where the divergence leaves it out. A NaN may hide in one;
// it will show in the sums.
template <class D, class V, class Source>
REPTILE_EXT_DEVICE void maxima_pass(Team<V>& team, const Source& source, const Place& place, const TeamRow& row,
                                    V (&m)[2]) {
  m[0] = m[1] = negative_infinity<V>();
  if (row.counts) {
    source.each(team, [&](int64_t chunk, const V(&s)[kChunk], const V(&t)[kChunk]) {
      for (int i = 0; i < kChunk; ++i) {
        if (D::kExcludesLabel && place.first_class(chunk) + i == row.label) continue;
        m[0] = any_max(m[0], s[i]);
        m[1] = any_max(m[1], t[i]);
      }
    });
  }
  team.all_reduce(m, [](V a, V b) { return any_max(a, b); });
}

// The divergence's sums. The cross entropy's beside them, so that there is one exchange: Σ e_1 at temperature 1, whose
// exponential is one more, and for label smoothing Σ a_1 and the number of classes that are not masked.
template <class D, class V, class Source>
REPTILE_EXT_DEVICE void first_pass(const Call<V>& call, Team<V>& team, const Source& source, const Place& place,
                                   const TeamRow& row, RowStats<D, V>& stats) {
  for (V& sum : stats.sums) sum = V(0);
  if (row.counts) {
    V block[D::kSums], hard[3];
    each_in_blocks(
        source, team,
        [&] {
          for (V& x : block) x = V(0);
          for (V& x : hard) x = V(0);
        },
        [&](int64_t chunk, const V(&s)[kChunk], const V(&t)[kChunk]) {
          for (int i = 0; i < kChunk; ++i) {
            V kept[D::kKept];
            first(call, row, stats, place.first_class(chunk) + i, s[i], t[i], block, kept);
            if (!call.hard) continue;
            const V a = hard_exponent(stats, s[i]);
            hard[0] = hard[0] + exp2(a);
            if (call.smooth) {
              hard[1] = hard[1] + where_not_masked(s[i], a);
              hard[2] = hard[2] + where_not_masked(s[i], V(1));
            }
          }
        },
        [&] {
          for (int i = 0; i < D::kSums; ++i) stats.sums[i] = stats.sums[i] + block[i];
          for (int i = 0; i < 3; ++i) stats.sums[D::kSums + i] = stats.sums[D::kSums + i] + hard[i];
        });
  }
  team.all_reduce(stats.sums, [](V a, V b) { return a + b; });
}

// Of q and p, both times Z_s: that factor is taken out of the sums, once a row (in_double).
template <class D, class V, class Source>
REPTILE_EXT_DEVICE void mixture_pass(const Call<V>& call, Team<V>& team, const Source& source, const Place& place,
                                     const TeamRow& row, RowStats<D, V>& stats) {
  V sums[D::kMixtureSums];
  for (V& sum : sums) sum = V(0);
  if (row.counts) {
    V block[D::kMixtureSums];
    each_in_blocks(
        source, team,
        [&] {
          for (V& x : block) x = V(0);
        },
        [&](int64_t chunk, const V(&s)[kChunk], const V(&t)[kChunk]) {
          for (int i = 0; i < kChunk; ++i) {
            V unused[D::kSums] = {}, kept[D::kKept];
            first(call, row, stats, place.first_class(chunk) + i, s[i], t[i], unused, kept);
            const V q = kept[0], p = kept[1] * stats.ratio;
            D::mix(q, p, p - q, call.beta, call.one_minus_beta, block, kept);
          }
        },
        [&] {
          for (int i = 0; i < D::kMixtureSums; ++i) sums[i] = sums[i] + block[i];
        });
  }
  team.all_reduce(sums, [](V a, V b) { return a + b; });
  for (int i = 0; i < D::kMixtureSums; ++i) stats.mixture[i] = sums[i];
}

// Writes the gradient, once. A thread writes the chunks that it has read, so in place nobody reads what was written.
template <class D, class V, class Source>
REPTILE_EXT_DEVICE void last_pass(const Operand& gradient, const Call<V>& call, const Team<V>& team,
                                  const Source& source, const Place& place, const TeamRow& row,
                                  const RowStats<D, V>& stats,
                                  const V (&numbers)[Coefficients<typename D::Gradient>::kCount]) {
  using G = typename D::Gradient;
  using At = Coefficients<G>;
  V k[G::kCoefficients];
  for (int i = 0; i < G::kCoefficients; ++i) k[i] = numbers[i];
  source.each(team, [&](int64_t chunk, const V(&s)[kChunk], const V(&t)[kChunk]) {
    if (chunk >= place.num_chunks) return;
    V g[kChunk];
    for (int i = 0; i < kChunk; ++i) {
      const int64_t v = place.first_class(chunk) + i;
      V unused[D::kSums] = {}, kept[D::kKept];
      first(call, row, stats, v, s[i], t[i], unused, kept);
      if constexpr (D::kMixtureKeeps) {
        V unused_too[D::kMixtureSums] = {};
        const V q = kept[0], p = kept[1] * stats.ratio;
        D::mix(q, p, p - q, call.beta, call.one_minus_beta, unused_too, kept);
      }
      if constexpr (D::kUnbounded >= 0) {
        if (numbers[At::kIsBounded] == V(0)) kept[D::kUnbounded] = V(0);
      }
      V of_gradient[G::kKept];
      for (int j = 0; j < G::kKept; ++j) of_gradient[j] = kept[j];
      g[i] = G::gradient(of_gradient, k);
      if (D::kExcludesLabel && v == row.label) g[i] = k[G::kCoefficients - 1];
      if (call.hard) {
        g[i] = g[i] + exp2(hard_exponent(stats, s[i])) * numbers[At::kToQ1];
        if (call.smooth) g[i] = g[i] - where_not_masked(s[i], numbers[At::kUniform]);
        if (v == row.label) g[i] = g[i] - numbers[At::kHit];
      }
    }
    store_gradient(gradient, place, chunk, g);
  });
}

}  // namespace
}  // namespace reptile_ext
