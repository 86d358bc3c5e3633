"""The benchmark runs and says what it should; how fast anything is, no test asks."""

from __future__ import annotations

import builtins
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from reptile_ext import benchmark, cli, eager, reference
from reptile_ext.benchmark import data as benchmark_data
from reptile_ext.benchmark import losses, measuring, report, training
from reptile_ext.options import DIVERGENCES
from reptile_ext.timing import LARGE_PAIRS

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def test_run_writes_tables_figures_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, plot = tmp_path / "new" / "figures.json", tmp_path / "chart.png"
    threads = torch.get_num_threads()
    pairs = LARGE_PAIRS + 32_000  # enough for the limit and the peak of memory
    code = benchmark.run(
        vocab=(100, 32_000),
        pairs=pairs,
        divergences=("forward_kl",),
        repeats=2,
        threads=1,
        out=out,
        plot=plot,
        compile=False,
    )
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
            assert r["share_of_in_place"] == pytest.approx(of_case["ours in place"]["ms"]["median"] / median)
            if name != "limit":
                assert r["loss"] == pytest.approx(exact, rel=2e-2 if name == "eager" else 1e-5)
            assert r["divergence"] == "forward_kl"
            assert r["share_of_forward_kl"] == 1
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
    assert printed.count(report.HEADER) == 2


def test_every_divergence_is_measured_against_forward_kl(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And every contender's loss is the reference's."""
    out, plot = tmp_path / "figures.json", tmp_path / "chart.png"
    benchmark.run(vocab=(10,), pairs=640, divergences=("all",), repeats=1, out=out, plot=plot)
    results = json.loads(out.read_text())["results"]
    found = {(r["dtype"], r["divergence"], r["contender"]): r for r in results}
    assert len(found) == len(results)
    assert set(found) == {
        (dtype, divergence, contender)
        for dtype, eager in (("float32", ("eager",)), ("bfloat16", ("eager", "eager fp32")))
        for divergence in DIVERGENCES
        for contender in ("ours in place", "ours", *eager)
    }
    printed = capsys.readouterr().out
    for (dtype, divergence, contender), r in found.items():
        assert (r["rows"], r["vocab"]) == (64, 10)
        median = found[dtype, "forward_kl", contender]["ms"]["median"]
        assert r["share_of_forward_kl"] == pytest.approx(median / r["ms"]["median"])
        assert f"{divergence}:\n" in printed
        case, data = benchmark.Case(dtype, 64, 10, divergence), benchmark.Data(dtype, 640)
        student, teacher, _ = data.logits(case)
        wanted = reference.distillation_loss(
            student, teacher, data.labels(case), divergence=divergence, temperature=benchmark.TEMPERATURE
        )
        tolerance = 3e-2 if contender == "eager" and dtype == "bfloat16" else 1e-5
        assert r["loss"] == pytest.approx(wanted.item(), rel=tolerance)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_without_forward_kl_there_is_no_share_of_it(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    benchmark.run(dtypes=("float32",), vocab=(10,), pairs=640, divergences=("jsd", "tvd"), repeats=1, out=out)
    results = json.loads(out.read_text())["results"]
    assert {r["divergence"] for r in results} == {"jsd", "tvd"}
    assert {r["share_of_forward_kl"] for r in results} == {None}


def test_default_divergences_are_those_that_have_targets() -> None:
    for case in (chosen := benchmark.cases()):
        of_shape = [c.divergence for c in chosen if c[:3] == case[:3]]
        targeted = case.dtype == "float32" and case.pairs > 10**7 and case.vocab in (32_000, 128_256)
        assert of_shape == (["forward_kl", "reverse_kl", "jsd"] if targeted else ["forward_kl"])
    everything = benchmark.cases("small", divergences=("all",))
    assert everything == [c._replace(divergence=d) for c in benchmark.cases("small") for d in DIVERGENCES]
    twice = benchmark.cases("small", ("float32",), (1000,), 1e5, ("jsd", "dkd", "jsd"))
    assert [c.divergence for c in twice] == ["jsd", "dkd"]


def test_turns_start_with_a_step_that_does_not_count_and_have_every_contender_in_every_round(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[str] = []

    def counted(case: benchmark.Case, *_: Any) -> list[benchmark.Contender]:
        return [
            benchmark.Contender(name, lambda: None, lambda _, name=name: steps.append(f"{case.divergence} {name}"))
            for name in ("ours", "eager")
        ]

    monkeypatch.setattr(measuring, "contenders", counted)
    monkeypatch.setattr(measuring, "IN_A_ROW", 1)
    chosen = benchmark.cases("small", ("float32",), (10,), 640, ("jsd", "tvd"))
    measuring.measure(chosen, benchmark.Data("float32", 640), 20, False)
    names = ["jsd ours", "jsd eager", "tvd ours", "tvd eager"]
    assert steps[:4] == names  # the checked ones
    assert steps[4::2] == steps[5::2]
    rounds = [tuple(steps[i : i + 8 : 2]) for i in range(4, len(steps), 8)]
    assert len(rounds) == 20
    assert all(sorted(r) == sorted(names) for r in rounds)
    assert len(set(rounds)) > 1


def test_a_contender_that_cannot_run_is_in_the_table_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in the figures; the chart and the others' ratios do without it. One of ours that fails is an error, too."""

    def out_of_memory(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    def results(out: Path) -> dict[str, Any]:
        return {r["contender"]: r for r in json.loads(out.read_text())["results"]}

    def run(out: Path, plot: Path | None = None) -> int:
        return benchmark.run(dtypes=("float32",), vocab=(1000,), pairs=5000, repeats=1, out=out, plot=plot)

    monkeypatch.setattr(torch, "compile", lambda *_, **__: out_of_memory)
    assert run(tmp_path / "1.json", tmp_path / "chart.png") == 0
    found = results(tmp_path / "1.json")
    assert found["torch.compile"]["failed"] == "OutOfMemoryError: tried to allocate 2 GiB"
    assert set(found["ours"]["times_as_fast_as"]) == {"eager"}
    assert "torch.compile  OutOfMemoryError: tried to allocate 2 GiB" in capsys.readouterr().out

    monkeypatch.setattr(losses, "ours", out_of_memory)
    assert run(tmp_path / "2.json") == 1
    found = results(tmp_path / "2.json")
    assert {name for name, r in found.items() if "failed" in r} == {"ours in place", "ours", "torch.compile"}
    assert found["eager"]["share_of_forward_kl"] == 1


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_baseline_without_a_function_of_its_own_is_the_reference_s_formula(
    divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same loss and gradient, so that a new divergence is timed against something without an edit here."""
    student, teacher, labels = torch.randn(6, 11).mul(2).requires_grad_(), torch.randn(6, 11) * 2, torch.arange(6)
    written = eager.eager_loss_of(divergence)
    assert eager.EAGER[divergence] is written
    monkeypatch.delattr(eager, divergence)
    fallback = eager.eager_loss_of(divergence)
    assert fallback is not written
    found, wanted = fallback(student, teacher, labels), written(student, teacher, labels)
    torch.testing.assert_close(found, wanted)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (found, wanted)]
    assert gradients[1].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", benchmark.SHAPES)
def test_cases_are_of_the_named_set(name: str) -> None:
    for dtype in benchmark.DTYPES:
        chosen = benchmark.cases(name, (dtype,), divergences=("forward_kl",))
        assert {(c.rows, c.vocab) for c in chosen} == set(benchmark.SHAPES[name])
        assert [c.vocab for c in chosen] == sorted(c.vocab for c in chosen)
        for c in chosen:
            if name == "large":
                assert c.pairs == pytest.approx(benchmark_data.PAIRS, rel=0.005)


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
        ({"divergences": ("jsd", "kl")}, "divergences must be 'all' or of 'forward_kl', .*, 'dkd'; got 'kl'"),
        ({"divergences": ("all", "jsd")}, "divergences must be 'all' or of .*; got 'all'"),
        ({"repeats": 0}, "repeats must be at least 1; got 0"),
        ({"threads": 0}, "threads must be at least 1; got 0"),
    ],
)
def test_bad_arguments_are_named(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmark.run(**keywords)


@pytest.mark.parametrize("wrong", ["loss", "gradient"])
def test_a_wrong_result_is_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = losses.ours

    def broken(*args: Any, inplace: bool = False) -> torch.Tensor:
        right = ours(*args, inplace=inplace)
        if inplace or args[-1] != "skew_kl":
            return right
        return right * 1.01 if wrong == "loss" else right.detach() + (right - right.detach()) * 1.01

    monkeypatch.setattr(losses, "ours", broken)
    with pytest.raises(RuntimeError, match=rf"ours computes a wrong {wrong} for skew_kl float32 \[8, 100\]"):
        benchmark.run(dtypes=("float32",), vocab=(100,), pairs=800, repeats=1, divergences=("forward_kl", "skew_kl"))


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


def test_the_command_takes_divergences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--vocab", "10", "--pairs", "640", "--dtypes", "float32", "--repeats", "1", "--out", str(tmp_path)]
    assert cli.main(["benchmark", *shape, "--divergences", "mse", "dkd"]) == 0
    results = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert {r["divergence"] for r in results} == {"mse", "dkd"}
    assert cli.main(["benchmark", *shape, "--divergences", "kl"]) == 2
    assert "divergences must be 'all' or of" in capsys.readouterr().err


def test_the_same_cases_on_pytest_benchmark() -> None:
    """Each case once, untimed."""
    command = [sys.executable, "-m", "pytest", str(BENCHMARKS), "-v", "--benchmark-disable", "-k", "[64"]
    command += ["--shapes", "small", "--divergences", "jsd", "dkd", "--no-compile"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    for divergence in ("jsd", "dkd"):
        assert f"[{divergence} float32 [64, 10] ours in place] PASSED" in result.stdout
        assert f"[{divergence} bfloat16 [64, 1000] eager fp32] PASSED" in result.stdout


def script(name: str) -> Any:
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_small_shapes_accounts_for_all_of_a_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_shapes = script("small_shapes")
    monkeypatch.setattr(small_shapes, "microseconds", lambda stages: {stage.name: 100.0 for stage in stages})
    small_shapes.main(4, 10)
    printed = capsys.readouterr().out
    assert "forward_kl float32 [4, 10], microseconds" in printed
    assert "ours, 100.0 microseconds, 1.00 of eager's:" in printed


def test_small_shapes_times_all_of_its_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small_shapes = script("small_shapes")
    monkeypatch.setattr(small_shapes, "ROUNDS", 1)
    monkeypatch.setattr(small_shapes, "IN_A_ROW", 2)
    small_shapes.main(4, 10)
    assert "of eager's:" in capsys.readouterr().out

    def refuse(_: None) -> None:
        raise RuntimeError("no such operator")

    with pytest.raises(RuntimeError, match="operator: RuntimeError: no such operator"):
        small_shapes.microseconds([benchmark.Contender("operator", lambda: None, refuse)])


def test_what_the_linear_loss_does_on_a_gpu_is_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Operations and bytes by hand; and the memory that is demanded."""
    linear = script("linear")
    rows, hidden, vocab = 8192, 4096, 128_256
    for rows_in, chunks in ((None, 4), (4096, 2), (1000, 1)):
        found = linear.model(rows, hidden, vocab, torch.bfloat16, 141e9, rows_in)
        n = rows_in or rows
        assert [operations for operations, _ in found.products] == [2 * n // chunks * hidden * vocab] * 4 * chunks
        assert found.bytes["distillation_loss_"] == pytest.approx(3 * n * vocab * 2, rel=1e-3)
        logits, dx, dw = (2 * x for x in (n * vocab, n * hidden, vocab * hidden))
        assert sum(written for _, written in found.products) == 2 * logits + dx + (2 * chunks - 1) * dw
        assert found.peak < 3.5e9
        others = found.bytes.total() - found.bytes["products"] - found.bytes["distillation_loss_"]
        assert others < 14 * 2 * rows * hidden  # nothing of the size of logits or head
    monkeypatch.setattr(sys, "argv", ["linear.py", "--model"])
    assert linear.main() == 0
    assert "predicted, not measured" in capsys.readouterr().out


def test_the_linear_benchmark_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    linear, out = script("linear"), tmp_path / "linear.json"
    size = ["--rows", "8", "--hidden", "4", "--vocab", "50", "--repeats", "2", "--no-compile", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["linear.py", *size])
    assert linear.main() == 0
    results = json.loads(out.read_text())["results"]
    names = ["ours", "fused on logits", "eager", "limit"]
    assert [(r["dtype"], r["contender"]) for r in results] == [(d, name) for d in linear.DTYPES for name in names]
    for dtype in linear.DTYPES:
        values = [r["loss"] for r in results if r["dtype"] == dtype and r["loss"] is not None]
        assert values == pytest.approx([values[0]] * 3, rel=2e-2 if dtype == "bfloat16" else 1e-5)

    # What is not installed, or needs too much memory, is named.
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function or (lambda f: f))
    assert [c.name for c in linear.contenders(8, 4, 50, torch.float32, "cpu", True)][-2:] == ["Liger", "limit"]

    def out_of_memory(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(linear.reptile_ext, "distillation_loss", out_of_memory)
    capsys.readouterr()
    assert linear.main() == 1
    assert "fused on logits  OutOfMemoryError: tried to allocate 2 GiB" in capsys.readouterr().out


def test_the_gpus_benchmark_runs(tmp_path: Path) -> None:
    """Without a GPU, its figures mean nothing; that it has not rotted does."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--out", str(tmp_path)]
    command += ["--rows", "4", "--vocab", "100", "--repeats", "2", "--no-compile"]
    subprocess.run(command, check=True, capture_output=True)
    found, table = json.loads((tmp_path / "gpu.json").read_text()), (tmp_path / "gpu.md").read_text()
    assert "share of copy bandwidth" in table
    by_case: dict[tuple[str, ...], list[float]] = {}
    for result in found["results"]:
        if result["contender"] not in ("copy", "eager", "Liger"):
            by_case.setdefault((result["dtype"], result["divergence"]), []).append(result["loss"])
    assert len(by_case) == 4
    for of_case in by_case.values():
        assert of_case == pytest.approx([of_case[0]] * len(of_case), rel=1e-5)
    of_liger = [result for result in found["results"] if result["contender"] == "Liger"]  # has no kernels for a CPU
    assert [result["divergence"] for result in of_liger] == ["forward_kl"] * 2
    assert all("ms" not in result and result["failed"] in table for result in of_liger)


def test_whole_steps_of_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All contenders train the same student; the figures are in the table, the file and the chart."""
    arguments = "benchmark --training --sizes small --vocab 300 --tokens 256 --repeats 2 --no-compile --out"
    assert cli.main([*arguments.split(), str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    document = json.loads((tmp_path / "benchmark.json").read_text())
    assert document["environment"]["tokens"] == 256
    rows = {r["contender"]: r for r in document["results"]}
    assert set(rows) == set(training.CONTENDERS) - {"torch.compile"}
    for name, r in rows.items():
        assert (r["dtype"], r["size"], r["vocab"]) == ("float32", "small", 300)
        assert r["tokens_per_second"] == pytest.approx(256e3 / r["ms"]["median"])
        eager = rows["eager"]["ms"]["median"]
        assert r["times_as_fast_as"] == {"eager": pytest.approx(eager / r["ms"]["median"])}
        assert name in printed
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


def test_the_contenders_of_training_have_one_loss_and_one_gradient() -> None:
    """Each, made anew and so of the same student, moves it to the same place."""
    case = training.Case("float32", "small", 300)
    losses = []
    for name in ("eager", "ours", "ours in place", "ours linear"):
        (one,) = (c for c in training.contenders(case, 64, compile=False) if c.name == name)
        losses.append([one.run().item() for _ in range(3)])
    assert losses[0][2] < losses[0][0]
    for found in losses[1:]:
        assert found == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--training --shapes large", "--shapes has no meaning with --training"),
        ("--tokens 3", "--tokens has no meaning without --training"),
        ("--training --sizes tiny", "sizes must be of 'small', 'medium', 'large'; got 'tiny'"),
        ("--training --vocab 100", "vocab must be sizes from 256"),
        ("--training --tokens 0", "tokens must be from 1"),
        ("--training --dtypes float8", "dtypes must be of"),
        ("--training --repeats 0", "repeats must be from 1"),
    ],
)
def test_training_names_what_does_not_fit(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = cli.main(["benchmark", *arguments.split()])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err
