// Rows of logits that come through a ring in shared memory, and what the threads of a row tell one another about it.
//
// Every block has a ring of slots; a slot holds a row, or the block's share of one: pieces of 16 bytes of the student,
// behind them the teacher's. As soon as all threads have read a row for the last time its slot is filled again, with a
// row that is some rows ahead, so that memory is never waited for but at the beginning. On sm_90 and later one thread
// orders both operands by two bulk copies and a phase says when they are there; before, each thread copies the pieces
// that it will read itself.
//
// Threads join what they have found in three steps:
//
//     a warp       shuffles
//     a block      a set of numbers a warp to shared memory, a barrier; every warp joins all sets
//     a cluster    a set a block to the shared memory of every block, a phase; every warp joins all sets
#pragma once

#include "storage.h"

#include "../divergence.h"

namespace reptile_ext {
namespace {

constexpr int kNumbers = 12;  // of a set: two reference points, up to five sums; whole quads
constexpr int kDoneNumbers = kMaxSums + 4 + kNumMixtureSums + 1;
static_assert(2 * kMaxWarps <= kWarp && 2 + kMaxSums <= kNumbers);

constexpr int32_t kNoRow = INT32_MIN, kIgnoredRow = kNoRow + 1;

// What the thread that orders a row's copies finds out about it, for those that will read them.
struct RingRow {
  int32_t n;                     // or kNoRow, or kIgnoredRow
  float soft_scale, hard_scale;  // of the gradient; NaN if the label is no class, which breaks the row
  int64_t label;
};

// Of the row whose copies were ordered last, what was not copied because another row lay there.
struct RingRest {
  const char *student, *teacher;
  int32_t count, slot, start;
};

// In front of the ring in a block's shared memory.
struct alignas(16) RingShared {
  RingRow rows[kMaxRingRows];
  RingRow next[kWarp];  // the team's next rows
  int32_t next_at;      // of these, whose copies will be ordered next
  int32_t has_next;     // whether there is one
  int32_t next_first;   // the first that they do not hold
  int32_t next_step;    // from one of the team's rows to the next: here, as a register for it would be one too many
  int32_t next_slot;    // and the slot that it will have
  RingRest rest;
  Phase full[kMaxRingRows];
  Phase told[2];
  alignas(16) float of_warp[2][kMaxWarps * kNumbers];
  alignas(16) float of_block[2][kMaxClusterBlocks * kNumbers];
  // Rows whose loss is still to be computed, by a warp, a lane each.
  int32_t num_done;
  float done[kWarp * kDoneNumbers];
  int32_t done_row[kWarp];
  double losses[kWarp];  // added up, of the rows that each of its lanes has computed them of
};
static_assert(sizeof(RingShared) <= kRingSharedBytes);

template <int kCount>
REPTILE_EXT_DEVICE void sum_in_warp(float (&x)[kCount], int lanes) {
  for (int mask = lanes / 2; mask > 0; mask /= 2) {
    for (int i = 0; i < kCount; ++i) x[i] = x[i] + shuffle_xor(x[i], mask);
  }
}

// What the threads of a step have written; of at most kMost sets.
template <int kMost>
struct Sets {
  const float* numbers;
  int count, own;
};

// The threads of a row: all of a block, or of a cluster's blocks.
struct RingTeam {
  RingShared* shared;
  int rank, threads;  // in this block
  int block, blocks;
  uint32_t exchanges = 0;  // so far; everything is there twice and used in turn, for the reason that team.h gives

  REPTILE_EXT_DEVICE int lane() const { return rank % kWarp; }
  REPTILE_EXT_DEVICE int warp() const { return rank / kWarp; }
  REPTILE_EXT_DEVICE int warps() const { return threads / kWarp; }

  // x and, from points m of its own, of all threads: join(sets) makes one of the sets of a step. `released`
  // runs once all threads of the block have come here.
  template <int kCount, class Join, class Released>
  REPTILE_EXT_DEVICE void exchange(float (&m)[2], float (&x)[kCount], Join join, Released released) {
    constexpr int kQuads = (2 + kCount + 3) / 4;
    const uint32_t turn = exchanges & 1, parity = exchanges >> 1 & 1;
    ++exchanges;
    if (warps() > 1) {
      mark<kMarkWarps>();
      float* const sets = shared->of_warp[turn];
      if (lane() == 0) {
        for (int q = 0; q < kQuads; ++q) store_shared_128(sets + warp() * kNumbers + 4 * q, quad(m, x, q));
      }
      sync_block();
      released();
      join(Sets<kMaxWarps>{sets, warps(), warp()});
    } else {
      sync_warp();
      released();
    }
    if (blocks > 1) {
      mark<kMarkCluster>();
      float* const sets = shared->of_block[turn];
      Phase* const told = &shared->told[turn];
      if (warp() == 0) {
        mark<kMarkOneWarp>();
        if (rank == 0) expect_bytes(told, uint32_t(blocks * kQuads * 16));
        if (lane() < blocks) {
          for (int q = 0; q < kQuads; ++q) tell_128(sets + block * kNumbers + 4 * q, lane(), quad(m, x, q), told);
        }
      }
      wait_for_peers(told, parity);
      join(Sets<kMaxClusterBlocks>{sets, blocks, block});
    }
  }

 private:
  template <int kCount>
  REPTILE_EXT_DEVICE static Bits128 quad(const float (&m)[2], const float (&x)[kCount], int q) {
    Bits128 out;
    for (int i = 0; i < 4; ++i) {
      const int at = 4 * q + i;
      out.word[i] = bits_of(at < 2 ? m[at] : at < 2 + kCount ? x[at - 2 < kCount ? at - 2 : 0] : 0.0f);
    }
    return out;
  }
};

// Of each set: its numbers from the reference points of all sets, added up. Some lanes find the student's point and
// factor, others the teacher's: one exponential a thread. Also moves `by` as the own set did.
template <class D, int kMost>
REPTILE_EXT_DEVICE void join_sets(const Sets<kMost>& sets, float k_s, float k_t, float (&m)[2], float (&x)[D::kSums],
                                  Move<float>& by) {
  const int lane = thread_rank() % kWarp, set = lane % kMost;
  const bool there = set < sets.count, is_teacher = lane & kMost;
  const float* const mine = sets.numbers + (there ? set : 0) * kNumbers;
  for (int i = 0; i < D::kSums; ++i) x[i] = there ? load_shared(mine + 2 + i) : 0.0f;
  const float point = there ? load_shared(mine + is_teacher) : negative_infinity<float>();
  float most = point;
  for (int mask = kMost / 2; mask > 0; mask /= 2) most = any_max(most, shuffle_xor(most, mask));
  const float other_most = shuffle_xor(most, kMost);
  m[0] = is_teacher ? other_most : most;
  m[1] = is_teacher ? most : other_most;
  if constexpr (!D::kRawLogits) {
    const float d = point == negative_infinity<float>() ? 0.0f : (point - most) * (is_teacher ? k_t : k_s);
    const float f = exp2(d), other_d = shuffle_xor(d, kMost), other_f = shuffle_xor(f, kMost);
    Move<float> move;
    move.d_s = is_teacher ? other_d : d;
    move.d_t = is_teacher ? d : other_d;
    move.f_s = is_teacher ? other_f : f;
    move.f_t = is_teacher ? f : other_f;
    D::move(move, x);
    by.d_s = by.d_s + shuffle_from(move.d_s, sets.own);
    by.d_t = by.d_t + shuffle_from(move.d_t, sets.own);
    by.f_s = by.f_s * shuffle_from(move.f_s, sets.own);
    by.f_t = by.f_t * shuffle_from(move.f_t, sets.own);
  }
  sum_in_warp(x, kMost);
}

// The same of sums that all sets take from the same points.
template <int kMost, int kCount>
REPTILE_EXT_DEVICE void add_sets(const Sets<kMost>& sets, float (&x)[kCount]) {
  const int set = thread_rank() % kMost;
  for (int i = 0; i < kCount; ++i) {
    x[i] = set < sets.count ? load_shared(sets.numbers + set * kNumbers + 2 + i) : 0.0f;
  }
  sum_in_warp(x, kMost);
}

// ------------------------------------------------------------------------------------------------- pieces of 16 bytes

template <DType kDType>
struct PieceOf {
  static constexpr int kSize = int(size_of(kDType)), kClasses = kPieceBytes / kSize;

  REPTILE_EXT_DEVICE static void widen(const Bits128& raw, float (&x)[kClasses]) {
    if constexpr (kSize == 4) {
      for (int i = 0; i < 4; ++i) x[i] = float_of_bits(raw.word[i]);
    } else {
      for (int i = 0; i < 4; ++i) {
        x[2 * i] = kDType == DType::kBFloat16 ? float_of_bits(raw.word[i] << 16) : float_of_half(uint16_t(raw.word[i]));
        x[2 * i + 1] = kDType == DType::kBFloat16 ? float_of_bits(raw.word[i] & 0xffff0000u)
                                                  : float_of_half(uint16_t(raw.word[i] >> 16));
      }
    }
  }
  // The one rounding of the gradient to its type.
  REPTILE_EXT_DEVICE static Bits128 narrow(const float (&x)[kClasses]) {
    Bits128 raw;
    for (int i = 0; i < 4; ++i) {
      if constexpr (kSize == 4) {
        raw.word[i] = bits_of(x[i]);
      } else {
        raw.word[i] =
            kDType == DType::kBFloat16 ? bfloat16s_of(x[2 * i], x[2 * i + 1]) : halves_of(x[2 * i], x[2 * i + 1]);
      }
    }
    return raw;
  }

  REPTILE_EXT_DEVICE static Bits128 masked() {
    constexpr uint32_t word = kSize == 4 ? 0xff800000u : kDType == DType::kBFloat16 ? 0xff80ff80u : 0xfc00fc00u;
    return {{word, word, word, word}};
  }

  // The larger ones so far, as they lie in memory: of 16 bits two a word. A NaN may hide.
  struct Most {
    uint32_t word = masked().word[0];

    REPTILE_EXT_DEVICE void take(const Bits128& raw) {
      for (int i = 0; i < 4; ++i) word = larger(word, raw.word[i]);
    }
    REPTILE_EXT_DEVICE float value() const {
      if constexpr (kSize == 4) {
        return float_of_bits(word);
      } else {
        float x[kClasses];
        widen(Bits128{{word, word, word, word}}, x);
        return any_max(x[0], x[1]);
      }
    }
    REPTILE_EXT_DEVICE static uint32_t larger(uint32_t a, uint32_t b) {
      if constexpr (kSize == 4) {
        return bits_of(any_max(float_of_bits(a), float_of_bits(b)));
      } else {
        return kDType == DType::kBFloat16 ? larger_bfloat16s(a, b) : larger_halves(a, b);
      }
    }
  };

  // 0 in place of the largest logits, −inf in place of all others but NaN; in shared memory.
  REPTILE_EXT_DEVICE static void where_largest(char* piece, float largest) {
    float x[kClasses];
    widen(load_shared_any_128(piece), x);
    for (float& z : x) z = z == largest ? 0.0f : z == z ? negative_infinity<float>() : z;
    store_shared_128(piece, narrow(x));
  }

  // −inf in place of what lies before class 0 and from class `end` on, of a piece from class `first`; in shared memory.
  REPTILE_EXT_DEVICE static void mask(char* piece, int64_t first, int64_t end) {
    Bits128 raw = load_shared_any_128(piece);
    for (int i = 0; i < kClasses; ++i) {
      if (first + i >= 0 && first + i < end) continue;
      uint32_t& word = raw.word[i * kSize / 4];
      if constexpr (kSize == 4) {
        word = 0xff800000u;
      } else {
        const uint32_t masked = kDType == DType::kBFloat16 ? 0xff80u : 0xfc00u;
        word = i % 2 ? (word & 0xffffu) | masked << 16 : (word & 0xffff0000u) | masked;
      }
    }
    store_shared_128(piece, raw);
  }
};

// The classes of a piece that are the row's, one by one.
template <DType kDType>
REPTILE_EXT_DEVICE void store_classes(char* to, const Bits128& raw, int64_t first, int64_t end) {
  constexpr int kSize = PieceOf<kDType>::kSize;
  for (int i = 0; i < PieceOf<kDType>::kClasses; ++i) {
    if (first + i < 0 || first + i >= end) continue;
    const uint32_t word = raw.word[i * kSize / 4];
    if constexpr (kSize == 4) {
      store(reinterpret_cast<uint32_t*>(to) + i, word);
    } else {
      store(reinterpret_cast<uint16_t*>(to) + i, uint16_t(i % 2 ? word >> 16 : word));
    }
  }
}

}  // namespace
}  // namespace reptile_ext
