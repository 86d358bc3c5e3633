// Memory of gradients, kept for the next ones on the CPU.
//
// To touch memory for the first time costs a process two to ten times what the loss costs, and malloc gives large
// blocks back to the system. A training loop needs the same blocks again a step later, so they are kept here instead.
//
// A block is lent to the storage of a tensor, and comes back by that storage's deleter: when nothing holds the storage
// any more, whoever that was, a tensor, a view, a node of a graph, NumPy, another library, in whichever thread. There
// is no counting of owners that could miss one. Blocks that are lent are not known here.
#pragma once

#include <pthread.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace reptile_ext {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

// Fresh memory costs more in page faults than in arithmetic; with huge pages there are 512 times fewer of them.
inline void advise_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~(kHugePage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) & ~(kHugePage - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: errors are fine
#endif
}

class KeptMemory {
 public:
  static constexpr size_t kLeastBytes = 1 << 20;  // of a block; malloc itself keeps what is smaller
  static constexpr size_t kMostBytes = 1 << 30;   // of all blocks that are kept
  static constexpr size_t kMostBlocks = 4;

  // The one there is. Never destroyed: tensors may outlive every static object.
  static KeptMemory& instance() {
    static KeptMemory& memory = *new KeptMemory;
    return memory;
  }

  // A block of at least `bytes`, and at most twice that: a small gradient that somebody keeps shall not hold a large
  // block. data == nullptr: there is not enough memory.
  Block take(size_t bytes) {
    Block replaced{nullptr, 0};
    {
      std::lock_guard<std::mutex> lock(mutex_);
      size_t best = blocks_.size(), close = blocks_.size();  // the smallest that will do; the largest that nearly would
      for (size_t i = 0; i < blocks_.size(); ++i) {
        const size_t has = blocks_[i].bytes;
        if (has >= bytes && has / 2 <= bytes && (best == blocks_.size() || has < blocks_[best].bytes)) best = i;
        if (has < bytes && has >= bytes / 2 && (close == blocks_.size() || has > blocks_[close].bytes)) close = i;
      }
      if (best != blocks_.size()) return remove(best);
      // The new one will do for whoever wanted that: batches of many sizes end with one block, of the largest.
      if (close != blocks_.size()) replaced = remove(close);
    }
    std::free(replaced.data);
    return allocate(bytes);
  }

  // Of more than may be kept, what came back first goes. For deleters: throws nothing.
  void give_back(Block block) noexcept {
    Block dropped[kMostBlocks + 1];
    size_t num_dropped = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      blocks_.push_back(block);
      kept_ += block.bytes;
      while (kept_ > kMostBytes || blocks_.size() > kMostBlocks) dropped[num_dropped++] = remove(0);
    }
    for (size_t i = 0; i < num_dropped; ++i) std::free(dropped[i].data);
  }

  void release() {
    std::lock_guard<std::mutex> lock(mutex_);
    release_locked();
  }

  size_t kept() {
    std::lock_guard<std::mutex> lock(mutex_);
    return kept_;
  }

 private:
  KeptMemory() {
    blocks_.reserve(kMostBlocks + 1);
    // At a fork nothing is kept, and no other thread is at work here: the child finds a mutex that it can take, and the
    // parent does not copy kept memory page by page when it next writes to it.
    pthread_atfork(
        [] {
          instance().mutex_.lock();
          instance().release_locked();
        },
        [] { instance().mutex_.unlock(); }, [] { instance().mutex_.unlock(); });
  }

  static Block allocate(size_t bytes) {
    constexpr size_t kPage = 4096;
    const size_t rounded = (bytes + kPage - 1) / kPage * kPage;
    void* data = std::aligned_alloc(kPage, rounded);
    if (data) advise_huge_pages(data, rounded);
    return {data, rounded};
  }

  Block remove(size_t i) {
    const Block block = blocks_[i];
    blocks_.erase(blocks_.begin() + std::ptrdiff_t(i));
    kept_ -= block.bytes;
    return block;
  }

  void release_locked() {
    for (const Block& block : blocks_) std::free(block.data);
    blocks_.clear();
    kept_ = 0;
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // in the order in which they came back
  size_t kept_ = 0;            // bytes of them
};

}  // namespace
}  // namespace reptile_ext
