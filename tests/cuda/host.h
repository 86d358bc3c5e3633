// The CUDA kernels' device, on a host: what csrc/cuda/device.h takes instead of CUDA when it is compiled as C++.
//
// The threads of a cluster's blocks are fibers, which run until they reach a barrier or a shuffle. What is checked:
//
//     device memory    every access lies in a range that the launcher has named, at the alignment it needs
//     shared memory    every access lies in the block's own, or a peer's of the same cluster, and reads what was
//                      written
//     barriers         no thread ends, or waits at another one, while others wait for it
//     copies           what goes on by itself (copy_bulk, copy_128, tell_128) is there when somebody has waited for it
//     and
//                      not before, as late as can be; from the moment it is ordered, what lay there cannot be read
//     phases           end by one expect_bytes and as many bytes; one that nothing ends is a barrier that hangs
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

#include "../../csrc/cuda/loss.h"

#define REPTILE_EXT_DEVICE inline
#define REPTILE_EXT_KERNEL(max_threads) void
#define REPTILE_EXT_LONE_KERNEL(max_threads) void
#define REPTILE_EXT_ARGUMENT const
#define REPTILE_EXT_DEVICE_CALL inline
#define REPTILE_EXT_UNROLL
#define REPTILE_EXT_NO_UNROLL

namespace reptile_ext {
namespace host {

inline thread_local std::vector<std::pair<uintptr_t, uintptr_t>> ranges;  // of device memory
inline thread_local int64_t whole_loads = 0;                              // of 16 bytes, since somebody set it to 0
inline thread_local int64_t exponentials = 0;                             // as well
inline thread_local int64_t bulk_bytes = 0;                               // as well
inline thread_local int64_t launches = 0;                                 // as well
inline thread_local bool all_arrived = false;  // the last block of a launch has counted itself
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

// What a Phase is on the device, by its address.
struct PhaseState {
  bool is_initialised = false;
  int expected = 0;   // how often expect_bytes is still to be called before the phase ends
  int64_t bytes = 0;  // that are still to come, of those that were expected
  uint32_t parity = 0;
};
struct Block;
// A copy that has been ordered and has not come.
struct Copy {
  Block* to;
  size_t offset;
  std::vector<unsigned char> bytes;  // or, if there are none,
  const void* from = nullptr;
  size_t size = 0;
  PhaseState* phase = nullptr;
};

struct alignas(128) Line {
  unsigned char bytes[128];
};
struct Block {
  std::vector<Line> lines;  // shared memory, in every block as far from a boundary
  size_t size = 0;
  std::vector<unsigned char> written;
  std::vector<PhaseState> phases;  // of every 8 bytes of shared memory
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<double> slots;  // of the shuffles: two a thread, in turn

  unsigned char* shared() { return lines[0].bytes; }
  unsigned char* allocate(size_t bytes) {
    if (lines.empty()) {
      lines.resize((bytes + sizeof(Line) - 1) / sizeof(Line));
      size = bytes;
      std::memset(shared(), 0xcd, bytes);
      written.assign(bytes, 0);
      phases.resize(bytes / 8 + 1);
    }
    return shared();
  }
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
  PhaseState* waits_for_phase = nullptr;
  uint32_t parity = 0;
  std::vector<std::vector<Copy>> groups;  // of copy_128; the last one is not ended
};

struct Cluster {
  std::vector<Block> blocks;
  std::vector<Fiber> fibers;
  Barrier barrier;
  int64_t first_block = 0, num_blocks = 0;
  int threads = 0;
  ucontext_t scheduler;
  std::string error;
  std::vector<Copy> copies;  // that count for a phase
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
    if (block.lines.empty()) continue;
    const unsigned char* begin = block.shared();
    const unsigned char* q = static_cast<const unsigned char*>(p);
    if (q >= begin && q + bytes <= begin + block.size) return {&block, size_t(q - begin)};
  }
  stop("access beyond shared memory");
}

inline void begin(Copy& copy) { std::memset(copy.to->written.data() + copy.offset, 0, copy.size); }
inline void carry_out(const Copy& copy) {
  const void* from = copy.from ? copy.from : copy.bytes.data();
  std::memcpy(copy.to->shared() + copy.offset, from, copy.size);
  std::memset(copy.to->written.data() + copy.offset, 1, copy.size);
}
inline void end_phase_if_complete(PhaseState& phase) {
  if (phase.expected != 0 || phase.bytes != 0) return;
  phase.expected = 1;
  phase.parity ^= 1;
}
// All copies that count for a phase come; whether it is no longer the one that is waited for.
inline bool has_ended(Cluster& cluster, PhaseState& phase, uint32_t parity) {
  if (phase.parity != parity) return true;
  for (size_t i = 0; i < cluster.copies.size(); ++i) {
    if (cluster.copies[i].phase != &phase) continue;
    carry_out(cluster.copies[i]);
    phase.bytes -= int64_t(cluster.copies[i].size);
    cluster.copies.erase(cluster.copies.begin() + ptrdiff_t(i--));
    end_phase_if_complete(phase);
    if (phase.parity != parity) return true;
  }
  return false;
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
    if (f.is_done || (f.waits_for && f.waits_for->generation == f.generation) ||
        (f.waits_for_phase && !has_ended(cluster, *f.waits_for_phase, f.parity))) {
      if (++idle < total) continue;
      cluster.error = "a barrier or shuffle that is not reached by all threads";
      return;
    }
    f.waits_for = nullptr;
    f.waits_for_phase = nullptr;
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

inline void sync_warp() {
  host::Fiber& f = *host::current;
  host::wait(f.cluster->blocks[size_t(f.block)].warps[size_t(f.thread / 32)]);
}
enum Mark { kMarkRare, kMarkOneWarp, kMarkOneIn32, kMarkCluster, kMarkWarps, kMarkOnce = 7 };
template <int kMark>
void mark() {}

inline char* dynamic_shared(int bytes) {
  return reinterpret_cast<char*>(host::current->cluster->blocks[size_t(host::current->block)].allocate(size_t(bytes)));
}
template <class T>
T& shared_memory() {
  return *reinterpret_cast<T*>(host::current->cluster->blocks[size_t(host::current->block)].allocate(sizeof(T)));
}
template <class T>
T* of_peer(T* p, int rank) {
  auto& blocks = host::current->cluster->blocks;
  if (rank < 0 || size_t(rank) >= blocks.size()) host::stop("a peer outside of the cluster");
  const size_t offset = host::find_shared(p, sizeof(T)).second;
  host::Block& peer = blocks[size_t(rank)];
  if (host::current->cluster->barrier.generation == 0) host::stop("a peer's memory before all blocks have begun");
  return reinterpret_cast<T*>(peer.shared() + offset);
}
inline uint32_t ballot(bool x) {
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= uint32_t(shuffle_from(x ? 1.0f : 0.0f, lane) != 0) << lane;
  return bits;
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
inline uint32_t set_shared_bits(uint32_t* p, uint32_t bits) {
  const uint32_t before = load_shared(p);
  store_shared(p, before | bits);
  return before;
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
inline bool arrive_last(uint32_t* arrived, uint32_t count) {
  host::check_device(arrived, 4, 4);
  if (*arrived >= count) host::stop("more blocks than there are have counted themselves");
  return host::all_arrived = ++*arrived == count;
}
inline double load_of_other_block(const double* p) {
  host::check_device(p, 8, 8);
  if (!host::all_arrived) host::stop("what other blocks have stored is read before all have");
  return *p;
}
inline Bits128 load_shared_any_128(const void* p) {
  if (uintptr_t(p) % 16) host::stop("misaligned access of 16 bytes of shared memory");
  Bits128 x;
  for (int i = 0; i < 4; ++i) x.word[i] = load_shared(static_cast<const uint32_t*>(p) + i);
  return x;
}
inline void store_shared_128(void* p, const Bits128& x) {
  if (uintptr_t(p) % 16) host::stop("misaligned access of 16 bytes of shared memory");
  for (int i = 0; i < 4; ++i) store_shared(static_cast<uint32_t*>(p) + i, x.word[i]);
}

constexpr bool has_code_for(bool) { return true; }

struct Phase {
  uint64_t state;
};
inline host::PhaseState& state_of(Phase* phase) {
  const auto [block, offset] = host::find_shared(phase, sizeof(Phase));
  if (offset % 8) host::stop("a misaligned phase");
  host::PhaseState& state = block->phases[offset / 8];
  if (!state.is_initialised) host::stop("a phase that was not initialised");
  return state;
}
inline void init_phase(Phase* phase) {
  const auto [block, offset] = host::find_shared(phase, sizeof(Phase));
  block->phases[offset / 8] = {true, 1, 0, 0};
}
inline void fence_phases() {}
inline void fence_copies() {}
inline void expect_bytes(Phase* phase, uint32_t bytes) {
  host::PhaseState& state = state_of(phase);
  if (state.expected-- == 0) host::stop("bytes that are expected twice");
  state.bytes += bytes;
  host::end_phase_if_complete(state);
}
inline void wait_for(Phase* phase, uint32_t parity) {
  host::Fiber& f = *host::current;
  f.waits_for_phase = &state_of(phase);
  f.parity = parity;
  swapcontext(&f.context, &f.cluster->scheduler);
}
inline void wait_for_peers(Phase* phase, uint32_t parity) { wait_for(phase, parity); }
inline host::Copy copy_of(void* shared, size_t bytes) {
  const auto [block, offset] = host::find_shared(shared, bytes);
  if (uintptr_t(shared) % 16 || bytes % 16 || bytes == 0) host::stop("a misaligned copy");
  return {block, offset, {}, nullptr, bytes, nullptr};
}
inline void check_source(const void* device, size_t bytes) {
  if (uintptr_t(device) % 16) host::stop("a misaligned copy");
  // Rounded outward to 16 bytes, which lie in the same page as what is asked for.
  for (const auto& [from, to] : host::ranges) {
    if (uintptr_t(device) >= from / 16 * 16 && uintptr_t(device) + bytes <= (to + 15) / 16 * 16) return;
  }
  host::stop("a copy of device memory that is not the call's, " + std::to_string(bytes) + " bytes");
}
inline void copy_bulk(void* shared, const void* device, uint32_t bytes, Phase* phase) {
  check_source(device, bytes);
  host::Copy copy = copy_of(shared, bytes);
  copy.from = device;
  copy.phase = &state_of(phase);
  host::bulk_bytes += bytes;
  host::begin(copy);
  host::current->cluster->copies.push_back(copy);
}
inline void tell_128(void* shared, int rank, const Bits128& x, Phase* phase) {
  host::Copy copy = copy_of(of_peer(static_cast<Bits128*>(shared), rank), 16);
  copy.bytes.resize(16);
  std::memcpy(copy.bytes.data(), &x, 16);
  copy.phase = &state_of(of_peer(phase, rank));
  host::begin(copy);
  host::current->cluster->copies.push_back(copy);
}
inline void copy_128(void* shared, const void* device) {
  check_source(device, 16);
  host::Copy copy = copy_of(shared, 16);
  copy.from = device;
  host::bulk_bytes += 16;
  host::begin(copy);
  if (host::current->groups.empty()) host::current->groups.emplace_back();
  host::current->groups.back().push_back(copy);
}
inline void end_copies() {
  if (host::current->groups.empty()) host::current->groups.emplace_back();
  host::current->groups.emplace_back();
}
template <int kGroups>
void wait_for_copies() {
  auto& groups = host::current->groups;
  while (groups.size() > kGroups + 1) {  // one is not ended
    for (const host::Copy& copy : groups.front()) host::carry_out(copy);
    groups.erase(groups.begin());
  }
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

inline uint32_t bfloat16s_of(float x, float y) { return bfloat16_of(x) | uint32_t(bfloat16_of(y)) << 16; }
inline uint32_t halves_of(float x, float y) { return half_of(x) | uint32_t(half_of(y)) << 16; }
template <class Widen>
uint32_t larger_pair(uint32_t a, uint32_t b, Widen widen) {
  const auto larger = [&](uint16_t x, uint16_t y) -> uint32_t {
    const float p = widen(x), q = widen(y);
    return p != p ? y : q != q ? x : q > p ? y : x;
  };
  return larger(uint16_t(a), uint16_t(b)) | larger(uint16_t(a >> 16), uint16_t(b >> 16)) << 16;
}
inline uint32_t larger_bfloat16s(uint32_t a, uint32_t b) {
  return larger_pair(a, b, [](uint16_t x) { return float_of_bits(uint32_t(x) << 16); });
}
inline uint32_t larger_halves(uint32_t a, uint32_t b) { return larger_pair(a, b, float_of_half); }

// The device's instructions are approximations, with results below the smallest normal number taken as 0.
inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.0f, x) : x; }
inline float exp2(float x) {
  ++host::exponentials;
  return flushed(::exp2f(x));
}
inline double exp2(double x) { return ::exp2(x); }
// With the largest errors that the device's instructions may have, up or down by the argument's bits.
inline bool goes_up(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (bits * 2654435761u) >> 31;
}
inline float log2_approximately(float x) {
  const float error = x > 0.5f && x < 2 ? 0x1p-22f : std::fabs(::log2f(x)) * 0x1p-22f;
  return x == 1 || x == 0 || std::isinf(x) ? ::log2f(x) : ::log2f(x) + (goes_up(x) ? error : -error);
}
inline float reciprocal(float x) {
  const float y = flushed(1 / x);
  return std::isinf(y) || y == 0 ? y : std::nextafterf(y, goes_up(x) ? 1e38f : -1e38f);
}
inline double reciprocal(double x) { return 1 / x; }
inline float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
inline double fma(double a, double b, double c) { return __builtin_fma(a, b, c); }
inline float any_max(float a, float b) { return std::fmax(a, b); }
inline double any_max(double a, double b) { return std::fmax(a, b); }
inline double log_of(double x) { return std::log(x); }
inline double log1p_of(double x) { return std::log1p(x); }
inline float sqrt_of(float x) { return std::sqrt(x); }
inline double sqrt_of(double x) { return std::sqrt(x); }
inline float magnitude(float x) { return std::fabs(x); }
inline double magnitude(double x) { return std::fabs(x); }
inline float times_sign_of(float x, float s) { return std::signbit(s) ? -x : x; }
inline double times_sign_of(double x, double s) { return std::signbit(s) ? -x : x; }

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), const LaunchShape& shape, void*, const Arguments&... arguments) {
  static thread_local std::string error;
  if (shape.blocks % shape.cluster_blocks != 0 || shape.blocks < 1 || shape.threads < 1 || shape.threads > 1024) {
    return "an impossible launch";
  }
  auto call = [&] { kernel(Parameters(arguments)...); };
  host::all_arrived = false;
  ++host::launches;
  for (int64_t first = 0; first < shape.blocks; first += shape.cluster_blocks) {
    host::Cluster cluster;
    cluster.blocks.resize(size_t(shape.cluster_blocks));
    cluster.first_block = first;
    cluster.num_blocks = shape.blocks;
    cluster.threads = shape.threads;
    cluster.run = [](void* f) { (*static_cast<decltype(call)*>(f))(); };
    cluster.argument = &call;
    host::run_cluster(cluster);
    if (cluster.error.empty() && !cluster.copies.empty()) cluster.error = "copies that nobody waited for";
    if (!cluster.error.empty()) {
      error = cluster.error;
      return error.c_str();
    }
  }
  return nullptr;
}
inline const char* set_bytes_to_zero(void* p, size_t bytes, void*) {
  std::memset(p, 0, bytes);
  return nullptr;
}
template <class... Parameters>
const char* limit_to_resident(void (*)(Parameters...), LaunchShape& shape) {
  // As on a device that has room for fewer than planned.
  if (shape.blocks > 2 * shape.cluster_blocks) shape.blocks -= shape.cluster_blocks;
  return nullptr;
}

}  // namespace
}  // namespace reptile_ext
