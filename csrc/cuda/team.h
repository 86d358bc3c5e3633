// The threads of a row, and what they tell one another.
//
// A team is a thread, part of a warp, a block, or the blocks of a cluster (Plan). Sums and maxima go through it in
// three steps, each to all its threads, so that no step needs a second one to bring the result back:
//
//     within a warp       shuffles: log2(lanes) of them a number
//     within a block      a number a warp to shared memory, a barrier, and every warp joins all of them by shuffles
//     within a cluster    a number a block to the shared memory of every block, a barrier of the cluster
#pragma once

#include "device.h"

#include "loss.h"

namespace reptile_ext {
namespace {

constexpr int kWarp = 32;
constexpr int kMaxWarps = kMaxBlockThreads / kWarp;
constexpr int kMaxTeams = 256;    // of a block
constexpr int kMaxExchanged = 8;  // numbers at a time: mse's five sums and the cross entropy's three

// What the threads of a team larger than a warp tell one another. Everything is there twice and used in turn: between
// two uses of the same lies a use of the other, with its barrier, so who still reads is not overtaken by who writes.
// That holds for each kind by itself: a barrier of the block does not hold up the cluster's other blocks.
template <class V>
struct Exchange {
  V of_warp[2][kMaxWarps * kMaxExchanged];
  V of_block[2][kMaxClusterBlocks * kMaxExchanged];
  double losses[kMaxTeams];  // of each team of the block, added up over its rows
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

// The threads of a block as one team, and the sum over them, in a fixed order.
REPTILE_EXT_DEVICE Team<double> whole_block(Exchange<double>& exchange) {
  return {&exchange, block_threads(), thread_rank(), 1, 0};
}
REPTILE_EXT_DEVICE double sum_of(Team<double>& team, double x) {
  double sum[1] = {x};
  team.all_reduce(sum, [](double a, double b) { return a + b; });
  return sum[0];
}

REPTILE_EXT_DEVICE void store_loss(void* out, bool is_double, int64_t at, double x) {
  if (is_double) {
    store(static_cast<double*>(out) + at, x);
  } else {
    store(static_cast<float*>(out) + at, float(x));
  }
}

// The loss, in a launch of its rows' kernel: a warp of each block that has losses, which are `count` numbers in shared
// memory, adds them up and tells the sum to the warp that is the last of all to come here. In a fixed order: a loss is
// the same in every run.
REPTILE_EXT_DEVICE void add_up_losses(const DeviceLoss& device, const double* losses, int count, int64_t block,
                                      int64_t num_blocks) {
  const int lane = thread_rank() % kWarp;
  const auto sum_of_warp = [](double x) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) x = x + shuffle_xor(x, mask);
    return x;
  };
  double sum = 0;
  for (int i = lane; i < count; i += kWarp) sum += load_shared(losses + i);
  sum = sum_of_warp(sum);
  bool is_last = false;
  if (lane == 0) {
    store(device.of_blocks + block, sum);
    is_last = arrive_last(device.arrived, uint32_t(num_blocks));
  }
  if (ballot(is_last) == 0) return;
  sync_warp();  // what the first lane may see, all may
  sum = 0;
  for (int64_t b = lane; b < num_blocks; b += kWarp) sum += load_of_other_block(device.of_blocks + b);
  sum = sum_of_warp(sum);
  const LossProblem& p = device.problem;
  const double factor = device.divisor ? p.gradient_scale / load(device.divisor) : p.gradient_scale;
  if (lane == 0) store_loss(device.sum, device.sum_is_double, 0, sum * factor);
}

}  // namespace
}  // namespace reptile_ext
