#!/usr/bin/env bash
# Compiles the kernels for aarch64 (Graviton, Apple's processors) and runs them under an emulator, on inputs drawn at
# random, against the float64 formulas of tests/fuzz/exact.h: every divergence, dtype and layout that
# tests/fuzz/fuzz_rows.cpp, fuzz_elements.cpp and fuzz_sparse.cpp can make.
#     tests/aarch64.sh [number of inputs]        5000 unless said otherwise
# AARCH64_CXX and AARCH64_EMULATOR name another compiler and emulator. Without them nothing is tested, and that is said.
set -euo pipefail
cd "$(dirname "$0")/.."
number=${1-5000}
case $number in '' | *[!0-9]*) echo "usage: tests/aarch64.sh [number of inputs]" >&2 && exit 2 ;; esac

compiler=${AARCH64_CXX:-aarch64-linux-gnu-g++} emulator=${AARCH64_EMULATOR:-qemu-aarch64}
if [ "$(uname -m)" = aarch64 ]; then
  compiler=${AARCH64_CXX:-g++} emulator=${AARCH64_EMULATOR:-env}
fi
for program in $compiler $emulator; do
  if ! command -v "$program" >/dev/null; then
    echo "tests/aarch64.sh: skipped, there is no $program (Debian: apt install g++-aarch64-linux-gnu qemu-user)"
    exit 0
  fi
done

build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT
# The flags of a release, from CMakeLists.txt.
flags=$(sed -n 's/^set(REPTILE_EXT_CXX_FLAGS \(.*\))$/\1/p' CMakeLists.txt)
portable=$(sed -n 's/^add_instruction_set(portable\(.*\))$/\1/p' CMakeLists.txt)
if [ -z "$flags" ] || [ -z "$portable" ]; then
  echo "tests/aarch64.sh does not find the compiler's flags in CMakeLists.txt any more" >&2
  exit 1
fi
flags="-std=c++17 $flags"
xargs -P 2 -L 1 $compiler <<COMMANDS
$flags -O3 $portable -fno-exceptions -DREPTILE_EXT_KERNELS=kernels_portable -c csrc/cpu/loss_rows.cpp -o $build/portable.o
$flags -O2 -ftree-vectorize -fno-signed-zeros $portable -fno-exceptions -DREPTILE_EXT_BINARY_KERNELS=binary_kernels_portable -c csrc/cpu/binary.cpp -o $build/binary.o
$flags -O3 $portable -fno-exceptions -DREPTILE_EXT_SPARSE_KERNELS=sparse_kernels_portable -c csrc/cpu/sparse.cpp -o $build/sparse.o
$flags -O3 -c csrc/cpu/dispatch.cpp -o $build/dispatch.o
$flags -O2 -Wno-return-type -c tests/fuzz/fuzz_rows.cpp -o $build/fuzz_rows.o
$flags -O2 -Wno-return-type -c tests/fuzz/fuzz_elements.cpp -o $build/fuzz_elements.o
$flags -O2 -Wno-return-type -c tests/fuzz/fuzz_sparse.cpp -o $build/fuzz_sparse.o
$flags -O2 -c tests/fuzz/random_inputs.cpp -o $build/random_inputs.o
COMMANDS
$compiler -static "$build"/*.o -o "$build/aarch64"
if ! found=$($emulator "$build/aarch64" "$number"); then
  echo "tests/aarch64.sh: a finding, above" >&2
  exit 1
fi
echo "tests/aarch64.sh: $found"
