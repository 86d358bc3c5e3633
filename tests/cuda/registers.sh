#!/usr/bin/env bash
# What ptxas says of every kernel on sm_80 and sm_90: registers, and bytes of registers that spill to memory. Fails if a
# kernel of ring_rows.cu or binary.cu spills any, or another in float32 more than a few (of lists, what is done once a
# row).
#     tests/cuda/registers.sh [ARCHITECTURE ...]
#     KERNELS=ring_bfloat16 tests/cuda/registers.sh ...        of these rows alone; as CMakeLists.txt calls them
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
  one() { # architecture, name, source, definition
    nvcc $flags "$csrc/cuda/$3" -arch="$1" -DREPTILE_EXT_LAUNCHER="launch_$2" ${4:+"-D$4"} -o "$out/$1$2.o" 2>"$out/$1 $2.log" || { cat "$out/$1 $2.log"; exit 1; }
  }
  export -f one
  for architecture in ${*:-sm_80 sm_90}; do
    printf "$architecture %s\n" "ring_float32 ring_rows.cu REPTILE_EXT_DTYPE=kFloat32" \
      "ring_bfloat16 ring_rows.cu REPTILE_EXT_DTYPE=kBFloat16" "ring_float16 ring_rows.cu REPTILE_EXT_DTYPE=kFloat16" \
      "any_float loss_rows.cu REPTILE_EXT_VALUE=float" "any_double loss_rows.cu REPTILE_EXT_VALUE=double" \
      "binary binary.cu" "sparse_float sparse.cu REPTILE_EXT_VALUE=float" | grep "${KERNELS:-}"
  done | xargs -P "$(nproc)" -I{} bash -ec 'one {}'
fi
python3 - "$out" <<'P'
import pathlib, re, sys

ALLOWED = 64  # bytes a thread, of 128 registers: what lives across a logarithm in double precision
DTYPES = ["float32 ", "bfloat16", "float16 "]  # rows.h
PATTERN = r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
LISTS = r"\d(sparse_kernel)I([fd])E"
ALLOWED_LISTS = 256  # of its 80 registers a thread, in what is done once a row, in double precision
ROWS, ELEMENTS = r"loss_kernelI\w*?\d+([A-Z][A-Za-z]+)I([fd])", r"\d((?:binary|weights|scale_elements)_kernel)I([fd])E"
RING = r"ring_kernelI\w*?\d+([A-Z][A-Za-z]+)I([fd]).*DTypeE(\d)ELb([01])ELb([01])"  # bulk copies, exponentials kept
bad = count = 0
for log in sorted(pathlib.Path(sys.argv[1]).glob("*.log")):
    for name, architecture, frame, stores, loads, registers in re.findall(PATTERN, log.read_text(), re.S):
        ring, elements = re.search(RING, name), re.search(ELEMENTS, name)
        lists = re.search(LISTS, name)
        found = ring or elements or lists or re.search(ROWS, name)
        if ring and (ring[4] == "1") != (architecture != "sm_80"):
            continue  # without code
        is_double = found and found[2] == "d"  # for checks, not for speed
        count += 1
        # What lies in a stack frame without being spilled is an array that is not indexed by constants.
        allowed = 0 if elements or ring else ALLOWED_LISTS if lists else ALLOWED
        bad += not is_double and (int(stores) > allowed or int(frame if ring else 0) > 0)
        of_ring = f"{DTYPES[int(ring[3])]} {'kept' if ring[5] == '1' else 'again'}" if ring else ""
        what = f"{of_ring:15}{' in double' * bool(is_double):12}{found[1]:28}" if found else name
        print(f"{architecture} {what}{registers:>4} registers {stores:>5} bytes spilled")
print(f"{count} kernels, {bad} of float32 arithmetic spill more than they may")
sys.exit(bad > 0 or count == 0)
P
