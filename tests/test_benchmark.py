"""The benchmark runs and says what it should; how fast anything is, no test asks."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reptile_ext import benchmark


def test_run_writes_tables_figures_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "new" / "figures.json", tmp_path / "chart.png"
    threads = torch.get_num_threads()
    pairs = benchmark.LARGE_PAIRS + 32_000  # enough for the limit and the peak of memory
    code = benchmark.run(vocab=(100, 32_000), pairs=pairs, repeats=2, threads=1, out=out, plot=plot, compile=False)
    assert code == 0
    assert torch.get_num_threads() == threads

    document = json.loads(out.read_text())
    about = document["environment"]
    assert about["threads"] == 1
    assert about["torch"] == torch.__version__
    assert all(about[key] for key in ("date", "cpu", "instruction_set", "allocator"))
    found: dict[tuple[str, int], dict[str, Any]] = {(r["dtype"], r["vocab"]): {} for r in document["results"]}
    for r in document["results"]:
        found[r["dtype"], r["vocab"]][r["contender"]] = r
    assert set(found) == {(dtype, vocab) for dtype in ("float32", "bfloat16") for vocab in (100, 32_000)}
    for (dtype, vocab), of_case in found.items():
        eager = {"eager"} if dtype == "float32" else {"eager", "eager fp32"}
        assert set(of_case) == {"ours in place", "ours", "limit"} | eager
        exact = of_case["eager fp32" if dtype == "bfloat16" else "eager"]["loss"]
        for name, r in of_case.items():
            assert set(r["times_as_fast_as"]) == eager
            median = r["ms"]["median"]
            assert 0 < r["ms"]["q1"] <= median <= r["ms"]["q3"]
            assert r["ns_per_pair"] == pytest.approx(median * 1e6 / (r["rows"] * vocab))
            assert r["times_as_fast_as"]["eager"] == pytest.approx(of_case["eager"]["ms"]["median"] / median)
            assert r["share_of_limit"] == pytest.approx(of_case["limit"]["ms"]["median"] / median)
            if name != "limit":
                assert r["loss"] == pytest.approx(exact, rel=2e-2 if name == "eager" else 1e-5)
        if of_case["ours"]["extra_bytes"] is not None:
            logits = of_case["ours"]["rows"] * vocab * benchmark.DTYPES[dtype].itemsize
            assert of_case["ours in place"]["extra_bytes"] < 0.1 * logits
            assert 0.9 * logits < of_case["ours"]["extra_bytes"] < 1.5 * logits
            assert of_case["eager"]["extra_bytes"] > 2 * logits

    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["chart.png", "figures.json"]
    printed = capsys.readouterr().out
    for r in document["results"]:
        assert f"[{r['rows']}, {r['vocab']}]" in printed
        assert f"{r['times_as_fast_as']['eager']:.2f}x" in printed
    assert printed.count(benchmark.HEADER) == 2


@pytest.mark.parametrize("name", benchmark.SHAPES)
def test_cases_are_of_the_named_set(name: str) -> None:
    for dtype in benchmark.DTYPES:
        chosen = benchmark.cases(name, (dtype,))
        assert {(c.rows, c.vocab) for c in chosen} == set(benchmark.SHAPES[name])
        assert [c.vocab for c in chosen] == sorted(c.vocab for c in chosen)
        for c in chosen:
            if name == "large":
                assert c.pairs == pytest.approx(benchmark.PAIRS, rel=0.005)


def test_vocab_and_pairs_choose_the_cases() -> None:
    def shapes(**keywords: Any) -> list[tuple[int, int]]:
        return [(c.rows, c.vocab) for c in benchmark.cases(dtypes=("float32",), **keywords)]

    assert shapes(vocab=(1000,)) == [(64, 1000), (1024, 1000)]
    assert shapes(vocab=(1000,), pairs=5000) == [(5, 1000)]
    assert shapes(shapes="small", vocab=(7,), pairs=70) == [(10, 7)]
    assert shapes(vocab=(10_000,), pairs=3) == [(1, 10_000)]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"shapes": "huge"}, "shapes must be one of 'default', 'small', 'large', 'quick'; got 'huge'"),
        ({"dtypes": ("float64",)}, "dtypes must be of 'float32', 'bfloat16'; got 'float64'"),
        ({"vocab": (0,)}, r"vocab must be positive sizes; got \(0,\)"),
        ({"pairs": 0}, "pairs must be a positive number; got 0"),
        ({"repeats": 0}, "repeats must be at least 1; got 0"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.run(**keywords)


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_wrong_result_is_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        right = benchmark.eager(student, teacher)
        return right * 1.01 if wrong == "loss" else right.detach() + (right - right.detach()) * 1.01

    monkeypatch.setattr(benchmark, "ours", broken)
    with pytest.raises(RuntimeError, match=rf"ours computes a wrong {wrong} for float32 \[8, 100\]"):
        benchmark.run(dtypes=("float32",), vocab=(100,), pairs=800, repeats=1)


def test_a_chart_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real_import = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return real_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "matplotlib", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'reptile_ext\[bench\]'"):
        benchmark.run(dtypes=("float32",), vocab=(100,), pairs=800, plot=tmp_path / "chart.png")
    assert not list(tmp_path.iterdir())
