// The row driver: loss and gradient of a range of rows, one row at a time, forward and backward in one go.
//
// Compiled once per instruction set. REPTILE_EXT_LOSS_ROWS is the one name such an object exports; everything else is
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
// Hard-label cross entropy runs in the same two passes with m as its reference: at T_s = 1 it shares e_s, else it
// has e_1 = 2^((s − m) log2 e) as a third scratch row.

#include "../divergence.h"
#include "../rows.h"
#include "simd.h"

namespace reptile_ext {
namespace {

constexpr int64_t kProbe = 512;
constexpr int64_t kBlock = 4096;    // elements between roundings into the row's sums; a multiple of every pair
constexpr double kTame = 0x1p60;
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

// Sums over the classes of a block or a row. Kept twice, one for each half of a pair: two independent chains.
template <class V, class D>
struct Sums {
  V z_s = V(0), z_t = V(0);
  D divergence;
  V z_1 = V(0);    // cross entropy at temperature 1
  V a_1 = V(0);    // Σ a of the classes that are not masked, for label smoothing
  V count = V(0);  // how many those are

  void merge(const Sums& other) {
    z_s = z_s + other.z_s;
    z_t = z_t + other.z_t;
    divergence.merge(other.divergence);
    z_1 = z_1 + other.z_1;
    a_1 = a_1 + other.a_1;
    count = count + other.count;
  }
};

// First pass over one vector of classes, those whose exponentials go to scratch from i on. The call comes by value: a
// copy that no store can alias stays in registers.
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
  sums.divergence.add(e_s, e_t, a, b);
  if constexpr (kHard) {
    const V a_1 = (s - m_s) * V(call.k_1);
    if (!call.shares_exp) {
      const V e_1 = exp2(a_1);
      e_1.store(call.e_1 + i);
      sums.z_1 = sums.z_1 + e_1;
    }
    if (call.smooth) {
      sums.a_1 = sums.a_1 + where_not_masked(a_1, a_1);
      sums.count = sums.count + where_not_masked(a_1, V(1));
    }
  }
}

// One row. `gradient` may be null, or `student`'s own memory; label is read only if kHard. Returns the row's loss.
template <bool kHard, class D, class In, class V = Arithmetic<In>>
double loss_row(const Call<typename V::Scalar> call, const In* student, const In* teacher, In* gradient, int64_t label,
                double weight) {
  using Scalar = typename V::Scalar;
  constexpr int kPair = 2 * V::kLanes;
  const int64_t vocab_size = call.vocab_size;

  RowStats row;
  Sums<V, D> sums;
  Scalar m_s, m_t;
  double z_1 = 0;
  for (bool exact = vocab_size <= kProbe;; exact = true) {
    const int64_t probed = exact ? vocab_size : kProbe;
    m_s = row_max(student, probed);
    m_t = row_max(teacher, probed);
    if (!exact && !(m_s > kNegInf && m_t > kNegInf)) continue;  // the probe saw only masked classes, or a NaN

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
    sums = half_0;
    sums.merge(half_1);
    row.z_s = reduce_add(sums.z_s);
    row.z_t = reduce_add(sums.z_t);
    if (kHard) z_1 = call.shares_exp ? row.z_s : reduce_add(sums.z_1);
    if (exact || (is_tame(row.z_s) && is_tame(row.z_t) && (!kHard || is_tame(z_1)))) break;
  }
  row.log_z_s = __builtin_log(row.z_s);
  row.log_z_t = __builtin_log(row.z_t);

  double d = sums.divergence.value(row);
  if (d < 0) d = 0;  // rounding alone; a NaN stays
  double loss = call.soft_scale * d;

  double label_gradient = 0, smooth_gradient = 0;
  Scalar s_label = 0, t_label = 0;
  if (kHard) {
    s_label = to_float(student[label]);
    t_label = to_float(teacher[label]);
    const double log_z_1 = __builtin_log(z_1);
    const double at_label = kLn2 * ((s_label - m_s) * call.k_1) - log_z_1;
    double cross_entropy = -at_label;
    if (call.smooth) {
      const double count = reduce_add(sums.count);
      const double uniform = log_z_1 - kLn2 * reduce_add(sums.a_1) / count;
      cross_entropy = (1 - call.label_smoothing) * cross_entropy + call.label_smoothing * uniform;
      smooth_gradient = call.label_smoothing / count;
    }
    loss += call.hard_weight * cross_entropy;
    label_gradient = 1 - call.label_smoothing;
  }
  if (!gradient) return weight * loss;

  // Second pass: A (gradient of D) + B (q_1 − label − smoothing), with the coefficients folded into q, p and q_1.
  const double soft = weight * call.gradient_scale * call.soft_scale / call.student_temperature;
  const double hard = weight * call.gradient_scale * call.hard_weight;
  const V to_q = V(Scalar(soft / row.z_s)), to_p = V(Scalar(soft / row.z_t));
  const V to_q1 = V(kHard ? Scalar(hard / z_1) : Scalar(0));
  const V uniform = V(Scalar(hard * smooth_gradient));
  const Scalar* e_1 = call.shares_exp ? call.e_s : call.e_1;
  const auto second = [&](int64_t i, V& g_0, V& g_1) {
    const auto one = [&](int64_t j) {
      V g = sums.divergence.gradient(V::load(call.e_s + j) * to_q, V::load(call.e_t + j) * to_p);
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
  if (kHard) {
    // The label's own class, once more and in one rounding: the loop above does not know where the label is.
    const double e_s = exp2_one<V>((s_label - m_s) * call.k_s), e_t = exp2_one<V>((t_label - m_t) * call.k_t);
    const double e_1 = call.shares_exp ? e_s : exp2_one<V>((s_label - m_s) * call.k_1);
    Scalar lanes[V::kLanes];
    sums.divergence.gradient(V(Scalar(e_s * (soft / row.z_s))), V(Scalar(e_t * (soft / row.z_t)))).store(lanes);
    const double masked_or_not = s_label == kNegInf ? 0 : smooth_gradient;
    from_float(Scalar(lanes[0] + hard * (e_1 / z_1 - label_gradient - masked_or_not)), gradient + label);
  }
  return weight * loss;
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

// Rows [begin, end). kPacked: the operands' classes are not neighbours in memory, or their types differ; each row is
// gathered into scratch, widened on the way, and its gradient scattered back.
template <class In, bool kPacked>
void loss_rows(const LossProblem& p, int64_t begin, int64_t end, void* scratch) {
  using V = Arithmetic<In>;
  using Scalar = typename V::Scalar;
  const int64_t n = p.vocab_size, row_size = padded(n);
  Scalar* rows = static_cast<Scalar*>(scratch);

  Call<Scalar> call;
  call.k_s = Scalar(kLog2E / p.student_temperature);
  call.k_t = Scalar(kLog2E / p.teacher_temperature);
  call.k_1 = Scalar(kLog2E);
  call.shares_exp = p.student_temperature == 1.0;
  call.smooth = p.label_smoothing > 0;
  // Fresh memory larger than a cache; in place the line is in the cache already.
  call.stream = !kPacked && p.gradient.data != p.student.data && p.num_rows * n * int64_t(sizeof(In)) >= (1 << 22);
  call.vocab_size = n;
  call.soft_scale = p.soft_scale;
  call.hard_weight = p.hard_weight;
  call.label_smoothing = p.label_smoothing;
  call.student_temperature = p.student_temperature;
  call.gradient_scale = p.gradient_scale;
  call.e_s = rows;
  call.e_t = rows + row_size;
  call.e_1 = rows + 2 * row_size;
  In *packed_s = nullptr, *packed_t = nullptr, *packed_g = nullptr;
  if constexpr (kPacked) {  // In is Scalar here
    packed_s = rows + 3 * row_size;
    packed_t = rows + 4 * row_size;
    packed_g = rows + 5 * row_size;
  }
  // Without a soft part the teacher is not looked at; the student in its place gives D = 0 and no gradient.
  const Operand& teacher = p.soft_scale > 0 ? p.teacher : p.student;

  RowIndex index(p, begin);
  for (int64_t r = begin; r < end; ++r, index.next()) {
    const double weight = p.weights ? p.weights[r] : 1.0;
    const int64_t g_offset = p.gradient.data ? index.offset(p.gradient) : 0;
    if (weight == 0) {
      p.row_losses[r] = 0;
      if (p.gradient.data) clear_classes(p.gradient, g_offset, 0, p.gradient_size);
      continue;
    }
    const int64_t s_offset = index.offset(p.student), t_offset = index.offset(teacher);
    const In *s, *t;
    In* g = nullptr;
    if constexpr (kPacked) {
      gather_row(p.student, s_offset, n, packed_s);
      gather_row(teacher, t_offset, n, packed_t);
      s = packed_s;
      t = packed_t;
      if (p.gradient.data) g = packed_g;
    } else {
      s = static_cast<const In*>(p.student.data) + s_offset;
      t = static_cast<const In*>(teacher.data) + t_offset;
      if (p.gradient.data) g = static_cast<In*>(p.gradient.data) + g_offset;
    }
    with_divergence<V>(p.divergence, [&](auto divergence) {
      using D = decltype(divergence);
      p.row_losses[r] = p.hard_weight > 0 ? loss_row<true, D>(call, s, t, g, p.labels[r], weight)
                                          : loss_row<false, D>(call, s, t, g, 0, weight);
    });
    if (p.gradient.data) {
      if constexpr (kPacked) scatter_row(p.gradient, g_offset, n, packed_g);
      if (p.gradient_size > n) clear_classes(p.gradient, g_offset, n, p.gradient_size);
    }
  }
  if (call.stream) stream_fence();
}

}  // namespace

void REPTILE_EXT_LOSS_ROWS(const LossProblem& p, int64_t begin, int64_t end, void* scratch) {
  const bool double_arithmetic = p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
  const bool direct = p.student.dtype == p.teacher.dtype && p.student.class_stride == 1 && p.teacher.class_stride == 1 &&
                      (!p.gradient.data || p.gradient.class_stride == 1);
  if (!direct) {
    return double_arithmetic ? loss_rows<double, true>(p, begin, end, scratch)
                             : loss_rows<float, true>(p, begin, end, scratch);
  }
  switch (p.student.dtype) {
    case DType::kFloat32:
      return loss_rows<float, false>(p, begin, end, scratch);
    case DType::kBFloat16:
      return loss_rows<BFloat16, false>(p, begin, end, scratch);
    case DType::kFloat16:
      return loss_rows<Float16, false>(p, begin, end, scratch);
    case DType::kFloat64:
      return loss_rows<double, false>(p, begin, end, scratch);
  }
}

}  // namespace reptile_ext
