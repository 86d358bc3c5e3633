"""A new divergence is four edits and no fifth: kernel, reference, name, a row in the docs.

In a copy of the tree one is added by exactly these, the portable kernels are built alone, and the tests that go over
the registry run for it. Without any one of the four they fail.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
import pytest
from test_build import tool

import reptile_ext

ROOT = Path(__file__).resolve().parent.parent
NAME = "chi_squared"

# file: (where, what goes before it). ½ Σ (p − q)² / (p + q), half the symmetric χ² distance; w = (p − q) / (p + q).
EDITS = {
    "csrc/divergence.h": [
        (
            "// Squared Hellinger distance,",
            """// Triangular discrimination, ½ Σ (p − q) w, w = (p − q) / (p + q).
//     mixture   Σ (p − q) w, Σ q u with u = −(w + w²/2)
//     gradient  q (u − Σ q u)
template <class V>
struct ChiSquared : MixtureDefaults<V> {
  static REPTILE_EXT_FN void mix(V q, V p, V p_minus_q, V /*beta*/, V /*one_minus_beta*/, V (&sums)[2], V (&kept)[2]) {
    const V w = p_minus_q * ChiSquared::over_mixture(p, V(1), q, V(1));
    kept[1] = V(0) - fma(V(0.5f) * w, w, w);
    sums[0] = fma(p_minus_q, w, sums[0]);
    sums[1] = fma(q, kept[1], sums[1]);
  }
  template <class T>
  static REPTILE_EXT_FN T finish(Row<T>& row, T scale, T (&k)[2]) {
    Affine<V>::set(scale * row.over_z_s(), row.mixture[1], k);
    return MixtureDefaults<V>::unless_broken(row, T(0.5) * row.mixture[0]);
  }
};

""",
        ),
        ("  X(dkd, Dkd) ", "  X(chi_squared, ChiSquared) \\\n"),
    ],
    "reptile_ext/reference.py": [
        (
            "@row_divergence\ndef soft_cross_entropy(",
            '''@row_divergence
def chi_squared(rows: Rows) -> Result:
    """½ Σ (p − q)² / (p + q)"""
    m = _mixture(rows, 0.5, 0.5)
    w = m.z / 2
    return 0.5 * ((m.p - m.q) * w).sum(-1), _centred(m.q, -(w + w.square() / 2))


''',
        )
    ],
    # Without its mirror, which is itself: a trainable teacher's gradient must be right all the same.
    "reptile_ext/options.py": [('    "dkd": Divergence(', '    "chi_squared": Divergence(),\n')],
    "docs/maths.md": [
        (
            "| `soft_cross_entropy` |",
            "| `chi_squared` | ½ Σ (p − q)² / (p + q) | q (u − Σ q u), u = −(w + w²/2), w = (p − q)/(p + q) | 3 |\n",
        )
    ],
}
# What is run for it: both models' gradients, in every dtype, layout and way of calling.
TESTS = ("test_registry.py", "test_loss.py", "test_promises.py", "test_linear.py", "test_autograd.py")
# The same way for every divergence, and slow: compiled and second derivatives but one each, the largest shapes.
LEFT_OUT = "32003 or largest or truncated or exports or hessians or torch_func or finite_differences or checkpointed"


def copy_of_the_tree(folder: Path) -> Path:
    """With no compiled files, nor what builds and editors leave."""
    unwanted = shutil.ignore_patterns("*.so", "__pycache__", ".*", "build", "dist")
    for name in ("csrc", "reptile_ext", "tests", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=unwanted)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def edit(tree: Path, files: list[str]) -> None:
    for name in files:
        text = (tree / name).read_text(encoding="utf-8")
        for before, new in EDITS[name]:
            assert text.count(before) == 1, f"{name}: {before!r}"
            text = text.replace(before, new + before)
        (tree / name).write_text(text, encoding="utf-8")


def build_portable(tree: Path, site: Path) -> None:
    """The CPU operators and the pybind11 module, next to the Python files."""
    build = tree / "build"
    path = os.pathsep.join([str(Path(tool("ninja")).parent), os.environ["PATH"]])
    for command in (
        [
            *(tool("cmake"), "-S", str(tree), "-B", str(build), "-G", "Ninja", "-DREPTILE_EXT_CUDA=off"),
            *("-DREPTILE_EXT_PORTABLE=ON", "-DCMAKE_BUILD_TYPE=Release", "-DSKBUILD_PROJECT_VERSION=0"),
            "-DCMAKE_CXX_FLAGS_RELEASE=-O1",  # the tests ask for values, not for speed
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ],
        [tool("cmake"), "--build", str(build), "--target", "_ops", "_C"],
    ):
        done = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    install_python(tree, site, build)


def install_python(tree: Path, site: Path, compiled: Path) -> None:
    shutil.copytree(tree / "reptile_ext", site / "reptile_ext")
    for pattern in ("_ops.so", "_C.*.so"):
        (library,) = compiled.glob(pattern)
        shutil.copy(library, site / "reptile_ext")


def run_tests(tree: Path, site: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--show-capture=no", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("REPTILE_EXT_CPU", None)
    return subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tree with the new divergence, and the folder that it is installed in."""
    tree = copy_of_the_tree(tmp_path_factory.mktemp("tree"))
    edit(tree, list(EDITS))
    site = tmp_path_factory.mktemp("site")
    build_portable(tree, site)
    return tree, site


def test_four_edits_make_a_divergence(built: tuple[Path, Path]) -> None:
    tree, site = built
    halves = [
        run_tests(tree, site, "-k", f"{NAME} and not ({LEFT_OUT})", *(f"tests/{file}" for file in files))
        for files in (TESTS[:2], TESTS[2:])
    ]
    outputs = [process.communicate()[0] for process in halves]
    for process, output in zip(halves, outputs, strict=True):
        assert process.returncode == 0, output
        assert " passed" in output


@pytest.mark.parametrize("left_out", list(EDITS))
def test_none_of_the_four_can_be_left_out(left_out: str, built: tuple[Path, Path], tmp_path: Path) -> None:
    """The registry's own tests fail, whichever it is."""
    tree, site = copy_of_the_tree(tmp_path / "tree"), tmp_path / "site"
    edit(tree, [name for name in EDITS if name != left_out])
    installed = Path(reptile_ext.ops._library._name).parent
    install_python(tree, site, installed if left_out.startswith("csrc") else built[1] / "reptile_ext")
    process = run_tests(tree, site, "-x", "tests/test_registry.py", "-k", "docs or kernel or mirror_is")
    output = process.communicate()[0]
    assert process.returncode != 0, output
    assert NAME in output, output
