"""Hidden states and head of a model that returns logits, for the fused linear loss.

The head is what `get_output_embeddings()` returns: all Hugging Face language models have that method, and any module
may. The hidden states are what the model gives its head. For one forward pass a stand-in takes the place of the head's
forward: it keeps what it is given and returns numbers for a few rows. So nothing has to be known of what comes before
the head (OPT's and BERT's projections, T5's factor, a slice of the positions).

What comes after it has to be known: softcap and scale. The configuration has their numbers under names that do not say
how they are used (`logits_scaling` divides in Granite and multiplies in HyperCLOVA X), so names are not trusted: in the
first pass the stand-in returns made-up logits, and what the model makes of those says which of the numbers are used and
how. Whatever else it does to them is an error: left out in silence, it would make the loss another one.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference

_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")  # or divisors


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

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    def keywords(self, side: str) -> dict[str, Any]:
        """Of `linear_distillation_loss`; `side` is "student" or "teacher"."""
        return {f"{side}_bias": self.layer.bias, f"{side}_softcap": self.softcap, f"{side}_scale": self.scale}

    def hidden_states(self, run: Callable[[], Tensor]) -> Tensor:
        """[..., H]: what the head is given while `run` calls the model, which may be wrapped, and returns its logits.

        The head computes nothing. In the first call in either mode, made-up logits show what the model does to them.

        Raises:
            ValueError: the head is not called exactly once, or the model does something to its logits, or has
                something to learn there, that is no softcap or scale of its configuration.
        """
        given: list[Tensor] = []
        known = self._after.get(self._model.training)

        def stand_in(input: Tensor) -> Tensor:
            given.append(input)
            shape, dtype = self._shape(input), _dtype_of_product(input)
            if known is None:
                return made_up_logits(shape, dtype).to(input.device)
            return torch.zeros(shape, dtype=dtype, device=input.device)

        with _forward(self.layer, stand_in):
            try:
                logits = run()
            except (IndexError, RuntimeError, ValueError) as error:
                if given and known is None:  # after its head, the model wants logits of all rows
                    raise self._does_not_fit() from error
                raise
        if len(given) != 1:
            raise ValueError(
                f"fused_linear=True needs a {self._name} that calls what get_output_embeddings() returns once in its "
                f"forward; {type(self._model).__name__} called it {len(given)} times"
            )
        if known is None:
            known = self._after[self._model.training] = self._find_out(given[0], logits)
        self.softcap, self.scale = known
        return given[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states, as the model would have them but for rounding: softcap and scale in float32."""
        return reference.linear_logits(hidden, self.weight, self.layer.bias, self.softcap, self.scale)

    def _find_out(self, hidden: Tensor, logits: Tensor) -> tuple[float | None, float]:
        """Softcap and scale, from what the model made of `made_up_logits`."""
        # Made-up logits want no gradient: what came of them does if there is a parameter, or the hidden states, in it.
        if logits.requires_grad or not logits.is_floating_point() or logits.shape != self._shape(hidden):
            raise self._does_not_fit()
        softcaps, factors = (self._of_config(names).values() for names in (_SOFTCAPS, _SCALES))
        scales = (*factors, *(1 / factor for factor in factors), 1.0)
        dtype = _dtype_of_product(hidden)
        z, found = made_up_logits(logits.shape, dtype).double(), logits.detach().cpu().double()
        # At most four operations round to the nearest, each by at most half an eps, and none makes an error larger.
        coarser = max((dtype, logits.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        eps, tiny = torch.finfo(coarser).eps, torch.finfo(coarser).tiny
        for softcap, scale in itertools.product((*softcaps, None), scales):
            if torch.allclose(found, reference.linear_logits(z, None, None, softcap, scale), rtol=2 * eps, atol=tiny):
                return softcap, scale
        raise self._does_not_fit()

    def _shape(self, hidden: Tensor) -> tuple[int, ...]:
        """Of the stand-in's logits: two rows in each of the leading dimensions."""
        return (*(min(size, 2) for size in hidden.shape[:-1]), self.layer.out_features)

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


def made_up_logits(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Of both signs and of sizes from 0.01 to 1000, small and large ones everywhere: what is added to, cut from or
    bent in them shows in the one or the other. The same in every call."""
    n = torch.arange(math.prod(shape), dtype=torch.float64)
    sizes = 10 ** (5 * (n * 0.6180339887498949).frac() - 2)  # multiples of the golden ratio fill an interval evenly
    return torch.where(n % 2 == 0, sizes, -sizes).reshape(shape).to(dtype)


def _dtype_of_product(hidden: Tensor) -> torch.dtype:
    """That of the logits, of a head in the dtype of the hidden states or under autocast."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


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
