#!/usr/bin/env bash
# All that wants a GPU, in one command and under ten minutes: build, tests on the GPU, compute-sanitizer, benchmark.
#     benchmarks/gpu.sh OUTPUT_FOLDER
# Wants Python with a torch for CUDA, and nvcc; no network if WHEELS names a folder filled elsewhere by
#     pip download -d wheels scikit-build-core pybind11 ninja cmake pytest pytest-benchmark pytest-xdist hypothesis numpy
#     pip download -d wheels --no-deps liger-kernel
set -euo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv --system-site-packages "$work/venv"
. "$work/venv/bin/activate"
install() { pip install --quiet ${WHEELS:+--no-index --find-links "$WHEELS"} "$@"; }
install scikit-build-core pybind11 ninja cmake pytest pytest-benchmark hypothesis numpy
install --no-deps liger-kernel || echo "no Liger here"

architecture=$(python -c "import torch; print('%d%d' % torch.cuda.get_device_capability())")
echo "== build for sm_$architecture"
CUDAARCHS=$architecture pip install --quiet --no-deps --no-build-isolation \
  --config-settings=cmake.define.REPTILE_EXT_CUDA=on .
cd "$work"  # the installed package, not the sources
here=$OLDPWD
export PYTHONSAFEPATH=1
reptile doctor

echo "== tests"
status=0
python -m pytest -q -p no:cacheprovider --rootdir "$here" -c "$here/pyproject.toml" -k "not host" \
  "$here/tests/test_cuda_kernels.py" "$here/tests/test_cuda_device.py" >"$out/tests.txt" 2>&1 || status=1
tail -5 "$out/tests.txt"

if command -v compute-sanitizer >/dev/null; then
  # One divergence of each way through the kernel, every way to divide a row.
  for tool in memcheck racecheck synccheck initcheck; do
    echo "== compute-sanitizer $tool"
    # Allocations of their own, so that an access beyond a tensor is one beyond an allocation.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 compute-sanitizer --tool "$tool" --error-exitcode 9 python -m pytest -q -p no:cacheprovider \
      --rootdir "$here" -c "$here/pyproject.toml" "$here/tests/test_cuda_kernels.py" \
      -k "gpu and test_loss_and_gradient and bfloat16 and (forward_kl or jsd)" >"$out/$tool.txt" 2>&1 || status=1
    tail -3 "$out/$tool.txt"
  done
fi

echo "== benchmark"
python "$here/benchmarks/gpu.py" --out "$out" --dtypes bfloat16 --divergences forward_kl || status=1
python "$here/benchmarks/gpu.py" --out "$out/others" --no-compile --vocab 32000 128256 --repeats 10 \
  --divergences forward_kl reverse_kl jsd dkd || status=1
python "$here/benchmarks/linear.py" --device cuda --dtypes bfloat16 --json "$out/linear-8192.json" | tee "$out/linear-8192.txt" || status=1
python "$here/benchmarks/linear.py" --device cuda --dtypes bfloat16 --rows 1024 --json "$out/linear-1024.json" | tee "$out/linear-1024.txt" || status=1
exit $status
