// Loss and gradient of rows of which the teacher lists k classes (sparse_distillation_loss).
//
// The formulas are the CPU's (cpu/sparse.cpp). With the student's classes in two parts, the k that are listed and the
// rest, and e_v = 2^((s_v − m) / T_s · log2 e):
//
//     list              a bit for each class of the row in shared memory, 1 for the listed
//     rest pass         R = Σ e over the rest: summed, not 1 minus something, so that it has all its digits where the
//                       list has all but 1e−30 of the student's mass; m is the largest logit of the rest alone
//     in between        the k listed classes, and the rest as one of logit m + T_s log R, are a row of k + 1 classes,
//                       which goes through the divergence in double precision
//     gradient pass     e · A for the rest, A = G / R of that class's gradient G, and what came out for the listed
//
// So neither pass knows the divergence or the tail, and the gradient is written once, class after class: that of a
// listed class is put in the place of its logit in shared memory, from where the pass takes it along.
//
// Why bits: a pass asks of every chunk of 8 classes whether any is listed, which is one byte. 1 bit a class are 16 KB
// at V = 131,072, shared by the blocks of a cluster; a sorted list would be smaller and a search for every chunk. A bit
// that is set already is a class that is listed twice.
//
// Memory sees 1 read and 1 write of each logit, and 8 + 2 (or 4, or 8) bytes of each listed class. A logit costs 2
// exponentials, 4 with hard labels at T_s ≠ 1. A block keeps its share of a row in shared memory, in the logits' type:
// each thread copies chunks there asynchronously, and orders those of the next row as the gradient pass is done with
// the room, so reads go on during all of a row's work. A row that no cluster has room for is read twice, from the L2 or
// from memory, and the listed classes' gradient written once more over what the pass left there.
//
// The part in between is double precision: (k + 1) · 4 exponentials or so a row. On a device made for that (sm_80,
// sm_90, sm_100) it is nothing at k = 64; on one with 1/64 of the throughput (sm_86, sm_89, sm_120) it may take as long
// as the passes from k = 500 or so on.

#include "halves.h"

namespace reptile_ext {
namespace {

// ----------------------------------------------------------------------------------------------------- types, memory

template <DType kType, class Value, class Stored>
struct LogitsOf {
  static constexpr DType dtype() { return kType; }
  using V = Value;
  using Bits = Stored;
};
using BFloat16Logits = LogitsOf<DType::kBFloat16, float, uint16_t>;
using Float16Logits = LogitsOf<DType::kFloat16, float, uint16_t>;
using Float32Logits = LogitsOf<DType::kFloat32, float, float>;
// Of any type, in float64: for checks.
using AnyLogits = LogitsOf<DType::kFloat64, double, double>;

template <class In>
constexpr int kWordsOf = kChunk * int(sizeof(typename In::Bits)) / 16;

template <class In>
REPTILE_EXT_DEVICE void values_of(const Raw<kWordsOf<In>>& raw, typename In::V (&x)[kChunk]) {
  if constexpr (kWordsOf<In> == 4) {
    memcpy(x, &raw, sizeof(x));
  } else {
    widen(raw, In::dtype(), x);
  }
}
template <class In>
REPTILE_EXT_DEVICE Raw<kWordsOf<In>> raw_of(const typename In::V (&x)[kChunk]) {
  Raw<kWordsOf<In>> raw;
  if constexpr (kWordsOf<In> == 1) {
    for (int i = 0; i < 4; ++i) {
      raw.word[0].word[i] = In::dtype() == DType::kBFloat16 ? bfloat16s_of(float(x[2 * i]), float(x[2 * i + 1]))
                                                            : halves_of(float(x[2 * i]), float(x[2 * i + 1]));
    }
  } else {
    memcpy(&raw, x, sizeof(raw));
  }
  return raw;
}
// What thread 0 finds of a row, for all.
struct Numbers {
  double k[4];                  // of the divergence's gradient
  double is_bounded;            // 0: the gradient of what is unbounded is 0 (divergence.h)
  double of_e;                  // of the rest's exponentials
  double of_e_1;                // of those at temperature 1
  double uniform;               // taken off every class that is not masked
  double of_q_1, log_z_1, hit;  // the cross entropy's: of_q_1 · e^(s − log_z_1), and off the label's class
  double of_listed;             // 1; NaN: the row is broken
};

// A block's shared memory; behind it the list's and the row's.
struct Shared {
  Exchange<double> exchange;
  Numbers numbers;
};
static_assert(sizeof(Shared) <= size_t(kSparseSharedBytes));

// The listed classes, in a block's shared memory: every block of a cluster has all of them.
template <class V>
struct List {
  V* student;  // [k] logits; −inf: none
  V* teacher;  // [k] log-probabilities; in the end the gradients
  uint32_t* bits;

  REPTILE_EXT_DEVICE List(char* memory, int64_t k)
      : student(reinterpret_cast<V*>(memory)), teacher(student + k), bits(nullptr) {
    bits = reinterpret_cast<uint32_t*>(memory + (2 * k * int64_t(sizeof(V)) + 15) / 16 * 16);
  }
};

// The chunks of a row that a block has in its tile: `first` and those behind it.
struct Share {
  int64_t first;
  int count;  // in this row
};

// Where a block has them: bits first, a byte a chunk, and the logits, if they are kept, in the logits' type. A thread's
// chunks of a tile, their bytes of bits with them, are its own from a row to the next: it copies and reads them, clears
// the bits and orders the next row's.
struct Slots {
  uint8_t* bits;
  char* words;  // of 16 bytes: the first of each chunk, behind all of them the second
  int share, threads, rank;
  bool keeps;

  REPTILE_EXT_DEVICE char* at(int c, int word) const { return words + (int64_t(word) * share + c) * 16; }
  // A class's value in the place of its logit.
  template <class V>
  REPTILE_EXT_DEVICE void put(DType dtype, int64_t element, V x) const {
    const int size = sizeof(V) == 8 ? 8 : int(size_of(dtype));
    const int in_chunk = int(element % kChunk) * size;
    char* const to = at(int(element / kChunk), in_chunk / 16) + in_chunk % 16;
    if constexpr (sizeof(V) == 8) {
      store_shared(reinterpret_cast<double*>(to), x);
    } else if (size == 4) {
      store_shared(reinterpret_cast<float*>(to), x);
    } else {
      store_shared(reinterpret_cast<uint16_t*>(to), dtype == DType::kBFloat16 ? bfloat16_of(x) : half_of(x));
    }
  }
};

template <class In>
struct Chunks : Slots {
  using V = typename In::V;
  static constexpr int kWords = kWordsOf<In>;

  // Which chunks of a share are whole loads of an operand, and where the first of all is.
  struct Whole {
    int first, count;
    char* base;
    REPTILE_EXT_DEVICE bool has(int c) const { return uint32_t(c - first) < uint32_t(count); }
    REPTILE_EXT_DEVICE char* at(int c) const { return base + int64_t(c) * (16 * kWords); }
  };
  REPTILE_EXT_DEVICE static Whole whole_of(const Operand& operand, int64_t offset, const Place& place,
                                           const Share& of) {
    if (In::dtype() == DType::kFloat64 || !place.aligned || of.count == 0) return {0, 0, nullptr};
    const int first = of.first == 0 && place.shift > 0 ? 1 : 0;
    const int64_t end = (place.vocab_size + place.shift) / kChunk - of.first;
    const int count = int(end < of.count ? end : of.count) - first;
    const char* const base = address<V>(operand, offset + place.first_class(of.first));
    return {first, count < 0 ? 0 : count, const_cast<char*>(base)};
  }
  // By this thread, for itself: the copies of a chunk that is whole loads.
  REPTILE_EXT_DEVICE void order(const Whole& whole, int c) const {
    if (!whole.has(c)) return;
    for (int w = 0; w < kWords; ++w) copy_128(at(c, w), whole.at(c) + 16 * w);
  }
  // ... all of its own, from c on.
  REPTILE_EXT_DEVICE void order_from(const Whole& whole, const Share& of, int c) const {
    REPTILE_EXT_NO_UNROLL
    for (; c < of.count; c += threads) order(whole, c);
  }
  REPTILE_EXT_DEVICE Raw<kWords> gathered(const LossProblem& p, const Place& place, int64_t chunk) const {
    V x[kChunk];
    load_elements(p.student, place.student, place, chunk, x);
    return raw_of<In>(x);
  }
  // The copies have come; what cannot be copied whole is loaded.
  REPTILE_EXT_DEVICE void arrive(const LossProblem& p, const Place& place, const Share& of) const {
    wait_for_copies<0>();
    const Whole whole = whole_of(p.student, place.student, place, of);
    REPTILE_EXT_NO_UNROLL
    for (int c = rank; c < of.count; c += threads) {
      // Of a row of whole loads the first and the last chunk alone may be none: go on to the last.
      if (whole.count > 0 && c != rank && of.count - 1 - c >= threads) c += (of.count - 1 - c) / threads * threads;
      if (whole.has(c)) continue;
      const Raw<kWords> raw = gathered(p, place, of.first + c);
      for (int w = 0; w < kWords; ++w) store_shared_128(at(c, w), raw.word[w]);
    }
  }
  // A chunk of this thread. `again`: of a row that is not kept, it will be read once more.
  REPTILE_EXT_DEVICE void get(const LossProblem& p, const Place& place, const Whole& whole, int64_t first_chunk, int c,
                              bool again, V (&x)[kChunk]) const {
    Raw<kWords> raw;
    if (keeps) {
      for (int w = 0; w < kWords; ++w) raw.word[w] = load_shared_any_128(at(c, w));
    } else if (whole.has(c)) {
      raw.load(whole.at(c), again);
    } else {
      raw = gathered(p, place, first_chunk + c);
    }
    values_of<In>(raw, x);
  }
  REPTILE_EXT_DEVICE void put_gradient(const LossProblem& p, const Place& place, const Whole& whole,
                                       int64_t first_chunk, int c, const V (&g)[kChunk]) const {
    if (!whole.has(c)) return store_elements(p.gradient, place, first_chunk + c, g);
    const Raw<kWords> raw = raw_of<In>(g);
    for (int w = 0; w < kWords; ++w) store_128(whole.at(c) + 16 * w, raw.word[w]);
  }
  REPTILE_EXT_DEVICE static void store_elements(const Operand& gradient, const Place& place, int64_t chunk,
                                                const V (&g)[kChunk]) {
    for (int i = 0; i < kChunk; ++i) {
      const int64_t v = place.first_class(chunk) + i;
      if (v >= 0 && v < place.vocab_size) store_class(gradient, place.gradient + v * gradient.class_stride, g[i]);
    }
  }
};

// -------------------------------------------------------------------------------------------------------- rest pass

// Sums over classes from a reference point which is the largest logit of the rest that a thread has seen.
template <class V>
struct RestSums {
  V top = negative_infinity<V>(), reference = V(0);
  V z = V(0), z_1 = V(0);      // Σ e at temperature T_s, and at 1, over the rest
  V a_1 = V(0), count = V(0);  // Σ (s − reference) over all that is not masked, and their number

  REPTILE_EXT_DEVICE void move_to(V m, V k) {
    z = z == V(0) ? z : z * exp2((reference - m) * k);
    z_1 = z_1 == V(0) ? z_1 : z_1 * exp2((reference - m) * V(kLog2E));
    a_1 = a_1 + count * (reference - m);
    top = reference = m;
  }
};

template <class V>
REPTILE_EXT_DEVICE V sum_of_eight(const V (&x)[kChunk]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

// What the passes are asked for.
template <class V>
struct Asked {
  V k;                    // log2 e / T_s
  bool separate, smooth;  // exponentials at temperature 1 besides; the sums of label smoothing
};

template <class V>
REPTILE_EXT_DEVICE void add_chunk(const Asked<V>& asked, const V (&x)[kChunk], uint32_t listed, RestSums<V>& sums) {
  V rest[kChunk];
  for (int i = 0; i < kChunk; ++i) rest[i] = x[i];
  if (listed) {
    for (int i = 0; i < kChunk; ++i) rest[i] = listed >> i & 1 ? negative_infinity<V>() : x[i];
  }
  V top = rest[0];
  for (int i = 1; i < kChunk; ++i) top = any_max(top, rest[i]);
  if (top > sums.top) sums.move_to(top, asked.k);  // rarely; a NaN shows in the sums
  V e[kChunk];
  for (int i = 0; i < kChunk; ++i) e[i] = exp2((rest[i] - sums.reference) * asked.k);
  sums.z = sums.z + sum_of_eight(e);
  if (asked.separate) {
    for (int i = 0; i < kChunk; ++i) e[i] = exp2((rest[i] - sums.reference) * V(kLog2E));
    sums.z_1 = sums.z_1 + sum_of_eight(e);
  }
  if (asked.smooth) {
    for (int i = 0; i < kChunk; ++i) e[i] = where_not_masked(x[i], x[i] - sums.reference);
    sums.a_1 = sums.a_1 + sum_of_eight(e);
    for (int i = 0; i < kChunk; ++i) e[i] = where_not_masked(x[i], V(1));
    sums.count = sums.count + sum_of_eight(e);
  }
}

// The passes are functions of their own, each with all registers; the rest of the kernel is there once for all types.
template <class In>
REPTILE_EXT_DEVICE_CALL void order_row(const LossProblem& p, const Slots& slots, const Place& place, const Share& of) {
  const Chunks<In> chunks{slots};
  chunks.order_from(chunks.whole_of(p.student, place.student, place, of), of, slots.rank);
  end_copies();
}

template <class In>
REPTILE_EXT_DEVICE_CALL void rest_pass(const LossProblem& p, const Slots& slots, const Place& place, const Share& of,
                                       const Asked<typename In::V> asked, bool clears,
                                       RestSums<typename In::V>& so_far) {
  const Chunks<In> chunks{slots};
  const auto whole = chunks.whole_of(p.student, place.student, place, of);
  RestSums<typename In::V> sums = so_far;
  REPTILE_EXT_NO_UNROLL
  for (int c = slots.rank; c < of.count; c += slots.threads) {
    typename In::V x[kChunk];
    chunks.get(p, place, whole, of.first, c, true, x);
    const uint32_t listed = load_shared(slots.bits + c);
    add_chunk(asked, x, listed, sums);
    if (clears && listed) store_shared(slots.bits + c, uint8_t(0));
  }
  so_far = sums;
}

// What the gradient pass needs of a row.
template <class V>
struct Factors {
  V reference, of_e, of_e_1, uniform, hit;
  int64_t label;
};

// Writes the gradient, and orders the next row's chunks where there is one.
template <class In>
REPTILE_EXT_DEVICE_CALL void gradient_pass(const LossProblem& p, const Slots& slots, const Place& place,
                                           const Share& of, const Asked<typename In::V> asked,
                                           const Factors<typename In::V> row, const Place* next, const Share& of_next) {
  using V = typename In::V;
  const Chunks<In> chunks{slots};
  const auto whole = chunks.whole_of(p.student, place.student, place, of);
  const auto whole_gradient = chunks.whole_of(p.gradient, place.gradient, place, of);
  const auto whole_next = next ? chunks.whole_of(p.student, next->student, *next, of_next) : whole;
  const int64_t label_chunk = row.label < 0 ? -1 : (row.label + place.shift) / kChunk - of.first;
  int c = slots.rank;
  REPTILE_EXT_NO_UNROLL
  for (; c < of.count; c += slots.threads) {
    V x[kChunk], g[kChunk];
    chunks.get(p, place, whole, of.first, c, false, x);
    for (int i = 0; i < kChunk; ++i) g[i] = exp2((x[i] - row.reference) * asked.k) * row.of_e;
    if (asked.separate) {
      for (int i = 0; i < kChunk; ++i) g[i] = g[i] + exp2((x[i] - row.reference) * V(kLog2E)) * row.of_e_1;
    }
    if (asked.smooth) {
      for (int i = 0; i < kChunk; ++i) g[i] = g[i] - where_not_masked(x[i], row.uniform);
    }
    const uint32_t listed = load_shared(slots.bits + c);
    if (listed != 0 || c == label_chunk) {
      for (int i = 0; i < kChunk; ++i) {
        if (place.first_class(of.first + c) + i == row.label) g[i] = g[i] - row.hit;
        if (listed >> i & 1) g[i] = x[i];  // its gradient
      }
      store_shared(slots.bits + c, uint8_t(0));
    }
    chunks.put_gradient(p, place, whole_gradient, of.first, c, g);
    if (next) chunks.order(whole_next, c);
  }
  if (!next) return;
  chunks.order_from(whole_next, of_next, c);  // a row that begins at another distance from 16 bytes may have one more
  end_copies();
}

// ------------------------------------------------------------------------------------------------ the row in between

// Numbers of a row that all of its threads have.
struct Between {
  double m, z;          // of the rest: the reference point, and Σ e
  double m_1, z_1;      // the same of all classes, at temperature 1
  double a_1, count_1;  // Σ (s − m_1) of what is not masked, and their number; of use with smoothing alone
  double top_s, top_t;  // of the listed
  double mass, dropped;
  bool is_all, is_broken;
  bool is_cut;    // classes are listed, and the student has none of them: nothing is known of its own
  int64_t label;  // −1: none
};

REPTILE_EXT_DEVICE double eps_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return 0x1p-52;
    case DType::kFloat32:
      return 0x1p-23;
    case DType::kFloat16:
      return 0x1p-10;
    default:
      return 0x1p-7;
  }
}

// a and b of divergence.h of an entry.
struct FewRow {
  double m_s, m_t, k_s;
  double rest_student, rest_teacher;  // of the class that stands for the rest: thread 0 has it
  REPTILE_EXT_DEVICE double a(double s) const { return (s - m_s) * k_s; }
  REPTILE_EXT_DEVICE double b(double y) const { return (y - m_t) * kLog2E; }
};

// Calls visit(student, teacher, entry) for this thread's entries, and in thread 0 for the rest, entry −1.
template <class V, class Visit>
REPTILE_EXT_DEVICE void each_entry(const List<V>& list, int64_t k, const FewRow& few, const Team<double>& block,
                                   Visit visit) {
  REPTILE_EXT_NO_UNROLL
  for (int64_t i = block.rank == 0 ? -1 : block.rank; i < k; i += i < 0 ? 1 : block.threads) {
    const double s = i < 0 ? few.rest_student : double(load_shared(list.student + i));
    const double y = i < 0 ? few.rest_teacher : double(load_shared(list.teacher + i));
    visit(s, y, i);
  }
}

// A divergence of a row of few classes: its value, in thread 0, and in all threads the gradients of their entries, by
// give(gradient, entry). The steps are those of passes.h and halves.h; the code of a class is there once for all three,
// and what it is for is asked each time: compiling takes longer than running it.
template <class D, class V, class Give>
REPTILE_EXT_DEVICE void divergence_of_few(const LossProblem& p, const List<V>& list, int64_t k, const FewRow& few,
                                          Team<double>& block, double scale, Numbers& numbers, double& value,
                                          Give give) {
  using G = typename D::Gradient;
  static_assert(G::kCoefficients <= 4);
  enum { kFirst, kMixture, kLast };
  const auto add = [](double a, double b) { return a + b; };
  double total[D::kSums] = {}, mixture[D::kMixtureSums + 1] = {}, ratio = 1, of_gradient[G::kCoefficients] = {};
  bool is_bounded = true;
  REPTILE_EXT_NO_UNROLL
  for (int step = kFirst; step <= kLast; ++step) {
    if (step == kMixture && D::kMixtureSums == 0) continue;
    if (step == kLast) {
      if (block.rank == 0) {
        Row<double> row{total, mixture, p.beta, p.one_minus_beta, 0, 0, 0, 0, 0};
        value = D::finish(row, scale, of_gradient);
        if (value < 0) value = 0;  // rounding alone; a NaN stays
        for (int i = 0; i < G::kCoefficients; ++i) store_shared(numbers.k + i, value == value ? of_gradient[i] : kNaN);
        store_shared(&numbers.is_bounded, row.unbounded == kInf ? 0.0 : 1.0);
      }
      if (!p.gradient.data) return;
      sync_block();
      for (int i = 0; i < G::kCoefficients; ++i) of_gradient[i] = load_shared(numbers.k + i);
      is_bounded = load_shared(&numbers.is_bounded) != 0;
    }
    double sums[D::kSums] = {}, mixture_sums[D::kMixtureSums + 1] = {};
    each_entry(list, k, few, block, [&](double s, double y, int64_t i) {
      const double a = few.a(s), b = few.b(y);
      double kept[D::kKept];
      D::first(a, b, D::exponential(a), D::exponential(b), sums, kept);
      if (step == kFirst) return;
      if constexpr (D::kMixtureSums > 0) {
        double found[D::kMixtureSums] = {};
        const double q = kept[0], of_teacher = kept[1] * ratio;
        D::mix(q, of_teacher, of_teacher - q, p.beta, p.one_minus_beta, found, kept);
        for (int j = 0; j < D::kMixtureSums; ++j) mixture_sums[j] += found[j];
        if (step == kMixture) return;
      }
      if constexpr (D::kUnbounded >= 0) {
        if (!is_bounded) kept[D::kUnbounded] = 0;
      }
      double of_class[G::kKept];
      for (int j = 0; j < G::kKept; ++j) of_class[j] = kept[j];
      give(G::gradient(of_class, of_gradient), i);
    });
    if (step == kFirst) {
      block.all_reduce(sums, add);
      for (int i = 0; i < D::kSums; ++i) total[i] = sums[i];
      ratio = total[0] / total[1];
    } else if (step == kMixture) {
      block.all_reduce(mixture_sums, add);
      for (int i = 0; i < D::kMixtureSums; ++i) mixture[i] = mixture_sums[i] / total[0];
    }
  }
}

// From the sums over a row to what its gradient pass needs, in `numbers`, and the gradients of the listed classes, in
// list.teacher. Returns the row's loss, in thread 0. All threads of a block call it, and every block for itself: what
// they start from is the same.
template <class V>
REPTILE_EXT_DEVICE_CALL double finish_row(const DeviceSparse& device, const List<V>& list, const Between& row,
                                          double s_label, int64_t n, Team<double>& block, Numbers& numbers) {
  const LossProblem& p = device.rows.problem;
  const int64_t k = device.k;
  const bool soft = p.soft_scale > 0 && !row.is_cut, hard = p.hard_weight > 0, is_first = block.rank == 0;
  const double temperature = p.soft_scale > 0 ? p.student_temperature : 1;
  double weight = 1, scale = 1, share = 1, value = 0, of_rest = 0;  // in thread 0
  if (is_first) {
    if (p.weights) weight = load(p.weights + n);
    scale = weight * p.gradient_scale;
    if (device.rows.divisor) scale /= load(device.rows.divisor);
    if (p.grad_output) scale *= load(p.grad_output + (p.grad_output_is_uniform ? 0 : n));
    if (soft && device.tail == Tail::kZero) share = row.mass / (1 - row.dropped);
  }
  if (soft && !(device.tail == Tail::kZero && row.mass == 0)) {
    const bool has_bucket = device.tail == Tail::kBucket && !row.is_all, has_rest = device.tail != Tail::kRestrict;
    FewRow few;
    few.k_s = kLog2E / temperature;
    few.m_s = has_rest && row.m > row.top_s ? row.m : row.top_s;
    few.m_t = has_bucket && row.top_t < 0 ? 0 : row.top_t;  // the bucket's is at most 0
    few.rest_student = few.rest_teacher = -kInf;
    // Where the student has nothing outside of the list, all others are masked; what the log-probabilities' rounding
    // leaves of the bucket there is nothing, and would be infinitely far.
    double rounding = 0;
    if (has_bucket && row.z == 0) {
      double of_logarithms = 0;
      for (int64_t i = block.rank; i < k; i += block.threads) {
        const double y = double(load_shared(list.teacher + i));
        if (y > -kInf) of_logarithms -= exp(y) * y;
      }
      of_logarithms = sum_of(block, of_logarithms);
      const double eps = eps_of(device.log_probs_dtype);
      rounding = 2 * eps * of_logarithms + 16 * (eps < 0x1p-23 ? eps : 0x1p-23) * (1 + of_logarithms);
    }
    if (is_first) {
      if (has_rest && row.z != 0) few.rest_student = row.m + temperature * log(row.z);
      if (has_bucket) {
        const double r = 1 - row.dropped - row.mass;
        if (r > 0 ? !(r < rounding) : r != r) few.rest_teacher = log(r);
      }
    }
    const double to_gradient = scale * share * p.soft_scale / temperature;
    with_divergence<double>(p.divergence, [&](auto d) {
      using D = decltype(d);
      if constexpr (!D::kExcludesLabel && !D::kRawLogits) {
        divergence_of_few<D>(p, list, k, few, block, to_gradient, numbers, value, [&](double g, int64_t i) {
          if (i < 0) {
            of_rest = g;
          } else {
            store_shared(list.teacher + i, V(g));
          }
        });
      }
    });
  } else if (p.gradient.data) {
    for (int64_t i = block.rank; i < k; i += block.threads) store_shared(list.teacher + i, V(0));
  }

  double loss = 0;
  if (is_first) {
    const bool is_masked = row.is_cut && row.z == 0;           // all over
    loss = row.is_broken || is_masked ? kNaN : row.z - row.z;  // NaN of a rest that is broken
    loss += weight * share * p.soft_scale * value;
    if (soft && device.tail == Tail::kZero && p.divergence == Divergence::kForwardKl && share > 0) {
      loss += weight * p.soft_scale * share * log(share);
    }
    double of_e = row.z == 0 ? 0 : of_rest / row.z, of_e_1 = 0;
    HardLabel of{0, 0, 0, 0};
    double log_z_1 = 0;
    if (hard) {
      log_z_1 = row.m_1 + log(row.z_1);
      const double a_sum = (row.a_1 + row.count_1 * (row.m_1 - log_z_1)) * kLog2E;
      // Exponentials from log_z_1 as the reference point add up to 1.
      of = hard_label(1, a_sum, row.count_1, (s_label - log_z_1) * kLog2E, p.label_smoothing, scale * p.hard_weight);
      loss += weight * p.hard_weight * of.loss;
      (temperature == 1 ? of_e : of_e_1) += of.to_q1 * exp(row.m - log_z_1);
    }
    const bool is_broken = loss != loss;
    store_shared(&numbers.of_e, is_broken ? kNaN : of_e);
    store_shared(&numbers.of_e_1, of_e_1);
    store_shared(&numbers.uniform, of.uniform);
    store_shared(&numbers.of_q_1, of.to_q1);
    store_shared(&numbers.log_z_1, log_z_1);
    store_shared(&numbers.hit, of.hit);
    store_shared(&numbers.of_listed, is_broken ? kNaN : 1.0);
  }
  if (!p.gradient.data) return loss;
  sync_block();
  const double of_listed = load_shared(&numbers.of_listed);
  if (!hard && of_listed == 1) return loss;
  for (int64_t i = block.rank; i < k; i += block.threads) {
    double g = double(load_shared(list.teacher + i)) * of_listed;
    const double s = double(load_shared(list.student + i));
    if (hard) {
      g += load_shared(&numbers.of_q_1) * exp(s - load_shared(&numbers.log_z_1));
      if (s > -kInf) g -= load_shared(&numbers.uniform);
      if (load(device.indices + n * k + i) == row.label) g -= load_shared(&numbers.hit);
    }
    store_shared(list.teacher + i, V(g));
  }
  return loss;
}

// ----------------------------------------------------------------------------------------------------------- kernel

struct LogProbs {
  const void* data;
  DType dtype;
};

// Calls visit(In) for the type of a call's logits.
template <class V, class Visit>
REPTILE_EXT_DEVICE void with_logits(const LossProblem& p, Visit visit) {
  if constexpr (sizeof(V) == 8) {
    visit(AnyLogits{});
  } else if (p.student.dtype == DType::kBFloat16) {
    visit(BFloat16Logits{});
  } else if (p.student.dtype == DType::kFloat16) {
    visit(Float16Logits{});
  } else {
    visit(Float32Logits{});
  }
}

template <class V>
REPTILE_EXT_KERNEL(sizeof(V) == 8 ? kSparseDoubleThreads : kSparseResidentThreads)
sparse_kernel(REPTILE_EXT_ARGUMENT DeviceSparse device, const SparsePlan plan) {
  const LossProblem& p = device.rows.problem;
  const int64_t k = device.k;
  const bool soft = p.soft_scale > 0, hard = p.hard_weight > 0, has_gradient = p.gradient.data != nullptr;
  const double temperature = soft ? p.student_temperature : 1;
  const Asked<V> asked{V(kLog2E / temperature), hard && temperature != 1, hard && p.label_smoothing > 0};
  const LogProbs log_probs{device.log_probs, device.log_probs_dtype};
  const auto larger = [](double a, double b) { return any_max(a, b); };
  const auto add = [](double a, double b) { return a + b; };

  char* const memory = dynamic_shared(plan.shared_bytes);
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const List<V> list(memory + kSparseSharedBytes, k);
  const int bits_bytes = (plan.share + 15) / 16 * 16, threads = plan.threads, rank = thread_rank();
  char* const bits = reinterpret_cast<char*>(list.bits);
  const Slots slots{reinterpret_cast<uint8_t*>(bits), bits + bits_bytes, plan.share, threads, rank, plan.keeps};
  Team<double> team{&shared.exchange, threads, rank, plan.cluster_blocks, 0};
  team.block = plan.cluster_blocks > 1 ? cluster_rank() : 0;
  for (int i = rank * 16; i < bits_bytes; i += threads * 16) store_shared_128(bits + i, Bits128{});
  if (device.rows.sum && rank == 0) store_shared(shared.exchange.losses, 0.0);
  if (plan.cluster_blocks > 1) sync_cluster();  // a peer's memory is there once it has begun

  const auto share_of = [&](const Place& place, int64_t tile) {
    const int64_t first = (tile * team.blocks + team.block) * plan.share, left = place.num_chunks - first;
    return Share{first, int(left < 0 ? 0 : left < plan.share ? left : plan.share)};
  };
  const auto counts = [&](int64_t n) { return n < p.num_rows && row_counts(device.rows, n); };
  // Where a class lies among the elements of this block's share; −1: it does not.
  const auto position_of = [&](const Place& place, const Share& of, int64_t id) -> int64_t {
    const int64_t at = id + place.shift - of.first * kChunk;
    return id >= 0 && id < p.vocab_size && at >= 0 && at < int64_t(of.count) * kChunk ? at : -1;
  };
  // Sets the bits of the list; whether any was set before.
  const auto mark_listed = [&](const Place& place, const Share& of, int64_t n) {
    bool twice = false;
    for (int64_t i = rank; i < k; i += threads) {
      const int64_t at = position_of(place, of, load(device.indices + n * k + i));
      if (at < 0) continue;
      const uint32_t bit = uint32_t(1) << (at % 32);
      twice |= (set_shared_bits(list.bits + at / 32, bit) & bit) != 0;
    }
    return twice;
  };

  const int64_t stride = num_blocks() / team.blocks;
  int64_t n = block_rank() / team.blocks;
  bool row_is_in = counts(n);
  if (row_is_in && plan.keeps) {
    const Place place(p, n);
    with_logits<V>(p, [&](auto in) { order_row<decltype(in)>(p, slots, place, share_of(place, 0)); });
  }
  for (; n < p.num_rows; n += stride) {
    const Place place(p, n);
    const bool next_is_in = counts(n + stride), orders = next_is_in && plan.keeps;
    const Place next(p, next_is_in ? n + stride : n);
    const Share of_next = share_of(next, 0);
    const bool is_in = row_is_in;
    row_is_in = next_is_in;
    if (!is_in) {  // all threads of the cluster agree
      write_ignored(p, team, place, n);
      if (orders) with_logits<V>(p, [&](auto in) { order_row<decltype(in)>(p, slots, next, of_next); });
      continue;
    }

    Between row;
    row.is_broken = has_wrong_label(p, n);
    row.label = hard && !row.is_broken ? load(p.labels + n) : -1;
    double mass = 0, dropped = 0, count = 0, cut = 0, top_s = -kInf, top_t = -kInf;
    RestSums<V> sums;
    bool is_wrong = false;
    if (plan.keeps) {
      with_logits<V>(p, [&](auto in) { Chunks<decltype(in)>{slots}.arrive(p, place, share_of(place, 0)); });
    }
    for (int64_t tile = 0; tile < plan.num_tiles; ++tile) {
      const Share of = share_of(place, tile);
      sync_block();  // all bits are 0 again, and nobody needs the list of the row before
      is_wrong |= mark_listed(place, of, n);
      if (tile == 0) {
        for (int64_t i = rank; i < k; i += threads) {
          const int64_t id = load(device.indices + n * k + i);
          V y = negative_infinity<V>();
          if (id >= 0 && id < p.vocab_size) {
            y = load_class<V>(log_probs, n * k + i);
            count += 1;
            mass += exp(double(y));
            top_t = any_max(top_t, double(y));
          } else if (id >= 0 && device.truncate) {
            cut += 1;
            dropped += exp(load_class<double>(log_probs, n * k + i));
            for (int64_t j = 0; j < i; ++j) is_wrong |= load(device.indices + n * k + j) == id;
          } else {
            is_wrong |= id != -1;
          }
          store_shared(list.teacher + i, y);
        }
      }
      sync_block();
      const bool clears = !has_gradient || plan.num_tiles > 1;
      with_logits<V>(p, [&](auto in) { rest_pass<decltype(in)>(p, slots, place, of, asked, clears, sums); });
    }
    // The listed classes' logits, when their memory is in the L2; in place, before anybody writes a gradient.
    for (int64_t i = rank; i < k; i += threads) {
      const int64_t id = load(device.indices + n * k + i);
      V s = negative_infinity<V>();
      if (id >= 0 && id < p.vocab_size) s = load_class<V>(p.student, place.student + id * p.student.class_stride);
      store_shared(list.student + i, s);
      top_s = any_max(top_s, double(s));
      is_wrong |= !(s < -negative_infinity<V>());  // broken also where the teacher has no mass, and no sum sees it
    }
    const double s_label = rank == 0 && row.label >= 0
                               ? load_class<double>(p.student, place.student + row.label * p.student.class_stride)
                               : 0;

    double tops[3] = {double(sums.top), top_s, top_t};
    team.all_reduce(tops, larger);
    row.m = tops[0];
    row.top_s = tops[1];
    row.top_t = tops[2];
    row.m_1 = row.m > row.top_s ? row.m : row.top_s;
    const bool tells = team.block == 0;  // what all blocks know
    const V z = sums.z == V(0) ? V(0) : sums.z * exp2((sums.reference - V(row.m)) * asked.k);
    double totals[8] = {double(z), is_wrong ? kNaN : 0, 0, 0, 0, 0, 0, 0};
    if (tells) {
      totals[1] += count;
      totals[2] = mass;
      totals[3] = dropped;
      totals[7] = cut;
    }
    if (hard) {
      const V z_1 = asked.separate ? sums.z_1 : sums.z;
      totals[4] = z_1 == V(0) ? 0 : double(z_1 * exp2((sums.reference - V(row.m_1)) * V(kLog2E)));
      for (int64_t i = rank; i < k && tells; i += threads) {
        totals[4] += exp(double(load_shared(list.student + i)) - row.m_1);
      }
      totals[5] = double(sums.a_1) + double(sums.count) * (double(sums.reference) - row.m_1);
      totals[6] = double(sums.count);
    }
    if (hard || device.truncate) {
      team.all_reduce(totals, add);
    } else {
      double some[3] = {totals[0], totals[1], totals[2]};
      team.all_reduce(some, add);
      for (int i = 0; i < 3; ++i) totals[i] = some[i];
    }
    row.z = totals[0];
    row.is_broken |= totals[1] != totals[1];
    row.is_all = totals[1] == double(p.vocab_size);
    row.mass = totals[2];
    row.dropped = totals[3];
    row.z_1 = totals[4];
    row.a_1 = totals[5];
    row.count_1 = totals[6];
    row.is_cut = totals[7] > 0 && totals[1] == 0;

    Team<double> block = team;
    block.blocks = 1;
    const double loss = finish_row(device, list, row, s_label, n, block, shared.numbers);
    team.block_turn = block.block_turn;
    if (rank == 0 && team.block == 0) {
      if (device.rows.sum) {
        store_shared(shared.exchange.losses, load_shared(shared.exchange.losses) + loss);
      } else {
        store(p.row_losses + n, loss);
      }
    }
    if (!has_gradient) {
      if (orders) with_logits<V>(p, [&](auto in) { order_row<decltype(in)>(p, slots, next, of_next); });
      continue;
    }

    if (plan.keeps) {
      const Share of = share_of(place, 0);
      for (int64_t i = rank; i < k; i += threads) {
        const int64_t at = position_of(place, of, load(device.indices + n * k + i));
        if (at >= 0) slots.put(p.student.dtype, at, load_shared(list.teacher + i));
      }
    }
    const V reference = row.m > -kInf ? V(row.m) : V(0);
    for (int64_t tile = 0; tile < plan.num_tiles; ++tile) {
      const Share of = share_of(place, tile);
      sync_block();
      if (plan.num_tiles > 1) {
        mark_listed(place, of, n);
        sync_block();
      }
      const Factors<V> factors{reference,
                               V(load_shared(&shared.numbers.of_e)),
                               V(load_shared(&shared.numbers.of_e_1)),
                               V(load_shared(&shared.numbers.uniform)),
                               V(load_shared(&shared.numbers.hit)),
                               row.label};
      with_logits<V>(p, [&](auto in) {
        gradient_pass<decltype(in)>(p, slots, place, of, asked, factors, orders ? &next : nullptr, of_next);
      });
    }
    if (!plan.keeps) {  // over what the pass has left there
      sync_block();
      for (int64_t tile = 0; tile < plan.num_tiles; ++tile) {
        const Share of = share_of(place, tile);
        for (int64_t i = rank; i < k; i += threads) {
          const int64_t id = load(device.indices + n * k + i);
          if (position_of(place, of, id) < 0) continue;
          store_class(p.gradient, place.gradient + id * p.gradient.class_stride, load_shared(list.teacher + i));
        }
      }
    }
  }
  if (plan.cluster_blocks > 1) sync_cluster();  // nobody leaves while a peer may still write to its memory
  if (!device.rows.sum) return;
  sync_block();
  if (team.block == 0 && rank < kWarp) {
    add_up_losses(device.rows, shared.exchange.losses, 1, block_rank() / team.blocks, num_blocks() / team.blocks);
  }
}

// --------------------------------------------------------------------------------------------------------- launchers

}  // namespace

const char* REPTILE_EXT_LAUNCHER(const DeviceSparse& problem, const SparsePlan& plan, void* stream) {
  LaunchShape shape{plan.grid_blocks, plan.threads, plan.cluster_blocks, plan.shared_bytes};
  const auto kernel = &sparse_kernel<REPTILE_EXT_VALUE>;
  const char* const error = limit_to_resident(kernel, shape);
  return error ? error : launch(kernel, shape, stream, problem, plan);
}

}  // namespace reptile_ext
