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
uint32_t arrived;
void others_read_too_early() {  // by the first block that comes
  if (thread_rank() > 0) return;
  double* const of_blocks = reinterpret_cast<double*>(memory + uintptr_t(memory) / 4 % 2);
  store(of_blocks + cluster_rank(), 1.0);
  arrive_last(&arrived, 2);
  load_of_other_block(of_blocks + 1);
}
void arrived_is_not_cleared() {  // since the last launch
  if (thread_rank() == 0) arrive_last(&arrived, 1);
}
// Rings with one slot or two of 64 bytes of rows in device memory.
struct Ring {
  Phase full, told;
  alignas(16) float slot[2][16];
  float x[4];
};
Ring& ring_of_one_phase() {
  Ring& ring = *reinterpret_cast<Ring*>(dynamic_shared(sizeof(Ring)));
  if (thread_rank() == 0) {
    init_phase(&ring.full);
    init_phase(&ring.told);
    fence_phases();
  }
  sync_cluster();
  return ring;
}
const float* row(int n) { return reinterpret_cast<const float*>((uintptr_t(memory) + 15) / 16 * 16) + 4 * n; }
void order(Ring& ring, int slot, int n, uint32_t expected = 64) {
  if (thread_rank() != 0) return;
  expect_bytes(&ring.full, expected);
  copy_bulk(ring.slot[slot], row(n), 64, &ring.full);
}
void copy_read_before_its_phase() {
  Ring& ring = ring_of_one_phase();
  order(ring, 0, 0);
  sync_block();
  load_shared(&ring.slot[0][thread_rank() % 16]);
  wait_for(&ring.full, 0);
}
void phase_of_the_wrong_parity() {  // as if the phase before had ended
  Ring& ring = ring_of_one_phase();
  order(ring, 0, 0);
  wait_for(&ring.full, 1);
  load_shared(&ring.slot[0][thread_rank() % 16]);
}
void slot_ordered_while_it_is_read() {
  Ring& ring = ring_of_one_phase();
  order(ring, 0, 0);
  wait_for(&ring.full, 0);
  if (thread_rank() == 1) sync_warp();
  order(ring, 0, 4);  // no barrier before
  if (thread_rank() != 1 && thread_rank() < 32) sync_warp();
  load_shared(&ring.slot[0][thread_rank() % 16]);
}
void too_few_bytes_expected() {
  Ring& ring = ring_of_one_phase();
  order(ring, 0, 0, 48);
  wait_for(&ring.full, 0);
}
void too_many_bytes_expected() {
  Ring& ring = ring_of_one_phase();
  order(ring, 0, 0, 80);
  wait_for(&ring.full, 0);
}
void copy_that_nobody_waits_for() {
  Ring& ring = ring_of_one_phase();
  order(ring, 0, 0);
}
void copy_beyond_the_row() {
  Ring& ring = ring_of_one_phase();
  order(ring, 0, 15);
}
void misaligned_copy() {
  Ring& ring = ring_of_one_phase();
  if (thread_rank() == 0) copy_bulk(ring.slot[0] + 1, row(0), 48, &ring.full);
}
void phase_without_init() {
  Ring& ring = *reinterpret_cast<Ring*>(dynamic_shared(sizeof(Ring)));
  sync_cluster();
  if (thread_rank() == 0) expect_bytes(&ring.full, 64);
}
void told_and_read_at_once() {  // by st.async; its phase has not ended
  Ring& ring = ring_of_one_phase();
  if (thread_rank() == 0) {
    expect_bytes(&ring.told, 16);
    tell_128(ring.x, 1 - cluster_rank(), Bits128{{1, 2, 3, 4}}, &ring.told);
  }
  sync_cluster();
  load_shared(&ring.x[0]);
}
void own_copy_read_too_early() {  // cp.async; the group before the last one alone is waited for
  Ring& ring = ring_of_one_phase();
  if (thread_rank() >= 8) return;
  copy_128(&ring.slot[0][0] + 4 * thread_rank(), row(thread_rank()));
  end_copies();
  wait_for_copies<1>();
  load_shared(&ring.slot[0][0] + 4 * thread_rank());
}
void right_ring() {
  Ring& ring = ring_of_one_phase();
  for (int n = 0; n < 4; ++n) {
    order(ring, n % 2, n);
    wait_for(&ring.full, uint32_t(n) & 1);
    load_shared(&ring.slot[n % 2][thread_rank() % 16]);
    if (thread_rank() == 0) expect_bytes(&ring.told, 16);
    if (thread_rank() == 1) tell_128(ring.x, 1 - cluster_rank(), Bits128{{1, 2, 3, uint32_t(n)}}, &ring.told);
    wait_for(&ring.told, uint32_t(n) & 1);
    if (bits_of(load_shared(&ring.x[3])) != uint32_t(n)) host::stop("what a peer told");
    sync_cluster();
  }
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
  arrived = 0;
  host::ranges = {{uintptr_t(memory), uintptr_t(memory + kThreads)}, {uintptr_t(&arrived), uintptr_t(&arrived + 1)}};
  return launch(kernel, {2, kThreads, 2}, nullptr);
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
EXPORT(others_read_too_early)
EXPORT(arrived_is_not_cleared)
EXPORT(peer_too_early)
EXPORT(no_such_peer)
EXPORT(copy_read_before_its_phase)
EXPORT(phase_of_the_wrong_parity)
EXPORT(slot_ordered_while_it_is_read)
EXPORT(too_few_bytes_expected)
EXPORT(too_many_bytes_expected)
EXPORT(copy_that_nobody_waits_for)
EXPORT(copy_beyond_the_row)
EXPORT(misaligned_copy)
EXPORT(phase_without_init)
EXPORT(told_and_read_at_once)
EXPORT(own_copy_read_too_early)
EXPORT(right_ring)
EXPORT(quotients)
EXPORT(right)
