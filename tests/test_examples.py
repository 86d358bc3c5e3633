"""The examples run as they stand, and print what they promise."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_mutual_learning(capsys: pytest.CaptureFixture[str]) -> None:
    """Both learn, and are other models than the one alone that began like the first."""
    one, other, alone = map(float, re.findall(r"0\.\d{4}", printed("mutual_learning.py", capsys)))
    assert min(one, other, alone) > 0.8
    assert one != alone


def test_self_distillation(capsys: pytest.CaptureFixture[str]) -> None:
    found = [float(x) for x in re.findall(r"accuracy (0\.\d{4})", printed("self_distillation.py", capsys))]
    assert len(found) == 3
    assert min(found) > 0.8
