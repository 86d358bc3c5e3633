// The other half of the fuzz target of fuzz_rows.cpp: the three functions of `BinaryKernels`, called with a
// `BinaryProblem` directly. Every operand is a tensor of one class a row, in a heap block of exactly its size.
//
//     elements  of every element, what SPEC.md promises: ignored, broken, or near to `exact_element`; and the blocks'
//     sums alone     with other garbage wherever nothing is to be read, and other chunks: the same bits broken    with
//     an element broken: the same bits in all others equal     with the student's logits as the teacher's: exactly 0
//     weights   the blocks' sums of the weights that count; or the value that is wrong, if one is
//     scale     the gradient times the factor of its element; what is ignored stays 0, whatever its factor
//     sets      the first of these on every instruction set
#include "../../csrc/cpu/dispatch.h"
#include "drawn.h"

using namespace reptile_ext;

namespace {

enum Constant { kLabels, kWeight, kPosWeight, kGradOutput, kNumConstants };
constexpr const char* kConstantNames[] = {"labels", "weight", "pos_weight", "grad_output"};

struct Case {
  LossProblem p;  // shape, numbers and types; an element is a row of one class
  Tensor student, teacher, gradient, losses;
  Tensor constants[kNumConstants];
  bool has[kNumConstants] = {};
  bool has_losses = false, is_merged = false, teacher_is_student = false;
  GradientMode mode = GradientMode::kSeparate;
  double ignore_index = -100;
  std::vector<int64_t> cuts;           // blocks where a chunk ends and the next one begins
  int64_t outer = 1, outer_index = 0;  // as of rows; the elements are then whole blocks

  int64_t size() const { return p.num_rows; }
  int64_t num_blocks() const { return (size() + kElementsPerBlock - 1) / kElementsPerBlock; }
  bool is_soft() const { return p.soft_scale > 0; }
  bool is_hard() const { return p.hard_weight > 0; }
  bool is_double() const { return p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64; }
  const Tensor& teacher_tensor() const { return teacher_is_student ? student : teacher; }
  double constant(Constant which, int64_t i) const {
    const Tensor& t = constants[which];
    return has[which] ? load(&t.memory[t.at(i, 0)], t.dtype) : 1;
  }
  bool is_weighted_out(int64_t i) const { return constant(kWeight, i) == 0; }
  bool is_in(int64_t i) const { return !is_weighted_out(i) && !(has[kLabels] && constant(kLabels, i) == ignore_index); }
  double logit(const Tensor& t, int64_t i) const { return load(&t.memory[t.at(i, 0)], t.dtype); }
  ExactElement exact(int64_t i) const {
    if (!is_in(i)) return {};
    return exact_element(p, logit(student, i), is_soft() ? logit(teacher_tensor(), i) : 0, constant(kLabels, i),
                         constant(kPosWeight, i), constant(kWeight, i), constant(kGradOutput, i));
  }
};

const Case* current_case = nullptr;

void describe_current(int64_t i) {
  const Case& c = *current_case;
  describe(c.p);
  std::fprintf(stderr, "  elements; scale %g, ignore_index %g, %s; index %lld of %lld; blocks cut at",
               c.p.gradient_scale, c.ignore_index, c.is_merged ? "dimensions merged" : "dimensions as they are",
               (long long)c.outer_index, (long long)c.outer);
  for (int64_t cut : c.cuts) std::fprintf(stderr, " %lld", (long long)cut);
  std::fprintf(stderr, "\n");
  describe("student", c.student, c.p);
  describe(c.teacher_is_student ? "teacher (not used, it is the student)" : "teacher", c.teacher, c.p);
  describe(c.mode == GradientMode::kSeparate ? "gradient" : "gradient (not used, it is in place or none)", c.gradient,
           c.p);
  if (c.has_losses) describe("losses", c.losses, c.p);
  for (int k = 0; k < kNumConstants; ++k) {
    if (!c.has[k]) continue;
    describe(kConstantNames[k], c.constants[k], c.p);
    if (i >= 0) std::fprintf(stderr, "    here %.17g\n", c.constant(Constant(k), i));
  }
  if (i >= 0) {
    std::fprintf(stderr, "  logits %.17g %.17g\n", c.logit(c.student, i), c.logit(c.teacher_tensor(), i));
  }
}

// Few elements, or around the size of a block, or whole blocks; in up to five dimensions.
void read_shape(Case& c, Input& in) {
  LossProblem& p = c.p;
  const int64_t kind = in.below(8);
  p.vocab_size = p.gradient_size = 1;
  int64_t n = kind < 3 ? 1 + in.below(70) : kElementsPerBlock * (1 + in.below(2)) + (kind < 5 ? in.below(3) - 1 : 0);
  p.num_rows = 1;
  p.num_row_dims = int(in.below(6));
  for (int d = 0; d < p.num_row_dims; ++d) {
    const bool is_last = d == p.num_row_dims - 1;
    const int64_t factors[] = {1, 2, 4, 32, 128}, size = is_last ? n : kind < 5 ? 1 + in.below(n) : in.pick(factors);
    p.row_sizes[d] = std::max<int64_t>(std::min(size, n), 1);
    p.num_rows *= p.row_sizes[d];
    n = std::max<int64_t>(n / p.row_sizes[d], 1);
  }
  // A large problem of which this is a part; from 2^20 elements on gradients are written past the caches.
  if (p.num_rows % kElementsPerBlock == 0 && in.one_in(2)) {
    c.outer = in.pick({int64_t(1) << 10, int64_t(3), int64_t(1) << 32});
    c.outer_index = in.one_in(2) ? c.outer - 1 : 0;
  }
}

// A constant's strides and values: in full, or broadcast from any of its dimensions.
void read_constant(Case& c, Constant which, Input& in, Random& random, int64_t family) {
  Tensor& t = c.constants[which];
  c.has[which] = true;
  t.num_classes = 1;
  t.dtype = which == kGradOutput && !in.one_in(4) ? DType::kFloat64 : DType(in.below(4));
  lay_out(t, in, c.p, family, true);
  for (int64_t broadcast = in.one_in(2) ? in.below(64) : 0, d = 0; d < c.p.num_row_dims; ++d) {
    if (broadcast >> d & 1) t.row_strides[d] = 0;
  }
  place_rows(t, c.p);
  random.fill(t.memory);
  const double odds = in.pick({0.2, 0.0, 0.9});
  for (int64_t i = 0; i < c.size(); ++i) {
    double x = 0;
    if (which == kLabels) x = random.between(0, 1) < odds ? c.ignore_index : random.pick({0.0, 1.0, 0.3, 0.5, 1.0});
    if (which == kWeight) x = random.between(0, 1) < odds ? 0 : random.pick({1.0, 0.3, 3.0});
    if (which == kPosWeight) x = random.pick({1.0, 0.0, 2.5, 300.0});
    if (which == kGradOutput) x = random.pick({1.0, -1.0, 0.0, 4096.0, 1e-3});
    t.set(i, 0, x);
  }
}

Case read_case(Input& in) {
  Case c;
  LossProblem& p = c.p;
  read_numbers(p, in);
  if (needs_labels(p.divergence)) p.divergence = Divergence::kForwardKl;
  p.label_smoothing = 0;
  // Factors are in float32 here, which has no room for their T² and 1/T.
  const auto is_extreme = [](double t) { return t < 1e-20 || t > 1e20; };
  if (is_extreme(p.student_temperature) || is_extreme(p.teacher_temperature)) {
    p.student_temperature = p.teacher_temperature = 1;
    if (p.soft_scale != 0) p.soft_scale = 1;
  }
  if (p.soft_scale == 0 && p.hard_weight == 0) p.hard_weight = 1;
  read_shape(c, in);
  c.student.num_classes = c.teacher.num_classes = c.gradient.num_classes = c.losses.num_classes = 1;
  c.student.dtype = c.teacher.dtype = DType(in.below(4));
  if (in.one_in(4)) c.teacher.dtype = DType(in.below(4));
  c.mode = in.pick({GradientMode::kSeparate, GradientMode::kInPlace, GradientMode::kSeparate, GradientMode::kNone});
  c.teacher_is_student = in.one_in(16) && c.mode != GradientMode::kInPlace;
  c.gradient.dtype = c.student.dtype;
  p.student.dtype = p.gradient.dtype = c.student.dtype;
  p.teacher.dtype = c.teacher_tensor().dtype;
  c.losses.dtype = c.is_double() ? DType::kFloat64 : DType::kFloat32;
  c.has_losses = in.one_in(2);
  c.is_merged = !in.one_in(4);
  const int64_t family = in.below(4);  // 3: each its own
  const auto own = [&] { return family < 3 ? family : in.below(3); };
  lay_out(c.student, in, p, own(), c.mode != GradientMode::kInPlace);
  lay_out(c.teacher, in, p, own(), true);
  lay_out(c.gradient, in, p, own(), false);
  lay_out(c.losses, in, p, own(), false);

  Random random(in.bits(2));
  c.ignore_index = in.pick({-100.0, 0.0, 1.0, -1.0});
  if (c.is_hard() || in.one_in(4)) read_constant(c, kLabels, in, random, own());
  if (in.one_in(3)) read_constant(c, kWeight, in, random, own());
  if (in.one_in(3)) read_constant(c, kPosWeight, in, random, own());
  if (in.one_in(3)) read_constant(c, kGradOutput, in, random, own());
  c.cuts = read_cuts(in, c.num_blocks());

  fill(c.student, in, p.student_temperature, nullptr);
  fill(c.teacher, in, p.teacher_temperature, &c.student);
  for (int64_t n = in.below(6); n > 0; --n) {
    const bool teachers = in.one_in(2);
    poke(teachers ? c.teacher : c.student, in, teachers ? p.teacher_temperature : p.student_temperature, {});
  }
  return c;
}

// -------------------------------------------------------------------------------------------- running the kernels

struct Result {
  Numbers losses, gradient, sums;  // empty where there are none
};

// Memory of a tensor as the kernels see it: a copy, so that what is written to is found.
struct Placed {
  const Tensor* tensor;
  Memory memory;
  Elements* elements;
};

// The dimensions of the case for these tensors, neighbours merged where all of them allow it.
void set_elements(BinaryProblem& b, const Case& c, std::vector<Placed>& placed) {
  const auto add = [&](int64_t size, auto&& stride_of) {
    bool merges = c.is_merged && b.num_dims > 0;
    for (Placed& t : placed) {
      merges = merges && t.elements->strides[b.num_dims - 1] == stride_of(*t.tensor) * size;
    }
    if (!merges) b.sizes[b.num_dims++] = 1;
    b.sizes[b.num_dims - 1] *= size;
    for (Placed& t : placed) t.elements->strides[b.num_dims - 1] = stride_of(*t.tensor);
  };
  b.num_elements = c.size() * c.outer;
  if (c.outer > 1) add(c.outer, [](const Tensor&) { return int64_t(0); });
  for (int d = 0; d < c.p.num_row_dims; ++d) {
    add(c.p.row_sizes[d], [&](const Tensor& t) { return t.row_strides[size_t(d)]; });
  }
  if (b.num_dims == 0) b.sizes[b.num_dims++] = 1;
  for (Placed& t : placed) {
    t.elements->data = t.memory.data() + t.tensor->start * int64_t(size_of(t.tensor->dtype));
    t.elements->dtype = t.tensor->dtype;
  }
}

BinaryProblem numbers_of(const Case& c) {
  BinaryProblem b;
  b.divergence = c.p.divergence;
  b.beta = c.p.beta;
  b.one_minus_beta = c.p.one_minus_beta;
  b.student_temperature = c.p.student_temperature;
  b.teacher_temperature = c.p.teacher_temperature;
  b.soft_scale = c.p.soft_scale;
  b.hard_weight = c.p.hard_weight;
  b.scale = c.p.gradient_scale;
  b.ignore_index = c.ignore_index;
  return b;
}

// Chunk by chunk: call(first block, last block). `sums` are those of the case's blocks; others have no memory.
template <class Call>
Numbers over_blocks(const Case& c, BinaryProblem& b, Call&& call) {
  const int64_t first = c.outer_index * (c.size() / kElementsPerBlock);
  Numbers sums(size_t(c.num_blocks()), 12345);
  b.sums = reinterpret_cast<double*>(uintptr_t(sums.data()) - uintptr_t(first) * sizeof(double));
  for (size_t i = 0; i + 1 < c.cuts.size(); ++i) call(first + c.cuts[i], first + c.cuts[i + 1]);
  return sums;
}

Result run(const Case& c, const BinaryKernels& kernels, char garbage) {
  BinaryProblem b = numbers_of(c);
  std::vector<Placed> placed;
  placed.reserve(8);  // addresses that stay
  const auto add = [&](const Tensor& t, Elements& elements) -> Memory& {
    placed.push_back({&t, t.memory, &elements});
    return placed.back().memory;
  };
  Memory& student = add(c.student, b.student);
  if (!c.teacher_is_student) add(c.teacher, b.teacher);
  const bool in_place = c.mode == GradientMode::kInPlace, is_separate = c.mode == GradientMode::kSeparate;
  Memory none;
  Memory& separate = is_separate ? add(c.gradient, b.gradient) : none;
  Memory& losses = c.has_losses ? add(c.losses, b.losses) : none;
  std::memset(separate.data(), garbage, separate.size());
  std::memset(losses.data(), garbage, losses.size());
  const Memory gradient_before(in_place ? student : separate), losses_before(losses);
  Elements* const constants[] = {&b.labels, &b.weight, &b.pos_weight, &b.grad_output};
  for (int k = 0; k < kNumConstants; ++k) {
    if (c.has[k] && (k != kPosWeight || c.is_hard())) add(c.constants[k], *constants[k]);
  }
  set_elements(b, c, placed);
  if (c.teacher_is_student) b.teacher = b.student;
  if (in_place) b.gradient = b.student;

  Result result;
  result.sums = over_blocks(c, b, [&](int64_t begin, int64_t end) { kernels.loss(b, begin, end); });
  for (const Placed& t : placed) {
    const bool is_output = &t.memory == &separate || &t.memory == &losses || (in_place && &t.memory == &student);
    if (!is_output && t.memory != t.tensor->memory) fail(-1, "an operand that is only read was written");
  }
  if (c.has_losses) result.losses = written(c.losses, losses_before, losses);
  if (c.mode != GradientMode::kNone) {
    result.gradient = written(in_place ? c.student : c.gradient, gradient_before, in_place ? student : separate);
  }
  return result;
}

// ----------------------------------------------------------------------------------------------------- the checks

// `found` is what the kernels have of `right`, times `factor`.
void check_number(int64_t i, const char* what, double found, const ExactNumber& right, double factor, double unit,
                  DType dtype) {
  const double tolerance = factor * (unit * right.size + right.slack);
  if (!is_near(found, factor * right.value, tolerance, dtype)) {
    fail(i, "the %s is %.17g, right is %.17g, within %.3g", what, found, factor * right.value, tolerance);
  }
}

void check_elements(const Case& c, const Result& result, const std::vector<ExactElement>& exact) {
  const bool has_gradient = !result.gradient.empty(), has_losses = !result.losses.empty();
  const auto all = [&](int64_t i, const char* what, auto&& is_right) {
    if (has_gradient && !is_right(result.gradient[i])) fail(i, "%s: the gradient is %g", what, result.gradient[i]);
    if (has_losses && !is_right(result.losses[i])) fail(i, "%s: the loss is %g", what, result.losses[i]);
  };
  const double epsilon = c.is_double() ? 0x1p-53 : 0x1p-24;
  for (int64_t block = 0; block < c.num_blocks(); ++block) {
    ExactNumber sum;
    bool is_known = true, is_broken = false;
    const int64_t begin = block * kElementsPerBlock, end = std::min(c.size(), begin + kElementsPerBlock);
    for (int64_t i = begin; i < end; ++i) {
      const ExactElement& e = exact[i];
      if (!c.is_in(i)) {
        all(i, "is ignored", [](double x) { return x == 0; });
        continue;
      }
      is_broken |= e.is_broken;
      is_known &= e.is_broken || e.is_moderate;
      if (e.is_broken) {
        all(i, "is broken", [](double x) { return std::isnan(x); });
        continue;
      }
      if (has_losses && result.losses[i] < 0) fail(i, "the loss is negative, %g", result.losses[i]);
      if (!e.is_in_range) continue;
      all(i, "is not broken", [](double x) { return !std::isnan(x); });
      if (!e.is_moderate) continue;
      // A sum of 1,024 numbers, of which a lane has at least 4.
      sum += {e.loss.value, 1, (e.unit * e.loss.size + e.loss.slack) + 256 * epsilon * std::fabs(e.loss.value)};
      if (has_losses) check_number(i, "loss", result.losses[i], e.loss, c.p.gradient_scale, e.unit, c.losses.dtype);
      if (has_gradient) check_number(i, "gradient", result.gradient[i], e.gradient, 1, e.unit, c.student.dtype);
    }
    if (is_known && is_broken && !std::isnan(result.sums[block])) fail(begin, "the block's sum is not NaN");
    if (is_known && !is_broken) check_number(begin, "block's sum", result.sums[block], sum, 1, 0, DType::kFloat64);
  }
}

// In the elements that have the same to read as before.
template <class Predicate>
void check_same_bits(const Case& c, const Result& before, const Result& after, Predicate&& is_same) {
  for (int64_t i = 0; i < c.size(); ++i) {
    if (!is_same(i)) continue;
    if (!before.losses.empty() && !same_bits(before.losses[i], after.losses[i])) {
      fail(i, "the loss was %.17g and is %.17g", before.losses[i], after.losses[i]);
    }
    if (!before.gradient.empty() && !same_bits(before.gradient[i], after.gradient[i])) {
      fail(i, "the gradient was %.17g and is %.17g", before.gradient[i], after.gradient[i]);
    }
  }
}

// Other bits in a tensor but where is_read(element).
template <class Predicate>
void scramble(Tensor& t, const Case& c, Random random, Predicate&& is_read) {
  Memory other(t.memory.size());
  random.fill(other);
  for (int64_t i = 0; i < c.size(); ++i) {
    if (is_read(i)) std::memcpy(&other[t.at(i, 0)], &t.memory[t.at(i, 0)], size_of(t.dtype));
  }
  t.memory = other;
}

void check_alone(const Case& c, Input& in, const BinaryKernels& kernels, const Result& before) {
  Case other = c;
  current_case = &other;
  const Random random(in.bits(1) + 1000);
  const auto is_in = [&](int64_t i) { return c.is_in(i); };
  scramble(other.student, c, random, is_in);
  scramble(other.teacher, c, random, [&](int64_t i) { return c.is_in(i) && c.is_soft(); });
  scramble(other.constants[kWeight], c, random, [&](int64_t) { return c.has[kWeight]; });
  scramble(other.constants[kLabels], c, random, [&](int64_t i) { return c.has[kLabels] && !c.is_weighted_out(i); });
  scramble(other.constants[kPosWeight], c, random, [&](int64_t) { return c.has[kPosWeight]; });
  scramble(other.constants[kGradOutput], c, random, [&](int64_t i) { return c.has[kGradOutput] && c.is_in(i); });
  other.cuts = read_cuts(in, c.num_blocks());
  const Result after = run(other, kernels, char(0xff));
  check_same_bits(c, before, after, [](int64_t) { return true; });
  if (!same_bits(before.sums, after.sums)) fail(-1, "the blocks' sums are others");
}

void check_broken(const Case& c, Input& in, const BinaryKernels& kernels, const Result& before,
                  std::vector<ExactElement> exact) {
  Case other = c;
  current_case = &other;
  Tensor& t = in.one_in(2) ? other.teacher : other.student;
  t.set(in.below(c.size()), 0, in.pick({kNaN, kInf}));
  std::vector<bool> is_same;
  for (int64_t i = 0; i < c.size(); ++i) {
    is_same.push_back(!c.is_in(i) || (same_bits(c.logit(c.student, i), c.logit(other.student, i)) &&
                                      same_bits(c.logit(c.teacher_tensor(), i), c.logit(other.teacher_tensor(), i))));
    if (!is_same[size_t(i)]) exact[size_t(i)] = other.exact(i);
  }
  const Result after = run(other, kernels, 0);
  check_elements(other, after, exact);
  check_same_bits(c, before, after, [&](int64_t i) { return is_same[size_t(i)]; });
}

void check_equal(const Case& c, const BinaryKernels& kernels) {
  if (c.p.divergence == Divergence::kSoftCrossEntropy) return;
  if (c.p.divergence == Divergence::kMirroredSoftCrossEntropy) return;
  Case other = c;
  current_case = &other;
  other.teacher = c.student;
  other.p.teacher.dtype = c.student.dtype;
  other.p.teacher_temperature = c.p.student_temperature;
  other.p.hard_weight = 0;
  other.has_losses = false;  // whose type may be another now; the sums are here for all
  if (!c.is_soft()) other.p.soft_scale = 1;
  const Result result = run(other, kernels, 1);
  bool is_zero = true;
  for (int64_t i = 0; i < c.size(); ++i) {
    const ExactElement e = other.exact(i);
    is_zero &= !c.is_in(i) || (!e.is_broken && e.is_in_range);
    if (!c.is_in(i) || e.is_broken || !e.is_in_range || result.gradient.empty()) continue;
    if (result.gradient[i] != 0) fail(i, "logits are equal: the gradient is %g", result.gradient[i]);
  }
  for (double sum : result.sums) {
    if (is_zero && sum != 0) fail(-1, "logits are equal: a block's sum is %g", sum);
  }
}

void check_weights(const Case& c, Input& in, const BinaryKernels& kernels) {
  Case other = c;
  current_case = &other;
  // One element gets a value that is out of range. It is refused where that element counts.
  const int wrong = int(in.below(8));
  const int64_t at = in.below(c.size());
  double value = 0;
  if (wrong < kGradOutput && c.has[wrong] && (wrong != kLabels || c.is_in(at))) {
    value = wrong == kLabels ? in.pick({-0.5, 1.5, kNaN, kInf}) : in.pick({-1.0, kNaN, kInf, -kInf});
    other.constants[wrong].set(at, 0, value);
  }
  BinaryProblem b = numbers_of(other);
  std::vector<Placed> placed;
  placed.reserve(3);
  Elements* const constants[] = {&b.labels, &b.weight, &b.pos_weight};
  for (int k = 0; k < kGradOutput; ++k) {
    if (c.has[k]) placed.push_back({&other.constants[k], other.constants[k].memory, constants[k]});
  }
  set_elements(b, other, placed);
  WrongValue found;
  const Numbers sums = over_blocks(other, b, [&](int64_t begin, int64_t end) {
    const WrongValue in_chunk = kernels.weights(b, begin, end);
    if (!found.name) found = in_chunk;
  });
  for (const Placed& t : placed) {
    if (t.memory != t.tensor->memory) fail(-1, "a constant was written");
  }
  if (value != 0) {
    if (!found.name || std::strcmp(found.name, kConstantNames[wrong]) != 0 || !same_bits(found.value, value)) {
      fail(at, "%s is %g here; what is found is %s, %g", kConstantNames[wrong], value,
           found.name ? found.name : "nothing", found.value);
    }
    return;
  }
  if (found.name) fail(-1, "nothing is wrong; what is found is %s, %g", found.name, found.value);
  for (int64_t block = 0; block < c.num_blocks(); ++block) {
    double sum = 0;
    for (int64_t i = block * kElementsPerBlock; i < std::min(c.size(), (block + 1) * kElementsPerBlock); ++i) {
      if (c.is_in(i)) sum += c.constant(kWeight, i);
    }
    if (std::fabs(sums[block] - sum) > 1e-12 * sum) {
      fail(block * kElementsPerBlock, "a block's weights are %.17g, right is %.17g", sums[block], sum);
    }
  }
}

void check_scale(const Case& c, Input& in, const BinaryKernels& kernels) {
  current_case = &c;
  Random random(in.bits(1));
  Case other = c;
  random.fill(other.gradient.memory);
  for (int64_t i = 0; i < c.size(); ++i) {
    if (!c.is_in(i)) other.gradient.set(i, 0, 0);
  }
  if (!c.has[kGradOutput]) read_constant(other, kGradOutput, in, random, 0);
  Tensor& factors = other.constants[kGradOutput];
  for (int64_t i = 0; in.one_in(4) && i < c.size(); ++i) {  // 0 · ∞, if it were multiplied
    if (!c.is_in(i)) factors.set(i, 0, random.pick({kInf, kNaN}));
  }
  BinaryProblem b = numbers_of(c);
  std::vector<Placed> placed;
  placed.reserve(4);
  placed.push_back({&other.gradient, other.gradient.memory, &b.gradient});
  placed.push_back({&factors, factors.memory, &b.grad_output});
  if (c.has[kLabels]) placed.push_back({&c.constants[kLabels], c.constants[kLabels].memory, &b.labels});
  if (c.has[kWeight]) placed.push_back({&c.constants[kWeight], c.constants[kWeight].memory, &b.weight});
  set_elements(b, c, placed);
  over_blocks(c, b, [&](int64_t begin, int64_t end) { kernels.scale(b, begin, end); });
  const Numbers found = written(c.gradient, other.gradient.memory, placed[0].memory);
  for (int64_t i = 0; i < c.size(); ++i) {
    const DType dtype = c.gradient.dtype;
    const double g = other.logit(other.gradient, i), factor = other.constant(kGradOutput, i);
    char rounded[8];
    store(rounded, dtype, dtype == DType::kFloat64 ? g * factor : double(float(g) * float(factor)));
    const double right = c.is_in(i) ? load(rounded, dtype) : 0;
    if (found[size_t(i)] != right && !(std::isnan(found[size_t(i)]) && std::isnan(right))) {
      fail(i, "%.9g times %g is %.9g; right is %.9g", g, factor, found[size_t(i)], right);
    }
  }
}

}  // namespace

void fuzz_elements(const uint8_t* data, size_t size, const std::vector<Selection>& sets) {
  Input in(data, size);
  describe_case = describe_current;
  const Selection chosen = sets[size_t(in.below(int64_t(sets.size())))];
  const BinaryKernels& kernels = *chosen.binary_kernels;
  const Case c = read_case(in);
  current_case = &c;
  current_set = chosen.name;

  current_check = "elements";
  std::vector<ExactElement> exact;
  for (int64_t i = 0; i < c.size(); ++i) exact.push_back(c.exact(i));
  const Result result = run(c, kernels, 0x55);
  check_elements(c, result, exact);
  current_check = "alone";
  check_alone(c, in, kernels, result);
  current_check = "broken";
  check_broken(c, in, kernels, result, exact);
  current_check = "equal";
  check_equal(c, kernels);
  current_check = "weights";
  check_weights(c, in, kernels);
  current_check = "scale";
  check_scale(c, in, kernels);
  current_check = "sets";
  current_case = &c;
  for (const Selection& set : sets) {
    if (set.binary_kernels == chosen.binary_kernels) continue;
    current_set = set.name;
    check_elements(c, run(c, *set.binary_kernels, 0x55), exact);
  }
}
