#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "instruction_sets.h"

namespace reptile_ext {

const Kernels& kernels_portable();
#if defined(REPTILE_EXT_X86)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
#endif
const BinaryKernels& binary_kernels_portable();
#if defined(REPTILE_EXT_X86)
const BinaryKernels& binary_kernels_avx2();
const BinaryKernels& binary_kernels_avx512();
#endif
const SparseKernels& sparse_kernels_portable();
#if defined(REPTILE_EXT_X86)
const SparseKernels& sparse_kernels_avx2();
const SparseKernels& sparse_kernels_avx512();
const SparseKernels& sparse_kernels_avx512_bf16();
#endif

namespace {

// In the order of kInstructionSets.
constexpr const Kernels& (*kKernels[])() = {
    kernels_portable,
#if defined(REPTILE_EXT_X86)
    kernels_avx2,
    kernels_avx512,
    kernels_avx512_bf16,
#endif
};
constexpr const BinaryKernels& (*kBinaryKernels[])() = {
    binary_kernels_portable,
#if defined(REPTILE_EXT_X86)
    binary_kernels_avx2, binary_kernels_avx512,
    binary_kernels_avx512,  // they round to bfloat16 without the instruction
#endif
};
constexpr const SparseKernels& (*kSparseKernels[])() = {
    sparse_kernels_portable,
#if defined(REPTILE_EXT_X86)
    sparse_kernels_avx2,
    sparse_kernels_avx512,
    sparse_kernels_avx512_bf16,
#endif
};
constexpr int kNumSets = sizeof(kInstructionSets) / sizeof(kInstructionSets[0]);
static_assert(kNumSets == sizeof(kKernels) / sizeof(kKernels[0]));
static_assert(kNumSets == sizeof(kBinaryKernels) / sizeof(kBinaryKernels[0]));
static_assert(kNumSets == sizeof(kSparseKernels) / sizeof(kSparseKernels[0]));

std::atomic<int> in_use{-1};

Selection selection(int set) {
  return {kInstructionSets[set].name, &kKernels[set](), &kBinaryKernels[set](), &kSparseKernels[set]()};
}

Selection use(int set) {
  in_use.store(set, std::memory_order_relaxed);
  return selection(set);
}

}  // namespace

Selection select_instruction_set(const char* name) {
  std::string known;
  for (int i = 0; i < kNumSets; ++i) {
    if (!kInstructionSets[i].is_supported()) continue;
    if (kInstructionSets[i].name == std::string(name)) return use(i);
    known += (known.empty() ? "" : ", ") + std::string(kInstructionSets[i].name);
  }
  throw std::invalid_argument("REPTILE_EXT_CPU must be one of the instruction sets this processor can run (" + known +
                              "); got '" + name + "'");
}

Selection current_instruction_set() {
  const int set = in_use.load(std::memory_order_relaxed);
  if (set >= 0) return selection(set);
  const char* wanted = std::getenv("REPTILE_EXT_CPU");
  if (wanted && wanted[0]) return select_instruction_set(wanted);
  int newest = 0;
  for (int i = 1; i < kNumSets; ++i) {
    if (kInstructionSets[i].is_supported()) newest = i;
  }
  return use(newest);
}

}  // namespace reptile_ext
