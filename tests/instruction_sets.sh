#!/usr/bin/env bash
# Runs tests as on processors that can do less than this one, torch's own products included, in the current Python
# environment (the package and its extra `test` installed).
#     tests/instruction_sets.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONSAFEPATH=1  # the installed package, not the sources in this folder

caches=$(mktemp -d)
trap 'rm -rf "$caches"' EXIT

lesser_sets() {
  python -c '
from reptile_ext import _C, ops
print(*(s for s in ("avx2", "portable") if s in _C.cpu_info()["supported"] and s != ops.instruction_set()))'
}

# Tests that ask for every instruction set, or compare them, run on each in the whole suite: their ids name it, and
# test_loss.py consists of them. What torch.compile makes of the calls takes long, and their kernels are the same.
without="portable or avx2 or avx512 or is_allocated or compiled or exports or known_mirror_gets"
for set in $(lesser_sets); do
  case $set in
    avx2) limits="ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2" ;;
    portable) limits="ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2" ;;
  esac
  echo "-- $set"
  # With a cache of its own: torch.compile caches code by the processor, not by what ATEN_CPU_CAPABILITY makes of it, and
  # code for AVX-512 that is compiled for AVX2 leaves every other vector unwritten (torch 2.13.0, without this project, too).
  env TORCHINDUCTOR_CACHE_DIR="$caches/$set" REPTILE_EXT_CPU=$set $limits python -m pytest -q -n auto -p no:cacheprovider -k "not ($without)" \
    tests/test_properties.py tests/test_promises.py tests/test_edges.py tests/test_halves.py tests/test_registry.py "$@"
done
