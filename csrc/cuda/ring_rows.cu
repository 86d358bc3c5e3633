// Loss and gradient of dense rows: every logit is read once and two exponentials a pair are taken, which registers keep
// until the gradient is written. docs/cuda.md tells how and why; ring.h has the ring and the exchange.
//
// A row's threads, each the same pieces in every pass over shared memory or registers:
//
//     maxima         of what a warp has: its reference points
//     first pass     the divergence's sums from these points; the exponentials are kept
//     exchange       sums and reference points of all warps, and so the row's; the ring's slot is free
//     hard labels    Σ e_1 and its like, and an exchange of them; the slot is free only at the end of the row
//     mixture pass   of the divergences that have one, from what was kept, and an exchange of its sums
//     gradient       from what was kept
//
// The loss takes logarithms in double precision, which nobody waits for: a warp computes those of 32 rows at a time.
//
// Compiled once for each dtype (REPTILE_EXT_LAUNCHER, REPTILE_EXT_DTYPE), for the divergences that have `move`.

#include "ring.h"

namespace reptile_ext {
namespace {

// Where a block's share of a row lies.
template <DType kDType>
struct Share {
  using Piece = PieceOf<kDType>;
  int shift;                 // classes from the boundary of 16 bytes before the row to the row; alike for all operands
  int count;                 // pieces, fewer than `most` where the row begins nearer to its boundary
  int64_t student, teacher;  // bytes from the operands' first element to the first piece

  REPTILE_EXT_DEVICE Share(const LossProblem& p, const Plan& plan, int64_t first, int most, int64_t n) {
    student = n * p.student.row_strides[0] * Piece::kSize;
    teacher = n * p.teacher.row_strides[0] * Piece::kSize;
    shift = 0;
    count = most;
    if (!plan.rows_at_boundaries) {
      shift = int((uintptr_t(p.student.data) + uintptr_t(student)) % kPieceBytes) / Piece::kSize;
      const int pieces = int(uint32_t(p.vocab_size + shift + Piece::kClasses - 1) / Piece::kClasses) - int(first);
      count = pieces < 0 ? 0 : pieces < most ? pieces : most;
    }
    const int64_t from = first * kPieceBytes - shift * Piece::kSize;
    student += from;
    teacher += from;
  }
};

// An exponent whose own rounding is not far below 1; and one that still has a neighbour.
constexpr float kHuge = 0x1p30f, kLargest = 1e38f;
REPTILE_EXT_DEVICE bool is_huge(float x) { return x > kHuge || x < -kHuge; }

// Loss of the rows that are done, one a lane.
template <class D>
REPTILE_EXT_DEVICE void finish_rows(const DeviceLoss& device, RingShared& shared, int count, bool hard) {
  using G = typename D::Gradient;
  const LossProblem& p = device.problem;
  const int lane = thread_rank() % kWarp;
  if (lane >= count) return;
  const float* const numbers = shared.done + lane * kDoneNumbers;
  double sums[kNumSums] = {}, mixture[kNumMixtureSums] = {};
  for (int i = 0; i < D::kSums; ++i) sums[i] = double(load_shared(numbers + i));
  for (int i = 0; i < D::kMixtureSums; ++i) {
    mixture[i] = double(load_shared(numbers + kMaxSums + 4 + i)) / sums[0];
  }
  Row<double> of_row{sums, mixture, p.beta, p.one_minus_beta, 0, 0, 0, 0, 0};
  double unused[G::kCoefficients];
  double value = D::finish(of_row, 1.0, unused);
  if (value < 0) value = 0;  // rounding alone; a NaN stays
  double loss = p.soft_scale * value;
  if (hard) {
    double of_label[4];
    for (int i = 0; i < 4; ++i) of_label[i] = double(load_shared(numbers + kMaxSums + i));
    const double a_label = (of_label[3] - double(load_shared(numbers + kDoneNumbers - 1))) * kLog2E;
    loss += p.hard_weight * hard_label(of_label[0], of_label[1], of_label[2], a_label, p.label_smoothing, 1.0).loss;
  }
  const int32_t n = load_shared(&shared.done_row[lane]);
  if (p.weights) loss *= load(p.weights + n);
  if (device.sum) {
    store_shared(&shared.losses[lane], load_shared(&shared.losses[lane]) + loss);
  } else {
    store(p.row_losses + n, loss);
  }
}

template <class D, DType kDType, bool kBulk, bool kKeeps>
REPTILE_EXT_DEVICE void rows_of_team(const DeviceLoss& device, const Plan& plan) {
  using G = typename D::Gradient;
  using Piece = PieceOf<kDType>;
  constexpr int kClasses = Piece::kClasses, kPieces = ring_pieces<D>(kDType);
  constexpr int kMixed = D::kMixtureSums > 0 ? D::kMixtureSums : 1;  // an array cannot have none
  const LossProblem& p = device.problem;
  char* const memory = dynamic_shared(plan.shared_bytes);
  RingTeam team;
  team.shared = reinterpret_cast<RingShared*>(memory);
  team.rank = thread_rank();
  team.threads = plan.block_threads;
  team.blocks = plan.cluster_blocks;
  team.block = plan.cluster_blocks > 1 ? cluster_rank() : 0;
  RingShared& shared = *team.shared;
  const int threads = team.threads, rank = team.rank, warp_begin = team.warp() * kWarp;

  const Call<float> call(p, D::kRawLogits);
  const bool hard = !kKeeps && call.hard;

  // The block's share of every row, and its ring. Where exponentials are kept, a row has a slot: its pieces of the
  // student, behind them the teacher's. Else there is a ring of each side, and a row begins where the last one ends.
  // Where a ring has no room for two rows, it wraps around: what is not copied ahead of the next row is copied over
  // pieces of this one, as soon as these have been read for the last time.
  const int64_t first = int64_t(plan.share) * team.block;
  const int64_t left = plan.pieces - first;
  const int most = left < 0 ? 0 : left < plan.share ? int(left) : plan.share;
  const int row_bytes = (plan.share + threads - 1) / threads * threads * kPieceBytes;
  const int side_bytes = kKeeps ? row_bytes : plan.side_bytes;
  const bool wraps = !kKeeps && plan.pieces_ahead * kPieceBytes < row_bytes;
  char* const ring = memory + kRingSharedBytes;
  // Piece i of a row that begins at byte `start`.
  const auto piece_at = [&](int start, int i, int side) {
    int at = start + i * kPieceBytes;
    if (wraps && at >= side_bytes) at -= side_bytes;
    return ring + at + side * side_bytes;
  };
  const auto start_after = [&](int start) {  // of the next row
    return start + row_bytes < side_bytes ? start + row_bytes : start + row_bytes - side_bytes;
  };
  const int stride = int(num_blocks()) / team.blocks, begin = int(block_rank()) / team.blocks;

  // −inf where no copy will write, and phases.
  for (int i = 0; i < 2 * plan.ring_pieces && !wraps; i += threads) {
    if (i % (row_bytes / kPieceBytes) + rank >= most)
      store_shared_128(ring + (i + rank) * kPieceBytes, Piece::masked());
  }
  if constexpr (kBulk) {
    if (rank == 0) {
      for (int i = 0; i < plan.ring_rows; ++i) init_phase(&shared.full[i]);
      for (Phase& phase : shared.told) init_phase(&phase);
      fence_phases();
    }
  }
  if (team.blocks > 1) {
    sync_cluster();  // before a peer tells something
  } else {
    sync_block();
  }

  // Finds the team's next row that counts, and then orders its copies, over what nobody reads any more. By one
  // thread, to which its warp says what 32 rows' labels and weights say, a lane a row: memory is waited for once in 32
  // rows. Or by each thread for its own pieces.
  struct {
    int n, slot, start;
  } next{begin - stride, 0, 0};  // of each thread, where each orders
  const auto describe = [&](int n, RingRow& row) {
    const bool counts = n < p.num_rows && row_counts(device, n);
    store_shared(&row.n, n >= p.num_rows ? kNoRow : counts ? n : kIgnoredRow);
    if (!counts) return;
    double scale = p.gradient_scale * (p.weights ? load(p.weights + n) : 1.0);
    if (device.divisor) scale /= load(device.divisor);
    if (p.grad_output) scale *= load(p.grad_output + (p.grad_output_is_uniform ? 0 : n));
    const int64_t label = p.labels ? load(p.labels + n) : -1;
    if (p.labels && (label < 0 || label >= p.vocab_size)) scale = kNaN;
    store_shared(&row.soft_scale, float(scale * p.soft_scale / p.student_temperature));
    store_shared(&row.hard_scale, float(scale * p.hard_weight));
    store_shared(&row.label, label);
  };
  const auto find_next = [&] {
    if constexpr (kBulk) {
      if (team.warp() != 0) return;
      mark<kMarkOneWarp>();
      sync_warp();
      int at = load_shared(&shared.next_at) + 1;
      while (at == kWarp || load_shared(&shared.next[at].n) == kIgnoredRow) {
        mark<kMarkOneIn32>();
        if (++at < kWarp) continue;
        at = 0;
        sync_warp();  // all lanes have read the last ones
        const int of_first = load_shared(&shared.next_first);
        const int step = load_shared(&shared.next_step);
        describe(of_first + team.lane() * step, shared.next[team.lane()]);
        sync_warp();
        if (rank == 0) store_shared(&shared.next_first, of_first + kWarp * step);
        sync_warp();
      }
      const int found = load_shared(&shared.next[at].n);
      sync_warp();
      if (rank == 0) store_shared(&shared.next_at, found == kNoRow ? at - 1 : at);
      if (rank == 0) store_shared(&shared.has_next, int32_t(found != kNoRow));
      sync_warp();
    } else if (next.n != kNoRow) {
      do next.n += stride;
      while (next.n < p.num_rows && !row_counts(device, next.n));
      if (next.n >= p.num_rows) next.n = kNoRow;
      if (rank == 0) describe(next.n == kNoRow ? int(p.num_rows) : next.n, shared.next[0]);
    }
  };
  // Bulk copies of a row's pieces from i to end, to where they may wrap around.
  const auto copy_pieces = [&](const char* student, const char* teacher, int slot, int start, int i, int end) {
    const auto copy = [&](int to) {
      if (i >= to) return;
      const uint32_t bytes = uint32_t((to - i) * kPieceBytes);
      copy_bulk(piece_at(start, i, 0), student + i * kPieceBytes, bytes, &shared.full[slot]);
      copy_bulk(piece_at(start, i, 1), teacher + i * kPieceBytes, bytes, &shared.full[slot]);
      i = to;
    };
    if (wraps && side_bytes - start < end * kPieceBytes) copy((side_bytes - start) / kPieceBytes);
    copy(end);
  };
  const auto order_next = [&] {
    if (kBulk && rank != 0) return;
    mark<kMarkOneWarp>();
    RingRow& found = shared.next[kBulk ? load_shared(&shared.next_at) : 0];
    const int n = !kBulk ? next.n : load_shared(&shared.has_next) ? load_shared(&found.n) : kNoRow;
    const int to_slot = kBulk ? load_shared(&shared.next_slot) : next.slot;
    next.slot = to_slot + 1 == plan.ring_rows ? 0 : to_slot + 1;
    const int start = kKeeps ? to_slot * 2 * row_bytes : next.start;
    if constexpr (!kKeeps) next.start = start_after(start);
    if (rank == 0) {
      RingRow& row = shared.rows[to_slot];
      store_shared(&row.n, n);
      if (n != kNoRow) {
        store_shared(&row.soft_scale, load_shared(&found.soft_scale));
        store_shared(&row.hard_scale, load_shared(&found.hard_scale));
        store_shared(&row.label, load_shared(&found.label));
      }
      store_shared(&shared.next_slot, next.slot);
    }
    [[maybe_unused]] int rest = 0;
    if (n != kNoRow) {
      const Share<kDType> from(p, plan, first, most, n);
      const char* const student = static_cast<const char*>(p.student.data) + from.student;
      const char* const teacher = static_cast<const char*>(p.teacher.data) + from.teacher;
      if constexpr (kBulk) {
        expect_bytes(&shared.full[to_slot], uint32_t(2 * from.count * kPieceBytes));
        const bool has_rest = wraps && plan.pieces_ahead < from.count;
        copy_pieces(student, teacher, to_slot, start, 0, has_rest ? plan.pieces_ahead : from.count);
        if (wraps) {
          store_shared(&shared.rest.student, student);
          store_shared(&shared.rest.teacher, teacher);
          store_shared(&shared.rest.slot, to_slot);
          store_shared(&shared.rest.start, start);
        }
        rest = from.count;
      } else {
        for (int i = rank; i < from.count; i += threads) {
          copy_128(piece_at(start, i, 0), student + i * kPieceBytes);
          copy_128(piece_at(start, i, 1), teacher + i * kPieceBytes);
        }
      }
    }
    if constexpr (kBulk) {
      if (wraps) store_shared(&shared.rest.count, int32_t(rest));
    } else {
      end_copies();
    }
  };
  const auto order_rest = [&] {
    if (!kBulk || rank != 0) return;
    mark<kMarkOneWarp>();
    const int count = load_shared(&shared.rest.count);
    if (count <= plan.pieces_ahead) return;
    copy_pieces(load_shared(&shared.rest.student), load_shared(&shared.rest.teacher), load_shared(&shared.rest.slot),
                load_shared(&shared.rest.start), plan.pieces_ahead, count);
  };
  if (team.warp() == team.warps() - 1) store_shared(&shared.losses[team.lane()], 0.0);
  if (rank == 0) {
    store_shared(&shared.next_at, kWarp - 1);
    store_shared(&shared.next_first, begin);
    store_shared(&shared.next_step, stride);
    store_shared(&shared.next_slot, 0);
    store_shared(&shared.num_done, 0);
  }
  for (int i = 0; i < plan.ring_rows; ++i) {
    find_next();
    order_next();
    if (wraps && i == 0) order_rest();
  }
  find_next();

  // Ignored rows, of which nothing is read: a lane looks at a row, and its warp clears what all lanes have found.
  if (p.labels || p.weights) {
    const int all_lanes = team.blocks * threads, first_lane = team.block * threads + warp_begin;
    for (int64_t of_warp = first_lane; begin + of_warp * stride < p.num_rows; of_warp += all_lanes) {
      const int64_t n = begin + (of_warp + team.lane()) * stride;
      const bool is_ignored = n < p.num_rows && !row_counts(device, n);
      if (is_ignored && !device.sum) store(p.row_losses + n, 0.0);
      const uint32_t ignored = ballot(is_ignored);
      for (int lane = 0; lane < kWarp && p.gradient.data; ++lane) {
        if (ignored >> lane & 1) clear_row(p, begin + (of_warp + lane) * stride, 0, team.lane(), kWarp);
      }
    }
  }
  sync_block();

  // Threads that have a piece at an end of the row, where some of its classes may be of other rows, or none beside
  // others of their warp where rows wrap around, and so another row's piece may lie.
  const bool has_ends = !plan.rows_at_boundaries || p.vocab_size % kClasses != 0;
  const bool is_at_an_end =
      (has_ends && ((first == 0 && rank == 0) ||
                    (first + most + 1 >= plan.pieces && most > 0 &&
                     (rank == (most - 1) % threads || rank == (most > 1 ? most - 2 : 0) % threads)))) ||
      (wraps && most > 0 && rank / kWarp == (most - 1) % threads / kWarp && rank > (most - 1) % threads);

  // Three in one register, of which there are none to spare: 4 · the slot, 2 · is_at_an_end, the parity of the slots'
  // phases.
  int32_t state = is_at_an_end ? 2 : 0;
  [[maybe_unused]] int next_start = 0;
  for (;;) {
    const int slot = state >> 2;
    const RingRow& row = shared.rows[slot];
    const int n = load_shared(&row.n);
    if (n == kNoRow) break;
    const Share<kDType> share(p, plan, first, most, n);
    const int start = kKeeps ? slot * 2 * row_bytes : next_start;
    if constexpr (!kKeeps) {
      next_start = start_after(start);
    }
    if constexpr (kBulk) {
      wait_for(&shared.full[slot], uint32_t(state & 1));
    } else {
      wait_for_copies<kRingRowsBefore90 - 1>();
    }
    state = slot + 1 == plan.ring_rows ? (state & 3) ^ 1 : state + 4;
    if (state & 2) {
      mark<kMarkRare>();
      for (int i = rank; i - team.lane() < most; i += threads) {
        const int64_t from = (first + i) * kClasses - share.shift;
        if (i < most && from >= 0 && from + kClasses <= p.vocab_size) continue;
        for (int operand = 0; operand < 2; ++operand) {
          char* const piece = piece_at(start, i, operand);
          if (i < share.count) {
            Piece::mask(piece, from, p.vocab_size);
          } else {
            store_shared_128(piece, Piece::masked());
          }
        }
      }
      fence_copies();  // what lies there now is overwritten by a copy
    }

    // Visits this thread's pieces, if any of its warp's is of the share; lanes beyond it find −inf. Of each its number
    // where they are kept, its number in the share less the thread's, and where it lies: bytes from the row's first, or
    // from the ring's.
    const auto from_to = [&](int& offset, int& lies, int end, auto visit) {
      for (;; lies -= side_bytes) {
        int until = offset + int(uint32_t(side_bytes - lies) / kPieceBytes);  // the end of the ring
        if (until > end) until = end;
        REPTILE_EXT_NO_UNROLL
        for (; offset < until; offset += threads) {
          visit(0, offset, lies);
          lies += threads * kPieceBytes;
        }
        if (offset >= end) break;
        mark<kMarkOnce>();
      }
    };
    const auto each = [&](auto visit) {
      if constexpr (kKeeps) {
        REPTILE_EXT_UNROLL
        for (int k = 0; k < kPieces; ++k) {
          if (warp_begin + k * threads < most) visit(k, k * threads, k * threads * kPieceBytes);
        }
      } else {
        int offset = 0, lies = start;
        from_to(offset, lies, most - warp_begin, visit);
      }
    };
    char* const at = ring + (kKeeps ? start : 0) + rank * kPieceBytes;
    const auto read = [&](int lies, int side) { return load_shared_any_128(at + side * side_bytes + lies); };

    const float soft_scale = load_shared(&row.soft_scale);

    float m[2] = {0, 0};
    if (!D::kRawLogits || hard) {
      typename Piece::Most most_s, most_t;
      each([&](int, int, int lies) {
        most_s.take(read(lies, 0));
        most_t.take(read(lies, 1));
      });
      m[0] = most_s.value();
      m[1] = most_t.value();
      for (int mask = kWarp / 2; mask > 0; mask /= 2) {
        for (float& x : m) x = any_max(x, shuffle_xor(x, mask));
      }
    }
    // Exponents from the warp's point. Where exponentials are kept, points too are exponents: one instruction less, and
    // one rounding, for a class.
    constexpr bool kInExponents = kKeeps && !D::kRawLogits;
    float point[2] = {0, 0};
    const auto set_point = [&](int side, float k) {
      const float largest = m[side];
      if (kInExponents) m[side] = largest * k;
      if (D::kRawLogits || largest == negative_infinity<float>()) return;
      point[side] = m[side];
      if (!kInExponents || !is_huge(point[side]) || largest == -negative_infinity<float>()) return;
      // Such logits are equal, or so far apart that the smaller has no mass.
      mark<kMarkRare>();
      REPTILE_EXT_NO_UNROLL
      for (int i = rank; i - rank + warp_begin < most; i += threads) {
        Piece::where_largest(piece_at(start, i, side), largest);
      }
      fence_copies();
      m[side] = m[side] < -kLargest ? -kLargest : m[side] > kLargest ? kLargest : m[side];
      point[side] = 0;
    };
    set_point(0, call.k_s);
    set_point(1, call.k_t);
    const auto exponent = [&](float z, int side) {
      const float k = side == 0 ? call.k_s : call.k_t;
      return kKeeps ? fma(z, k, -point[side]) : (z - point[side]) * k;
    };

    float kept[kKeeps ? kPieces : 1][kKeeps ? kClasses : 1][G::kKept], x[D::kSums];
    for (float& sum : x) sum = 0;
    each([&](int k, int, int lies) {
      float s[kClasses], t[kClasses];
      Piece::widen(read(lies, 0), s);
      Piece::widen(read(lies, 1), t);
      for (int i = 0; i < kClasses; ++i) {
        const float a = exponent(s[i], 0), b = exponent(t[i], 1);
        float of_class[D::kKept];
        D::first(a, b, D::exponential(a), D::exponential(b), x, of_class);
        if constexpr (kKeeps) {
          for (int j = 0; j < G::kKept; ++j) kept[k][i][j] = of_class[j];
        }
      }
    });
    sum_in_warp(x, kWarp);
    Move<float> by;
    const auto nothing = [] {};
    team.exchange(
        m, x,
        [&](const auto& sets) {
          join_sets<D>(sets, kInExponents ? 1.0f : call.k_s, kInExponents ? 1.0f : call.k_t, m, x, by);
        },
        [&] {
          if (kKeeps) order_next();
        });
    if constexpr (!D::kRawLogits) x[0] = x[0] + ((m[0] - m[0]) + (m[1] - m[1]));  // no class, or one of +inf: NaN

    int hit = -1;                      // the label's class less the thread's first
    float of_label[4] = {0, 0, 0, 0};  // Σ e_1, Σ a_1 and number of the classes that are not masked; the label's logit
    if (hard) {
      mark<kMarkRare>();
      hit = int(load_shared(&row.label) - (first + rank) * kClasses) + share.shift;  // rows are short enough for an int
      each([&](int, int offset, int lies) {
        float s[kClasses];
        Piece::widen(read(lies, 0), s);
        for (int i = 0; i < kClasses; ++i) {
          const float a = (s[i] - m[0]) * float(kLog2E);
          of_label[0] = of_label[0] + exp2(a);
          if (call.smooth) {
            of_label[1] = of_label[1] + where_not_masked(s[i], a);
            of_label[2] = of_label[2] + where_not_masked(s[i], 1.0f);
          }
          if (offset * kClasses + i == hit) of_label[3] = s[i];
        }
      });
      sum_in_warp(of_label, kWarp);
      float unused[2] = {0, 0};
      team.exchange(unused, of_label, [&](const auto& sets) { add_sets(sets, of_label); }, nothing);
    }

    // A class again, from the row's points, where nothing was kept.
    const float row_s = D::kRawLogits ? 0.0f : m[0], row_t = D::kRawLogits ? 0.0f : m[1];
    const auto from_row = [&](float s, float t, float(&of_class)[G::kKept]) {
      const float a = (s - row_s) * call.k_s, b = (t - row_t) * call.k_t;
      float unused[D::kSums] = {}, found[D::kKept];
      D::first(a, b, D::exponential(a), D::exponential(b), unused, found);
      for (int j = 0; j < G::kKept; ++j) of_class[j] = found[j];
    };
    [[maybe_unused]] float ratio = 1;
    [[maybe_unused]] const auto mix = [&](float(&of_class)[G::kKept], float(&sums)[kMixed]) {
      if constexpr (D::kMixtureSums > 0) {
        const float q = of_class[0], other = kKeeps && D::kMixtureKeeps ? of_class[1] : of_class[1] * ratio;
        float added[D::kMixtureSums];
        for (int i = 0; i < D::kMixtureSums; ++i) added[i] = sums[i];
        D::mix(q, other, other - q, call.beta, call.one_minus_beta, added, of_class);
        for (int i = 0; i < D::kMixtureSums; ++i) sums[i] = added[i];
      }
    };
    // For the row's loss, which is computed some rows later.
    const auto note = [&](auto what) {
      if (team.block != 0 || team.warp() != team.warps() - 1) return;
      mark<kMarkOneWarp>();
      if (team.lane() == 0) {
        const int done = load_shared(&shared.num_done);
        what(shared.done + done * kDoneNumbers, &shared.done_row[done]);
      }
    };
    if constexpr (D::kMixtureSums > 0) x[0] = x[0] + (x[1] - x[1]);
    x[0] = x[0] + (soft_scale - soft_scale);  // NaN of a label that is no class
    note([&](float* to, int32_t* row_number) {
      for (int i = 0; i < D::kSums; ++i) store_shared(to + i, x[i]);
      if (hard) {
        for (int i = 0; i < 4; ++i) store_shared(to + kMaxSums + i, of_label[i]);
        store_shared(to + kDoneNumbers - 1, m[0]);
      }
      store_shared(row_number, n);
    });
    float mixture[kMixed] = {};
    if constexpr (D::kMixtureSums > 0) {
      ratio = ratio_of(x[0], x[1]);
      // Of equal rows as much as by.f_s, as the ratio is 1. Who keeps e_t itself has the ratio among its coefficients.
      const float to_p = D::kMixtureKeeps ? by.f_t * ratio : by.f_t;
      each([&](int k, int, int lies) {
        float s[kClasses], t[kClasses];
        if constexpr (!kKeeps) {
          Piece::widen(read(lies, 0), s);
          Piece::widen(read(lies, 1), t);
        }
        for (int i = 0; i < kClasses; ++i) {
          float again[G::kKept];
          if constexpr (kKeeps) {
            kept[k][i][0] = kept[k][i][0] * by.f_s;
            kept[k][i][1] = kept[k][i][1] * to_p;
          } else {
            from_row(s[i], t[i], again);
          }
          float(&of_class)[G::kKept] = kKeeps ? kept[k][i] : again;
          mix(of_class, mixture);
        }
      });
      sum_in_warp(mixture, kWarp);
      float unused[2] = {0, 0};
      team.exchange(unused, mixture, [&](const auto& sets) { add_sets(sets, mixture); }, nothing);
      note([&](float* to, int32_t*) {
        for (int i = 0; i < D::kMixtureSums; ++i) store_shared(to + kMaxSums + 4 + i, mixture[i]);
      });
    }

    if (p.gradient.data) {
      bool is_nan = false;
      for (int i = 0; i < (D::kMixtureSums > 0 ? 1 : D::kSums); ++i) is_nan = is_nan || x[i] != x[i];
      for (int i = 0; i < D::kMixtureSums; ++i) {
        is_nan = is_nan || mixture[i] != mixture[i];
        mixture[i] = mixture[i] * reciprocal(x[0]);
      }
      Row<float> of_row{x, mixture, float(p.beta), float(p.one_minus_beta), 0, 0, 0, 0, 0};
      float k[G::kCoefficients];
      const float value = D::finish(of_row, soft_scale, k);
      if (D::kRawLogits) is_nan = is_nan || value != value;
      const bool is_unbounded = D::kUnbounded >= 0 && of_row.unbounded == float(kInf);
      if constexpr (kKeeps && !D::kRawLogits && D::kMixtureSums == 0) {
        if constexpr (D::kUnbounded >= 0) {
          if (is_unbounded || by.f_s == 0) {  // no finite gradient; or no mass in this warp's classes
            mark<kMarkRare>();
            each([&](int k, int, int) {
              for (auto& of_class : kept[k]) {
                if (by.f_s == 0) of_class[0] = 0;
                of_class[D::kUnbounded] = 0;
              }
            });
            by.d_s = by.d_t = 0;
          }
        }
        D::move_kept(by, k);
      }
      for (float& coefficient : k) coefficient = is_nan ? float(kNaN) : coefficient;
      HardFactors<float> factors{};
      if (hard) {
        mark<kMarkRare>();
        factors = hard_factors(of_label[0], of_label[2], float(p.label_smoothing), load_shared(&row.hard_scale));
      }

      char* const to = static_cast<char*>(p.gradient.data) + n * p.gradient.row_strides[0] * Piece::kSize +
                       (first + rank) * kPieceBytes - share.shift * Piece::kSize;
      const int begin_whole = rank - (first == 0 && share.shift > 0);
      const int end =
          int(uint32_t(p.vocab_size + share.shift) / kClasses) - int(first);  // not negative in rows so long
      const uint32_t num_whole = uint32_t((end < most ? end : most) + (begin_whole - rank));
      const auto write = [&](int number, int offset, int lies) {
        float g[kClasses];
        if constexpr (kKeeps) {
          for (int i = 0; i < kClasses; ++i) g[i] = G::gradient(kept[number][i], k);
        } else {
          float s[kClasses], t[kClasses];
          Piece::widen(read(lies, 0), s);
          Piece::widen(read(lies, 1), t);
          for (int i = 0; i < kClasses; ++i) {
            float of_class[G::kKept], unused[kMixed] = {};
            from_row(s[i], t[i], of_class);
            if constexpr (D::kMixtureKeeps) mix(of_class, unused);
            if constexpr (D::kUnbounded >= 0) {
              if (is_unbounded) of_class[D::kUnbounded] = 0;
            }
            g[i] = G::gradient(of_class, k);
          }
          if (hard) {
            mark<kMarkRare>();
            for (int i = 0; i < kClasses; ++i) {
              g[i] = g[i] + exp2((s[i] - m[0]) * float(kLog2E)) * factors.to_q1;
              if (call.smooth) g[i] = g[i] - where_not_masked(s[i], factors.uniform);
              if (offset * kClasses + i == hit) g[i] = g[i] - factors.hit;
            }
          }
        }
        const Bits128 raw = Piece::narrow(g);
        if (uint32_t(begin_whole + offset) < num_whole) {
          store_128(to + offset * kPieceBytes, raw);
        } else if (const int i = rank + offset; i < share.count) {
          mark<kMarkRare>();
          store_classes<kDType>(to + offset * kPieceBytes, raw, (first + i) * kClasses - share.shift, p.vocab_size);
        }
      };
      if constexpr (kKeeps) {
        each(write);
      } else {
        int offset = 0, lies = start;
        for (bool is_rest = !wraps;; is_rest = true) {
          int end = is_rest ? row_bytes / kPieceBytes : row_bytes / kPieceBytes - plan.pieces_ahead;
          if (end > most - warp_begin) end = most - warp_begin;
          from_to(offset, lies, end, write);
          if (is_rest) break;
          mark<kMarkOnce>();
          sync_block();
          order_rest();
        }
      }
      if (p.gradient_size > p.vocab_size) {
        mark<kMarkRare>();
        clear_row(p, n, p.vocab_size, team.block * threads + rank, team.blocks * threads);
      }
    } else if (wraps) {
      mark<kMarkRare>();
      sync_block();
      order_rest();
    }
    if constexpr (!kKeeps) {
      sync_block();
      order_next();
    }
    find_next();
    if (team.block == 0 && team.warp() == team.warps() - 1) {
      mark<kMarkOneWarp>();
      sync_warp();
      const int done = load_shared(&shared.num_done) + 1;
      sync_warp();
      if (done == kWarp) {
        mark<kMarkOneIn32>();
        finish_rows<D>(device, shared, done, hard);
      }
      if (team.lane() == 0) store_shared(&shared.num_done, done == kWarp ? 0 : done);
      sync_warp();
    }
  }
  if (team.block == 0 && team.warp() == team.warps() - 1) {
    finish_rows<D>(device, shared, load_shared(&shared.num_done), hard);
    sync_warp();
    if (device.sum) {
      add_up_losses(device, shared.losses, kWarp, block_rank() / team.blocks, num_blocks() / team.blocks);
    }
  }
  if (team.blocks > 1) sync_cluster();  // nobody leaves while a peer may still tell it something
}

// Devices before sm_90 have no code with bulk copies, later ones none without.
template <class D, DType kDType, bool kBulk, bool kKeeps>
REPTILE_EXT_LONE_KERNEL(kMaxBlockThreads)
ring_kernel(REPTILE_EXT_ARGUMENT DeviceLoss device, REPTILE_EXT_ARGUMENT Plan plan) {
  if constexpr (has_code_for(kBulk)) rows_of_team<D, kDType, kBulk, kKeeps>(device, plan);
}

}  // namespace

const char* REPTILE_EXT_LAUNCHER(const DeviceLoss& loss, const Plan& plan, void* stream) {
  const char* error = nullptr;
  with_divergence<float>(loss.problem.divergence, [&](auto d) {
    if constexpr (decltype(d)::kMoves) {
      constexpr DType kDType = DType::REPTILE_EXT_DTYPE;
      using F = decltype(d);
      const auto kernel = plan.has_bulk_copies
                              ? plan.keeps ? &ring_kernel<F, kDType, true, true> : &ring_kernel<F, kDType, true, false>
                          : plan.keeps ? &ring_kernel<F, kDType, false, true>
                                       : &ring_kernel<F, kDType, false, false>;
      LaunchShape shape{plan.grid_blocks, plan.block_threads, plan.cluster_blocks, plan.shared_bytes};
      error = limit_to_resident(kernel, shape);
      if (!error) error = launch(kernel, shape, stream, loss, plan);
    }
  });
  return error;
}

}  // namespace reptile_ext
