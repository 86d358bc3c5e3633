// Which instruction sets this build has, which of them this processor can run, and which one is in use.
#pragma once

#include "../rows.h"

namespace reptile_ext {

struct InstructionSet {
  const char* name;
  const Kernels& (*kernels)();
  bool (*is_supported)();
};

// The sets that were compiled in, plainest first.
const InstructionSet* instruction_sets(int* count);

// The set in use: the one named by REPTILE_EXT_CPU, else the newest that this processor can run. Returns nullptr and
// sets *error (a sentence, valid until the next call) if the variable names one that is unknown or cannot run here.
const InstructionSet* current_instruction_set(const char** error);

// Use the set of that name from now on; same errors as above.
const InstructionSet* select_instruction_set(const char* name, const char** error);

// Bytes of scratch a thread needs for this problem.
size_t scratch_bytes(const LossProblem& problem);

}  // namespace reptile_ext
