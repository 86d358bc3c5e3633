"""The cases of `reptile benchmark` on pytest-benchmark, a group for each: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from reptile_ext.benchmark import COMPILE_VOCAB, DTYPES, NAMES, Case, Contender, Data, cases, contenders


def chosen_cases(config: pytest.Config) -> list[Case]:
    return cases(config.getoption("--shapes"), divergences=config.getoption("--divergences"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every case with every contender that it has."""
    compile = not metafunc.config.getoption("--no-compile")
    chosen = chosen_cases(metafunc.config)

    def takes_part(case: Case, name: str) -> bool:
        return {
            "eager fp32": case.dtype != "float32",
            "torch.compile": compile and case.vocab >= COMPILE_VOCAB,
            "limit": case.is_large,
        }.get(name, True)

    found = [(case, name) for case in chosen for name in NAMES if takes_part(case, name)]
    metafunc.parametrize(("case", "name"), found, ids=[f"{case} {name}" for case, name in found])


@pytest.fixture(scope="module")
def contender(request: pytest.FixtureRequest) -> Callable[[Case, str], Contender]:
    """Finds a contender; the data of a dtype and the contenders of a case are made once."""
    chosen = chosen_cases(request.config)
    data: dict[str, Data] = {}
    made: dict[Case, dict[str, Contender]] = {}

    def find(case: Case, name: str) -> Contender:
        if case.dtype not in data:
            data.clear()
            data[case.dtype] = Data(case.dtype, max(c.pairs for c in chosen))
        if case not in made:
            made.clear()
            made[case] = {c.name: c for c in contenders(case, data[case.dtype])}
        return made[case][name]

    return find


def test_forward_and_backward(
    benchmark: BenchmarkFixture, contender: Callable[[Case, str], Contender], case: Case, name: str
) -> None:
    runner = contender(case, name)
    benchmark.group = f"{case!s:44} forward + backward"
    benchmark.name = name
    rounds = 9 if case.is_large else 500

    def setup() -> tuple[tuple[object], dict[str, object]]:
        """The step's arguments."""
        return (runner.setup(),), {}

    benchmark.pedantic(runner.step, setup=setup, rounds=rounds, warmup_rounds=2)  # type: ignore[no-untyped-call]
    if benchmark.stats is not None:
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(
            divergence=case.divergence,
            dtype=case.dtype,
            rows=case.rows,
            vocab=case.vocab,
            ns_per_pair=median * 1e9 / case.pairs,
            useful_gb_per_s=3 * case.pairs * DTYPES[case.dtype].itemsize / median / 1e9,
        )
