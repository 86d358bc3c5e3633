// Which kernel a shape gets, and with how many threads. No CUDA in here, so it is tested without a GPU.

#include "loss.h"

namespace reptile_ext {
namespace {

int64_t power_of_two_from(int64_t n) {
  int64_t power = 1;
  while (power < n) power *= 2;
  return power;
}

constexpr int kSharedBlockThreads = 256;  // of a block with many rows
constexpr int kUsualBlockThreads = 256;   // two such blocks, 128 registers a thread, fill a multiprocessor
constexpr int kThreadsInRegisters = 512;  // of a multiprocessor, at 128 registers a thread
constexpr int kMemoryChunksPerThread = 4;
// The blocks of a cluster share a group of multiprocessors (GPC). How many are usable in each differs from group to
// group and from device to device; 16 is what Hopper's have at least.
constexpr int kGroup = 16;

}  // namespace

Plan plan_of(const LossProblem& p, const DeviceProperties& device) {
  Plan plan;
  const bool same_type = p.student.dtype == p.teacher.dtype;
  const bool contiguous =
      p.student.class_stride == 1 && p.teacher.class_stride == 1 && (!p.gradient.data || p.gradient.class_stride == 1);
  // One more for rows that do not begin at 16 bytes.
  const int64_t chunks = (p.vocab_size + kChunk - 1) / kChunk + 1;
  // The halves apart are compiled for rows in memory alone.
  const bool may_hold = same_type && contiguous && p.part == Part::kLoss;
  const int in_registers = may_hold ? chunks_in_registers(p.student.dtype) : 0;

  int64_t threads = in_registers ? power_of_two_from((chunks + in_registers - 1) / in_registers) : 0;
  const int64_t most = device.has_clusters ? int64_t(kMaxBlockThreads) * kMaxClusterBlocks : kMaxBlockThreads;
  if (in_registers && threads <= most) {
    plan.source = Plan::Source::kRegisters;
    if (device.has_clusters && threads > kUsualBlockThreads) {
      // Blocks of the usual size, two of which overlap, one loading while the other stores; of the largest if need be.
      plan.team_threads =
          threads > int64_t(kUsualBlockThreads) * kMaxClusterBlocks ? kMaxBlockThreads : kUsualBlockThreads;
      plan.cluster_blocks = int(threads / plan.team_threads);
    } else {
      plan.team_threads = int(threads);
    }
  } else {
    // Where the classes are far apart and the rows neighbours (images), a thread a row reads neighbours together.
    const int last = p.num_row_dims - 1;
    const bool side_by_side = !contiguous && last >= 0 && p.student.row_strides[last] == 1;
    threads = side_by_side ? 1 : power_of_two_from((chunks + kMemoryChunksPerThread - 1) / kMemoryChunksPerThread);
    const bool is_double = p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
    const int64_t most_threads = is_double ? kMaxDoubleBlockThreads : kMaxBlockThreads;
    plan.team_threads = int(threads < most_threads ? threads : most_threads);
    // Of rows that are read again and again, few at a time, so that they are still in the L2: a cluster for each.
    if (device.has_clusters && contiguous && threads > most_threads) {
      const int64_t blocks = threads / most_threads;
      plan.cluster_blocks = int(blocks < kMaxClusterBlocks ? blocks : kMaxClusterBlocks);
    }
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

const char* name_of(const Plan& plan) {
  const bool registers = plan.source == Plan::Source::kRegisters;
  if (plan.cluster_blocks > 1) return registers ? "a row a cluster, in registers" : "a row a cluster, from memory";
  if (plan.team_threads > 32) return registers ? "a row a block, in registers" : "a row a block, from memory";
  if (plan.team_threads > 1)
    return registers ? "a row part of a warp, in registers" : "a row part of a warp, from memory";
  return registers ? "a row a thread, in registers" : "a row a thread, from memory";
}

}  // namespace reptile_ext
