// Loss and gradient of elements that each are a distribution of their own, whose arithmetic is in binary.h.
//
// Compiled once per instruction set, as loss_rows.cpp. Elements go through the lanes of vectors.
//
// Memory sees 2 reads and 1 write of each element. What does not lie as the arithmetic wants it (16-bit types, mixed
// types, strides) is converted block by block through the L1, as are labels and weights.

#include "../binary.h"
#include "../rows.h"
#include "simd.h"

namespace reptile_ext {
namespace {

constexpr int64_t kBlock = kElementsPerBlock;
constexpr int64_t kPrefetchBytes = 3072;

// Calls visit(T* first, stride, done, run) for the parts of elements [begin, begin + n) that lie `stride` apart.
template <class Visitor>
void each_run(const BinaryProblem& p, const Elements& of, int64_t begin, int64_t n, Visitor&& visit) {
  with_type(of, [&](auto* data) {
    if (p.num_dims <= 1) return visit(data + begin * of.strides[0], of.strides[0], int64_t(0), n);
    const int last = p.num_dims - 1;
    int64_t index[kMaxElementDims];
    for (int d = last; d >= 0; --d) {
      index[d] = begin % p.sizes[d];
      begin /= p.sizes[d];
    }
    for (int64_t done = 0; done < n;) {
      int64_t offset = 0;
      for (int d = 0; d <= last; ++d) offset += index[d] * of.strides[d];
      const int64_t left = p.sizes[last] - index[last], run = left < n - done ? left : n - done;
      visit(data + offset, of.strides[last], done, run);
      done += run;
      index[last] = 0;
      for (int d = last - 1; d >= 0; --d) {
        if (++index[d] < p.sizes[d]) break;
        index[d] = 0;
      }
    }
  });
}

template <class From, class To>
__attribute__((noinline)) void convert_by_vectors(const From* from, int64_t n, To* to) {
  constexpr int kPair = 2 * Float::kLanes;
  Float a, b;
  int64_t i = 0;
  for (; i + kPair <= n; i += kPair) {
    load2(from + i, a, b);
    store2(to + i, a, b);
  }
  if (i < n) {
    load2_tail(from + i, int(n - i), a, b);
    store2_tail(to + i, int(n - i), a, b);
  }
}

template <class Scalar, class T>
void widen(const T* from, int64_t n, Scalar* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = Scalar(to_float(from[i]));
}
void widen(const float* from, int64_t n, float* to) { std::memcpy(to, from, size_t(n) * sizeof(float)); }
void widen(const Float16* from, int64_t n, float* to) { convert_by_vectors(from, n, to); }

template <class Scalar, class T>
void narrow_one(Scalar x, T* to) {
  if constexpr (sizeof(T) == 2) {
    from_float(float(x), to);
  } else {
    from_float(x, to);
  }
}
void narrow_one(float x, double* to) { *to = x; }

template <class Scalar, class T>
void narrow(const Scalar* from, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) narrow_one(from[i], to + i);
}
void narrow(const float* from, int64_t n, Float16* to) { convert_by_vectors(from, n, to); }

// Elements of an operand in the arithmetic type, in order.
template <class Scalar>
__attribute__((noinline)) void gather(const BinaryProblem& p, const Elements& of, int64_t begin, int64_t n,
                                      Scalar* to) {
  each_run(p, of, begin, n, [&](auto* from, int64_t stride, int64_t done, int64_t run) {
    if (stride == 1) {
      widen(from, run, to + done);
    } else if (stride == 0) {
      const Scalar value = Scalar(to_float(*from));
      for (int64_t i = 0; i < run; ++i) to[done + i] = value;
    } else {
      for (int64_t i = 0; i < run; ++i) to[done + i] = Scalar(to_float(from[i * stride]));
    }
  });
}

// To memory that is not read again soon: past the caches, which would read it in before it is written.
void copy_past_caches(const void* from, size_t bytes, void* to) {
#if defined(__AVX512F__)
  if ((reinterpret_cast<uintptr_t>(to) & 63) == 0 && bytes % 64 == 0) {
    for (size_t i = 0; i < bytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(static_cast<char*>(to) + i),
                          _mm512_loadu_si512(static_cast<const char*>(from) + i));
    }
    return;
  }
#elif defined(__AVX2__)
  if ((reinterpret_cast<uintptr_t>(to) & 31) == 0 && bytes % 32 == 0) {
    for (size_t i = 0; i < bytes; i += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(static_cast<char*>(to) + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const char*>(from) + i)));
    }
    return;
  }
#endif
  std::memcpy(to, from, bytes);
}

template <class Scalar, class T>
void copy_past_caches(const Scalar* from, int64_t n, T* to) {
  alignas(64) T narrowed[kBlock];
  narrow(from, n, narrowed);
  copy_past_caches(static_cast<const void*>(narrowed), size_t(n) * sizeof(T), static_cast<void*>(to));
}
template <class Scalar>
void copy_past_caches(const Scalar* from, int64_t n, Scalar* to) {
  copy_past_caches(static_cast<const void*>(from), size_t(n) * sizeof(Scalar), static_cast<void*>(to));
}

template <class Scalar>
__attribute__((noinline)) void scatter(const BinaryProblem& p, const Elements& of, int64_t begin, int64_t n,
                                       const Scalar* from, bool stream) {
  each_run(p, of, begin, n, [&](auto* to, int64_t stride, int64_t done, int64_t run) {
    if (stride == 1 && stream && run == kBlock) {
      copy_past_caches(from, run, to);
    } else if (stride == 1) {
      narrow(from + done, run, to);
    } else {
      for (int64_t i = 0; i < run; ++i) narrow_one(from[done + i], to + i * stride);
    }
  });
}

template <class Scalar>
Scalar* if_same(Scalar* p) {
  return p;
}
template <class Scalar>
Scalar* if_same(void*) {
  return nullptr;
}

// Logits that the arithmetic will want some 3 KB from now, while it is busy with those at hand: it asks for them vector
// by vector, because nothing overlaps with a block that is converted all at once.
struct Ahead {
  const char* first = nullptr;
  int64_t bytes = 0;  // an element; 0 where they do not lie one after the other

  void fetch(int64_t i) const { __builtin_prefetch(first + i * bytes + kPrefetchBytes); }
};

// A block of elements: where its vectors are read from, and memory for what does not lie so.
template <class V>
struct Block {
  using Scalar = typename V::Scalar;
  int64_t begin, n, padded;  // padded to whole vectors
  const Scalar *s, *t;
  Ahead ahead_s, ahead_t;
  Scalar* g;   // where the gradient goes first
  double sum;  // of the losses, if nothing comes after the divergence
  bool is_weighted;
  alignas(64) Scalar student[kBlock], teacher[kBlock], labels[kBlock], pos_weight[kBlock], weight[kBlock],
      grad_output[kBlock], loss[kBlock], gradient[kBlock];

  Block(const BinaryProblem& p, int64_t number) : begin(number * kBlock) {
    n = p.num_elements - begin < kBlock ? p.num_elements - begin : kBlock;
    padded = (n + V::kLanes - 1) / V::kLanes * V::kLanes;
    is_weighted = p.weight.data || p.labels.data;
  }

  void clear_padding(Scalar* values) const {
    for (int64_t i = n; i < padded; ++i) values[i] = 0;
  }
  void read(const BinaryProblem& p, const Elements& of, Scalar* to) const {
    gather(p, of, begin, n, to);
    clear_padding(to);
  }
  // Where they lie, if they do so as vectors; else null.
  Scalar* place_of(const BinaryProblem& p, const Elements& of) const {
    Scalar* found = nullptr;
    if (!of.data) return found;
    each_run(p, of, begin, n, [&](auto* from, int64_t stride, int64_t, int64_t run) {
      if (stride == 1 && run == n) found = if_same<Scalar>(from);
    });
    return found;
  }
  const Scalar* read_logits(const BinaryProblem& p, const Elements& of, Scalar* to, Ahead& ahead) const {
    each_run(p, of, begin, n, [&](auto* from, int64_t stride, int64_t, int64_t run) {
      ahead = {reinterpret_cast<const char*>(from), stride == 1 && run == n ? int64_t(sizeof(*from)) : 0};
    });
    const Scalar* found = !is_weighted && n == padded ? place_of(p, of) : nullptr;
    if (found) return found;
    read(p, of, to);
    return to;
  }
  void read_weights(const BinaryProblem& p) {
    if (p.weight.data) {
      read(p, p.weight, weight);
    } else {
      for (int64_t i = 0; i < padded; ++i) weight[i] = 1;
    }
    if (p.labels.data) {
      read(p, p.labels, labels);
      const Scalar ignored = Scalar(p.ignore_index);
      for (int64_t i = 0; i < padded; ++i) weight[i] = labels[i] == ignored ? Scalar(0) : weight[i];
    }
  }
  // What is ignored becomes harmless numbers, whatever it was.
  void clear_ignored(Scalar* values) const {
    for (int64_t i = 0; i < padded; ++i) values[i] = weight[i] != 0 ? values[i] : Scalar(0);
  }
};

template <class Scalar>
struct Call {
  Scalar k_s, k_t, beta, one_minus_beta;
  Scalar soft_loss, soft_gradient, hard_loss, hard_gradient;  // factors
};

// The divergence of the elements of a block.
template <class D, class V>
void soft_pass(const Call<typename V::Scalar>& call, Block<V>& block) {
  using Scalar = typename V::Scalar;
  const SoftNumbers<V> numbers{V(call.k_s),       V(call.k_t),          V(call.beta), V(call.one_minus_beta),
                               V(call.soft_loss), V(call.soft_gradient)};
  const Scalar *const students = block.s, *const teachers = block.t;
  const int64_t n = block.padded;
  Scalar* const gradients = block.g;
  const Ahead ahead_s = block.ahead_s, ahead_t = block.ahead_t;
  V total = V(0);
  for (int64_t i = 0; i < n; i += V::kLanes) {
    ahead_s.fetch(i);
    ahead_t.fetch(i);
    V loss, gradient;
    soft_element<D>(numbers, V::load(students + i), V::load(teachers + i), loss, gradient);
    loss.store(block.loss + i);
    total = total + loss;
    gradient.store(gradients + i);
  }
  block.sum = reduce_add(total);
}

// Adds the labels' part.
template <class V>
void hard_pass(const Call<typename V::Scalar>& call, Block<V>& block, bool has_pos_weight) {
  const V to_loss = V(call.hard_loss), to_gradient = V(call.hard_gradient);
  for (int64_t i = 0; i < block.padded; i += V::kLanes) {
    const V y = V::load(block.labels + i), hit = has_pos_weight ? y * V::load(block.pos_weight + i) : y;
    V loss = V::load(block.loss + i), gradient = V::load(block.gradient + i);
    add_hard_element(to_loss, to_gradient, V::load(block.s + i), y, hit, loss, gradient);
    loss.store(block.loss + i);
    gradient.store(block.gradient + i);
  }
}

template <class V>
double sum_of(const typename V::Scalar* values, int64_t padded) {
  V sum = V(0);
  for (int64_t i = 0; i < padded; i += V::kLanes) sum = sum + V::load(values + i);
  return reduce_add(sum);
}

template <class V>
void loss_of_blocks(const BinaryProblem& p, int64_t begin, int64_t end) {
  using Scalar = typename V::Scalar;
  const bool soft = p.soft_scale > 0, hard = p.hard_weight > 0;
  const bool streams = p.gradient.data && p.gradient.data != p.student.data && p.num_elements >= (1 << 20);
  Call<Scalar> call;
  call.beta = Scalar(p.beta);
  call.one_minus_beta = Scalar(p.one_minus_beta);
  call.soft_loss = Scalar(p.soft_scale);
  call.soft_gradient = Scalar(p.scale * p.soft_scale / p.student_temperature);
  call.hard_loss = Scalar(p.hard_weight);
  call.hard_gradient = Scalar(p.scale * p.hard_weight);
  for (int64_t number = begin; number < end; ++number) {
    Block<V> block(p, number);
    if (block.is_weighted) block.read_weights(p);
    block.s = block.read_logits(p, p.student, block.student, block.ahead_s);
    const bool soft_alone = soft && !hard && !block.is_weighted && !p.grad_output.data && block.n == block.padded;
    Scalar* const place = soft_alone && !streams ? block.place_of(p, p.gradient) : nullptr;
    block.g = place ? place : block.gradient;
    if (block.is_weighted) block.clear_ignored(block.student);
    if (soft) {
      block.t = block.read_logits(p, p.teacher, block.teacher, block.ahead_t);
      if (block.is_weighted) block.clear_ignored(block.teacher);
      with_divergence<V>(p.divergence, [&](auto d) {
        using D = decltype(d);
        call.k_s = Scalar((D::kRawLogits ? 1 : kLog2E) / p.student_temperature);
        call.k_t = Scalar((D::kRawLogits ? 1 : kLog2E) / p.teacher_temperature);
        if constexpr (!D::kExcludesLabel) soft_pass<D>(call, block);
      });
    } else {
      std::memset(block.loss, 0, sizeof(block.loss));
      std::memset(block.gradient, 0, sizeof(block.gradient));
    }
    if (hard) {
      block.clear_ignored(block.labels);
      if (p.pos_weight.data) block.read(p, p.pos_weight, block.pos_weight);
      hard_pass(call, block, p.pos_weight.data != nullptr);
    }
    if (block.is_weighted) {
      // Not times a weight of 0: a temperature may have made infinities of factors.
      for (int64_t i = 0; i < block.padded; ++i) block.loss[i] *= block.weight[i];
      for (int64_t i = 0; i < block.padded; ++i) block.gradient[i] *= block.weight[i];
      block.clear_ignored(block.loss);
      block.clear_ignored(block.gradient);
    }
    if (p.grad_output.data) {
      block.read(p, p.grad_output, block.grad_output);
      if (block.is_weighted) block.clear_ignored(block.grad_output);
      for (int64_t i = 0; i < block.padded; ++i) block.gradient[i] *= block.grad_output[i];
    }
    block.clear_padding(block.loss);
    p.sums[number] = soft_alone ? block.sum : sum_of<V>(block.loss, block.padded);
    if (p.losses.data) {
      const Scalar scale = Scalar(p.scale);
      for (int64_t i = 0; i < block.n; ++i) block.loss[i] *= scale;
      scatter(p, p.losses, block.begin, block.n, block.loss, false);
    }
    if (p.gradient.data && !place) scatter(p, p.gradient, block.begin, block.n, block.gradient, streams);
  }
  if (streams) stream_fence();
}

template <class V>
WrongValue weights_of_blocks(const BinaryProblem& p, int64_t begin, int64_t end) {
  using Scalar = typename V::Scalar;
  const Scalar infinity = Scalar(kInf);
  WrongValue wrong;
  for (int64_t number = begin; number < end; ++number) {
    Block<V> block(p, number);
    const auto look = [&](const char* name, const Scalar* values, auto&& is_wrong) {
      int any = 0;
      for (int64_t i = 0; i < block.n; ++i) any |= is_wrong(i);
      for (int64_t i = 0; any && i < block.n && !wrong.name; ++i) {
        if (is_wrong(i)) wrong = {name, double(values[i])};
      }
    };
    const auto no_weight = [&](int64_t i) { return !(block.pos_weight[i] >= 0 && block.pos_weight[i] < infinity); };
    if (p.weight.data) {  // before labels make some of it 0
      block.read(p, p.weight, block.pos_weight);
      look("weight", block.pos_weight, no_weight);
    }
    if (p.pos_weight.data) {
      block.read(p, p.pos_weight, block.pos_weight);
      look("pos_weight", block.pos_weight, no_weight);
    }
    block.read_weights(p);
    block.clear_padding(block.weight);
    if (p.labels.data) {
      look("labels", block.labels,
           [&](int64_t i) { return block.weight[i] != 0 && !(block.labels[i] >= 0 && block.labels[i] <= 1); });
    }
    if (wrong.name) return wrong;
    p.sums[number] = sum_of<V>(block.weight, block.padded);
  }
  return wrong;
}

template <class V>
void scale_blocks(const BinaryProblem& p, int64_t begin, int64_t end) {
  for (int64_t number = begin; number < end; ++number) {
    Block<V> block(p, number);
    block.read(p, p.gradient, block.gradient);
    block.read(p, p.grad_output, block.grad_output);
    for (int64_t i = 0; i < block.padded; ++i) block.gradient[i] *= block.grad_output[i];
    if (block.is_weighted) {
      block.read_weights(p);
      block.clear_ignored(block.gradient);
    }
    scatter(p, p.gradient, block.begin, block.n, block.gradient, false);
  }
}

// The type the arithmetic is in.
bool is_double(const Elements& of) { return of.data && of.dtype == DType::kFloat64; }

void loss(const BinaryProblem& p, int64_t begin, int64_t end) {
  if (is_double(p.student) || is_double(p.teacher)) return loss_of_blocks<Double>(p, begin, end);
  loss_of_blocks<Float>(p, begin, end);
}

WrongValue weights(const BinaryProblem& p, int64_t begin, int64_t end) {
  return weights_of_blocks<Double>(p, begin, end);
}

void scale(const BinaryProblem& p, int64_t begin, int64_t end) {
  if (is_double(p.gradient)) return scale_blocks<Double>(p, begin, end);
  scale_blocks<Float>(p, begin, end);
}

}  // namespace

const BinaryKernels& REPTILE_EXT_BINARY_KERNELS() {
  static const BinaryKernels kernels = {loss, weights, scale};
  return kernels;
}

}  // namespace reptile_ext
