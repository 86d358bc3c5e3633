// The kernels of one way to hold a row, for every divergence. Compiled once for each:
//
//     REPTILE_EXT_LAUNCHER     REPTILE_EXT_VALUE     REPTILE_EXT_WORDS
//     launch_registers_16      float                 1                    rows in registers, bfloat16 or float16
//     launch_registers_32      float                 2                    rows in registers, float32
//     launch_memory_float      float                 0                    any layout and mixture of types below float64
//     launch_memory_double     double                0                    float64 on either side

#include "loss_rows.h"

namespace reptile_ext {

const char* REPTILE_EXT_LAUNCHER(const DeviceLoss& loss, const Plan& plan, void* stream) {
  const char* error = nullptr;
  with_divergence<REPTILE_EXT_VALUE>(loss.problem.divergence, [&](auto d) {
    error = launch(&loss_kernel<decltype(d), REPTILE_EXT_VALUE, REPTILE_EXT_WORDS>, plan.grid_blocks,
                   plan.block_threads, plan.cluster_blocks, stream, loss, plan);
  });
  return error;
}

}  // namespace reptile_ext
