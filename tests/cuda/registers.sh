#!/usr/bin/env bash
# What ptxas says of every kernel on sm_80 and sm_90: registers, and bytes of registers that spill to memory. Fails if a
# kernel of loss and gradient in float32 spills more than a few, or one of binary.cu any.
#     tests/cuda/registers.sh [ARCHITECTURE ...]
set -euo pipefail
csrc=$(cd "$(dirname "$0")/../../csrc" && pwd)
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -Xptxas -v -c"
export flags csrc out
one() { # architecture, name, value type, storage
  local source=loss_rows.cu
  [ "$2" = binary ] && source=binary.cu
  nvcc $flags "$csrc/cuda/$source" -arch="$1" -DREPTILE_EXT_LAUNCHER="launch_$2" -DREPTILE_EXT_VALUE="$3" -DREPTILE_EXT_STORAGE="$4" \
    -o "$out/$1$2.o" 2>"$out/$1 $2.log" || { cat "$out/$1 $2.log"; exit 1; }
}
export -f one
for architecture in ${*:-sm_80 sm_90}; do
  printf "$architecture %s\n" "float32 float kFloat32" "bfloat16 float kBFloat16" "float16 float kFloat16" \
    "any_float float kAny" "any_double double kAny" "binary - -"
done | xargs -P "$(nproc)" -I{} bash -ec 'one {}'
python3 - "$out" <<'P'
import pathlib, re, sys

ALLOWED = 64  # bytes a thread, of 128 registers: what lives across a logarithm in double precision
pattern = r"Compiling entry function '(\S+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
bad = count = 0
for log in sorted(pathlib.Path(sys.argv[1]).glob("*.log")):
    for name, stores, loads, registers in re.findall(pattern, log.read_text(), re.S):
        kernel = re.search(r"loss_kernelI\w*?\d+([A-Z][A-Za-z]+)I[fd]|\d\d((?:binary|weights|scale_elements)_kernelI[fd])E", name)
        kernel = kernel and (kernel[1] or kernel[2])
        is_double = "double" in log.stem or "kernelId" in name  # for checks, not for speed
        count += 1
        bad += not is_double and int(stores) > (0 if "binary" in log.stem else ALLOWED)
        print(f"{log.stem:24}{kernel or name:28}{registers:>4} registers {stores:>5} bytes spilled")
print(f"{count} kernels, {bad} of float32 arithmetic spill more than they may")
sys.exit(bad > 0 or count == 0)
P
