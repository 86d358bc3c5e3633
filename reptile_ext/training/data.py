"""What the loop samples from: endless passes over the data, from a place that can be kept and found again exactly.

The data have random numbers of their own. What a loader, a sampler or an augmentation draws, whenever it draws it, does
not depend on what the models draw (dropout), and the pass can be read again without the models.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import random
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

Number = (bool, int, float, str, type(None))


def check_data(name: str, data: Any) -> None:
    """Raise a TypeError for what yields samples, or nothing, and not batches."""
    kind = type(data).__name__
    if isinstance(data, Dataset) or type(data).__module__.startswith("datasets."):
        # The only place to see that a data set is meant: it can be iterated over, sample by sample.
        if isinstance(data, IterableDataset):
            way = f"DataLoader({name}, batch_size=32), or batch_size=None if it yields batches itself"
        else:
            way = f"DataLoader({name}, batch_size=32, shuffle=True)"
        raise TypeError(f"{name} must yield batches, and a {kind} yields samples: pass {way}")
    if (
        isinstance(data, (str, bytes, Mapping, Tensor, np.ndarray, nn.Module))
        or _is_a_pair(data)
        or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))
    ):
        raise TypeError(f"{name} must yield batches, as a DataLoader does or a list such as [batch]; got a {kind}")


def _is_a_pair(data: Any) -> bool:
    """Whether this is (inputs, labels) of one batch, and not a tuple of batches."""
    if not (isinstance(data, tuple) and len(data) == 2 and all(isinstance(x, Tensor) for x in data)):
        return False
    return bool(data[0].ndim != data[1].ndim or data[0].dtype != data[1].dtype)


class Sampler:
    """Micro-batches from endless passes over `data`, from a place that can be saved and found again exactly.

    What is saved is the state of all that the data draw on at the start of the current pass, and how many micro-batches
    were taken since: to come back, the pass is started again from there and the micro-batches already used are read
    and dropped. That costs reading them, and is exact for any loader, shuffle or augmentation.

    seed: of the data's random numbers.
    look_ahead: read one micro-batch ahead, so that `passes` counts a pass as soon as its last is taken.
    share: (own number, number of processes) where the processes take turns with the micro-batches of `data`.
    """

    def __init__(
        self, data: Iterable[Any], *, seed: int = 0, look_ahead: bool = False, share: tuple[int, int] = (0, 1)
    ) -> None:
        self.passes = 0  # that have ended
        self._data = data
        self._state = DataState("train", data)
        self._look_ahead = look_ahead
        self._share = share
        self._taken = 0
        self._start: dict[str, Any] = {}
        self._iterator: Iterator[Any] | None = None
        self._ahead: list[Any] = []
        outside = _numbers()
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        self._numbers = _numbers()
        _set_numbers(outside)

    @property
    def problems(self) -> list[str]:
        """Why the place cannot be found again exactly; empty if it can."""
        return self._state.problems

    def take(self, count: int) -> list[Any]:
        """The next `count` micro-batches, fewer at the end of a pass, never none."""
        with self._own_numbers():
            while True:
                iterator = self._start_pass() if self._iterator is None else self._iterator
                window = self._ahead + list(itertools.islice(iterator, count - len(self._ahead)))
                self._ahead = []
                self._taken += len(window)
                ended = len(window) < count
                if not ended and self._look_ahead:
                    self._ahead = list(itertools.islice(iterator, 1))
                    ended = not self._ahead
                if ended:
                    self._iterator = None
                    self.passes += 1
                if window:
                    return window
                if self._taken == 0:
                    raise ValueError(
                        f"train must yield micro-batches on every pass; got none on pass {self.passes} "
                        "(a generator can be read only once: pass a DataLoader or a list)"
                    )

    def _start_pass(self) -> Iterator[Any]:
        self._taken, self._ahead = 0, []
        self._state.set_epoch(self.passes)
        self._start = {"numbers": _numbers(), "found": self._state.save()}
        self._iterator = iter(self._data) if self._share[1] == 1 else take_turns(self._data, *self._share)
        return self._iterator

    @contextlib.contextmanager
    def _own_numbers(self) -> Iterator[None]:
        outside = _numbers()
        _set_numbers(self._numbers)
        try:
            yield
        finally:
            self._numbers = _numbers()
            _set_numbers(outside)

    def state_dict(self) -> dict[str, Any]:
        start = dict(self._start)
        if start:
            start["numbers"] = _loadable(start["numbers"])
            start["found"] = self._state.of_interest(start["found"])
        state = {"passes": self.passes, "taken": self._taken, "open": self._iterator is not None, "start": start}
        return state | {"numbers": _loadable(self._numbers), "found": self._state.of_interest(self._state.save())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place."""
        self.passes, self._iterator, self._ahead = state["passes"], None, []
        self._numbers = _from_loadable(state["numbers"])
        if not state["open"]:
            self._state.restore(state["found"])
            return
        with self._own_numbers():  # which come out as they were
            _set_numbers(_from_loadable(state["start"]["numbers"]))
            self._state.restore(state["start"]["found"])
            for _ in itertools.islice(self._start_pass(), state["taken"]):
                self._taken += 1


def take_turns(data: Iterable[Any], own: int, processes: int) -> Iterator[Any]:
    """Every process its micro-batch of each round, the same number in all: the last round is filled up from the
    start of the pass, as Accelerate does with a DataLoader's."""
    first: list[Any] = []
    iterator = iter(data)
    while turn := list(itertools.islice(iterator, processes)):
        first += turn[: processes - len(first)]
        while len(turn) < processes:
            turn += first[: processes - len(turn)]
        yield turn[own]


class DataState:
    """All that data draw on which is not the same in each pass, as far as it can be found from outside.

    Looked for in a loader, its sampler, batch sampler, data set and collate function, and in what they hold: random
    generators of torch, NumPy and Python, what has a `state_dict`, numbers that change, lists that are put in another
    order. `problems` names what cannot be saved. Whatever has `set_epoch` is told the number of the pass.
    """

    def __init__(self, name: str, data: Any) -> None:
        self.problems: list[str] = []
        self._name = name
        self._generators: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {}
        self._numbers: dict[str, tuple[Any, str, Any]] = {}  # path → (object, name of the attribute, its first value)
        self._lists: dict[str, tuple[list[Any], list[Any]]] = {}  # path → (list, its first content)
        self._epochs: list[Callable[[int], object]] = []
        self._seen: dict[int, Any] = {}
        self._look_at(name, data)

    def set_epoch(self, epoch: int) -> None:
        for tell in self._epochs:
            tell(epoch)

    def save(self) -> dict[str, Any]:
        """All of it as it is now."""
        return {
            "generators": {path: get() for path, (get, _) in self._generators.items()},
            "numbers": {path: vars(holder).get(name) for path, (holder, name, _) in self._numbers.items()},
            "orders": {path: _order_of(*of) for path, of in self._lists.items()},
        }

    def of_interest(self, state: dict[str, Any]) -> dict[str, Any]:
        """A state without what has never changed, which a resumed run may want to set otherwise."""
        now = self.save()

        def changed(path: str) -> bool:
            first = self._numbers[path][2]
            return bool(state["numbers"][path] != first or now["numbers"][path] != first)

        numbers = {path: x for path, x in state["numbers"].items() if isinstance(x, Number) and changed(path)}
        orders = {path: x for path, x in state["orders"].items() if x is not None}
        return {"generators": state["generators"], "numbers": numbers, "orders": orders}

    def restore(self, state: dict[str, Any]) -> None:
        self._restore_values(state)
        for path, (current, first) in self._lists.items():
            order = state["orders"].get(path)
            if order is not None:
                current[:] = [first[i] for i in order.tolist()]
            elif _order_of(current, first) is not None:  # it was in its first order then
                current[:] = first

    def _restore_values(self, state: dict[str, Any]) -> None:
        for path, value in state["generators"].items():
            if path in self._generators:
                self._generators[path][1](value)
        for path, value in state["numbers"].items():
            if path in self._numbers:
                holder, name, _ = self._numbers[path]
                setattr(holder, name, value)

    def hold(self) -> Callable[[], None]:
        """A function that puts all of it back to what it is now."""
        state = self.save()
        lists = [(current, list(current)) for current, _ in self._lists.values()]

        def put_back() -> None:
            self._restore_values(state)
            for current, before in lists:
                if _order_of(current, before) is not None:
                    current[:] = before

        return put_back

    def _look_at(self, path: str, x: Any) -> None:
        if id(x) in self._seen or len(self._seen) > 10_000 or isinstance(x, (*Number, bytes, Tensor, np.ndarray, type)):
            return
        self._seen[id(x)] = x  # kept, so that no other object gets its id
        if callable(getattr(x, "set_epoch", None)):
            self._epochs.append(x.set_epoch)
        if type(x).__module__.startswith(_OTHERS):
            return
        if isinstance(x, DataLoader):
            self._look_at_loader(path, x)
        elif self._is_generator(path, x):
            pass
        elif isinstance(x, functools.partial):
            self._look_at_all(path, {"func": x.func, **dict(enumerate(x.args)), **x.keywords})
        elif hasattr(x, "__self__") and hasattr(x, "__func__"):
            self._look_at(path, x.__self__)
        elif callable(x) and hasattr(x, "__closure__"):
            names = x.__code__.co_freevars
            self._look_at_all(path, dict(zip(names, map(_content, x.__closure__ or ()), strict=False)))
        elif isinstance(x, dict):
            self._look_at_all(path, dict(itertools.islice(x.items(), 50)))
        elif isinstance(x, (list, tuple, set, frozenset)):
            self._look_at_all(path, dict(enumerate(itertools.islice(x, 50))))
        elif isinstance(x, io.IOBase):
            self.problems.append(f"{path} is an open file")
        elif hasattr(x, "__next__"):
            self.problems.append(f"{path} is an iterator ({type(x).__name__}), which cannot be started again")
        else:
            self._look_at_attributes(path, x)

    def _look_at_attributes(self, path: str, x: Any) -> None:
        attributes = getattr(x, "__dict__", {})
        for name, value in attributes.items():
            if isinstance(value, Number):
                self._numbers[f"{path}.{name}"] = (x, name, _first_seen(x, name, value))
            elif isinstance(value, list):
                self._lists[f"{path}.{name}"] = (value, _first_seen(x, name, list(value)))
        self._look_at_all(path, attributes)

    def _look_at_all(self, path: str, attributes: dict[Any, Any]) -> None:
        for name, value in attributes.items():
            self._look_at(f"{path}[{name}]" if isinstance(name, int) else f"{path}.{name}", value)

    def _look_at_loader(self, path: str, loader: Any) -> None:
        parts = ("generator", "batch_sampler", "sampler", "dataset", "collate_fn", "synchronized_generator")
        self._look_at_all(path, {part: getattr(loader, part, None) for part in parts})
        if getattr(loader, "persistent_workers", False):
            self.problems.append(f"{path} has persistent workers, whose random numbers go on from pass to pass")

    def _is_generator(self, path: str, x: Any) -> bool:
        found: tuple[Callable[[], Any], Callable[[Any], object]]
        if isinstance(x, torch.Generator):
            found = x.get_state, x.set_state
        elif isinstance(x, random.Random):
            found = x.getstate, x.setstate
        elif isinstance(x, np.random.Generator):
            bits = x.bit_generator
            found = lambda: _plain(bits.state), lambda state: setattr(bits, "state", state)
        elif isinstance(x, np.random.RandomState):
            found = lambda: _plain(x.get_state(legacy=False)), x.set_state
        elif _has_state(x) and not isinstance(x, nn.Module):
            found = x.state_dict, x.load_state_dict
        else:
            return False
        self._generators[path] = found
        return True


# Libraries whose objects are data, or whose order depends on what `set_epoch` has told them alone.
_OTHERS = (
    *("datasets.", "pyarrow", "pandas", "PIL", "transformers.", "tokenizers", "torch.nn", "torchvision.transforms"),
    "reptile_ext.cache.reader",
)


# Attributes of data as this process first saw them: a run may be resumed in the process in which it was stopped.
_FIRST: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()


def _first_seen(holder: Any, name: str, value: Any) -> Any:
    try:
        return _FIRST.setdefault(holder, {}).setdefault(name, value)
    except TypeError:  # cannot be hashed, or not be referred to weakly
        return value


def _has_state(x: Any) -> bool:
    if type(x).__module__.startswith("accelerate."):  # its loaders have the methods, but not always a state
        return False
    return callable(getattr(x, "state_dict", None)) and callable(getattr(x, "load_state_dict", None))


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _plain(state: Any) -> Any:
    """A state of NumPy's in types that load without executing code."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, (np.ndarray, np.generic)) else state


def _order_of(current: Sequence[Any], first: Sequence[Any]) -> Tensor | None:
    """Where in `first` the elements of `current` were; None if they are there as they were, or are others."""
    if len(current) != len(first) or all(a is b for a, b in zip(current, first, strict=True)):
        return None
    places: dict[int, list[int]] = {}
    for i, x in enumerate(first):
        places.setdefault(id(x), []).append(i)
    try:
        return torch.tensor([places[id(x)].pop() for x in current])
    except (KeyError, IndexError):
        return None


def random_state() -> dict[str, Any]:
    """Every random-number state of the process, in types that load without executing code."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return _loadable(_numbers()) | {"cuda": devices}


def set_random_state(state: dict[str, Any]) -> None:
    """Put every random-number state back to what `random_state` returned."""
    _set_numbers(_from_loadable(state))
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def _numbers() -> tuple[Any, ...]:
    """The states of the host's generators as they give them, which costs microseconds."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()


def _set_numbers(numbers: tuple[Any, ...]) -> None:
    python, numpy, of_torch = numbers
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(of_torch)


def _loadable(numbers: tuple[Any, ...]) -> dict[str, Any]:
    python, (_, keys, position, has_gauss, gauss), of_torch = numbers
    numpy = [torch.from_numpy(np.asarray(keys, dtype=np.int64)), int(position), int(has_gauss), float(gauss)]
    return {"python": python, "numpy": numpy, "torch": of_torch}


def _from_loadable(state: dict[str, Any]) -> tuple[Any, ...]:
    keys, position, has_gauss, gauss = state["numpy"]
    return state["python"], ("MT19937", keys.numpy().astype(np.uint32), position, has_gauss, gauss), state["torch"]
