#include "dispatch.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace reptile_ext {

const Kernels& kernels_portable();
#if defined(REPTILE_EXT_X86)
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_avx512_bf16();
#endif

namespace {

const InstructionSet kSets[] = {
    {"portable", kernels_portable, [] { return true; }},
#if defined(REPTILE_EXT_X86)
    // __builtin_cpu_supports also asks whether the operating system saves the registers.
    {"avx2", kernels_avx2,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
    {"avx512", kernels_avx512,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
     }},
    {"avx512_bf16", kernels_avx512_bf16,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
              __builtin_cpu_supports("avx512bf16");
     }},
#endif
};
constexpr int kNumSets = sizeof(kSets) / sizeof(kSets[0]);

std::atomic<const InstructionSet*> in_use{nullptr};
thread_local char message[256];

const InstructionSet* find(const char* name, const char** error) {
  char known[128] = "";
  for (const InstructionSet& set : kSets) {
    if (!set.is_supported()) continue;
    if (std::strcmp(set.name, name) == 0) return &set;
    std::strcat(known, known[0] ? ", " : "");
    std::strcat(known, set.name);
  }
  std::snprintf(message, sizeof message,
                "REPTILE_EXT_CPU must be one of the instruction sets this processor can run (%s); got '%.40s'", known,
                name);
  *error = message;
  return nullptr;
}

}  // namespace

const InstructionSet* instruction_sets(int* count) {
  *count = kNumSets;
  return kSets;
}

const InstructionSet* select_instruction_set(const char* name, const char** error) {
  const InstructionSet* set = find(name, error);
  if (set) in_use.store(set);
  return set;
}

const InstructionSet* current_instruction_set(const char** error) {
  const InstructionSet* set = in_use.load(std::memory_order_relaxed);
  if (set) return set;
  const char* wanted = std::getenv("REPTILE_EXT_CPU");
  if (wanted && wanted[0]) return select_instruction_set(wanted, error);
  int best = 0;
  for (int i = 1; i < kNumSets; ++i) {
    if (kSets[i].is_supported()) best = i;
  }
  in_use.store(&kSets[best]);
  return &kSets[best];
}

size_t scratch_bytes(const LossProblem& p) {
  // Three rows of exponentials and, to gather rows of any layout, three more; or three pairs of vectors for each class
  // of up to 4,096, for rows side by side. Padded, in the arithmetic type (loss_rows.cpp).
  constexpr size_t kWidestPair = 32, kSideBySideMaxClasses = 4096;
  const bool double_arithmetic = p.student.dtype == DType::kFloat64 || p.teacher.dtype == DType::kFloat64;
  const size_t classes = (size_t(p.vocab_size) + 63) / 64 * 64;
  const bool is_contiguous = p.student.class_stride == 1 && p.teacher.class_stride == 1;
  const size_t rows = !is_contiguous && classes <= kSideBySideMaxClasses ? 3 * kWidestPair : 6;
  return rows * classes * (double_arithmetic ? 8 : 4);
}

}  // namespace reptile_ext
