// A coverage-guided fuzz target (libFuzzer) for the row driver: the three functions of `Kernels`, called with a
// `LossProblem` directly, without torch. tests/fuzz.sh builds the kernels with AddressSanitizer and
// UndefinedBehaviorSanitizer and runs it.
//
// The bytes of an input choose a case: shape, layouts, types, divergence, numbers and logits (`read_case`). Every
// operand is in a heap block of exactly its size, so that one element too far is seen. Then:
//
//     rows     of every row, what SPEC.md promises: out, broken, or near to `exact_row` (`check_rows`)
//     sets     that on every instruction set, and between each other they are nearer still
//     alone    with other garbage wherever nothing is to be read, other chunks and other scratch: the same bits
//     broken   with a row broken: the same bits in all other rows
//     equal    with the student's logits as the teacher's: exactly 0
//     scale    scale_rows multiplies every element by the factor of its row, and nothing else
//
// The first byte may also choose the kernels of elements (fuzz_elements.cpp) or of sparse teachers (fuzz_sparse.cpp).
//
// Of all runs it is checked that they write the gradient, and no byte between its elements. A finding prints the case
// and aborts; libFuzzer writes the input to a file, which tests/fuzz.sh --replay FILE runs again.

#include <sanitizer/asan_interface.h>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/instruction_sets.h"
#include "rows.h"

using namespace reptile_ext;

namespace {

// --------------------------------------------------------------------------------------------------------- a case

struct Case {
  LossProblem p;  // shape and numbers; `run` adds the pointers
  Tensor student, teacher, gradient;
  GradientMode mode = GradientMode::kSeparate;
  bool teacher_is_student = false;  // one and the same tensor
  std::vector<int64_t> labels;      // empty: none
  Numbers weights, grad_output;     // empty: none
  std::vector<int64_t> cuts;        // rows where a chunk ends and the next one begins; 0 and num_rows among them

  // The rows are those at one index of an outermost dimension of this size. Nobody asks for the others, and they have
  // no memory: so a small case has large row numbers, or is a small part of a large problem.
  int64_t outer = 1, outer_index = 0;

  bool is_in(int64_t row) const { return weights.empty() || weights[row] != 0; }
  bool is_soft() const { return p.soft_scale > 0; }
  bool may_be_negative() const { return p.hard_weight > 0; }  // by its rounding alone
  const Tensor& teacher_tensor() const { return teacher_is_student ? student : teacher; }
  DType arithmetic() const {
    return p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }
  ExactRow exact(int64_t row) const {
    if (!is_in(row)) return {};
    return exact_row(p, student.row(row, p.vocab_size), is_soft() ? teacher_tensor().row(row, p.vocab_size) : Numbers(),
                     labels.empty() ? 0 : labels[row], weights.empty() ? 1 : weights[row],
                     grad_output.empty() ? 1 : grad_output[p.grad_output_is_uniform ? 0 : row]);
  }
};

// Where a finding is reported from.
const Case* current_case = nullptr;

void describe_current(int64_t row) {
  const Case& c = *current_case;
  const LossProblem& p = c.p;
  describe(p);
  std::fprintf(stderr, "  gradient_scale %g, %s grad_output, %s weights; index %lld of %lld; %lld classes; cut at",
               p.gradient_scale,
               c.grad_output.empty()      ? "no"
               : p.grad_output_is_uniform ? "one"
                                          : "row by row",
               c.weights.empty() ? "no" : "with", (long long)c.outer_index, (long long)c.outer,
               (long long)p.vocab_size);
  for (int64_t cut : c.cuts) std::fprintf(stderr, " %lld", (long long)cut);
  std::fprintf(stderr, "\n");
  describe("student", c.student, p);
  describe(c.teacher_is_student ? "teacher (not used, it is the student)" : "teacher", c.teacher, p);
  describe(c.mode == GradientMode::kSeparate ? "gradient" : "gradient (not used, it is in place or none)", c.gradient,
           p);
  if (row >= 0 && p.vocab_size <= 80) {
    if (!c.labels.empty()) std::fprintf(stderr, "  label %lld\n", (long long)c.labels[row]);
    for (const Tensor* t : {&c.student, &c.teacher_tensor()}) {
      std::fprintf(stderr, "  logits");
      for (double x : t->row(row, p.vocab_size)) std::fprintf(stderr, " %.9g", x);
      std::fprintf(stderr, "\n");
    }
  }
}

Case read_case(Input& in) {
  Case c;
  LossProblem& p = c.p;
  read_numbers(p, in);
  read_row_shape(p, in);
  c.student.num_classes = c.teacher.num_classes = p.vocab_size;
  if (in.one_in(4)) (in.one_in(2) ? c.student : c.teacher).num_classes += 1 + in.below(40);
  p.gradient_size = c.student.num_classes;
  c.student.dtype = c.teacher.dtype = DType(in.below(4));
  if (in.one_in(4)) c.teacher.dtype = DType(in.below(4));
  c.mode = in.pick({GradientMode::kSeparate, GradientMode::kInPlace, GradientMode::kSeparate, GradientMode::kNone});
  c.teacher_is_student = in.one_in(16) && c.student.num_classes == p.vocab_size;
  p.student.dtype = p.gradient.dtype = c.gradient.dtype = c.student.dtype;
  p.teacher.dtype = c.teacher_tensor().dtype;
  c.gradient.num_classes = c.student.num_classes;
  const int64_t family = in.below(4);  // 3: each its own
  lay_out(c.student, in, p, family < 3 ? family : in.below(3), c.mode != GradientMode::kInPlace);
  lay_out(c.teacher, in, p, family < 3 ? family : in.below(3), true);
  lay_out(c.gradient, in, p, family < 3 ? family : in.below(3), false);

  Random random(in.bits(2));
  read_rows(c, in, random);

  fill(c.student, in, p.student_temperature, nullptr);
  fill(c.teacher, in, p.teacher_temperature, &c.student);
  for (int64_t n = in.below(6); n > 0; --n) {
    const bool teachers = in.one_in(2);
    poke(teachers ? c.teacher : c.student, in, teachers ? p.teacher_temperature : p.student_temperature, c.labels);
  }
  return c;
}

// -------------------------------------------------------------------------------------------- running the kernels

// All rows of the case, chunk by chunk. `garbage` is what fresh memory is full of.
Result run(const Case& c, const Kernels& kernels, char garbage) {
  LossProblem p = with_outer(c);
  Memory student(c.student.memory), teacher(c.teacher.memory), separate(c.gradient.memory.size(), garbage);
  p.student = operand_of(c.student, student, c);
  p.teacher = c.teacher_is_student ? p.student : operand_of(c.teacher, teacher, c);
  const bool in_place = c.mode == GradientMode::kInPlace;
  Memory& gradient = in_place ? student : separate;
  const Tensor& layout = in_place ? c.student : c.gradient;
  const Memory before(gradient);
  if (c.mode != GradientMode::kNone) p.gradient = operand_of(layout, gradient, c);

  const std::vector<int64_t> labels(c.labels);
  const Numbers weights(c.weights), grad_output(c.grad_output);
  Result result;
  set_rows(p, c, labels, weights, grad_output, result, garbage);

  // Without a soft part the teacher is not read at all.
  const bool is_hidden = !c.is_soft() && !c.teacher_is_student;
  if (is_hidden) ASAN_POISON_MEMORY_REGION(teacher.data(), teacher.size());
  const int64_t first = c.outer_index * c.p.num_rows;
  for (size_t i = 0; i + 1 < c.cuts.size(); ++i) {
    Memory scratch(kernels.scratch_bytes(p), garbage);
    kernels.loss_rows(p, first + c.cuts[i], first + c.cuts[i + 1], scratch.data());
  }
  if (is_hidden) ASAN_UNPOISON_MEMORY_REGION(teacher.data(), teacher.size());

  if (teacher != c.teacher.memory) fail(-1, "the teacher was written");
  if (!in_place && student != c.student.memory) fail(-1, "the student was written");
  if (c.mode != GradientMode::kNone) result.gradient = written(layout, before, gradient);
  return result;
}

// ----------------------------------------------------------------------------------------------------- the checks

// The sets compute the same exponents and round differently only what they do with them. So they are near to each other
// also where the logits are too far apart to be near to what is right. (What is between the passes is float64 and, of
// float64 logits, rounds like the passes: log-odds of up to 700.)
void check_agreement(const Case& c, const Result& a, const Result& b, const std::vector<ExactRow>& exact) {
  const double unit = c.arithmetic() == DType::kFloat64 ? 0x1p-53 * 4096 : 0x1p-24 * 64;
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    const ExactRow& e = exact[row];
    if (!c.is_in(row) || e.is_broken || !e.is_in_range) continue;
    const double x = a.losses[row], y = b.losses[row];
    if (x != y && !(std::fabs(x - y) <= unit * e.loss_size + e.loss_slack)) {
      fail(row, "the loss is %.17g, and on another instruction set %.17g", x, y);
    }
    for (int64_t v = 0; !a.gradient.empty() && v < c.p.vocab_size; ++v) {
      const double g = a.gradient[row * c.p.gradient_size + v], h = b.gradient[row * c.p.gradient_size + v];
      if (!is_near(g, h, unit * e.gradient_size[v] + e.gradient_slack[v], c.student.dtype)) {
        fail(row, "the gradient of class %lld is %.17g, and on another instruction set %.17g", (long long)v, g, h);
      }
    }
  }
}
void check_alone(const Case& c, Input& in, const Kernels& kernels, const Result& before) {
  Case other = c;
  current_case = &other;
  const Random random(in.bits(1) + 1000);
  scramble(other.student, c, random);
  scramble(other.teacher, c, random);
  scramble_labels(other, random);
  other.cuts = read_cuts(in, c.p.num_rows);
  check_same_bits(c, before, run(other, kernels, char(0xff)), [](int64_t) { return true; });
}

void check_broken(const Case& c, Input& in, const Kernels& kernels, const Result& before, std::vector<ExactRow> exact) {
  Case other = c;
  current_case = &other;
  const int64_t row = in.below(c.p.num_rows), n = c.p.vocab_size, at = in.below(n);
  const double value = in.pick({kNaN, kInf, -kInf});  // of −inf, a whole row
  Tensor& t = in.one_in(2) ? other.teacher : other.student;
  for (int64_t v = 0; v < n; ++v) {
    if (v == at || value == -kInf) t.set(row, v, value);
  }
  // Where rows share memory, more than one is broken.
  std::vector<bool> is_same;
  for (int64_t r = 0; r < c.p.num_rows; ++r) {
    is_same.push_back(same_bits(c.student.row(r, n), other.student.row(r, n)) &&
                      same_bits(c.teacher_tensor().row(r, n), other.teacher_tensor().row(r, n)));
    if (!is_same[r]) exact[r] = other.exact(r);
  }
  const Result after = run(other, kernels, 0);
  check_rows(other, after, exact);
  check_same_bits(c, before, after, [&](int64_t r) { return is_same[r] || !c.is_in(r); });
}

void check_equal(const Case& c, const Kernels& kernels) {
  if (c.p.divergence == Divergence::kSoftCrossEntropy) return;
  if (c.p.divergence == Divergence::kMirroredSoftCrossEntropy) return;
  Case other = c;
  current_case = &other;
  other.teacher = c.student;
  other.p.teacher.dtype = c.student.dtype;
  other.p.teacher_temperature = c.p.student_temperature;
  other.p.hard_weight = 0;
  if (!c.is_soft()) other.p.soft_scale = 1;
  const Result result = run(other, kernels, 1);
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    const ExactRow e = other.exact(row);
    if (!c.is_in(row) || e.is_broken || !e.is_in_range) continue;
    if (result.losses[row] != 0) fail(row, "logits are equal: the loss is %g", result.losses[row]);
    for (int64_t v = 0; !result.gradient.empty() && v < c.p.gradient_size; ++v) {
      const double g = result.gradient[row * c.p.gradient_size + v];
      if (g != 0) fail(row, "logits are equal: the gradient of class %lld is %g", (long long)v, g);
    }
  }
}

void check_scale(const Case& c, Input& in, const Kernels& kernels) {
  current_case = &c;
  const Tensor& t = c.gradient;
  Random random(in.bits(1));
  Memory before(t.memory.size());
  random.fill(before);
  const bool is_uniform = in.one_in(2);
  Numbers factors(size_t(is_uniform ? 1 : c.p.num_rows));
  for (double& f : factors) f = random.pick({0.1, 65536.0, 0.0, -3.0, 1.0, 1e-7});

  LossProblem p = with_outer(c);
  Memory after(before);
  p.gradient = operand_of(t, after, c);
  const int64_t first = c.outer_index * c.p.num_rows;
  for (size_t i = 0; i + 1 < c.cuts.size(); ++i) {
    kernels.scale_rows(p, is_uniform ? factors.data() : row_0(factors.data(), c), is_uniform, first + c.cuts[i],
                       first + c.cuts[i + 1]);
  }
  written(t, before, after);
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    const double factor = factors[size_t(is_uniform ? 0 : row)];
    for (int64_t v = 0; v < t.num_classes; ++v) {
      const double g = load(&before[t.at(row, v)], t.dtype), found = load(&after[t.at(row, v)], t.dtype);
      const double product = t.dtype == DType::kFloat64 ? g * factor : double(float(g) * float(factor));
      char rounded[8];
      store(rounded, t.dtype, product);
      const double right = load(rounded, t.dtype);
      // The bfloat16 instructions take a denormal for 0.
      const bool is_flushed = t.dtype == DType::kBFloat16 && found == 0 && std::fabs(product) < 0x1p-126;
      if (found != right && !(std::isnan(found) && std::isnan(right)) && !is_flushed) {
        fail(row, "class %lld, %.9g times %g is %.9g; right is %.9g", (long long)v, g, factor, found, right);
      }
    }
  }
}

std::vector<Selection> supported_sets() {
  std::vector<Selection> sets;
  for (const InstructionSet& set : kInstructionSets) {
    if (set.is_supported()) sets.push_back(select_instruction_set(set.name));
  }
  return sets;
}

}  // namespace

void fuzz_elements(const uint8_t* data, size_t size, const std::vector<Selection>& sets);  // fuzz_elements.cpp
void fuzz_sparse(const uint8_t* data, size_t size, const std::vector<Selection>& sets);    // fuzz_sparse.cpp

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<Selection> sets = supported_sets();
  Input in(data, size);
  const int64_t target = in.below(3);
  if (target > 0) {
    (target == 1 ? fuzz_elements : fuzz_sparse)(data + 1, size - 1, sets);
    return 0;
  }
  describe_case = describe_current;
  const Selection chosen = sets[size_t(in.below(int64_t(sets.size())))];
  const Kernels& kernels = *chosen.kernels;
  const Case c = read_case(in);
  current_case = &c;
  current_set = chosen.name;

  current_check = "rows";
  std::vector<ExactRow> exact;
  for (int64_t row = 0; row < c.p.num_rows; ++row) exact.push_back(c.exact(row));
  const Result result = run(c, kernels, 0x55);
  check_rows(c, result, exact);
  current_check = "alone";
  check_alone(c, in, kernels, result);
  current_check = "broken";
  check_broken(c, in, kernels, result, exact);
  current_check = "equal";
  check_equal(c, kernels);
  current_check = "scale";
  check_scale(c, in, kernels);
  current_check = "sets";
  for (const Selection& set : sets) {
    if (set.kernels == chosen.kernels) continue;
    current_set = set.name;
    const Result other = run(c, *set.kernels, 0x55);
    check_rows(c, other, exact);
    check_agreement(c, other, result, exact);
  }
  return 0;
}
