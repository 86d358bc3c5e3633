"""benchmarks/compare.py: what it asks of two builds, what it makes of their times, and that it cleans up.

Building two commits takes minutes and is not done here.
"""

from __future__ import annotations

import importlib.util
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import reptile_ext
from reptile_ext.options import DIVERGENCES

spec = importlib.util.spec_from_file_location(
    "compare", Path(__file__).resolve().parent.parent / "benchmarks" / "compare.py"
)
assert spec is not None
assert spec.loader is not None
compare = importlib.util.module_from_spec(spec)
sys.modules["compare"] = compare  # where NamedTuple looks for its annotations
spec.loader.exec_module(compare)

TINY = compare.Case("jsd", "float32", 4, 10, True)


# ---------------------------------------------------------------------------------------------------------- statistics


def test_the_interval_contains_the_median_as_often_as_it_says() -> None:
    """Exactly: how many of n values lie below the median is binomial, and the bounds are two of the sorted values."""
    for n in range(1, 60):
        low, high = compare.interval_of_median(list(range(n, 0, -1)))
        if low == 0:
            assert high == math.inf
            assert 2 * 0.5**n > 0.01, "not even the least and the greatest are far enough apart"
            continue
        assert high == n + 1 - low, "symmetric"
        coverage = sum(math.comb(n, below) / 2**n for below in range(low, high))
        narrower = sum(math.comb(n, below) / 2**n for below in range(low + 1, high - 1))
        assert coverage >= 0.99 > narrower
    assert compare.interval_of_median([1.0] * 2 * compare.FEWEST_ROUNDS) == (1.0, 1.0)


def of_ratios(*ratios: float, losses: tuple[float, float] = (1.0, 1.0)) -> Any:
    return compare.Comparison(TINY, [(1_000_000, round(1e6 * r)) for r in ratios], losses)


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.0] * 20, "-"),
        ([0.99, 1.2] * 10, "-"),  # slower, but half the ratios say otherwise
        ([1.5] * 7, "-"),  # too few
        ([1.02, 1.03] * 10, "slower"),
        ([1.08, 1.09] * 10, "SLOWER"),
        ([0.9] * 3 + [1.08, 1.09, 1.07] * 5, "SLOWER"),  # outliers of either side
        ([0.9] * 5 + [1.08, 1.09, 1.07] * 5, "-"),
        ([0.93, 0.97] * 10, "faster"),
    ],
)
def test_verdicts(ratios: list[float], verdict: str) -> None:
    assert of_ratios(*ratios).verdict(0.05) == verdict


def test_the_ratio_is_that_of_turns_that_follow_each_other() -> None:
    """Both sides become slower together: no two such turns differ, though the times are all over the place."""
    drifting = compare.Comparison(TINY, [(n, n) for n in range(1000, 21000, 1000)], (1.0, 1.0))
    assert drifting.interval == (1.0, 1.0)
    assert drifting.ms == (0.0105, 0.0105)


def test_report() -> None:
    results = [of_ratios(*[r] * 20) for r in (1.2, 1.01, 0.5, 1.0, 1.0)] + [of_ratios(*[1.0] * 20, losses=(4.0, 4.1))]
    table, summary = compare.report(results, 0.05).split("\n\n")
    header, *rows = table.splitlines()
    assert header.split() == ["case", "A", "ms", "B", "ms", "B", "/", "A", "99%"]
    assert [row.split()[6:12] for row in rows[:3]] == [
        ["1", "1.2", "1.200", "1.200", "-", "1.200"],
        ["1", "1.01", "1.010", "1.010", "-", "1.010"],
        ["1", "0.5", "0.500", "0.500", "-", "0.500"],
    ]
    assert [row.split()[12] for row in rows] == ["SLOWER", "slower", "faster", "-", "-", "-"]
    assert all(row.startswith("jsd float32 [4, 10] in place ") for row in rows)
    assert rows[-1].endswith("computes another loss: 4, now 4.1")
    assert sum("another loss" in row for row in rows) == 1
    assert summary.splitlines() == [
        "1 of 6 cases: slower beyond the noise, and by more than 5%",
        "1 of 6 cases: slower beyond the noise, by no more than 5%",
        "1 of 6 cases: faster beyond the noise",
        "3 of 6 cases: no difference beyond the noise",
    ]


class Fake:
    """A side that takes `ns` for every case and writes down its turns."""

    def __init__(self, name: str, ns: int, turns: list[str]) -> None:
        self.name, self.ns, self.turns = name, ns, turns
        self.divergences = ["forward_kl", "jsd"]

    def time(self, case: Any) -> tuple[int, float]:
        self.turns.append(f"{self.name} {case.divergence}")
        return self.ns, 1.0


def test_sides_take_turns() -> None:
    turns: list[str] = []
    other = TINY._replace(divergence="tvd")
    results = compare.compare(Fake("A", 100, turns), Fake("B", 110, turns), [TINY, other], 2, io.StringIO())
    assert turns == 2 * [f"{side} {d}" for d in ("jsd", "tvd") for side in "ABBA"]
    assert [r.case for r in results] == [TINY, other]
    assert [r.turns for r in results] == [[(100, 110)] * 4] * 2


@pytest.mark.parametrize(("ns", "code"), [(100, 0), (103, 0), (106, 1), (50, 0)])
def test_exit_code_and_figures(ns: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Side(Fake):
        def __init__(self, name: str, site: Path) -> None:
            assert site == Path(name)
            super().__init__(name, {"A": 100, "B": ns}[name], [])

        def close(self) -> None:
            self.turns.append("closed")

    monkeypatch.setattr(compare, "build", lambda revision, work, name: Path(name))
    monkeypatch.setattr(compare, "describe", lambda revision: f"commit {revision}")
    monkeypatch.setattr(compare, "Side", Side)
    file = tmp_path / "new" / "figures.json"
    assert compare.main(["HEAD", "--rounds", "4", "--json", str(file), "--cases", "float32", "in place"]) == code
    document = json.loads(file.read_text())
    assert (document["A"], document["B"]) == ("commit HEAD", "commit None")
    assert [path.name for path in file.parent.iterdir()] == ["figures.json"]
    assert {(r["divergence"], r["dtype"], r["inplace"]) for r in document["results"]} == {
        ("forward_kl", "float32", True),
        ("jsd", "float32", True),
    }
    for r in document["results"]:
        assert r["ratio"] == pytest.approx(ns / 100)
        assert r["interval"] == [r["ratio"]] * 2
        assert r["turns_ns"] == [[100, ns]] * 8
    assert compare.main(["HEAD", "--cases", "nonsense"]) == 2


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message in (
        (["HEAD", "--rounds", "3"], "--rounds must be at least 4: fewer prove nothing; got 3"),
        (["HEAD", "--tolerance", "-1"], "--tolerance must be a finite number >= 0; got -1"),
    ):
        with pytest.raises(SystemExit) as stop:
            compare.main(argv)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------ the cases


def test_cases() -> None:
    every = compare.cases(DIVERGENCES)
    assert len(every) == len(set(every)) == 4 * 2 * 2 + 11 * 2
    assert {(c.rows, c.vocab) for c in every} == set(compare.SHAPES)
    assert {c.divergence for c in every} == set(DIVERGENCES)
    assert compare.cases([]) == compare.cases(["forward_kl"])
    assert [str(c) for c in compare.cases(DIVERGENCES, ["tvd"])] == [
        "tvd float32 [256, 32000] in place",
        "tvd bfloat16 [256, 32000] in place",
    ]
    assert compare.cases(DIVERGENCES, ["tvd", "[64, 10]"]) == []


def test_divergences_are_asked_for() -> None:
    assert compare.known_divergences(reptile_ext.distillation_loss) == list(DIVERGENCES)

    def old(student: Any, teacher: Any, *, temperature: float = 1.0, inplace: bool = False) -> Any:
        return torch.zeros(())

    assert compare.known_divergences(old) == ["forward_kl"]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("inplace", [True, False])
def test_a_turn(divergence: str, inplace: bool) -> None:
    """Times steps of the case that was asked for, the first not, and leaves the logits as they were."""
    case = compare.Case(divergence, "bfloat16", 4, 10, inplace)
    student, teacher, _ = compare.logits_of(case.dtype).of_shape(case.rows, case.vocab)
    before = student.clone()
    calls: list[dict[str, Any]] = []

    def counted(*logits: Any, **keywords: Any) -> torch.Tensor:
        if logits[0].shape == before.shape:  # not a question whether labels are needed
            calls.append(keywords)
            assert torch.equal(logits[0], before)
        return reptile_ext.distillation_loss(*logits, **keywords)

    ns, loss = compare.turn(case, counted)
    assert ns > 0
    assert 1 + compare.AT_LEAST <= len(calls) <= 1 + compare.AT_MOST
    assert torch.equal(student, before)
    wanted = reptile_ext.reference.distillation_loss(
        student, teacher, torch.arange(4) if divergence == "dkd" else None, divergence=divergence, temperature=2.0
    )
    assert loss == pytest.approx(wanted.item(), rel=1e-5)
    assert all(keywords["inplace"] is inplace for keywords in calls)
    # What any commit understands, as long as nothing else is asked for.
    assert all((set(keywords) == {"temperature", "inplace"}) == (divergence == "forward_kl") for keywords in calls)


# -------------------------------------------------------------------------------------------------- the child processes


def everywhere(_: Path) -> None:
    """Instead of `verify`: the package of this process lies where it lies."""


def test_what_goes_back_and_forth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare, "verify", everywhere)
    replies = io.StringIO()
    compare.serve(Path("/"), io.StringIO(2 * (json.dumps(TINY) + "\n")), replies)
    hello, first, second = map(json.loads, replies.getvalue().splitlines())
    assert hello == list(DIVERGENCES)
    assert first["loss"] == second["loss"] > 0
    assert min(first["ns"], second["ns"]) > 0


def test_another_build_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"was to be imported, and .* was"):
        compare.verify(tmp_path)
    compare.verify(Path("/"))


def test_a_child_that_cannot_start_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Without a package in its folder, whatever is installed besides."""
    (tmp_path / "reptile_ext.py").write_text("raise ImportError('broken build')\n")
    with pytest.raises(compare.CompareError, match="the process of B ended with 1; it said why above"):
        compare.Side("B", tmp_path)
    assert "broken build" in capfd.readouterr().err


def test_a_child_imports_from_its_folder_and_is_missed(tmp_path: Path) -> None:
    """A package that answers to the little that is asked of it; the one that is installed does not come first."""
    (tmp_path / "reptile_ext").mkdir()
    (tmp_path / "reptile_ext" / "__init__.py").write_text(
        "def distillation_loss(student, teacher, *, temperature, inplace):\n    return (student * 0).sum() + 42\n"
    )
    side = compare.Side("A", tmp_path)
    try:
        assert side.divergences == ["forward_kl"]
        ns, loss = side.time(TINY._replace(divergence="forward_kl"))
        assert ns > 0
        assert loss == 42
        side._process.kill()
        side._process.wait()
        with pytest.raises(compare.CompareError, match="the process of A ended with -9"):
            side.time(TINY)
    finally:
        side.close()


# ---------------------------------------------------------------------------------------------------------------- git


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs git in a repository of one commit."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    root = tmp_path / "repository"
    root.mkdir()
    for key in [key for key in os.environ if key.startswith("GIT_")]:
        monkeypatch.delenv(key)  # a hook's

    def git(*arguments: str) -> str:
        who = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", "-C", str(root), *who, *arguments], capture_output=True, text=True, check=True
        ).stdout

    git("init", "--quiet")
    (root / "file").write_text("committed")
    git("add", "file")
    git("commit", "--quiet", "-m", "First")
    (root / "file").write_text("changed")
    monkeypatch.setattr(compare, "ROOT", root)
    return git


def test_a_worktree_is_removed_whatever_happens(repository: Callable[..., str], tmp_path: Path) -> None:
    def interrupted() -> None:
        with compare.checkout("HEAD", tmp_path / "tree") as tree:
            assert (tree / "file").read_text() == "committed"
            assert len(repository("worktree", "list").splitlines()) == 2
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not (tmp_path / "tree").exists()
        assert len(repository("worktree", "list").splitlines()) == 1
    with compare.checkout(None, tmp_path / "tree") as tree:
        assert (tree / "file").read_text() == "changed"


def test_an_unknown_commit_is_named(repository: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["HEAD", "no-such-commit"]) == 2
    assert "no-such-commit" in capsys.readouterr().err
    assert compare.describe("HEAD").endswith(" First")
    assert compare.describe(None).endswith("-dirty")
