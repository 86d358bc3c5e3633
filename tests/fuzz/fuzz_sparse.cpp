// The third part of the fuzz target of fuzz_rows.cpp: the two functions of `SparseKernels`, called with a
// `SparseProblem` directly. Logits, indices and log-probabilities are in heap blocks of exactly their size.
//
//     sparse   of every row, what SPEC.md promises: ignored, broken, or near to `exact_sparse_row`
//     alone    with other garbage wherever nothing is to be read, other chunks and other scratch: the same bits
//     broken   with a row broken: the same bits in all other rows
//     order    with the list in another order: as near to `exact_sparse_row`
//     in place the gradient over the logits has the bits of a new one
//     sets     the first of these on every instruction set
//
// Whether indices are in range and differ is checked before the kernels are called (csrc/torch/ops.cpp), and tested
// in tests/test_sparse.py.
#include "../../csrc/cpu/dispatch.h"
#include "rows.h"

using namespace reptile_ext;

namespace {

// --------------------------------------------------------------------------------------------------------- a case

struct Case {
  LossProblem p;  // shape and numbers; `run` adds the pointers
  Tail tail = Tail::kBucket;
  int64_t k = 1;
  Tensor student, gradient;
  Tensor log_probs;          // [num_rows, k], one after the other
  std::vector<int64_t> ids;  // the same
  GradientMode mode = GradientMode::kSeparate;
  std::vector<int64_t> labels;         // empty: none
  Numbers weights, grad_output;        // empty: none
  std::vector<int64_t> cuts;           // rows where a chunk ends and the next one begins
  int64_t outer = 1, outer_index = 0;  // as of dense rows

  bool is_in(int64_t row) const { return weights.empty() || weights[row] != 0; }
  bool may_be_negative() const { return p.hard_weight > 0 || tail == Tail::kZero; }
  DType arithmetic() const {
    return p.student.dtype == DType::kFloat64 || log_probs.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  }
  SparseTeacher teacher(int64_t row) const {
    return {{ids.begin() + row * k, ids.begin() + (row + 1) * k}, log_probs.row(row, k), log_probs.dtype};
  }
  ExactRow exact(int64_t row) const {
    if (!is_in(row)) return {};
    return exact_sparse_row(p, tail, student.row(row, p.vocab_size), teacher(row), labels.empty() ? 0 : labels[row],
                            weights.empty() ? 1 : weights[row],
                            grad_output.empty() ? 1 : grad_output[p.grad_output_is_uniform ? 0 : row]);
  }
  std::vector<ExactRow> exact_rows() const {
    std::vector<ExactRow> rows;
    for (int64_t row = 0; row < p.num_rows; ++row) rows.push_back(exact(row));
    return rows;
  }
};

// Where a finding is reported from.
const Case* current_case = nullptr;

void describe_current(int64_t row) {
  const Case& c = *current_case;
  const LossProblem& p = c.p;
  describe(p);
  std::fprintf(
      stderr,
      "  tail %s, %lld of %lld classes; gradient_scale %g, %s grad_output, %s weights; index %lld of %lld; cut at",
      kTailNames[int(c.tail)], (long long)c.k, (long long)p.vocab_size, p.gradient_scale,
      c.grad_output.empty()      ? "no"
      : p.grad_output_is_uniform ? "one"
                                 : "row by row",
      c.weights.empty() ? "no" : "with", (long long)c.outer_index, (long long)c.outer);
  for (int64_t cut : c.cuts) std::fprintf(stderr, " %lld", (long long)cut);
  std::fprintf(stderr, "\n");
  describe("student", c.student, p);
  describe(c.mode == GradientMode::kSeparate ? "gradient" : "gradient (not used, it is in place or none)", c.gradient,
           p);
  describe("log-probabilities", c.log_probs, p);
  if (row < 0) return;
  if (!c.labels.empty()) std::fprintf(stderr, "  label %lld\n", (long long)c.labels[row]);
  const SparseTeacher teacher = c.teacher(row);
  std::fprintf(stderr, "  teacher");
  for (int64_t i = 0; i < std::min<int64_t>(c.k, 80); ++i) {
    std::fprintf(stderr, " %lld: %.9g", (long long)teacher.ids[i], teacher.log_probs[i]);
  }
  std::fprintf(stderr, "\n");
  if (p.vocab_size > 80) return;
  std::fprintf(stderr, "  logits");
  for (double x : c.student.row(row, p.vocab_size)) std::fprintf(stderr, " %.9g", x);
  std::fprintf(stderr, "\n");
}

// Other bits where there is no class, and in ignored rows.
void scramble_teacher(Case& c, Random random) {
  for (int64_t i = 0; i < c.p.num_rows * c.k; ++i) {
    const bool is_in = c.is_in(i / c.k);
    if (!is_in) c.ids[i] = random.pick({int64_t(-7), int64_t(-1), c.p.vocab_size, INT64_MIN, INT64_MAX, int64_t(0)});
    if (!is_in || c.ids[i] < 0) c.log_probs.set(i / c.k, i % c.k, random.pick({kNaN, kInf, -kInf, 3.0, -1.0}));
  }
}

// Which classes a row lists: distinct, in any order; `padding` of them none, and some that the student does not have.
void list_classes(Case& c, int64_t row, double padding, bool is_truncated, Random& random) {
  const int64_t n = c.p.vocab_size, reach = is_truncated ? n + n / 4 + 2 : n;
  std::vector<int64_t> classes;
  for (int64_t v = 0; v < reach; ++v) classes.push_back(v);
  // Near to one another, or anywhere.
  const bool is_cluster = random.bits() % 4 == 0;
  const int64_t from = is_cluster ? int64_t(random.bits() % uint64_t(reach - c.k + 1)) : 0;
  for (int64_t i = 0; i < c.k; ++i) {
    const int64_t left = is_cluster ? 1 : reach - i;
    std::swap(classes[from + i], classes[from + i + int64_t(random.bits() % uint64_t(left))]);
    c.ids[row * c.k + i] = random.between(0, 1) < padding ? -1 : classes[from + i];
  }
}

// Log-probabilities of a row whose mass is about `mass`.
void draw_log_probs(Case& c, int64_t row, double mass, double spread, Random& random) {
  Numbers scores;
  Sum sum = 0;
  for (int64_t i = 0; i < c.k; ++i) {
    scores.push_back(random.between(-spread, 0));
    if (c.ids[row * c.k + i] >= 0) sum += std::exp(scores.back());
  }
  for (int64_t i = 0; i < c.k; ++i) {
    const double y = scores[i] + std::log(mass) - (sum > 0 ? double(std::log(sum)) : 0);
    c.log_probs.set(row, i, std::min(y, 0.1));
  }
}

Case read_case(Input& in) {
  Case c;
  LossProblem& p = c.p;
  c.tail = Tail(in.below(4));
  read_numbers(p, in);
  // Which divergences go with a tail (reptile_ext/options.py).
  constexpr Divergence kOfZero[] = {Divergence::kForwardKl, Divergence::kSoftCrossEntropy};
  constexpr Divergence kWithoutP[] = {
      Divergence::kForwardKl, Divergence::kJsd,           Divergence::kSkewKl,          Divergence::kTvd,
      Divergence::kHellinger, Divergence::kSkewReverseKl, Divergence::kSoftCrossEntropy};
  const auto is_one_of = [&](const auto& some) {
    return std::find(std::begin(some), std::end(some), p.divergence) != std::end(some);
  };
  const bool fits = c.tail == Tail::kZero          ? is_one_of(kOfZero)
                    : c.tail == Tail::kRenormalize ? is_one_of(kWithoutP)
                                                   : is_one_of(kWithoutP) || p.divergence == Divergence::kReverseKl ||
                                                         p.divergence == Divergence::kSymmetricKl;
  if (!fits) {
    p.divergence = Divergence::kForwardKl;
    p.beta = 0;
    p.one_minus_beta = 1;
  }
  if (p.soft_scale == 0 && p.hard_weight == 0) p.hard_weight = 1;
  read_row_shape(p, in);
  const int64_t n = p.vocab_size;
  c.student.num_classes = c.gradient.num_classes = p.gradient_size = n;
  c.student.dtype = c.gradient.dtype = p.student.dtype = p.gradient.dtype = DType(in.below(4));
  c.mode = in.pick({GradientMode::kSeparate, GradientMode::kInPlace, GradientMode::kSeparate, GradientMode::kNone});
  const int64_t family = in.below(4);  // 3: each its own
  lay_out(c.student, in, p, family < 3 ? family : in.below(3), c.mode != GradientMode::kInPlace);
  lay_out(c.gradient, in, p, family < 3 ? family : in.below(3), false);

  Random random(in.bits(2));
  const bool is_truncated = in.one_in(4);
  c.k = in.one_in(8) ? n : 1 + in.below(std::min<int64_t>(n, in.one_in(4) ? 600 : 40));
  c.ids.resize(size_t(p.num_rows * c.k));
  c.log_probs.dtype = DType(in.below(4));
  c.log_probs.num_classes = c.k;
  for (int64_t d = p.num_row_dims, stride = c.k; d > 0; --d) {
    c.log_probs.row_strides.insert(c.log_probs.row_strides.begin(), stride);
    stride *= p.row_sizes[d - 1];
  }
  place_rows(c.log_probs, p);
  const double padding = in.pick({0.0, 0.3, 1.0, 0.9}), mass = in.pick({0.9, 0.3, 1.0, 1.02, 1e-4});
  const double spread = in.pick({3.0, 0.0, 20.0, 90.0, 800.0});
  for (int64_t row = 0; row < p.num_rows; ++row) {
    list_classes(c, row, padding, is_truncated, random);
    draw_log_probs(c, row, mass, spread, random);
  }
  read_rows(c, in, random);
  if (p.hard_weight > 0 && c.labels.empty()) std::abort();

  fill(c.student, in, p.student_temperature, nullptr);
  for (int64_t i = in.below(6); i > 0; --i) poke(c.student, in, p.student_temperature, c.labels);
  for (int64_t i = in.one_in(2) ? in.below(4) : 0; i > 0; --i) {
    const int64_t row = in.below(p.num_rows), at = in.below(c.k);
    const double value = in.pick({-kInf, kNaN, -1e4, 0.0});
    if (!std::isnan(value) || c.ids[row * c.k + at] < n) c.log_probs.set(row, at, value);
  }
  scramble_teacher(c, random);
  return c;
}

// -------------------------------------------------------------------------------------------- running the kernels

// All rows of the case, chunk by chunk. `garbage` is what fresh memory is full of.
Result run(const Case& c, const Selection& set, char garbage) {
  SparseProblem sparse;
  LossProblem& p = sparse.rows = with_outer(c);
  sparse.tail = c.tail;
  sparse.k = c.k;
  const std::vector<int64_t> ids(c.ids);
  Memory student(c.student.memory), log_probs(c.log_probs.memory), separate(c.gradient.memory.size(), garbage);
  sparse.indices = row_0(ids.data(), c, c.k);
  sparse.log_probs.data = row_0(log_probs.data(), c, c.k * int64_t(size_of(c.log_probs.dtype)));
  sparse.log_probs.dtype = c.log_probs.dtype;
  p.student = operand_of(c.student, student, c);
  const bool in_place = c.mode == GradientMode::kInPlace;
  Memory& gradient = in_place ? student : separate;
  const Tensor& layout = in_place ? c.student : c.gradient;
  const Memory before(gradient);
  if (c.mode != GradientMode::kNone) p.gradient = operand_of(layout, gradient, c);

  const std::vector<int64_t> labels(c.labels);
  const Numbers weights(c.weights), grad_output(c.grad_output);
  Result result;
  set_rows(p, c, labels, weights, grad_output, result, garbage);

  const int64_t first = c.outer_index * c.p.num_rows;
  for (size_t i = 0; i + 1 < c.cuts.size(); ++i) {
    Memory scratch(set.sparse_kernels->scratch_bytes(sparse, *set.kernels), garbage);
    set.sparse_kernels->loss_rows(sparse, *set.kernels, first + c.cuts[i], first + c.cuts[i + 1], scratch.data());
  }
  if (log_probs != c.log_probs.memory) fail(-1, "the log-probabilities were written");
  if (!in_place && student != c.student.memory) fail(-1, "the student was written");
  if (c.mode != GradientMode::kNone) result.gradient = written(layout, before, gradient);
  return result;
}

// ----------------------------------------------------------------------------------------------------- the checks

void check_alone(const Case& c, Input& in, const Selection& set, const Result& before) {
  Case other = c;
  current_case = &other;
  const Random random(in.bits(1) + 1000);
  scramble(other.student, c, random);
  scramble_teacher(other, random);
  scramble_labels(other, random);
  other.cuts = read_cuts(in, c.p.num_rows);
  check_same_bits(c, before, run(other, set, char(0xff)), [](int64_t) { return true; });
}

void check_broken(const Case& c, Input& in, const Selection& set, const Result& before) {
  Case other = c;
  current_case = &other;
  const int64_t row = in.below(c.p.num_rows), n = c.p.vocab_size, at = in.below(n);
  const double value = in.pick({kNaN, kInf, -kInf});  // of −inf, a whole row
  for (int64_t v = 0; v < n; ++v) {
    if (v == at || value == -kInf) other.student.set(row, v, value);
  }
  // Where rows share memory, more than one is broken.
  const auto is_same = [&](int64_t r) { return same_bits(c.student.row(r, n), other.student.row(r, n)); };
  const Result after = run(other, set, 0);
  check_rows(other, after, other.exact_rows());
  check_same_bits(c, before, after, [&](int64_t r) { return is_same(r) || !c.is_in(r); });
}

void check_order(const Case& c, Input& in, const Selection& set, const std::vector<ExactRow>& exact) {
  Case other = c;
  current_case = &other;
  const int64_t shift = in.below(c.k);
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    for (int64_t i = 0; i < c.k; ++i) {
      const int64_t from = (i + shift) % c.k;
      other.ids[row * c.k + i] = c.ids[row * c.k + from];
      std::memcpy(&other.log_probs.memory[other.log_probs.at(row, i)], &c.log_probs.memory[c.log_probs.at(row, from)],
                  size_of(c.log_probs.dtype));
    }
  }
  check_rows(other, run(other, set, 3), exact);
}

void check_in_place(const Case& c, const Selection& set, const Result& before) {
  if (c.mode != GradientMode::kInPlace) return;
  Case other = c;
  current_case = &other;
  other.mode = GradientMode::kSeparate;
  other.gradient = c.student;
  check_same_bits(c, before, run(other, set, 4), [](int64_t) { return true; });
}

}  // namespace

void fuzz_sparse(const uint8_t* data, size_t size, const std::vector<Selection>& sets) {
  Input in(data, size);
  describe_case = describe_current;
  const Selection chosen = sets[size_t(in.below(int64_t(sets.size())))];
  const Case c = read_case(in);
  current_case = &c;
  current_set = chosen.name;

  current_check = "sparse";
  const std::vector<ExactRow> exact = c.exact_rows();
  const Result result = run(c, chosen, 0x55);
  check_rows(c, result, exact);
  current_check = "alone";
  check_alone(c, in, chosen, result);
  current_check = "broken";
  check_broken(c, in, chosen, result);
  current_check = "order";
  check_order(c, in, chosen, exact);
  current_check = "in place";
  check_in_place(c, chosen, result);
  current_check = "sets";
  current_case = &c;
  for (const Selection& set : sets) {
    if (set.sparse_kernels == chosen.sparse_kernels) continue;
    current_set = set.name;
    check_rows(c, run(c, set, 0x55), exact);
  }
}
