#!/usr/bin/env bash
# All that wants a GPU, in parts that each end in less than eight minutes. Not yet run on a GPU.
#     benchmarks/gpu.sh FOLDER PART ...       writes FOLDER/PART.tar.gz, one file a part
#
#     build       compiles and installs, into a folder of its own (build/gpu in this tree), which the other parts use
#     values      the tests on the device: values, gradients, no waiting, graphs, streams, memory
#     sanitize    compute-sanitizer: memcheck, racecheck, synccheck, initcheck
#     dense       the dense loss against the copy bandwidth of the same run, eager, torch.compile and Liger
#     small       small vocabularies, and other divergences
#     linear      the fused linear loss against its four products, eager, torch.compile and Liger; an odd vocabulary;
#                 what benchmarks/linear.py --model expects
#     profile     ncu: bytes of memory, use of the issue slots, what warps wait for
#
# Wants Python with a torch for CUDA, nvcc, cmake, ninja, pytest and hypothesis. Nothing is fetched: what else is needed
# are wheels in the folder WHEELS (here: wheels), filled where there is a network by
#     pip download -d wheels --no-deps scikit-build-core pybind11 pathspec packaging pytest-benchmark py-cpuinfo liger-kernel==0.8.5
# DEVICE=cpu rehearses it without a GPU: small cases on the CPU, and nothing of what it measures means anything.
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2; }
out=$(mkdir -p "$1" && cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
here=$PWD site=$PWD/build/gpu device=${DEVICE:-cuda} wheels=${WHEELS:-$PWD/wheels}
export PYTHONPATH=$site PYTHONSAFEPATH=1  # the installed package, not the sources
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0

tests=(python -m pytest -q -p no:cacheprovider --rootdir "$here" -c "$here/pyproject.toml")
# Runs a command, keeps what it prints, and shows the end of it; goes on if it fails. All of a part have 470 s together.
keep() { # file, command ...
  local file=$results/$1 left=$((begin + 470 - SECONDS))
  shift
  timeout $((left > 1 ? left : 1)) "$@" >"$file" 2>&1 || { echo "exit status $?" >>"$file" && status=1; }
  tail -n 6 "$file"
}

build() {
  local architecture=90
  [ "$device" = cpu ] || architecture=$(python -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
  rm -rf "$site"
  python -m pip install --quiet --no-index --no-deps --target "$site" "$wheels"/*.whl
  CUDAARCHS=$architecture keep pip.txt python -m pip install --no-index --no-deps --no-build-isolation --target "$site" \
    --config-settings=cmake.define.REPTILE_EXT_CUDA=on .
  keep doctor.txt python -c 'import sys; from reptile_ext.cli import main; sys.exit(main(["doctor"]))'
}

values() {
  keep tests.txt "${tests[@]}" -k "not host" tests/test_cuda_kernels.py tests/test_cuda_device.py
}

sanitize() {
  # One divergence of each way through the kernels, every way to divide a row, every layout of elements. Allocations of their own, so that an access
  # beyond a tensor is one beyond an allocation.
  for tool in memcheck racecheck synccheck initcheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 keep $tool.txt timeout 110 compute-sanitizer --tool $tool --error-exitcode 9 \
      "${tests[@]}" tests/test_cuda_kernels.py \
      -k "gpu and (test_loss_and_gradient or test_elements) and bfloat16 and (forward_kl or jsd)"
  done
}

dense() {
  local cases=(--repeats 15)
  [ "$device" = cuda ] || cases=(--rows 64 --vocab 1000 --repeats 2)
  keep dense.txt python benchmarks/gpu.py --device "$device" --out "$results" --dtypes bfloat16 --divergences forward_kl "${cases[@]}"
}

small() {
  local small=(--vocab 1000 4096 8000 --repeats 15) others=(--vocab 32000 128256 --repeats 10)
  [ "$device" = cuda ] || small=(--rows 64 --vocab 100 --repeats 2) others=(--rows 64 --vocab 100 --repeats 2)
  keep small.txt python benchmarks/gpu.py --device "$device" --out "$results/small" --no-compile --divergences forward_kl "${small[@]}"
  keep others.txt python benchmarks/gpu.py --device "$device" --out "$results/others" --no-compile --dtypes bfloat16 \
    --divergences forward_kl reverse_kl jsd dkd "${others[@]}"
}

linear() {
  local rows=(8192 1024) rest=() odd=(--hidden 1600 --vocab 50257)
  [ "$device" = cuda ] || rows=(64 32) rest=(--hidden 64 --vocab 1000 --repeats 2) odd=(--rows 64 --hidden 64 --vocab 501 --repeats 2)
  keep model.txt python benchmarks/linear.py --model
  for n in "${rows[@]}"; do
    keep linear-$n.txt python benchmarks/linear.py --device "$device" --dtypes bfloat16 --rows "$n" --json "$results/linear-$n.json" "${rest[@]}"
  done
  keep linear-odd.txt python benchmarks/linear.py --device "$device" --dtypes bfloat16 --no-compile --json "$results/linear-odd.json" "${odd[@]}"
}

profile() {
  local metrics=dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum
  metrics+=,sm__inst_issued.avg.pct_of_peak_sustained_active,sm__warps_active.avg.pct_of_peak_sustained_active
  metrics+=,smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio
  metrics+=,smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio
  metrics+=,smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio
  metrics+=,smsp__sass_thread_inst_executed.sum,smsp__sass_thread_inst_executed_op_xu_pred_on.sum
  cat >"$work/one.py" <<'P'
import sys

import torch

import reptile_ext

device = sys.argv[1]
for vocab in (1000, 4096, 32000, 50257, 128256, 151936):
    rows = 8192 if device == "cuda" else 4
    s = torch.randn(rows, vocab, device=device, dtype=torch.bfloat16).requires_grad_()
    t = torch.randn_like(s)
    print(vocab, reptile_ext.distillation_loss(s, t, temperature=2.0).item())
    del s, t
P
  local profiler=(ncu --kernel-name regex:"(loss|ring)_kernel" --metrics "$metrics" --csv)
  [ "$device" = cuda ] || profiler=()
  keep profile.txt "${profiler[@]}" python "$work/one.py" "$device"
}

for part in "$@"; do
  case $part in
    build | values | sanitize | dense | small | linear | profile) ;;
    *) echo "benchmarks/gpu.sh: no part $part; there are build, values, sanitize, dense, small, linear, profile" >&2 && exit 2 ;;
  esac
done
for part in "$@"; do
  echo "== $part"
  results=$work/$part
  mkdir -p "$results"
  [ "$part" = build ] || [ -d "$site/reptile_ext" ] || { echo "the part build comes first" >&2 && exit 2; }
  begin=$SECONDS
  $part
  echo "$((SECONDS - begin)) s" | tee "$results/seconds.txt"
  tar -C "$work" -czf "$out/.$part.tar.gz" "$part" && mv "$out/.$part.tar.gz" "$out/$part.tar.gz"
done
exit $status
