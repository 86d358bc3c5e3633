"""What is in the compiled files, what importing the package costs, and what it says when something does not fit."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pybind11
import pytest
import torch

import reptile_ext
from reptile_ext import _C, ops

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
TORCH_INCLUDE = Path(torch.__file__).parent / "include"
X86 = platform.machine().lower() in ("x86_64", "amd64")
SETS = ("portable", "avx2", "avx512", "avx512_bf16") if X86 else ("portable",)
# Objects of a set: its name, of the rows' kernels; of sparse teachers' rows; of single elements', which avx512_bf16
# shares with avx512.
OBJECTS = (
    *SETS,
    *(f"sparse_{name}" for name in SETS),
    *(f"binary_{name}" for name in SETS if name != "avx512_bf16"),
)


def tool(*names: str) -> str:
    """A program of the build, next to this Python or on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for name in names:
        if found := shutil.which(name, path=path):
            return found
    raise FileNotFoundError(f"none of {', '.join(names)} is installed; the build needs it")


def compiler() -> str:
    return tool(*filter(None, [os.environ.get("CXX")]), "c++", "g++", "clang++")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode != 0, "it should have failed"
    return result.stderr.strip().splitlines()[-1]


# ------------------------------------------------------------------------------------------------------- symbols


def target_of(name: str) -> str:
    return name if name.startswith(("binary_", "sparse_")) else f"kernel_{name}"


@pytest.fixture(scope="session")
def objects(build_folder: Callable[[str], AbstractContextManager[Path]]) -> dict[str, Path]:
    """The kernels' object files, built here and now by the project's own CMakeLists.txt."""
    path = os.pathsep.join([str(Path(tool("ninja")).parent), os.environ["PATH"]])
    run = {"env": {**os.environ, "PATH": path}, "check": True, "capture_output": True, "text": True}
    with build_folder("build") as build:
        subprocess.run(
            [
                *(tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DREPTILE_EXT_CUDA=off"),
                # Optimised a little: what is inlined then is inlined in a release too.
                *("-DCMAKE_BUILD_TYPE=Test", "-DCMAKE_CXX_FLAGS_TEST=-O1"),
                *("-DSKBUILD_PROJECT_VERSION=0", f"-DPython_EXECUTABLE={sys.executable}"),
                f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ],
            **run,
        )
        subprocess.run([tool("cmake"), "--build", str(build), "--target", "_ops", *map(target_of, OBJECTS)], **run)
    found = {name: list(build.glob(f"CMakeFiles/{target_of(name)}.dir/**/*.o")) for name in OBJECTS}
    found |= {name: list(build.glob(f"CMakeFiles/_ops.dir/**/{name}.cpp.o")) for name in ("ops", "dispatch")}
    assert all(len(paths) == 1 for paths in found.values()), found
    return {name: paths[0] for name, paths in found.items()}


def symbols(path: Path) -> list[tuple[str, str]]:
    """(type letter, demangled name) of every defined symbol that another object could see."""
    output = subprocess.run(
        [tool("nm"), "--defined-only", "--extern-only", "-C", str(path)], capture_output=True, text=True, check=True
    ).stdout
    return [(line.split()[1], line.split(maxsplit=2)[2]) for line in output.splitlines()]


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_of_a_set_exports_one_function(objects: dict[str, Path], name: str) -> None:
    """A second or weak symbol could be picked by the linker for a processor that cannot run it."""
    exported = symbols(objects[name])
    assert len(exported) == 1, exported
    letter, function = exported[0]
    assert letter == "T", "a strong function"
    of_set = name.removeprefix("binary_").removeprefix("sparse_")
    assert re.fullmatch(rf"reptile_ext::\w+_{of_set}\(.*\)", function), function


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_of_a_set_calls_no_template_of_the_standard_library(objects: dict[str, Path], name: str) -> None:
    """What it needs from outside is C: a shared C++ function would be one copy for all sets."""
    output = subprocess.run([tool("nm"), "--undefined-only", "-C", str(objects[name])], capture_output=True, text=True)
    needed = {line.split()[-1] for line in output.stdout.splitlines()}
    assert needed <= {"exp", "exp2", "log", "log1p", "memset", "memcpy", "memmove", "_GLOBAL_OFFSET_TABLE_"}, needed


def test_bug_19_wide_registers_are_in_their_own_objects_only(objects: dict[str, Path]) -> None:
    """AVX-512 code was compiled into the part that every processor runs, by accident or because the build host had it.
    Here: no zmm below AVX-512, no ymm in the portable and the base objects; and there are some where they belong."""
    registers = {}
    for name, path in objects.items():
        code = subprocess.run([tool("objdump"), "-d", str(path)], capture_output=True, text=True, check=True).stdout
        registers[name] = ("%ymm" in code, "%zmm" in code)
    assert (
        registers["portable"]
        == registers["binary_portable"]
        == registers["sparse_portable"]
        == registers["ops"]
        == registers["dispatch"]
        == (False, False)
    )
    if X86:
        assert registers["avx2"] == registers["binary_avx2"] == registers["sparse_avx2"] == (True, False)
        assert registers["avx512"][1]
        assert registers["avx512_bf16"][1]


def library() -> Path:
    return next(p for folder in reptile_ext.__path__ if (p := Path(folder) / "_ops.so").exists())


def test_the_library_exports_its_c_functions() -> None:
    """Everything else of it is hidden, so two extensions in a process cannot take each other's functions."""
    output = subprocess.run(
        [tool("nm"), "-D", "--defined-only", "-C", str(library())], capture_output=True, text=True, check=True
    ).stdout
    ours = {tuple(line.split()[1:]) for line in output.splitlines() if "reptile_ext" in line}
    assert ours == {("T", f"reptile_ext_{name}") for name in ("instruction_set", "kept_memory", "release_memory")}


def test_bug_18_the_library_needs_nothing_of_torch_but_its_stable_c_functions() -> None:
    """An undefined C++ symbol of c10 or at is what breaks after an upgrade of torch."""
    output = subprocess.run(
        [tool("nm"), "-D", "--undefined-only", str(library())], capture_output=True, text=True
    ).stdout
    needed = [line.split()[-1].split("@")[0] for line in output.splitlines()]
    weak = {line.split()[-1] for line in output.splitlines() if line.split()[0] == "w"}
    assert not [name for name in needed if re.search(r"3c10|2at|5torch", name)]
    of_torch = {name for name in needed if name.startswith(("aoti_torch_", "torch_"))}
    of_2_10, of_2_11 = (dict(declarations(STABLE_ABI, number)) for number in (0, 1))
    assert of_torch
    assert of_torch <= {*of_2_10, *of_2_11}
    assert of_torch & weak == {*of_2_11}, "null, and not an error, where torch is older"


# --------------------------------------------------------------------------------------------------- the stable ABI


STABLE_ABI = (CSRC / "torch" / "stable_abi.h").read_text()


def declarations(source: str, block: int = 0) -> list[tuple[str, str]]:
    """(name, declaration) of every function in an extern "C" block of our header: torch 2.10's, and later ones."""
    code = re.sub(r"//[^\n]*", "", re.findall(r'extern "C" \{(.*?)\n\}', source, re.S)[block])
    found = []
    for statement in code.split(";"):
        if match := re.match(r"\s*(?!typedef|using|struct)[\w\s*]+?\b(\w+)\(.*\)\s*$", statement, re.S):
            found.append((match[1], " ".join(statement.split()) + ";"))
    return found


def compile_against_torch(tmp_path: Path, source: str, minor: int) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "declarations.cpp"
    file.write_text(source)
    flags = ["-std=c++20", "-fsyntax-only", f"-DTORCH_TARGET_VERSION=0x02{minor:02X}000000000000", "-DUSE_CUDA"]
    flags += ["-isystem", str(TORCH_INCLUDE), "-isystem", str(TORCH_INCLUDE / "torch/csrc/api/include")]
    return subprocess.run([compiler(), *flags, str(file)], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("block", "minor", "type_of", "another"),
    [(0, 10, "uint32_t* out_num_threads", "uint64_t* out_num_threads"), (1, 11, "int64_t ndim", "int32_t ndim")],
)
def test_our_declarations_are_pytorchs(tmp_path: Path, block: int, minor: int, type_of: str, another: str) -> None:
    """Our header's C functions once more after PyTorch's own: any difference in a type is a compiler error.

    extern "C" functions may be declared twice but not differently; the second declaration alone could also be of a
    function that does not exist, hence the pointers, which name PyTorch's before ours is seen.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, minor):
        pytest.skip(f"torch {torch.__version__} does not have these")
    ours = declarations(STABLE_ABI, block)
    assert len(ours) >= (20, 1)[block], "the block of declarations was not found"
    head = "#include <cstdint>\n#include <torch/csrc/stable/c/shim.h>\n"
    known = "".join(f"constexpr auto known_{name} = &{name};\n" for name, _ in ours)
    again = 'extern "C" {\n' + "\n".join(declaration for _, declaration in ours) + "\n}\n"
    result = compile_against_torch(tmp_path, head + known + again, minor)
    assert result.returncode == 0, result.stderr

    # And the test can fail: one parameter of another type.
    wrong = again.replace(type_of, another)
    assert wrong != again
    result = compile_against_torch(tmp_path, head + known + wrong, minor)
    assert result.returncode != 0
    assert ("torch_get_num_threads", "torch_from_blob")[block] in result.stderr


def test_the_operators_compile_against_pytorchs_own_headers() -> None:
    """The same source with the faces that PyTorch brings instead of ours (CMake option REPTILE_EXT_TORCH_INCLUDE)."""
    flags = ["-std=c++20", "-fsyntax-only", "-DREPTILE_EXT_USE_TORCH_HEADERS", "-isystem", str(TORCH_INCLUDE)]
    flags += ["-DREPTILE_EXT_ON_HOST", f"-I{CSRC.parent / 'tests' / 'cuda'}"]  # no CUDA headers are needed then
    for source in ("ops.cpp", "ops_cuda.cpp"):
        command = [compiler(), *flags, str(CSRC / "torch" / source)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr


# -------------------------------------------------------------------------------------------------------- importing


def test_importing_brings_in_torch_and_numpy_only() -> None:
    """No third package, whatever is installed: it would be paid for by every user at every start."""
    listing = "; import sys; print(' '.join(sorted(n for n in sys.modules if sys.modules[n] is not None)))"
    bare = set(python("import torch, numpy" + listing).stdout.split())
    ours = set(python("import torch, numpy, reptile_ext" + listing).stdout.split())
    assert "reptile_ext" in ours
    new = {name.split(".")[0] for name in ours - bare}
    assert new - {"reptile_ext", "torch", "numpy"} <= sys.stdlib_module_names, new
    assert "reptile_ext.training" not in ours


def test_what_the_build_says_of_itself() -> None:
    assert _C.build_info()["instruction_sets"] == list(SETS)
    assert _C.build_info()["torch_abi"] == "2.10"
    supported = _C.cpu_info()["supported"]
    assert supported[0] == "portable"
    assert set(supported) <= set(SETS)
    if "REPTILE_EXT_CPU" not in os.environ:
        assert ops.instruction_set() == supported[-1], "the best set this machine has"


def test_a_torch_that_is_too_old() -> None:
    code = "import torch; torch.__version__ = '{}'; from reptile_ext import distillation_loss; print('loaded')"
    message = last_line(python(code.format("2.9.1+cpu")))
    assert message.startswith("ImportError: reptile_ext needs torch >= 2.10 and torch 2.9.1+cpu is installed")
    assert "run `pip install --upgrade torch`" in message
    for version in ("2.10.0", "3.0.0", "2.14.0.dev20270101+cpu", "2.10.0a0+git1234"):
        assert python(code.format(version)).stdout == "loaded\n", version


def sources_first(folder: Path) -> str:
    """Code that makes a copy of the Python sources, in `folder`, the package that is imported."""
    shutil.copytree(
        Path(reptile_ext.__file__).parent, folder / "reptile_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    # An editable install finds the package by an importer of its own, which comes before the path.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]; "
    return code + f"sys.path.insert(0, {str(folder)!r}); "


def test_sources_find_the_compiled_files_of_an_installed_package(tmp_path: Path) -> None:
    """`import reptile_ext` inside of a clone, after `pip install .` in it."""
    code = sources_first(tmp_path) + "import torch, reptile_ext; x = torch.randn(2, 3); "
    code += "print(reptile_ext.__file__, float(reptile_ext.distillation_loss(x, x)))"
    assert python(code, PYTHONPATH="").stdout.split() == [str(tmp_path / "reptile_ext" / "__init__.py"), "0.0"]


@pytest.mark.parametrize("state", ["missing", "broken"])
def test_a_library_that_is_missing_or_does_not_fit(tmp_path: Path, state: str) -> None:
    """One sentence that says what to do, in a copy of the sources."""
    path = sources_first(tmp_path)
    package = tmp_path / "reptile_ext"
    if state == "broken":
        (package / "_ops.so").write_bytes(b"no library")
    else:  # there is an installed one, of another version
        (package / "_version.py").write_text('__version__ = "0.0.0.dev0"\n')
    assert python(path + "import reptile_ext; print('fine')", PYTHONPATH="").stdout == "fine\n"
    message = last_line(python(path + "import reptile_ext; reptile_ext.DistillationLoss()", PYTHONPATH=""))
    assert message == last_line(python(path + "from reptile_ext import distillation_loss", PYTHONPATH=""))
    assert message.startswith("ImportError: reptile_ext's compiled operators ")
    if state == "missing":
        assert "are missing" in message
        assert "run `pip install .` in it" in message
        assert f"(version {reptile_ext.__version__}; this is 0.0.0.dev0)" in message
    else:
        assert "do not fit this machine or torch" in message
        assert "pip install --force-reinstall --no-deps ." in message


def test_an_unknown_instruction_set_in_the_environment() -> None:
    """Importing works, so that `reptile doctor` can say it too; using it fails with the list of known sets."""
    code = "import torch, reptile_ext; reptile_ext.distillation_loss(torch.zeros(2, 3), torch.zeros(2, 3))"
    message = last_line(python(code, REPTILE_EXT_CPU="nonsense"))
    known = ", ".join(_C.cpu_info()["supported"])
    assert f"REPTILE_EXT_CPU must be one of the instruction sets this processor can run ({known})" in message
    assert "got 'nonsense'" in message
    assert python("import reptile_ext; print('fine')", REPTILE_EXT_CPU="nonsense").stdout == "fine\n"
