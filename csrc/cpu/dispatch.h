// Which instruction set's kernels run.
#pragma once

#include "../rows.h"

namespace reptile_ext {

struct Selection {
  const char* name;
  const Kernels* kernels;
  const BinaryKernels* binary_kernels;
  const SparseKernels* sparse_kernels;
};

// The set in use: the one named by REPTILE_EXT_CPU, else the newest that this processor can run. If the variable names
// one that is unknown or cannot run here, throws std::invalid_argument with a sentence that says so.
Selection current_instruction_set();

// Use the set of that name from now on; throws the same.
Selection select_instruction_set(const char* name);

}  // namespace reptile_ext
