"""What an evaluation measures: torchmetrics over the rows of a whole evaluation set, each row with the same weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAveragePrecision,
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassF1Score,
    MultilabelAveragePrecision,
    MultilabelF1Score,
)

from ..binary import binary_distillation_loss
from ..functional import distillation_loss

# Name → whether more is better. "loss" is the objective that is trained; the others do not depend on its settings.
METRICS = {
    "loss": False,
    "cross_entropy": False,  # nats a row, against the labels
    "perplexity": False,  # exp(cross_entropy)
    "accuracy": True,  # share of the rows whose largest logit is the label's
    "f1": True,  # macro: mean over classes
    "agreement": True,  # share of the rows where student and teacher put the same class first
    "average_precision": True,  # of binary=True: area under precision and recall; mean over labels
}
_NEED_LABELS = ("cross_entropy", "perplexity", "accuracy", "f1", "average_precision")


def check_metrics(metrics: Sequence[str], has_teacher: bool, binary: bool = False) -> None:
    """Raise a ValueError for a name that is not known or cannot be measured."""
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f"metrics must be among {', '.join(map(repr, METRICS))}; got {name!r}")
        if name == "average_precision" and not binary:
            raise ValueError("metrics: 'average_precision' is measured with binary=True; got binary=False")
        if name == "agreement" and not has_teacher:
            raise ValueError("metrics: 'agreement' is agreement with the teacher, and teacher is None")


def better(name: str, new: float, old: float | None) -> bool:
    """Whether `new` improves on `old`; NaN never does."""
    if math.isnan(new):
        return False
    return old is None or (new > old if METRICS[name] else new < old)


class FirstClass(NamedTuple):
    """A teacher's likeliest class in each row, [...], among the first `classes`; -1 where none is known."""

    indices: Tensor
    classes: int

    @classmethod
    def of(cls, indices: Tensor, log_probs: Tensor, classes: int) -> FirstClass:
        """Of K classes a row [..., K]; a student that has fewer classes is compared in those alone."""
        listed = (indices >= 0) & (indices < classes)
        best = log_probs.masked_fill(~listed, -torch.inf).argmax(-1, keepdim=True)
        first = indices.masked_fill(~listed, -1).gather(-1, best).squeeze(-1)
        return cls(first, classes)


class Evaluation:
    """Accumulates the named metrics batch by batch; with several processes, torchmetrics adds them up."""

    def __init__(self, metrics: Sequence[str], ignore_index: int, device: torch.device, binary: bool = False) -> None:
        self._names = metrics
        self._binary = binary
        self._ignore_index = ignore_index
        self._device = device
        self._metrics: dict[str, Metric] = {}

    def _metric(self, name: str, make: type[Metric], **keywords: object) -> Metric:
        # Made on first use: the number of classes is known from the logits alone.
        if name not in self._metrics:
            self._metrics[name] = make(**keywords).to(self._device)
        return self._metrics[name]

    def update(
        self,
        loss: Tensor,
        rows: float,
        logits: Tensor,
        teacher_logits: Tensor | FirstClass | None,
        labels: Tensor | None,
        weight: Tensor | None = None,
    ) -> None:
        """`loss` is the mean over the rows that count, `rows` or the sum of their weights; logits [..., V]; labels and
        weights [...]. Accuracy, F1 and agreement count rows, not weights, but for rows of weight 0."""
        if rows == 0:
            return
        self._metric("loss", MeanMetric).update(loss, rows)
        if self._binary:
            assert not isinstance(teacher_logits, FirstClass)  # a cache is of classes
            self._update_binary(rows, logits.squeeze(-1), teacher_logits, labels, weight)
            return
        num_classes = logits.shape[-1]
        logits = logits.reshape(-1, num_classes)
        prediction = logits.argmax(-1)
        if labels is None:
            missing = [name for name in self._names if name in _NEED_LABELS]
            if missing:
                raise ValueError(f"metrics {missing} need labels in the eval batches; got a batch without")
            kept = torch.ones_like(prediction, dtype=torch.bool) if weight is None else weight.reshape(-1) != 0
        else:
            labels = labels.reshape(-1)
            kept = labels != self._ignore_index
            if "cross_entropy" in self._names or "perplexity" in self._names:
                # Not torchmetrics.text.Perplexity: it keeps a softmax of all logits; its value is exp of this mean.
                nats = distillation_loss(
                    logits,
                    logits,
                    labels,
                    weight=None if weight is None else weight.reshape(-1),
                    soft_weight=0.0,
                    hard_weight=1.0,
                    ignore_index=self._ignore_index,
                )
                self._metric("cross_entropy", MeanMetric).update(nats, rows)
            kept = kept if weight is None else kept & (weight.reshape(-1) != 0)
            count = {"num_classes": num_classes, "validate_args": False}
            if "accuracy" in self._names:
                accuracy = self._metric("accuracy", MulticlassAccuracy, average="micro", **count)
                accuracy.update(prediction[kept], labels[kept])
            if "f1" in self._names:
                f1 = self._metric("f1", MulticlassF1Score, average="macro", **count)
                f1.update(prediction[kept], labels[kept])
        if "agreement" in self._names and teacher_logits is not None:
            if isinstance(teacher_logits, FirstClass):
                first, shared = teacher_logits.indices.reshape(-1), teacher_logits.classes
            else:
                shared = min(num_classes, teacher_logits.shape[-1])  # vocab="truncate" compares no others
                first = teacher_logits.reshape(-1, teacher_logits.shape[-1])[:, :shared].argmax(-1)
            prediction = prediction if shared == num_classes else logits[:, :shared].argmax(-1)
            self._metric("agreement", MeanMetric).update((prediction == first)[kept].float())

    def _update_binary(
        self, rows: float, z: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, weight: Tensor | None
    ) -> None:
        """Of logits [...] that each are a distribution of their own. A target counts as yes from ½ on. f1 and
        average_precision are means over the labels of [B, L] and [B, T, L]; of [B] and others, over all elements."""
        kept = torch.ones_like(z, dtype=torch.bool) if weight is None else weight != 0
        if labels is None:
            missing = [name for name in self._names if name in _NEED_LABELS]
            if missing:
                raise ValueError(f"metrics {missing} need labels in the eval batches; got a batch without")
        else:
            kept = kept & (labels != self._ignore_index)
            if "cross_entropy" in self._names or "perplexity" in self._names:
                nats = binary_distillation_loss(
                    z, z, labels, weight=weight, soft_weight=0.0, hard_weight=1.0, ignore_index=self._ignore_index
                )
                self._metric("cross_entropy", MeanMetric).update(nats, rows)
            target = (labels >= 0.5).long()
            probability = z.float().sigmoid()
            if "accuracy" in self._names:
                self._metric("accuracy", BinaryAccuracy, validate_args=False).update(probability[kept], target[kept])
            many = z.ndim in (2, 3)
            if many:
                probability, target, of = (x.reshape(-1, z.shape[-1]) for x in (probability, target, kept))
                target = target.masked_fill(~of, -1)  # ignored
                common = {"num_labels": z.shape[-1], "average": "macro", "ignore_index": -1, "validate_args": False}
            else:
                probability, target, common = probability[kept], target[kept], {"validate_args": False}
            if "f1" in self._names:
                f1 = self._metric("f1", MultilabelF1Score if many else BinaryF1Score, **common)
                f1.update(probability, target)
            if "average_precision" in self._names:
                kind = MultilabelAveragePrecision if many else BinaryAveragePrecision
                self._metric("average_precision", kind, **common).update(probability, target)
        if "agreement" in self._names and teacher_logits is not None:
            same = (z > 0) == (teacher_logits.squeeze(-1) > 0)
            self._metric("agreement", MeanMetric).update(same[kept].float())

    def compute(self) -> dict[str, float]:
        """The metrics by name, "loss" always among them."""
        if "loss" not in self._metrics:
            raise ValueError("eval must hold at least one row that counts; got none")
        values = {name: float(metric.compute()) for name, metric in self._metrics.items()}
        if "perplexity" in self._names:
            values["perplexity"] = math.exp(min(values["cross_entropy"], 700.0))
        return {name: values[name] for name in ("loss", *(n for n in self._names if n != "loss"))}
