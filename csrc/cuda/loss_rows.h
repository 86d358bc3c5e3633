// The kernels: loss and gradient of rows of logits, forward and backward in one go. docs/cuda.md tells how and why.
//
// A team of threads shares a row (Plan). It goes over the row two to four times:
//
//     maximum        of both rows, and an exchange between the threads of the team
//     first pass     the divergence's sums, with the cross entropy's, and an exchange
//     mixture pass   of the divergences over normalised probabilities, and an exchange
//     last pass      the gradient
//
// Where the team's registers hold the row, memory sees two reads and one write of each element, and exponentials are
// computed again rather than kept: a float32 exponential takes twice the registers of two 16-bit logits. Otherwise the
// row is read again in every pass. Passes are written once, over a Row that is either.
//
// Classes come in chunks of kChunk, so that a chunk is whole loads of 16 bytes: where the rows of all operands begin at
// the same distance from such a boundary, chunks are counted from the boundary, and only the chunks at the row's ends
// are taken element by element. Classes that are not there read as −inf on both sides, which counts for nothing.
#pragma once

#include "device.h"  // first: what divergence.h computes with

#include "../divergence.h"
#include "loss.h"

namespace reptile_ext {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxWarps = kMaxBlockThreads / kWarp;
constexpr int kMaxExchanged = 8;
constexpr int kBlockChunks = 16;  // chunks of a thread between roundings into the row's sums

// What the threads of a team larger than a warp tell one another. Everything is there twice and used in turn: between
// two uses of the same lies a use of the other, with its barrier, so who still reads is not overtaken by who writes.
// That holds for each kind by itself: a barrier of the block does not hold up the cluster's other blocks.
template <class V>
struct Exchange {
  V of_warp[2][kMaxWarps * kMaxExchanged];
  V of_block[2][kMaxClusterBlocks * kMaxExchanged];
};

template <class V>
struct Team {
  Exchange<V>* exchange;
  int threads;  // in this block
  int rank;     // in this block
  int blocks, block;
  int block_turn = 0, cluster_turn = 0;

  REPTILE_EXT_DEVICE int size() const { return threads * blocks; }
  REPTILE_EXT_DEVICE int global_rank() const { return block * threads + rank; }

  // Every thread gets x[i] of all threads, joined; all in the same order, so the same bits.
  template <int kCount, class Join>
  REPTILE_EXT_DEVICE void all_reduce(V (&x)[kCount], Join join) {
    static_assert(kCount <= kMaxExchanged);
    in_warp(x, threads < kWarp ? threads : kWarp, join);
    if (threads <= kWarp && blocks == 1) return;
    const int num_warps = threads / kWarp;
    if (num_warps > 1) {
      V* const of_warp = exchange->of_warp[block_turn];
      block_turn ^= 1;
      if (rank % kWarp == 0) {
        for (int i = 0; i < kCount; ++i) store_shared(&of_warp[(rank / kWarp) * kMaxExchanged + i], x[i]);
      }
      sync_block();
      for (int i = 0; i < kCount; ++i) {
        x[i] = load_shared(&of_warp[(rank % num_warps) * kMaxExchanged + i]);
      }
      in_warp(x, num_warps, join);
    }
    if (blocks > 1) {
      V* const of_block = exchange->of_block[cluster_turn];
      cluster_turn ^= 1;
      if (rank < blocks) {
        for (int i = 0; i < kCount; ++i) store_shared(of_peer(&of_block[block * kMaxExchanged + i], rank), x[i]);
      }
      sync_cluster();
      for (int i = 0; i < kCount; ++i) {
        V joined = load_shared(&of_block[i]);
        for (int b = 1; b < blocks; ++b) joined = join(joined, load_shared(&of_block[b * kMaxExchanged + i]));
        x[i] = joined;
      }
    }
  }

  // Every thread of the block gets x of the team's first thread in it.
  template <int kCount>
  REPTILE_EXT_DEVICE void broadcast(V (&x)[kCount]) {
    static_assert(kCount <= kMaxExchanged);
    if (threads <= kWarp) {
      const int first = (thread_rank() % kWarp) / threads * threads;
      for (int i = 0; i < kCount; ++i) x[i] = shuffle_from(x[i], first);
      return;
    }
    V* const of_warp = exchange->of_warp[block_turn];
    block_turn ^= 1;
    if (rank == 0) {
      for (int i = 0; i < kCount; ++i) store_shared(&of_warp[i], x[i]);
    }
    sync_block();
    for (int i = 0; i < kCount; ++i) x[i] = load_shared(&of_warp[i]);
  }

 private:
  template <int kCount, class Join>
  REPTILE_EXT_DEVICE static void in_warp(V (&x)[kCount], int lanes, Join join) {
    for (int mask = lanes / 2; mask > 0; mask /= 2) {
      for (int i = 0; i < kCount; ++i) x[i] = join(x[i], shuffle_xor(x[i], mask));
    }
  }
};

// ------------------------------------------------------------------------------------------------- loads and stores

template <class V>
REPTILE_EXT_DEVICE V load_class(const Operand& operand, int64_t at) {
  switch (operand.dtype) {
    case DType::kFloat32:
      return V(load(static_cast<const float*>(operand.data) + at));
    case DType::kBFloat16:
      return V(float_of_bits(uint32_t(load(static_cast<const uint16_t*>(operand.data) + at)) << 16));
    case DType::kFloat16:
      return V(float_of_half(load(static_cast<const uint16_t*>(operand.data) + at)));
    default:
      return V(load(static_cast<const double*>(operand.data) + at));
  }
}

template <class V>
REPTILE_EXT_DEVICE void store_class(const Operand& operand, int64_t at, V x) {
  switch (operand.dtype) {
    case DType::kFloat32:
      return store(static_cast<float*>(operand.data) + at, float(x));
    case DType::kBFloat16:
      return store(static_cast<uint16_t*>(operand.data) + at, bfloat16_of(float(x)));
    case DType::kFloat16:
      return store(static_cast<uint16_t*>(operand.data) + at, half_of(float(x)));
    default:
      return store(static_cast<double*>(operand.data) + at, double(x));
  }
}

// How a kernel's rows lie in memory, where that is known when it is compiled; kAny: it is not, and they are read again
// in every pass.
enum class Storage { kAny, kFloat32, kBFloat16, kFloat16 };
constexpr DType dtype_of(Storage storage) {
  return storage == Storage::kBFloat16  ? DType::kBFloat16
         : storage == Storage::kFloat16 ? DType::kFloat16
                                        : DType::kFloat32;
}

// A chunk as it lies in memory, 16 bytes after 16 bytes.
template <int kWords>
struct Raw {
  Bits128 word[kWords];

  // `again`: it will be read once more, and should stay in the L2.
  REPTILE_EXT_DEVICE void load(const char* p, bool again) {
    for (int w = 0; w < kWords; ++w) word[w] = again ? load_128_again(p + 16 * w) : load_128(p + 16 * w);
  }
};

template <class V>
REPTILE_EXT_DEVICE void widen(const Raw<1>& raw, DType dtype, V (&x)[kChunk]) {
  for (int i = 0; i < kChunk; i += 2) {
    const uint32_t pair = raw.word[0].word[i / 2];
    if (dtype == DType::kBFloat16) {
      x[i] = V(float_of_bits(pair << 16));
      x[i + 1] = V(float_of_bits(pair & 0xffff0000u));
    } else {
      x[i] = V(float_of_half(uint16_t(pair)));
      x[i + 1] = V(float_of_half(uint16_t(pair >> 16)));
    }
  }
}
template <class V>
REPTILE_EXT_DEVICE void widen(const Raw<2>& raw, DType, V (&x)[kChunk]) {
  for (int i = 0; i < kChunk; ++i) x[i] = V(float_of_bits(raw.word[i / 4].word[i % 4]));
}

REPTILE_EXT_DEVICE void store_chunk(char* p, DType dtype, const float (&x)[kChunk]) {
  Bits128 raw;
  if (size_of(dtype) == 2) {
    for (int i = 0; i < kChunk; i += 2) {
      const bool brain = dtype == DType::kBFloat16;
      const uint32_t low = brain ? bfloat16_of(x[i]) : half_of(x[i]);
      const uint32_t high = brain ? bfloat16_of(x[i + 1]) : half_of(x[i + 1]);
      raw.word[i / 2] = low | high << 16;
    }
    store_128(p, raw);
  } else {
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 4; ++i) raw.word[i] = bits_of(x[4 * half + i]);
      store_128(p + 16 * half, raw);
    }
  }
}

// Where a row's operands begin, and how its classes fall into chunks: chunk c holds the classes from c · kChunk −
// shift.
struct Place {
  int64_t student, teacher, gradient;  // elements
  int64_t vocab_size, num_chunks;
  int shift = 0;
  bool aligned = false;  // whole chunks may be loaded and stored at once

  REPTILE_EXT_DEVICE Place(const LossProblem& p, int64_t row) : student(0), teacher(0), gradient(0) {
    for (int d = p.num_row_dims - 1; d >= 0; --d) {
      int64_t index = row;
      if (d > 0) {  // the outermost needs no division
        row = index / p.row_sizes[d];
        index -= row * p.row_sizes[d];
      }
      student += index * p.student.row_strides[d];
      teacher += index * p.teacher.row_strides[d];
      gradient += index * p.gradient.row_strides[d];
    }
    vocab_size = p.vocab_size;
    if (p.student.class_stride == 1 && p.teacher.class_stride == 1 &&
        (!p.gradient.data || p.gradient.class_stride == 1) && p.student.dtype == p.teacher.dtype &&
        p.student.dtype != DType::kFloat64) {
      const int size = int(size_of(p.student.dtype));
      const auto distance = [&](const Operand& o, int64_t at) {
        return int((uintptr_t(o.data) + at * size) % 16) / size;
      };
      shift = distance(p.student, student);
      aligned = distance(p.teacher, teacher) == shift && (!p.gradient.data || distance(p.gradient, gradient) == shift);
      if (!aligned) shift = 0;
    }
    num_chunks = (vocab_size + shift + kChunk - 1) / kChunk;
  }

  REPTILE_EXT_DEVICE int64_t first_class(int64_t chunk) const { return chunk * kChunk - shift; }
  REPTILE_EXT_DEVICE bool is_whole(int64_t chunk) const {
    return aligned && first_class(chunk) >= 0 && first_class(chunk) + kChunk <= vocab_size;
  }
};

template <class V>
REPTILE_EXT_DEVICE void load_elements(const Operand& operand, int64_t row, const Place& place, int64_t chunk,
                                      V (&x)[kChunk]) {
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = place.first_class(chunk) + i;
    x[i] = v >= 0 && v < place.vocab_size ? load_class<V>(operand, row + v * operand.class_stride)
                                          : negative_infinity<V>();
  }
}

template <class V>
REPTILE_EXT_DEVICE const char* address(const Operand& operand, int64_t element) {
  return static_cast<const char*>(operand.data) + element * int64_t(size_of(operand.dtype));
}

template <Storage kStorage, class V>
REPTILE_EXT_DEVICE void store_gradient(const Operand& gradient, const Place& place, int64_t chunk,
                                       const V (&g)[kChunk]) {
  const int64_t first_class = place.first_class(chunk);
  if constexpr (sizeof(V) == 4) {
    if (place.is_whole(chunk)) {
      char* to = const_cast<char*>(address<V>(gradient, place.gradient + first_class));
      return store_chunk(to, kStorage == Storage::kAny ? gradient.dtype : dtype_of(kStorage), g);
    }
  }
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = first_class + i;
    if (v >= 0 && v < place.vocab_size) store_class(gradient, place.gradient + v * gradient.class_stride, g[i]);
  }
}

// A gradient of 0 from class `from` on.
template <class V>
REPTILE_EXT_DEVICE void clear(const LossProblem& p, const Place& place, const Team<V>& team, int64_t from) {
  for (int64_t v = from + team.global_rank(); v < p.gradient_size; v += team.size()) {
    store_class(p.gradient, place.gradient + v * p.gradient.class_stride, V(0));
  }
}

// A row that is read in every pass.
template <class V>
struct MemoryRow {
  const LossProblem& p;
  const Place& place;

  REPTILE_EXT_DEVICE MemoryRow(const LossProblem& problem, const Place& place) : p(problem), place(place) {}
  REPTILE_EXT_DEVICE void fetch(const Team<V>&) {}

  // visit(chunk, student, teacher) for the chunks of this thread.
  template <class Visit>
  REPTILE_EXT_DEVICE void each(const Team<V>& team, Visit visit) const {
    for (int64_t c = team.global_rank(); c < place.num_chunks; c += team.size()) {
      V s[kChunk], t[kChunk];
      const bool whole = place.is_whole(c);
      read(p.student, place.student, c, whole, s);
      read(p.teacher, place.teacher, c, whole, t);
      visit(c, s, t);
    }
  }

 private:
  REPTILE_EXT_DEVICE void read(const Operand& operand, int64_t row, int64_t chunk, bool whole, V (&x)[kChunk]) const {
    const char* from = address<V>(operand, row + place.first_class(chunk));
    if (whole && size_of(operand.dtype) == 2) {
      Raw<1> raw;
      raw.load(from, true);
      widen(raw, operand.dtype, x);
    } else if (whole) {
      Raw<2> raw;
      raw.load(from, true);
      widen(raw, operand.dtype, x);
    } else {
      load_elements(operand, row, place, chunk, x);
    }
  }
};

// A row that is read once.
template <Storage kStorage>
struct RegisterRow {
  static constexpr DType kDType = dtype_of(kStorage);
  static constexpr int kWords = int(size_of(kDType)) / 2, kChunks = chunks_in_registers(kDType);
  const LossProblem& p;
  const Place& place;
  Raw<kWords> student[kChunks], teacher[kChunks];

  REPTILE_EXT_DEVICE RegisterRow(const LossProblem& problem, const Place& place) : p(problem), place(place) {}

  REPTILE_EXT_DEVICE void fetch(const Team<float>& team) {
    REPTILE_EXT_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      const int64_t c = team.global_rank() + int64_t(i) * team.size();
      if (place.is_whole(c)) {
        student[i].load(address<float>(p.student, place.student + place.first_class(c)), false);
        teacher[i].load(address<float>(p.teacher, place.teacher + place.first_class(c)), false);
      } else {
        gather(p.student, place.student, c, student[i]);
        gather(p.teacher, place.teacher, c, teacher[i]);
      }
    }
  }

  template <class Visit>
  REPTILE_EXT_DEVICE void each(const Team<float>& team, Visit visit) const {
    REPTILE_EXT_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      float s[kChunk], t[kChunk];
      widen(student[i], kDType, s);
      widen(teacher[i], kDType, t);
      visit(team.global_rank() + int64_t(i) * team.size(), s, t);
    }
  }

 private:
  // A chunk at an end of the row, or beyond it.
  REPTILE_EXT_DEVICE void gather(const Operand& operand, int64_t row, int64_t chunk, Raw<kWords>& raw) const {
    constexpr int kBytes = 2 * kWords;
    const uint32_t masked = kBytes == 4 ? 0xff800000u : kDType == DType::kBFloat16 ? 0xff80u : 0xfc00u;
    REPTILE_EXT_UNROLL
    for (int i = 0; i < kChunk; ++i) {
      const int64_t v = place.first_class(chunk) + i;
      uint32_t bits = masked;
      if (v >= 0 && v < place.vocab_size) {
        if (kBytes == 4) {
          bits = load(static_cast<const uint32_t*>(operand.data) + row + v);
        } else {
          bits = load(static_cast<const uint16_t*>(operand.data) + row + v);
        }
      }
      uint32_t& word = raw.word[i * kBytes / 16].word[i * kBytes / 4 % 4];
      word = kBytes == 4 ? bits : i % 2 == 0 ? bits : word | bits << 16;
    }
  }
};

// -------------------------------------------------------------------------------------------------------- the passes

template <class V>
struct Numbers {  // of a call, in the arithmetic's type
  V k_s, k_t, beta, one_minus_beta;
  bool hard, smooth;
};

template <class D, class V>
struct RowNumbers {
  V m_s, m_t;  // reference points
  V ratio;     // Z_s / Z_t
  V bounded;   // 0: kept[kUnbounded] is taken as 0
  int64_t label;
};

// What `first` and `mix` keep of a class, with what they add to the sums.
template <class D, class V>
REPTILE_EXT_DEVICE void first(const Numbers<V>& call, const RowNumbers<D, V>& row, int64_t v, V s, V t,
                              V (&sums)[D::kSums], V (&kept)[D::kKept]) {
  if (D::kExcludesLabel && v == row.label) s = t = negative_infinity<V>();
  D::first((s - row.m_s) * call.k_s, (t - row.m_t) * call.k_t, sums, kept);
}

REPTILE_EXT_DEVICE bool is_row_in(const DeviceLoss& device, int64_t n) {
  const LossProblem& p = device.problem;
  if (p.weights && load(p.weights + n) == 0) return false;
  return !p.labels || load(p.labels + n) != device.ignore_index;
}
REPTILE_EXT_DEVICE bool has_wrong_label(const LossProblem& p, int64_t n) {
  if (!p.labels) return false;
  const int64_t label = load(p.labels + n);
  return label < 0 || label >= p.vocab_size;
}

// Has the next row of a team in the L2 by the time it is wanted: its whole chunks, each block a share of them. By the
// team's last thread, whose warp has the least to do. Rows of less than a block need none: many are read at once.
template <class V>
REPTILE_EXT_DEVICE void prefetch_row(const DeviceLoss& device, const Team<V>& team, int64_t row) {
  const LossProblem& p = device.problem;
  if (team.rank != team.threads - 1 || row >= p.num_rows || !is_row_in(device, row)) return;
  const Place place(p, row);
  if (!place.aligned) return;
  const int64_t first = place.shift > 0 ? 1 : 0;
  const int64_t end = (place.vocab_size + place.shift) / kChunk;  // whole chunks
  const int64_t share = (end - first + team.blocks - 1) / team.blocks;
  const int64_t from = first + share * team.block;
  const int64_t count = end - from < share ? end - from : share;
  if (count <= 0) return;
  const uint32_t bytes = uint32_t(count * kChunk * int64_t(size_of(p.student.dtype)));
  prefetch_to_l2(address<V>(p.student, place.student + place.first_class(from)), bytes);
  prefetch_to_l2(address<V>(p.teacher, place.teacher + place.first_class(from)), bytes);
}

// Loss and gradient of one row. `is_in` false: nothing is read and the gradient is 0; `exists` false: nothing is
// written either, the threads only keep the others company.
template <class D, class V, Storage kStorage, class Row_>
REPTILE_EXT_DEVICE void loss_of_row(const DeviceLoss& device, const Numbers<V>& call, Team<V>& team, Row_& source,
                                    const Place& place, int64_t n, int64_t next, bool exists, bool is_in,
                                    bool is_broken) {
  using G = typename D::Gradient;
  const LossProblem& p = device.problem;
  const auto add = [](V a, V b) { return a + b; };
  const auto larger = [](V a, V b) { return any_max(a, b); };

  RowNumbers<D, V> row;
  row.label = p.labels && is_in && !is_broken ? load(p.labels + n) : -1;
  // Before the gradient is written over it.
  const bool has_label = row.label >= 0 && (call.hard || D::kExcludesLabel);
  const V s_label = has_label ? load_class<V>(p.student, place.student + row.label * p.student.class_stride) : V(0);
  const V t_label = has_label && D::kExcludesLabel
                        ? load_class<V>(p.teacher, place.teacher + row.label * p.teacher.class_stride)
                        : V(0);
  if (is_in) source.fetch(team);
  prefetch_row(device, team, next);

  // Maxima. A NaN may hide in one; it will show in the sums.
  V m[2] = {negative_infinity<V>(), negative_infinity<V>()};
  if (is_in) {
    source.each(team, [&](int64_t chunk, const V(&s)[kChunk], const V(&t)[kChunk]) {
      for (int i = 0; i < kChunk; ++i) {
        if (D::kExcludesLabel && place.first_class(chunk) + i == row.label) continue;
        m[0] = any_max(m[0], s[i]);
        m[1] = any_max(m[1], t[i]);
      }
    });
  }
  team.all_reduce(m, larger);
  // The cross entropy's; its row has the label's class.
  const V m_1 = D::kExcludesLabel && has_label ? max(m[0], s_label) : m[0];
  if (D::kExcludesLabel) {  // no other class may be left; then all exponentials are to be 0, not NaN
    for (V& x : m) x = x == negative_infinity<V>() ? V(0) : x;
  }
  row.m_s = D::kRawLogits ? V(0) : m[0];
  row.m_t = D::kRawLogits ? V(0) : m[1];
  const V log2_e = V(kLog2E);

  // First pass. The last three sums are the cross entropy's: Z, Σ a of the classes that are not masked, their number.
  V sums[D::kSums + 3];
  for (V& sum : sums) sum = V(0);
  if (is_in) {
    V block[D::kSums], hard[3];
    int filled = 0;
    const auto flush = [&] {
      for (int i = 0; i < D::kSums; ++i) sums[i] = sums[i] + block[i];
      for (int i = 0; i < 3; ++i) sums[D::kSums + i] = sums[D::kSums + i] + hard[i];
    };
    source.each(team, [&](int64_t chunk, const V(&s)[kChunk], const V(&t)[kChunk]) {
      if (filled == 0) {
        for (V& x : block) x = V(0);
        for (V& x : hard) x = V(0);
      }
      for (int i = 0; i < kChunk; ++i) {
        V kept[D::kKept];
        first<D>(call, row, place.first_class(chunk) + i, s[i], t[i], block, kept);
        if (call.hard) {
          const V a = (s[i] - m_1) * log2_e;
          hard[0] = hard[0] + exp2(a);
          if (call.smooth) {
            hard[1] = hard[1] + where_not_masked(s[i], a);
            hard[2] = hard[2] + where_not_masked(s[i], V(1));
          }
        }
      }
      if (++filled == kBlockChunks) {
        flush();
        filled = 0;
      }
    });
    if (filled > 0) flush();
  }
  team.all_reduce(sums, add);

  // Mixture pass.
  V mixture[D::kMixtureSums + 1];
  for (V& sum : mixture) sum = V(0);
  row.ratio = V(1);
  if constexpr (D::kMixtureSums > 0) {
    row.ratio = V(double(sums[0]) / double(sums[1]));
    if (is_in) {
      V block[D::kMixtureSums];
      int filled = 0;
      source.each(team, [&](int64_t chunk, const V(&s)[kChunk], const V(&t)[kChunk]) {
        if (filled == 0) {
          for (V& x : block) x = V(0);
        }
        for (int i = 0; i < kChunk; ++i) {
          V unused[D::kSums] = {}, kept[D::kKept];
          first<D>(call, row, place.first_class(chunk) + i, s[i], t[i], unused, kept);
          D::mix(kept[0], kept[1] * row.ratio, call.beta, call.one_minus_beta, block, kept);
        }
        if (++filled == kBlockChunks) {
          for (int i = 0; i < D::kMixtureSums; ++i) mixture[i] = mixture[i] + block[i];
          filled = 0;
        }
      });
      if (filled > 0) {
        for (int i = 0; i < D::kMixtureSums; ++i) mixture[i] = mixture[i] + block[i];
      }
    }
    team.all_reduce(mixture, add);
  }

  // In between, by one thread in double precision. k and what else the last pass needs go to all.
  V numbers[G::kCoefficients + 4];
  for (V& number : numbers) number = V(0);
  const double weight = is_in ? (p.weights ? load(p.weights + n) : 1.0) : 0.0;
  if (team.rank == 0 && is_in) {
    double scale = weight * p.gradient_scale;
    if (device.divisor) scale /= load(device.divisor);
    if (p.grad_output) scale *= load(p.grad_output + (p.grad_output_is_uniform ? 0 : n));
    double of_pass[D::kSums], of_mixture[D::kMixtureSums + 1];
    for (int i = 0; i < D::kSums; ++i) of_pass[i] = double(sums[i]);
    for (int i = 0; i < D::kMixtureSums; ++i) of_mixture[i] = double(mixture[i]) / of_pass[0];
    Row of_row{of_pass, of_mixture, p.beta, p.one_minus_beta, 0, 0};
    if (D::kExcludesLabel) {
      of_row.a_label = (double(s_label) - double(m[0])) * (kLog2E / p.student_temperature);
      of_row.b_label = (double(t_label) - double(m[1])) * (kLog2E / p.teacher_temperature);
    }
    double k[G::kCoefficients];
    double value = D::finish(of_row, scale * p.soft_scale / p.student_temperature, k);
    if (value < 0) value = 0;
    double loss = p.soft_scale * value, hit = 0, to_q1 = 0, uniform = 0;
    if (call.hard) {
      const double z = double(sums[D::kSums]), log_z = log(z);
      double entropy = log_z - (double(s_label) - double(m_1));
      if (call.smooth) {
        const double count = double(sums[D::kSums + 2]);
        const double uniformly = log_z - kLn2 * double(sums[D::kSums + 1]) / count;
        entropy = p.label_smoothing < 1 ? (1 - p.label_smoothing) * entropy + p.label_smoothing * uniformly : uniformly;
        uniform = scale * p.hard_weight * p.label_smoothing / count;
      }
      loss += p.hard_weight * entropy;
      to_q1 = scale * p.hard_weight / z;
      hit = scale * p.hard_weight * (1 - p.label_smoothing);
    }
    if (is_broken || value != value) {  // all of its gradient is NaN, wherever in the row it broke
      if (is_broken) loss = kNaN;
      for (double& coefficient : k) coefficient = kNaN;
    }
    for (int i = 0; i < G::kCoefficients; ++i) numbers[i] = V(k[i]);
    numbers[G::kCoefficients] = V(of_row.is_unbounded ? 0 : 1);
    numbers[G::kCoefficients + 1] = V(to_q1);
    numbers[G::kCoefficients + 2] = V(uniform);
    numbers[G::kCoefficients + 3] = V(hit);
    if (team.block == 0) store(p.row_losses + n, weight * loss);
  }
  if (exists && !is_in && team.global_rank() == 0) store(p.row_losses + n, 0.0);
  if (!p.gradient.data) return;
  team.broadcast(numbers);

  // Last pass.
  V k[G::kCoefficients];
  for (int i = 0; i < G::kCoefficients; ++i) k[i] = numbers[i];
  const V to_q1 = numbers[G::kCoefficients + 1], uniform = numbers[G::kCoefficients + 2];
  const V hit = numbers[G::kCoefficients + 3];
  row.bounded = numbers[G::kCoefficients];
  if (is_in) {
    source.each(team, [&](int64_t chunk, const V(&s)[kChunk], const V(&t)[kChunk]) {
      if (chunk >= place.num_chunks) return;
      V g[kChunk];
      for (int i = 0; i < kChunk; ++i) {
        const int64_t v = place.first_class(chunk) + i;
        V unused[D::kSums] = {}, kept[D::kKept];
        first<D>(call, row, v, s[i], t[i], unused, kept);
        if constexpr (D::kMixtureKeeps) {
          V unused_too[D::kMixtureSums] = {};
          D::mix(kept[0], kept[1] * row.ratio, call.beta, call.one_minus_beta, unused_too, kept);
        }
        if constexpr (D::kUnbounded >= 0) {
          if (row.bounded == V(0)) kept[D::kUnbounded] = V(0);
        }
        V of_gradient[G::kKept];
        for (int j = 0; j < G::kKept; ++j) of_gradient[j] = kept[j];
        g[i] = G::gradient(of_gradient, k);
        if (D::kExcludesLabel && v == row.label) g[i] = k[G::kCoefficients - 1];
        if (call.hard) {
          g[i] = g[i] + exp2((s[i] - m_1) * log2_e) * to_q1;
          if (call.smooth) g[i] = g[i] - where_not_masked(s[i], uniform);
          if (v == row.label) g[i] = g[i] - hit;
        }
      }
      store_gradient<kStorage>(p.gradient, place, chunk, g);
    });
  }
  if (exists) clear(p, place, team, is_in ? place.vocab_size : 0);
}

template <class V, Storage kStorage>
struct RowOf {
  using Type = RegisterRow<kStorage>;
};
template <class V>
struct RowOf<V, Storage::kAny> {
  using Type = MemoryRow<V>;
};

template <class D, class V, Storage kStorage>
REPTILE_EXT_KERNEL(sizeof(V) == 8 ? kMaxDoubleBlockThreads : kMaxBlockThreads)
loss_kernel(REPTILE_EXT_ARGUMENT DeviceLoss device, const Plan plan) {
  Exchange<V>& exchange = shared_memory<Exchange<V>>();
  const LossProblem& p = device.problem;
  Numbers<V> call;
  call.k_s = V((D::kRawLogits ? 1 : kLog2E) / p.student_temperature);
  call.k_t = V((D::kRawLogits ? 1 : kLog2E) / p.teacher_temperature);
  call.beta = V(p.beta);
  call.one_minus_beta = V(p.one_minus_beta);
  call.hard = p.hard_weight > 0;
  call.smooth = p.label_smoothing > 0;

  Team<V> team;
  team.exchange = &exchange;
  team.threads = plan.team_threads;
  team.rank = thread_rank() % plan.team_threads;
  team.blocks = plan.cluster_blocks;
  team.block = plan.cluster_blocks > 1 ? cluster_rank() : 0;

  if (plan.cluster_blocks > 1) sync_cluster();  // a peer's memory is there once it has begun
  const int64_t rows_per_block = plan.rows_per_block();
  const int64_t stride = num_blocks() / plan.cluster_blocks * rows_per_block;
  // All threads of a block go round together, those without a row too: shuffles and barriers need them.
  for (int64_t base = block_rank() / plan.cluster_blocks * rows_per_block; base < p.num_rows; base += stride) {
    const int64_t n = base + thread_rank() / plan.team_threads;
    const bool exists = n < p.num_rows;
    const bool is_in = exists && is_row_in(device, n);
    const bool is_broken = is_in && has_wrong_label(p, n);
    const Place place(p, exists ? n : 0);
    if (plan.team_threads > kWarp && !is_in) {  // the whole team agrees, and no other waits for it
      if (team.global_rank() == 0) store(p.row_losses + n, 0.0);
      if (p.gradient.data) clear(p, place, team, 0);
      continue;
    }
    typename RowOf<V, kStorage>::Type source(p, place);
    const int64_t next = plan.team_threads > kWarp ? n + stride : p.num_rows;
    loss_of_row<D, V, kStorage>(device, call, team, source, place, n, next, exists, is_in, is_broken);
  }
  if (plan.cluster_blocks > 1) sync_cluster();  // nobody leaves while a peer may still write to its memory
}

}  // namespace
}  // namespace reptile_ext
