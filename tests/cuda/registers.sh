#!/usr/bin/env bash
# What ptxas says of every kernel on sm_80 and sm_90: registers, and bytes of registers that spill to memory. Fails if a
# kernel of loss and gradient in float32 spills more than a few.
#     tests/cuda/registers.sh [ARCHITECTURE ...]
#     KERNELS=bfloat16 tests/cuda/registers.sh ...        of these rows alone; as CMakeLists.txt calls them
#     tests/cuda/registers.sh --log FILE      of a build elsewhere, which had NVCC_APPEND_FLAGS="-Xptxas -v"
set -euo pipefail
csrc=$(cd "$(dirname "$0")/../../csrc" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
if [ "${1:-}" = --log ]; then
  cp "${2?which file?}" "$out/build.log"
else
  flags="-std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -Xptxas -v -c $csrc/cuda/loss_rows.cu"
  export flags out
  one() { # architecture, name, value type, storage
    nvcc $flags -arch="$1" -DREPTILE_EXT_LAUNCHER="launch_$2" -DREPTILE_EXT_VALUE="$3" -DREPTILE_EXT_STORAGE="$4" \
      -o "$out/$1$2.o" 2>"$out/$1 $2.log" || { cat "$out/$1 $2.log"; exit 1; }
  }
  export -f one
  for architecture in ${*:-sm_80 sm_90}; do
    printf "$architecture %s\n" "float32 float kFloat32" "bfloat16 float kBFloat16" "float16 float kFloat16" \
      "any_float float kAny" "any_double double kAny" | grep "${KERNELS:-}"
  done | xargs -P "$(nproc)" -I{} bash -ec 'one {}'
fi
python3 - "$out" <<'P'
import pathlib, re, sys

ALLOWED = 64  # bytes a thread, of 128 registers: what lives across a logarithm in double precision
STORAGES = ["any     ", "float32 ", "bfloat16", "float16 "]  # cuda/storage.h
pattern = r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
bad = count = 0
for log in sorted(pathlib.Path(sys.argv[1]).glob("*.log")):
    for name, architecture, stores, loads, registers in re.findall(pattern, log.read_text(), re.S):
        kernel = re.search(r"loss_kernelI\w*?\d+([A-Z][A-Za-z]+)I([fd]).*StorageE(\d)", name)
        is_double = kernel and kernel[2] == "d"
        count += 1
        bad += int(stores) > ALLOWED and not is_double  # float64 is for checks, not for speed
        what = f"{STORAGES[int(kernel[3])]}{' in double' * is_double:12}{kernel[1]:28}" if kernel else name
        print(f"{architecture} {what}{registers:>4} registers {stores:>5} bytes spilled")
print(f"{count} kernels, {bad} of float32 arithmetic spill more than {ALLOWED} bytes")
sys.exit(bad > 0 or count == 0)
P
