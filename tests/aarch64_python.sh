#!/usr/bin/env bash
# Runs tests of the suite on aarch64 under an emulator: Debian's Python and libraries for arm64, PyTorch's wheel for
# aarch64, and the extension cross-compiled by CMakeLists.txt.
#     tests/aarch64_python.sh [pytest arguments]        some of every file of kernel tests unless said otherwise
# Needs Debian's apt-get, g++-aarch64-linux-gnu, qemu-user, CMake and Ninja, and a Python with pip and pybind11. Nothing of
# the system is changed. AARCH64_FOLDER names a folder in which what was downloaded is kept for the next run (1.2 GB).
set -euo pipefail
cd "$(dirname "$0")/.."
for program in aarch64-linux-gnu-g++ qemu-aarch64 apt-get dpkg-deb cmake ninja; do
  if ! command -v $program >/dev/null; then
    echo "tests/aarch64_python.sh: skipped, there is no $program (Debian: apt install g++-aarch64-linux-gnu qemu-user cmake ninja-build)"
    exit 0
  fi
done
folder=${AARCH64_FOLDER:-$(mktemp -d)}
[ -n "${AARCH64_FOLDER:-}" ] || trap 'rm -rf "$folder"' EXIT
mkdir -p "$folder"
folder=$(realpath "$folder") root=$folder/root site=$folder/site

# Python and what it links, of the Debian that apt is set up for.
if [ ! -x "$root/usr/bin/python3.11" ]; then
  mkdir -p "$folder"/apt/{lists,cache/archives}/partial "$folder/debs" "$root"
  touch "$folder/apt/status"
  apt="apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Sandbox::User=root -o Dir::Cache=$folder/apt/cache
    -o Dir::State::lists=$folder/apt/lists -o Dir::State::status=$folder/apt/status"
  $apt update >"$folder/apt.log" 2>&1
  (cd "$folder/debs" && $apt download libc6 libgcc-s1 libstdc++6 libgomp1 zlib1g libexpat1 libssl3 libffi8 libsqlite3-0 \
    libbz2-1.0 liblzma5 libuuid1 libncursesw6 libtinfo6 libreadline8 libcrypt1 python3.11-minimal libpython3.11-minimal \
    libpython3.11-stdlib libpython3.11-dev) >>"$folder/apt.log" 2>&1
  for package in "$folder"/debs/*.deb; do dpkg-deb -x "$package" "$root"; done
fi

# The last torch whose wheel for aarch64 does not ask for CUDA. By name, because pip takes the markers of this machine.
if [ ! -d "$site/torch" ]; then
  python3 -m pip install --quiet --target "$site" --no-deps --no-compile --only-binary=:all: --implementation cp \
    --python-version 3.11 --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 \
    --platform manylinux_2_17_aarch64 --platform manylinux2014_aarch64 torch==2.10.0 \
    numpy filelock typing-extensions sympy mpmath networkx jinja2 markupsafe fsspec \
    pytest pluggy iniconfig packaging pygments pytest-benchmark py-cpuinfo pytest-xdist execnet hypothesis sortedcontainers
fi

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' reptile_ext/_version.py)
cmake -S . -B "$folder/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DSKBUILD_PROJECT_VERSION="$version" -DREPTILE_EXT_CUDA=off \
  -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_CXX_FLAGS="-idirafter $root/usr/include" -DPYTHON_MODULE_EXTENSION=.so \
  -DPython_EXECUTABLE="$(command -v python3)" -DPython_INCLUDE_DIR="$root/usr/include/python3.11" \
  -Dpybind11_DIR="$(python3 -m pybind11 --cmakedir)" >"$folder/cmake.log" || { cat "$folder/cmake.log"; exit 1; }
cmake --build "$folder/build" --parallel 2 >>"$folder/cmake.log" || { cat "$folder/cmake.log"; exit 1; }
rm -rf "$site/reptile_ext"
cp -r reptile_ext "$site"
cmake --install "$folder/build" --prefix "$site" >>"$folder/cmake.log"

# As sys.executable, so that tests and pytest-xdist can start further processes.
cat >"$folder/python" <<PYTHON
#!/bin/sh
export PYTHONHOME="$root/usr" PYTHONPATH="$site" PYTHONSAFEPATH=1 OPENBLAS_NUM_THREADS=1
exec qemu-aarch64 -0 "$folder/python" -L "$root" "$root/usr/bin/python3.11" "\$@"
PYTHON
chmod +x "$folder/python"

# Not what asks for a compiler on aarch64, nor what takes minutes there.
without="compile or exports or exported or make_fx or largest or 32003"
if [ $# = 0 ]; then
  chosen="test_edges or test_halves or test_concurrency or test_kernel or exactly_zero or at_once or infinite or test_mass_where"
  chosen+=" or (test_soft_and_hard_loss and peaked) or test_a_16_bit"
  without="not (($chosen) and not ($without))"
  set -- tests/test_edges.py tests/test_halves.py tests/test_concurrency.py tests/test_binary.py tests/test_promises.py \
    tests/test_loss.py
fi
"$folder/python" -c 'import platform, torch; from reptile_ext import ops; print(platform.machine(), torch.__version__, ops.instruction_set())'
"$folder/python" -m pytest -q -n 2 -p no:cacheprovider -k "not ($without)" "$@"
