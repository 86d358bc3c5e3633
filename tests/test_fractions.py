"""Few-data curves: `reptile distill RECIPE --fractions … --seeds …`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reptile_ext import cli
from reptile_ext.training.recipes import comparison

TINY = ["--teacher-steps", "60", "--steps", "20", "--eval-every", "20", "--teacher-channels", "8", "--quiet"]


def test_every_share_and_seed_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "curves"
    argv = ["distill", "digits", "--fractions", "0.4", "1", "--seeds", "3", "5", "--out", str(folder), *TINY]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    found = json.loads((folder / "fractions.json").read_text())
    assert found["metric"] == "accuracy"
    keys = [(point["fraction"], point["seed"], point["model"]) for point in found["points"]]
    models = ("teacher", "student", "student alone")
    assert sorted(keys) == sorted((f, s, m) for f in (0.4, 1.0) for s in (3, 5) for m in models)
    assert (folder / "fractions.png").read_bytes().startswith(b"\x89PNG")

    # A point is what the run by itself is; the teacher of a seed is one.
    alone = tmp_path / "alone"
    assert cli.main(["distill", "digits", "--fraction", "0.4", "--seed", "5", "--out", str(alone), *TINY]) == 0
    wanted = json.loads((alone / "report.json").read_text())["models"]
    for model in models:
        point = next(x for x in found["points"] if (x["fraction"], x["seed"], x["model"]) == (0.4, 5, model))
        assert point["accuracy"] == wanted[model]["accuracy"]
        assert point["cross_entropy"] == wanted[model]["cross_entropy"]
    values = [x["accuracy"] for x in found["points"] if x["fraction"] == 0.4 and x["model"] == "student"]
    mean = sum(values) / 2
    assert f"{mean:.4f} ± {abs(values[0] - values[1]) / 2**0.5:.4f}" in said

    # What is finished is not run again.
    (folder / "fractions.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(comparison, "run", None)
        assert cli.main(["distill", "--resume", str(folder), "--quiet"]) == 0
    assert json.loads((folder / "fractions.json").read_text()) == found
    assert (folder / "fractions.png").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--fractions 0", "--fractions must be above 0 and at most 1; got 0"),
        ("--fractions 0.5 nan", "--fractions must be above 0 and at most 1; got nan"),
        ("--fractions 0.5 0.5", "--fractions must differ"),
        ("--fractions 0.5 --seeds -1", "--seeds must be from 0"),
        ("--seeds 1", "--seeds is for --fractions"),
        ("--fraction 0", "fraction"),
    ],
)
def test_what_is_refused(flags: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["distill", "digits", *flags.split(), "--out", str(tmp_path / "x"), *TINY]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_share_is_drawn_by_the_seed() -> None:
    """Whatever the share: the same samples of the same seed, and at least one."""
    from torch.utils.data import DataLoader

    from reptile_ext.training.recipes.digits import Digits

    loader = DataLoader(list(range(50)), 4, shuffle=True)  # type: ignore[arg-type]

    def kept(fraction: float, seed: int) -> list[int]:
        some = comparison._share(loader, Digits(fraction=fraction, seed=seed))
        return sorted(x for batch in some for x in batch.tolist())

    assert kept(0.2, 1) == kept(0.2, 1)
    assert len(kept(0.2, 1)) == 10
    assert kept(0.2, 1) != kept(0.2, 2)
    assert set(kept(0.2, 1)) < set(kept(0.4, 1))  # more of the same
    assert len(kept(0.001, 1)) == 1
