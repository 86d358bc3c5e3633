// The row driver of sparse teachers: loss and gradient of rows of which the teacher lists k classes.
//
// Compiled once per instruction set, as loss_rows.cpp. The halves with something between (ARCHITECTURE, rule 5):
//
//     rest pass        read s once, keep e = 2^((s − m) / T_s · log2 e) in this thread's scratch, 0 for the k listed
//                      classes, and add it up: R, the student's mass outside of the list, without a subtraction
//     in between       the k listed classes and the others as one are a row of k + 1 classes in float64: the dense
//     kernel gradient pass    read the scratch, write the gradient once:  e · A, and what came out for each listed
//     class
//
// The class that stands for the others has the logit T_s log Σ e^(s/T_s), whose derivative by s_v is q_v / R, so that
// its gradient G goes to them as A = G / Σ e. So neither pass knows the divergence, nor what becomes of the tail.
//
// Memory sees 1 read and 1 write of each element, and a logit costs 1 exponential, or 2 with hard labels at T_s ≠ 1.
//
// The reference point m is chosen for the classes outside of the list alone: where the list has all but 1e−30 of the
// student's mass, log R has all its digits.
//
// Listed classes are few and anywhere. `slots` says of each pair of vectors whether it has any; such pairs leave the
// fast path, once in each pass: they are added up after the pass, when the listed classes are 0 in the scratch, and
// what is added to their gradient lies there as vectors. (A vector that is read right after a part of it was written
// waits.)

#include "layouts.h"
#include "passes.h"

namespace reptile_ext {
namespace {

constexpr double kLeast = 0x1p-60;  // of a tame sum, which a reference point far above the others makes too small
constexpr double kLargestProduct = 0x1p24;  // of a reference point; beyond, its rounding counts in an exponent
constexpr int64_t kAlignment = 64;

int64_t aligned(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Memory taken piece by piece; from nullptr, how much of it is needed.
struct Pieces {
  char* memory;
  int64_t bytes = 0;
  template <class T>
  T* take(int64_t n) {
    T* piece = memory ? reinterpret_cast<T*>(memory + bytes) : nullptr;
    bytes += aligned(n * int64_t(sizeof(T)));
    return piece;
  }
};

// The listed classes of a row, and behind them (entry k) the label's class if it is not among them.
template <class Scalar>
struct Listed {
  int64_t k;
  int64_t* ids;                          // [k + 1], −1: none
  double *student, *teacher, *gradient;  // [k + 1]: the dense kernel's row; the last entry is that of all other classes
  double* add;                           // [k + 1]: what is added to the gradient of an entry's class
  uint16_t* slots;                       // of each pair of vectors: 1 + where it is in the following; 0: nowhere
  int64_t num_slots;
  int64_t* pairs;    // [slots]
  uint32_t* hidden;  // [slots], bits of its elements that are listed
  Scalar* lanes;     // [slots, a pair of vectors]: `add` as vectors
  void* scratch;     // the dense kernel's

  template <int kPair>
  void place(int64_t entry, int64_t id, bool hides) {
    uint16_t& slot = slots[id / kPair];
    if (slot == 0) {
      pairs[num_slots] = id / kPair;
      hidden[num_slots++] = 0;
      slot = uint16_t(num_slots);
    }
    ids[entry] = id;
    if (hides) hidden[slot - 1] |= uint32_t(1) << (id % kPair);
  }
  // The entry of a class; −1: it is not listed.
  int64_t entry_of(int64_t id) const {
    for (int64_t i = 0; i < k; ++i) {
      if (ids[i] == id) return i;
    }
    return -1;
  }
};

template <class Scalar>
struct Scratch {
  Scalar *e, *e_1, *gathered, *gathered_gradient;
  Listed<Scalar> listed;
};

template <class V>
Scratch<typename V::Scalar> scratch_of(const SparseProblem& p, const Kernels& dense, const LossProblem& few,
                                       Pieces& pieces) {
  using Scalar = typename V::Scalar;
  const int64_t n = padded(p.rows.vocab_size), entries = padded(p.k + 1);
  Scratch<Scalar> s;
  s.e = pieces.take<Scalar>(n);
  s.e_1 = pieces.take<Scalar>(n);
  s.gathered = pieces.take<Scalar>(n);
  s.gathered_gradient = pieces.take<Scalar>(n);
  s.listed.k = p.k;
  s.listed.student = pieces.take<double>(entries);
  s.listed.teacher = pieces.take<double>(entries);
  s.listed.gradient = pieces.take<double>(entries);
  s.listed.add = pieces.take<double>(entries);
  s.listed.ids = pieces.take<int64_t>(entries);
  s.listed.slots = pieces.take<uint16_t>(n / (2 * V::kLanes) + 1);
  s.listed.pairs = pieces.take<int64_t>(entries);
  s.listed.hidden = pieces.take<uint32_t>(entries);
  s.listed.lanes = pieces.take<Scalar>(entries * 2 * V::kLanes);
  s.listed.scratch = pieces.take<char>(int64_t(dense.scratch_bytes(few)));
  return s;
}

// ------------------------------------------------------------------------------------------------- passes over the row

// The largest logit outside of the list.
template <class In, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE typename V::Scalar rest_max(const In* z, int64_t n, const Listed<typename V::Scalar>& listed) {
  constexpr int kPair = 2 * V::kLanes;
  V top = V(typename V::Scalar(kNegInf)), u, v;
  for (int64_t j = 0; j * kPair < n; ++j) {
    const int live = n - j * kPair < kPair ? int(n - j * kPair) : kPair;
    const uint32_t hidden = listed.slots[j] ? listed.hidden[listed.slots[j] - 1] : 0;
    alignas(64) In buffer[kPair];
    std::memcpy(buffer, z + j * kPair, size_t(live) * sizeof(In));
    for (int i = 0; i < kPair; ++i) {
      if (i >= live || (hidden >> i & 1)) set_negative_infinity(buffer + i);
    }
    load2(buffer, u, v);
    top = max(top, max(u, v));
  }
  return reduce_max(top);
}

// Exponentials of the classes outside of the list, to e, and their sum. kFused: `shift`, added after the logit is
// multiplied, is −reference · factor; else it is −reference, added before.
template <bool kFused, class In, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE double rest_pass(const In* z, int64_t n, typename V::Scalar shift, typename V::Scalar factor,
                                         const Listed<typename V::Scalar>& listed, typename V::Scalar* e) {
  constexpr int kLanes = V::kLanes, kPair = 2 * kLanes;
  const V c = V(shift), k = V(factor);
  const uint16_t* const slots = listed.slots;
  const int64_t num_whole = n / kPair;
  V total[2] = {V(0), V(0)};
  V s[2], x[2];
  const auto exponentials = [&](int64_t j) {
    for (int h = 0; h < 2; ++h) {
      x[h] = exp2(kFused ? fma(s[h], k, c) : (s[h] + c) * k);
      x[h].store(e + j * kPair + h * kLanes);
    }
  };
  for (int64_t begin = 0; begin < num_whole; begin += kBlock) {
    const int64_t end = begin + kBlock < num_whole ? begin + kBlock : num_whole;
    V block[2] = {V(0), V(0)};
    for (int64_t j = begin; j < end; ++j) {
      prefetch<kPair>(z + j * kPair);
      load2(z + j * kPair, s[0], s[1]);
      exponentials(j);
      if (slots[j]) continue;
      for (int h = 0; h < 2; ++h) block[h] = block[h] + x[h];
    }
    for (int h = 0; h < 2; ++h) total[h] = total[h] + block[h];
  }
  if (n % kPair) {
    load2_tail(z + num_whole * kPair, int(n % kPair), s[0], s[1]);
    exponentials(num_whole);
    for (int h = 0; h < 2 && !slots[num_whole]; ++h) total[h] = total[h] + x[h];
  }
  for (int64_t i = 0; i < listed.k; ++i) {
    const int64_t id = listed.ids[i];
    if (id >= 0) e[id / kPair * kPair + lane_of_element<In>(int(id % kPair))] = 0;
  }
  V block[2] = {V(0), V(0)};
  for (int64_t i = 0; i < listed.num_slots; ++i) {
    for (int h = 0; h < 2; ++h) block[h] = block[h] + V::load(e + listed.pairs[i] * kPair + h * kLanes);
  }
  for (int h = 0; h < 2; ++h) total[h] = total[h] + block[h];
  return reduce_add(total[0] + total[1]);
}

struct RestSum {
  double reference = 0, sum = 0;
  // log Σ e^(s / T) over the classes outside of the list, times T, less the reference point
  double logit(double temperature) const { return sum == 0 ? -kInf : temperature * log(sum); }
};

// The same from a good reference point. In float32 it is chosen so that its product with the factor is a number, which
// saves an operation a logit; unless the product is large, as its rounding comes out again in every exponent.
template <class In, class V = Arithmetic<In>>
RestSum rest_of(const In* z, int64_t n, double temperature, const Listed<typename V::Scalar>& listed, bool is_empty,
                typename V::Scalar* e) {
  using Scalar = typename V::Scalar;
  constexpr bool kMayFuse = kFusesMultiplyAdd && sizeof(Scalar) == 4;
  const Scalar factor = Scalar(kLog2E / temperature);
  RestSum rest;
  for (bool exact = false;; exact = true) {
    Scalar reference = exact ? rest_max(z, n, listed) : row_max(z, n < kProbe ? n : kProbe, -1);
    if (!exact && !(reference > kNegInf)) continue;  // the probe saw only masked classes, or a NaN
    if (reference == kNegInf) reference = 0;
    const Scalar product = reference * factor;
    if (kMayFuse && product > -kLargestProduct && product < kLargestProduct) {
      rest.reference = double(product) / double(factor);
      rest.sum = rest_pass<true>(z, n, -product, factor, listed, e);
    } else {
      rest.reference = reference;
      rest.sum = rest_pass<false>(z, n, -reference, factor, listed, e);
    }
    if (exact || is_empty || (is_tame(rest.sum) && rest.sum > kLeast)) return rest;
  }
}

// Of the classes that are not masked: Σ s − m, and their number.
template <class In, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE void sum_of_logits(const In* z, int64_t n, typename V::Scalar reference, double& sum,
                                           double& count) {
  constexpr int kPair = 2 * V::kLanes;
  const V m = V(reference);
  V totals[2] = {V(0), V(0)};
  for (int64_t begin = 0; begin < n; begin += kBlock * kPair) {
    const int64_t end = begin + kBlock * kPair < n ? begin + kBlock * kPair : n;
    V block[2] = {V(0), V(0)};
    for (int64_t i = begin; i < end; i += kPair) {
      V s[2];
      if (end - i >= kPair) {
        load2(z + i, s[0], s[1]);
      } else {
        load2_tail(z + i, int(end - i), s[0], s[1]);
      }
      for (int h = 0; h < 2; ++h) {
        block[0] = block[0] + where_not_masked(s[h], s[h] - m);
        block[1] = block[1] + where_not_masked(s[h], V(1));
      }
    }
    for (int i = 0; i < 2; ++i) totals[i] = totals[i] + block[i];
  }
  sum = reduce_add(totals[0]);
  count = reduce_add(totals[1]);
}

// What the gradient pass needs of a row.
struct RowFactors {
  double of_e = 0, of_e_1 = 0;  // of the exponentials of the classes outside of the list
  double uniform = 0;           // taken off every class that is not masked
};

template <class In, bool kHard, class V = Arithmetic<In>>
REPTILE_EXT_OUT_OF_LINE void gradient_pass(const In* z, int64_t n, const RowFactors& factors,
                                           const Listed<typename V::Scalar>& listed, const typename V::Scalar* e,
                                           const typename V::Scalar* e_1, bool stream, In* gradient) {
  using Scalar = typename V::Scalar;
  constexpr int kLanes = V::kLanes, kPair = 2 * kLanes;
  const V a = V(Scalar(factors.of_e)), a_1 = V(Scalar(factors.of_e_1)), uniform = V(Scalar(factors.uniform));
  const bool smooth = kHard && factors.uniform != 0;
  const uint16_t* const slots = listed.slots;
  Scalar* const added = listed.lanes;
  std::memset(added, 0, size_t(listed.num_slots * kPair) * sizeof(Scalar));
  for (int64_t i = 0; i <= listed.k; ++i) {
    const int64_t id = listed.ids[i];
    if (id >= 0) {
      added[(slots[id / kPair] - 1) * kPair + lane_of_element<In>(int(id % kPair))] = Scalar(listed.add[i]);
    }
  }
  const int64_t num_whole = n / kPair, tail = n % kPair;
  V g[2];
  const auto one = [&](int64_t j, bool whole) {
    for (int h = 0; h < 2; ++h) {
      const int64_t at = j * kPair + h * kLanes;
      g[h] = V::load(e + at) * a;
      if constexpr (kHard) g[h] = g[h] + V::load(e_1 + at) * a_1;
    }
    if (smooth) {
      V s[2];
      if (whole) {
        load2(z + j * kPair, s[0], s[1]);
      } else {
        load2_tail(z + j * kPair, int(tail), s[0], s[1]);
      }
      for (int h = 0; h < 2; ++h) g[h] = g[h] - where_not_masked(s[h], uniform);
    }
    if (slots[j]) {
      for (int h = 0; h < 2; ++h) g[h] = g[h] + V::load(added + (slots[j] - 1) * kPair + h * kLanes);
    }
  };
  int64_t j = 0;
  if (stream && (reinterpret_cast<uintptr_t>(gradient) & 63) == 0) {
    for (; j < num_whole; ++j) {
      one(j, true);
      stream2(gradient + j * kPair, g[0], g[1]);
    }
  } else {
    for (; j < num_whole; ++j) {
      one(j, true);
      store2(gradient + j * kPair, g[0], g[1]);
    }
  }
  if (tail) {
    one(j, false);
    store2_tail(gradient + j * kPair, int(tail), g[0], g[1]);
  }
}

// --------------------------------------------------------------------------------------------------- the listed
// classes

// Σ e^(values − top) over n numbers.
REPTILE_EXT_OUT_OF_LINE double sum_of_exponentials(const double* values, int64_t n, double top) {
  const Double k = Double(kLog2E), m = Double(top);
  Double sum = Double(0);
  int64_t i = 0;
  for (; i + Double::kLanes <= n; i += Double::kLanes) sum = sum + exp2((Double::load(values + i) - m) * k);
  if (i < n) {
    double lanes[Double::kLanes];
    for (int64_t l = 0; l < Double::kLanes; ++l) lanes[l] = i + l < n ? values[i + l] : -kInf;
    sum = sum + exp2((Double::load(lanes) - m) * k);
  }
  return reduce_add(sum);
}

double eps_of(DType dtype) {
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

// How far the teacher's mass may be from 1 where it is 1: by the rounding of its logarithms to their type, and by that
// of the log_softmax which they come from, in float32 or better.
template <class Scalar>
double rounding_of(const Listed<Scalar>& listed, double eps) {
  double of_logarithms = 0;
  for (int64_t i = 0; i < listed.k; ++i) {
    const double y = listed.teacher[i];
    if (y > -kInf) of_logarithms -= exp(y) * y;
  }
  return 2 * eps * of_logarithms + 16 * (eps < 0x1p-23 ? eps : 0x1p-23) * (1 + of_logarithms);
}

// Fills the list from the row's indices; returns the teacher's mass of classes that the student does not have, how many
// classes are listed, and whether all that are lie beyond the student's.
template <int kPair, class Scalar>
double read_list(const SparseProblem& p, int64_t row, Listed<Scalar>& listed, int64_t& count, bool& is_cut) {
  const int64_t n = p.rows.vocab_size;
  std::memset(listed.slots, 0, size_t((n + kPair - 1) / kPair) * sizeof(*listed.slots));
  listed.num_slots = 0;
  const int64_t* const indices = p.indices + row * p.k;
  double dropped = 0;
  bool any_cut = false;
  count = 0;
  with_type(p.log_probs, [&](const auto* y) {
    y += row * p.k;
    for (int64_t i = 0; i < p.k; ++i) {
      const int64_t id = indices[i];
      const double log_prob = to_float(y[i]);
      if (id >= n) dropped += exp(log_prob), any_cut = true;
      const bool is_listed = id >= 0 && id < n;
      listed.teacher[i] = is_listed ? log_prob : -kInf;
      listed.ids[i] = -1;
      if (is_listed) {
        listed.template place<kPair>(i, id, true);
        ++count;
      }
    }
  });
  listed.ids[p.k] = -1;
  is_cut = any_cut && count == 0;
  return dropped;
}

// The student's logits of the listed classes, once the row is in the cache: before, each would wait for memory.
template <class In, class Scalar>
void read_logits(const In* z, Listed<Scalar>& listed) {
  for (int64_t i = 0; i < listed.k; ++i) {
    listed.student[i] = listed.ids[i] < 0 ? -kInf : double(to_float(z[listed.ids[i]]));
  }
}

// Takes the highest logit off them, which is returned, so that it costs no digits of the others' logarithm. Where that
// is not used, they stay as they are: differences of two roundings could make equal logits of student and teacher
// differ.
template <class Scalar>
double take_off_the_highest(Tail tail, const RestSum& rest, Listed<Scalar>& listed) {
  if (tail == Tail::kRestrict || rest.sum == 0) return 0;
  double top = rest.reference;
  for (int64_t i = 0; i < listed.k; ++i) top = max(top, listed.student[i]);
  for (int64_t i = 0; i < listed.k; ++i) listed.student[i] -= top;
  return top;
}

// The dense kernel on the row of k + 1 classes, whose problem is `few`: the loss of the row, and listed.gradient.
template <class Scalar>
double loss_of_few(LossProblem& few, const Kernels& dense, double weight, const Listed<Scalar>& listed) {
  if (weight == 0) {
    std::memset(listed.gradient, 0, size_t(listed.k + 1) * sizeof(double));
    return 0;
  }
  double loss = 0;
  few.student.data = listed.student;
  few.teacher.data = listed.teacher;
  if (few.gradient.data) few.gradient.data = listed.gradient;
  few.weights = &weight;
  few.row_losses = &loss;
  dense.loss_rows(few, 0, 1, listed.scratch);
  return loss;
}

// The problem of one row of k + 1 classes.
LossProblem few_of(const SparseProblem& p) {
  LossProblem few;
  few.num_rows = 1;
  few.vocab_size = few.gradient_size = p.k + 1;
  few.student.dtype = few.teacher.dtype = few.gradient.dtype = DType::kFloat64;
  few.gradient.data = p.rows.gradient.data;
  few.divergence = p.rows.divergence;
  few.beta = p.rows.beta;
  few.one_minus_beta = p.rows.one_minus_beta;
  few.student_temperature = p.rows.student_temperature;
  few.soft_scale = p.rows.soft_scale;
  few.gradient_scale = p.rows.gradient_scale;
  return few;
}

template <class In>
void loss_of_row(const SparseProblem& p, LossProblem& few, const Kernels& dense, int64_t row, const In* z, In* gradient,
                 bool stream, const Scratch<typename Arithmetic<In>::Scalar>& scratch) {
  using V = Arithmetic<In>;
  using Scalar = typename V::Scalar;
  constexpr int kPair = 2 * V::kLanes;
  const LossProblem& rows = p.rows;
  const int64_t n = rows.vocab_size, k = p.k;
  Listed<Scalar> listed = scratch.listed;
  const double weight = rows.weights ? rows.weights[row] : 1;
  const double grad_output = rows.grad_output ? rows.grad_output[rows.grad_output_is_uniform ? 0 : row] : 1;
  int64_t count;
  bool is_cut;
  const double dropped = read_list<kPair>(p, row, listed, count, is_cut);
  const bool soft = rows.soft_scale > 0 && !is_cut, hard = rows.hard_weight > 0;
  const bool is_all = count == n;
  const int64_t label = hard ? rows.labels[row] : -1;
  int64_t label_entry = hard ? listed.entry_of(label) : -1;
  if (hard && label_entry < 0) listed.template place<kPair>(label_entry = k, label, false);
  for (int64_t i = 0; i <= k; ++i) listed.add[i] = 0;

  const double temperature = soft ? rows.student_temperature : 1;
  const RestSum rest = rest_of(z, n, temperature, listed, is_all, scratch.e);
  read_logits(z, listed);  // and the label's, before a gradient is written over them
  const double top_logit = take_off_the_highest(p.tail, rest, listed);
  const double s_label = hard ? double(to_float(z[label])) : 0;
  double loss = rest.sum - rest.sum;         // NaN of a row that is broken outside of the list
  if (is_cut && rest.sum == 0) loss = kNaN;  // one that is masked all over
  RowFactors factors;

  if (soft) {
    const double mass = sum_of_exponentials(listed.teacher, k, 0);
    double share = 1;  // what the divergence of distributions is multiplied with
    listed.student[k] = p.tail == Tail::kRestrict ? -kInf : rest.reference - top_logit + rest.logit(temperature);
    listed.teacher[k] = -kInf;
    if (p.tail == Tail::kBucket && !is_all) {
      double r = 1 - dropped - mass;
      // Where the student has nothing outside of the list, all others are masked; what the log-probabilities' rounding
      // leaves of r there is nothing, and would be infinitely far.
      if (rest.sum == 0 && r < rounding_of(listed, eps_of(p.log_probs.dtype))) r = 0;
      listed.teacher[k] = r > 0 ? log(r) : r == r ? -kInf : kNaN;
    }
    // Of what the student's classes have; which by rounding may be less than these have of it.
    if (p.tail == Tail::kZero) share = dropped > 0 ? mass / max(1 - dropped, mass) : mass;
    few.grad_output = &grad_output;
    loss += loss_of_few(few, dense, weight * share, listed);
    if (p.tail == Tail::kZero && rows.divergence == Divergence::kForwardKl && share > 0) {
      loss += weight * rows.soft_scale * share * log(share);
    }
    // Broken also where the teacher has no mass, and no arithmetic sees it.
    bool is_masked = rest.sum == 0;
    for (int64_t i = 0; i < k; ++i) {
      loss += listed.student[i] < kInf ? 0 : kNaN;
      is_masked &= listed.student[i] == -kInf;
      if (gradient) listed.add[i] = listed.gradient[i];
    }
    if (is_masked) loss = kNaN;
    if (gradient && rest.sum != 0) factors.of_e = listed.gradient[k] / rest.sum;
  }

  const Scalar* e_1 = scratch.e;
  if (hard) {
    const RestSum at_1 =
        temperature == 1 ? rest : rest_of(z, n, 1.0, listed, is_all, temperature == 1 ? scratch.e : scratch.e_1);
    if (temperature != 1) e_1 = scratch.e_1;
    // From here on, logits less the reference point at temperature 1.
    const double shift = top_logit - at_1.reference, rest_logit = at_1.logit(1);
    double top = rest_logit;
    for (int64_t i = 0; i < k; ++i) top = max(top, listed.student[i] += shift);
    const double log_z = top + log(sum_of_exponentials(listed.student, k, top) + exp(rest_logit - top));
    double a_sum = 0, unmasked = 1;
    if (rows.label_smoothing > 0) {
      const Scalar m = Scalar(at_1.reference);
      sum_of_logits(z, n, m, a_sum, unmasked);
      a_sum = (a_sum + unmasked * (m - at_1.reference - log_z)) * kLog2E;
    }
    const double factor = rows.hard_weight * weight * rows.gradient_scale * grad_output;
    // Exponentials from log_z as the reference point add up to 1.
    const HardLabel of =
        hard_label(1, a_sum, unmasked, (s_label - at_1.reference - log_z) * kLog2E, rows.label_smoothing, factor);
    loss += weight * rows.hard_weight * of.loss;
    if (gradient) {
      if (at_1.sum != 0) {  // else the reference point is nothing's
        (temperature == 1 ? factors.of_e : factors.of_e_1) += of.to_q1 * exp(-log_z);
      }
      factors.uniform = of.uniform;
      for (int64_t i = 0; i < k; ++i) {
        if (listed.ids[i] >= 0) listed.add[i] += of.to_q1 * exp(listed.student[i] - log_z);
      }
      listed.add[label_entry] -= of.hit;
    }
  }
  rows.row_losses[row] = loss;
  if (!gradient) return;
  if (loss != loss) {
    factors.of_e = kNaN;
    for (int64_t i = 0; i <= k; ++i) listed.add[i] = kNaN;
  }
  if (hard) {
    gradient_pass<In, true>(z, n, factors, listed, scratch.e, e_1, stream, gradient);
  } else {
    gradient_pass<In, false>(z, n, factors, listed, scratch.e, e_1, stream, gradient);
  }
}

// -------------------------------------------------------------------------------------------------------------- the
// rows

bool is_double(const SparseProblem& p) {
  return p.rows.student.dtype == DType::kFloat64 || p.log_probs.dtype == DType::kFloat64;
}

// Whether rows do not lie as the passes want them.
bool is_gathered(const SparseProblem& p) {
  const LossProblem& rows = p.rows;
  const bool widened = is_double(p) && rows.student.dtype != DType::kFloat64;
  return widened || rows.student.class_stride != 1 || (rows.gradient.data && rows.gradient.class_stride != 1);
}

template <class In>
void loss_rows_of_type(const SparseProblem& p, const Kernels& dense, int64_t begin, int64_t end, void* memory) {
  using V = Arithmetic<In>;
  const LossProblem& rows = p.rows;
  const int64_t n = rows.vocab_size;
  const bool gathered = is_gathered(p);
  LossProblem few = few_of(p);
  Pieces pieces{static_cast<char*>(memory)};
  const auto scratch = scratch_of<V>(p, dense, few, pieces);
  // Fresh memory larger than a cache; in place the line is in the cache already.
  const bool stream =
      !gathered && rows.gradient.data != rows.student.data && rows.num_rows * n * int64_t(sizeof(In)) >= (1 << 22);
  RowIndex index(rows, begin);
  for (int64_t r = begin; r < end; ++r, index.next()) {
    const int64_t s_offset = index.offset(rows.student),
                  g_offset = rows.gradient.data ? index.offset(rows.gradient) : 0;
    if (rows.weights && rows.weights[r] == 0) {
      rows.row_losses[r] = 0;
      if (rows.gradient.data) clear_classes(rows.gradient, g_offset, 0, n);
      continue;
    }
    const In* z;
    In* gradient = nullptr;
    if (gathered) {  // In is the type of the arithmetic here
      gather_row(rows.student, s_offset, n, scratch.gathered);
      z = reinterpret_cast<const In*>(scratch.gathered);
      if (rows.gradient.data) gradient = reinterpret_cast<In*>(scratch.gathered_gradient);
    } else {
      z = static_cast<const In*>(rows.student.data) + s_offset;
      if (rows.gradient.data) gradient = static_cast<In*>(rows.gradient.data) + g_offset;
    }
    loss_of_row(p, few, dense, r, z, gradient, stream, scratch);
    if (gathered && gradient) scatter_row(rows.gradient, g_offset, n, scratch.gathered_gradient);
  }
  if (stream) stream_fence();
}

size_t scratch_bytes(const SparseProblem& p, const Kernels& dense) {
  Pieces pieces{nullptr};
  if (is_double(p)) {
    scratch_of<Double>(p, dense, few_of(p), pieces);
  } else {
    scratch_of<Float>(p, dense, few_of(p), pieces);
  }
  return size_t(pieces.bytes);
}

void loss_rows(const SparseProblem& p, const Kernels& dense, int64_t begin, int64_t end, void* scratch) {
  switch (is_gathered(p) ? is_double(p) ? DType::kFloat64 : DType::kFloat32 : p.rows.student.dtype) {
    case DType::kFloat32:
      return loss_rows_of_type<float>(p, dense, begin, end, scratch);
    case DType::kBFloat16:
      return loss_rows_of_type<BFloat16>(p, dense, begin, end, scratch);
    case DType::kFloat16:
      return loss_rows_of_type<Float16>(p, dense, begin, end, scratch);
    case DType::kFloat64:
      return loss_rows_of_type<double>(p, dense, begin, end, scratch);
  }
}

}  // namespace

const SparseKernels& REPTILE_EXT_SPARSE_KERNELS() {
  static const SparseKernels kernels = {scratch_bytes, loss_rows};
  return kernels;
}

}  // namespace reptile_ext
