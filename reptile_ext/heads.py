"""Hidden states and head of a model that returns logits, for the fused linear loss.

The head is what `get_output_embeddings()` returns: all Hugging Face language models have that method, and any module
may. The hidden states are what the model gives its head. For one forward pass a stand-in takes the place of the head's
forward: it keeps what it is given and returns numbers for a few rows. So nothing has to be known of what comes before
the head (OPT's and BERT's projections, T5's factor, a slice of the positions).

What comes after it has to be known: softcap and scale. The configuration has their numbers under names that do not say
how they are used (`logits_scaling` divides in Granite and multiplies in HyperCLOVA X), so names are not trusted: in the
first pass the stand-in returns made-up logits, and what the model makes of those shows which numbers it uses and how.
Anything else that it does to them is an error: leaving it out would change the loss without a word.

Made-up logits are float32 in 16-bit models, too: rounded to 16 bits, a small change would not show. Only a model that
itself rounds its logits to 16 bits is compared to that accuracy.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .cache import TeacherCache
from .cache.format import TEACHER

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")  # or divisors
_POSITIONS = 17  # of which made-up logits are shown to a model, in 2 samples: 35 MB at 256,000 classes


def output_layer(model: nn.Module) -> nn.Linear | None:
    """The layer whose output are `model`'s logits; None if `model` does not say, or it is more than weight and bias."""
    found = _output_embeddings(model)
    # A subclass with a forward of its own (LoRA, 8 bits, a cast) computes something else than hidden · weightᵀ + bias.
    if isinstance(found, nn.Linear) and type(found).forward is nn.Linear.forward:
        return found
    return None


def _output_embeddings(model: nn.Module) -> Any:
    method = getattr(model, "get_output_embeddings", None)
    return method() if callable(method) else None


class Head:
    """What makes logits of a model's hidden states: softcap(scale · (hidden · weightᵀ + bias)).

    `softcap` and `scale` are known once `hidden_states` has been called.

    Raises:
        ValueError: `model` has no `get_output_embeddings()`, or one that returns something else than a plain
            `torch.nn.Linear`. `name` is what the message calls the model.
    """

    def __init__(self, name: str, model: nn.Module) -> None:
        layer = output_layer(model)
        if layer is None:
            found = _output_embeddings(model)
            raise ValueError(
                f"fused_linear=True needs the {name}'s head: get_output_embeddings() of {type(model).__name__} must "
                "return the torch.nn.Linear that makes its logits; got "
                + ("no such method, or None" if found is None else f"a {type(found).__module__}.{type(found).__name__}")
            )
        self.layer = layer
        self.softcap: float | None = None
        self.scale = 1.0
        self._name, self._model = name, model
        self._after: dict[bool, tuple[float | None, float]] = {}  # softcap and scale, in train and in eval mode
        self._checked: set[tuple[bool, tuple[int, ...]]] = set()  # modes, and the shapes of made-up logits in them

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def keywords(self, side: str) -> dict[str, Any]:
        """Of `linear_distillation_loss`; `side` is "student" or "teacher"."""
        found = {"weight": self.weight, "bias": self.layer.bias, "softcap": self.softcap, "scale": self.scale}
        return {f"{side}_{name}": value for name, value in found.items()}

    def hidden_states(self, run: Callable[[], Tensor]) -> Tensor:
        """[..., H]: what the head is given while `run` calls the model, which may be wrapped, and returns its logits.

        The head computes nothing. In the first call in train and in eval mode, and in later ones with more samples or
        positions, up to 2 and 17, made-up logits show what the model does to them.

        Raises:
            ValueError: the head is not called exactly once, or the model does something to its logits that is no
                softcap or scale of its configuration, or has parameters after its head.
        """
        given: list[Tensor] = []

        def stand_in(input: Tensor) -> Tensor:
            given.append(input)
            dtype = _dtype_of_made_up(input)
            if self._is_new(input):
                return made_up_logits(self._shape(input, _POSITIONS), dtype).to(input.device)
            return torch.zeros(self._shape(input, 2), dtype=dtype, device=input.device)

        with _forward(self.layer, stand_in):
            try:
                logits = run()
            except torch.OutOfMemoryError:
                raise
            except (IndexError, RuntimeError, ValueError) as error:
                if given and self._is_new(given[0]):  # after its head, the model wants logits of all rows
                    raise self._does_not_fit() from error
                raise
        if len(given) != 1:
            raise ValueError(
                f"fused_linear=True needs a {self._name} that calls what get_output_embeddings() returns once in its "
                f"forward; {type(self._model).__name__} called it {len(given)} times"
            )
        hidden, mode = given[0], self._model.training
        if self._is_new(hidden):
            found = self._find_out(hidden, logits)
            if self._after.setdefault(mode, found) != found:
                raise self._does_not_fit()
            self._checked.add((mode, self._shape(hidden, _POSITIONS)))
        self.softcap, self.scale = self._after.get(mode, (None, 1.0))  # these two if there was no row so far
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """The model's logits of these hidden states, up to rounding: softcap and scale in float32."""
        return reference.linear_logits(hidden, self.weight, self.layer.bias, self.softcap, self.scale)

    def _is_new(self, hidden: Tensor) -> bool:
        """Whether the model has not been shown made-up logits of so many rows yet, in its present mode.

        Few rows prove nothing for more: of a single position, the last position is all there is."""
        shape = self._shape(hidden, _POSITIONS)
        return 0 not in shape and not any(
            mode == self._model.training and len(checked) == len(shape) and all(map(operator.ge, checked, shape))
            for mode, checked in self._checked
        )

    def _find_out(self, hidden: Tensor, logits: Tensor) -> tuple[float | None, float]:
        """Softcap and scale, from what the model made of `made_up_logits`."""
        shape = self._shape(hidden, _POSITIONS)
        # Made-up logits require no grad: the result does only if a parameter, or the hidden states, went into it.
        if logits.requires_grad or not logits.is_floating_point() or logits.shape != shape:
            raise self._does_not_fit()
        softcaps, factors = (self._of_config(names).values() for names in (_SOFTCAPS, _SCALES))
        scales = (*factors, *(1 / factor for factor in factors), 1.0)
        made_up = made_up_logits(shape, _dtype_of_made_up(hidden)).reshape(-1, shape[-1])
        found = logits.detach().cpu().reshape(-1, shape[-1])
        for softcap, scale in itertools.product((*softcaps, None), scales):
            if all(  # row by row: in float64, all rows would take some memory
                _is_rounded(row, reference.linear_logits(z.double(), None, None, softcap, scale))
                for row, z in zip(found, made_up, strict=True)
            ):
                return softcap, scale
        raise self._does_not_fit()

    def _shape(self, hidden: Tensor, positions: int) -> tuple[int, ...]:
        """Shape of the stand-in's logits: up to `positions` in the last leading dimension, up to two in the others."""
        leading = (
            *(min(size, 2) for size in hidden.shape[:-2]),
            *(min(size, positions) for size in hidden.shape[-2:-1]),
        )
        return (*leading, self.layer.out_features)

    def _of_config(self, names: tuple[str, ...]) -> dict[str, float]:
        """The numbers that the model's configuration has under these names."""
        config: Any = getattr(self._model, "config", None)
        if callable(getattr(config, "get_text_config", None)):
            config = config.get_text_config()  # of a model that reads images too
        values = {name: getattr(config, name, None) for name in names}
        return {
            name: float(value)
            for name, value in values.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value != 0 and math.isfinite(value)
        }

    def _does_not_fit(self) -> ValueError:
        known = self._of_config(_SOFTCAPS + _SCALES)
        return ValueError(
            f"fused_linear=True does not fit the {self._name}: {type(self._model).__name__} does something to its "
            f"logits after the head that is no softcap or scale of its config ({known or 'which has none'}), and "
            "leaving it out would change the loss; pass fused_linear=False"
        )


class KnownHead:
    """A head without its model: the teacher's, for hidden states that a cache holds. It wants no gradient."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None, softcap: float | None = None, scale: float = 1.0):
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach()
        self.softcap, self.scale = softcap, scale

    def to(self, device: torch.device) -> KnownHead:
        if self.weight.device != device:
            self.weight, self.bias = self.weight.to(device), None if self.bias is None else self.bias.to(device)
        return self

    def keywords(self, side: str) -> dict[str, Any]:
        """Of `linear_distillation_loss`; `side` is "student" or "teacher"."""
        found = {"weight": self.weight, "bias": self.bias, "softcap": self.softcap, "scale": self.scale}
        return {f"{side}_{name}": value for name, value in found.items()}

    def logits(self, hidden: Tensor) -> Tensor:
        """As `Head.logits`."""
        head = self.to(hidden.device)
        return reference.linear_logits(hidden.to(head.weight.dtype), head.weight, head.bias, head.softcap, head.scale)

    def save(self, path: Path, **notes: str) -> None:
        """A safetensors file: weight, bias, and in its metadata softcap, scale, `notes` and a checksum."""
        import safetensors.torch

        from .files import write_atomically

        tensors = {"weight": self.weight.cpu().contiguous()}
        if self.bias is not None:
            tensors["bias"] = self.bias.cpu().contiguous()
        metadata = {"softcap": repr(self.softcap), "scale": repr(self.scale), **notes, "sha256": _digest(tensors)}
        write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: Path, **notes: str | None) -> KnownHead:
        """What `save` wrote. Raises ValueError for a damaged file, and for one with other notes than these."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                metadata = file.metadata() or {}
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged or cut short: {error}") from None
        if "weight" not in tensors or metadata.get("sha256") != _digest(tensors):
            raise ValueError(f"{path} is altered: its content has another checksum than was written")
        for name, wanted in notes.items():
            if metadata.get(name) != wanted:
                raise ValueError(f"{path} is of another {name}: {metadata.get(name)!r}; wanted {wanted!r}")
        softcap = metadata["softcap"]
        return cls(
            tensors["weight"],
            tensors.get("bias"),
            None if softcap == "None" else float(softcap),
            float(metadata["scale"]),
        )


HEAD_FILE = "head.safetensors"  # in the folder TEACHER of a cache of hidden states


def known_head(given: Any, cache: TeacherCache) -> KnownHead:
    """The teacher's head for a cache of hidden states: what was given, else the one that lies beside the rows.

    Raises ValueError if there is none, or one of another shape than the cache's."""
    if given is None:
        path = cache.folder / TEACHER / HEAD_FILE
        if not path.exists():
            raise ValueError(
                f"the cache in {cache.folder} holds hidden states, which need the teacher's head: pass teacher_head=, "
                "its torch.nn.Linear (of a Hugging Face model get_output_embeddings()); `reptile cache-teacher --kind "
                f"hidden` writes it to {path}"
            )
        head = KnownHead.load(path, teacher=cache.info()["teacher"] or "")
    elif isinstance(given, KnownHead):
        head = given
    elif isinstance(given, nn.Linear):
        head = KnownHead(given.weight, given.bias)
    elif isinstance(given, Tensor):
        head = KnownHead(given)
    else:
        raise TypeError(
            "teacher_head must be a torch.nn.Linear, its weight [V, H] or a reptile_ext.heads.KnownHead; got "
            f"{type(given).__name__}"
        )
    wanted, found = [cache.vocab_size, cache.info()["width"]], list(head.weight.shape)
    if found != wanted and len(cache):
        raise ValueError(
            f"teacher_head must have a weight of {wanted}, the cache's classes and the width of its hidden states; got "
            f"{found}"
        )
    return head


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {list(x.shape)} ".encode())
        digest.update(x.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def made_up_logits(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Logits of both signs and of sizes from 0.01 to 30,000 (float16 ends at 65,504), small and large ones in every row
    and class: an offset shows in the small ones, a clamp or a softcap in the large. The same in every call; each row
    starts with the second of the row before."""
    *leading, classes = shape
    rows = math.prod(leading)
    n = torch.arange(rows + classes - 1, dtype=torch.float64)
    sizes = 3e4 * 3e6 ** -(n * 0.6180339887498949).frac()  # multiples of the golden ratio fill an interval evenly
    return torch.where(n % 2 == 0, sizes, -sizes).to(dtype).unfold(0, classes, 1).reshape(shape).contiguous()


def _dtype_of_made_up(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _is_rounded(found: Tensor, exact: Tensor) -> bool:
    """Whether logits equal those of float64 up to rounding; what is too large for their dtype may be infinite."""
    dtype = torch.finfo(found.dtype)
    # At most four operations round to the nearest, each by at most half an eps, and none makes an error larger. In
    # float32, tanh is not rounded to the nearest, a softcap is itself rounded, and a divisor may be its reciprocal.
    rtol = 2 * dtype.eps + 4 * torch.finfo(torch.float32).eps
    found, exact = (x.double().clamp(dtype.min, dtype.max) for x in (found, exact))
    return torch.allclose(found, exact, rtol=rtol, atol=dtype.tiny)


@contextlib.contextmanager
def _forward(module: nn.Module, stand_in: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """`stand_in` in the place of a module's forward."""
    before = module.__dict__.get("forward")  # others put theirs there too, such as Accelerate's hooks
    module.forward = stand_in
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
