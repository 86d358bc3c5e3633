"""docs/contract.md names tests; they exist, and it names every test of a bug."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
CONTRACT = (TESTS.parent / "docs" / "contract.md").read_text(encoding="utf-8")


def defined(file: str) -> set[str]:
    return set(re.findall(r"^def (test_\w+)", (TESTS / file).read_text(encoding="utf-8"), re.M))


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", CONTRACT)
    assert len(named) > 80
    assert [f"{file}::{test}" for file, test in named if test not in defined(file)] == []
    for file in re.findall(r"`(?:tests/)?(\w+\.(?:py|sh))`", CONTRACT):
        assert (TESTS / file).exists(), file


def test_every_test_of_a_bug_is_named() -> None:
    bugs = {test for file in TESTS.glob("test_*.py") for test in defined(file.name) if test.startswith("test_bug_")}
    assert bugs
    assert [test for test in sorted(bugs) if f"::{test}`" not in CONTRACT] == []
    numbers = [int(n) for n in re.findall(r"^\| (\d+)\. ", CONTRACT.split("## Bugs")[1], re.M)]
    assert numbers == list(range(1, 21))
