"""What student and teacher say of held-out data, once the student is trained: where they disagree most, which classes
are taken for which, and how far their probabilities can be believed."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from ..functional import distillation_loss
from ..sparse import sparse_distillation_loss
from ..training import Reptile
from ..training.batches import is_empty
from ..training.modes import frozen, in_mode
from ..training.objective import Objective

BINS = 10
_ROWS = 512  # whose probabilities are made at a time
_SHOWN = 3  # classes of a row
_FEW_CLASSES = 50


@dataclass
class Calibration:
    """Rows by the probability of the class that is put first, in bins of equal width: how many, their mean probability,
    and how often that class is right."""

    rows: list[int]
    probability: list[float]
    accuracy: list[float]

    @property
    def error(self) -> float:
        """The expected calibration error (Naeini et al. 2015): mean difference of the two, weighed by rows."""
        total = sum(self.rows)
        parts = zip(self.rows, self.probability, self.accuracy, strict=True)
        return sum(n * abs(p - a) for n, p, a in parts) / total if total else 0.0


@dataclass
class Disagreement:
    """A row where the two are far apart. student, teacher: the likeliest classes and their probabilities."""

    sample: int  # in the order of the loader, from 0
    position: int  # of the row in its sample
    divergence: float  # nats of forward KL at temperature 1
    label: int | None
    student: list[tuple[int, float]]
    teacher: list[tuple[int, float]]


@dataclass
class Answers:
    rows: int = 0
    confusion: list[list[int]] | None = None  # of few classes: [label][class that the student puts first]
    calibration: dict[str, Calibration] = field(default_factory=dict)
    disagreements: list[Disagreement] = field(default_factory=list)  # the largest first

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        for name, of in self.calibration.items():
            found["calibration"][name]["error"] = of.error
        return found


def collect(reptile: Reptile, data: Iterable[Any], examples: int = 12) -> Answers:
    """One pass over held-out batches; at most `examples` disagreements, of a sample the largest alone. There are never
    more probabilities in memory than those of 512 rows. A cache knows a few classes a row: it has no calibration."""
    objective = reptile.objective
    found = Answers()
    counted: dict[str, Tensor] = {}
    matrix: MulticlassConfusionMatrix | None = None
    worst: list[tuple[float, int, Disagreement]] = []
    first_sample = 0
    with torch.no_grad(), frozen(objective.teachers), in_mode(reptile.student, training=False):
        for given in data:
            batch = reptile.on_device(objective.split(given))
            if is_empty(batch.inputs):
                continue
            outputs = objective.student_outputs(reptile.student, batch)
            shape = outputs.shape[:-1]
            per_sample = max(1, shape[1:].numel())
            start = 0
            for logits, of_teacher, part in objective.logits_in_parts(outputs, objective.teacher_outputs(batch), batch):
                flat = logits.reshape(-1, logits.shape[-1])
                labels = None if part.labels is None else part.labels.reshape(-1)
                teacher = [x.reshape(-1, x.shape[-1]) for x in of_teacher]
                for begin in range(0, len(flat), _ROWS):
                    rows = slice(begin, begin + _ROWS)
                    of_rows = None if labels is None else labels[rows]
                    kept = torch.ones(len(flat[rows]), dtype=torch.bool, device=flat.device)
                    if of_rows is not None:
                        kept = of_rows != objective.ignore_index
                    numbers = torch.arange(len(flat), device=flat.device)[rows][kept] + start
                    kept_labels = None if of_rows is None else of_rows[kept]
                    z, t = flat[rows][kept].float(), [x[rows][kept] for x in teacher]
                    found.rows += len(z)
                    if kept_labels is not None:
                        _count(counted, "student", z, kept_labels)
                        if len(t) == 1:
                            _count(counted, "teacher", t[0].float(), kept_labels)
                        if per_sample == 1 and z.shape[-1] <= _FEW_CLASSES:
                            matrix = matrix or MulticlassConfusionMatrix(z.shape[-1]).to(z.device)
                            matrix.update(z.argmax(-1), kept_labels)
                    if t and len(z):
                        far = _divergence(objective, z, t)
                        _keep_worst(worst, examples, far, z, t, kept_labels, numbers, per_sample, first_sample)
                start += len(flat)
            first_sample += shape[0] if shape else 1
    found.confusion = None if matrix is None else matrix.compute().tolist()
    found.calibration = {name: _calibration(of) for name, of in counted.items()}
    found.disagreements = [one for _, _, one in sorted(worst, key=lambda x: -x[0])]
    return found


def _count(counted: dict[str, Tensor], name: str, logits: Tensor, labels: Tensor) -> None:
    """Add to [3, BINS]: rows, the sum of their highest probabilities, how many are right."""
    probability, first = logits.softmax(-1).max(-1)
    bins = (probability * BINS).long().clamp(max=BINS - 1)
    sums = torch.zeros(3, BINS, dtype=torch.float64, device=logits.device)
    for row, values in zip(sums, (torch.ones_like(probability), probability, (first == labels)), strict=True):
        row.index_add_(0, bins, values.double())
    counted[name] = counted[name] + sums.cpu() if name in counted else sums.cpu()


def _calibration(sums: Tensor) -> Calibration:
    rows, probability, right = sums
    count = rows.clamp(min=1)
    return Calibration(rows.long().tolist(), (probability / count).tolist(), (right / count).tolist())


def _divergence(objective: Objective, logits: Tensor, teacher: Sequence[Tensor]) -> Tensor:
    """Of each row; what is no number is not far."""
    if objective.cache is not None and len(teacher) == 2:
        tail = objective.criterion.keywords["tail"]
        found = sparse_distillation_loss(logits, *teacher, tail=tail, reduction="none", vocab="truncate")
    else:
        total = sum(objective.teacher_weights)
        found = torch.zeros(len(logits), device=logits.device)
        for weight, one in zip(objective.teacher_weights, teacher, strict=True):
            found += weight / total * distillation_loss(logits, one.float(), reduction="none", vocab="truncate")
    return found.nan_to_num(nan=-1.0, posinf=torch.finfo(torch.float32).max)


def _keep_worst(
    worst: list[tuple[float, int, Disagreement]],
    most: int,
    divergence: Tensor,
    logits: Tensor,
    teacher: Sequence[Tensor],
    labels: Tensor | None,
    numbers: Tensor,
    per_sample: int,
    first_sample: int,
) -> None:
    for i in divergence.topk(min(len(divergence), 4 * most)).indices.tolist():
        value, number = float(divergence[i]), int(numbers[i])
        sample, position = first_sample + number // per_sample, number % per_sample
        same = next((k for k, (_, _, one) in enumerate(worst) if one.sample == sample), None)
        if same is not None:
            if worst[same][0] >= value:
                continue
            worst.pop(same)
            heapq.heapify(worst)
        elif len(worst) >= most and worst[0][0] >= value:
            break  # those that follow are smaller
        if not teacher[0].is_floating_point():  # classes, of a cache
            order = teacher[1][i].argsort(descending=True)[:_SHOWN]
            of_teacher = [(int(teacher[0][i, k]), float(teacher[1][i, k].exp())) for k in order]
        else:
            of_teacher = _likeliest(teacher[0][i].float())
        label = None if labels is None else int(labels[i])
        one = Disagreement(sample, position, value, label, _likeliest(logits[i]), of_teacher)
        heapq.heappush(worst, (value, number + first_sample * per_sample, one))
        if len(worst) > most:
            heapq.heappop(worst)


def _likeliest(logits: Tensor) -> list[tuple[int, float]]:
    probability, classes = logits.softmax(-1).topk(min(_SHOWN, logits.shape[-1]))
    return list(zip(classes.tolist(), probability.tolist(), strict=True))
