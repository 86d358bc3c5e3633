// The row driver: loss and gradient of a range of rows, one row at a time, forward and backward in one go.
//
// Compiled once per instruction set. REPTILE_EXT_KERNELS is the one name such an object exports; everything else is
// in anonymous namespaces, and nothing here uses the standard library's templates (see simd.h for why).
//
// What is fused, in units of one row of V elements:
//
//     first pass     read s and t once, write e_s and e_t (float32) to this thread's scratch, which stays in the L2
//     second pass    read the scratch, write the gradient once: non-temporally if it is fresh memory, which would
//                    otherwise be read in before it is written
//
// so memory sees 2 reads and 1 write of each element, and a pair of logits costs 2 exponentials, not 4.
//
// The reference point m of a row is the maximum of its first kProbe classes, not of the whole row: what it must
// prevent is overflow, and for that it need not be exact. A row whose sums come out beyond kTame (the maximum is
// more than 60 powers of two above the probe's) or not finite is done again with its exact maximum.
//
// Where the classes are strided and the rows are neighbours (images: [B, C, H, W], classes in C), the same two passes
// run with rows in the lanes instead of classes ("side by side"). Any other layout, and mixed types, are gathered row
// by row into scratch and scattered back.
//
// Hard-label cross entropy runs in the same two passes with m as its reference: at T_s = 1 it shares e_s, else it
// has e_1 = 2^((s − m) log2 e) as a third scratch row.

#include "../divergence.h"
#include "../rows.h"
#include "simd.h"

namespace reptile_ext {
namespace {

constexpr int64_t kProbe = 512;
constexpr int64_t kBlock = 4096;  // elements between roundings into the row's sums; a multiple of every pair
constexpr double kTame = 0x1p60;
constexpr int64_t kSideBySideMaxClasses = 4096;  // beyond it the scratch of a pair of rows leaves the cache
constexpr int64_t kScratchPad = 64;  // elements; rounds a scratch row up to whole pairs and keeps 64-byte alignment

constexpr size_t kPrefetchBytes = 3072;

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
  Scalar k_s, k_t, k_1;  // log2 e / temperature
  bool shares_exp;       // T_s == 1: the cross entropy's e_1 is e_s
  bool smooth;
  bool stream;  // non-temporal stores pay
  int64_t vocab_size;
  double soft_scale, hard_weight, label_smoothing, student_temperature, gradient_scale;
  Scalar *e_s, *e_t, *e_1;  // scratch rows
};

template <class In, class V = Arithmetic<In>>
typename V::Scalar row_max(const In* z, int64_t n) {
  using Scalar = typename V::Scalar;
  V m0 = V(Scalar(kNegInf)), m1 = m0, u, v;
  constexpr int kPair = 2 * V::kLanes;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    load2(z + i, u, v);
    m0 = max(m0, u);
    m1 = max(m1, v);
  }
  if (i < n) {
    load2_tail(z + i, int(n - i), u, v);
    m0 = max(m0, u);
    m1 = max(m1, v);
  }
  return reduce_max(max(m0, m1));
}

// exp2 of one number by the vector's own arithmetic, so that a class gets the same bits wherever it is computed.
template <class V>
double exp2_one(typename V::Scalar a) {
  typename V::Scalar lanes[V::kLanes];
  exp2(V(a)).store(lanes);
  return lanes[0];
}

// Sums over classes, of a block or of all. In the lanes: classes of one row, or rows side by side.
template <class V, class D>
struct Sums {
  V z_s, z_t;
  V divergence[D::kSums];
  V z_1;    // cross entropy at temperature 1
  V a_1;    // Σ a of the classes that are not masked, for label smoothing
  V count;  // how many those are

  Sums() : z_s(0), z_t(0), z_1(0), a_1(0), count(0) {
    for (V& sum : divergence) sum = V(0);
  }
  void merge(const Sums& other) {
    z_s = z_s + other.z_s;
    z_t = z_t + other.z_t;
    for (int i = 0; i < D::kSums; ++i) divergence[i] = divergence[i] + other.divergence[i];
    z_1 = z_1 + other.z_1;
    a_1 = a_1 + other.a_1;
    count = count + other.count;
  }
};

// First pass over one vector, its exponentials going to scratch from i on. The call comes by value: a copy that no
// store can alias stays in registers.
template <bool kHard, class V, class D>
inline void first_pass(const Call<typename V::Scalar> call, V m_s, V m_t, int64_t i, V s, V t, Sums<V, D>& sums) {
  const V a = (s - m_s) * V(call.k_s);
  const V b = (t - m_t) * V(call.k_t);
  const V e_s = exp2(a);
  const V e_t = exp2(b);
  e_s.store(call.e_s + i);
  e_t.store(call.e_t + i);
  sums.z_s = sums.z_s + e_s;
  sums.z_t = sums.z_t + e_t;
  D::add(sums.divergence, e_s, e_t, a, b);
  if constexpr (kHard) {
    const V a_1 = (s - m_s) * V(call.k_1);
    if (!call.shares_exp) {
      const V e_1 = exp2(a_1);
      e_1.store(call.e_1 + i);
      sums.z_1 = sums.z_1 + e_1;
    }
    if (call.smooth) {
      sums.a_1 = sums.a_1 + where_not_masked(s, a_1);
      sums.count = sums.count + where_not_masked(s, V(1));
    }
  }
}

// What stands between the passes: one row, in double.
template <class D>
struct RowSums {
  double z_s, z_t;
  double divergence[D::kSums];
  double z_1 = 0, a_1 = 0, count = 0;
};

// Its result: the loss, unweighted, and what e_s, e_t and e_1 are multiplied with to become this row's share of the
// gradient, A (gradient of D) + B (q_1 − label − smoothing).
struct RowCoefficients {
  double loss;
  double to_q, to_p, to_q1;
  double label, uniform;  // subtracted at the label; at every class that is not masked
};

template <bool kHard, class D, class Scalar>
RowCoefficients finish_row(const Call<Scalar>& call, const RowSums<D>& sums, Scalar m_s, Scalar s_label,
                           double weight) {
  const RowStats row = {sums.z_s, sums.z_t, __builtin_log(sums.z_s), __builtin_log(sums.z_t)};
  double d = D::value(sums.divergence, row);
  if (d < 0) d = 0;  // rounding alone; a NaN stays
  const double soft = weight * call.gradient_scale * call.soft_scale / call.student_temperature;
  RowCoefficients c = {call.soft_scale * d, soft / sums.z_s, soft / sums.z_t, 0, 0, 0};
  if (kHard) {
    const double z_1 = call.shares_exp ? sums.z_s : sums.z_1;
    const double log_z_1 = __builtin_log(z_1);
    const double hard = weight * call.gradient_scale * call.hard_weight;
    double cross_entropy = log_z_1 - kLn2 * ((s_label - m_s) * call.k_1);
    if (call.smooth) {
      const double uniform = log_z_1 - kLn2 * sums.a_1 / sums.count;
      cross_entropy = (1 - call.label_smoothing) * cross_entropy + call.label_smoothing * uniform;
      c.uniform = hard * call.label_smoothing / sums.count;
    }
    c.loss += call.hard_weight * cross_entropy;
    c.to_q1 = hard / z_1;
    c.label = hard * (1 - call.label_smoothing);
  }
  return c;
}

// The gradient of the label's own class, in one rounding: the second pass does not know where the label is.
template <class D, class V, class Scalar>
Scalar label_gradient(const Call<Scalar>& call, const RowCoefficients& c, Scalar m_s, Scalar m_t, Scalar s_label,
                      Scalar t_label) {
  const double e_s = exp2_one<V>((s_label - m_s) * call.k_s), e_t = exp2_one<V>((t_label - m_t) * call.k_t);
  const double e_1 = call.shares_exp ? e_s : exp2_one<V>((s_label - m_s) * call.k_1);
  Scalar lanes[V::kLanes];
  D::gradient(V(Scalar(e_s * c.to_q)), V(Scalar(e_t * c.to_p))).store(lanes);
  return Scalar(lanes[0] + e_1 * c.to_q1 - c.label - (s_label == kNegInf ? 0 : c.uniform));
}

// One row, classes in the lanes. `gradient` may be null, or `student`'s own memory; label is read only if kHard.
// Returns the row's loss.
template <bool kHard, class D, class In, class V = Arithmetic<In>>
double loss_row(const Call<typename V::Scalar> call, const In* student, const In* teacher, In* gradient, int64_t label,
                double weight) {
  using Scalar = typename V::Scalar;
  constexpr int kPair = 2 * V::kLanes;
  const int64_t vocab_size = call.vocab_size;

  RowSums<D> row;
  Scalar m_s, m_t;
  for (bool exact = vocab_size <= kProbe;; exact = true) {
    const int64_t probed = exact ? vocab_size : kProbe;
    m_s = row_max(student, probed);
    m_t = row_max(teacher, probed);
    if (!exact && !(m_s > kNegInf && m_t > kNegInf)) continue;  // the probe saw only masked classes, or a NaN

    // The halves of a pair are two independent chains of additions.
    Sums<V, D> half_0, half_1;
    for (int64_t begin = 0; begin < vocab_size; begin += kBlock) {
      const int64_t end = begin + kBlock < vocab_size ? begin + kBlock : vocab_size;
      Sums<V, D> block_0, block_1;
      const auto first = [&](int64_t i, V s_0, V s_1, V t_0, V t_1) {
        first_pass<kHard>(call, V(m_s), V(m_t), i, s_0, t_0, block_0);
        first_pass<kHard>(call, V(m_s), V(m_t), i + V::kLanes, s_1, t_1, block_1);
      };
      V s_0, s_1, t_0, t_1;
      int64_t i = begin;
      for (; i + kPair <= end; i += kPair) {
        prefetch<kPair>(student + i);
        prefetch<kPair>(teacher + i);
        load2(student + i, s_0, s_1);
        load2(teacher + i, t_0, t_1);
        first(i, s_0, s_1, t_0, t_1);
      }
      if (i < end) {
        load2_tail(student + i, int(end - i), s_0, s_1);
        load2_tail(teacher + i, int(end - i), t_0, t_1);
        first(i, s_0, s_1, t_0, t_1);
      }
      half_0.merge(block_0);
      half_1.merge(block_1);
    }
    half_0.merge(half_1);
    row.z_s = reduce_add(half_0.z_s);
    row.z_t = reduce_add(half_0.z_t);
    for (int i = 0; i < D::kSums; ++i) row.divergence[i] = reduce_add(half_0.divergence[i]);
    if (kHard) {
      row.z_1 = reduce_add(half_0.z_1);
      row.a_1 = reduce_add(half_0.a_1);
      row.count = reduce_add(half_0.count);
    }
    if (exact || (is_tame(row.z_s) && is_tame(row.z_t) && is_tame(row.z_1))) break;
  }
  // Read before the gradient overwrites them.
  const Scalar s_label = kHard ? to_float(student[label]) : Scalar(0);
  const Scalar t_label = kHard ? to_float(teacher[label]) : Scalar(0);
  const RowCoefficients c = finish_row<kHard>(call, row, m_s, s_label, weight);
  if (!gradient) return weight * c.loss;

  const V to_q = V(Scalar(c.to_q)), to_p = V(Scalar(c.to_p)), to_q1 = V(Scalar(c.to_q1)),
          uniform = V(Scalar(c.uniform));
  const Scalar* e_1 = call.shares_exp ? call.e_s : call.e_1;
  const auto second = [&](int64_t i, V& g_0, V& g_1) {
    const auto one = [&](int64_t j) {
      V g = D::gradient(V::load(call.e_s + j) * to_q, V::load(call.e_t + j) * to_p);
      if constexpr (kHard) g = g + V::load(e_1 + j) * to_q1;
      return g;
    };
    g_0 = one(i);
    g_1 = one(i + V::kLanes);
    if (kHard && call.smooth) {
      V s_0, s_1;
      if (i + kPair <= vocab_size) {
        load2(student + i, s_0, s_1);
      } else {
        load2_tail(student + i, int(vocab_size - i), s_0, s_1);
      }
      g_0 = g_0 - where_not_masked(s_0, uniform);
      g_1 = g_1 - where_not_masked(s_1, uniform);
    }
  };
  V g_0, g_1;
  int64_t i = 0;
  if (call.stream && (reinterpret_cast<uintptr_t>(gradient) & 63) == 0) {
    for (; i + kPair <= vocab_size; i += kPair) {
      second(i, g_0, g_1);
      stream2(gradient + i, g_0, g_1);
    }
  } else {
    for (; i + kPair <= vocab_size; i += kPair) {
      second(i, g_0, g_1);
      store2(gradient + i, g_0, g_1);
    }
  }
  if (i < vocab_size) {
    second(i, g_0, g_1);
    store2_tail(gradient + i, int(vocab_size - i), g_0, g_1);
  }
  if (kHard) from_float(label_gradient<D, V>(call, c, m_s, m_t, s_label, t_label), gradient + label);
  return weight * c.loss;
}

// `live` ≤ 2 · kLanes rows side by side: class v of row r is student[v · stride + r]. Rows whose weight is 0 share the
// arithmetic and nothing else: no lane sees another, and their gradient is written as 0.
template <bool kHard, class D, class In, class V = Arithmetic<In>>
void loss_side_by_side(const Call<typename V::Scalar> call, const LossProblem& p, const In* student, int64_t s_stride,
                       const In* teacher, int64_t t_stride, In* gradient, int64_t g_stride, int64_t first_row,
                       int live) {
  using Scalar = typename V::Scalar;
  constexpr int kLanes = V::kLanes, kPair = 2 * kLanes;
  constexpr int64_t kBlockClasses = 64;
  const int64_t vocab_size = call.vocab_size;
  const auto load = [live](const In* z, V(&out)[2]) {
    if (live == kPair) {
      load2(z, out[0], out[1]);
    } else {
      load2_tail(z, live, out[0], out[1]);
    }
  };

  V m_s[2] = {V(Scalar(kNegInf)), V(Scalar(kNegInf))}, m_t[2] = {m_s[0], m_s[0]}, s[2], t[2];
  for (int64_t v = 0; v < vocab_size; ++v) {
    load(student + v * s_stride, s);
    load(teacher + v * t_stride, t);
    for (int h = 0; h < 2; ++h) {
      m_s[h] = max(m_s[h], s[h]);
      m_t[h] = max(m_t[h], t[h]);
    }
  }
  Sums<V, D> sums[2];
  for (int64_t begin = 0; begin < vocab_size; begin += kBlockClasses) {
    const int64_t end = begin + kBlockClasses < vocab_size ? begin + kBlockClasses : vocab_size;
    Sums<V, D> block[2];
    for (int64_t v = begin; v < end; ++v) {
      load(student + v * s_stride, s);
      load(teacher + v * t_stride, t);
      for (int h = 0; h < 2; ++h) {
        first_pass<kHard>(call, m_s[h], m_t[h], v * kPair + h * kLanes, s[h], t[h], block[h]);
      }
    }
    sums[0].merge(block[0]);
    sums[1].merge(block[1]);
  }

  V to_q[2], to_p[2], to_q1[2], uniform[2], in[2];
  Scalar at_label[kPair];
  for (int h = 0; h < 2; ++h) {
    Scalar z_s[kLanes], z_t[kLanes], d[D::kSums][kLanes], z_1[kLanes], a_1[kLanes], count[kLanes], top_s[kLanes],
        top_t[kLanes];
    sums[h].z_s.store(z_s);
    sums[h].z_t.store(z_t);
    for (int i = 0; i < D::kSums; ++i) sums[h].divergence[i].store(d[i]);
    sums[h].z_1.store(z_1);
    sums[h].a_1.store(a_1);
    sums[h].count.store(count);
    m_s[h].store(top_s);
    m_t[h].store(top_t);
    Scalar q[kLanes] = {}, p_[kLanes] = {}, q1[kLanes] = {}, u[kLanes] = {}, is_in[kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int element = element_of_lane<In>(h, l);
      is_in[l] = kNegInf;
      if (element >= live) continue;
      const int64_t r = first_row + element;
      const double weight = p.weights ? p.weights[r] : 1.0;
      p.row_losses[r] = 0;
      if (weight == 0) continue;
      is_in[l] = 0;
      RowSums<D> row;
      row.z_s = z_s[l];
      row.z_t = z_t[l];
      for (int i = 0; i < D::kSums; ++i) row.divergence[i] = d[i][l];
      row.z_1 = z_1[l];
      row.a_1 = a_1[l];
      row.count = count[l];
      const Scalar s_label = kHard ? to_float(student[p.labels[r] * s_stride + element]) : Scalar(0);
      const Scalar t_label = kHard ? to_float(teacher[p.labels[r] * t_stride + element]) : Scalar(0);
      const RowCoefficients c = finish_row<kHard>(call, row, top_s[l], s_label, weight);
      p.row_losses[r] = weight * c.loss;
      q[l] = Scalar(c.to_q);
      p_[l] = Scalar(c.to_p);
      q1[l] = Scalar(c.to_q1);
      u[l] = Scalar(c.uniform);
      if (kHard) at_label[element] = label_gradient<D, V>(call, c, top_s[l], top_t[l], s_label, t_label);
    }
    to_q[h] = V::load(q);
    to_p[h] = V::load(p_);
    to_q1[h] = V::load(q1);
    uniform[h] = V::load(u);
    in[h] = V::load(is_in);
  }
  if (!gradient) return;

  const Scalar* e_1 = call.shares_exp ? call.e_s : call.e_1;
  for (int64_t v = 0; v < vocab_size; ++v) {
    if (kHard && call.smooth) load(student + v * s_stride, s);
    V g[2];
    for (int h = 0; h < 2; ++h) {
      const int64_t j = v * kPair + h * kLanes;
      g[h] = D::gradient(V::load(call.e_s + j) * to_q[h], V::load(call.e_t + j) * to_p[h]);
      if constexpr (kHard) {
        g[h] = g[h] + V::load(e_1 + j) * to_q1[h];
        if (call.smooth) g[h] = g[h] - where_not_masked(s[h], uniform[h]);
      }
      g[h] = where_not_masked(in[h], g[h]);
    }
    if (live == kPair) {
      store2(gradient + v * g_stride, g[0], g[1]);
    } else {
      store2_tail(gradient + v * g_stride, live, g[0], g[1]);
    }
  }
  if (kHard) {
    for (int element = 0; element < live; ++element) {
      const int64_t r = first_row + element;
      if (p.weights && p.weights[r] == 0) continue;
      from_float(at_label[element], gradient + p.labels[r] * g_stride + element);
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
  if (same_type && p.vocab_size <= kSideBySideMaxClasses && last >= 0 && p.row_sizes[last] >= 8 &&
      all([last](const Operand& o) { return o.row_strides[last] == 1; })) {
    return Layout::kSideBySide;
  }
  return Layout::kGathered;
}

// Three rows of exponentials and, to gather rows, three more; side by side, a pair of vectors for each class.
size_t scratch_bytes(const LossProblem& p) {
  const bool is_double = p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
  const size_t rows = layout_of(p) == Layout::kSideBySide ? 3 * 2 * (is_double ? Double::kLanes : Float::kLanes) : 6;
  return rows * size_t(padded(p.vocab_size)) * (is_double ? 8 : 4);
}

// Rows [begin, end) of one storage type and layout.
template <class In, Layout kLayout>
void loss_rows(const LossProblem& p, int64_t begin, int64_t end, void* scratch) {
  using V = Arithmetic<In>;
  using Scalar = typename V::Scalar;
  constexpr int kPair = 2 * V::kLanes;
  const int64_t n = p.vocab_size;
  const int64_t row_size = padded(n) * (kLayout == Layout::kSideBySide ? kPair : 1);
  Scalar* rows = static_cast<Scalar*>(scratch);

  Call<Scalar> call;
  call.k_s = Scalar(kLog2E / p.student_temperature);
  call.k_t = Scalar(kLog2E / p.teacher_temperature);
  call.k_1 = Scalar(kLog2E);
  call.shares_exp = p.student_temperature == 1.0;
  call.smooth = p.label_smoothing > 0;
  // Fresh memory larger than a cache; in place the line is in the cache already.
  call.stream = kLayout == Layout::kContiguous && p.gradient.data != p.student.data &&
                p.num_rows * n * int64_t(sizeof(In)) >= (1 << 22);
  call.vocab_size = n;
  call.soft_scale = p.soft_scale;
  call.hard_weight = p.hard_weight;
  call.label_smoothing = p.label_smoothing;
  call.student_temperature = p.student_temperature;
  call.gradient_scale = p.gradient_scale;
  call.e_s = rows;
  call.e_t = rows + row_size;
  call.e_1 = rows + 2 * row_size;
  // Without a soft part the teacher is not looked at; the student in its place is multiplied by 0 everywhere.
  const Operand& teacher = p.soft_scale > 0 ? p.teacher : p.student;
  const bool hard = p.hard_weight > 0;

  RowIndex index(p, begin);
  for (int64_t r = begin; r < end;) {
    const int64_t s_offset = index.offset(p.student), t_offset = index.offset(teacher);
    const int64_t g_offset = p.gradient.data ? index.offset(p.gradient) : 0;
    const In* s = static_cast<const In*>(p.student.data) + s_offset;  // meaningless if gathered
    const In* t = static_cast<const In*>(teacher.data) + t_offset;
    In* g = p.gradient.data ? static_cast<In*>(p.gradient.data) + g_offset : nullptr;

    if constexpr (kLayout == Layout::kSideBySide) {
      const int last = p.num_row_dims - 1;
      int64_t live = p.row_sizes[last] - index.index[last];
      live = live < end - r ? live : end - r;
      live = live < kPair ? live : kPair;
      bool any = !p.weights;
      for (int64_t i = 0; i < live && !any; ++i) any = p.weights[r + i] != 0;
      if (any) {
        with_divergence<V>(p.divergence, [&](auto divergence) {
          using D = decltype(divergence);
          const auto run = hard ? loss_side_by_side<true, D, In> : loss_side_by_side<false, D, In>;
          run(call, p, s, p.student.class_stride, t, teacher.class_stride, g, p.gradient.class_stride, r, int(live));
        });
      }
      for (int64_t i = 0; i < live; ++i, ++r, index.next()) {
        if (!any) p.row_losses[r] = 0;
        if (g) clear_classes(p.gradient, g_offset + i, any ? n : 0, p.gradient_size);
      }
      continue;
    }

    const double weight = p.weights ? p.weights[r] : 1.0;
    if (weight == 0) {
      p.row_losses[r] = 0;
      if (g) clear_classes(p.gradient, g_offset, 0, p.gradient_size);
    } else {
      if constexpr (kLayout == Layout::kGathered) {  // In is Scalar here
        gather_row(p.student, s_offset, n, rows + 3 * row_size);
        gather_row(teacher, t_offset, n, rows + 4 * row_size);
        s = rows + 3 * row_size;
        t = rows + 4 * row_size;
        if (g) g = rows + 5 * row_size;
      }
      with_divergence<V>(p.divergence, [&](auto divergence) {
        using D = decltype(divergence);
        const auto run = hard ? loss_row<true, D, In> : loss_row<false, D, In>;
        p.row_losses[r] = run(call, s, t, g, hard ? p.labels[r] : 0, weight);
      });
      if (g) {
        if constexpr (kLayout == Layout::kGathered) scatter_row(p.gradient, g_offset, n, rows + 5 * row_size);
        if (p.gradient_size > n) clear_classes(p.gradient, g_offset, n, p.gradient_size);
      }
    }
    ++r;
    index.next();
  }
  if (call.stream) stream_fence();
}

template <Layout kLayout>
void loss_rows_of_type(const LossProblem& p, int64_t begin, int64_t end, void* scratch) {
  switch (p.student.dtype) {
    case DType::kFloat32:
      return loss_rows<float, kLayout>(p, begin, end, scratch);
    case DType::kBFloat16:
      return loss_rows<BFloat16, kLayout>(p, begin, end, scratch);
    case DType::kFloat16:
      return loss_rows<Float16, kLayout>(p, begin, end, scratch);
    case DType::kFloat64:
      return loss_rows<double, kLayout>(p, begin, end, scratch);
  }
}

void loss_rows_of_layout(const LossProblem& p, int64_t begin, int64_t end, void* scratch) {
  switch (layout_of(p)) {
    case Layout::kContiguous:
      return loss_rows_of_type<Layout::kContiguous>(p, begin, end, scratch);
    case Layout::kSideBySide:
      return loss_rows_of_type<Layout::kSideBySide>(p, begin, end, scratch);
    case Layout::kGathered:
      // In the arithmetic type, whatever the storage types are.
      return p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64
                 ? loss_rows<double, Layout::kGathered>(p, begin, end, scratch)
                 : loss_rows<float, Layout::kGathered>(p, begin, end, scratch);
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
  static const Kernels kernels = {scratch_bytes, loss_rows_of_layout, scale_rows};
  return kernels;
}

}  // namespace reptile_ext
