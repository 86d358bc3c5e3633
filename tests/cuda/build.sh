#!/usr/bin/env bash
# The CUDA kernels and their operators for the host of host.h:  build.sh TORCH_FOLDER OUTPUT_FOLDER
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
csrc=$here/../../csrc
torch=$1 out=$2
flags="-std=c++17 -O1 -g1 -fPIC -fvisibility=hidden -ffp-contract=off -fno-math-errno -Wall -Wextra -Wno-psabi -I$here"
flags+=" -DREPTILE_EXT_ON_HOST -mfma -mf16c"
[ "$(uname -m)" = x86_64 ] || flags=${flags/-mfma -mf16c/}
compile() { ${CXX:-g++} $flags "${@:3}" -x c++ -c "$csrc/$1" -o "$out/$2.o"; }
rows() { compile cuda/loss_rows.cu "$1" -DREPTILE_EXT_LAUNCHER="launch_$1" -DREPTILE_EXT_VALUE="$2"; }
ring() { compile cuda/ring_rows.cu "$1" -DREPTILE_EXT_LAUNCHER="launch_$1" -DREPTILE_EXT_DTYPE="$2"; }
sparse() { compile cuda/sparse.cu "$1" -DREPTILE_EXT_LAUNCHER="launch_$1" -DREPTILE_EXT_VALUE="$2"; }
export -f compile rows ring sparse
export flags csrc out
# As many at once as there are processors.
printf '%s\n' "ring ring_float32 kFloat32" "ring ring_bfloat16 kBFloat16" "ring ring_float16 kFloat16" \
  "rows any_float float" "rows any_double double" "compile cuda/launch.cu launch" "compile cuda/binary.cu binary" \
  "sparse sparse_float float" "sparse sparse_double double" "compile cuda/plan.cpp plan" \
  "compile torch/ops_cuda.cpp ops" | xargs -P "$(nproc)" -I{} bash -ec '{}'
${CXX:-g++} -shared -o "$out/on_host.so" "$out"/*.o -L"$torch/lib" -ltorch_cpu -Wl,-rpath,"$torch/lib"
