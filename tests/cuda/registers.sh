#!/usr/bin/env bash
# What ptxas says of every kernel on sm_80 and sm_90: registers, and bytes of registers that spill to memory. Fails if a
# kernel of loss and gradient in float32 spills more than a few, or one of binary.cu any.
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
  flags="-std=c++17 -O3 -fmad=false --expt-relaxed-constexpr -Xptxas -v -c"
  export flags csrc out
  one() { # architecture, name, value type, storage
    local source=loss_rows.cu
    [ "$2" != binary ] || source=binary.cu
    nvcc $flags "$csrc/cuda/$source" -arch="$1" -DREPTILE_EXT_LAUNCHER="launch_$2" -DREPTILE_EXT_VALUE="$3" \
      -DREPTILE_EXT_STORAGE="$4" -o "$out/$1$2.o" 2>"$out/$1 $2.log" || { cat "$out/$1 $2.log"; exit 1; }
  }
  export -f one
  for architecture in ${*:-sm_80 sm_90}; do
    printf "$architecture %s\n" "float32 float kFloat32" "bfloat16 float kBFloat16" "float16 float kFloat16" \
      "any_float float kAny" "any_double double kAny" "binary - -" | grep "${KERNELS:-}"
  done | xargs -P "$(nproc)" -I{} bash -ec 'one {}'
fi
python3 - "$out" <<'P'
import pathlib, re, sys

ALLOWED = 64  # bytes a thread, of 128 registers: what lives across a logarithm in double precision
STORAGES = ["any     ", "float32 ", "bfloat16", "float16 "]  # cuda/storage.h
PATTERN = r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
ROWS, ELEMENTS = r"loss_kernelI\w*?\d+([A-Z][A-Za-z]+)I([fd]).*StorageE(\d)", r"\d((?:binary|weights|scale_elements)_kernel)I([fd])E"
bad = count = 0
for log in sorted(pathlib.Path(sys.argv[1]).glob("*.log")):
    for name, architecture, stores, loads, registers in re.findall(PATTERN, log.read_text(), re.S):
        rows, elements = re.search(ROWS, name), re.search(ELEMENTS, name)
        found = rows or elements
        is_double = found and found[2] == "d"  # for checks, not for speed
        count += 1
        bad += not is_double and int(stores) > (0 if elements else ALLOWED)
        what = f"{STORAGES[int(rows[3])] if rows else '':8}{' in double' * bool(is_double):12}{found[1]:28}" if found else name
        print(f"{architecture} {what}{registers:>4} registers {stores:>5} bytes spilled")
print(f"{count} kernels, {bad} of float32 arithmetic spill more than they may")
sys.exit(bad > 0 or count == 0)
P
