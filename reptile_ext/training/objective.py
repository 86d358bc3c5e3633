"""What a training step computes from a batch and two models. `Reptile` calls it, and so can any other trainer."""

from __future__ import annotations

import contextlib
import copy
import difflib
import inspect
import itertools
import math
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..cache import TeacherCache
from ..cache.batches import rows_like, rows_of_batch
from ..cache.format import CODED
from ..heads import Head, KnownHead, known_head, output_layer
from ..linear import linear_distillation_loss
from ..modules import BinaryDistillationLoss, DistillationLoss, LinearDistillationLoss, SparseDistillationLoss
from .batches import Batch, logits_in, num_samples, output_of, scalars_in, split
from .each_teacher import KEY, by_teacher
from .modes import in_mode

EVALUATED_ROWS = 512  # whose logits `logits_in_parts` makes at a time: as many as make a product fast

Teacher = nn.Module | Callable[..., Any]

# Decoders of transformers whose own loss takes the labels as they are, unlike its other causal language models.
_DO_NOT_SHIFT = (
    *("Bart", "BigBirdPegasus", "Blenderbot", "BlenderbotSmall", "MBart", "Marian", "Musicgen", "MusicgenMelody"),
    *("Mvp", "PLBart", "Pegasus", "TrOCR", "Whisper", "XLM", "XLNet"),
)


_HALVES = {torch.float16, torch.bfloat16}


class Objective:
    """The distillation loss of a batch, for `Reptile`, another trainer or a loop of your own.

    Equivalent PyTorch of `loss = objective(model, (inputs, labels))` (temperature T, soft_weight 1, hard_weight h)::

        with torch.no_grad():
            y = F.log_softmax(teacher(inputs).float() / T, -1)
        logits = model(inputs).float()
        x = F.log_softmax(logits / T, -1)
        soft = T * T * (y.exp() * (y - x)).sum(-1)[labels != ignore_index].sum()
        hard = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="sum")
        loss = (soft + h * hard) / num_rows  # num_rows: by default (labels != ignore_index).sum()

    Arguments:
        student: a module that returns logits: a tensor [..., V], or an object with `.logits`.
        teacher: a module, or any function of the same inputs, that returns logits. A module is run in eval mode and
            without a graph, whatever mode it is in, and is left in it. Several teachers are a list, or a dict by name:
            the divergence is the sum of theirs by `teacher_weights`, or each sample's own (see `parts`).
            "batch": every batch has the logits, under "teacher_logits" (a
            tensor, or a list of one for each teacher), which a batch may have instead of running the teacher, too.
            A `TeacherCache`: every batch is a mapping with the ids of its samples in the cache under "sample_id"
            (docs/cache.md, "In training"); of the kinds "top_k" and "sampled" the loss is
            `sparse_distillation_loss` with its `tail`, by default "bucket" for "top_k" and "renormalize" for "sampled",
            and the teacher's temperature is the cache's: `temperature`, by default that for both, may only be it or a
            pair (T_s, it). One of kind "hidden" needs `fused_linear`, and its loss is that of all classes. None: the
            labels' cross entropy alone.
        teacher_head: with a cache of kind "hidden" the teacher's output layer, a `torch.nn.Linear`, its weight [V, H]
            or a `reptile_ext.heads.KnownHead`; by default the one that `reptile cache-teacher` has put beside the rows.
        teacher_weights: of several teachers; by default each has the same and they add up to 1.
        teacher_inputs, student_inputs: functions from the inputs of a batch to what the model takes instead. A batch
            that is a mapping may also have both under these names.
        dim: the class dimension of the logits.
        shift_labels: True: labels are a causal language model's input ids; use the next one at each position. False:
            they are already the next ones. None, the default: what the student's own loss does, True for the causal
            language models of transformers, else False; labels that then turn out to equal the inputs at the same
            positions, or to be shifted already where they would be shifted, are a ValueError.
        auxiliary: weights of the student's own losses, scalars in its output, by name, such as {"aux_loss": 0.01} of
            a mixture of experts: their mean over the micro-batches, each weighed by its rows, is added. One that is
            not named is left out, with a warning.
        fused_linear: never have the logits in full: the loss is that of hidden states and heads, by
            `linear_distillation_loss`. See `Reptile`.
        binary: every logit is a distribution of its own, σ(z) against 1 − σ(z): one logit a sample, [B] or [B, 1], or
            many labels, [B, L]. The loss is `binary_distillation_loss`, its keywords are `loss`, `pos_weight` among
            them, and what is said of rows here holds for elements. Labels are numbers from 0 to 1 of the logits' shape
            ([B] and [B, 1] are the same).
        autocast: dtype of the forward passes and of the heads' products, float32 for none. The default, None, leaves
            both to the autocast that the caller has set.
        inplace: True: write the gradient over the logits, as `distillation_loss` does. None, the default: do so where
            the logits' memory is nobody else's, which saves their size. False: never.
        loss: keywords of `distillation_loss`: temperature, hard_weight, ignore_index, …; with `fused_linear`,
            memory_budget too, and with a cache of log-probabilities tail.

    Shapes: a batch is a tensor of inputs, a pair (inputs, labels), a triple (inputs, labels, weights) or a mapping
    passed to the models as keywords, its "labels" and "sample_weight" apart. Labels are integers [...] for logits
    [..., V]; those equal to `ignore_index` are ignored rows. Without labels every row counts, but those that
    "attention_mask" (the decoder's, where there is one) marks as padding. Weights are floats, one a sample or a row;
    the loss is then the weighted mean. The loss is a float32 scalar with a graph to the student's parameters.

    Models of transformers with an encoder and a decoder get decoder inputs made from the labels, as they make them
    themselves. Floating-point inputs are cast to the dtype of a model whose parameters have one dtype.

    The model that is run is an argument of the call: the student itself, or what a trainer has wrapped it in (DDP,
    torch.compile). `student` says where the head is, which mode the student is in and which device it is on.

    A step of several micro-batches or processes has one number of rows to divide by, not one each: `num_items`, the
    labels that count in all of them. `count` computes it, and Hugging Face's Trainer calls it num_items_in_batch. (With
    a cache that has rows without a class, whose labels do not count, only `count` is right.)
    DDP then averages gradients that are already divided, so multiply the loss by the number of processes. In a loop
    of your own::

        def summed(x):
            torch.distributed.all_reduce(x)
            return x

        objective = Objective(student, teacher, temperature=2.0, hard_weight=0.5)
        model = DistributedDataParallel(student)
        num_items = objective.count(micro_batches, reduce=summed)
        for batch in micro_batches:
            (objective(model, batch, num_items) * world_size).backward()

    In Hugging Face's Trainer, and those of TRL, which derive from it::

        class DistillationTrainer(Trainer):
            def __init__(self, *args, objective, **keywords):
                super().__init__(*args, **keywords)
                self.objective = objective
                self.model_accepts_loss_kwargs = True  # so that num_items_in_batch is counted

            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                if return_outputs:
                    loss, logits = self.objective.loss_and_logits(model, inputs, num_items_in_batch)
                else:
                    loss = self.objective(model, inputs, num_items_in_batch)
                if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                    loss = loss * self.accelerator.num_processes
                return (loss, {"logits": logits}) if return_outputs else loss

    In Lightning, where the teacher is no submodule and so is neither moved, nor trained, nor saved. Lightning divides
    the loss by accumulate_grad_batches, so that micro-batches weigh alike, however many rows they have::

        class Distillation(LightningModule):
            def __init__(self, student, teacher):
                super().__init__()
                self.student, self.objective = student, Objective(student, teacher)

            def on_fit_start(self):
                self.objective.teacher.to(self.device)

            def training_step(self, batch, batch_idx):
                return self.objective(self.student, batch)

    Raises:
        ValueError: keywords that a step sets itself or that have no meaning; with `fused_linear`, a student without a
            head, `dim` other than -1, inplace=True or binary=True; a cache whose kind or temperature does not fit. When
            called: a batch without labels or "sample_id" where they are needed, samples that have another number of
            positions in the cache, a student with another number of classes than the cache and not vocab="truncate",
            micro-batches that cannot be counted together, a model that `fused_linear` is not for, and what the losses
            raise.
        TypeError: when called, a batch or a model's output of another kind.
        KeyError: when called, a sample that is not in the cache.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | Sequence[Teacher] | Mapping[str, Teacher] | TeacherCache | str | None,
        *,
        teacher_head: Any = None,
        teacher_weights: Sequence[float] | None = None,
        teacher_inputs: Callable[[Any], Any] | None = None,
        student_inputs: Callable[[Any], Any] | None = None,
        dim: int = -1,
        shift_labels: bool | None = None,
        auxiliary: Mapping[str, float] | None = None,
        fused_linear: bool = False,
        binary: bool = False,
        autocast: torch.dtype | None = None,
        inplace: bool | None = None,
        **loss: Any,
    ) -> None:
        for name in ("reduction", "weight", "denominator"):
            if name in loss:
                raise ValueError(f"{name} is set by the training step: the loss is a mean over all rows of a step")
        check_keywords(Objective, loss)
        linear_only = {"memory_budget": loss.pop("memory_budget")} if "memory_budget" in loss else {}
        if linear_only and not fused_linear:
            raise ValueError("memory_budget is for the chunks of fused_linear=True; got it with fused_linear=False")
        if teacher is None:
            if meaningless := sorted({*loss, *(["inplace"] if inplace else [])} - {"ignore_index", "pos_weight"}):
                raise ValueError(f"teacher=None leaves no meaning to {meaningless}")
            loss |= {"soft_weight": 0.0, "hard_weight": 1.0}  # the cross entropy, by the same kernel
        if binary and (fused_linear or dim != -1):
            raise ValueError(
                "binary=True has no class dimension: "
                + ("fused_linear=True has no meaning with it" if fused_linear else f"dim must be -1; got {dim!r}")
            )
        if "pos_weight" in loss and not binary:
            raise ValueError("pos_weight is for labels of one logit each, binary=True; got it with binary=False")
        self.cache = teacher if isinstance(teacher, TeacherCache) else None
        self._is_sparse = self.cache is not None and self.cache.kind in CODED
        if self.cache is not None:
            loss = _keywords_with_cache(self.cache, binary, teacher_inputs, loss)
        elif "tail" in loss:
            raise ValueError("tail is for a teacher of which K classes are known, a TeacherCache; got another teacher")
        is_of_hidden = self.cache is not None and self.cache.kind == "hidden"
        if teacher_head is not None and not is_of_hidden:
            raise ValueError("teacher_head is for a cache of kind 'hidden'; got it with another teacher")
        self._known_head = known_head(teacher_head, self.cache) if self.cache is not None and is_of_hidden else None
        self.binary = binary
        self._pos_weight: Tensor | None = loss.pop("pos_weight", None)
        self.student, self.teacher = student, teacher
        self.teachers = teachers_of(teacher)
        self.teacher_names = list(teacher) if isinstance(teacher, Mapping) else []
        self.has_choice = isinstance(teacher, Mapping) or len(self.teachers) > 1  # of a teacher for each sample
        self._set_teacher_weights(teacher_weights)
        self.dim = dim
        self._wants_shift = shift_labels
        self.shift_labels = _is_causal_language_model(student) if shift_labels is None else shift_labels
        self.auxiliary = dict(auxiliary or {})
        self.autocast = autocast
        self.inplace = inplace
        kind: Any = BinaryDistillationLoss if binary else DistillationLoss
        kind = SparseDistillationLoss if self._is_sparse else kind
        self.criterion: BinaryDistillationLoss | DistillationLoss | SparseDistillationLoss = kind(
            inplace=bool(inplace), **loss
        )
        self._check_temperature(self.criterion.keywords["temperature"])
        self.ignore_index: int = self.criterion.keywords["ignore_index"]
        self._inputs_of = {"student": student_inputs, "teacher": teacher_inputs}
        self._linear_only = linear_only
        self._rows_per_sample: int | None = None
        self._labels_compared = False
        self._auxiliary: dict[str, Tensor] = {}  # of the latest forward pass
        self._left_out: set[str] = set()  # losses of the student's own that were warned of
        self._nobody_elses: Callable[[], Tensor | None] = lambda: None  # logits whose memory is only theirs
        self._set_fused_linear(fused_linear)

    def _set_teacher_weights(self, weights: Sequence[float] | None) -> None:
        count = len(self.teachers)
        self.teacher_weights = tuple(weights) if weights is not None else (1 / max(count, 1),) * count
        if weights is not None and (
            len(self.teacher_weights) != count or not all(math.isfinite(w) and w >= 0 for w in self.teacher_weights)
        ):
            raise ValueError(
                f"teacher_weights must be a number of at least 0 for each of {count} teachers; got {list(weights)}"
            )

    def with_fused_linear(self, fused_linear: bool) -> Objective:
        """The same objective of the same models, with or without `fused_linear`."""
        other = copy.copy(self)
        other._set_fused_linear(fused_linear)
        return other

    def _set_fused_linear(self, fused_linear: bool) -> None:
        # Where there is no head, a model is asked for its logits.
        self.student_head: Head | None = None
        self.teacher_heads: list[Head | None] = [None] * (len(self.teachers) if self.cache is None else 2)
        self._linear_keywords: dict[str, Any] = {}
        if not fused_linear:
            if self._known_head is not None:
                raise ValueError("a cache of kind 'hidden' is for the loss of hidden states: pass fused_linear=True")
            return
        keywords = dict(self.criterion.keywords)
        if keywords.pop("inplace"):
            raise ValueError("inplace=True has no meaning with fused_linear=True: there are no logits to write over")
        if keywords.pop("group") is not None:
            raise ValueError("group= shards the classes of logits, of which fused_linear=True has none; got both")
        del keywords["dim"]  # the criterion's: `student_outputs` has moved the classes to the last dimension
        if self.dim != -1:
            raise ValueError(f"fused_linear=True needs classes in the last dimension, dim=-1; got dim={self.dim!r}")
        LinearDistillationLoss(**keywords, **self._linear_only)  # complain now, not in the first step
        self._linear_keywords = keywords | self._linear_only
        self.student_head = Head("student", self.student)
        self.teacher_heads = [
            Head("teacher", teacher) if isinstance(teacher, nn.Module) and output_layer(teacher) is not None else None
            for teacher in self.teachers
        ] or self.teacher_heads

    def _check_temperature(self, given: Any) -> None:
        """Raise a ValueError for another temperature of the teacher than that of the cache."""
        if self.cache is None:
            return
        own = self.cache.temperature
        if not self._is_sparse and own == 1:
            return  # logits, which any temperature can be had of
        if (given[1] if isinstance(given, (tuple, list)) else given) != own:
            raise ValueError(
                f"temperature={given!r}: the teacher's answers in {self.cache.folder} were written at temperature "
                f"{own:g}, and no other can be had of them: pass temperature={own:g}, or (T_s, {own:g}) with another "
                "temperature T_s of the student, or write a cache at the temperature you want"
            )

    def set_keywords(self, **keywords: float) -> None:
        """Other values of temperature and hard_weight from now on."""
        criterion = type(self.criterion)(**(self.criterion.keywords | keywords))
        self._check_temperature(criterion.keywords["temperature"])
        self.criterion = criterion
        if self.student_head is not None:
            self._linear_keywords |= keywords

    # ------------------------------------------------------------------------------------------- all of it in a call

    def __call__(self, model: nn.Module, batch: Any, num_items: Any = None) -> Tensor:
        """The loss of a batch, divided by the rows that `num_items` stands for.

        model: the student, or what it is wrapped in.
        batch: on the models' device.
        num_items: what `count` returns for all micro-batches of the step; None: this batch is all of it.
        """
        return self._loss_and_outputs(model, batch, num_items, overwrite=True)[0]

    def loss_and_logits(self, model: nn.Module, batch: Any, num_items: Any = None) -> tuple[Tensor, Tensor]:
        """The same, and the student's logits as the model gives them, without a graph: for a trainer's own metrics.

        With `fused_linear` they are made for this alone, all of them at once.
        """
        if self.criterion.keywords["inplace"] and torch.is_grad_enabled():
            raise ValueError("inplace=True leaves no logits to return: their gradient is written over them")
        loss, outputs = self._loss_and_outputs(model, batch, num_items)
        with torch.no_grad():
            logits = self._logits(self.student_head, outputs.detach())
            return loss, logits.squeeze(-1) if self.binary else logits.movedim(-1, self.dim)

    def _loss_and_outputs(
        self, model: nn.Module, batch: Any, num_items: Any, overwrite: bool = False
    ) -> tuple[Tensor, Tensor]:
        batch = self.split(batch)
        outputs = self.student_outputs(model, batch)
        teacher_outputs = self.teacher_outputs(batch)
        num_rows = self.num_rows(outputs, batch, num_items)
        return self.loss(outputs, teacher_outputs, batch, num_rows, overwrite=overwrite), outputs

    # ------------------------------------------------------------------------------------------- and step by step

    def split(self, batch: Any) -> Batch:
        """A batch in its parts, the labels shifted if they are to be. What is split already stays."""
        if isinstance(batch, Batch):
            return batch
        if self.has_choice and isinstance(batch, Mapping) and KEY in batch:
            raise ValueError(f"a batch with {KEY!r} is several batches: take them from Objective.parts")
        # Where nobody asked for a shift, a batch without labels is one of which the teacher is all there is to learn.
        has_labels = not isinstance(batch, Mapping) or batch.get("labels") is not None
        shifts = self.shift_labels and (has_labels or bool(self._wants_shift))
        found = split(batch, shifts, self.ignore_index)
        if self.cache is not None:
            found = self._look_up(found, self.cache)
        if self.binary:
            return found._replace(labels=self._targets(found.labels))
        if not self._labels_compared and found.labels is not None:
            self._labels_compared = self._compare_labels(found.inputs, found.labels)
        if self.student_head is not None:
            found = found._replace(num_rows_in=self._rows_in(found))
        return found

    def parts(self, batch: Any) -> list[Batch]:
        """A batch in its parts, `split`, for each teacher that its samples name under "teacher"; one where none is."""
        if isinstance(batch, Batch) or not self.has_choice:
            return [self.split(batch)]
        found = by_teacher(batch, self.teacher_names, len(self.teachers))
        return [self.split(part)._replace(of_teacher=i) for i, part in found]

    def for_batch(self, batch: Batch) -> Objective:
        """The objective of a part: this one, or that of its teacher alone."""
        if batch.of_teacher is None:
            return self
        other, i = copy.copy(self), batch.of_teacher
        other.teacher, other.teachers, other.teacher_weights = self.teachers[i], [self.teachers[i]], (1.0,)
        other.teacher_heads = [self.teacher_heads[i]]
        return other

    def _look_up(self, batch: Batch, cache: TeacherCache) -> Batch:
        """A batch with what the cache says of its samples."""
        if batch.teacher_logits is not None:
            raise ValueError("a batch has 'teacher_logits', and the teacher is a cache: pass teacher='batch' for these")
        mask = batch.mask
        if getattr(getattr(self.student, "config", None), "is_encoder_decoder", False):
            # Not that of the encoder.
            mask = batch.inputs.get("decoder_attention_mask") if isinstance(batch.inputs, Mapping) else None
        if batch.sample_id is None:
            raise ValueError(
                "a teacher that is a cache needs 'sample_id' in every batch, of eval too: a mapping such as "
                "{'input_ids': …, 'labels': …, 'sample_id': [the ids of its samples in the cache]}, or "
                "DataLoader(collate_fn=cache.collate()) of samples with a 'sample_id'; got a batch without"
            )
        rows = rows_of_batch(cache, batch.sample_id, mask, batch.labels, batch.teacher_rows)
        if len(rows[0]) != num_samples(batch.inputs):
            raise ValueError(
                f"sample_id must be of the batch's {num_samples(batch.inputs)} samples; got {len(rows[0])} ids"
            )
        # Of a classifier of texts, whose samples have one row each, the mask is of no rows.
        mask = mask if mask is not None and mask.shape == rows[0].shape[:-1] else None
        return self._without_unknown(batch._replace(sample_id=None, teacher_rows=rows), mask)

    def _without_unknown(self, batch: Batch, mask: Tensor | None) -> Batch:
        """Positions that the cache says nothing of do not count: padding, and rows that list no class. (Under left
        padding the label of the last padding is the first token, shifted.)"""
        if self._is_sparse:
            is_known = (batch.teacher_rows[0] >= 0).any(-1)
        else:
            is_known = torch.ones(batch.teacher_rows[0].shape[:-1], dtype=torch.bool) if mask is None else mask != 0
        if bool(is_known.all()):
            return batch
        labels = batch.labels
        if labels is None:
            return batch._replace(mask=is_known)
        if labels.numel() != is_known.numel():
            return batch  # whose shapes the loss will complain of
        is_known = is_known.to(labels.device).reshape(labels.shape)
        return batch._replace(labels=labels.masked_fill(~is_known, self.ignore_index))

    def _rows_in(self, batch: Batch) -> int | None:
        """The rows that count, of a batch that has not gone to a GPU yet: those of no weight may be among them."""
        rows, out = (batch.mask, 0) if batch.labels is None else (batch.labels, self.ignore_index)
        return int((rows != out).sum()) if rows is not None and rows.device.type == "cpu" else None

    @staticmethod
    def _targets(labels: Tensor | None) -> Tensor | None:
        """Labels of one logit each: floating point, [B] for [B, 1]."""
        if labels is None:
            return None
        if not labels.is_floating_point():
            labels = labels.float()
        return labels.squeeze(-1) if labels.ndim == 2 and labels.shape[-1] == 1 else labels

    def count(self, batches: Iterable[Any], reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Labels that count or, without labels, samples, in all micro-batches of a step: `num_items` of the calls.

        With weights it is their sum. Without labels but with a mask or a weight of each row, it is two numbers: of
        samples, and of rows; which of them holds is known when the model has run.

        reduce: sums a tensor over the processes that share the step; None where there is one.
        """
        split_batches = [self.split(batch) for batch in batches]
        self._rows_per_sample = None  # of the step that begins
        if len({batch.labels is None for batch in split_batches}) > 1:
            raise ValueError("the micro-batches of a step must all have labels or all have none; got both kinds")
        counts = [torch.as_tensor(self._count(batch), dtype=torch.float64) for batch in split_batches]
        count = torch.stack([c.to(self._device if reduce is not None else "cpu") for c in counts]).sum(0)
        count = count if reduce is None else reduce(count)
        return count if split_batches[0].weight is not None else count.long()

    def _count(self, batch: Batch) -> Any:
        if batch.labels is not None:
            return self._sum_of(batch.labels != self.ignore_index, batch.weight)
        if batch.weight is None:
            samples: Any = num_samples(batch.inputs)
        else:
            samples = batch.weight.double().sum()
        if batch.mask is not None:
            return [float(samples), float(self._sum_of(batch.mask != 0, batch.weight))]
        if batch.weight is not None and batch.weight.ndim > 1:
            return [float(samples), float(samples)]
        return samples

    @staticmethod
    def _sum_of(kept: Tensor, weight: Tensor | None) -> Tensor:
        return kept.sum() if weight is None else (kept * _spread(weight, kept.shape).double()).sum()

    def num_rows(self, outputs: Tensor, batch: Batch, num_items: Any = None) -> float | Tensor:
        """The rows to divide a loss by: those that count in this batch or, by `num_items`, in all of the step.

        Without labels, `num_items` are samples, and how many rows each has is known only now that the model has run.
        """
        if num_items is None:
            return self.counted_rows(outputs, batch)
        of_rows = None
        if (isinstance(num_items, Tensor) and num_items.ndim) or isinstance(num_items, (list, tuple)):
            num_items, of_rows = num_items
        if batch.labels is not None:
            return num_items  # type: ignore[no-any-return]
        if of_rows is not None and self._row_weight(outputs, batch, of_samples=False) is not None:
            return of_rows  # type: ignore[no-any-return]
        rows, samples = outputs.shape[:-1].numel(), num_samples(batch.inputs)
        if samples and rows % samples:
            raise ValueError(
                f"the student's {rows} rows are no multiple of the batch's {samples} samples: give labels, with "
                f"ignore_index={self.ignore_index} at the padding"
            )
        rows //= max(samples, 1)
        if self._rows_per_sample not in (None, rows):
            raise ValueError(
                "without labels, samples that share a step must have the same number of rows; got "
                f"{self._rows_per_sample} and {rows}: give labels, with ignore_index={self.ignore_index} at the padding"
            )
        self._rows_per_sample = rows
        return num_items * rows  # type: ignore[no-any-return]

    def counted_rows(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Number of the rows of these outputs that are not ignored or, with weights, the sum of theirs."""
        weight = self._row_weight(outputs, batch)
        kept = None if batch.labels is None else batch.labels != self.ignore_index
        if weight is None:
            return torch.tensor(outputs.shape[:-1].numel(), device=outputs.device) if kept is None else kept.sum()
        return (weight if kept is None else weight * kept).sum()

    def _row_weight(self, outputs: Tensor, batch: Batch, of_samples: bool = True) -> Tensor | None:
        """[...] weights of the rows of outputs [..., V], the padding's 0; None: all weigh the same."""
        rows = outputs.shape[:-1]
        weight = None
        if batch.weight is not None and (of_samples or batch.weight.ndim > 1):
            weight = _spread(batch.weight, rows)
        mask = None if batch.labels is not None else _mask_of_rows(batch.mask, rows)
        if mask is not None:
            mask = (mask != 0).float()
            weight = mask if batch.weight is None else mask * _spread(batch.weight, rows)
        return None if weight is None else weight.contiguous()

    def student_outputs(self, model: nn.Module, batch: Batch) -> Tensor:
        """[..., V] logits of `model`, the student or what it is wrapped in; with `fused_linear`, [..., H] hidden
        states."""
        self._nobody_elses = lambda: None
        if self.student_head is not None:
            return self._outputs("student", model, self.student_head, batch.inputs, batch.labels)
        outputs = self._outputs("student", model, None, batch.inputs, batch.labels)
        if self.inplace is None and not self.auxiliary and not self.binary and compat.is_only_owner(outputs):
            self._nobody_elses = weakref.ref(outputs)
        return outputs

    def teacher_outputs(self, batch: Batch) -> list[Tensor]:
        """For each teacher [..., V] logits or, where it has a head and `fused_linear` is on, [..., H] hidden states.
        Of a cache [B, T, K] indices and log-probabilities, or logits."""
        if self.cache is not None:
            return list(batch.teacher_rows)
        if batch.teacher_logits is not None:
            if self.teacher is None:
                raise ValueError("teacher=None trains on labels alone; got a batch with 'teacher_logits': pass 'batch'")
            return self._from_batch(batch.teacher_logits)
        if self.teacher == "batch":
            raise ValueError("teacher='batch' needs 'teacher_logits' in every batch; got a batch without")
        found = []
        for teacher, head in zip(self.teachers, self.teacher_heads, strict=True):
            inputs = batch.inputs if batch.teacher_inputs is None else batch.teacher_inputs
            # no_grad, not inference_mode: autograd refuses to save an inference tensor for the student's backward.
            mode = in_mode(teacher, training=False) if isinstance(teacher, nn.Module) else contextlib.nullcontext()
            with torch.no_grad(), mode:
                outputs = self._outputs("teacher", teacher, head, inputs, batch.labels)
            found.append(outputs.detach().to(self._device))
        return found

    def _from_batch(self, logits: Any) -> list[Tensor]:
        found = list(logits) if isinstance(logits, (list, tuple)) else [logits]
        wanted = 1 if self.teacher == "batch" else len(self.teachers)
        if len(found) != wanted or not all(isinstance(x, Tensor) and x.is_floating_point() for x in found):
            kinds = [str(x.dtype) if isinstance(x, Tensor) else type(x).__name__ for x in found]
            raise ValueError(f"teacher_logits must be {wanted} floating-point tensors; got {kinds}")
        return [self._classes_last("teacher_logits", x) for x in found]

    def loss(
        self,
        outputs: Tensor,
        teacher_outputs: Sequence[Tensor],
        batch: Batch,
        num_rows: float | Tensor,
        *,
        overwrite: bool = False,
    ) -> Tensor:
        """Sum of the loss over the rows of these outputs, divided by `num_rows`, and the student's own losses.

        overwrite: the caller has no use for the outputs any more, so that a gradient may be written over logits that
            nobody else holds.
        """
        if batch.sampled and self.criterion.keywords["hard_weight"]:
            return self._without_hard_labels().loss(outputs, teacher_outputs, batch, num_rows, overwrite=overwrite)
        head = self.student_head
        teacher_outputs = self._like(outputs, teacher_outputs)
        if head is None:
            loss = self.loss_of_logits(outputs, teacher_outputs, batch, num_rows, overwrite=overwrite)
        else:
            loss = self._linear_loss(head, outputs, teacher_outputs, batch, num_rows)
        if self.auxiliary:
            share = self.counted_rows(outputs, batch) / _not_zero(num_rows)
            for name, weight in self.auxiliary.items():
                if name not in self._auxiliary:
                    raise ValueError(
                        f"auxiliary names {name!r}, which the student's output has not; its scalars that want a "
                        f"gradient: {sorted(self._left_out | set(self._auxiliary))}"
                    )
                loss = loss + weight * share * self._auxiliary[name].to(loss.device)
        return loss

    def _without_hard_labels(self) -> Objective:
        other = copy.copy(self)
        other._linear_keywords = dict(self._linear_keywords)
        other.set_keywords(hard_weight=0.0, label_smoothing=0.0)
        return other

    def _like(self, outputs: Tensor, teacher_outputs: Sequence[Tensor]) -> list[Tensor]:
        """What a cache says of a batch's positions as what it says of the rows of these outputs."""
        if self.cache is None:
            return list(teacher_outputs)
        found = rows_like(tuple(teacher_outputs), outputs.shape[:-1], outputs.device)
        if self._known_head is not None:
            dtype = self._known_head.to(outputs.device).weight.dtype
            found = [hidden.to(dtype) for hidden in found]
        return found

    def shared_classes(self, classes: int) -> int:
        """How many of the student's classes are compared with the cache's."""
        assert self.cache is not None
        if classes != self.cache.vocab_size and self.criterion.keywords["vocab"] == "error":
            raise ValueError(
                f"the student has {classes} classes, and the cache in {self.cache.folder} is of {self.cache.vocab_size}"
                ": pass vocab='truncate' if the first "
                f"{min(classes, self.cache.vocab_size)} are the same (vocabularies padded to other sizes)"
            )
        return min(classes, self.cache.vocab_size)

    def _linear_loss(
        self, head: Head, outputs: Tensor, teacher_outputs: Sequence[Tensor], batch: Batch, num_rows: float | Tensor
    ) -> Tensor:
        total: Tensor | None = None
        student = head.keywords("student")
        if self._is_sparse:
            shared = self.shared_classes(head.weight.shape[0])  # what is beyond has no part, as with vocab="truncate"
            student |= {name: x[:shared] for name, x in student.items() if isinstance(x, Tensor)}
        is_of_rows = batch.labels is not None or _mask_of_rows(batch.mask, outputs.shape[:-1]) is not None
        for i, keywords in enumerate(self._shares(self._linear_keywords)):
            teacher: dict[str, Any] = {"teacher_weight": None}  # its outputs are logits
            if not teacher_outputs:
                # The divergence has no weight, so any teacher will do: one of one feature costs next to nothing.
                _check_labels(batch.labels)
                of_teacher = outputs.new_zeros(*outputs.shape[:-1], 1)
                teacher["teacher_weight"] = outputs.new_zeros(head.weight.shape[0], 1)
            elif self._is_sparse:
                of_teacher = None
                teacher |= dict(zip(("teacher_indices", "teacher_log_probs"), teacher_outputs, strict=True))
            else:
                of_teacher = teacher_outputs[i]
                of_model = None if batch.teacher_logits is not None else self.teacher_heads[i]
                teacher_head = self._known_head or of_model
                if teacher_head is not None:
                    found = teacher_head.keywords("teacher")
                    teacher = {name: x.detach() if isinstance(x, Tensor) else x for name, x in found.items()}
            with self._autocast():  # of the heads' products, as it is in the models
                loss = linear_distillation_loss(
                    outputs,
                    teacher_hidden=of_teacher,
                    labels=batch.labels,
                    weight=self._row_weight(outputs, batch),
                    denominator=_not_zero(num_rows),
                    num_rows_in=batch.num_rows_in if is_of_rows else None,
                    **student,
                    **teacher,
                    **keywords,
                )
            total = loss if total is None else total + loss
        assert total is not None
        return total

    def _shares(self, keywords: dict[str, Any]) -> list[dict[str, Any]]:
        """The keywords of the loss with each teacher: its share of the divergence, and the labels' part once."""
        if len(self.teachers) < 2:
            return [keywords]
        soft_weight = keywords["soft_weight"]
        return [
            keywords | {"soft_weight": soft_weight * weight} | ({"hard_weight": 0.0} if i else {})
            for i, weight in enumerate(self.teacher_weights)
        ]

    def loss_of_logits(
        self,
        logits: Tensor,
        teacher_logits: Sequence[Tensor],
        batch: Batch,
        num_rows: float | Tensor,
        *,
        overwrite: bool = False,
    ) -> Tensor:
        """`loss` of logits, which is what `logits_in_parts` gives, without the student's own losses."""
        if not teacher_logits:
            _check_labels(batch.labels)
            # `criterion` gives the divergence no weight: any logits of this shape do
            teacher_logits = [logits.detach()]
        weight, denominator = self._row_weight(logits, batch), _not_zero(num_rows)
        call: dict[str, Any] = {"labels": batch.labels, "weight": weight, "denominator": denominator}
        if self.binary:
            logits, teacher_logits = logits.squeeze(-1), [x.squeeze(-1) for x in teacher_logits]
            if self._pos_weight is not None:
                call["pos_weight"] = self._pos_weight.to(logits.device)
        if len(self.teachers) < 2:
            keywords = self.criterion.keywords
            if overwrite and self._nobody_elses() is logits:
                keywords = keywords | {"inplace": True}
            if self._is_sparse:
                shared = self.shared_classes(logits.shape[-1])
                logits = logits if shared == logits.shape[-1] else logits[..., :shared]
            criterion: Any = self.criterion
            loss: Tensor = criterion.loss(logits, *teacher_logits, **call, **keywords)
            return loss
        return torch.stack(
            [
                self.criterion.loss(logits, of_teacher, **call, **keywords)
                for of_teacher, keywords in zip(
                    teacher_logits, self._shares(self.criterion.keywords | {"inplace": False}), strict=True
                )
            ]
        ).sum()

    def logits_in_parts(
        self, outputs: Tensor, teacher_outputs: Sequence[Tensor], batch: Batch
    ) -> Iterator[tuple[Tensor, list[Tensor], Batch]]:
        """(student's logits, teachers' logits, labels and weights) of a batch, for metrics; with `fused_linear`, of a
        few rows at a time, so that there are never more logits than that."""
        rows = outputs.shape[:-1]
        weight = self._row_weight(outputs, batch)
        teacher_outputs = self._like(outputs, teacher_outputs)
        if self.student_head is None:
            yield outputs, teacher_outputs, Batch(None, batch.labels, weight)
            return
        labels = batch.labels
        if labels is not None and labels.shape != rows:
            raise ValueError(
                f"labels must have the shape of the hidden states' rows, {list(rows)}; got {list(labels.shape)}"
            )
        for of_teacher in teacher_outputs:
            if of_teacher.shape[:-1] != rows:
                raise ValueError(
                    f"the teacher must have the student's rows, {list(rows)}; got {list(of_teacher.shape[:-1])}"
                )
        is_given = batch.teacher_logits is not None or self.cache is not None
        heads: Sequence[Any] = [self._known_head] * len(teacher_outputs) if is_given else self.teacher_heads
        flat = outputs.flatten(0, -2)
        flat_teachers = [of_teacher.flatten(0, -2) for of_teacher in teacher_outputs]
        flat_labels, flat_weight = (None if x is None else x.flatten() for x in (labels, weight))
        for start in range(0, flat.shape[0], EVALUATED_ROWS):
            part = slice(start, start + EVALUATED_ROWS)
            yield (
                self._logits(self.student_head, flat[part]),
                [self._logits(head, x[part]) for head, x in zip(heads, flat_teachers, strict=True)],
                Batch(
                    None,
                    None if flat_labels is None else flat_labels[part],
                    None if flat_weight is None else flat_weight[part],
                ),
            )

    # ------------------------------------------------------------------------------------------- inside

    @property
    def _device(self) -> torch.device:
        found = next(itertools.chain(self.student.parameters(), self.student.buffers()), None)
        return torch.device("cpu") if found is None else found.device

    def _autocast(self, model: Any = None) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        # A teacher that has weights of the other 16-bit dtype keeps to it: few layers take both.
        enabled = self.autocast != torch.float32 and not {self.autocast, *_dtypes_of(model)} >= _HALVES
        return torch.autocast(self._device.type, self.autocast, enabled=enabled)

    def _outputs(self, name: str, model: Teacher, head: Head | None, inputs: Any, labels: Tensor | None) -> Tensor:
        inputs = self._inputs_for(name, model, inputs, labels)
        auxiliary: dict[str, Tensor] = {}

        def run() -> Tensor:
            output = output_of(model, inputs)
            auxiliary.update(scalars_in(output) if name == "student" else {})
            return logits_in(output, model)

        with self._autocast(model):
            found = run() if head is None else head.hidden_states(run)
        if name == "student":
            for unnamed in sorted(auxiliary.keys() - self.auxiliary.keys() - self._left_out):
                self._left_out.add(unnamed)
                warnings.warn(
                    f"the student's output has {unnamed!r}, a loss of its own, which is not added: pass "
                    f"auxiliary={{{unnamed!r}: weight}}, or 0 for its weight to leave it out knowingly",
                    stacklevel=2,
                )
            self._auxiliary = {key: value for key, value in auxiliary.items() if key in self.auxiliary}
        if head is None:
            return self._classes_last(name, found)
        if head.layer.out_features == 1:
            raise _one_class(name, "a head of one class")
        return found

    def _classes_last(self, name: str, logits: Tensor) -> Tensor:
        shape = list(logits.shape)
        if self.binary:  # a row of its own each
            if logits.ndim == 0:
                raise ValueError(f"the {name}'s logits must be [samples, …]; got a 0-dimensional tensor")
            one = logits.ndim == 2 and shape[-1] == 1
            return logits if one else logits.unsqueeze(-1)
        if logits.ndim < 2:
            raise _one_class(name, f"shape {shape}")
        if not -logits.ndim <= self.dim < logits.ndim:
            raise ValueError(f"dim must be a dimension of the {name}'s logits {shape}; got {self.dim}")
        if logits.shape[self.dim] == 1:
            raise _one_class(name, f"shape {shape}, one class in dimension {self.dim}")
        return logits if self.dim in (-1, logits.ndim - 1) else logits.movedim(self.dim, -1)

    def _inputs_for(self, name: str, model: Any, inputs: Any, labels: Tensor | None) -> Any:
        """What a model gets: by the function given for it, with decoder inputs, in its dtype."""
        make = self._inputs_of[name]
        if make is not None:
            inputs = make(inputs)
        model = self.student if name == "student" else model  # which may be wrapped
        config = getattr(model, "config", None)
        if (
            labels is not None
            and isinstance(inputs, Mapping)
            and getattr(config, "is_encoder_decoder", False)
            and not any(inputs.get(key) is not None for key in ("decoder_input_ids", "decoder_inputs_embeds"))
        ):
            labels = labels.masked_fill(labels == self.ignore_index, -100)  # what transformers look for
            make_inputs = getattr(model, "prepare_decoder_input_ids_from_labels", None)
            # A model without that method makes them on its own, if it is given labels; its loss is not used.
            made = {"labels": labels} if make_inputs is None else {"decoder_input_ids": make_inputs(labels=labels)}
            inputs = {**inputs, **made}
        dtypes = _dtypes_of(model)
        device = _device_of(model) if name == "teacher" else None
        if len(dtypes) != 1 and device is None:
            return inputs
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else None

        def cast(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.to(device=device, dtype=dtype if x.is_floating_point() else None)
            if isinstance(x, Mapping):
                return {key: cast(value) for key, value in x.items()}
            return type(x)(map(cast, x)) if type(x) in (tuple, list) else x

        return cast(inputs)

    def _compare_labels(self, inputs: Any, labels: Tensor) -> bool:
        """Raise or warn if labels are one position off from what `shift_labels` says; whether that could be told."""
        ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.shape != labels.shape or labels.ndim < 2:
            return True
        if labels.shape[1] < 2:
            return False
        if getattr(getattr(self.student, "config", None), "is_encoder_decoder", False):
            return True

        def agree(ids: Tensor, labels: Tensor) -> bool:
            counts = labels != self.ignore_index
            return bool(counts.any()) and bool((ids.to(labels.dtype) == labels)[counts].all())

        # Labels that are shifted here are the next ids, as they should be; as they came they are compared with both.
        now, following = agree(ids, labels), agree(ids[:, 1:], labels[:, :-1])
        after = agree(ids[:, 2:], labels[:, :-2])
        decided = [now, following, after].count(True) < 2 and bool((labels != self.ignore_index).any())
        if self.shift_labels:
            wrong = after and not following
            what = "labels are already the next input ids, and shift_labels shifts them once more: pass False"
        else:
            wrong = now and not following
            what = "labels equal the input ids at the same positions, so that the student learns to copy its input: "
            what += "pass shift_labels=True if it is to predict the next one, or False if copying is meant"
        if wrong and self._wants_shift is None:
            raise ValueError(what)
        if wrong:
            warnings.warn(what, stacklevel=4)
        return wrong or decided

    def _logits(self, head: Head | KnownHead | None, outputs: Tensor) -> Tensor:
        with self._autocast():
            return outputs if head is None else head.logits(outputs)


def check_keywords(owner: type, loss: Mapping[str, Any]) -> None:
    """Raise a TypeError for a keyword that neither `owner` nor the loss knows, with the nearest that they do."""
    known = {
        "memory_budget",
        "pos_weight",
        "tail",
        *inspect.signature(DistillationLoss).parameters,
        *inspect.signature(owner).parameters,
    }
    known -= {"loss", "self"}
    for name in loss.keys() - known:
        nearest = difflib.get_close_matches(name, sorted(known), n=1)
        raise TypeError(
            f"{owner.__name__}() got an unknown keyword {name!r}"
            + (f"; the nearest is {nearest[0]!r}" if nearest else f"; it takes {', '.join(sorted(known))}")
        )


def _keywords_with_cache(
    cache: TeacherCache, binary: bool, teacher_inputs: Any, loss: Mapping[str, Any]
) -> dict[str, Any]:
    """The keywords of the loss where a cache is the teacher, its temperature and tail among them. Raises ValueError for
    what cannot be had of it."""
    if binary:
        raise ValueError("a cache holds softmaxes over classes: binary=True has no meaning with it")
    if teacher_inputs is not None:
        raise ValueError("teacher_inputs has no meaning with a cache, which is not run")
    keywords = {"temperature": cache.temperature, **loss}
    if cache.kind in CODED:
        return {"tail": "renormalize" if cache.kind == "sampled" else "bucket", **keywords}
    if "tail" in keywords:
        raise ValueError(f"tail is for caches of kind {' and '.join(map(repr, CODED))}; this one is of {cache.kind!r}")
    return keywords


def teachers_of(
    teacher: Teacher | Sequence[Teacher] | Mapping[str, Teacher] | TeacherCache | str | None,
) -> list[Teacher]:
    """The models among the teachers. A ModuleList has no forward: it is several, too."""
    if teacher is None or teacher == "batch" or isinstance(teacher, TeacherCache):
        return []
    if isinstance(teacher, Mapping):
        teacher = list(teacher.values())
    several = isinstance(teacher, (list, tuple, nn.ModuleList))
    found: list[Any] = list(teacher) if several else [teacher]  # type: ignore[arg-type]
    if any(isinstance(x, TeacherCache) for x in found):
        raise TypeError("a TeacherCache must be the only teacher; got it in a list: pass teacher=cache")
    if not found or not all(callable(x) for x in found):
        raise TypeError(
            "teacher must be a module or function that returns logits, a list of them, 'batch' or None; got "
            + (f"a list of {[type(x).__name__ for x in found]}" if several else repr(teacher))
        )
    return found


def _is_causal_language_model(model: Any) -> bool:
    """Whether this is a model of transformers whose own loss shifts the labels it is given."""
    transformers = sys.modules.get("transformers")
    if transformers is None:
        return False  # whoever has such a model has imported it
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    if callable(getattr(model, "get_base_model", None)):
        model = model.get_base_model()  # of peft
    if not isinstance(model, transformers.PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return False
    from transformers.models.auto import modeling_auto

    names = {kind.__name__ for kind in type(model).__mro__}  # a class of the user's own derives from one of theirs
    known: set[Any] = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    known |= set(modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values())
    found = names & {name for name in known if isinstance(name, str)}
    return bool(found) and not any(name.startswith(_DO_NOT_SHIFT) for name in found)


def _dtypes_of(model: Any) -> set[torch.dtype]:
    """The floating dtypes of a model's parameters."""
    return {p.dtype for p in model.parameters() if p.is_floating_point()} if isinstance(model, nn.Module) else set()


def _device_of(model: Any) -> torch.device | None:
    """Where a teacher that stays where it is has its first weights; None where somebody else moves its inputs."""
    if not isinstance(model, nn.Module) or hasattr(model, "_hf_hook"):
        return None
    found = next(itertools.chain(model.parameters(), model.buffers()), None)
    return None if found is None or found.device.type == "meta" else found.device


def _one_class(name: str, found: str) -> ValueError:
    return ValueError(
        f"the {name}'s logits must be [samples, …] with two classes or more; got {found}, whose softmax is always 1. "
        "One logit a sample (sigmoid), or many labels, are Reptile(binary=True), whose loss is binary_distillation_loss"
    )


def _mask_of_rows(mask: Tensor | None, rows: torch.Size) -> Tensor | None:
    """The mask, if it is one of these rows: [B, T] of [B, T], and [B, 1] of [B]. None: it is of the inputs alone."""
    is_of_rows = mask is not None and len(rows) > 0 and mask.shape[0] == rows[0] and mask.numel() == rows.numel()
    return mask.reshape(rows) if mask is not None and is_of_rows else None


def _spread(weight: Tensor, rows: Sequence[int]) -> Tensor:
    """Weights of samples or rows as weights of rows."""
    if weight.ndim == 1 and len(rows) > 1 and weight.shape[0] == rows[0]:
        weight = weight.reshape(-1, *[1] * (len(rows) - 1)).expand(*rows)
    if list(weight.shape) != list(rows):
        raise ValueError(
            f"sample_weight must have the shape of the samples, [{rows[0]}], or of the rows, {list(rows)}; got "
            f"{list(weight.shape)}"
        )
    return weight.float() if weight.dtype != torch.float64 else weight


def _not_zero(num_rows: float | Tensor) -> float | Tensor:
    """Of a step without counted rows the loss is 0, not 0 / 0."""
    return num_rows + (num_rows == 0) if isinstance(num_rows, Tensor) else (num_rows or 1)


def _check_labels(labels: Tensor | None) -> None:
    if labels is None:
        raise ValueError("teacher=None trains on labels; got a batch without")
