"""Fixtures of the suite: every instruction set in turn, random numbers that repeat themselves, and what tests change in
the process put back."""

from __future__ import annotations

import fcntl
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

# Before torch is loaded: threads that spin while they wait take the cores from the tests beside them (pytest -n).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import numpy as np
import pytest
import torch
from oracle import BFLOAT16_SET, INSTRUCTION_SETS

from reptile_ext import ops

# Child processes must import the installed package too, not the sources that lie in the working directory.
os.environ["PYTHONSAFEPATH"] = "1"

# The same examples in every run: a failure in CI is a failure at home. Time is never a verdict.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=100)
hypothesis.settings.load_profile("suite")


class TorchRandom:
    """torch's random numbers in the form of the module `random`."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


# What an example draws from torch does not depend on the examples before it. (Of `random` and NumPy it is so anyway.)
torch_random = TorchRandom()
hypothesis.register_random(torch_random)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Once with an instruction set that differs from another only in a dtype is enough for the other dtypes."""

    def repeats(item: pytest.Item) -> bool:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        is_set = any(isinstance(v, str) and v == BFLOAT16_SET for v in values)
        return is_set and any(isinstance(v, torch.dtype) and v != torch.bfloat16 for v in values)

    config.hook.pytest_deselected(items=[item for item in items if repeats(item)])
    items[:] = [item for item in items if not repeats(item)]


@pytest.fixture(scope="session")
def build_folder(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[[str], AbstractContextManager[Path]]:
    """`with build_folder("name") as folder:` is one folder for all processes of pytest-xdist, one at a time: whichever
    comes first builds there, the others find what it has built."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if hasattr(request.config, "workerinput") else base

    @contextmanager
    def folder_of(name: str) -> Iterator[Path]:
        folder = base / name
        folder.mkdir(exist_ok=True)
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder

    return folder_of


@pytest.fixture(params=INSTRUCTION_SETS)
def each_set(request: pytest.FixtureRequest) -> str:
    """The test runs once on every instruction set that this machine has."""
    assert ops.instruction_set(request.param) == request.param
    return request.param


@pytest.fixture(autouse=True)
def _same_for_every_test() -> Iterator[None]:
    """Seeds, and what tests change in the process: no test depends on those before it.

    One thread: thousands of small operations, and threads that wait for one another on a busy machine, take minutes
    more. Tests of what depends on the number of threads set it themselves."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    threads, instruction_set = torch.get_num_threads(), ops.instruction_set()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    ops.instruction_set(instruction_set)
