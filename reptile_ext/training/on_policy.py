"""On-policy distillation: completions that the student has sampled, in the place of the data's.

As "On-Policy Distillation of Language Models" (arXiv 2306.13649) has it: the teacher is asked about what the student
itself writes, and no gradient goes through the sampling. What is sampled is made a batch like any other, prompt and
completion from the first column on and padding behind, so that positions are right in any model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from .batches import Batch
from .modes import in_mode
from .objective import Objective

# The student's own distribution. transformers would take what is not said here from the model's generation_config.
_AS_THE_STUDENT = {
    "do_sample": True,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "use_cache": True,
}
# What would change the number of rows or where they end, or is taken from the batch.
_NOT_HERE = (
    *("input_ids", "inputs", "inputs_embeds", "attention_mask", "labels", "position_ids", "generation_config"),
    *("num_return_sequences", "return_dict_in_generate", "max_length", "stop_strings", "stopping_criteria"),
)


class OnPolicy:
    """Makes a batch of the student's own completions from the prompts of a batch.

    objective: of a causal language model of transformers and of teachers that can be asked about any text.
    generate: keywords of transformers' `generate`, max_new_tokens among them.

    Raises ValueError for students, teachers and keywords that this is not for.
    """

    def __init__(self, objective: Objective, generate: Mapping[str, Any] | None) -> None:
        student: Any = objective.student
        if objective.cache is not None:
            raise ValueError(
                "on_policy asks the teacher about text that the student has just sampled, of which a TeacherCache "
                "holds no answers: pass the teacher itself"
            )
        if not objective.teachers:
            raise ValueError(f"on_policy needs a teacher that is a model or a function; got {objective.teacher!r}")
        if not callable(getattr(student, "generate", None)):
            raise ValueError(
                f"on_policy needs a student with transformers' generate; {type(student).__name__} has none"
            )
        if getattr(getattr(student, "config", None), "is_encoder_decoder", False) or not objective.shift_labels:
            raise ValueError(
                "on_policy is for causal language models whose labels are shifted by the loss; got "
                f"{type(student).__name__} with shift_labels={objective.shift_labels}"
            )
        if objective.criterion.keywords["soft_weight"] == 0:
            raise ValueError("on_policy has the divergence alone to learn from; got soft_weight=0")
        generate = dict(generate or {})
        if wrong := sorted(set(generate) & set(_NOT_HERE)):
            raise ValueError(f"generate may not set {wrong}: prompts are the batch's, and each has one completion")
        longest = generate.get("max_new_tokens")
        if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
            raise ValueError(
                f"on_policy needs generate={{'max_new_tokens': a whole number of at least 1}}; got {longest!r}"
            )
        self.objective = objective
        self.max_new_tokens = longest
        own = student.generation_config
        self.ends = _ids(generate.get("eos_token_id", own.eos_token_id))
        pads = _ids(generate.get("pad_token_id", own.pad_token_id)) or self.ends or [0]
        self.keywords = _AS_THE_STUDENT | generate | {"eos_token_id": self.ends or None, "pad_token_id": pads[0]}

    def sample(self, batch: Any) -> Batch:
        """What `Objective.split` makes of a batch, with the student's completions: labels of sampled tokens alone, up
        to the first end-of-sequence and with it. The rows that count are those that predict them."""
        objective = self.objective
        prompts, weight = prompts_of(batch, objective.ignore_index)
        self._check_length(max(map(len, prompts)))
        width, device = max(map(len, prompts)), objective._device
        ids = torch.full((len(prompts), width), self.keywords["pad_token_id"])
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :], mask[i, width - len(prompt) :] = prompt, 1
        student: Any = objective.student
        with torch.no_grad(), in_mode(student, training=False), objective._autocast(student):
            written = student.generate(
                **send_to_device({"input_ids": ids, "attention_mask": mask}, device), **self.keywords
            )
        found = completed(prompts, written[:, width:].cpu(), self.ends, objective.ignore_index)
        self._check_known(found["input_ids"])
        if weight is not None:
            found["sample_weight"] = weight
        # That labels are the input ids is known here; whether a batch of data has them so must be told from data.
        compared, objective._labels_compared = objective._labels_compared, True
        try:
            return objective.split(found)._replace(sampled=True)
        finally:
            objective._labels_compared = compared

    def _check_length(self, prompt: int) -> None:
        for model in (self.objective.student, *self.objective.teachers):
            limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
            if isinstance(limit, int) and prompt + self.max_new_tokens > limit:
                raise ValueError(
                    f"a prompt of {prompt} tokens and max_new_tokens={self.max_new_tokens} are more than the {limit} "
                    f"positions of {type(model).__name__}: shorten one of them"
                )

    def _check_known(self, ids: Tensor) -> None:
        for teacher in self.objective.teachers:
            embeddings = teacher.get_input_embeddings() if hasattr(teacher, "get_input_embeddings") else None
            if isinstance(embeddings, nn.Embedding) and int(ids.max()) >= embeddings.num_embeddings:
                raise ValueError(
                    f"the student wrote token {int(ids.max())}, and {type(teacher).__name__} knows "
                    f"{embeddings.num_embeddings}: pass generate={{'suppress_tokens': [those it does not know], …}}"
                )


def prompts_of(batch: Any, ignore_index: int) -> tuple[list[Tensor], Tensor | None]:
    """The prompts of a batch, each a tensor of ids without padding, and the samples' weights.

    A prompt is what stands before the first label that counts; where none counts, all of the sample.
    Raises ValueError for a batch that does not say what its prompts are.
    """
    known = {"input_ids", "attention_mask", "labels", "sample_weight", "position_ids"}
    if not isinstance(batch, Mapping) or not {"input_ids", "labels"} <= set(batch) or set(batch) - known:
        keys = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise ValueError(
            "on_policy needs batches that are mappings of input_ids and labels, and of attention_mask and "
            f"sample_weight where there are; got {keys}"
        )
    ids, labels = batch["input_ids"].cpu(), batch["labels"].cpu()
    mask = batch.get("attention_mask")
    attended = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu() != 0
    if not ids.ndim == labels.ndim == attended.ndim == 2 or not ids.shape == labels.shape == attended.shape:
        raise ValueError(
            f"input_ids, labels and attention_mask of on_policy must be [samples, positions]; got {list(ids.shape)}, "
            f"{list(labels.shape)} and {list(attended.shape)}"
        )
    positions = batch.get("position_ids")
    weight = batch.get("sample_weight")
    if weight is not None and weight.ndim != 1:
        raise ValueError(f"sample_weight of on_policy must be one a sample; got {list(weight.shape)}")
    before = ((labels != ignore_index) & attended).cumsum(-1) == 0
    prompts = []
    for i in range(len(ids)):
        if positions is not None and bool((positions.expand_as(ids)[i].cpu()[attended[i]].diff() < 0).any()):
            raise ValueError("on_policy needs one text a row; got position_ids that begin again, as packed texts have")
        prompts.append(ids[i, before[i] & attended[i]])
        if not len(prompts[-1]):
            raise ValueError(
                f"on_policy needs a prompt in every sample, labels {ignore_index} over it; sample {i} has none"
            )
    if not prompts:
        raise ValueError("on_policy needs batches with a sample; got an empty one")
    return prompts, weight


def completed(prompts: list[Tensor], written: Tensor, ends: list[int], ignore_index: int) -> dict[str, Tensor]:
    """A batch of prompts and what was written after each, as it is up to the first of `ends`, which counts."""
    is_end = torch.isin(written, torch.tensor(ends, dtype=written.dtype))
    kept = (is_end.cumsum(-1) - is_end.long()) == 0  # no end before it: padding is known by place, not by its id
    texts = [torch.cat([prompt, new[keep]]) for prompt, new, keep in zip(prompts, written, kept, strict=True)]
    width = max(map(len, texts))
    ids = torch.zeros(len(texts), width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, ignore_index)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
        labels[i, len(prompt) : len(text)] = text[len(prompt) :]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _ids(value: Any) -> list[int]:
    """Token ids as transformers gives them: none, one, several, or a tensor."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.tolist()
    return [int(x) for x in value] if isinstance(value, (list, tuple)) else [int(value)]
