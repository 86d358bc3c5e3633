"""What the loop is given: a batch in any of the common shapes, taken apart; what a model makes of its part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Keys of a mapping that are not for the models. The rest goes to both as keywords.
RESERVED = (
    *("labels", "sample_weight", "teacher_logits", "teacher_inputs", "student_inputs"),
    *("sample_id", "teacher_rows"),  # of a teacher that is a cache
)
# Whose first dimension is the number of samples, whatever the other tensors of a batch are.
_OF_SAMPLES = ("input_ids", "inputs_embeds", "input_features", "input_values", "decoder_input_ids", "attention_mask")


class Batch(NamedTuple):
    """A batch in its parts. What is None is not there; without `teacher_inputs` the teacher gets `inputs`."""

    inputs: Any
    labels: Tensor | None = None
    weight: Tensor | None = None  # of the samples [B] or of the rows [B, …]
    teacher_inputs: Any = None
    teacher_logits: Any = None  # the teacher's answers, in the place of running it
    mask: Tensor | None = None  # 0 at padding; used only where there are no labels
    num_rows_in: int | None = None  # at most so many rows count by labels, or by the mask; None: not known on the host
    sample_id: Any = None  # of each sample, its id in a teacher cache, or pieces [(id, begin, end), …]
    teacher_rows: Any = None  # what the cache says of them: (indices, log_probs) [B, T, K], or (logits,)
    of_teacher: int | None = None  # which of several teachers alone it is compared with
    sampled: bool = False  # by the student: its labels say which rows count, and are nothing to learn


def split(batch: Any, shift_labels: bool, ignore_index: int) -> Batch:
    """A batch in its parts.

    A tensor is input alone; a pair is (inputs, labels), a triple (inputs, labels, weights of the samples). A mapping
    goes to the models as keywords without the keys of `RESERVED`: so an HF model does not compute a loss of its own.
    `shift_labels` turns the labels of a causal language model (equal to the input) into the next token at each
    position; nothing follows the last one, so it is ignored.
    """
    found: dict[str, Any]
    if isinstance(batch, Tensor):
        found = {"inputs": batch}
    elif isinstance(batch, Mapping):
        found = {"inputs": {name: value for name, value in batch.items() if name not in RESERVED}}
        if "student_inputs" in batch:
            if found["inputs"]:
                raise ValueError(
                    "a batch has either 'student_inputs' or the inputs of both models as keys of its own; got both: "
                    f"'student_inputs' and {sorted(found['inputs'])}"
                )
            found["inputs"] = batch["student_inputs"]
        found |= {"labels": batch.get("labels"), "weight": batch.get("sample_weight")}
        found |= {name: batch.get(name) for name in ("teacher_inputs", "teacher_logits", "sample_id", "teacher_rows")}
    elif isinstance(batch, (tuple, list)) and len(batch) in (2, 3):
        found = dict(zip(("inputs", "labels", "weight"), batch, strict=False))
    else:
        raise TypeError(
            "batch must be a tensor, a pair (inputs, labels), a triple (inputs, labels, sample_weight) or a mapping "
            f"with an optional 'labels'; got {type(batch).__name__}"
            + (f" of {len(batch)}" if isinstance(batch, (tuple, list)) else "")
        )
    for name in ("inputs", "teacher_inputs"):
        _check_inputs(name, found.get(name))
    labels, weight = found.get("labels"), found.get("weight")
    if labels is not None:
        if not isinstance(labels, Tensor):
            raise TypeError(
                f"labels must be a tensor; got {_kind(labels)}: give the loader a collate_fn that makes one"
            )
        if labels.dtype in _NARROW:
            labels = labels.long()  # of narrow ones, 156 would be −100, the usual ignore_index
    if weight is not None and not (isinstance(weight, Tensor) and weight.is_floating_point()):
        raise TypeError(
            f"sample_weight must be a floating-point tensor; got {_kind(weight)} (in a triple it is the third; "
            "an index or an id belongs in no batch)"
        )
    if shift_labels:
        if labels is None:
            raise ValueError("shift_labels=True needs labels in every batch; got a batch without")
        if labels.ndim < 2:
            raise ValueError(f"shift_labels=True needs labels [batch, positions]; got {list(labels.shape)}")
        labels = F.pad(labels[:, 1:], (0, 1), value=ignore_index)
        if weight is not None and weight.ndim > 1:
            weight = F.pad(weight[:, 1:], (0, 1))
    return Batch(**(found | {"labels": labels, "weight": weight, "mask": mask_in(found["inputs"])}))


def mask_in(inputs: Any) -> Tensor | None:
    """The mask of the positions that have logits: the decoder's, where there is a decoder."""
    if not isinstance(inputs, Mapping):
        return None
    has_decoder = any(name in inputs for name in ("decoder_input_ids", "decoder_inputs_embeds"))
    mask = inputs.get("decoder_attention_mask" if has_decoder else "attention_mask")
    return mask if isinstance(mask, Tensor) and mask.ndim > 1 else None


# Integers that are made int64 (bool is none: the losses refuse it by name).
_NARROW = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32, torch.uint64)


def _check_inputs(name: str, inputs: Any) -> None:
    """Raise for what no model takes: text, lists of numbers, a mapping without a tensor."""
    values = inputs if isinstance(inputs, Mapping) else {"": inputs}
    for key, value in values.items():
        if isinstance(value, str) or (isinstance(value, list) and not _holds_tensors_of_models(value)):
            where = f"batch[{key!r}]" if key else f"the batch's {name}"
            hint = (
                "turn text into ids with the model's tokenizer"
                if isinstance(value, str) or (value and isinstance(value[0], str))
                else "make tensors of it in the loader's collate_fn (of Hugging Face's datasets, with_format('torch'))"
            )
            raise TypeError(f"{where} must be a tensor; got {_kind(value)}: {hint}")
    if isinstance(inputs, Mapping) and not any(isinstance(value, Tensor) for value in inputs.values()):
        raise TypeError(f"{name} of a batch must hold a tensor; got a mapping with the keys {list(inputs)}")


def _holds_tensors_of_models(value: list[Any]) -> bool:
    """Whether a list is one of images or boxes, as detectors take it: tensors or mappings that are not scalars."""
    return bool(value) and all(isinstance(x, Mapping) or (isinstance(x, Tensor) and x.ndim > 0) for x in value)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}"
    if isinstance(value, (list, tuple)) and value:
        return f"a {type(value).__name__} of {type(value[0]).__name__}"
    return f"a {type(value).__name__}"


def num_samples(inputs: Any) -> int:
    """Number of samples in a batch's inputs: the first dimension of its tensors, `input_ids` before others."""
    if not isinstance(inputs, Mapping):
        first = inputs
        while isinstance(first, (tuple, list)) and first and not isinstance(first[0], Mapping):
            if isinstance(first, list):
                return len(first)  # one tensor a sample
            first = first[0]
        if isinstance(first, Tensor) and first.ndim:
            return int(first.shape[0])
        raise TypeError(f"inputs must be a tensor [samples, …] or a mapping with one; got {_kind(inputs)}")
    for name in _OF_SAMPLES:
        if isinstance(inputs.get(name), Tensor) and inputs[name].ndim:
            return int(inputs[name].shape[0])
    sizes = Counter(int(x.shape[0]) for x in inputs.values() if isinstance(x, Tensor) and x.ndim)
    if not sizes:
        raise TypeError(f"inputs must hold a tensor [samples, …]; got a mapping with the keys {list(inputs)}")
    if len(sizes) > 1:
        shapes = {name: list(x.shape) for name, x in inputs.items() if isinstance(x, Tensor)}
        raise ValueError(
            f"the inputs disagree on the number of samples: {shapes}; give labels, or name the samples' tensor "
            f"one of {', '.join(_OF_SAMPLES)}"
        )
    return next(iter(sizes))


def is_empty(inputs: Any) -> bool:
    """Whether a batch's inputs are of no sample."""
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    sizes = [x.shape[0] for x in values if isinstance(x, Tensor) and x.ndim]
    return bool(sizes) and not any(sizes)


def output_of(model: Callable[..., Any], inputs: Any) -> Any:
    """Run a model on inputs as `split` returns them."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def logits_in(output: Any, model: Any) -> Tensor:
    """The logits in a model's output: a tensor, or what holds one as `.logits` or under "logits" or, as torchvision's
    segmentation models, "out"."""
    found = output
    if isinstance(output, Mapping):
        found = output.get("logits", output.get("out", output))
    elif not isinstance(output, Tensor):
        found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", repr(model))
        raise TypeError(f"{name} must return a tensor of logits or an object with .logits; got {type(output).__name__}")
    return found


def logits_of(model: Callable[..., Any], inputs: Any) -> Tensor:
    """Logits of a model, run on inputs as `split` returns them."""
    return logits_in(output_of(model, inputs), model)


def scalars_in(output: Any) -> dict[str, Tensor]:
    """Scalars of a model's output that want a gradient: its auxiliary losses, by name."""
    if isinstance(output, Tensor):
        return {}
    items = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    return {
        name: value
        for name, value in items.items()
        if isinstance(value, Tensor) and value.ndim == 0 and value.requires_grad and name != "loss"
    }
