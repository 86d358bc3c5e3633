// The kernels: loss and gradient of rows of logits, forward and backward in one go, or one part of them. docs/cuda.md
// tells how and why. team.h has the threads of a row, storage.h its memory, passes.h the passes over it, halves.h the
// two halves that they make; this file goes over the rows.
//
// These are the general kernels, for any layout and mixture of types: a row is read again in every pass, three times
// or, with a mixture pass, four times; of these the L2 serves all but the first. Dense rows of one type have
// ring_rows.cu, which reads them once.
//
// Compiled twice: as launch_any_float (REPTILE_EXT_VALUE float), and as launch_any_double for float64 on either side.

#include "halves.h"

namespace reptile_ext {
namespace {

template <class D, class V>
REPTILE_EXT_KERNEL(sizeof(V) == 8 ? kMaxDoubleBlockThreads : kMaxBlockThreads)
loss_kernel(REPTILE_EXT_ARGUMENT DeviceLoss device, const Plan plan) {
  Exchange<V>& exchange = shared_memory<Exchange<V>>();
  const LossProblem& p = device.problem;
  const Call<V> call(p, D::kRawLogits);

  Team<V> team;
  team.exchange = &exchange;
  team.threads = plan.team_threads;
  team.rank = thread_rank() % plan.team_threads;
  team.blocks = plan.cluster_blocks;
  team.block = plan.cluster_blocks > 1 ? cluster_rank() : 0;
  const bool is_in_warp = plan.team_threads <= kWarp;

  if (device.sum && team.rank == 0) store_shared(exchange.losses + thread_rank() / team.threads, 0.0);
  if (plan.cluster_blocks > 1) sync_cluster();  // a peer's memory is there once it has begun
  const int64_t rows_per_block = plan.rows_per_block();
  const int64_t stride = num_blocks() / plan.cluster_blocks * rows_per_block;
  // All threads of a block go round together, those without a row too: shuffles and barriers need them.
  for (int64_t base = block_rank() / plan.cluster_blocks * rows_per_block; base < p.num_rows; base += stride) {
    TeamRow row;
    row.n = base + thread_rank() / plan.team_threads;
    const bool exists = row.n < p.num_rows;
    row.counts = exists && row_counts(device, row.n);
    row.is_broken = row.counts && has_wrong_label(p, row.n);
    row.label = p.labels && row.counts && !row.is_broken ? load(p.labels + row.n) : -1;
    const Place place(p, exists ? row.n : 0);
    if (exists && !row.counts) write_ignored(p, team, place, row.n);
    if (!is_in_warp && !row.counts) continue;  // the whole team agrees, and no other waits for it
    MemoryRow<V> source(p, place);
    loss_of_row<D, V>(device, call, team, source, place, row);
  }
  if (plan.cluster_blocks > 1) sync_cluster();  // nobody leaves while a peer may still write to its memory
  if (!device.sum) return;
  sync_block();
  if (team.block == 0 && thread_rank() < kWarp) {
    add_up_losses(device, exchange.losses, int(rows_per_block), block_rank() / plan.cluster_blocks,
                  num_blocks() / plan.cluster_blocks);
  }
}

}  // namespace

const char* REPTILE_EXT_LAUNCHER(const DeviceLoss& loss, const Plan& plan, void* stream) {
  const char* error = nullptr;
  with_divergence<REPTILE_EXT_VALUE>(loss.problem.divergence, [&](auto d) {
    error = launch(&loss_kernel<decltype(d), REPTILE_EXT_VALUE>,
                   {plan.grid_blocks, plan.block_threads, plan.cluster_blocks}, stream, loss, plan);
  });
  return error;
}

}  // namespace reptile_ext
