"""What a run leaves on disk: any module's weights, checkpoints that no kill, full disk or flipped bit can spoil."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from reptile_ext.files import write_atomically
from reptile_ext.training import Reptile, Until
from reptile_ext.training.checkpoint import (
    Log,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    read_log,
    save_checkpoint,
)
from reptile_ext.training.weights import copy_state, load_weights, put_state, save_weights, write_state


class Remembering(nn.Module):
    """A module with an extra state of any kind."""

    def __init__(self, extra: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


class Holder(nn.Module):
    """Parameters as they are given, by name."""

    def __init__(self, **parameters: Tensor) -> None:
        super().__init__()
        for name, value in parameters.items():
            is_leaf = value.is_floating_point()
            self.register_parameter(name, nn.Parameter(value)) if is_leaf else self.register_buffer(name, value)


def packed_rnn() -> nn.Module:
    """What `flatten_parameters` leaves on a GPU: every weight is a slice of one buffer."""
    rnn = nn.LSTM(3, 4, num_layers=2, bidirectional=True)
    buffer = torch.cat([parameter.detach().flatten() for parameter in rnn.parameters()] + [torch.zeros(5)])
    start = 0
    for parameter in rnn.parameters():
        parameter.data = buffer[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()
    return rnn


def tied(count: int) -> nn.Module:
    module = nn.Sequential(*[nn.Linear(4, 4) for _ in range(count)])
    for other in module[1:]:
        other.weight = module[0].weight
    return module


def tied_to(view: Callable[[Tensor], Tensor]) -> nn.Module:
    whole = torch.randn(4, 4)
    return Holder(whole=whole, part=view(whole))


def of_all_dtypes() -> nn.Module:
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128"
    return Holder(
        **{
            f"of_{name}": (torch.randn(3, 2) * 9).to(getattr(torch, name))
            for name in names.split()
            if "complex" not in name
        },
        of_complex64=torch.randn(2, dtype=torch.complex64),
        of_complex128=torch.randn(2, dtype=torch.complex128),
    )


EXTRA = {"step": 3, "names": ["a", "b"], "values": torch.arange(3.0), "nothing": None}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
    "packed RNN": packed_rnn,
    "two names": lambda: tied(2),
    "three names": lambda: tied(3),
    "slice of another": lambda: tied_to(lambda whole: whole[1:3]),
    "overlapping slices": lambda: (lambda x: Holder(a=x[:7], b=x[4:], c=x[4:]))(torch.randn(10)),
    "transposed": lambda: tied_to(lambda whole: whole.t()),
    "reshaped": lambda: tied_to(lambda whole: whole.view(2, 8)),
    "not contiguous": lambda: Holder(a=torch.randn(3, 5).t(), b=torch.randn(8)[::2]),
    "channels last": lambda: nn.Conv2d(3, 2, 3).to(memory_format=torch.channels_last),
    "slice of a large tensor": lambda: Holder(a=torch.randn(1000)[3:5]),
    "empty": lambda: Holder(a=torch.randn(0), b=torch.randn(0), c=torch.randn(2, 0), d=torch.tensor(1.5)),
    "dtypes": of_all_dtypes,
    "extra state": lambda: nn.Sequential(Remembering(copy.deepcopy(EXTRA)), Remembering(None), Remembering(None)),
    "tensor as extra state": lambda: nn.Sequential(Remembering(torch.randn(3)), Remembering(torch.randn(2, 2).t())),
}
PLAIN = ("plain", "two names", "three names", "channels last")  # that load_model can load at all


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def sharing(module: nn.Module) -> list[tuple[Any, ...]]:
    """Where each tensor lies, which must not change."""
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [(name, tensor.data_ptr(), tensor.stride()) for name, tensor in tensors]


def damaged(path: Path, position: int = -1, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


# ------------------------------------------------------------------------------------------------ weights


@pytest.mark.parametrize("name", MODULES)
def test_weights_of_any_module_come_back(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    wanted = copy.deepcopy(dict(module.state_dict()))
    path = tmp_path / "weights.safetensors"
    save_weights(path, module)
    torch.manual_seed(1)
    other = MODULES[name]()
    if isinstance(other, nn.Sequential) and isinstance(other[0], Remembering):
        other[0].extra = None
    before = sharing(other)
    assert name == "empty" or not same(dict(other.state_dict()), wanted)
    load_weights(path, other)
    assert same(dict(other.state_dict()), wanted)
    assert sharing(other) == before
    if name in PLAIN:
        torch.manual_seed(1)
        plain = MODULES[name]()
        safetensors.torch.load_model(plain, path)
        assert same(dict(plain.state_dict()), wanted)

    again = tmp_path / "again"
    save_weights(again, other)
    assert again.read_bytes() == path.read_bytes()
    write_state(again, copy_state(module))  # how the best student gets there
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", MODULES)
def test_a_copied_state_stays_and_can_be_put_back(name: str) -> None:
    module = MODULES[name]()
    wanted, before = copy.deepcopy(dict(module.state_dict())), sharing(module)
    state = copy_state(module)
    for _ in range(2):  # what is put back must not be the copy itself
        with torch.no_grad():
            for tensor in [*module.parameters(), *module.buffers()]:
                tensor.zero_()
        for part in module.modules():
            if isinstance(part, Remembering):
                if isinstance(part.extra, dict):
                    part.extra["values"].zero_()
                elif isinstance(part.extra, Tensor):
                    part.extra.zero_()
        put_state(module, state)
        assert same(dict(module.state_dict()), wanted)
        assert sharing(module) == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, whose cuDNN packs the weights")
def test_weights_that_cudnn_has_packed_come_back(tmp_path: Path) -> None:
    rnn, other = nn.LSTM(3, 4, num_layers=2).cuda(), nn.LSTM(3, 4, num_layers=2).cuda()
    assert len({parameter.untyped_storage().data_ptr() for parameter in rnn.parameters()}) == 1
    save_weights(tmp_path / "weights", rnn)
    before = sharing(other)
    load_weights(tmp_path / "weights", other)
    assert same(dict(other.state_dict()), dict(rnn.state_dict()))
    assert sharing(other) == before


def test_a_tied_weight_is_stored_once_and_the_metadata_says_so(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    save_weights(path, tied(3))
    with safe_open(path, framework="pt") as file:
        names, metadata = set(file.keys()), file.metadata()
    assert names == {"0.weight", "0.bias", "1.bias", "2.bias"}
    assert (metadata["1.weight"], metadata["2.weight"]) == ("0.weight", "0.weight")


def test_files_of_save_model_and_of_programs_that_drop_ties_are_read(tmp_path: Path) -> None:
    path, module = tmp_path / "weights", tied(3)
    wanted = copy.deepcopy(dict(module.state_dict()))
    for dropped in (("1.weight", "2.weight"), ("0.weight", "2.weight")):
        state = {name: tensor for name, tensor in module.state_dict().items() if name not in dropped}
        safetensors.torch.save_file(state, path)
        other = tied(3)
        load_weights(path, other)
        assert same(dict(other.state_dict()), wanted)
    safetensors.torch.save_model(module, str(path))
    apart = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])  # not tied: the metadata says what the others are
    load_weights(path, apart)
    assert same(dict(apart.state_dict()), wanted)


@pytest.mark.parametrize("saved", ["plain", "whole", "part"])
@pytest.mark.parametrize("loaded", ["plain", "whole", "part"])
def test_compiled_and_plain_modules_have_the_same_files(saved: str, loaded: str, tmp_path: Path) -> None:
    def module(kind: str) -> Any:
        inner = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3)))
        if kind == "part":
            inner[1] = torch.compile(inner[1], backend="eager")
        return torch.compile(inner, backend="eager") if kind == "whole" else inner

    first, second = module(saved), module(loaded)
    path = tmp_path / "weights"
    save_weights(path, first)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"0.weight", "0.bias", "1.0.weight", "1.0.bias"}
    load_weights(path, second)
    assert [p.tolist() for p in second.parameters()] == [p.tolist() for p in first.parameters()]
    put_state(first, {name: torch.zeros_like(tensor) for name, tensor in copy_state(second).items()})
    assert all(not parameter.any() for parameter in first.parameters())


def test_weights_of_another_module_are_refused_before_any_change(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    save_weights(path, nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2, bias=False), nn.Linear(5, 1)))
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(
        ValueError,
        match=r"weights.safetensors does not fit Sequential: '1.bias' is missing, '2.bias' is unexpected, '2",
    ):
        load_weights(path, module)
    with pytest.raises(ValueError, match=r"'0.weight' has shape \(2, 3\), expected \(4, 3\)"):
        load_weights(path, nn.Sequential(nn.Linear(3, 4), nn.Linear(2, 2), nn.Linear(5, 1)))
    save_weights(path, nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    with pytest.raises(ValueError, match=r"'0.weight' and '1.weight' are one tensor in the module, and differ"):
        load_weights(path, tied(2))
    assert same(dict(module.state_dict()), dict(before))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_weights(tmp_path / "nowhere", module)


class Custom:
    pass


@pytest.mark.parametrize("extra", [Custom(), lambda: None], ids=["object", "function"])
def test_an_extra_state_that_needs_code_is_refused_before_the_first_step(extra: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'0._extra_state' \(a \w+\) cannot be"):
        fit(nn.Sequential(Remembering(extra)), tmp_path, 1)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_extra_state_executes_no_code(tmp_path: Path) -> None:
    path, module = tmp_path / "weights", Remembering({"a": 1})
    save_weights(path, module)
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "reptile_ext.sha256"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    torch.save(Custom(), tmp_path / "evil")
    tensors["_extra_state"] = torch.tensor(list((tmp_path / "evil").read_bytes()), dtype=torch.uint8)
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match="weights: '_extra_state' cannot be read without executing code"):
        load_weights(path, module)
    assert module.extra == {"a": 1}


def test_any_flipped_bit_of_a_weights_file_is_noticed_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    module = nn.Sequential(tied(2), Remembering(3))
    save_weights(path, module)
    whole, wanted = path.read_bytes(), copy.deepcopy(dict(module.state_dict()))
    noticed = 0
    for position in range(0, len(whole), 3):
        damaged(path, position, 1 << position % 8)
        try:
            load_weights(path, module)
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            noticed += 1
        assert same(dict(module.state_dict()), wanted), position
        path.write_bytes(whole)
    assert noticed > len(whole) / 3 - 100
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"weights.safetensors is damaged"):
            load_weights(path, module)


# ------------------------------------------------------------------------------------------------ checkpoints


def student_and_teacher() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    return student, nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))


def loader(workers: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(48, 6, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs.argmax(-1) % 4), 8, shuffle=True, num_workers=workers)


def fit(student: nn.Module | None, folder: Path, steps: int, **keywords: Any) -> nn.Module:
    own, teacher = student_and_teacher()
    reptile = Reptile(student or own, teacher, hard_weight=0.3)
    keywords = {"checkpoint_every": 2, "eval_every": 3, "log_every": 1, "progress_bar": False, **keywords}
    reptile.fit(loader(), loader(), until=Until(steps=steps, patience=100), folder=folder, **keywords)
    return reptile.student


def steps_of(folder: Path) -> list[int]:
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir())


def timeless(folder: Path) -> list[dict[str, Any]]:
    lines = read_log(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def assert_same_run(broken: Path, whole: Path) -> None:
    """The same bits in all that a run is for, and nothing left over."""
    assert steps_of(broken) == steps_of(whole)
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*.safetensors"))]
    assert len(names) == 5  # two in each of two checkpoints, and the result
    for name in names:
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), name
    assert timeless(broken) == timeless(whole)
    assert json.dumps(timeless(broken))  # plain numbers only
    assert not list(broken.rglob("*.tmp-*"))


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    fit(None, tmp_path, 2)
    with pytest.raises(FileExistsError, match="holds a run at step 2: pass resume=True"):
        fit(None, tmp_path, 2)
    for folder in (tmp_path, None):
        with pytest.raises(ValueError, match="resume must be True, False or 'last_good'; got 'newest'"):
            fit(None, folder, 2, resume="newest")  # type: ignore[arg-type]


def test_the_newest_two_checkpoints_are_kept(tmp_path: Path) -> None:
    fit(None, tmp_path, 7)
    assert steps_of(tmp_path) == [6, 7]
    student, _ = student_and_teacher()
    assert save_checkpoint(tmp_path, 8, student, {}, {}, keep=3).name == "000000008"
    assert steps_of(tmp_path) == [6, 7, 8]
    save_checkpoint(tmp_path, 7, student, {}, {})  # of a run that went back: what is later is of another future
    assert steps_of(tmp_path) == [6, 7]
    with pytest.raises(ValueError, match="keep must be at least 1; got 0"):
        save_checkpoint(tmp_path, 9, student, {}, {}, keep=0)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(OSError, match="file was not written: disk full"):
        write_atomically(path, fail)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


def test_a_failed_checkpoint_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    student, _ = student_and_teacher()
    save_checkpoint(tmp_path, 1, student, {}, {})
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match=r"step 2 was not written to .*: disk full. That of step 1 is whole, and resume="):
        save_checkpoint(tmp_path, 2, student, {}, {})
    assert steps_of(tmp_path) == [1]


def test_the_log_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = Log(path)
    log.write(step=1)
    position = log.position
    log.write(step=2)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_log(path)] == [1, 2]
    Log(path, position).write(step=2, again=True)
    assert read_log(path) == [{"step": 1}, {"step": 2, "again": True}]
    os.truncate(path, position + 3)  # shorter than the checkpoint says: no line is glued to half of another
    Log(path, 1000).write(step=3)
    assert read_log(path) == [{"step": 1}, {"step": 3}]


def test_a_loss_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path) -> None:
    bad = [(torch.full((4, 6), torch.nan), torch.zeros(4, dtype=torch.long))]
    student, teacher = student_and_teacher()
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        Reptile(student, teacher).fit(bad, until=Until(steps=1), folder=tmp_path, progress_bar=False)
    assert latest_checkpoint(tmp_path) is None


def test_the_best_student_comes_back_through_a_checkpoint_with_its_ties_and_extra_state(tmp_path: Path) -> None:
    def student() -> nn.Module:
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), Extra(6, 4))
        module[1].weight = module[0].weight
        return module

    whole = fit(student(), tmp_path / "whole", 8)
    broken = tmp_path / "broken"
    fit(student(), broken, 6)
    resumed = fit(student(), broken, 8, resume=True)
    assert same(dict(resumed.state_dict()), dict(whole.state_dict()))
    assert resumed[0].weight is resumed[1].weight  # type: ignore[index]
    assert resumed[2].calls > 0  # type: ignore[index]
    assert_same_run(broken, tmp_path / "whole")


class Extra(nn.Linear):
    """Counts its calls, in an extra state."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.training
        return super().forward(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


# ------------------------------------------------------------------------------------------------ damage


def delete(path: Path) -> None:
    path.unlink()


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip_first(path: Path) -> None:
    damaged(path, 0)


def flip_middle(path: Path) -> None:
    damaged(path, path.stat().st_size // 2)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 5 steps, with the checkpoints of steps 4 and 5."""
    folder = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the tests: other sums, other bits
    fit(None, folder, 5)
    torch.set_num_threads(threads)
    return folder


def copied(folder: Path, to: Path) -> Path:
    return Path(subprocess.run(["cp", "-r", f"{folder}/.", to], check=True).args[-1])


@pytest.mark.parametrize("damage", [delete, shorten, empty, lengthen, flip_first, flip_middle])
@pytest.mark.parametrize("name", ["student.safetensors", "best.safetensors", "state.pt", "manifest.json"])
def test_a_damaged_file_is_named_and_the_one_before_is_as_good(
    name: str, damage: Callable[[Path], None], finished: Path, tmp_path: Path
) -> None:
    folder = copied(finished, tmp_path)
    path = folder / "checkpoints" / "000000005" / name
    size = path.stat().st_size
    damage(path)
    wrong = {
        delete: "is missing",
        shorten: f"has {size - 1} bytes, expected {size}",
        empty: f"has 0 bytes, expected {size}",
        lengthen: f"has {size + 1} bytes, expected {size}",
        flip_first: "differs from that in manifest.json",
        flip_middle: "differs from that in manifest.json",
    }[damage]
    student, _ = student_and_teacher()
    before = copy.deepcopy(student.state_dict())
    if (name, damage) == ("manifest.json", shorten):  # its last newline
        load_checkpoint(path.parent, student)
        return
    with pytest.raises(ValueError, match='resume="last_good" goes on from the newest one that is whole') as caught:
        fit(student, folder, 7, resume=True)
    assert name in str(caught.value)
    assert wrong in str(caught.value) or name == "manifest.json"
    assert same(dict(student.state_dict()), dict(before))

    with pytest.warns(UserWarning, match=rf"goes on from step 4, as .*{name}"):
        fit(student, folder, 7, resume="last_good")
    unbroken = fit(None, tmp_path / "unbroken", 7)
    assert same(dict(student.state_dict()), dict(unbroken.state_dict()))
    assert steps_of(folder) == [6, 7]


def test_without_any_whole_checkpoint_nothing_is_begun_anew(finished: Path, tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "last_good") is None
    folder = copied(finished, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_checkpoint(folder, "last_good") == folder / "checkpoints" / "000000005"
    delete(folder / "checkpoints" / "000000005" / "state.pt")
    damaged(folder / "checkpoints" / "000000004" / "state.pt")
    with pytest.raises(ValueError, match=r"no whole checkpoint in .*5/state.pt is missing; .*4/state.pt differs"):
        fit(None, folder, 7, resume="last_good")


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 2}, "has format 2, expected 1"), ({"step": 4}, "is of step 4, expected 5"), ({"files": []}, "read")],
)
def test_a_manifest_of_something_else_is_refused(
    change: dict[str, Any], message: str, finished: Path, tmp_path: Path
) -> None:
    path = copied(finished, tmp_path) / "checkpoints" / "000000005" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(path.parent, student_and_teacher()[0])


def test_a_checkpoint_of_before_there_were_manifests_is_taken(finished: Path, tmp_path: Path) -> None:
    folder = copied(finished, tmp_path)
    for checkpoint in (folder / "checkpoints").iterdir():
        (checkpoint / "manifest.json").unlink()
        for name in ("student.safetensors", "best.safetensors"):
            safetensors.torch.save_file(safetensors.torch.load_file(checkpoint / name), checkpoint / name)
    student = fit(None, folder, 7, resume=True)
    assert same(dict(student.state_dict()), dict(fit(None, tmp_path / "unbroken", 7).state_dict()))
    os.truncate(folder / "checkpoints" / "000000007" / "state.pt", 100)
    delete(folder / "checkpoints" / "000000007" / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest.json is missing"):
        fit(None, folder, 9, resume=True)


def test_an_old_checkpoint_whose_files_cannot_be_read_is_named(finished: Path, tmp_path: Path) -> None:
    checkpoint = copied(finished, tmp_path) / "checkpoints" / "000000005"
    student, _ = student_and_teacher()
    safetensors.torch.save_model(student, str(checkpoint / "student.safetensors"))
    delete(checkpoint / "manifest.json")
    for name in ("state.pt", "student.safetensors"):
        os.truncate(checkpoint / name, 50)
        with pytest.raises(ValueError, match=rf"{name} cannot be read"):
            load_checkpoint(checkpoint, student)
        delete(checkpoint / name)
        with pytest.raises(ValueError, match=rf"{name} is missing"):
            load_checkpoint(checkpoint, student)
        (checkpoint / name).write_bytes((tmp_path / "checkpoints" / "000000004" / name).read_bytes())


# ------------------------------------------------------------------------------------------------ kills


# A run with everything that has a state: shuffling, dropout, random augmentation, momentum, schedule, accumulation that
# does not divide the pass, evaluation and the best student; and a checkpoint at every step. One process imports torch
# and forks a child for every run, which it kills: at a random moment, at a random moment after a checkpoint was begun,
# or (the child itself) at the n-th time that it opens, makes, renames or removes something.
KILLS = """
import os, random, shutil, signal, sys, threading, time
from pathlib import Path

import numpy, torch
from torch import nn
from tqdm import tqdm
from torch.utils.data import DataLoader, Dataset

from reptile_ext.training import Reptile, Until
from reptile_ext.training.checkpoint import _checkpoints, _damage

torch.set_num_threads(1)
whole, broken = map(Path, sys.argv[1:])

class Noisy(Dataset):
    def __len__(self):
        return 50
    def __getitem__(self, i):
        noise = torch.randn(6) + numpy.random.rand() + random.random()
        return torch.full((6,), float(i % 7)) + noise, i % 4

def run(folder):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 4))
    teacher = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 4))
    reptile = Reptile(
        student, teacher, schedule="cosine", warmup=5, accumulate=2, hard_weight=0.3, metrics=["accuracy"]
    )
    reptile.fit(
        DataLoader(Noisy(), 8, shuffle=True), DataLoader(Noisy(), 8), until=Until(steps=40, patience=100),
        eval_every=7, checkpoint_every=1, log_every=2, folder=folder, resume=True, progress_bar=False,
    )

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")

def child(folder, kill_at=None):
    pid = os.fork()
    if pid == 0:
        tqdm.set_lock(threading.RLock())  # its own is one of all forks, and stays taken when one is killed
        left = kill_at
        def count(event, arguments):
            nonlocal left
            if event in EVENTS and "broken" in str(arguments[0]):
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
        if kill_at is not None:
            sys.addaudithook(count)
        try:
            run(folder)
            os._exit(0)
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
    return pid

def ended(pid):
    status = os.waitpid(pid, 0)[1]
    damages = [damage for damage in map(_damage, _checkpoints(broken)) if damage]
    if damages or status not in (0, signal.SIGKILL):
        sys.exit(f"status {status}, {damages}")
    begun = list(broken.glob("checkpoints/.tmp-*")) + list(broken.glob(".tmp-*"))
    return status == signal.SIGKILL, bool(begun)

run(None)  # what is imported late is imported once
ended(child(whole))
moments = random.Random(0)
kills = in_writing = 0
for number in range(1, 61):
    if (broken / "student.safetensors").exists():  # came to its end: once more
        if (broken / "student.safetensors").read_bytes() != (whole / "student.safetensors").read_bytes():
            sys.exit(f"other bits before run {number}")
        shutil.rmtree(broken)
    kind = number % 3
    pid = child(broken, kill_at=number if kind == 0 else None)
    if kind == 1:
        time.sleep(moments.uniform(0, 0.15))
    if kind == 2:
        deadline = time.monotonic() + 0.5
        while not list(broken.glob("checkpoints/.tmp-*")) and time.monotonic() < deadline:
            pass
        time.sleep(moments.uniform(0, 0.01))
    if kind:
        os.kill(pid, signal.SIGKILL)
    killed, begun = ended(pid)
    kills += killed
    in_writing += begun
ended(child(broken))
print(kills, in_writing)
"""


def test_killed_at_any_moment_it_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run([sys.executable, "-c", KILLS, whole, broken], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    kills, in_writing = map(int, done.stdout.split())
    assert kills >= 30
    assert in_writing >= 15
    assert_same_run(broken, whole)


# ------------------------------------------------------------------------------------------------ full disk, no access


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a file system in memory with the options given; skips where that is not allowed."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / "mounted"
        folder.mkdir()
        try:
            done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True)
        except FileNotFoundError:
            pytest.skip("there is no mount")
        if done.returncode:
            pytest.skip("only root can mount")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)


def test_a_full_disk_costs_nothing(mount: Callable[[str], Path], tmp_path: Path) -> None:
    disk = mount("size=1m")
    whole, broken, filler = tmp_path / "whole", disk / "broken", disk / "filler"
    fit(None, whole, 10)
    fit(None, broken, 6)
    at_step_6 = {path.name: path.read_bytes() for path in (broken / "checkpoints" / "000000006").iterdir()}
    messages = []
    for pages in range(12):  # free ones: the disk is full at another file each time
        filler.write_bytes(b"")
        free = os.statvfs(disk).f_bavail * 4096 - pages * 4096
        filler.write_bytes(bytes(free))
        with pytest.raises(OSError, match="No space left on device") as caught:
            fit(None, broken, 10, resume=True)
        messages.append(str(caught.value))
        assert str(broken) in messages[-1]
        filler.unlink()
        assert steps_of(broken) == [4, 6]
        assert at_step_6 == {path.name: path.read_bytes() for path in (broken / "checkpoints" / "000000006").iterdir()}
        assert read_log(broken / "metrics.jsonl")
    assert any("metrics.jsonl" in message or "cannot be written to" in message for message in messages)
    assert any(
        f"the checkpoint of step 8 was not written to {broken / 'checkpoints'}" in message
        and "That of step 6 is whole, and resume=True goes on from there" in message
        for message in messages
    )
    fit(None, broken, 10, resume=True)
    assert_same_run(broken, whole)


def test_files_of_limited_size_cost_nothing(tmp_path: Path) -> None:
    """A failing write where nothing can be mounted; safetensors and torch.save fail in ways of their own."""
    import resource

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    fit(None, whole, 10)
    fit(None, broken, 6)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    messages = set()
    for limit in (100, 1000, 2000, 3000, 4000, 5000, 6000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                fit(None, broken, 10, resume=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        messages.add(str(caught.value))
        assert len(read_log(broken / "metrics.jsonl")) >= 4
        assert steps_of(broken) == [4, 6]
    assert any("a line was not written to" in message for message in messages)
    assert any("the checkpoint of step 8 was not written" in message for message in messages)
    fit(None, broken, 10, resume=True)
    assert_same_run(broken, whole)


class Untouched:
    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("training began")


def refused_before_the_first_step(folder: Path, message: str) -> None:
    student, teacher = student_and_teacher()
    with pytest.raises(OSError, match=message) as caught:
        Reptile(student, teacher).fit(Untouched(), until=Until(steps=1), folder=folder, progress_bar=False)
    assert f"folder {folder} cannot be written to" in str(caught.value)


def test_a_folder_that_is_a_file_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused_before_the_first_step(tmp_path / "file", "Not a directory")
    refused_before_the_first_step(tmp_path / "file" / "run", "Not a directory")


def test_a_read_only_file_system_is_refused_at_once(mount: Callable[[str], Path]) -> None:
    folder = mount("size=1m")
    fit(None, folder / "run", 2)
    subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    refused_before_the_first_step(folder / "run", "Read-only file system")
    refused_before_the_first_step(folder / "new", "Read-only file system")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_refused_at_once(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    refused_before_the_first_step(tmp_path, "Permission denied")
    refused_before_the_first_step(tmp_path / "run", "Permission denied")
    tmp_path.chmod(0o700)


# ------------------------------------------------------------------------------------------------ two runs


SLOW = """
import sys, time, torch
from torch import nn
from torch.utils.data import DataLoader
from reptile_ext.training import Reptile, Until

student = nn.Linear(6, 4)
student.register_forward_hook(lambda *_: (print("training", flush=True), time.sleep(0.05)) and None)
train = DataLoader(torch.randn(64, 6), 8, num_workers=1)
Reptile(student, nn.Linear(6, 4)).fit(train, until=Until(steps=10**6), folder=sys.argv[1], progress_bar=False)
"""


def test_a_second_run_is_kept_out_until_the_first_has_ended(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        try:
            with pytest.raises(RuntimeError, match=rf"process {process.pid} on .* is writing to folder {tmp_path}"):
                fit(None, tmp_path, 2, resume=True)
            with pytest.raises(RuntimeError, match=rf"process {process.pid} on .* is writing to folder {tmp_path}"):
                fit(None, tmp_path, 2, resume=True)  # being refused takes nothing away
        finally:
            process.send_signal(signal.SIGKILL)
        process.wait()
        fit(None, tmp_path, 2)  # at once, though the killed run's worker may live a moment longer
    assert steps_of(tmp_path) == [2]
