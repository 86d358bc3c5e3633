// The passes over a tile of rows, and what they share. halves.h puts them together.
#pragma once

#include "../divergence.h"
#include "../rows.h"
#include "simd.h"

namespace reptile_ext {
namespace {

// What does not depend on the divergence is kept out of line: one of each is enough, and takes less time to compile.
#define REPTILE_EXT_OUT_OF_LINE __attribute__((noinline))

constexpr int64_t kProbe = 512;
constexpr int64_t kBlock = 128;  // pairs of vectors between roundings into the row's sums
constexpr double kTame = 0x1p60;
constexpr int64_t kSideBySideMaxClasses = 4096;  // beyond it the scratch of a pair of rows leaves the cache
constexpr int64_t kScratchPad = 64;  // elements; rounds a scratch row up to whole pairs and keeps 64-byte alignment
constexpr int kMaxKept = 3;          // values of a class in scratch; the exponential of the cross entropy beside them
constexpr int kMaxLanes = 32;        // of a pair

constexpr int64_t kPrefetchBytes = 3072;

// The logits that the first pass will want some 20 cache lines from now. The processor's own prefetcher stops at every
// page and does not keep up beside two streams of stores. Past the end of a tensor this is a hint without effect.
template <int kPair, class In>
inline void prefetch(const In* z) {
  const char* p = reinterpret_cast<const char*>(z) + kPrefetchBytes;
  for (size_t line = 0; line < kPair * sizeof(In); line += 64) __builtin_prefetch(p + line);
}

int64_t padded(int64_t n) { return (n + kScratchPad - 1) / kScratchPad * kScratchPad; }

bool is_tame(double z) { return z < kTame; }  // false for NaN

// Everything about the call that a row needs and that is the same for all rows.
template <class Scalar>
struct Call {
  Scalar k_s, k_t;              // what differences of logits are multiplied with: log2 e / temperature
  Scalar beta, one_minus_beta;  // β and 1 − β
  bool hard, smooth;
  bool shares_exp;         // T_s = 1: the cross entropy's exponential is e_s
  bool stream;             // non-temporal stores pay
  Scalar* kept[kMaxKept];  // scratch rows
  Scalar* e_1;             // the cross entropy's
};

// `rows` rows as pairs of vectors. Folded: one row, its classes in the lanes, one pair after the other. Else rows side
// by side in the lanes, one pair a class.
template <class In>
struct Tile {
  const In *student, *teacher;
  In* gradient;                                       // may be null, or the student's own memory
  int64_t student_step, teacher_step, gradient_step;  // elements from one pair to the next
  int64_t num_pairs, num_whole;                       // the whole ones come first
  int tail;                                           // elements of the others
  bool folded;
  int rows;
};

// One number for each row of a tile, in the lanes of a pair; of a folded tile, the same in all.
template <class V>
struct Pair {
  V half[2];
  Pair() = default;
  explicit Pair(typename V::Scalar x) : half{V(x), V(x)} {}
};

template <class In, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE Pair<V> spread_over_lanes(int num_rows, const double* rows) {
  using Scalar = typename V::Scalar;
  Scalar lanes[2 * V::kLanes] = {};
  for (int r = 0; r < num_rows; ++r) lanes[lane_of_element<In>(r)] = Scalar(rows[r]);
  Pair<V> result;
  for (int h = 0; h < 2; ++h) result.half[h] = V::load(lanes + h * V::kLanes);
  return result;
}
template <class In, class V = Arithmetic<In>>
Pair<V> spread(const Tile<In>& tile, const double* rows) {
  if (tile.folded) return Pair<V>(typename V::Scalar(rows[0]));
  return spread_over_lanes<In>(tile.rows, rows);
}

// The other way round: one number a row, `stride` apart.
template <class In, class V>
REPTILE_EXT_OUT_OF_LINE void gather_from_lanes(int num_rows, const Pair<V>& pair, double* rows, int stride) {
  typename V::Scalar lanes[2 * V::kLanes];
  for (int h = 0; h < 2; ++h) pair.half[h].store(lanes + h * V::kLanes);
  for (int r = 0; r < num_rows; ++r) rows[r * stride] = lanes[lane_of_element<In>(r)];
}
template <class In, class V>
void gather(const Tile<In>& tile, const Pair<V>& pair, double* rows, int stride = 1) {
  if (!tile.folded) return gather_from_lanes<In>(tile.rows, pair, rows, stride);
  typename V::Scalar lanes[V::kLanes];
  pair.half[0].store(lanes);
  rows[0] = lanes[0];
}

// Reference points of rows in which no class is left, the label's being hidden: all exponentials are to be 0, not NaN.
template <class V>
void zero_if_masked(Pair<V>& m_s, Pair<V>& m_t) {
  for (int h = 0; h < 2; ++h) {
    m_s.half[h] = where_not_masked(m_s.half[h], m_s.half[h]);
    m_t.half[h] = where_not_masked(m_t.half[h], m_t.half[h]);
  }
}

// The same of sums over the classes: the lanes of a folded row are added up.
template <class In, class V>
void gather_sums(const Tile<In>& tile, const Pair<V>& sums, double* rows, int stride = 1) {
  if (tile.folded) {
    rows[0] = reduce_add(sums.half[0] + sums.half[1]);
  } else {
    gather(tile, sums, rows, stride);
  }
}

// A pair that holds the class which is to be hidden: that class reads as −inf.
template <class In, class V>
void load2_without(const In* z, int live, int hidden, V& a, V& b) {
  alignas(64) In buffer[2 * V::kLanes];
  std::memcpy(buffer, z, size_t(live) * sizeof(In));
  set_negative_infinity(buffer + hidden);
  if (live == 2 * V::kLanes) {
    load2(buffer, a, b);
  } else {
    load2_tail(buffer, live, a, b);
  }
}

// The maximum of a folded row's first n classes, `hidden` (−1: none) left out.
template <class In, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE typename V::Scalar row_max(const In* z, int64_t n, int64_t hidden) {
  using Scalar = typename V::Scalar;
  V m0 = V(Scalar(kNegInf)), m1 = m0, u, v;
  constexpr int kPair = 2 * V::kLanes;
  for (int64_t i = 0; i < n; i += kPair) {
    const int live = n - i < kPair ? int(n - i) : kPair;
    if (hidden >= i && hidden < i + live) {
      load2_without(z + i, live, int(hidden - i), u, v);
    } else if (live == kPair) {
      load2(z + i, u, v);
    } else {
      load2_tail(z + i, live, u, v);
    }
    m0 = max(m0, u);
    m1 = max(m1, v);
  }
  return reduce_max(max(m0, m1));
}

// The maxima of rows side by side.
template <class In, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE Pair<V> column_max(const Tile<In>& tile, const In* z, int64_t step) {
  Pair<V> m{typename V::Scalar(kNegInf)};
  V u, v;
  for (int64_t j = 0; j < tile.num_pairs; ++j) {
    if (j < tile.num_whole) {
      load2(z + j * step, u, v);
    } else {
      load2_tail(z + j * step, tile.tail, u, v);
    }
    m.half[0] = max(m.half[0], u);
    m.half[1] = max(m.half[1], v);
  }
  return m;
}

// Sums over the classes, of a block or of all.
template <class V, int kCount>
struct Sums {
  V half[2][kCount];  // two independent chains of additions
  Sums() {
    for (auto& sums : half) {
      for (V& sum : sums) sum = V(0);
    }
  }
  void merge(const Sums& other) {
    for (int h = 0; h < 2; ++h) {
      for (int i = 0; i < kCount; ++i) half[h][i] = half[h][i] + other.half[h][i];
    }
  }
  Pair<V> of(int i) const {
    Pair<V> pair;
    for (int h = 0; h < 2; ++h) pair.half[h] = half[h][i];
    return pair;
  }
};

// Here and below, what the loop needs is copied from the arguments first: a local that no store can alias stays in a
// register. `hidden` is the class of a folded row that is left out, for a functor that wants it so.
template <class D, class In, class V = Arithmetic<In>>
Sums<V, D::kSums> first_pass(const Call<typename V::Scalar>& call, const Tile<In>& tile, const Pair<V>& m_s,
                             const Pair<V>& m_t, int64_t hidden) {
  using Scalar = typename V::Scalar;
  constexpr int kLanes = V::kLanes, kPair = 2 * kLanes;
  const V k_s = V(call.k_s), k_t = V(call.k_t);
  const V top_s[2] = {m_s.half[0], m_s.half[1]}, top_t[2] = {m_t.half[0], m_t.half[1]};
  const In *const students = tile.student, *const teachers = tile.teacher;
  const int64_t student_step = tile.student_step, teacher_step = tile.teacher_step;
  const int64_t num_pairs = tile.num_pairs, num_whole = tile.num_whole;
  const int tail = tile.tail;
  Scalar* kept_rows[D::kKept];
  for (int i = 0; i < D::kKept; ++i) kept_rows[i] = call.kept[i];
  const int64_t hidden_pair = hidden < 0 ? -1 : hidden / kPair;
  Sums<V, D::kSums> total;
  for (int64_t begin = 0; begin < num_pairs; begin += kBlock) {
    const int64_t end = begin + kBlock < num_pairs ? begin + kBlock : num_pairs;
    const int64_t whole = end < num_whole ? end : num_whole;
    Sums<V, D::kSums> block;
    const auto one = [&](int64_t j, const V(&s)[2], const V(&t)[2]) {
      for (int h = 0; h < 2; ++h) {
        V kept[D::kKept];
        const V a = (s[h] - top_s[h]) * k_s, b = (t[h] - top_t[h]) * k_t;
        D::first(a, b, D::exponential(a), D::exponential(b), block.half[h], kept);
        for (int i = 0; i < D::kKept; ++i) kept[i].store(kept_rows[i] + j * kPair + h * kLanes);
      }
    };
    V s[2], t[2];
    int64_t j = begin;
    for (; j < whole; ++j) {
      const In* student = students + j * student_step;
      const In* teacher = teachers + j * teacher_step;
      prefetch<kPair>(student);
      prefetch<kPair>(teacher);
      if (D::kExcludesLabel && j == hidden_pair) {
        load2_without(student, kPair, int(hidden % kPair), s[0], s[1]);
        load2_without(teacher, kPair, int(hidden % kPair), t[0], t[1]);
      } else {
        load2(student, s[0], s[1]);
        load2(teacher, t[0], t[1]);
      }
      one(j, s, t);
    }
    for (; j < end; ++j) {
      const In* student = students + j * student_step;
      const In* teacher = teachers + j * teacher_step;
      if (D::kExcludesLabel && j == hidden_pair) {
        load2_without(student, tail, int(hidden % kPair), s[0], s[1]);
        load2_without(teacher, tail, int(hidden % kPair), t[0], t[1]);
      } else {
        load2_tail(student, tail, s[0], s[1]);
        load2_tail(teacher, tail, t[0], t[1]);
      }
      one(j, s, t);
    }
    total.merge(block);
  }
  return total;
}

// q and p both times Z_s: e_s and e_t · `ratio`, Z_s / Z_t. Dead lanes hold exponentials of 0 and add nothing.
template <class D, class V, class Scalar = typename V::Scalar>
Sums<V, D::kMixtureSums> mixture_pass(const Call<Scalar>& call, int64_t num_pairs, const Pair<V>& ratio) {
  constexpr int kLanes = V::kLanes, kPair = 2 * kLanes;
  const V beta = V(call.beta), one_minus_beta = V(call.one_minus_beta);
  const V c[2] = {ratio.half[0], ratio.half[1]};
  Scalar *const kept_0 = call.kept[0], *const kept_1 = call.kept[1];
  Sums<V, D::kMixtureSums> total;
  for (int64_t begin = 0; begin < num_pairs; begin += kBlock) {
    const int64_t end = begin + kBlock < num_pairs ? begin + kBlock : num_pairs;
    Sums<V, D::kMixtureSums> block;
    for (int64_t j = begin; j < end; ++j) {
      for (int h = 0; h < 2; ++h) {
        const int64_t i = j * kPair + h * kLanes;
        V kept[2] = {V::load(kept_0 + i), V::load(kept_1 + i)};
        const V q = kept[0], p = kept[1] * c[h];
        D::mix(q, p, p - q, beta, one_minus_beta, block.half[h], kept);
        if (D::kMixtureKeeps) kept[1].store(kept_1 + i);
      }
    }
    total.merge(block);
  }
  return total;
}

// Over the student at temperature 1: Σ e_1, e_1 going to scratch, unless it is shared; for label smoothing Σ a_1 of the
// classes that are not masked, and their number.
template <class In, class V = Arithmetic<In>>
Sums<V, 3> hard_pass(const Call<typename V::Scalar>& call, const Tile<In>& tile, const Pair<V>& m, bool needs_exp) {
  constexpr int kLanes = V::kLanes, kPair = 2 * kLanes;
  const V k = V(typename V::Scalar(kLog2E));
  Sums<V, 3> total;
  for (int64_t begin = 0; begin < tile.num_pairs; begin += kBlock) {
    const int64_t end = begin + kBlock < tile.num_pairs ? begin + kBlock : tile.num_pairs;
    Sums<V, 3> block;
    for (int64_t j = begin; j < end; ++j) {
      const In* student = tile.student + j * tile.student_step;
      V s[2];
      if (j < tile.num_whole) {
        load2(student, s[0], s[1]);
      } else {
        load2_tail(student, tile.tail, s[0], s[1]);
      }
      for (int h = 0; h < 2; ++h) {
        V(&sums)[3] = block.half[h];
        const V a = (s[h] - m.half[h]) * k;
        if (needs_exp) {
          const V e = exp2(a);
          e.store(call.e_1 + j * kPair + h * kLanes);
          sums[0] = sums[0] + e;
        }
        if (call.smooth) {
          sums[1] = sums[1] + where_not_masked(s[h], a);
          sums[2] = sums[2] + where_not_masked(s[h], V(1));
        }
      }
    }
    total.merge(block);
  }
  return total;
}

// `to_q1` makes the cross entropy's exponentials q_1 times the row's coefficient; `uniform` is the smoothing's share of
// every class that is not masked.
template <class G, bool kHard, class In, class V = Arithmetic<In>>
void last_pass(const Call<typename V::Scalar>& call, const Tile<In>& tile,
               const Pair<V> (&coefficients)[G::kCoefficients], const Pair<V>& to_q1, const Pair<V>& uniform) {
  using Scalar = typename V::Scalar;
  constexpr int kLanes = V::kLanes, kPair = 2 * kLanes;
  In* const gradient = tile.gradient;
  const In* const students = tile.student;
  const int64_t gradient_step = tile.gradient_step, student_step = tile.student_step;
  const int64_t num_pairs = tile.num_pairs, num_whole = tile.num_whole;
  const int tail = tile.tail;
  const bool smooth = kHard && call.smooth;
  const Scalar* kept_rows[G::kKept];
  for (int i = 0; i < G::kKept; ++i) kept_rows[i] = call.kept[i];
  const Scalar* const e_1 = call.shares_exp ? call.kept[0] : call.e_1;
  V k[2][G::kCoefficients], c_1[2], u[2];
  for (int h = 0; h < 2; ++h) {
    for (int i = 0; i < G::kCoefficients; ++i) k[h][i] = coefficients[i].half[h];
    if constexpr (kHard) {
      c_1[h] = to_q1.half[h];
      u[h] = uniform.half[h];
    }
  }
  const auto one = [&](int64_t j, V(&g)[2]) {
    for (int h = 0; h < 2; ++h) {
      const int64_t at = j * kPair + h * kLanes;
      V kept[G::kKept];
      for (int i = 0; i < G::kKept; ++i) kept[i] = V::load(kept_rows[i] + at);
      g[h] = G::gradient(kept, k[h]);
      if constexpr (kHard) g[h] = g[h] + V::load(e_1 + at) * c_1[h];
    }
    if (smooth) {
      V s[2];
      if (j < num_whole) {
        load2(students + j * student_step, s[0], s[1]);
      } else {
        load2_tail(students + j * student_step, tail, s[0], s[1]);
      }
      for (int h = 0; h < 2; ++h) g[h] = g[h] - where_not_masked(s[h], u[h]);
    }
  };
  V g[2];
  int64_t j = 0;
  if (call.stream && (reinterpret_cast<uintptr_t>(gradient) & 63) == 0) {
    for (; j < num_whole; ++j) {
      one(j, g);
      stream2(gradient + j * gradient_step, g[0], g[1]);
    }
  } else {
    for (; j < num_whole; ++j) {
      one(j, g);
      store2(gradient + j * gradient_step, g[0], g[1]);
    }
  }
  for (; j < num_pairs; ++j) {
    one(j, g);
    store2_tail(gradient + j * gradient_step, tail, g[0], g[1]);
  }
}

}  // namespace
}  // namespace reptile_ext
