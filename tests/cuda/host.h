// The CUDA kernels' device, on a host: what csrc/cuda/device.h takes instead of CUDA when it is compiled as C++.
//
// The threads of a cluster's blocks are fibers, which run until they reach a barrier or a shuffle. What is checked:
//
//     device memory    every access lies in a range that the launcher has named, at the alignment it needs
//     shared memory    every access lies in the block's own, or a peer's of the same cluster, and reads what was
//     written barriers         no thread ends, or waits at another one, while others wait for it
//
// Fibers take turns forwards or, on request, backwards: a barrier that is missing shows as a difference between the
// two. What this cannot show: the time anything takes, the memory model's finer points, and what nvcc makes of the
// source.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define REPTILE_EXT_DEVICE inline
#define REPTILE_EXT_KERNEL(max_threads) void
#define REPTILE_EXT_ARGUMENT const
#define REPTILE_EXT_UNROLL

namespace reptile_ext {
namespace host {

inline thread_local std::vector<std::pair<uintptr_t, uintptr_t>> ranges;  // of device memory
inline thread_local int64_t whole_loads = 0;                              // of 16 bytes, since somebody set it to 0
// Who goes on when several threads could.
enum class Order {
  kInTurn,     // the next, so that all advance together
  kBackwards,  // the one before
  kFirst,      // the first one, which goes as far ahead of the others as barriers let it
  kLast,
};
inline thread_local Order order = Order::kInTurn;

struct Barrier {
  int expected = 0, arrived = 0;
  int64_t generation = 0;
};

struct Block {
  std::vector<unsigned char> shared, written;
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<double> slots;  // of the shuffles: two a thread, in turn
};

struct Cluster;

struct Fiber {
  ucontext_t context;
  Cluster* cluster;
  int block, thread;
  Barrier* waits_for = nullptr;
  int64_t generation = 0;
  int turn = 0;  // of the shuffles
  bool is_done = false;
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier barrier;
  int64_t first_block = 0, num_blocks = 0;
  int threads = 0;
  ucontext_t scheduler;
  std::string error;
  void (*run)(void*) = nullptr;
  void* argument = nullptr;
};

inline thread_local Fiber* current = nullptr;
inline thread_local std::vector<std::unique_ptr<char[]>>
    stacks;  // of fibers; fresh memory would cost more than a kernel

// Ends the launch: the other fibers are dropped where they are.
[[noreturn]] inline void stop(const std::string& error) {
  Fiber& f = *current;
  if (f.cluster->error.empty()) {
    f.cluster->error = error + " (block " + std::to_string(f.cluster->first_block + f.block) + ", thread " +
                       std::to_string(f.thread) + ")";
  }
  f.is_done = true;
  swapcontext(&f.context, &f.cluster->scheduler);
  std::abort();
}

inline void wait(Barrier& barrier) {
  Fiber& f = *current;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  f.waits_for = &barrier;
  f.generation = barrier.generation;
  swapcontext(&f.context, &f.cluster->scheduler);
}

inline void check_device(const void* p, size_t bytes, size_t alignment) {
  const uintptr_t begin = uintptr_t(p), end = begin + bytes;
  for (const auto& [from, to] : ranges) {
    if (begin >= from && end <= to) {
      if (begin % alignment != 0) stop("misaligned access of " + std::to_string(bytes) + " bytes");
      return;
    }
  }
  stop("access to device memory that is not the call's, " + std::to_string(bytes) + " bytes");
}

// The block whose shared memory holds p, and where.
inline std::pair<Block*, size_t> find_shared(const void* p, size_t bytes) {
  for (Block& block : current->cluster->blocks) {
    const unsigned char* begin = block.shared.data();
    const unsigned char* q = static_cast<const unsigned char*>(p);
    if (q >= begin && q + bytes <= begin + block.shared.size()) return {&block, size_t(q - begin)};
  }
  stop("access beyond shared memory");
}

inline void fiber_main() {
  Fiber& f = *current;
  f.cluster->run(f.cluster->argument);
  f.is_done = true;
  swapcontext(&f.context, &f.cluster->scheduler);
}

inline void run_cluster(Cluster& cluster) {
  constexpr size_t kStack = 64 << 10;
  const int per_block = cluster.threads;
  cluster.barrier.expected = per_block * int(cluster.blocks.size());
  for (Block& block : cluster.blocks) {
    block.barrier.expected = per_block;
    block.warps.resize(size_t(per_block + 31) / 32);
    for (Barrier& warp : block.warps) warp.expected = 32;
    if (per_block % 32) block.warps.back().expected = per_block % 32;
    block.slots.assign(size_t(per_block) * 2, 0);
  }
  const int total = cluster.barrier.expected;
  cluster.fibers.resize(size_t(total));
  for (int i = 0; i < total; ++i) {
    Fiber& f = cluster.fibers[size_t(i)];
    f.cluster = &cluster;
    f.block = i / per_block;
    f.thread = i % per_block;
    if (stacks.size() <= size_t(i)) stacks.emplace_back(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stacks[size_t(i)].get();
    f.context.uc_stack.ss_size = kStack;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
  }
  const bool reversed = order == Order::kBackwards || order == Order::kLast;
  const bool in_turn = order == Order::kInTurn || order == Order::kBackwards;
  int next = 0, idle = 0;  // how many in a row could not go on
  for (int done = 0; done < total;) {
    Fiber& f = cluster.fibers[size_t(reversed ? total - 1 - next : next)];
    next = (next + 1) % total;
    if (f.is_done || (f.waits_for && f.waits_for->generation == f.generation)) {
      if (++idle < total) continue;
      cluster.error = "a barrier or shuffle that is not reached by all threads";
      return;
    }
    f.waits_for = nullptr;
    current = &f;
    swapcontext(&cluster.scheduler, &f.context);
    if (!cluster.error.empty()) return;
    done += f.is_done;
    idle = 0;
    if (!in_turn) next = 0;
  }
}

}  // namespace host

namespace {

inline int thread_rank() { return host::current->thread; }
inline int block_threads() { return host::current->cluster->threads; }
inline int64_t block_rank() { return host::current->cluster->first_block + host::current->block; }
inline int64_t num_blocks() { return host::current->cluster->num_blocks; }
inline int cluster_rank() { return host::current->block; }
inline void sync_block() { host::wait(host::current->cluster->blocks[size_t(host::current->block)].barrier); }
inline void sync_cluster() { host::wait(host::current->cluster->barrier); }

template <class V>
V shuffle_from(V x, int lane) {
  host::Fiber& f = *host::current;
  host::Block& block = f.cluster->blocks[size_t(f.block)];
  const size_t warp = size_t(f.thread / 32), turn = size_t(f.turn);
  f.turn ^= 1;
  block.slots[size_t(f.thread) * 2 + turn] = double(x);
  host::wait(block.warps[warp]);
  return V(block.slots[(warp * 32 + size_t(lane)) * 2 + turn]);
}
template <class V>
V shuffle_xor(V x, int mask) {
  return shuffle_from(x, (host::current->thread % 32) ^ mask);
}

template <class T>
T& shared_memory() {
  host::Block& block = host::current->cluster->blocks[size_t(host::current->block)];
  if (block.shared.empty()) {
    block.shared.assign(sizeof(T), 0xcd);
    block.written.assign(sizeof(T), 0);
  }
  return *reinterpret_cast<T*>(block.shared.data());
}
template <class T>
T* of_peer(T* p, int rank) {
  auto& blocks = host::current->cluster->blocks;
  if (rank < 0 || size_t(rank) >= blocks.size()) host::stop("a peer outside of the cluster");
  const size_t offset = host::find_shared(p, sizeof(T)).second;
  host::Block& peer = blocks[size_t(rank)];
  if (host::current->cluster->barrier.generation == 0) host::stop("a peer's memory before all blocks have begun");
  return reinterpret_cast<T*>(peer.shared.data() + offset);
}
template <class T>
T load_shared(const T* p) {
  const auto [block, offset] = host::find_shared(p, sizeof(T));
  for (size_t i = 0; i < sizeof(T); ++i) {
    if (!block->written[offset + i]) host::stop("shared memory is read before it is written");
  }
  return *p;
}
template <class T>
void store_shared(T* p, T x) {
  const auto [block, offset] = host::find_shared(p, sizeof(T));
  std::memset(block->written.data() + offset, 1, sizeof(T));
  *p = x;
}

struct Bits128 {
  uint32_t word[4];
};
inline Bits128 load_128(const void* p) {
  host::check_device(p, 16, 16);
  ++host::whole_loads;
  Bits128 x;
  std::memcpy(&x, p, 16);
  return x;
}
inline Bits128 load_128_again(const void* p) { return load_128(p); }
inline void store_128(void* p, const Bits128& x) {
  host::check_device(p, 16, 16);
  std::memcpy(p, &x, 16);
}
inline void prefetch_to_l2(const void* p, uint32_t bytes) {
  if (uintptr_t(p) % 16 || bytes % 16) host::stop("misaligned prefetch");
  host::check_device(p, bytes, 1);
}
template <class T>
T load(const T* p) {
  host::check_device(p, sizeof(T), sizeof(T));
  return *p;
}
template <class T>
void store(T* p, T x) {
  host::check_device(p, sizeof(T), sizeof(T));
  *p = x;
}

inline float float_of_bits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of_half(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return float(x);
}
inline uint16_t half_of(float x) {
  const _Float16 half = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &half, 2);
  return bits;
}
inline uint16_t bfloat16_of(float x) {
  const uint32_t bits = bits_of(x);
  return x != x ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The device's instructions are approximations, with results below the smallest normal number taken as 0.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2(float x) { return flushed(::exp2f(x)); }
inline double exp2(double x) { return ::exp2(x); }
inline float log2_approximately(float x) { return ::log2f(x); }
inline float reciprocal(float x) { return flushed(1 / x); }
inline double reciprocal(double x) { return 1 / x; }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float any_max(float a, float b) { return std::fmax(a, b); }
inline double any_max(double a, double b) { return std::fmax(a, b); }
inline double log_of(double x) { return std::log(x); }
inline double log1p_of(double x) { return std::log1p(x); }
inline float sqrt_of(float x) { return std::sqrt(x); }
inline double sqrt_of(double x) { return std::sqrt(x); }
inline float times_sign_of(float x, float s) { return std::signbit(s) ? -x : x; }
inline double times_sign_of(double x, double s) { return std::signbit(s) ? -x : x; }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t grid, int block, int cluster_blocks, void*,
                   const Arguments&... arguments) {
  static thread_local std::string error;
  if (grid % cluster_blocks != 0 || grid < 1 || block < 1 || block > 1024) return "an impossible launch";
  auto call = [&] { kernel(Parameters(arguments)...); };
  for (int64_t first = 0; first < grid; first += cluster_blocks) {
    host::Cluster cluster;
    cluster.blocks.resize(size_t(cluster_blocks));
    cluster.first_block = first;
    cluster.num_blocks = grid;
    cluster.threads = block;
    cluster.run = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
    cluster.argument = &call;
    host::run_cluster(cluster);
    if (!cluster.error.empty()) {
      error = cluster.error;
      return error.c_str();
    }
  }
  return nullptr;
}

}  // namespace
}  // namespace reptile_ext
