// Which kernel a shape gets, and with how many threads. No CUDA in here, so it is tested without a GPU.

#include "../divergence.h"

#include "loss.h"

namespace reptile_ext {
namespace {

int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

constexpr int kSharedBlockThreads = 256;  // of a block with many rows
constexpr int kThreadsInRegisters = 512;  // of a multiprocessor, at 128 registers a thread
constexpr int kMemoryChunksPerThread = 4;
constexpr int kMostBlocksAtOnce = 16;  // of a multiprocessor
constexpr int kChunksPerSparseThread = 8;
constexpr int64_t kSmallestRing = 512;  // classes; shorter rows leave most of a warp without a piece
// The blocks of a cluster share a group of multiprocessors (GPC). How many are usable in each differs from group to
// group and from device to device; 16 is what Hopper's have at least. Before a launch the device is asked.
constexpr int kGroup = 16;

// How far an operand's rows begin behind a boundary of 16 bytes: the first, and from one row to the next.
struct Distance {
  int64_t first, step;
  bool operator==(const Distance& other) const { return first == other.first && step == other.step; }
};
Distance distance_of(const Operand& operand) {
  const int64_t size = int64_t(size_of(operand.dtype));
  return {int64_t(uintptr_t(operand.data) % kPieceBytes), operand.row_strides[0] * size % kPieceBytes};
}

// A ring, if the problem and the device allow it.
bool plan_ring(const LossProblem& p, const DeviceProperties& device, Plan& plan) {
  if (p.part != Part::kLoss || p.num_row_dims > 1 || p.num_rows > INT32_MAX - (1 << 20) ||
      p.vocab_size < kSmallestRing) {
    return false;
  }
  if (p.student.dtype != p.teacher.dtype || p.student.dtype == DType::kFloat64) return false;
  if (p.student.class_stride != 1 || p.teacher.class_stride != 1) return false;
  const Distance distance = distance_of(p.student);
  if (!(distance_of(p.teacher) == distance)) return false;
  if (p.gradient.data && (p.gradient.class_stride != 1 || !(distance_of(p.gradient) == distance))) return false;

  const int classes = kPieceBytes / int(size_of(p.student.dtype));
  plan.rows_at_boundaries = distance.first == 0 && distance.step == 0;
  plan.pieces = (p.vocab_size + (plan.rows_at_boundaries ? 0 : classes - 1) + classes - 1) / classes;
  plan.has_bulk_copies = device.has_clusters;
  int kept_pieces = 0;
  with_divergence<float>(p.divergence, [&](auto d) {
    if (decltype(d)::kMoves) kept_pieces = ring_pieces<decltype(d)>(p.student.dtype);
  });
  if (kept_pieces == 0) return false;
  // With a hard label a further exponential, and what goes with it, would not fit beside what is kept.
  for (plan.keeps = !(p.hard_weight > 0);; plan.keeps = false) {
    for (plan.cluster_blocks = 1; plan.cluster_blocks <= (device.has_clusters ? kMaxClusterBlocks : 1);
         plan.cluster_blocks *= 2) {
      const int64_t share = (plan.pieces + plan.cluster_blocks - 1) / plan.cluster_blocks;
      int64_t threads = (share + 32 * kept_pieces - 1) / (32 * kept_pieces) * 32;
      if (threads > kMaxBlockThreads && plan.keeps) continue;
      if (threads > kMaxBlockThreads) {
        const int64_t pieces = (share + kMaxBlockThreads - 1) / kMaxBlockThreads;
        threads = (share + 32 * pieces - 1) / (32 * pieces) * 32;
      }
      const int64_t stages = (share + threads - 1) / threads, stage = 2 * kPieceBytes * threads, slot = stages * stage;
      // As many blocks a multiprocessor as its registers hold, or fewer, until a ring of two rows fits each; where no
      // cluster is large enough for two, of one row and what fits beside it.
      const bool is_largest = plan.cluster_blocks == kMaxClusterBlocks && !plan.keeps;
      int64_t at_once = kThreadsInRegisters / threads, rows = 0, room = 0;
      if (at_once > kMostBlocksAtOnce) at_once = kMostBlocksAtOnce;
      for (; at_once > 0; --at_once) {
        const int64_t all = device.shared_all / at_once - 1024;
        room = (all < device.shared_block ? all : device.shared_block) - kRingSharedBytes;
        rows = room / slot;
        if (rows >= 2 || (is_largest && at_once == 1 && rows == 1)) break;
      }
      if (at_once == 0) continue;
      plan.share = int(share);
      plan.team_threads = plan.block_threads = int(threads);
      plan.ring_rows = !device.has_clusters || rows < 2 ? 2 : rows < kMaxRingRows ? int(rows) : kMaxRingRows;
      plan.row_pieces = int(stages * threads);
      plan.ring_pieces = rows < 2 ? int(room / stage * threads) : plan.ring_rows * plan.row_pieces;
      plan.pieces_ahead = rows < 2 ? plan.ring_pieces - plan.row_pieces : plan.row_pieces;
      plan.side_bytes = plan.ring_pieces * kPieceBytes;
      plan.shared_bytes = kRingSharedBytes + 2 * plan.side_bytes;
      // At most; how many clusters the groups of its multiprocessors leave room for the device is asked
      // (limit_to_resident).
      int64_t resident = device.num_multiprocessors * at_once / plan.cluster_blocks;
      if (resident < 1) resident = 1;
      plan.grid_blocks = (p.num_rows < resident ? p.num_rows : resident) * plan.cluster_blocks;
      plan.source = Plan::Source::kRing;
      return true;
    }
    if (!plan.keeps) break;
  }
  return false;
}

}  // namespace

Plan plan_of(const LossProblem& p, const DeviceProperties& device) {
  Plan plan;
  if (plan_ring(p, device, plan)) return plan;
  plan = Plan{};
  const bool contiguous =
      p.student.class_stride == 1 && p.teacher.class_stride == 1 && (!p.gradient.data || p.gradient.class_stride == 1);
  // One more for rows that do not begin at 16 bytes.
  const int64_t chunks = (p.vocab_size + kChunk - 1) / kChunk + 1;
  // Where the classes are far apart and the rows neighbours (images), a thread a row reads neighbours together.
  const int last = p.num_row_dims - 1;
  const bool side_by_side = !contiguous && last >= 0 && p.student.row_strides[last] == 1;
  const int64_t threads =
      side_by_side ? 1 : power_of_two_from((chunks + kMemoryChunksPerThread - 1) / kMemoryChunksPerThread);
  const bool is_double = p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
  const int64_t most_threads = is_double ? kMaxDoubleBlockThreads : kMaxBlockThreads;
  plan.team_threads = int(threads < most_threads ? threads : most_threads);
  // Of rows that are read again and again, few at a time, so that they are still in the L2: a cluster for each.
  if (device.has_clusters && contiguous && threads > most_threads) {
    const int64_t blocks = threads / most_threads;
    plan.cluster_blocks = int(blocks < kMaxClusterBlocks ? blocks : kMaxClusterBlocks);
  }
  plan.block_threads = plan.team_threads <= 32 ? kSharedBlockThreads : plan.team_threads;

  // As many teams as are resident at once, each of which goes on to the next rows: one more would begin when all others
  // have ended.
  const int64_t needed = (p.num_rows + plan.rows_per_block() - 1) / plan.rows_per_block();
  const int blocks_at_once = kThreadsInRegisters / plan.block_threads;
  int64_t resident = int64_t(device.num_multiprocessors) * blocks_at_once;
  if (plan.cluster_blocks > 1) {
    resident = int64_t(device.num_multiprocessors / kGroup) * (kGroup * blocks_at_once / plan.cluster_blocks);
  }
  if (resident < 1) resident = 1;
  plan.grid_blocks = (needed < resident ? needed : resident) * plan.cluster_blocks;
  if (plan.grid_blocks < plan.cluster_blocks) plan.grid_blocks = plan.cluster_blocks;
  return plan;
}

// The smallest cluster whose blocks are few enough bytes for several of a multiprocessor: while one of them is in
// between its passes, the others read and write.
SparsePlan plan_of(const DeviceSparse& problem, const DeviceProperties& device) {
  const LossProblem& p = problem.rows.problem;
  const bool is_double = problem.is_double();
  const int64_t size = is_double ? 8 : int64_t(size_of(p.student.dtype));
  // Of a row that begins farthest behind a boundary of 16 bytes.
  const int64_t chunks = (p.vocab_size + 2 * (kChunk - 1)) / kChunk;
  const int64_t list = kSparseSharedBytes + (2 * problem.k * (is_double ? 8 : 4) + 15) / 16 * 16;
  const auto bytes_of = [&](int64_t share, bool keeps) {
    return list + (share + 15) / 16 * 16 + (keeps ? share * kChunk * size : 0);
  };
  const auto room_for = [&](int64_t at_once) {
    const int64_t all = device.shared_all / at_once - 1024;
    return all < device.shared_block ? all : device.shared_block;
  };
  SparsePlan plan;
  int64_t share = 0;
  constexpr int64_t kBlocksWanted = 3;
  const int most = device.has_clusters ? kMaxClusterBlocks : 1;
  for (plan.cluster_blocks = 1;; plan.cluster_blocks *= 2) {
    share = (chunks + plan.cluster_blocks - 1) / plan.cluster_blocks;
    if (bytes_of(share, true) <= room_for(kBlocksWanted) || plan.cluster_blocks == most) break;
  }
  plan.keeps = bytes_of(share, true) <= room_for(1);
  if (!plan.keeps) {  // as many chunks as there is room for bits
    int64_t at_once = kBlocksWanted;
    while (at_once > 1 && bytes_of(share, false) > room_for(at_once)) --at_once;
    const int64_t room = (room_for(at_once) - list) / 16 * 16;
    if (share > room) share = room;
  }
  plan.share = int(share);
  plan.num_tiles = (chunks + share * plan.cluster_blocks - 1) / (share * plan.cluster_blocks);
  plan.shared_bytes = int(bytes_of(share, plan.keeps));
  const int64_t threads = power_of_two_from((share + kChunksPerSparseThread - 1) / kChunksPerSparseThread);
  const int64_t most_threads = is_double ? kSparseDoubleThreads : kSparseThreads;
  plan.threads = int(threads < 32 ? 32 : threads < most_threads ? threads : most_threads);
  // At most; how many there really is room for the device is asked (limit_to_resident).
  int64_t at_once = device.shared_all / (plan.shared_bytes + 1024);
  if (at_once > kSparseResidentThreads / plan.threads) at_once = kSparseResidentThreads / plan.threads;
  int64_t resident = device.num_multiprocessors * at_once / plan.cluster_blocks;
  if (resident < 1) resident = 1;
  plan.grid_blocks = (p.num_rows < resident ? p.num_rows : resident) * plan.cluster_blocks;
  return plan;
}

const char* name_of(const Plan& plan) {
  if (plan.source == Plan::Source::kRing) {
    return plan.cluster_blocks > 1  ? "a ring, a row a cluster"
           : plan.team_threads > 32 ? "a ring, a row a block"
                                    : "a ring, a row a warp";
  }
  if (plan.cluster_blocks > 1) return "a row a cluster";
  return plan.team_threads > 32 ? "a row a block" : plan.team_threads > 1 ? "a row part of a warp" : "a row a thread";
}

}  // namespace reptile_ext

// For tests, tests/cuda/budget.py and `reptile doctor`, through ctypes: the plan that contiguous logits of a shape get.
// `numbers` becomes threads of a team in a block, blocks of a cluster, threads of a block, blocks; of a ring, pieces of
// a row, a block's share of them, rows in the ring, bytes of shared memory, whether exponentials are kept, and the
// ring's pieces.
extern "C" __attribute__((visibility("default"))) const char* reptile_ext_cuda_plan(
    int64_t num_rows, int64_t vocab_size, int dtype, int divergence, int num_multiprocessors, int has_clusters,
    int64_t* numbers) {
  using namespace reptile_ext;
  LossProblem p;
  p.num_rows = num_rows;
  p.vocab_size = p.gradient_size = vocab_size;
  p.num_row_dims = 1;
  p.divergence = Divergence(divergence);
  p.student.dtype = p.teacher.dtype = p.gradient.dtype = DType(dtype);
  p.student.row_strides[0] = p.teacher.row_strides[0] = p.gradient.row_strides[0] = vocab_size;
  DeviceProperties device;
  device.num_multiprocessors = num_multiprocessors;
  device.set_generation(has_clusters != 0);
  const Plan plan = plan_of(p, device);
  const int64_t found[] = {plan.team_threads, plan.cluster_blocks, plan.block_threads, plan.grid_blocks,
                           plan.pieces,       plan.share,          plan.ring_rows,     plan.shared_bytes,
                           plan.keeps,        plan.ring_pieces};
  for (int i = 0; i < 10; ++i) numbers[i] = found[i];
  return name_of(plan);
}

// For tests, of a sparse teacher: threads, blocks of a cluster, chunks of a block, tiles, whether a row is kept, bytes
// of shared memory, blocks.
extern "C" __attribute__((visibility("default"))) void reptile_ext_cuda_sparse_plan(int64_t num_rows,
                                                                                    int64_t vocab_size, int64_t k,
                                                                                    int dtype, int num_multiprocessors,
                                                                                    int has_clusters,
                                                                                    int64_t* numbers) {
  using namespace reptile_ext;
  DeviceSparse problem;
  problem.rows.problem.num_rows = num_rows;
  problem.rows.problem.vocab_size = vocab_size;
  problem.rows.problem.student.dtype = DType(dtype);
  problem.k = k;
  DeviceProperties device;
  device.num_multiprocessors = num_multiprocessors;
  device.set_generation(has_clusters != 0);
  const SparsePlan plan = plan_of(problem, device);
  const int64_t found[] = {plan.threads, plan.cluster_blocks, plan.share,      plan.num_tiles,
                           plan.keeps,   plan.shared_bytes,   plan.grid_blocks};
  for (int i = 0; i < 7; ++i) numbers[i] = found[i];
}
