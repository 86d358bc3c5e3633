// Kernels with one mistake each, to see that the host of host.h notices.

#include "../../csrc/cuda/team.h"

namespace reptile_ext {
namespace {

constexpr int kThreads = 64;
float memory[kThreads + 4];

struct Shared {
  float x[kThreads];
};

void beyond_device_memory() { store(memory + thread_rank() + 1, 1.0f); }
void misaligned() { load_128(memory + 1); }
void beyond_shared_memory() { store_shared(&shared_memory<Shared>().x[thread_rank() + 1], 1.0f); }
void unwritten_shared_memory() {
  Shared& shared = shared_memory<Shared>();
  store_shared(&shared.x[thread_rank()], 1.0f);
  load_shared(&shared.x[(thread_rank() + 1) % kThreads]);  // a barrier too early
}
void barrier_of_some() {
  if (thread_rank() > 0) sync_block();
}
void shuffle_of_some() {
  if (thread_rank() % 2) shuffle_xor(1.0f, 1);
}
void sum_of_some() {  // those without elements have gone
  Team<double> block = whole_block(shared_memory<Exchange<double>>());
  if (thread_rank() < kThreads - 24) sum_of(block, 1.0);
}
void span_beyond_the_end() {  // as if what is left were whole
  const uintptr_t first = (uintptr_t(memory) + 15) / 16 * 16;
  load_128(reinterpret_cast<const void*>(first + uintptr_t(16 * thread_rank())));
}
void peer_too_early() { of_peer(&shared_memory<Shared>().x[0], 1); }
void no_such_peer() { of_peer(&shared_memory<Shared>().x[0], 2); }
void right() {
  Shared& shared = shared_memory<Shared>();
  sync_cluster();
  for (int rank = 0; rank < 2; ++rank) store_shared(of_peer(&shared.x[cluster_rank()], rank), 1.0f);
  sync_cluster();
  const float sum = load_shared(&shared.x[0]) + load_shared(&shared.x[1]);
  if (shuffle_xor(float(thread_rank()), 1) != float(thread_rank() ^ 1) || sum != 2) return sync_block();
  store(memory + thread_rank(), sum);
  sync_cluster();
}

// No mistake: exact where a kernel hangs on it, whatever the reciprocal is.
void quotients() {
  uint64_t random = uint64_t(thread_rank()) + 1;
  const auto next = [&] { return random = random * 6364136223846793005u + 1442695040888963407u; };
  for (int i = 0; i < 2000; ++i) {
    const int64_t n = int64_t(next() >> (1 + i % 50)), size = 1 + int64_t(next() >> (2 + i / 50 % 60));
    if (quotient(n, size) != n / size) host::stop("quotient of integers");
    const float z = 1 + float(next() >> 40) * 0x1p-24f, e = float(next() >> 40) * 0x1p-24f;
    if (quotient(z, z) != 1 || quotient(e, z) != e / z) host::stop("quotient of floats");
  }
  const float infinity = -negative_infinity<float>();
  if (quotient(infinity, 2.0f) != infinity || quotient(0.0f, 1.5f) != 0) host::stop("quotient of infinity");
}

const char* run(void (*kernel)()) {
  host::ranges = {{uintptr_t(memory), uintptr_t(memory + kThreads)}};
  return launch(kernel, 2, kThreads, 2, nullptr);
}

}  // namespace
}  // namespace reptile_ext

#define EXPORT(name) \
  extern "C" const char* name() { return reptile_ext::run(reptile_ext::name); }
EXPORT(beyond_device_memory)
EXPORT(misaligned)
EXPORT(beyond_shared_memory)
EXPORT(unwritten_shared_memory)
EXPORT(barrier_of_some)
EXPORT(sum_of_some)
EXPORT(span_beyond_the_end)
EXPORT(shuffle_of_some)
EXPORT(peer_too_early)
EXPORT(no_such_peer)
EXPORT(quotients)
EXPORT(right)
