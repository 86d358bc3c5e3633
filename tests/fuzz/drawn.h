// What the fuzz targets are made of: the bytes of an input and what is drawn from them; tensors in memory of exactly
// their size; how a finding is reported.
#pragma once

#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>

#include "exact.h"

namespace reptile_ext {
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

inline double load(const char* p, DType dtype) {
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
inline void store(char* p, DType dtype, double x) {
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

// ----------------------------------------------------------------------------------------------------- a finding

// Prints the case in which it is, and of it this row or element, or none in particular (−1).
inline void (*describe_case)(int64_t at) = nullptr;
inline const char *current_set = "", *current_check = "";

[[noreturn]] inline __attribute__((format(printf, 2, 3))) void fail(int64_t at, const char* format, ...) {
  std::fprintf(stderr, "\nFINDING (%s, %s), number %lld: ", current_set, current_check, (long long)at);
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fprintf(stderr, "\n");
  describe_case(at);
  std::abort();
}

// ------------------------------------------------------------------------------------------------------- a tensor

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

inline void describe(const LossProblem& p) {
  std::fprintf(
      stderr, "  divergence %d, beta %.17g, one_minus_beta %.17g, temperatures %g %g, soft %g, hard %g, smoothing %g\n",
      int(p.divergence), p.beta, p.one_minus_beta, p.student_temperature, p.teacher_temperature, p.soft_scale,
      p.hard_weight, p.label_smoothing);
}
inline void describe(const char* name, const Tensor& t, const LossProblem& p) {
  constexpr const char* kNames[] = {"float32", "bfloat16", "float16", "float64"};
  std::fprintf(stderr, "  %s: %s [", name, kNames[int(t.dtype)]);
  for (int d = 0; d < p.num_row_dims; ++d) std::fprintf(stderr, "%lld, ", (long long)p.row_sizes[d]);
  std::fprintf(stderr, "%lld], strides [", (long long)t.num_classes);
  for (int64_t stride : t.row_strides) std::fprintf(stderr, "%lld, ", (long long)stride);
  std::fprintf(stderr, "%lld], first element %lld of %zu\n", (long long)t.class_stride, (long long)t.start,
               t.memory.size() / size_of(t.dtype));
}

enum class GradientMode { kSeparate, kInPlace, kNone };

// Where the rows of a tensor start by its strides, and memory that ends with its last element.
inline void place_rows(Tensor& t, const LossProblem& p) {
  t.row_start.resize(size_t(p.num_rows));
  for (int64_t row = 0; row < p.num_rows; ++row) {
    t.row_start[row] = t.start;
    int64_t rest = row;
    for (int d = p.num_row_dims - 1; d >= 0; --d) {
      t.row_start[row] += rest % p.row_sizes[d] * t.row_strides[d];
      rest /= p.row_sizes[d];
    }
  }
  t.memory = Memory((t.row_start.back() + (t.num_classes - 1) * t.class_stride + 1) * int64_t(size_of(t.dtype)));
}

// Gives a tensor of the case its strides and memory. Family 0: classes innermost; 1: rows innermost, side by side; 2:
// any order.
inline void lay_out(Tensor& t, Input& in, const LossProblem& p, int64_t family, bool is_read_only) {
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
  place_rows(t, p);
}

// Logits for all of a tensor; `like`: another's, to which they may be near.
inline void fill(Tensor& t, Input& in, double temperature, const Tensor* like) {
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
inline void poke(Tensor& t, Input& in, double temperature, const std::vector<int64_t>& labels) {
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

inline std::vector<int64_t> read_cuts(Input& in, int64_t num_rows) {
  std::vector<int64_t> cuts = {0, num_rows};
  for (int64_t n = in.below(4); n > 0; --n) cuts.push_back(in.below(num_rows + 1));
  std::sort(cuts.begin(), cuts.end());
  return cuts;
}

// What options.py lets through.
inline void read_numbers(LossProblem& p, Input& in) {
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

// The elements of a gradient, once it is sure that nothing else in its memory was written.
inline Numbers written(const Tensor& t, const Memory& before, const Memory& after) {
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

// Whether two gradients may be the same one, rounded to its type at the end by way of float32. What is out of the
// type's range may be infinite.
inline bool is_near(double a, double b, double tolerance, DType dtype) {
  const Range range = range_of(dtype);
  if (a == b) return true;
  const auto clamped = [&](double x) { return std::min(std::max(x, -range.largest), range.largest); };
  const double relative = dtype == DType::kFloat64 ? range.epsilon : range.epsilon + 0x1p-24;
  const double denormal = dtype == DType::kFloat16 ? 2 * range.epsilon * range.smallest : range.smallest;
  const double size = std::max(std::fabs(clamped(a)), std::fabs(clamped(b)));
  return std::fabs(clamped(a) - clamped(b)) <= tolerance + 2 * relative * size + denormal;
}

inline bool same_bits(double a, double b) { return std::memcmp(&a, &b, 8) == 0 || (std::isnan(a) && std::isnan(b)); }
inline bool same_bits(const Numbers& a, const Numbers& b) {
  return std::equal(a.begin(), a.end(), b.begin(), [](double x, double y) { return same_bits(x, y); });
}

}  // namespace
}  // namespace reptile_ext
