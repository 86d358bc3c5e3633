"""The weights of any module as a safetensors file, and back into a module; opening one executes no code.

`safetensors.torch.save_model` refuses modules whose tensors are slices of one buffer (an RNN that cuDNN has packed)
and puts its metadata in an order that changes from process to process. So the file is written here: the same weights
give the same bytes, and a full disk is an OSError with its number. It is read by the safetensors package.

    tensors    by the names that they have without torch.compile, contiguous, each on its own
    ties       names that are exactly one tensor (same memory, shape and strides) are stored once, under the first name
               of the alphabet; the metadata says {other name: first name}, as save_model's does
    the rest   what is no dense tensor (the extra state of `get_extra_state`) is a torch.save in a tensor of bytes
    checksum   of all of that, in the metadata
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

_CHECKSUM = "reptile_ext.sha256"
_TORCH_SAVED = "reptile_ext.torch_saved"  # JSON list of the names whose bytes are a torch.save
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
if "C64" in getattr(safetensors.torch, "_TYPES", {}):  # not in older versions
    _DTYPES[torch.complex64] = "C64"


def save_weights(path: str | Path, module: nn.Module) -> None:
    """Write a module's parameters, buffers and extra state; `load_weights` and safetensors' `load_model` read them."""
    write_state(Path(path), _state(module))


def load_weights(path: str | Path, module: nn.Module) -> None:
    """Copy a safetensors file into a module, whose ties, devices and dtypes stay.

    Raises ValueError, and changes nothing, for a damaged file and for one with other names or shapes than the module.
    """
    put_state(module, read_state(Path(path)), source=str(path))


def copy_state(module: nn.Module) -> dict[str, Any]:
    """A module's state as it is now, on the CPU. Names that are one tensor in the module are one in the copy."""
    copies: dict[Any, Any] = {}
    state = _state(module)
    for value in state.values():
        if _identity(value) not in copies:
            copies[_identity(value)] = (
                value.to("cpu", copy=True, memory_format=torch.contiguous_format)
                if _is_dense(value)
                else copy.deepcopy(value)
            )
    return {name: copies[_identity(value)] for name, value in state.items()}


def put_state(module: nn.Module, state: Mapping[str, Any], source: str = "the state") -> None:
    """Copy what `copy_state` or `read_state` returned into a module; ValueError, before any change, if it cannot be."""
    own = module.state_dict()
    keys = {_plain(key): key for key in own}
    given = dict(state)
    # By tensor of the module, the first name that is given. One that is not given may be dropped as a tie of it:
    # other programs do so without a word.
    first = {
        _identity(own[keys[name]]): name
        for name in sorted(state.keys() & keys.keys(), reverse=True)
        if not _is_extra(name)
    }
    for name in keys.keys() - state.keys():
        if (other := first.get(_identity(own[keys[name]]))) is not None and not _is_extra(name):
            given[name] = state[other]
    problems = [f"{name!r} is missing" for name in sorted(keys.keys() - given.keys())]
    problems += [f"{name!r} is unexpected" for name in sorted(given.keys() - keys.keys())]
    for name in sorted(keys.keys() & given.keys()):
        mine, value = own[keys[name]], given[name]
        if _is_extra(name) or not isinstance(mine, Tensor):
            continue
        if not isinstance(value, Tensor) or value.shape != mine.shape:
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            problems.append(f"{name!r} has {found}, expected {tuple(mine.shape)}")
            continue
        other = first[_identity(mine)]
        if value is not given[other] and _is_dense(value) and _bytes(value) != _bytes(given[other]):
            problems.append(f"{other!r} and {name!r} are one tensor in the module, and differ")
    if problems:
        kind = type(getattr(module, "_orig_mod", module)).__name__
        raise ValueError(f"{source} does not fit {kind}: {', '.join(problems)}")
    for name, key in keys.items():  # into the module's own dictionary, which knows the versions of its parts
        own[key] = copy.deepcopy(given[name]) if _is_extra(name) else given[name]
    module.load_state_dict(own)


def check_storable(module: nn.Module) -> None:
    """Raise ValueError for an extra state that `save_weights` could not store."""
    for name, value in _state(module).items():
        if not _is_dense(value):
            _packed(name, value)


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    tensors: dict[str, Tensor] = {}
    first: dict[Any, str] = {}
    ties: dict[str, str] = {}
    torch_saved = []
    for name, value in sorted(state.items()):
        if not _is_dense(value):
            torch_saved.append(name)
            tensors[name] = _packed(name, value)
        elif not _is_extra(name) and first.setdefault(_identity(value), name) != name:
            ties[name] = first[_identity(value)]
        else:
            tensors[name] = value.cpu().contiguous()
    metadata = dict(ties)
    if torch_saved:
        metadata[_TORCH_SAVED] = json.dumps(torch_saved)
    metadata[_CHECKSUM] = _checksum(tensors, ties, metadata.get(_TORCH_SAVED))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    # Large elements first, so that every tensor is aligned.
    ordered = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    for name in ordered:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            file.write(_bytes(tensors[name]))


def read_state(path: Path) -> dict[str, Any]:
    """A file's tensors and extra state by name; ValueError if it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    ties = {name: first for name, first in metadata.items() if name not in tensors and first in tensors}
    torch_saved = metadata.get(_TORCH_SAVED)
    if metadata.get(_CHECKSUM) not in (None, _checksum(tensors, ties, torch_saved)):
        raise ValueError(f"{path} is damaged: its tensors' sha256 is not the one that its metadata says")
    state: dict[str, Any] = {name: tensors[name] for name in tensors}
    for name in json.loads(torch_saved or "[]"):
        state[name] = _unpacked(f"{path}: {name!r}", tensors[name])
    return state | {name: state[first] for name, first in ties.items()}


def has_checksum(path: Path) -> bool:
    """Whether `write_state` wrote a file."""
    with safe_open(path, framework="pt") as file:
        return _CHECKSUM in (file.metadata() or {})


def _state(module: nn.Module) -> dict[str, Any]:
    state = module.state_dict()
    return {_plain(key): value.detach() if isinstance(value, Tensor) else value for key, value in state.items()}


def _plain(key: str) -> str:
    """A name without the wrappers of torch.compile."""
    return ".".join(part for part in key.split(".") if part != "_orig_mod")


def _is_extra(name: str) -> bool:
    return name.rpartition(".")[2] == "_extra_state"  # the key that torch gives to what get_extra_state returns


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.dtype in _DTYPES


def _identity(value: Any) -> Any:
    """Equal for tensors that are one: the same elements of the same memory, in the same order."""
    if not _is_dense(value) or value.numel() == 0:
        return id(value)
    return value.data_ptr(), value.device, value.dtype, value.shape, value.stride()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _checksum(tensors: dict[str, Tensor], ties: dict[str, str], torch_saved: str | None) -> str:
    names = [(name, str(tensors[name].dtype), list(tensors[name].shape)) for name in sorted(tensors)]
    digest = hashlib.sha256(json.dumps([names, sorted(ties.items()), torch_saved]).encode())
    for name in sorted(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def _packed(name: str, value: Any) -> Tensor:
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
    except Exception as error:
        raise ValueError(f"{name!r} (a {type(value).__name__}) cannot be stored: {error}") from error
    packed = torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)
    _unpacked(f"{name!r} (a {type(value).__name__})", packed)  # now rather than when it is needed
    return packed


def _unpacked(what: str, packed: Tensor) -> Any:
    try:
        return torch.load(io.BytesIO(_bytes(packed)), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{what} cannot be read without executing code: get_extra_state must return tensors, numbers, strings, and "
            "lists and dicts of them"
        ) from error
