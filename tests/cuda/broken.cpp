// Kernels with one mistake each, to see that the host of host.h notices.

#include "../../csrc/cuda/device.h"

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
EXPORT(shuffle_of_some)
EXPORT(peer_too_early)
EXPORT(no_such_peer)
EXPORT(right)
