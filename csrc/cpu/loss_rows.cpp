// The row driver: loss and gradient of a range of rows, forward and backward in one go.
//
// Compiled once per instruction set. REPTILE_EXT_KERNELS is the one name such an object exports; everything else is
// in anonymous namespaces, and nothing here uses the standard library's templates (see simd.h for why).
//
// What is fused, in units of one row of V elements:
//
//     first pass     read s and t once, write two or three values a class (float32), e_s and e_t say, to this thread's
//                    scratch, which stays in the L2
//     mixture pass   of the divergences over normalised probabilities: read the scratch, replace a value in it
//     last pass      read the scratch, write the gradient once: non-temporally if it is fresh memory, which would
//                    otherwise be read in before it is written
//
// so memory sees 2 reads and 1 write of each element, and a pair of logits costs 2 exponentials, not 4.
//
// Classes that are neighbours in memory go through the lanes of vectors, one row at a time. Where the classes are
// strided and the rows are neighbours (images: [B, C, H, W], classes in C), rows go through the lanes instead, side by
// side. Both are a Tile, and the passes are the same. Any other layout, and mixed types, are gathered row by row into
// scratch and scattered back.
//
// The reference point m of a row is the maximum of its first kProbe classes, not of the whole row: what it must
// prevent is overflow, and for that it need not be exact. A row whose sums come out beyond kTame (the maximum is
// more than 60 powers of two above the probe's) or not finite is done again with its exact maximum.
//
// Hard-label cross entropy has a pass of its own between the first and the last, over the student alone; at T_s = 1 it
// shares e_s and needs the pass for label smoothing only.

#include "../divergence.h"
#include "../rows.h"
#include "simd.h"

namespace reptile_ext {
namespace {

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
  Scalar k_s, k_t;     // what differences of logits are multiplied with: log2 e / temperature
  Scalar beta, omega;  // β and 1 − β
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
Pair<V> spread(const Tile<In>& tile, const double* rows) {
  using Scalar = typename V::Scalar;
  if (tile.folded) return Pair<V>(Scalar(rows[0]));
  Scalar lanes[2 * V::kLanes] = {};
  for (int r = 0; r < tile.rows; ++r) lanes[lane_of_element<In>(r)] = Scalar(rows[r]);
  Pair<V> result;
  for (int h = 0; h < 2; ++h) result.half[h] = V::load(lanes + h * V::kLanes);
  return result;
}

// The other way round: one number a row, `stride` apart.
template <class In, class V>
void gather(const Tile<In>& tile, const Pair<V>& pair, double* rows, int stride = 1) {
  typename V::Scalar lanes[2 * V::kLanes];
  for (int h = 0; h < 2; ++h) pair.half[h].store(lanes + h * V::kLanes);
  for (int r = 0; r < tile.rows; ++r) rows[r * stride] = lanes[lane_of_element<In>(r)];
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
typename V::Scalar row_max(const In* z, int64_t n, int64_t hidden) {
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
Pair<V> column_max(const Tile<In>& tile, const In* z, int64_t step) {
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
  Sums<V, D::kSums> total;
  for (int64_t begin = 0; begin < num_pairs; begin += kBlock) {
    const int64_t end = begin + kBlock < num_pairs ? begin + kBlock : num_pairs;
    const int64_t whole = end < num_whole ? end : num_whole;
    Sums<V, D::kSums> block;
    const auto one = [&](int64_t j, const V(&s)[2], const V(&t)[2]) {
      for (int h = 0; h < 2; ++h) {
        V kept[D::kKept];
        D::first((s[h] - top_s[h]) * k_s, (t[h] - top_t[h]) * k_t, block.half[h], kept);
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
      if (D::kExcludesLabel && j == hidden / kPair) {
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
      if (D::kExcludesLabel && j == hidden / kPair) {
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
  const V beta = V(call.beta), omega = V(call.omega);
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
        D::mix(kept[0], kept[1] * c[h], beta, omega, block.half[h], kept);
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

// The first pass from a good reference point. Also returns that.
template <class D, class In, class V = Arithmetic<In>>
Sums<V, D::kSums> first_pass_in_range(const Call<typename V::Scalar>& call, const Tile<In>& tile, int64_t vocab_size,
                                      int64_t hidden, Pair<V>& m_s, Pair<V>& m_t) {
  using Scalar = typename V::Scalar;
  if (D::kRawLogits) return first_pass<D>(call, tile, m_s, m_t, hidden);  // from 0, which the caller has set
  if (!tile.folded) {
    m_s = column_max(tile, tile.student, tile.student_step);
    m_t = column_max(tile, tile.teacher, tile.teacher_step);
    return first_pass<D>(call, tile, m_s, m_t, hidden);
  }
  for (bool exact = vocab_size <= kProbe;; exact = true) {
    const int64_t probed = exact ? vocab_size : kProbe;
    Scalar s = row_max(tile.student, probed, hidden), t = row_max(tile.teacher, probed, hidden);
    if (!exact && !(s > kNegInf && t > kNegInf)) continue;  // the probe saw only masked classes, or a NaN
    if (D::kExcludesLabel) {  // no other class may be left; then all exponentials are to be 0, not NaN
      if (s == kNegInf) s = 0;
      if (t == kNegInf) t = 0;
    }
    m_s = Pair<V>(s);
    m_t = Pair<V>(t);
    const Sums<V, D::kSums> sums = first_pass<D>(call, tile, m_s, m_t, hidden);
    double z[2];
    gather_sums(tile, sums.of(0), &z[0]);
    gather_sums(tile, sums.of(1), &z[1]);
    if (exact || (is_tame(z[0]) && is_tame(z[1]))) return sums;
  }
}

// What the last pass needs of the cross entropy, and its value for each row.
template <class V>
struct Hard {
  Pair<V> to_q1, uniform;
  double loss[kMaxLanes];
  double at_label[kMaxLanes];  // of the gradient, at the label's class
};

// `scale[r]` is what the gradient of row r is multiplied with, NaN where the row is out. m and z_s are those of the
// first pass, for a cross entropy that shares its exponentials.
template <class In, class V = Arithmetic<In>>
void cross_entropy(const Call<typename V::Scalar>& call, const LossProblem& p, const Tile<In>& tile,
                   const int64_t* labels, const bool* is_in, const double* scale, Pair<V> m, const double* z_s,
                   Hard<V>& hard) {
  double z[kMaxLanes], a[kMaxLanes], count[kMaxLanes], top[kMaxLanes], to_q1[kMaxLanes] = {}, uniform[kMaxLanes] = {};
  for (bool exact = p.vocab_size <= kProbe; call.smooth || !call.shares_exp; exact = true) {
    if (!call.shares_exp) {
      m = tile.folded ? Pair<V>(row_max(tile.student, exact ? p.vocab_size : kProbe, -1))
                      : column_max(tile, tile.student, tile.student_step);
    }
    const Sums<V, 3> sums = hard_pass(call, tile, m, !call.shares_exp);
    gather_sums(tile, sums.of(0), z);
    gather_sums(tile, sums.of(1), a);
    gather_sums(tile, sums.of(2), count);
    if (call.shares_exp || !tile.folded || exact || is_tame(z[0])) break;
  }
  gather(tile, m, top);
  for (int r = 0; r < tile.rows; ++r) {
    if (!is_in[r]) continue;
    const double z_1 = call.shares_exp ? z_s[r] : z[r], log_z = __builtin_log(z_1);
    const double s_label = to_float(tile.student[tile.folded ? labels[r] : labels[r] * tile.student_step + r]);
    const double a_label = (s_label - top[r]) * kLog2E;
    double loss = log_z - kLn2 * a_label;
    if (call.smooth) {
      const double uniformly = log_z - kLn2 * a[r] / count[r];  // the label may be masked: infinity, of which 0 parts
      loss = p.label_smoothing < 1 ? (1 - p.label_smoothing) * loss + p.label_smoothing * uniformly : uniformly;
      uniform[r] = scale[r] * p.label_smoothing / count[r];
    }
    hard.loss[r] = p.hard_weight * loss;
    to_q1[r] = scale[r] / z_1;
    hard.at_label[r] =
        __builtin_exp2(a_label) * to_q1[r] - scale[r] * (1 - p.label_smoothing) - (s_label == kNegInf ? 0 : uniform[r]);
  }
  hard.to_q1 = spread(tile, to_q1);
  hard.uniform = spread(tile, uniform);
}

// Loss and gradient of the rows of a tile, the first of which is row `first` of the problem. Rows that are out share
// the lanes and the arithmetic and nothing else: no lane sees another. What is written as their gradient has no
// meaning.
template <class D, class In, class V = Arithmetic<In>>
void loss_tile(const Call<typename V::Scalar>& call, const LossProblem& p, const Tile<In>& tile, int64_t first) {
  using Scalar = typename V::Scalar;
  using G = typename D::Gradient;
  constexpr int kPair = 2 * V::kLanes;
  const int64_t* labels = p.labels ? p.labels + first : nullptr;
  const int64_t hidden = D::kExcludesLabel ? labels[0] : -1;

  Pair<V> m_s(Scalar(0)), m_t(Scalar(0));
  double sums[kMaxLanes][D::kSums], mixture[kMaxLanes][D::kMixtureSums + 1];
  {
    const Sums<V, D::kSums> total = first_pass_in_range<D>(call, tile, p.vocab_size, hidden, m_s, m_t);
    for (int i = 0; i < D::kSums; ++i) gather_sums(tile, total.of(i), &sums[0][i], D::kSums);
  }
  if constexpr (D::kMixtureSums > 0) {
    double ratio[kMaxLanes];
    for (int r = 0; r < tile.rows; ++r) ratio[r] = sums[r][0] / sums[r][1];
    const auto total = mixture_pass<D, V>(call, tile.num_pairs, spread(tile, ratio));
    for (int i = 0; i < D::kMixtureSums; ++i) {
      gather_sums(tile, total.of(i), &mixture[0][i], D::kMixtureSums + 1);
      for (int r = 0; r < tile.rows; ++r) mixture[r][i] /= sums[r][0];
    }
  }

  bool is_in[kMaxLanes];
  double hard_scale[kMaxLanes], z_s[kMaxLanes], k[G::kCoefficients][kMaxLanes], at_label[kMaxLanes];
  for (int r = 0; r < tile.rows; ++r) {
    const double weight = p.weights ? p.weights[first + r] : 1.0;
    is_in[r] = weight != 0;
    p.row_losses[first + r] = 0;
    for (auto& coefficient : k) coefficient[r] = 0;
    if (!is_in[r]) continue;
    double scale = weight * p.gradient_scale;
    if (p.upstream) scale *= p.upstream[p.upstream_is_uniform ? 0 : first + r];
    hard_scale[r] = scale * p.hard_weight;
    z_s[r] = sums[r][0];

    Row row{sums[r], mixture[r], p.beta, p.omega, 0, 0};
    if constexpr (D::kExcludesLabel) {  // a folded tile
      double top_s, top_t;
      gather(tile, m_s, &top_s);
      gather(tile, m_t, &top_t);
      row.a_label = (to_float(tile.student[hidden]) - top_s) * (kLog2E / p.student_temperature);
      row.b_label = (to_float(tile.teacher[hidden]) - top_t) * (kLog2E / p.teacher_temperature);
    }
    double of_row[G::kCoefficients];
    double value = D::finish(row, scale * p.soft_scale / p.student_temperature, of_row);
    if (value < 0) value = 0;  // rounding alone; a NaN stays
    p.row_losses[first + r] = p.soft_scale * value;
    // All of a broken row's gradient is NaN, wherever in the row it broke.
    for (int i = 0; i < G::kCoefficients; ++i) k[i][r] = value == value ? of_row[i] : value;
    if constexpr (D::kUnbounded >= 0) {
      for (int64_t i = 0; row.is_unbounded && i < tile.num_pairs * kPair; ++i) {
        if (tile.folded || i % kPair == lane_of_element<In>(r)) call.kept[D::kUnbounded][i] = 0;
      }
    }
  }
  Hard<V> hard;  // stays as it is, and unread, if there is none: a row of ten classes would feel it
  if (call.hard) cross_entropy(call, p, tile, labels, is_in, hard_scale, m_s, z_s, hard);
  for (int r = 0; r < tile.rows; ++r) {
    const double weight = p.weights ? p.weights[first + r] : 1.0;
    if (is_in[r]) p.row_losses[first + r] = weight * (p.row_losses[first + r] + (call.hard ? hard.loss[r] : 0));
  }
  if (!tile.gradient) return;

  // The last pass does not know where the label is; its class gets a gradient of its own, in one rounding.
  if (call.hard || D::kExcludesLabel) {
    for (int r = 0; r < tile.rows; ++r) {
      if (!is_in[r]) continue;
      if constexpr (D::kExcludesLabel) {
        at_label[r] = k[G::kCoefficients - 1][r];
      } else {
        const int64_t element = tile.folded ? labels[r] % kPair : r;
        const int64_t at = (tile.folded ? labels[r] / kPair : labels[r]) * kPair + lane_of_element<In>(int(element));
        V kept[G::kKept], coefficient[G::kCoefficients];
        for (int i = 0; i < G::kKept; ++i) kept[i] = V(call.kept[i][at]);
        for (int i = 0; i < G::kCoefficients; ++i) coefficient[i] = V(Scalar(k[i][r]));
        Scalar lanes[V::kLanes];
        G::gradient(kept, coefficient).store(lanes);
        at_label[r] = lanes[0];
      }
      if (call.hard) at_label[r] += hard.at_label[r];
    }
  }
  Pair<V> coefficients[G::kCoefficients];
  for (int i = 0; i < G::kCoefficients; ++i) coefficients[i] = spread(tile, k[i]);
  if (call.hard) {
    last_pass<G, true>(call, tile, coefficients, hard.to_q1, hard.uniform);
  } else {
    last_pass<G, false>(call, tile, coefficients, Pair<V>(), Pair<V>());
  }
  if (call.hard || D::kExcludesLabel) {
    for (int r = 0; r < tile.rows; ++r) {
      if (!is_in[r]) continue;  // its label may be any number
      const int64_t label = tile.folded ? labels[r] : labels[r] * tile.gradient_step + r;
      from_float(Scalar(at_label[r]), tile.gradient + label);
    }
  }
}

// Where row n of an operand starts: the indices of n, counted up row by row.
struct RowIndex {
  const LossProblem& problem;
  int64_t index[kMaxRowDims];

  RowIndex(const LossProblem& p, int64_t n) : problem(p) {
    for (int d = p.num_row_dims - 1; d >= 0; --d) {
      index[d] = n % p.row_sizes[d];
      n /= p.row_sizes[d];
    }
  }
  void next() {
    for (int d = problem.num_row_dims - 1; d >= 0; --d) {
      if (++index[d] < problem.row_sizes[d]) return;
      index[d] = 0;
    }
  }
  int64_t offset(const Operand& operand) const {
    int64_t sum = 0;
    for (int d = 0; d < problem.num_row_dims; ++d) sum += index[d] * operand.row_strides[d];
    return sum;
  }
};

// Calls visit(T*) with an operand's data as its storage type.
template <class Visitor>
void with_type(const Operand& operand, Visitor&& visit) {
  switch (operand.dtype) {
    case DType::kFloat32:
      return visit(static_cast<float*>(operand.data));
    case DType::kBFloat16:
      return visit(static_cast<BFloat16*>(operand.data));
    case DType::kFloat16:
      return visit(static_cast<Float16*>(operand.data));
    case DType::kFloat64:
      return visit(static_cast<double*>(operand.data));
  }
}

template <class Scalar>
void gather_row(const Operand& operand, int64_t offset, int64_t n, Scalar* out) {
  with_type(operand, [&](auto* data) {
    for (int64_t v = 0; v < n; ++v) out[v] = Scalar(to_float(data[offset + v * operand.class_stride]));
  });
}

template <class Scalar>
void scatter_row(const Operand& operand, int64_t offset, int64_t n, const Scalar* row) {
  with_type(operand, [&](auto* data) {
    for (int64_t v = 0; v < n; ++v) {
      if constexpr (sizeof(*data) == 2) {
        from_float(float(row[v]), data + offset + v * operand.class_stride);
      } else {
        from_float(row[v], data + offset + v * operand.class_stride);
      }
    }
  });
}

void clear_classes(const Operand& operand, int64_t offset, int64_t from, int64_t to) {
  with_type(operand, [&](auto* data) {
    data += offset;
    if (operand.class_stride == 1) {
      std::memset(data + from, 0, size_t(to - from) * sizeof(*data));
    } else {
      for (int64_t v = from; v < to; ++v) std::memset(data + v * operand.class_stride, 0, sizeof(*data));
    }
  });
}

enum class Layout {
  kContiguous,  // classes are neighbours
  kSideBySide,  // rows are neighbours
  kGathered,    // neither, or types that differ
};

Layout layout_of(const LossProblem& p) {
  const bool same_type = p.student.dtype == p.teacher.dtype;
  const auto all = [&](auto&& holds) {
    return holds(p.student) && holds(p.teacher) && (!p.gradient.data || holds(p.gradient));
  };
  if (same_type && all([](const Operand& o) { return o.class_stride == 1; })) return Layout::kContiguous;
  const int last = p.num_row_dims - 1;
  if (same_type && !needs_labels(p.divergence) && p.vocab_size <= kSideBySideMaxClasses && last >= 0 &&
      p.row_sizes[last] >= 8 && all([last](const Operand& o) { return o.row_strides[last] == 1; })) {
    return Layout::kSideBySide;
  }
  return Layout::kGathered;
}

// The type the arithmetic is in.
bool is_double(const LossProblem& p) {
  return p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
}

// Rows of kept values and of the cross entropy's exponentials, and three more to gather rows in; side by side, a pair
// of vectors for each class.
size_t scratch_bytes(const LossProblem& p) {
  const size_t pair = 2 * (is_double(p) ? Double::kLanes : Float::kLanes);
  const size_t rows = layout_of(p) == Layout::kSideBySide ? (kMaxKept + 1) * pair : kMaxKept + 1 + 3;
  return rows * size_t(padded(p.vocab_size)) * (is_double(p) ? 8 : 4);
}

// Rows [begin, end) of one storage type; gathered rows are of the arithmetic type.
template <class In>
void loss_rows_of_type(const LossProblem& p, Layout layout, int64_t begin, int64_t end, void* scratch) {
  using V = Arithmetic<In>;
  using Scalar = typename V::Scalar;
  constexpr int kPair = 2 * V::kLanes;
  const int64_t n = p.vocab_size;
  const int64_t row_size = padded(n) * (layout == Layout::kSideBySide ? kPair : 1);
  Scalar* rows = static_cast<Scalar*>(scratch);

  // Without a soft part the teacher is not looked at; the student in its place is multiplied by 0 everywhere.
  const bool soft = p.soft_scale > 0;
  const Operand& teacher = soft ? p.teacher : p.student;
  const Divergence divergence = soft ? p.divergence : Divergence::kForwardKl;

  Call<Scalar> call;
  for (int i = 0; i < kMaxKept; ++i) call.kept[i] = rows + i * row_size;
  call.e_1 = rows + kMaxKept * row_size;
  Scalar* gathered = rows + (kMaxKept + 1) * row_size;
  call.beta = Scalar(p.beta);
  call.omega = Scalar(p.omega);
  call.hard = p.hard_weight > 0;
  call.smooth = p.label_smoothing > 0;
  // Fresh memory larger than a cache; in place the line is in the cache already.
  call.stream = layout == Layout::kContiguous && p.gradient.data != p.student.data &&
                p.num_rows * n * int64_t(sizeof(In)) >= (1 << 22);

  Tile<In> tile;
  tile.folded = layout != Layout::kSideBySide;
  tile.student_step = tile.folded ? kPair : p.student.class_stride;
  tile.teacher_step = tile.folded ? kPair : teacher.class_stride;
  tile.gradient_step = tile.folded ? kPair : p.gradient.class_stride;
  tile.num_pairs = tile.folded ? (n + kPair - 1) / kPair : n;
  tile.num_whole = n / kPair;
  tile.tail = int(n % kPair);
  tile.rows = 1;

  const int last = p.num_row_dims - 1;
  RowIndex index(p, begin);
  for (int64_t r = begin; r < end;) {
    const int64_t s_offset = index.offset(p.student), t_offset = index.offset(teacher);
    const int64_t g_offset = p.gradient.data ? index.offset(p.gradient) : 0;
    if (!tile.folded) {
      int64_t live = p.row_sizes[last] - index.index[last];
      live = live < end - r ? live : end - r;
      tile.rows = tile.tail = int(live < kPair ? live : kPair);
      tile.num_whole = tile.rows == kPair ? n : 0;
    }
    bool any = !p.weights;
    for (int i = 0; i < tile.rows && !any; ++i) any = p.weights[r + i] != 0;
    if (any) {
      if (layout == Layout::kGathered) {
        gather_row(p.student, s_offset, n, gathered);
        gather_row(teacher, t_offset, n, gathered + row_size);
        tile.student = reinterpret_cast<const In*>(gathered);  // In is Scalar here
        tile.teacher = reinterpret_cast<const In*>(gathered + row_size);
        tile.gradient = p.gradient.data ? reinterpret_cast<In*>(gathered + 2 * row_size) : nullptr;
      } else {
        tile.student = static_cast<const In*>(p.student.data) + s_offset;
        tile.teacher = static_cast<const In*>(teacher.data) + t_offset;
        tile.gradient = p.gradient.data ? static_cast<In*>(p.gradient.data) + g_offset : nullptr;
      }
      with_divergence<V>(divergence, [&](auto d) {
        using D = decltype(d);
        call.shares_exp = D::kKeepsExp && p.student_temperature == 1.0;
        call.k_s = Scalar((D::kRawLogits ? 1 : kLog2E) / p.student_temperature);
        call.k_t = Scalar((D::kRawLogits ? 1 : kLog2E) / p.teacher_temperature);
        loss_tile<D>(call, p, tile, r);
      });
      if (layout == Layout::kGathered && p.gradient.data) {
        scatter_row(p.gradient, g_offset, n, gathered + 2 * row_size);
      }
    }
    for (int i = 0; i < tile.rows; ++i, ++r, index.next()) {
      const bool is_in = !p.weights || p.weights[r] != 0;
      if (!is_in) p.row_losses[r] = 0;
      if (p.gradient.data && (!is_in || p.gradient_size > n)) {
        clear_classes(p.gradient, g_offset + (tile.folded ? 0 : i), is_in ? n : 0, p.gradient_size);
      }
    }
  }
  if (call.stream) stream_fence();
}

void loss_rows(const LossProblem& p, int64_t begin, int64_t end, void* scratch) {
  const Layout layout = layout_of(p);
  const DType arithmetic = is_double(p) ? DType::kFloat64 : DType::kFloat32;
  switch (layout == Layout::kGathered ? arithmetic : p.student.dtype) {
    case DType::kFloat32:
      return loss_rows_of_type<float>(p, layout, begin, end, scratch);
    case DType::kBFloat16:
      return loss_rows_of_type<BFloat16>(p, layout, begin, end, scratch);
    case DType::kFloat16:
      return loss_rows_of_type<Float16>(p, layout, begin, end, scratch);
    case DType::kFloat64:
      return loss_rows_of_type<double>(p, layout, begin, end, scratch);
  }
}

template <class In>
void scale_row(In* row, int64_t n, double factor) {
  using V = Arithmetic<In>;
  constexpr int kPair = 2 * V::kLanes;
  const V f = V(typename V::Scalar(factor));
  V a, b;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    load2(row + i, a, b);
    store2(row + i, a * f, b * f);
  }
  if (i < n) {
    load2_tail(row + i, int(n - i), a, b);
    store2_tail(row + i, int(n - i), a * f, b * f);
  }
}

void scale_rows(const LossProblem& p, const double* factors, bool is_uniform, int64_t begin, int64_t end) {
  const Operand& gradient = p.gradient;
  const int last = p.num_row_dims - 1;
  const bool side_by_side = last >= 0 && gradient.row_strides[last] == 1;
  with_type(gradient, [&](auto* data) {
    RowIndex index(p, begin);
    for (int64_t r = begin; r < end;) {
      auto* row = data + index.offset(gradient);
      int64_t live = 1;
      if (gradient.class_stride == 1) {
        scale_row(row, p.gradient_size, factors[is_uniform ? 0 : r]);
      } else {
        // In memory order: the rows that lie side by side, class by class.
        if (side_by_side) live = p.row_sizes[last] - index.index[last];
        if (live > end - r) live = end - r;
        for (int64_t v = 0; v < p.gradient_size; ++v) {
          for (int64_t i = 0; i < live; ++i) {
            auto* element = row + v * gradient.class_stride + i;
            using Scalar = decltype(to_float(*element));
            from_float(Scalar(to_float(*element) * Scalar(factors[is_uniform ? 0 : r + i])), element);
          }
        }
      }
      for (int64_t i = 0; i < live; ++i, ++r) index.next();
    }
  });
}

}  // namespace

const Kernels& REPTILE_EXT_KERNELS() {
  static const Kernels kernels = {scratch_bytes, loss_rows, scale_rows};
  return kernels;
}

}  // namespace reptile_ext
