"""A run that was stopped and goes on ends with the bits of one that was not: loaders of many kinds × places to stop.

docs/training.md has the table.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import perceptron, weights
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    WeightedRandomSampler,
)

from reptile_ext.training import Reptile, Until
from reptile_ext.training.data import DataState
from reptile_ext.training.data import Sampler as Place

SIZE, BATCH = 22, 4  # 6 micro-batches a pass, the last one short
X = torch.randn(SIZE, 6, generator=torch.Generator().manual_seed(1))


class Augmented(Dataset[Tensor]):
    """Each sample is moved at random, by all three generators of the process."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, i: int) -> Tensor:
        return X[i] + 0.1 * torch.randn(6) + np.random.rand() + random.random()


class Order(Sampler[int]):
    """An order of the samples, by a way of its own."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.passes = 0
        self.order = list(range(SIZE))
        self.numpy, self.python = np.random.default_rng(3), random.Random(3)
        self.legacy, self.torch = np.random.RandomState(3), torch.Generator().manual_seed(3)

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        if self.way == "counts its passes":
            yield from np.random.default_rng(self.passes).permutation(SIZE).tolist()
        elif self.way == "NumPy's generator":
            yield from self.numpy.permutation(SIZE).tolist()
        elif self.way == "NumPy's old generator":
            yield from self.legacy.permutation(SIZE).tolist()
        elif self.way == "Python's generator":
            yield from self.python.sample(range(SIZE), SIZE)
        elif self.way == "a list that it shuffles":
            self.python.shuffle(self.order)
            yield from self.order
        elif self.way == "one by one, from torch":
            yield from (int(torch.randint(SIZE, ())) for _ in range(SIZE))
        elif self.way == "one by one, from torch's generator":
            yield from (int(torch.randint(SIZE, (), generator=self.torch)) for _ in range(SIZE))


class Stream(IterableDataset[Tensor]):
    """As Hugging Face's: an order by the number of the pass; and one by a generator of its own."""

    def __init__(self, by_epoch: bool) -> None:
        self.by_epoch, self.epoch, self.generator = by_epoch, 0, torch.Generator().manual_seed(5)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.epoch) if self.by_epoch else self.generator
        yield from X[torch.randperm(SIZE, generator=generator)]


class Batches:
    """Micro-batches that are put in another order before each pass."""

    def __init__(self) -> None:
        self.batches = list(X.split(BATCH))

    def __iter__(self) -> Iterator[Tensor]:
        random.shuffle(self.batches)
        return iter(list(self.batches))


def stateful() -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    torch.manual_seed(0)  # its sampler draws a seed when it is made
    return torchdata.StatefulDataLoader(Augmented(), BATCH, shuffle=True)


def own() -> torch.Generator:
    return torch.Generator().manual_seed(9)


WAYS = [
    "counts its passes",
    "NumPy's generator",
    "NumPy's old generator",
    "Python's generator",
    "a list that it shuffles",
    "one by one, from torch",
    "one by one, from torch's generator",
]
KINDS: dict[str, Any] = {
    "a list": lambda: list(X.split(BATCH)),
    "batches that shuffle themselves": Batches,
    "shuffle": lambda: DataLoader(Augmented(), BATCH, shuffle=True),
    "shuffle, the loader's generator": lambda: DataLoader(Augmented(), BATCH, shuffle=True, generator=own()),
    "a sampler's generator": lambda: DataLoader(
        Augmented(), BATCH, sampler=RandomSampler(range(SIZE), generator=own())
    ),
    "a batch sampler": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(range(SIZE), generator=own()), BATCH, drop_last=False)
    ),
    "weighted": lambda: DataLoader(
        Augmented(), BATCH, sampler=WeightedRandomSampler(torch.arange(1.0, SIZE + 1).tolist(), SIZE, generator=own())
    ),
    **{f"sampler: {way}": lambda way=way: DataLoader(Augmented(), BATCH, sampler=Order(way)) for way in WAYS},
    "stream, by epoch": lambda: DataLoader(Stream(by_epoch=True), BATCH),
    "stream, its generator": lambda: DataLoader(Stream(by_epoch=False), BATCH),
    "workers": lambda: DataLoader(Augmented(), BATCH, shuffle=True, num_workers=2),
    "torchdata's": stateful,
}
STOPS = {"in the first pass": 3, "at its end": 6, "in the second": 8, "in the third": 14}


def trained(data: Any, steps: int, folder: Path, **keywords: Any) -> Tensor:
    student = perceptron(8, 0, dropout=0.3)
    until = Until(steps=steps, **keywords)
    Reptile(student, perceptron(16, 1), learning_rate=0.05).fit(
        data, until=until, folder=folder, resume=True, progress_bar=False
    )
    return weights(student)


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata, with torch 2.13
@pytest.mark.parametrize("kind", KINDS)
def test_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    stops = [8] if kind == "workers" else list(STOPS.values())  # each starts processes
    wanted = trained(KINDS[kind](), 16, tmp_path / "whole")
    assert (wanted - weights(perceptron(8, 0))).abs().max() > 0.05
    for stop in stops:
        for ahead in ({}, {"epochs": 99}) if stop == 8 else ({},):  # which makes the loop read one ahead
            folder = tmp_path / f"{stop}{len(ahead)}"
            trained(KINDS[kind](), stop, folder, **ahead)
            assert torch.equal(trained(KINDS[kind](), 16, folder, **ahead), wanted), (stop, ahead)


def test_stopped_twice_with_accumulation(tmp_path: Path) -> None:
    def run(steps: int, folder: Path) -> Tensor:
        student = perceptron(8, 0, dropout=0.3)
        data = DataLoader(Augmented(), BATCH, sampler=Order("NumPy's generator"))
        Reptile(student, perceptron(16, 1), accumulate=4).fit(
            data, until=steps, folder=folder, resume=True, progress_bar=False
        )
        return weights(student)

    wanted = run(7, tmp_path / "whole")
    for steps in (3, 4):
        run(steps, tmp_path / "broken")
    assert torch.equal(run(7, tmp_path / "broken"), wanted)


def test_what_cannot_be_found_again_is_said_before_the_first_step(tmp_path: Path) -> None:
    class Lines(IterableDataset[Tensor]):
        def __init__(self, lines: Any) -> None:
            self.lines = lines

        def __iter__(self) -> Iterator[Tensor]:
            return (X[i] for i in range(SIZE))

    def steps_before(data: Any) -> list[str]:
        student = perceptron(8, 0)
        student.register_forward_hook(lambda *_: pytest.fail("a step was made"))
        with pytest.warns(UserWarning, match="cannot be resumed exactly") as caught, pytest.raises(ZeroDivisionError):
            Reptile(student, perceptron(8, 1), optimizer=lambda _: 1 / 0).fit(  # type: ignore[arg-type,return-value]
                data, until=1, folder=tmp_path, progress_bar=False
            )
        return [str(warning.message) for warning in caught]

    (said,) = steps_before(DataLoader(Lines(iter("abc")), 2))
    assert "train.dataset.lines is an iterator (str_" in said
    with open(__file__, encoding="utf-8") as file:
        (said,) = steps_before(DataLoader(Lines(file), 2))
    assert "train.dataset.lines is an open file" in said
    (said,) = steps_before(DataLoader(X, 2, num_workers=1, persistent_workers=True))  # type: ignore[arg-type]
    assert "train has persistent workers" in said


def test_the_models_draw_does_not_change_the_data() -> None:
    """Two students, one of which draws random numbers, see the same samples."""
    seen: list[list[Tensor]] = []
    for dropout in (0.0, 0.5):
        student, batches = perceptron(8, 0, dropout), []
        student.register_forward_pre_hook(lambda module, inputs, batches=batches: batches.append(inputs[0]))
        data = DataLoader(Augmented(), BATCH, shuffle=True)
        Reptile(student, perceptron(16, 1)).fit(data, until=9, progress_bar=False)
        seen.append(batches)
    assert len(seen[0]) == 9
    assert all(map(torch.equal, *seen))


def test_an_evaluation_puts_the_data_s_generators_back() -> None:
    order = Order("NumPy's generator")
    data = DataLoader(X, BATCH, sampler=order)  # type: ignore[arg-type]
    reptile = Reptile(perceptron(8, 0), perceptron(8, 1))
    reptile.evaluate(data)
    assert order.numpy.random() == np.random.default_rng(3).random()


@pytest.mark.parametrize("name", ["data set", "sampler", "batch sampler", "sampler of a batch sampler", "iterable"])
def test_all_are_told_the_pass(name: str) -> None:
    told: list[int] = []

    class Told:
        def set_epoch(self, epoch: int) -> None:
            told.append(epoch)

    class Samples(Told, Dataset[Tensor]):
        __len__ = Augmented.__len__

        def __getitem__(self, i: int) -> Tensor:
            return X[i]

    class Indices(Told, Sampler[Any]):
        def __init__(self, batched: bool) -> None:
            self.batched = batched

        def __iter__(self) -> Iterator[Any]:
            return iter([[0, 1], [2, 3]] if self.batched else [0, 1, 2, 3])

        def __len__(self) -> int:
            return 2 if self.batched else 4

    class Iterable(Told):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(X[:4].split(2))

    data: Any = {
        "data set": lambda: DataLoader(Samples(), SIZE // 2),
        "sampler": lambda: DataLoader(X, 2, sampler=Indices(False)),  # type: ignore[arg-type]
        "batch sampler": lambda: DataLoader(X, batch_sampler=Indices(True)),  # type: ignore[arg-type]
        "sampler of a batch sampler": lambda: DataLoader(
            X,  # type: ignore[arg-type]
            batch_sampler=BatchSampler(Indices(False), 2, drop_last=False),
        ),
        "iterable": Iterable,
    }[name]()
    Reptile(perceptron(8, 0), perceptron(8, 1)).fit(data, until=6, progress_bar=False)
    assert told == [0, 1, 2]


def test_streams_train_whatever_they_know_of_their_length() -> None:
    class Unsized(Sampler[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter([[0, 1], [2, 3], [4]])

    def rows(data: Any, accumulate: int = 1) -> int:
        reptile = Reptile(perceptron(8, 0), perceptron(8, 1), accumulate=accumulate)
        return reptile.fit(data, data, until=Until(epochs=2), progress_bar=False).rows

    class Sized(Stream):
        def __len__(self) -> int:
            return SIZE

    for stream in (Stream, Sized):
        for accumulate in (1, 4):
            assert rows(DataLoader(stream(by_epoch=True), BATCH), accumulate) == 2 * SIZE
    assert rows(DataLoader(Stream(by_epoch=True), BATCH, num_workers=1)) == 2 * SIZE
    assert rows(DataLoader(X, batch_sampler=Unsized())) == 2 * 5  # type: ignore[arg-type]


def test_epochs_end_with_the_last_batch_of_a_pass(tmp_path: Path) -> None:
    """Also where accumulation divides the pass, and with a schedule over its steps."""
    for accumulate, steps in ((1, 12), (2, 6), (4, 4)):
        reptile = Reptile(perceptron(8, 0), perceptron(8, 1), accumulate=accumulate, schedule="linear")
        rates: list[float] = []
        result = reptile.fit(
            list(X.split(BATCH)),
            until=Until(epochs=2),
            progress_bar=False,
            callback=lambda values, rates=rates: rates.append(values["lr"]),
        )
        assert (result.steps, result.reason, result.rows) == (steps, "2 epochs", 2 * SIZE)
        assert rates == pytest.approx([1e-3 * (1 - step / steps) for step in range(1, steps + 1)])
    with pytest.raises(ValueError, match="no epochs of a known length"):
        Reptile(perceptron(8, 0), perceptron(8, 1), schedule="linear").fit(
            DataLoader(Stream(True), BATCH), until=Until(epochs=2), progress_bar=False
        )


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")
def test_a_place_is_found_in_what_loads_without_running_code(tmp_path: Path) -> None:
    for name, kind in KINDS.items():
        if name == "torchdata's" and importlib.util.find_spec("torchdata") is None:
            continue
        place = Place(kind(), look_ahead=True)
        place.take(2)
        torch.save(place.state_dict(), tmp_path / "place")
        torch.load(tmp_path / "place", weights_only=True)


def test_states_are_found_in_functions_and_what_they_hold() -> None:
    generator = torch.Generator().manual_seed(0)

    class Transform:
        def __init__(self) -> None:
            self.numbers = {"noise": [generator]}

        def __call__(self, batch: Any) -> Tensor:
            return torch.stack(batch) + torch.randn(6, generator=generator)

    def closed_over(batch: Any) -> Tensor:
        return torch.stack(batch) + torch.randn(6, generator=generator)

    for collate in (Transform(), Transform().__call__, closed_over):
        data = DataLoader(X, BATCH, collate_fn=collate)  # type: ignore[arg-type,var-annotated]
        state = DataState("train", data)
        saved, first = state.save(), next(iter(data))
        state.restore(saved)
        assert torch.equal(next(iter(data)), first)


class Counted:
    """Yields what the number of its passes says."""

    def __init__(self) -> None:
        self.passes = 0
        self.seen: list[float] = []

    def __iter__(self) -> Iterator[Tensor]:
        self.passes += 1
        for i in range(3):
            yield torch.full((2, 6), self.passes * 10.0 + i)


class Shuffled(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.items = [torch.full((2, 6), float(i)) for i in range(4)]

    def __iter__(self) -> Iterator[Tensor]:
        random.shuffle(self.items)
        return iter(list(self.items))


def seen_by_a_student(run: Any) -> list[float]:
    student, seen = perceptron(8, 0), []
    student.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0][0, 0].item()) if torch.is_grad_enabled() else None
    )
    run(lambda: Reptile(student, perceptron(8, 1)))
    return seen


@pytest.mark.parametrize("kind", [Counted, Shuffled])
def test_an_evaluation_on_the_data_of_the_training_changes_nothing(kind: type[Counted]) -> None:
    data, shared = kind(), kind()
    wanted = seen_by_a_student(lambda make: make().fit(data, until=11, progress_bar=False))
    found = seen_by_a_student(lambda make: make().fit(shared, shared, until=11, eval_every=2, progress_bar=False))
    assert found == wanted
    loader: Any = DataLoader(X, 2, num_workers=1, persistent_workers=True)  # type: ignore[arg-type,var-annotated]
    with pytest.raises(ValueError, match="Pass two loaders"):
        Reptile(perceptron(8, 0), perceptron(8, 1)).fit(loader, loader, until=1, progress_bar=False)


@pytest.mark.parametrize("kind", [Counted, Shuffled])
@pytest.mark.parametrize("stop", [2, 4, 5, 8])
def test_a_run_may_go_on_in_the_process_it_was_stopped_in(kind: type[Counted], stop: int, tmp_path: Path) -> None:
    data, stopped = kind(), kind()

    def in_two(make: Any) -> None:
        for steps in (stop, 11):
            make().fit(stopped, until=steps, folder=tmp_path, resume=True, progress_bar=False)

    wanted = seen_by_a_student(lambda make: make().fit(data, until=11, progress_bar=False))
    assert seen_by_a_student(in_two) == wanted


def test_patience_that_begins_on_resuming_has_no_best_student_yet(tmp_path: Path) -> None:
    data, student = list(X.split(BATCH)), perceptron(8, 0)
    common: dict[str, Any] = {"eval_every": 5, "folder": tmp_path, "resume": True, "progress_bar": False}
    Reptile(student, perceptron(16, 1), learning_rate=0.05).fit(data, data, until=20, **common)
    worse = Reptile(student, perceptron(16, 1), optimizer=lambda p: torch.optim.SGD(p, lr=30.0), clip=None)
    with pytest.MonkeyPatch.context() as patch:  # another optimizer's state
        patch.setattr(torch.optim.SGD, "load_state_dict", lambda *_: None)
        result = worse.fit(data, data, until=Until(patience=3, steps=60), **common)
    assert worse.evaluate(data)["loss"] == pytest.approx(result.metrics["loss"], rel=1e-5)
    assert (tmp_path / "checkpoints").exists()
