// The kernels of one way to hold a row, for every divergence. Compiled once for each:
//
//     REPTILE_EXT_LAUNCHER    REPTILE_EXT_VALUE    REPTILE_EXT_STORAGE
//     launch_float32          float                kFloat32               rows in registers
//     launch_bfloat16         float                kBFloat16
//     launch_float16          float                kFloat16
//     launch_any_float        float                kAny                   any layout and mixture of types below float64
//     launch_any_double       double               kAny                   float64 on either side

#include "loss_rows.h"

namespace reptile_ext {

const char* REPTILE_EXT_LAUNCHER(const DeviceLoss& loss, const Plan& plan, void* stream) {
  const char* error = nullptr;
  with_divergence<REPTILE_EXT_VALUE>(loss.problem.divergence, [&](auto d) {
    error = launch(&loss_kernel<decltype(d), REPTILE_EXT_VALUE, Storage::REPTILE_EXT_STORAGE>, plan.grid_blocks,
                   plan.block_threads, plan.cluster_blocks, stream, loss, plan);
  });
  return error;
}

}  // namespace reptile_ext
