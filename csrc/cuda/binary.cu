// Loss and gradient of elements that each are a distribution of their own (binary_distillation_loss). The arithmetic of
// an element is binary.h's; this file brings elements to it.
//
// What is fused, a logit: 2 reads and 1 write, and a read of each of labels, weight, pos_weight and grad_output that
// there is. A mean over elements of which some may be ignored reads labels and weight once before, to count them.
//
// A thread takes kChunk neighbouring elements at a time, of float64 one: a span. Of an operand whose elements are
// neighbours too and begin at 16 bytes, which is looked up for each by itself, a span is one or two loads of 16 bytes,
// else kChunk loads. Where the student's own are no neighbours, or the last dimension ends, elements are taken one by
// one. So one kernel has any strides and any mixture of types; and every divergence, chosen a span at a time.
//
// Sums are of tiles, kElementsPerTile elements of a block: what a tile is does not depend on the device, and neither
// does the order in which they are added up, so results repeat bit for bit.

#include "storage.h"

#include "../binary.h"

namespace reptile_ext {
namespace {

constexpr int kThreads = 128;
constexpr int kResidentThreads = 640;  // of a multiprocessor, at 96 registers a thread: five blocks

// A vector of one lane: what binary.h takes as V. Functions of a T are device.h's.
template <class T>
struct Lane {
  using Scalar = T;
  T v;
  Lane() = default;
  REPTILE_EXT_DEVICE explicit Lane(T x) : v(x) {}

  REPTILE_EXT_DEVICE friend Lane operator+(Lane a, Lane b) { return Lane(a.v + b.v); }
  REPTILE_EXT_DEVICE friend Lane operator-(Lane a, Lane b) { return Lane(a.v - b.v); }
  REPTILE_EXT_DEVICE friend Lane operator*(Lane a, Lane b) { return Lane(a.v * b.v); }
  REPTILE_EXT_DEVICE friend Lane operator/(Lane a, Lane b) { return Lane(quotient(a.v, b.v)); }
  REPTILE_EXT_DEVICE friend Lane fma(Lane a, Lane b, Lane c) { return Lane(reptile_ext::fma(a.v, b.v, c.v)); }
  REPTILE_EXT_DEVICE friend Lane max(Lane a, Lane b) { return Lane(reptile_ext::max(a.v, b.v)); }
  REPTILE_EXT_DEVICE friend Lane exp2(Lane a) { return Lane(reptile_ext::exp2(a.v)); }
  REPTILE_EXT_DEVICE friend Lane sqrt(Lane a) { return Lane(sqrt_of(a.v)); }
  REPTILE_EXT_DEVICE friend Lane reciprocal(Lane a) { return Lane(reptile_ext::reciprocal(a.v)); }
  REPTILE_EXT_DEVICE friend Lane smallest_normal(Lane a) { return Lane(reptile_ext::smallest_normal(a.v)); }
  REPTILE_EXT_DEVICE friend Lane times_sign_of(Lane x, Lane s) { return Lane(reptile_ext::times_sign_of(x.v, s.v)); }
  REPTILE_EXT_DEVICE friend Lane with_sign_of(Lane d, Lane x) { return Lane(reptile_ext::with_sign_of(d.v, x.v)); }
  REPTILE_EXT_DEVICE friend Lane where_positive(Lane e, Lane d) { return Lane(reptile_ext::where_positive(e.v, d.v)); }
  REPTILE_EXT_DEVICE friend Lane where_not_masked(Lane z, Lane d) {
    return Lane(reptile_ext::where_not_masked(z.v, d.v));
  }
  REPTILE_EXT_DEVICE friend Lane add_product_where_positive(Lane sum, Lane e, Lane d) {
    return Lane(reptile_ext::add_product_where_positive(sum.v, e.v, d.v));
  }
  REPTILE_EXT_DEVICE friend Lane negative_magnitude(Lane x) { return Lane(reptile_ext::negative_magnitude(x.v)); }
  REPTILE_EXT_DEVICE friend Lane where_negative(Lane s, Lane a, Lane b) {
    return Lane(reptile_ext::is_negative(s.v) ? a.v : b.v);
  }
  REPTILE_EXT_DEVICE friend Lane unless_broken(Lane x, Lane s, Lane t) {
    const T infinity = -negative_infinity<T>();
    return Lane(s.v < infinity && t.v < infinity ? x.v : T(kNaN));
  }
  REPTILE_EXT_DEVICE friend Lane twice_atanh(Lane u) { return Lane(reptile_ext::twice_atanh(u.v)); }
  REPTILE_EXT_DEVICE friend Lane log2_of_ratio(Lane w, Lane w_minus_1) {
    return Lane(reptile_ext::log2_of_ratio(w.v, w_minus_1.v));
  }
};

// --------------------------------------------------------------------------------------------------- where they lie

// How far element e of an operand is from its first.
REPTILE_EXT_DEVICE int64_t offset_of(const BinaryProblem& p, const Elements& of, int64_t e) {
  int64_t offset = 0;
  for (int d = p.num_dims - 1; d > 0; --d) {
    const int64_t outer = quotient(e, p.sizes[d]);
    offset += (e - outer * p.sizes[d]) * of.strides[d];
    e = outer;
  }
  return offset + e * of.strides[0];
}

// Elements `stride` apart, of one type: the type is looked up once.
template <class V, int kCount>
REPTILE_EXT_DEVICE void load_run(const Elements& of, int64_t at, int64_t stride, V (&x)[kCount]) {
  const auto each = [&](auto* from, auto widened) {
    REPTILE_EXT_UNROLL
    for (int i = 0; i < kCount; ++i) x[i] = V(widened(reptile_ext::load(from + at + i * stride)));
  };
  const void* const data = of.data;
  switch (of.dtype) {
    case DType::kFloat32:
      return each(static_cast<const float*>(data), [](float x) { return x; });
    case DType::kBFloat16:
      return each(static_cast<const uint16_t*>(data), [](uint16_t x) { return float_of_bits(uint32_t(x) << 16); });
    case DType::kFloat16:
      return each(static_cast<const uint16_t*>(data), [](uint16_t x) { return float_of_half(x); });
    default:
      return each(static_cast<const double*>(data), [](double x) { return x; });
  }
}

// Elements [first, first + kCount): all of them are there, and lie in the last dimension.
template <int kCount>
struct Span {
  static constexpr int kSize = kCount;
  const BinaryProblem& p;
  int64_t first;

  // Whether they are whole loads.
  REPTILE_EXT_DEVICE bool is_whole(const Elements& of, int64_t at) const {
    return of.strides[p.num_dims - 1] == 1 && of.dtype != DType::kFloat64 &&
           (uintptr_t(of.data) + at * int64_t(size_of(of.dtype))) % 16 == 0;
  }
  // `again`: it will be read once more, and should stay in the L2.
  template <class V>
  REPTILE_EXT_DEVICE void load(const Elements& of, bool again, V (&x)[kCount]) const {
    const int64_t at = offset_of(p, of, first);
    if constexpr (kCount == 1) {
      x[0] = load_class<V>(of, at);
    } else if (!is_whole(of, at)) {
      load_run(of, at, of.strides[p.num_dims - 1], x);
    } else if (size_of(of.dtype) == 2) {
      Raw<1> raw;
      raw.load(static_cast<const char*>(of.data) + 2 * at, again);
      widen(raw, of.dtype, x);
    } else {
      Raw<2> raw;
      raw.load(static_cast<const char*>(of.data) + 4 * at, again);
      widen(raw, of.dtype, x);
    }
  }
  template <class V>
  REPTILE_EXT_DEVICE void store(const Elements& of, const V (&x)[kCount]) const {
    const int64_t at = offset_of(p, of, first);
    if constexpr (kCount > 1) {
      if (is_whole(of, at)) {
        return store_chunk(static_cast<char*>(of.data) + int64_t(size_of(of.dtype)) * at, of.dtype, x);
      }
    }
    for (int i = 0; i < kCount; ++i) store_class(of, at + i * of.strides[p.num_dims - 1], x[i]);
  }
  // Weights, 0 for what is ignored; and the labels, if there are any.
  template <class V>
  REPTILE_EXT_DEVICE void load_weights(V (&weight)[kCount], V (&labels)[kCount]) const {
    for (int i = 0; i < kCount; ++i) weight[i] = V(1);
    if (p.weight.data) load(p.weight, true, weight);
    if (!p.labels.data) return;
    load(p.labels, true, labels);
    const V ignored = V(p.ignore_index);
    for (int i = 0; i < kCount; ++i) weight[i] = labels[i] == ignored ? V(0) : weight[i];
  }
};

// Whether elements [first, first + kChunk) are a span.
REPTILE_EXT_DEVICE bool is_span(const BinaryProblem& p, int64_t first) {
  if (first < 0 || first + kChunk > p.num_elements) return false;
  if (p.num_dims == 1) return true;
  const int64_t size = p.sizes[p.num_dims - 1];
  return first - quotient(first, size) * size + kChunk <= size;
}

// Calls visit(span) for the elements of this thread, and end(tile) after those of a tile, in all threads of the block.
template <class V, class Visit, class End>
REPTILE_EXT_DEVICE void each_span(const DeviceBinary& device, Visit visit, End end) {
  constexpr int kPerThread = int(kElementsPerTile / kThreads);
  const BinaryProblem& p = device.problem;
  const int64_t tiles = num_tiles(p);
  const int count = sizeof(V) == 4 && device.has_spans ? kChunk : 1;
  for (int64_t tile = block_rank(); tile < tiles; tile += num_blocks()) {
    for (int i = 0; i < kPerThread; i += count) {
      const int64_t first = tile * kElementsPerTile + i * kThreads + thread_rank() * count - device.shift;
      if (first >= p.num_elements) break;
      if constexpr (sizeof(V) == 4) {
        if (count == kChunk && is_span(p, first)) {
          visit(Span<kChunk>{p, first});
          continue;
        }
      }
      for (int64_t e = first; e < first + count; ++e) {
        if (e >= 0 && e < p.num_elements) visit(Span<1>{p, e});
      }
    }
    end(tile);
  }
}

template <class V>
REPTILE_EXT_DEVICE bool is_no_weight(V x) {
  return !(x >= V(0) && x < -negative_infinity<V>());
}

// ---------------------------------------------------------------------------------------------------------- kernels

// Loss and gradient. A label, weight or pos_weight that is none, an error on the CPU, makes its element NaN.
template <class V>
REPTILE_EXT_KERNEL(sizeof(V) == 8 ? kMaxDoubleBlockThreads : kResidentThreads)
binary_kernel(REPTILE_EXT_ARGUMENT DeviceBinary device) {
  using L = Lane<V>;
  Team<double> block = whole_block(shared_memory<Exchange<double>>());
  const BinaryProblem& p = device.problem;
  const bool soft = p.soft_scale > 0, hard = p.hard_weight > 0, is_weighted = p.weight.data || p.labels.data;
  const double to_loss = device.divisor ? p.scale / load(device.divisor) : p.scale;
  const double to_gradient = device.factor ? to_loss * load(device.factor) : to_loss;
  double k = 1;
  with_divergence<L>(p.divergence, [&](auto d) { k = decltype(d)::kRawLogits ? 1 : kLog2E; });
  const SoftNumbers<L> numbers{L(V(k / p.student_temperature)),
                               L(V(k / p.teacher_temperature)),
                               L(V(p.beta)),
                               L(V(p.one_minus_beta)),
                               L(V(p.soft_scale)),
                               L(V(to_gradient * p.soft_scale / p.student_temperature))};
  const L hard_to_loss = L(V(p.hard_weight)), hard_to_gradient = L(V(to_gradient * p.hard_weight));

  V sum = V(0);
  const auto visit = [&](const auto span) {
    constexpr int kCount = decltype(span)::kSize;
    V s[kCount], t[kCount], y[kCount] = {}, weight[kCount];
    for (int i = 0; i < kCount; ++i) weight[i] = V(1);
    span.load(p.student, false, s);
    if (soft) span.load(p.teacher, false, t);
    if (is_weighted) {
      span.load_weights(weight, y);
      for (int i = 0; i < kCount; ++i) {
        if (weight[i] == V(0)) {  // what is ignored becomes harmless numbers, whatever it was
          s[i] = t[i] = y[i] = V(0);
        } else if (is_no_weight(weight[i]) || (p.labels.data && !(y[i] >= V(0) && y[i] <= V(1)))) {
          weight[i] = V(kNaN);
        }
      }
    }
    L loss[kCount], gradient[kCount];
    for (int i = 0; i < kCount; ++i) loss[i] = gradient[i] = L(V(0));
    if (soft) {
      with_divergence<L>(p.divergence, [&](auto d) {
        using D = decltype(d);
        if constexpr (!D::kExcludesLabel) {
          for (int i = 0; i < kCount; ++i) soft_element<D>(numbers, L(s[i]), L(t[i]), loss[i], gradient[i]);
        }
      });
    }
    if (hard) {
      V pos_weight[kCount];
      for (int i = 0; i < kCount; ++i) pos_weight[i] = V(1);
      if (p.pos_weight.data) span.load(p.pos_weight, true, pos_weight);
      for (int i = 0; i < kCount; ++i) {
        const V hit = y[i] * pos_weight[i];
        add_hard_element(hard_to_loss, hard_to_gradient, L(s[i]), L(y[i]), L(hit), loss[i], gradient[i]);
        if (is_no_weight(pos_weight[i])) loss[i] = gradient[i] = L(V(kNaN));
      }
    }
    if (is_weighted) {
      for (int i = 0; i < kCount; ++i) {
        loss[i] = weight[i] == V(0) ? L(V(0)) : loss[i] * L(weight[i]);
        gradient[i] = weight[i] == V(0) ? L(V(0)) : gradient[i] * L(weight[i]);
      }
    }
    for (int i = 0; i < kCount; ++i) sum = sum + loss[i].v;
    V out[kCount];
    if (p.losses.data) {
      for (int i = 0; i < kCount; ++i) out[i] = loss[i].v * V(to_loss);
      span.store(p.losses, out);
    }
    if (!p.gradient.data) return;
    for (int i = 0; i < kCount; ++i) out[i] = gradient[i].v;
    if (p.grad_output.data) {
      V factor[kCount];
      span.load(p.grad_output, false, factor);
      for (int i = 0; i < kCount; ++i) out[i] = weight[i] == V(0) ? V(0) : out[i] * factor[i];
    }
    span.store(p.gradient, out);
  };
  each_span<V>(device, visit, [&](int64_t tile) {
    if (p.losses.data) return;
    const double total = sum_of(block, double(sum));
    if (thread_rank() == 0) store(p.sums + tile, total);
    sum = V(0);
  });
}

template <class V>
REPTILE_EXT_KERNEL(kMaxBlockThreads)
weights_kernel(REPTILE_EXT_ARGUMENT DeviceBinary device) {
  Team<double> block = whole_block(shared_memory<Exchange<double>>());
  double sum = 0;
  const auto visit = [&](const auto span) {
    constexpr int kCount = decltype(span)::kSize;
    V weight[kCount], labels[kCount];
    span.load_weights(weight, labels);
    for (int i = 0; i < kCount; ++i) sum += double(weight[i]);
  };
  each_span<V>(device, visit, [&](int64_t tile) {
    const double total = sum_of(block, sum);
    if (thread_rank() == 0) store(device.problem.sums + tile, total);
    sum = 0;
  });
}

// One read and one write of each element, or nothing where the factor is 1 for all, which is what loss.backward()
// brings. The host never asks.
template <class V>
REPTILE_EXT_KERNEL(kMaxBlockThreads)
scale_elements_kernel(REPTILE_EXT_ARGUMENT DeviceBinary device, bool is_uniform) {
  const BinaryProblem& p = device.problem;
  if (is_uniform && load_class<double>(p.grad_output, 0) == 1) return;  // all threads of the grid
  const bool is_weighted = p.weight.data || p.labels.data;
  const auto visit = [&](const auto span) {
    constexpr int kCount = decltype(span)::kSize;
    V gradient[kCount], factor[kCount], weight[kCount], labels[kCount];
    span.load(p.gradient, false, gradient);
    span.load(p.grad_output, false, factor);
    if (is_weighted) span.load_weights(weight, labels);
    for (int i = 0; i < kCount; ++i) {
      gradient[i] = is_weighted && weight[i] == V(0) ? V(0) : gradient[i] * factor[i];
    }
    span.store(p.gradient, gradient);
  };
  each_span<V>(device, visit, [](int64_t) {});
}

// --------------------------------------------------------------------------------------------------------- launchers

bool is_double(const Elements& of) { return of.data && of.dtype == DType::kFloat64; }

// Spans are for elements that are neighbours. Of logits without gaps they begin at a boundary of 16 bytes.
void find_spans(DeviceBinary& binary) {
  const BinaryProblem& p = binary.problem;
  const Elements& logits = p.student.data ? p.student : p.gradient;
  binary.has_spans = logits.strides[p.num_dims - 1] == 1;
  if (binary.has_spans && p.num_dims == 1) binary.shift = int(uintptr_t(logits.data) % 16 / size_of(logits.dtype));
}

// The blocks know nothing of each other: more than are resident at once are as good.
int64_t grid_of(const BinaryProblem& p, const DeviceProperties& device) {
  const int64_t most = int64_t(device.num_multiprocessors) * 16, needed = num_tiles(p);
  return needed < most ? needed : most;
}

// launch_one(binary, zero of the arithmetic type). Of float64, a span is an element.
template <class Launch>
const char* launch_on(DeviceBinary binary, bool in_double, const Launch& launch_one) {
  if (binary.problem.num_elements == 0) return nullptr;
  if (!in_double) find_spans(binary);
  return in_double ? launch_one(binary, double()) : launch_one(binary, float());
}

}  // namespace

const char* launch_binary(const DeviceBinary& loss, const DeviceProperties& device, void* stream) {
  const BinaryProblem& p = loss.problem;
  const auto launch_one = [&](const DeviceBinary& binary, auto zero) {
    return launch(&binary_kernel<decltype(zero)>, {grid_of(p, device), kThreads}, stream, binary);
  };
  return launch_on(loss, is_double(p.student) || is_double(p.teacher), launch_one);
}

const char* launch_binary_weights(const DeviceBinary& loss, const DeviceProperties& device, void* stream) {
  const BinaryProblem& p = loss.problem;
  const auto launch_one = [&](const DeviceBinary& binary, auto zero) {
    return launch(&weights_kernel<decltype(zero)>, {grid_of(p, device), kThreads}, stream, binary);
  };
  return launch_on(loss, is_double(p.student) || is_double(p.teacher), launch_one);
}

const char* launch_binary_scale(const DeviceBinary& loss, bool is_uniform, const DeviceProperties& device,
                                void* stream) {
  const BinaryProblem& p = loss.problem;
  const auto launch_one = [&](const DeviceBinary& binary, auto zero) {
    return launch(&scale_elements_kernel<decltype(zero)>, {grid_of(p, device), kThreads}, stream, binary, is_uniform);
  };
  return launch_on(loss, is_double(p.gradient), launch_one);
}

}  // namespace reptile_ext
