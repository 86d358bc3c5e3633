#!/usr/bin/env bash
# Builds the kernels with AddressSanitizer and UndefinedBehaviorSanitizer and runs the kernel tests on that build, in
# the current Python environment (torch, pytest, pytest-xdist and hypothesis installed).
#     tests/sanitizers.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python -m pip install --quiet --no-deps --target "$site" --config-settings=build-dir="$site/build" \
  --config-settings=cmake.define.REPTILE_EXT_SANITIZE=address,undefined \
  --config-settings=cmake.define.REPTILE_EXT_CUDA=off .

compiler=${CXX:-g++}
# Python itself is not instrumented, so the run-time comes first by LD_PRELOAD; what Python leaks is not our affair.
# libstdc++ beside it: the sanitizer wraps its exception functions and has to find them.
export LD_PRELOAD="$($compiler -print-file-name=libasan.so) $($compiler -print-file-name=libstdc++.so)"
# PYTHONSAFEPATH: the working directory, which holds the sources, must not come before $site.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$site" PYTHONSAFEPATH=1
python -c "import reptile_ext.ops as ops; assert ops._library._name.startswith('$site'), ops._library._name"
# Without the longest rows, which take their time and go through the same code as those of 5,000 classes; without the test
# that measures memory, of which the sanitizers take their own; with logits of one kind, not in float64 (the same code as
# float32, in twice the size), in one process; and of the divergences one for each
# way through the driver: forward KL, symmetric KL (three values kept), jsd (a mixture pass), mse (no exponentials), dkd
# (a class left out).
without="32003 or largest or is_allocated or no_memory or oracle or reference or agree or exactly or negative"
without+=" or float64 or environment or flat or peaked or near_equal or rising or reverse or skew or scaled_jsd or tvd or hellinger or soft_cross"
python -m pytest -q -n auto -p no:cacheprovider -k "not ($without)" \
  tests/test_loss.py tests/test_promises.py tests/test_edges.py tests/test_concurrency.py "$@"
