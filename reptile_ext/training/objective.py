"""What a training step computes from a batch and two models. `Reptile` calls it, and so can any other trainer."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..linear import linear_distillation_loss
from ..modules import DistillationLoss, LinearDistillationLoss
from .batches import Batch, logits_of, num_samples, split
from .heads import Head, output_layer
from .modes import in_mode

EVALUATED_ROWS = 512  # whose logits `logits_in_parts` makes at a time: as many as make a product fast


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
        student, teacher: modules that take the same inputs and return logits: a tensor [..., V], or an object with
            `.logits`. The teacher is run in eval mode and without a graph, whatever mode it is in, and is left in it.
            `teacher=None` is the labels' cross entropy alone.
        dim: the class dimension of the logits.
        shift_labels: labels are a causal language model's input ids; use the next one at each position. False: they
            are already the next ones.
        fused_linear: never have the logits in full: the loss is that of hidden states and heads, by
            `linear_distillation_loss`. See `Reptile`.
        autocast: dtype of the forward passes and of the heads' products, float32 for none. The default, None, leaves
            both to the autocast that the caller has set.
        loss: keywords of `distillation_loss`: temperature, hard_weight, ignore_index, inplace, …; with `fused_linear`,
            memory_budget too, and no inplace.

    Shapes: a batch is a tensor of inputs, a pair (inputs, labels) or a mapping passed to the models as keywords, its
    "labels" apart. Labels are integers [...] for logits [..., V]; those equal to `ignore_index` are ignored rows.
    Without labels every row counts. The loss is a float32 scalar with a graph to the student's parameters.

    The model that is run is an argument of the call: the student itself, or what a trainer has wrapped it in (DDP,
    torch.compile). `student` says where the head is, which mode the student is in and which device it is on.

    A step of several micro-batches or processes has one number of rows to divide by, not one each: `num_items`, the
    labels that count in all of them. `count` computes it, and Hugging Face's Trainer calls it num_items_in_batch.
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
            head, `dim` other than -1 or inplace=True. When called: a batch without labels where they are needed,
            micro-batches that cannot be counted together, a model that `fused_linear` is not for, and what the losses
            raise.
        TypeError: when called, a batch or a model's output of another kind.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        dim: int = -1,
        shift_labels: bool = False,
        fused_linear: bool = False,
        autocast: torch.dtype | None = None,
        **loss: Any,
    ) -> None:
        for name in ("reduction", "weight", "denominator"):
            if name in loss:
                raise ValueError(f"{name} is set by the training step: the loss is a mean over all rows of a step")
        linear_only = {"memory_budget": loss.pop("memory_budget")} if "memory_budget" in loss else {}
        if linear_only and not fused_linear:
            raise ValueError("memory_budget is for the chunks of fused_linear=True; got it with fused_linear=False")
        if teacher is None:
            if meaningless := sorted(set(loss) - {"ignore_index"}):
                raise ValueError(f"teacher=None leaves no meaning to {meaningless}")
            loss |= {"soft_weight": 0.0, "hard_weight": 1.0}  # the cross entropy, by the same kernel
        self.student, self.teacher = student, teacher
        self.dim = dim
        self.shift_labels = shift_labels
        self.autocast = autocast
        self.criterion = DistillationLoss(**loss)
        self.ignore_index: int = self.criterion.keywords["ignore_index"]
        self._linear_only = linear_only
        self._rows_per_sample: int | None = None
        self._set_fused_linear(fused_linear)

    def with_fused_linear(self, fused_linear: bool) -> Objective:
        """The same objective of the same models, with or without `fused_linear`."""
        other = copy.copy(self)
        other._set_fused_linear(fused_linear)
        return other

    def _set_fused_linear(self, fused_linear: bool) -> None:
        # Where there is no head, a model is asked for its logits.
        self.student_head: Head | None = None
        self.teacher_head: Head | None = None
        self._linear_keywords: dict[str, Any] = {}
        if not fused_linear:
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
        if self.teacher is not None and output_layer(self.teacher) is not None:
            self.teacher_head = Head("teacher", self.teacher)

    # ------------------------------------------------------------------------------------------- all of it in a call

    def __call__(self, model: nn.Module, batch: Any, num_items: float | Tensor | None = None) -> Tensor:
        """The loss of a batch, divided by the rows that `num_items` stands for.

        model: the student, or what it is wrapped in.
        batch: on the models' device.
        num_items: what `count` returns for all micro-batches of the step; None: this batch is all of it.
        """
        return self._loss_and_outputs(model, batch, num_items)[0]

    def loss_and_logits(
        self, model: nn.Module, batch: Any, num_items: float | Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same, and the student's logits as the model gives them, without a graph: for a trainer's own metrics.

        With `fused_linear` they are made for this alone, all of them at once.
        """
        if self.criterion.keywords["inplace"] and torch.is_grad_enabled():
            raise ValueError("inplace=True leaves no logits to return: their gradient is written over them")
        loss, outputs = self._loss_and_outputs(model, batch, num_items)
        with torch.no_grad():
            return loss, self._logits(self.student_head, outputs.detach()).movedim(-1, self.dim)

    def _loss_and_outputs(
        self, model: nn.Module, batch: Any, num_items: float | Tensor | None
    ) -> tuple[Tensor, Tensor]:
        batch = self.split(batch)
        outputs = self.student_outputs(model, batch.inputs)
        teacher_outputs = self.teacher_outputs(batch.inputs)
        return self.loss(outputs, teacher_outputs, batch.labels, self.num_rows(outputs, batch, num_items)), outputs

    # ------------------------------------------------------------------------------------------- and step by step

    def split(self, batch: Any) -> Batch:
        """A batch as (inputs, labels), the labels shifted if they are to be. What is split already stays."""
        return batch if isinstance(batch, Batch) else split(batch, self.shift_labels, self.ignore_index)

    def count(self, batches: Iterable[Any], reduce: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Labels that count or, without labels, samples, in all micro-batches of a step: `num_items` of the calls.

        reduce: sums a tensor over the processes that share the step; None where there is one.
        """
        split_batches = [self.split(batch) for batch in batches]
        if len({batch.labels is None for batch in split_batches}) > 1:
            raise ValueError("the micro-batches of a step must all have labels or all have none; got both kinds")
        counts = [
            num_samples(inputs) if labels is None else (labels != self.ignore_index).sum()
            for inputs, labels in split_batches
        ]
        count = torch.stack([torch.as_tensor(c, device=self._device) for c in counts]).sum()
        return count if reduce is None else reduce(count)

    def num_rows(
        self, outputs: Tensor, batch: Batch | tuple[Any, Tensor | None], num_items: float | Tensor | None = None
    ) -> float | Tensor:
        """The rows to divide a loss by: those that count in this batch or, by `num_items`, in all of the step.

        Without labels, `num_items` are samples, and how many rows each has is known only now that the model has run.
        """
        inputs, labels = batch
        if num_items is None:
            return self.counted_rows(outputs, labels)
        if labels is not None:
            return num_items
        rows = outputs.shape[:-1].numel() // num_samples(inputs)
        if self._rows_per_sample not in (None, rows):
            raise ValueError(
                "without labels, samples that share a step must have the same number of rows; got "
                f"{self._rows_per_sample} and {rows}: give labels, with ignore_index={self.ignore_index} at the padding"
            )
        self._rows_per_sample = rows
        return num_items * rows

    def counted_rows(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        """Number of the rows of these outputs that are not ignored."""
        if labels is None:
            return torch.tensor(outputs.shape[:-1].numel(), device=outputs.device)
        return (labels != self.ignore_index).sum()

    def student_outputs(self, model: nn.Module, inputs: Any) -> Tensor:
        """[..., V] logits of `model`, the student or what it is wrapped in; with `fused_linear`, [..., H] hidden
        states."""
        return self._outputs(model, self.student_head, inputs)

    def teacher_outputs(self, inputs: Any) -> Tensor | None:
        """[..., V] logits of the teacher or, where it has a head and `fused_linear` is on, [..., H] hidden states; None
        without a teacher."""
        if self.teacher is None:
            return None
        # no_grad, not inference_mode: autograd refuses to save an inference tensor for the student's backward.
        with torch.no_grad(), in_mode(self.teacher, training=False):
            return self._outputs(self.teacher, self.teacher_head, inputs)

    def loss(
        self, outputs: Tensor, teacher_outputs: Tensor | None, labels: Tensor | None, num_rows: float | Tensor
    ) -> Tensor:
        """Sum of the loss over the rows of these outputs, divided by `num_rows`."""
        head = self.student_head
        if head is None:
            return self.loss_of_logits(outputs, teacher_outputs, labels, num_rows)
        teacher: dict[str, Any] = {"teacher_weight": None}  # its outputs are logits
        if teacher_outputs is None:
            # The divergence has no weight, so any teacher will do: one of one feature costs next to nothing.
            _check_labels(labels)
            teacher_outputs = outputs.new_zeros(*outputs.shape[:-1], 1)
            teacher["teacher_weight"] = outputs.new_zeros(head.weight.shape[0], 1)
        elif self.teacher_head is not None:
            found = self.teacher_head.keywords("teacher")
            teacher = {name: x.detach() if isinstance(x, Tensor) else x for name, x in found.items()}
        with self._autocast():  # of the heads' products, as it is in the models
            return linear_distillation_loss(
                outputs,
                teacher_hidden=teacher_outputs,
                labels=labels,
                denominator=_at_least_one(num_rows),
                **head.keywords("student"),
                **teacher,
                **self._linear_keywords,
            )

    def loss_of_logits(
        self, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, num_rows: float | Tensor
    ) -> Tensor:
        """`loss` of logits, which is what `logits_in_parts` gives."""
        if teacher_logits is None:
            _check_labels(labels)
            teacher_logits = logits.detach()  # `criterion` gives the divergence no weight: any logits of this shape do
        loss: Tensor = self.criterion(logits, teacher_logits, labels, denominator=_at_least_one(num_rows))
        return loss

    def logits_in_parts(
        self, outputs: Tensor, teacher_outputs: Tensor | None, labels: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """(student's logits, teacher's logits, labels) of a batch, for metrics; with `fused_linear`, of a few rows at a
        time, so that there are never more logits than that."""
        if self.student_head is None:
            yield outputs, teacher_outputs, labels
            return
        rows = outputs.shape[:-1]
        if labels is not None and labels.shape != rows:
            raise ValueError(
                f"labels must have the shape of the hidden states' rows, {list(rows)}; got {list(labels.shape)}"
            )
        if teacher_outputs is not None and teacher_outputs.shape[:-1] != rows:
            raise ValueError(
                f"the teacher must have the student's rows, {list(rows)}; got {list(teacher_outputs.shape[:-1])}"
            )
        flat = outputs.flatten(0, -2)
        flat_teacher = None if teacher_outputs is None else teacher_outputs.flatten(0, -2)
        flat_labels = None if labels is None else labels.flatten()
        for start in range(0, flat.shape[0], EVALUATED_ROWS):
            part = slice(start, start + EVALUATED_ROWS)
            yield (
                self._logits(self.student_head, flat[part]),
                None if flat_teacher is None else self._logits(self.teacher_head, flat_teacher[part]),
                None if flat_labels is None else flat_labels[part],
            )

    # ------------------------------------------------------------------------------------------- inside

    @property
    def _device(self) -> torch.device:
        found = next(itertools.chain(self.student.parameters(), self.student.buffers()), None)
        return torch.device("cpu") if found is None else found.device

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self._device.type, self.autocast, enabled=self.autocast != torch.float32)

    def _outputs(self, model: nn.Module, head: Head | None, inputs: Any) -> Tensor:
        with self._autocast():
            if head is not None:
                return head.hidden_states(lambda: logits_of(model, inputs))
            return logits_of(model, inputs).movedim(self.dim, -1)

    def _logits(self, head: Head | None, outputs: Tensor) -> Tensor:
        with self._autocast():
            return outputs if head is None else head.logits(outputs)


def _at_least_one(num_rows: float | Tensor) -> float | Tensor:
    """Of a step without counted rows the loss is 0, not 0 / 0."""
    return num_rows.clamp(min=1) if isinstance(num_rows, Tensor) else max(num_rows, 1)


def _check_labels(labels: Tensor | None) -> None:
    if labels is None:
        raise ValueError("teacher=None trains on labels; got a batch without")
