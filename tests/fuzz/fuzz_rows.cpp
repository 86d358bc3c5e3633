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
// and of all runs that they write the gradient, and no byte between its elements. A finding prints the case and aborts;
// libFuzzer writes the input to a file, which tests/fuzz.sh --replay FILE runs again.

#include <sanitizer/asan_interface.h>

#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "../../csrc/cpu/dispatch.h"
#include "../../csrc/cpu/instruction_sets.h"
#include "exact.h"

using namespace reptile_ext;

namespace {

// ----------------------------------------------------------------------------------------- bytes, numbers, formats

// What the input says, byte by byte; zeros when it has no more to say. 0 is the plain choice everywhere.
class Input {
  const uint8_t *next_, *end_;

 public:
  Input(const uint8_t* data, size_t size) : next_(data), end_(data + size) {}
  uint64_t bits(int bytes) {
    uint64_t x = 0;
    for (int i = 0; i < bytes; ++i) x |= uint64_t(next_ < end_ ? *next_++ : 0) << 8 * i;
    return x;
  }
  int64_t below(int64_t n) { return int64_t(bits(n <= 256 ? 1 : 2)) % n; }
  bool one_in(int64_t n) { return below(n) == n - 1; }
  template <class T, size_t n>
  T pick(const T (&choices)[n]) {
    return choices[below(n)];
  }
};

// A heap block of exactly its size, aligned to 64.
template <class T>
struct Aligned {
  using value_type = T;
  T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(64))); }
  void deallocate(T* p, size_t) { ::operator delete(p, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
using Memory = std::vector<char, Aligned<char>>;

// What is too much for the input to choose one by one (splitmix64).
class Random {
  uint64_t state_;

 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
  }
  double between(double a, double b) { return a + (b - a) * double(bits() >> 11) * 0x1p-53; }
  template <class T, size_t n>
  T pick(const T (&choices)[n]) {
    return choices[bits() % n];
  }
  void fill(Memory& memory) {
    for (size_t i = 0; i < memory.size(); i += 8) {
      const uint64_t x = bits();
      std::memcpy(&memory[i], &x, std::min<size_t>(8, memory.size() - i));
    }
  }
};

// The two 16-bit formats, written down a second time, independently of csrc/cpu/simd.h.
struct Format {
  int exponent_bits, fraction_bits;
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  unsigned infinity() const { return ((1u << exponent_bits) - 1) << fraction_bits; }

  double decode(unsigned bits) const {
    const unsigned magnitude = bits & 0x7fff, fraction = magnitude & ((1u << fraction_bits) - 1);
    const int exponent = int(magnitude >> fraction_bits);
    double x = magnitude == infinity() ? kInf : kNaN;
    if (magnitude < infinity()) {
      x = exponent == 0 ? std::ldexp(double(fraction), 1 - bias() - fraction_bits)
                        : std::ldexp(double(fraction | 1u << fraction_bits), exponent - bias() - fraction_bits);
    }
    return bits & 0x8000 ? -x : x;
  }
  // To nearest, ties to even.
  uint16_t encode(double x) const {
    const unsigned sign = std::signbit(x) ? 0x8000 : 0;
    if (std::isnan(x)) return uint16_t(sign | infinity() | 1);
    if (std::isinf(x)) return uint16_t(sign | infinity());
    const int exponent = std::max(x == 0 ? INT_MIN : std::ilogb(x), 1 - bias());
    const double units = std::nearbyint(std::ldexp(std::fabs(x), fraction_bits - exponent));
    // The leading bit of the units, where there is one, adds 1 to the exponent field.
    const double bits = std::ldexp(double(exponent + bias() - 1), fraction_bits) + units;
    return uint16_t(sign | unsigned(std::min(bits, double(infinity()))));
  }
  std::vector<double> table() const {
    std::vector<double> all(65536);
    for (unsigned bits = 0; bits < 65536; ++bits) all[bits] = decode(bits);
    return all;
  }
};
constexpr Format kBFloat16 = {8, 7}, kFloat16 = {5, 10};

double load(const char* p, DType dtype) {
  static const std::vector<double> bfloat16 = kBFloat16.table(), float16 = kFloat16.table();
  float f;
  double d;
  uint16_t half;
  switch (dtype) {
    case DType::kFloat32:
      return std::memcpy(&f, p, 4), f;
    case DType::kBFloat16:
      return std::memcpy(&half, p, 2), bfloat16[half];
    case DType::kFloat16:
      return std::memcpy(&half, p, 2), float16[half];
    case DType::kFloat64:
      return std::memcpy(&d, p, 8), d;
  }
}
void store(char* p, DType dtype, double x) {
  const float f = float(x);
  const uint16_t half = dtype == DType::kBFloat16  ? kBFloat16.encode(x)
                        : dtype == DType::kFloat16 ? kFloat16.encode(x)
                                                   : 0;
  std::memcpy(p,
              dtype == DType::kFloat64   ? (const void*)&x
              : dtype == DType::kFloat32 ? (const void*)&f
                                         : &half,
              size_of(dtype));
}

struct Range {
  double largest, smallest, epsilon;  // finite; normal; relative error of a rounding
};
Range range_of(DType dtype) {
  constexpr Range kRanges[] = {{FLT_MAX, 0x1p-126, 0x1p-24},
                               {0x1.fep127, 0x1p-126, 0x1p-8},
                               {65504, 0x1p-14, 0x1p-11},
                               {DBL_MAX, 0x1p-1022, 0x1p-53}};  // in the order of DType
  return kRanges[int(dtype)];
}

// --------------------------------------------------------------------------------------------------------- a case

// A tensor [rows ..., num_classes] somewhere in its memory.
struct Tensor {
  DType dtype = DType::kFloat32;
  int64_t num_classes = 0, class_stride = 1;
  std::vector<int64_t> row_strides;
  int64_t start = 0;               // elements of its memory before it
  std::vector<int64_t> row_start;  // the element at which each row starts
  Memory memory;

  size_t at(int64_t row, int64_t v) const { return size_t(row_start[row] + v * class_stride) * size_of(dtype); }
  void set(int64_t row, int64_t v, double x) { store(&memory[at(row, v)], dtype, x); }
  Numbers row(int64_t row, int64_t n) const {
    Numbers logits(static_cast<size_t>(n));
    for (int64_t v = 0; v < n; ++v) logits[v] = load(&memory[at(row, v)], dtype);
    return logits;
  }
};

enum class GradientMode { kSeparate, kInPlace, kNone };

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
const char *current_set = "", *current_check = "";

void describe(const char* name, const Tensor& t, const Case& c) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64"};
  std::fprintf(stderr, "  %s: %s [", name, kNames[int(t.dtype)]);
  for (int d = 0; d < c.p.num_row_dims; ++d) std::fprintf(stderr, "%lld, ", (long long)c.p.row_sizes[d]);
  std::fprintf(stderr, "%lld], strides [", (long long)t.num_classes);
  for (int64_t stride : t.row_strides) std::fprintf(stderr, "%lld, ", (long long)stride);
  std::fprintf(stderr, "%lld], first element %lld of %zu\n", (long long)t.class_stride, (long long)t.start,
               t.memory.size() / size_of(t.dtype));
}

[[noreturn]] __attribute__((format(printf, 2, 3))) void fail(int64_t row, const char* format, ...) {
  const Case& c = *current_case;
  const LossProblem& p = c.p;
  std::fprintf(stderr, "\nFINDING (%s, %s), row %lld: ", current_set, current_check, (long long)row);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(
      stderr,
      "\n  divergence %d, beta %.17g, one_minus_beta %.17g, temperatures %g %g, soft %g, hard %g, smoothing %g\n",
      int(p.divergence), p.beta, p.one_minus_beta, p.student_temperature, p.teacher_temperature, p.soft_scale,
      p.hard_weight, p.label_smoothing);
  std::fprintf(stderr, "  gradient_scale %g, %s grad_output, %s weights; index %lld of %lld; %lld classes; cut at",
               p.gradient_scale,
               c.grad_output.empty()      ? "no"
               : p.grad_output_is_uniform ? "one"
                                          : "row by row",
               c.weights.empty() ? "no" : "with", (long long)c.outer_index, (long long)c.outer,
               (long long)p.vocab_size);
  for (int64_t cut : c.cuts) std::fprintf(stderr, " %lld", (long long)cut);
  std::fprintf(stderr, "\n");
  describe("student", c.student, c);
  describe(c.teacher_is_student ? "teacher (not used, it is the student)" : "teacher", c.teacher, c);
  describe(c.mode == GradientMode::kSeparate ? "gradient" : "gradient (not used, it is in place or none)", c.gradient,
           c);
  if (row >= 0 && p.vocab_size <= 80) {
    if (!c.labels.empty()) std::fprintf(stderr, "  label %lld\n", (long long)c.labels[row]);
    for (const Tensor* t : {&c.student, &c.teacher_tensor()}) {
      std::fprintf(stderr, "  logits");
      for (double x : t->row(row, p.vocab_size)) std::fprintf(stderr, " %.9g", x);
      std::fprintf(stderr, "\n");
    }
  }
  std::abort();
}

// Gives a tensor of the case its strides and memory. Family 0: classes innermost; 1: rows innermost, side by side; 2:
// any order.
void lay_out(Tensor& t, Input& in, const LossProblem& p, int64_t family, bool is_read_only) {
  const int num_dims = p.num_row_dims, kClass = num_dims;
  std::vector<int> order = {kClass};  // from the innermost out
  for (int d = num_dims - 1; d >= 0; --d) order.push_back(d);
  if (family == 1 && num_dims > 0) std::swap(order[0], order[1]);
  for (int i = num_dims; family == 2 && i > 0; --i) std::swap(order[i], order[in.below(i + 1)]);

  const bool is_padded = in.one_in(2);
  std::vector<int64_t> strides(size_t(num_dims + 1));
  int64_t stride = family == 2 && in.one_in(4) ? 2 : 1;
  for (int d : order) {
    strides[d] = stride;
    stride = stride * (d == kClass ? t.num_classes : p.row_sizes[d]) + (is_padded ? in.below(4) : 0);
  }
  // Expanded dimensions, whose elements are one and the same, and windows that slide over the memory.
  if (is_read_only && in.one_in(4)) strides[in.below(num_dims + 1)] = in.below(2);
  t.start = is_padded ? in.below(70) : 0;
  t.class_stride = strides[kClass];
  t.row_strides.assign(strides.begin(), strides.end() - 1);

  t.row_start.resize(size_t(p.num_rows));
  for (int64_t row = 0; row < p.num_rows; ++row) {
    t.row_start[row] = t.start;
    int64_t rest = row;
    for (int d = num_dims - 1; d >= 0; --d) {
      t.row_start[row] += rest % p.row_sizes[d] * t.row_strides[d];
      rest /= p.row_sizes[d];
    }
  }
  t.memory = Memory((t.row_start.back() + (t.num_classes - 1) * t.class_stride + 1) * int64_t(size_of(t.dtype)));
}

// Other bits wherever the driver has no business to read: between the elements, past vocab_size, in ignored rows.
void scramble(Tensor& t, const Case& c, Random random) {
  Memory other(t.memory.size());
  random.fill(other);
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    for (int64_t v = 0; c.is_in(row) && v < c.p.vocab_size; ++v) {
      std::memcpy(&other[t.at(row, v)], &t.memory[t.at(row, v)], size_of(t.dtype));
    }
  }
  t.memory = other;
}
void scramble_labels(Case& c, Random random) {
  for (size_t row = 0; row < c.labels.size(); ++row) {
    if (!c.is_in(int64_t(row))) {
      c.labels[row] = random.pick({int64_t(-100), int64_t(-1), c.p.vocab_size, INT64_MIN, INT64_MAX, int64_t(0)});
    }
  }
}

// Logits for all of a tensor; `like`: another's, to which they may be near.
void fill(Tensor& t, Input& in, double temperature, const Tensor* like) {
  Random random(in.bits(2));
  random.fill(t.memory);
  if (in.one_in(8)) return;  // all kinds of bits
  const double spread = in.pick({3.0, 0.0, 1e-2, 20.0, 45.0, 1e3, 1e4}) * temperature;
  const double offset = in.pick({0.0, -7.0, 5.0, 300.0, -1e4}) * temperature;
  const double noise = like && in.one_in(4) ? in.pick({1e-4, 1e-7, 1e-2}) * temperature : 0;
  for (int64_t row = 0; row < int64_t(t.row_start.size()); ++row) {
    const Numbers near = noise > 0 ? like->row(row, std::min(like->num_classes, t.num_classes)) : Numbers();
    for (int64_t v = 0; v < t.num_classes; ++v) {
      const double x = random.between(-1, 1);
      t.set(row, v, size_t(v) < near.size() ? near[v] + noise * x : offset + spread * x);
    }
  }
}

// One of the values that matter, in some classes of a row, or in all, or in all but its label.
void poke(Tensor& t, Input& in, double temperature, const std::vector<int64_t>& labels) {
  const int64_t row = in.below(int64_t(t.row_start.size()));
  const bool is_whole = in.one_in(4);
  const int64_t begin = is_whole || in.one_in(4) ? 0 : in.below(t.num_classes);
  const int64_t count = is_whole ? t.num_classes : in.pick({int64_t(1), int64_t(2), int64_t(32), int64_t(512)});
  const int64_t spared = !labels.empty() && in.one_in(2) ? labels[row] : -1;
  const Range range = range_of(t.dtype);
  double value = in.pick({-kInf, kNaN, kInf, -kInf, 0.0, range.largest, -range.largest, range.smallest,
                          range.smallest / 4, 35 * temperature, 300 * temperature, -87 * temperature, 1e4, -1e4});
  if (in.one_in(8)) {
    const uint64_t bits = in.bits(8);
    value = load(reinterpret_cast<const char*>(&bits), t.dtype);
  }
  for (int64_t v = begin; v < std::min(t.num_classes, begin + count); ++v) {
    if (v != spared) t.set(row, v, value);
  }
}

std::vector<int64_t> read_cuts(Input& in, int64_t num_rows) {
  std::vector<int64_t> cuts = {0, num_rows};
  for (int64_t n = in.below(4); n > 0; --n) cuts.push_back(in.below(num_rows + 1));
  std::sort(cuts.begin(), cuts.end());
  return cuts;
}

// What options.py lets through.
void read_numbers(LossProblem& p, Input& in) {
  p.divergence = kKnown[in.below(sizeof(kKnown) / sizeof(kKnown[0]))];
  switch (p.divergence) {
    case Divergence::kDkd:
    case Divergence::kMirroredDkd:
      p.beta = in.pick({8.0, 0.0, 1.0, 0.3, 1e3});
      break;
    case Divergence::kSymmetricKl:
    case Divergence::kJsd:
    case Divergence::kSkewKl:
    case Divergence::kSkewReverseKl:
      p.beta = in.pick({0.5, 0.1, 0.9, 1e-3, 1e-8, 1e-30, 1 - 1e-6});
      break;
    default:
      break;
  }
  p.one_minus_beta = 1 - p.beta;
  // The mirrors of these two, which the teacher's gradient is computed with, have β and 1 − β exchanged.
  const bool may_swap = p.divergence == Divergence::kSymmetricKl || p.divergence == Divergence::kJsd;
  if (may_swap && in.one_in(2)) std::swap(p.beta, p.one_minus_beta);
  const double t_s = p.student_temperature = in.pick({1.0, 1.0, 2.0, 0.5, 7.3, 1e-2, 1e2, 1e-30, 1e30});
  const double t_t = p.teacher_temperature = in.one_in(2) ? in.pick({1.0, 2.0, 0.5, 7.3, 1e-2, 1e2, 1e-30, 1e30}) : t_s;
  p.soft_scale = in.pick({1.0, t_s * t_t, 0.5, 0.0});
  if (p.divergence == Divergence::kJsd && in.one_in(2)) p.soft_scale /= p.beta * p.one_minus_beta;  // scaled_jsd
  p.hard_weight = in.pick({0.0, 0.0, 1.0, 0.3});
  p.label_smoothing = in.pick({0.0, 0.0, 0.1, 1.0});
  p.gradient_scale = in.pick({1.0, 1 / 7.0, 1e-4, 1024.0});
}

// Classes: few, or around the size of a vector, of the probe (512) and of a block (to 4,096). Then so many rows that
// the case stays small, but enough to fill the vectors where rows lie side by side.
void read_shape(LossProblem& p, Input& in) {
  const int64_t kind = in.below(16), edges[] = {2, 4, 8, 16, 32, 64, 128, 512, 1024, 2048, 4096};
  p.vocab_size = kind < 8 ? 1 + in.below(70) : (kind < 15 ? edges[in.below(8)] : in.pick(edges)) + in.below(3) - 1;
  int64_t room = std::min<int64_t>(100, std::max<int64_t>(9, 2048 / p.vocab_size));
  p.num_rows = 1;
  p.num_row_dims = int(in.below(5));
  for (int d = 0; d < p.num_row_dims; ++d) {
    p.row_sizes[d] = 1 + in.below(room);
    p.num_rows *= p.row_sizes[d];
    room /= p.row_sizes[d];
  }
}

Case read_case(Input& in) {
  Case c;
  LossProblem& p = c.p;
  read_numbers(p, in);
  read_shape(p, in);
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
  if (in.one_in(2)) {
    c.weights.resize(size_t(p.num_rows));
    for (double& w : c.weights) w = random.pick({1.0, 0.0, 0.3, 3.0});
  }
  if (needs_labels(p.divergence) || p.hard_weight > 0 || in.one_in(4)) {
    for (int64_t row = 0; row < p.num_rows; ++row) c.labels.push_back(int64_t(random.bits() >> 1) % p.vocab_size);
    scramble_labels(c, random);
  }
  if (in.one_in(2)) {
    p.grad_output_is_uniform = in.one_in(2);
    c.grad_output.resize(size_t(p.grad_output_is_uniform ? 1 : p.num_rows));
    for (double& u : c.grad_output) u = random.pick({1.0, -1.0, 0.0, 65536.0, 1e-3});
  }
  if (in.one_in(4)) {
    c.outer = in.pick({int64_t(3), int64_t(1) << 20, int64_t(1) << 32});
    c.outer_index = in.one_in(2) ? c.outer - 1 : 0;
  }
  c.cuts = read_cuts(in, p.num_rows);

  fill(c.student, in, p.student_temperature, nullptr);
  fill(c.teacher, in, p.teacher_temperature, &c.student);
  for (int64_t n = in.below(6); n > 0; --n) {
    const bool teachers = in.one_in(2);
    poke(teachers ? c.teacher : c.student, in, teachers ? p.teacher_temperature : p.student_temperature, c.labels);
  }
  return c;
}

// -------------------------------------------------------------------------------------------- running the kernels

// The problem in full: with the outermost dimension, along which strides are 0.
LossProblem with_outer(const Case& c) {
  LossProblem p = c.p;
  p.num_rows *= c.outer;
  p.num_row_dims = 0;
  if (c.outer > 1) p.row_sizes[p.num_row_dims++] = c.outer;
  for (int d = 0; d < c.p.num_row_dims; ++d) p.row_sizes[p.num_row_dims++] = c.p.row_sizes[d];
  return p;
}
Operand operand_of(const Tensor& t, Memory& memory, const Case& c) {
  Operand o;
  o.data = memory.data() + t.start * int64_t(size_of(t.dtype));
  o.dtype = t.dtype;
  o.class_stride = t.class_stride;
  std::copy(t.row_strides.begin(), t.row_strides.end(), o.row_strides + (c.outer > 1));
  return o;
}
// A pointer to row 0 of an array that has only this case's rows: possibly far before what memory there is.
template <class T>
T* row_0(T* rows, const Case& c) {
  return reinterpret_cast<T*>(uintptr_t(rows) - uintptr_t(c.outer_index * c.p.num_rows) * sizeof(T));
}

struct Result {
  Numbers losses, gradient;  // gradient: [num_rows, gradient_size], or empty
};

// The elements of a gradient, once it is sure that nothing else in its memory was written.
Numbers written(const Tensor& t, const Memory& before, const Memory& after) {
  Memory expected(before);
  Numbers elements;
  for (int64_t row = 0; row < int64_t(t.row_start.size()); ++row) {
    for (int64_t v = 0; v < t.num_classes; ++v) {
      std::memcpy(&expected[t.at(row, v)], &after[t.at(row, v)], size_of(t.dtype));
      elements.push_back(load(&after[t.at(row, v)], t.dtype));
    }
  }
  if (expected != after) fail(-1, "a byte between the elements of the gradient was written");
  return elements;
}

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
  if (!labels.empty()) p.labels = row_0(labels.data(), c);
  if (!weights.empty()) p.weights = row_0(weights.data(), c);
  if (!grad_output.empty())
    p.grad_output = p.grad_output_is_uniform ? grad_output.data() : row_0(grad_output.data(), c);
  Result result;
  result.losses.assign(size_t(c.p.num_rows), garbage);
  p.row_losses = row_0(result.losses.data(), c);

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

// Whether two gradients may be the same one, rounded to its type at the end by way of float32. What is out of the
// type's range may be infinite.
bool is_near(double a, double b, double tolerance, DType dtype) {
  const Range range = range_of(dtype);
  if (a == b) return true;
  const auto clamped = [&](double x) { return std::min(std::max(x, -range.largest), range.largest); };
  const double relative = dtype == DType::kFloat64 ? range.epsilon : range.epsilon + 0x1p-24;
  const double denormal = dtype == DType::kFloat16 ? 2 * range.epsilon * range.smallest : range.smallest;
  const double size = std::max(std::fabs(clamped(a)), std::fabs(clamped(b)));
  return std::fabs(clamped(a) - clamped(b)) <= tolerance + 2 * relative * size + denormal;
}

// The promises of SPEC.md for each row.
void check_rows(const Case& c, const Result& result, const std::vector<ExactRow>& exact) {
  const int64_t n = c.p.vocab_size, width = c.p.gradient_size;
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    const ExactRow& e = exact[row];
    const double loss = result.losses[row];
    const double* gradient = result.gradient.empty() ? nullptr : &result.gradient[row * width];
    const auto all = [&](int64_t begin, int64_t end, const char* what, auto&& is_right) {
      for (int64_t v = begin; gradient && v < end; ++v) {
        if (!is_right(gradient[v])) fail(row, "%s: the gradient of class %lld is %g", what, (long long)v, gradient[v]);
      }
    };
    const auto is_zero = [](double g) { return g == 0; };

    if (!c.is_in(row)) {
      if (loss != 0) fail(row, "is out: the loss is %g", loss);
      all(0, width, "is out", is_zero);
      continue;
    }
    all(n, width, "past vocab_size", is_zero);
    if (e.is_broken) {
      if (!std::isnan(loss)) fail(row, "is broken: the loss is %g", loss);
      all(0, n, "is broken", [](double g) { return std::isnan(g); });
      continue;
    }
    if (c.p.hard_weight == 0 && loss < 0) fail(row, "the loss is negative, %g", loss);
    if (!e.is_in_range) continue;
    if (std::isnan(loss)) fail(row, "is not broken: the loss is NaN");
    all(0, n, "is not broken", [](double g) { return !std::isnan(g); });
    if (!e.is_moderate) continue;
    const double tolerance = e.unit * e.loss_size + e.loss_slack;
    if (loss != e.loss && !(std::fabs(loss - e.loss) <= tolerance)) {
      fail(row, "the loss is %.17g, right is %.17g, within %.3g", loss, e.loss, tolerance);
    }
    for (int64_t v = 0; gradient && v < n; ++v) {
      const double tolerance_v = e.unit * e.gradient_size[v] + e.gradient_slack[v];
      if (!is_near(gradient[v], e.gradient[v], tolerance_v, c.student.dtype)) {
        fail(row, "the gradient of class %lld is %.17g, right is %.17g, within %.3g", (long long)v, gradient[v],
             e.gradient[v], tolerance_v);
      }
    }
  }
}

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

bool same_bits(double a, double b) { return std::memcmp(&a, &b, 8) == 0 || (std::isnan(a) && std::isnan(b)); }
bool same_bits(const Numbers& a, const Numbers& b) {
  return std::equal(a.begin(), a.end(), b.begin(), [](double x, double y) { return same_bits(x, y); });
}

// In the rows that have the same to read as before.
template <class Predicate>
void check_same_bits(const Case& c, const Result& before, const Result& after, Predicate&& is_same) {
  for (int64_t row = 0; row < c.p.num_rows; ++row) {
    if (!is_same(row)) continue;
    if (!same_bits(before.losses[row], after.losses[row])) {
      fail(row, "the loss was %.17g and is %.17g", before.losses[row], after.losses[row]);
    }
    for (int64_t v = 0; !before.gradient.empty() && v < c.p.gradient_size; ++v) {
      const double g = before.gradient[row * c.p.gradient_size + v], h = after.gradient[row * c.p.gradient_size + v];
      if (!same_bits(g, h)) fail(row, "the gradient of class %lld was %.17g and is %.17g", (long long)v, g, h);
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

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<Selection> sets = supported_sets();
  Input in(data, size);
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
