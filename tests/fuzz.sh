#!/usr/bin/env bash
# Builds the kernels with libFuzzer, AddressSanitizer and UndefinedBehaviorSanitizer, and lets tests/fuzz/fuzz_rows.cpp,
# fuzz_elements.cpp and fuzz_sparse.cpp look for inputs on which they break a promise.
#     tests/fuzz.sh [seconds]        for so long (60), from a fixed seed; the input of a finding stays in fuzz-findings/
#     tests/fuzz.sh --replay FILE    that input again
# FUZZ_CXX names another clang++; FUZZ_BUILD, a folder to build in that is kept.
set -euo pipefail

seconds=60 input=
case ${1-60} in
  --replay) input=$(realpath -e "${2?which file?}") ;;
  '' | *[!0-9]*) echo "usage: tests/fuzz.sh [seconds] | tests/fuzz.sh --replay FILE" >&2 && exit 2 ;;
  *) seconds=${1-60} ;;
esac
cd "$(dirname "$0")/.."
findings=$PWD/fuzz-findings

build=${FUZZ_BUILD:-$(mktemp -d)}
mkdir -p "$build"
[ -n "${FUZZ_BUILD:-}" ] || trap 'rm -rf "$build"' EXIT

compiler=${FUZZ_CXX:-clang++}
sanitize="-fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all"
echo 'extern "C" int LLVMFuzzerTestOneInput(const unsigned char*, unsigned long) { return 0; }' >"$build/probe.cpp"
if ! $compiler $sanitize "$build/probe.cpp" -o "$build/probe" 2>"$build/probe.log"; then
  echo "tests/fuzz.sh needs clang++ and its libFuzzer (Debian: apt install clang libclang-rt-14-dev)." \
    "$(head -n 1 "$build/probe.log")" >&2
  exit 1
fi

# The instruction sets and their flags are read from CMakeLists.txt: `flags` are those of all objects. Less optimised,
# for the sake of the build's time.
flags=$(sed -n 's/^set(REPTILE_EXT_CXX_FLAGS \(.*\))$/\1/p' CMakeLists.txt)
avx512=$(sed -n 's/^ *set(avx512 \(.*\))$/\1/p' CMakeLists.txt)
indent= x86=
[ "$(uname -m)" != x86_64 ] || indent=' *' x86=-DREPTILE_EXT_X86
sets=$(sed -n "s/^${indent}add_instruction_set(\(.*\))$/\1/p" CMakeLists.txt)
if [ -z "$flags" ] || [ -z "$sets" ]; then
  echo "tests/fuzz.sh does not find the compiler's flags in CMakeLists.txt any more" >&2
  exit 1
fi
flags="-std=c++17 $flags $x86 -Wno-unknown-warning-option -O1 -gline-tables-only -fno-omit-frame-pointer"

rm -f "$build"/*.o
# One object a line, two at a time. The fuzz target itself is not sanitized.
{
  while read -r name options; do
    echo "$name csrc/cpu/loss_rows.cpp ${options//'${avx512}'/$avx512} -fno-exceptions $sanitize" \
      "-DREPTILE_EXT_KERNELS=kernels_$name"
    echo "sparse_$name csrc/cpu/sparse.cpp ${options//'${avx512}'/$avx512} -fno-exceptions $sanitize" \
      "-DREPTILE_EXT_SPARSE_KERNELS=sparse_kernels_$name"
    [ "$name" = avx512_bf16 ] || echo "binary_$name csrc/cpu/binary.cpp ${options//'${avx512}'/$avx512}" \
      "-fno-exceptions -fno-signed-zeros $sanitize -DREPTILE_EXT_BINARY_KERNELS=binary_kernels_$name"
  done <<<"$sets"
  echo "dispatch csrc/cpu/dispatch.cpp"
  echo "fuzz_rows tests/fuzz/fuzz_rows.cpp -O2"
  echo "fuzz_elements tests/fuzz/fuzz_elements.cpp -O2"
  echo "fuzz_sparse tests/fuzz/fuzz_sparse.cpp -O2"
} | sed "s|^\([a-z0-9_]*\) |$flags -o $build/\1.o -c |" >"$build/commands"
xargs -P 2 -L 1 $compiler <"$build/commands"
$compiler $sanitize "$build"/*.o -o "$build/fuzz_rows"

export UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=quarantine_size_mb=64
if [ -n "$input" ]; then
  "$build/fuzz_rows" "$input"
  echo "tests/fuzz.sh: no finding"
  exit
fi

# Long inputs from the start, because it takes some hundred bytes to say a case; and no weighing of inputs by how rare
# their features are, which costs more than running them.
mkdir -p "$findings"
if ! "$build/fuzz_rows" -seed=1 -max_total_time="$seconds" -max_len=400 -len_control=0 -entropic=0 -timeout=60 \
  -print_final_stats=1 -artifact_prefix="$findings/" >"$build/log" 2>&1; then
  grep -v '^#\|NEW_FUNC' "$build/log" | tail -n 60
  echo "tests/fuzz.sh: a finding; tests/fuzz.sh --replay $(ls -t "$findings"/* | head -n 1) runs it again" >&2
  exit 1
fi
rmdir --ignore-fail-on-non-empty "$findings"
coverage=$(sed -n 's/^#.* cov: \([0-9]*\) ft: \([0-9]*\) .*/\1 edges, \2 features/p' "$build/log" | tail -n 1)
echo "tests/fuzz.sh: $(sed -n 's/^stat::number_of_executed_units: *//p' "$build/log") executions in $seconds s," \
  "coverage $coverage, no finding"
