// How a row's classes come from memory and its gradient goes there.
//
// Classes come in chunks of kChunk, so that a chunk is whole loads of 16 bytes: where the rows of all operands begin at
// the same distance from such a boundary, chunks are counted from the boundary, and only the chunks at the row's ends
// are taken element by element. Classes that are not there read as −inf on both sides, which counts for nothing.
//
// A row is held in one of two ways, and passes are written once, over either:
//
//     RegisterRow    read once; the team's registers hold it as it lies in memory
//     MemoryRow      read again in every pass, most of it from the L2: any layout, any mixture of types
#pragma once

#include "team.h"

namespace reptile_ext {
namespace {

// ------------------------------------------------------------------------------------------------- a class at a time

template <class V, class Operand>
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

template <class V, class Operand>
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

// ------------------------------------------------------------------------------------------------- a chunk at a time

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

// A chunk's classes in the arithmetic's type: of 16 bits two a word, or one of float32.
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

// The one rounding of the gradient to its type.
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
// shift. Rows of an odd V begin at any distance from 16 bytes; as long as it is the same for all operands, it is the
// shift, and chunks are whole loads all the same.
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
    if (vocab_size > 0 && p.student.class_stride == 1 && p.teacher.class_stride == 1 &&
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

// A chunk at an end of a row, or of a row whose chunks are no whole loads.
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

// A chunk of the gradient: whole if it is one, and only classes that are there.
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

// ------------------------------------------------------------------------------------------------------------- a row

// A row that is read in every pass. Where its chunks are whole loads they stay in the L2 for the next pass; the dtype
// is looked up a chunk.
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

// A row that is read once, all of it before the first pass, so that all its loads are under way at once. The types and
// the number of chunks are the kernel's own: no array is indexed by what is not a constant, and so all lie in
// registers.
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
  // A chunk at an end of the row, or beyond it: −inf, in the row's own type, where no class is.
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

// Whether a row counts, by its weight and its label; no logit is read for that.
REPTILE_EXT_DEVICE bool row_counts(const DeviceLoss& device, int64_t n) {
  const LossProblem& p = device.problem;
  if (p.weights && load(p.weights + n) == 0) return false;
  return !p.labels || load(p.labels + n) != device.ignore_index;
}

// Has the next row of a team in the L2 by the time it is wanted: its whole chunks, each block a share of them. By the
// team's last thread, whose warp has the least to do. Rows of less than a block need none: many are read at once.
template <class V>
REPTILE_EXT_DEVICE void prefetch_row(const DeviceLoss& device, const Team<V>& team, int64_t row) {
  const LossProblem& p = device.problem;
  if (team.rank != team.threads - 1 || row >= p.num_rows || !row_counts(device, row)) return;
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

template <class V, Storage kStorage>
struct RowOf {
  using Type = RegisterRow<kStorage>;
};
template <class V>
struct RowOf<V, Storage::kAny> {
  using Type = MemoryRow<V>;
};

}  // namespace
}  // namespace reptile_ext
