"""Options of the benchmarks."""

from __future__ import annotations

import pytest

from reptile_ext import benchmark


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shapes", choices=tuple(benchmark.SHAPES), default="quick", help="set of cases")
    parser.addoption("--divergences", nargs="+", metavar="NAME", help="all, or some of them")
    parser.addoption("--no-compile", action="store_true", help="leave torch.compile out")
