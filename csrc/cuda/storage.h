// How a row's classes come from memory and its gradient goes there.
//
// Classes come in chunks of kChunk, so that a chunk is whole loads of 16 bytes: where the rows of all operands begin at
// the same distance from such a boundary, chunks are counted from the boundary, and only the chunks at the row's ends
// are taken element by element. Classes that are not there read as −inf on both sides, which counts for nothing.
//
// MemoryRow is read again in every pass, most of it from the L2: any layout, any mixture of types. Dense rows are read
// once, by ring_rows.cu.
#pragma once

#include "team.h"

#include "../divergence.h"

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
template <class V>
REPTILE_EXT_DEVICE void store_gradient(const Operand& gradient, const Place& place, int64_t chunk,
                                       const V (&g)[kChunk]) {
  const int64_t first_class = place.first_class(chunk);
  if constexpr (sizeof(V) == 4) {
    if (place.is_whole(chunk)) {
      char* to = const_cast<char*>(address<V>(gradient, place.gradient + first_class));
      return store_chunk(to, gradient.dtype, g);
    }
  }
  for (int i = 0; i < kChunk; ++i) {
    const int64_t v = first_class + i;
    if (v >= 0 && v < place.vocab_size) store_class(gradient, place.gradient + v * gradient.class_stride, g[i]);
  }
}

// 0 in elements that are neighbours, from element `first` of the gradient's memory to `last`, by threads of which this
// is one of `threads`.
REPTILE_EXT_DEVICE void clear_neighbours(const Operand& gradient, int64_t first, int64_t last, int thread,
                                         int threads) {
  const int64_t size = int64_t(size_of(gradient.dtype));
  char* const begin = static_cast<char*>(gradient.data) + first * size;
  char* const end = begin + (last - first) * size;
  // What lies before the first boundary of 16 bytes and behind the last one by elements, the rest at once.
  char* const first_whole = begin + (16 - uintptr_t(begin) % 16) % 16;
  const auto by_elements = [&](char* at, char* to) {
    for (at += thread * size; at < to; at += threads * size) {
      if (size == 2) {
        store(reinterpret_cast<uint16_t*>(at), uint16_t(0));
      } else {
        for (int i = 0; i < size; i += 4) store(reinterpret_cast<uint32_t*>(at + i), uint32_t(0));
      }
    }
  };
  if (first_whole >= end) return by_elements(begin, end);
  char* const last_whole = end - uintptr_t(end) % 16;
  by_elements(begin, first_whole);
  for (char* at = first_whole + int64_t(thread) * 16; at < last_whole; at += int64_t(threads) * 16) {
    store_128(at, Bits128{});
  }
  by_elements(last_whole, end);
}

// A gradient of 0 from class `from` on; of a dense row.
REPTILE_EXT_DEVICE void clear_row(const LossProblem& p, int64_t row, int64_t from, int thread, int threads) {
  const int64_t begin = row * p.gradient.row_strides[0];
  clear_neighbours(p.gradient, begin + from, begin + p.gradient_size, thread, threads);
}

// The same of any row.
template <class V>
REPTILE_EXT_DEVICE void clear(const LossProblem& p, const Place& place, const Team<V>& team, int64_t from) {
  if (from >= p.gradient_size) return;
  if (p.gradient.class_stride == 1) {
    return clear_neighbours(p.gradient, place.gradient + from, place.gradient + p.gradient_size, team.global_rank(),
                            team.size());
  }
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

  // visit(chunk, student, teacher) for the chunks of this thread.
  template <class Visit>
  REPTILE_EXT_DEVICE void each(const Team<V>& team, Visit visit) const {
    for (int64_t c = team.global_rank(); c < place.num_chunks; c += team.size()) {
      V s[kChunk], t[kChunk];
      if (place.is_whole(c)) {  // of one type; both loads are under way before the first is waited for
        const char* const student = address<V>(p.student, place.student + place.first_class(c));
        const char* const teacher = address<V>(p.teacher, place.teacher + place.first_class(c));
        if (size_of(p.student.dtype) == 2) {
          read<1>(student, teacher, s, t);
        } else {
          read<2>(student, teacher, s, t);
        }
      } else {
        load_elements(p.student, place.student, place, c, s);
        load_elements(p.teacher, place.teacher, place, c, t);
      }
      visit(c, s, t);
    }
  }

 private:
  template <int kWords>
  REPTILE_EXT_DEVICE void read(const char* student, const char* teacher, V (&s)[kChunk], V (&t)[kChunk]) const {
    Raw<kWords> raw_s, raw_t;
    raw_s.load(student, true);
    raw_t.load(teacher, true);
    widen(raw_s, p.student.dtype, s);
    widen(raw_t, p.teacher.dtype, t);
  }
};

// Whether a row counts, by its weight and its label; no logit is read for that.
REPTILE_EXT_DEVICE bool row_counts(const DeviceLoss& device, int64_t n) {
  const LossProblem& p = device.problem;
  if (p.weights && load(p.weights + n) == 0) return false;
  return !p.labels || load(p.labels + n) != device.ignore_index;
}

// What is the same for all rows of a call, in the arithmetic's type.
template <class V>
struct Call {
  V k_s, k_t;  // what differences of logits are multiplied with: log2 e / temperature
  V beta, one_minus_beta;
  bool hard, smooth;

  REPTILE_EXT_DEVICE Call(const LossProblem& p, bool raw_logits)
      : k_s(V((raw_logits ? 1 : kLog2E) / p.student_temperature)),
        k_t(V((raw_logits ? 1 : kLog2E) / p.teacher_temperature)),
        beta(V(p.beta)),
        one_minus_beta(V(p.one_minus_beta)),
        hard(p.hard_weight > 0),
        smooth(p.label_smoothing > 0) {}
};

}  // namespace
}  // namespace reptile_ext
