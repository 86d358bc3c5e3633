// The instruction sets this build has, by name, plainest first, and which of them this processor can run.
#pragma once

#if defined(REPTILE_EXT_X86)
#include <cpuid.h>
#endif

namespace reptile_ext {

struct InstructionSet {
  const char* name;
  bool (*is_supported)();
};

#if defined(REPTILE_EXT_X86)
// __builtin_cpu_supports also asks whether the operating system saves the registers. Clang 14 does not know "f16c"
// there; its registers are those of AVX2.
inline bool supports_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
inline bool supports_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c();
}
inline bool supports_avx512() {
  return supports_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

constexpr InstructionSet kInstructionSets[] = {
    {"portable", [] { return true; }},
#if defined(REPTILE_EXT_X86)
    {"avx2", supports_avx2},
    {"avx512", supports_avx512},
    {"avx512_bf16", [] { return supports_avx512() && bool(__builtin_cpu_supports("avx512bf16")); }},
#endif
};

}  // namespace reptile_ext
