#!/usr/bin/env bash
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the kernel tests on that build, in
# the current Python environment (torch, pytest and hypothesis installed).
#     tests/sanitizers.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python -m pip install --quiet --no-deps --target "$site" --config-settings=build-dir="$site/build" \
  --config-settings=cmake.define.REPTILE_EXT_SANITIZE=address,undefined .

compiler=${CXX:-g++}
# Python itself is not instrumented, so the run-time comes first by LD_PRELOAD; what Python leaks is not our affair.
# libstdc++ beside it: the sanitizer wraps its exception functions and has to find them.
export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)"
# PYTHONSAFEPATH: the working directory, which holds the sources, must not come before $site.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$site" PYTHONSAFEPATH=1
python -c "import reptile_ext.ops as ops; assert ops._library._name.startswith('$site'), ops._library._name"
# Without the longest rows, which take their time and go through the same code as those of 5,000 classes, and without the
# test that measures memory, of which the sanitizers take their own.
python -m pytest -p no:cacheprovider tests/test_loss.py tests/test_promises.py tests/test_edges.py tests/test_concurrency.py \
  -k "not 128256 and not 32003 and not is_allocated and not no_memory" "$@"
