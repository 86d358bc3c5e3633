"""tests/cuda/budget.py, which counts a kernel's instructions, by a kernel of which they are known."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PATH = Path(__file__).parent / "cuda" / "budget.py"
spec = importlib.util.spec_from_file_location("budget", PATH)
assert spec is not None
assert spec.loader is not None
budget = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = budget
spec.loader.exec_module(budget)

# A loop over rows in the form of csrc/cuda/ring_rows.cu. Each functor has eight exponentials at a place of its own.
SOURCE = r"""
#include <cstdint>
namespace reptile_ext {
enum class DType { kFloat32, kBFloat16, kFloat16 };
template <int K> __device__ void mark() { asm volatile("pmevent.mask %0;" ::"n"(K < 8 ? 1 << K : 0x8000 + K - 8)); }
__device__ float ex2(float x) { asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(x)); return x; }
__device__ void wait_for(uint64_t* phase, uint32_t parity) {
  uint32_t is_done = 0;
  while (!is_done) {
    asm volatile("{.reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;}"
                 : "=r"(is_done) : "r"(uint32_t(__cvta_generic_to_shared(phase))), "r"(parity) : "memory");
  }
}
enum Place { kCommon, kRare, kUnmarked, kOneWarp, kSeldom, kCluster, kWarps, kPiece, kLoop, kCall,
             kUnconditional, kBare, kElse, kDivide };
#define FUNCTOR(name) template <class T> struct name { static constexpr Place kPlace = k##name; };
FUNCTOR(Common) FUNCTOR(Rare) FUNCTOR(Unmarked) FUNCTOR(OneWarp) FUNCTOR(Seldom) FUNCTOR(Cluster) FUNCTOR(Warps)
FUNCTOR(Piece) FUNCTOR(Loop) FUNCTOR(Call) FUNCTOR(Unconditional) FUNCTOR(Bare) FUNCTOR(Else) FUNCTOR(Divide)

__device__ __noinline__ float called(float x) {
  for (int i = 0; i < 8; ++i) x = ex2(x);
  return x;
}

template <class D, DType kDType, bool kBulk, bool kKeeps>
__global__ void ring_kernel(float* p, int num_rows, int pieces, int blocks, uint32_t parity) {
  __shared__ uint64_t phase;
  __shared__ float4 ring[8][64];
  const int rank = threadIdx.x, warp_begin = rank / 32 * 32, threads = blockDim.x;
  int done = 0;
  for (int n = blockIdx.x; n < num_rows; n += gridDim.x) {
    float x = p[n];
    const auto at = [&](Place place) {
      if (place != D::kPlace) return;
      for (int i = 0; i < 8; ++i) x = ex2(x);
    };
    if (x == 5) {
      mark<0>();
      p[n] = 0;
      at(kRare);
      for (int i = 0; i < pieces; ++i) p[i] = ex2(x);
      continue;
    }
    wait_for(&phase, parity ^= 1);
    at(kCommon);
    if (D::kPlace == kUnconditional) mark<6>();
    if (D::kPlace == kDivide) x = x / float(num_rows);
    if (D::kPlace == kUnmarked && x > 6) at(kUnmarked);
    float kept[3] = {0, 0, 0};
    for (int k = 0; k < 3; ++k) {
      if (warp_begin + k * threads >= pieces) continue;
      if (D::kPlace != kBare && k == 0) mark<8>();
      if (D::kPlace != kBare && k == 1) mark<9>();
      if (D::kPlace != kBare && k == 2) mark<10>();
      kept[k] = ex2(ring[k][rank].x);
      if (k == 1) at(kPiece);
      at(kBare);
    }
    #pragma unroll 1
    for (int k = 3; warp_begin + k * threads < pieces; ++k) {
      mark<5>();
      x += ring[k][rank].x;
      at(kLoop);
    }
    x += kept[0] + kept[1] + kept[2];
    if (blocks > 1) {
      mark<3>();
      x += ring[2][rank].y;
      at(kCluster);
    }
    if (threads > 32) {
      mark<4>();
      __syncthreads();
      at(kWarps);
    } else {
      at(kElse);
    }
    if (warp_begin == 0) {
      mark<1>();
      p[n + 1] = x;
      at(kOneWarp);
      if (++done == 32) {
        mark<2>();
        p[n + 2] = x;
        at(kSeldom);
        if (D::kPlace == kCall) x = called(x);
        done = 0;
      }
    }
    p[n * 1024 + rank] = x + __shfl_xor_sync(~0u, x, 1);
  }
}
#define KERNEL(D) \
  template __global__ void ring_kernel<D<float>, DType::kBFloat16, true, true>(float*, int, int, int, uint32_t);
KERNEL(Common) KERNEL(Rare) KERNEL(Unmarked) KERNEL(OneWarp) KERNEL(Seldom) KERNEL(Cluster) KERNEL(Warps) KERNEL(Piece)
KERNEL(Loop) KERNEL(Call) KERNEL(Unconditional) KERNEL(Bare) KERNEL(Else) KERNEL(Divide)
}
"""
V = 64  # so that a count for a pair is a count for a warp


def plan(pieces: int, blocks: int = 1, threads: int = V) -> budget.Plan:
    return budget.Plan(threads, blocks, threads, 132, pieces * blocks, pieces)


@pytest.fixture(scope="module")
def cubin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if not compiler:
        pytest.skip("needs nvcc")
    try:
        budget.disassembler()
    except SystemExit as missing:
        pytest.skip(str(missing))
    folder = tmp_path_factory.mktemp("budget")
    (folder / "ring.cu").write_text(SOURCE)
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "-cubin"]
    subprocess.run([compiler, *flags, "-o", folder / "ring.cubin", folder / "ring.cu"], check=True)
    return folder / "ring.cubin"


@pytest.fixture(scope="module")
def kernels(cubin: Path) -> dict[str, budget.Kernel]:
    return {
        budget.functor_dtype_keeps(name)[0]: budget.Kernel(name, code) for name, code in budget.code_of(cubin, "ring")
    }


# Two warps; of the second piece's threads, one warp has it.
FULL, HALF = plan(128), plan(96)


def exponentials(kernels: dict[str, budget.Kernel], place: str, of: budget.Plan) -> float:
    return kernels[place].count(of, V, 2)["exponentials"]


@pytest.mark.parametrize(
    ("place", "of", "times"),
    [
        ("Common", FULL, 1),
        ("Rare", FULL, 0),
        ("Unmarked", FULL, 1),
        ("OneWarp", FULL, 1 / 2),
        ("Seldom", FULL, 1 / 64),
        ("Call", FULL, 1 / 64),
        ("Cluster", FULL, 0),
        ("Cluster", plan(128, blocks=2), 2),
        ("Warps", FULL, 1),
        ("Warps", plan(64, threads=32), 0),
        ("Else", FULL, 0),
        ("Else", plan(64, threads=32), 1),
        ("Piece", FULL, 1),
        ("Piece", HALF, 1 / 2),
        ("Piece", plan(64), 0),
        ("Loop", FULL, 0),
        ("Loop", plan(64 * 5 + 32), 2.5),
        ("Bare", FULL, 2),
        ("Bare", HALF, 1.5),
        ("Bare", plan(64 * 3), 3),
    ],
)
def test_exponentials_count_as_often_as_they_run(
    kernels: dict[str, budget.Kernel], place: str, of: budget.Plan, times: float
) -> None:
    """Eight more at one place, beside one for each piece."""
    of_pieces = min(of.share / of.threads, 3) * of.blocks
    expected = (of_pieces + 8 * times) * of.threads / V
    assert exponentials(kernels, place, of) == pytest.approx(expected, abs=1e-3)


def test_what_is_rare_counts_nothing_and_elsewhere_all_of_it(kernels: dict[str, budget.Kernel]) -> None:
    """Of every kind, not of exponentials alone: the same kernel with eight instructions at another place."""
    common, rare = (kernels[place].count(FULL, V, 2) for place in ("Common", "Rare"))
    assert common["instructions"] == pytest.approx(rare["instructions"] + 8, abs=2)
    for kind in ("global", "shared", "shuffles", "barriers_per_row"):
        assert common[kind] == rare[kind]


def test_the_other_kinds(kernels: dict[str, budget.Kernel]) -> None:
    count = kernels["Common"].count(HALF, V, 2)
    assert count["global"] == pytest.approx(2 + 1 / 2 + 1 / 64, abs=1e-3)
    assert count["shared"] == 1.5
    assert count["shuffles"] == 1
    assert count["barriers_per_row"] == 2  # a barrier and a wait, whose second try does not count
    assert kernels["Common"].count(plan(64, threads=32), V, 2)["barriers_per_row"] == 1


def test_a_division_counts_without_its_slow_path(cubin: Path, kernels: dict[str, budget.Kernel]) -> None:
    (_, code) = next(budget.code_of(cubin, "Divide"))
    assert any(i.base == "CALL" for i in code)
    with_division, without = (kernels[place].count(FULL, V, 2)["instructions"] for place in ("Divide", "Rare"))
    assert without + 8 < with_division < without + 20


def test_the_last_block_of_a_cluster_has_fewer_pieces(kernels: dict[str, budget.Kernel]) -> None:
    of = budget.Plan(V, 2, V, 132, 128 + 32, 128)
    assert exponentials(kernels, "Common", of) == pytest.approx(2 + 8 + 1 / 2 + 8)


def test_the_ceiling() -> None:
    """The allowance that docs/cuda.md counts with."""
    assert budget.allowed("H200", 2) == pytest.approx(46.7, abs=0.05)
    assert budget.allowed("H100", 2) == pytest.approx(66.9, abs=0.05)
    assert budget.allowed("H200", 4) == pytest.approx(2 * budget.allowed("H200", 2))


def with_mark(code: list[budget.Instruction], mark: int, other: int | None) -> list[budget.Instruction]:
    """The code with another mark, or NOP, in place of a mark."""
    found = [i.base == "PMTRIG" and int(i.operands, 16) == 1 << mark for i in code]
    assert any(found)
    change = {"operation": "NOP"} if other is None else {"operands": hex(1 << other)}
    return [dataclasses.replace(i, **change) if f else i for i, f in zip(code, found, strict=True)]


def test_a_loop_that_nobody_marked_is_an_error(cubin: Path) -> None:
    (name, code) = next(budget.code_of(cubin, "Common"))
    with pytest.raises(SystemExit, match="has no mark"):
        budget.Kernel(name, with_mark(code, budget.LOOP, None))


def test_a_mark_of_what_is_not_rare_is_an_error(cubin: Path) -> None:
    (name, code) = next(budget.code_of(cubin, "Unconditional"))
    budget.Kernel(name, code)  # every warp passes it, and no harm is done
    with pytest.raises(SystemExit, match="no row gets past"):
        budget.Kernel(name, with_mark(code, 6, budget.RARE))


def test_a_mark_under_a_predicate_takes_nothing_off(cubin: Path) -> None:
    """What it marked is issued by all warps."""
    (name, code) = next(budget.code_of(cubin, "Unconditional"))
    code = [dataclasses.replace(i, predicate="@P0") if i.base == "PMTRIG" and i.operands == "0x40" else i for i in code]
    before, after = (budget.Kernel(name, with_mark(code, 6, mark)).count(FULL, V, 2) for mark in (6, budget.RARE))
    assert before == after


def entry(instructions: float, exponentials: float = 2.0) -> budget.Entry:
    counts = dict.fromkeys(budget.KINDS, 1.0) | {"instructions": instructions, "exponentials": exponentials}
    return {**counts, "ceiling": dict.fromkeys(budget.DEVICES, 0.9)}


def table(instructions: float, exponentials: float = 2.0) -> budget.Table:
    by_vocabulary = {str(V): entry(instructions, exponentials) for V in budget.VOCABULARIES}
    return {divergence: {"bfloat16": dict(by_vocabulary)} for divergence in budget.LIMITS}


def test_the_check() -> None:
    assert not budget.excesses(table(32))
    found = budget.excesses(table(33))
    assert len(found) == 2 * 4
    assert found[0] == "forward_kl bfloat16 V = 32000: 33.0 instructions a pair, allowed 32"
    assert len(budget.excesses(table(61))) == 2 * 8 + 7  # jsd at 256,000 may take more
    assert len(budget.excesses(table(88))) == 3 * 8
    apart = table(32)
    apart["forward_kl"]["bfloat16"]["4096"]["exponentials_by_plan"] = 1.9
    assert budget.excesses(apart) == ["forward_kl bfloat16 V = 4096: 2.00 exponentials a pair, by the plan 1.90"]
    assert len(budget.excesses(table(32, exponentials=2.2))) == 3 * 7
    missing = table(32)
    missing["jsd"]["bfloat16"]["4096"] = None
    assert budget.excesses(missing) == ["jsd bfloat16 V = 4096: the ring kernel is not taken, or not there"]


def test_the_table_goes_between_the_marks() -> None:
    text = "before\n<!-- budget -->\nold\n<!-- /budget -->\nafter\n"
    new = budget.into_docs(text, table(30))
    assert new.startswith("before\n<!-- budget -->")
    assert new.endswith("<!-- /budget -->\nafter\n")
    assert "old" not in new
    assert "| 128,256 | 30.00 |" in new
    assert budget.into_docs(new, table(30)) == new
    with pytest.raises(SystemExit, match="once each"):
        budget.into_docs("nothing", table(30))


def test_the_command(
    cubin: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it, but for the plan and what divergence a functor is."""
    monkeypatch.setattr(budget, "planner", lambda: lambda dtype, number, V: FULL if V == 4096 else None)
    monkeypatch.setattr(budget, "divergences", lambda: defaultdict(lambda: ("?", 0), Common=("forward_kl", 0)))
    page, out = tmp_path / "page.md", tmp_path / "out.json"
    page.write_text("<!-- budget -->\n<!-- /budget -->\n")
    assert budget.main(["--library", str(cubin), "--json", str(out), "--docs", str(page)]) == 0
    counts = json.loads(out.read_text())["forward_kl"]["bfloat16"]
    assert counts["4096"]["exponentials"] == pytest.approx((2 + 8) * 64 / 4096, abs=1e-3)
    assert counts["4096"]["ceiling"].keys() == {"H100", "H200", "B200"}
    assert counts["1000"] is None
    assert "| 4,096 |" in page.read_text()
    assert budget.main(["--library", str(cubin), "--check"]) == 1
    assert "forward_kl bfloat16 V = 1000: the ring kernel is not taken, or not there" in capsys.readouterr().err


def test_a_library_without_ring_kernels_is_an_error(cubin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "functor_dtype_keeps", lambda name: None)
    with pytest.raises(SystemExit, match="no ring kernel"):
        budget.table_of(cubin, lambda dtype, number, V: FULL)


def test_where_there_is_no_disassembler_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *arguments, **keywords: None)
    with pytest.raises(SystemExit, match="pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"):
        budget.disassembler()
