"""The losses as modules: they hold the keywords and take the tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from .binary import binary_distillation_loss
from .checks import check_memory_budget, check_scale, check_softcap, one_of, refuse_attribute, refuse_keyword
from .functional import distillation_loss
from .linear import linear_distillation_loss
from .options import (
    TAILS,
    BinaryKeywords,
    Keywords,
    Options,
    SparseKeywords,
    make_binary_options,
    make_options,
    make_sparse_options,
)
from .sparse import sparse_distillation_loss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

    class LogitsKeywords(Keywords, total=False):
        group: ProcessGroup | None

    class SparseLogitsKeywords(SparseKeywords, total=False):
        group: ProcessGroup | None

    class LinearKeywords(Keywords, total=False):
        student_softcap: float | None
        teacher_softcap: float | None
        student_scale: float
        teacher_scale: float
        memory_budget: int | None
        tail: str


class _Loss(nn.Module):
    """Holds the keywords of a function, with the function's own defaults."""

    loss: ClassVar[Callable[..., Tensor]]
    make_options: ClassVar[Callable[..., Options]] = staticmethod(make_options)
    keywords_of_options: ClassVar[frozenset[str]] = frozenset(Keywords.__annotations__)
    keywords: dict[str, Any]

    def __init_subclass__(cls) -> None:
        """The signature of a module, as help() shows it, has its function's keywords."""
        super().__init_subclass__()
        own, *_ = inspect.signature(cls.__init__).parameters.values()
        parameters = inspect.signature(cls.loss).parameters.values()
        keywords = [p for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in cls.of_the_call()]
        cls.__init__.__signature__ = inspect.Signature([own, *keywords])  # type: ignore[attr-defined]

    @classmethod
    def of_the_call(cls) -> tuple[str, ...]:
        """What the call takes, not the module."""
        return tuple(inspect.signature(cls.forward).parameters)[1:]

    def __init__(self, **keywords: Any) -> None:
        super().__init__()
        signature = inspect.signature(type(self))
        for name in keywords:
            if name not in signature.parameters:
                refuse_keyword(type(self).__name__, name, signature.parameters, self.of_the_call())
        given = signature.bind(**keywords)
        given.apply_defaults()
        self.keywords = self._checked(dict(given.arguments))

    def __getattr__(self, name: str) -> Any:
        keywords = self.__dict__.get("keywords", {})
        return keywords[name] if name in keywords else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Keywords are attributes, and may be set from step to step (`criterion.temperature = 2.0`)."""
        keywords = self.__dict__.get("keywords", {})
        if name in keywords:
            self.keywords = self._checked({**keywords, name: value})
            return
        # A class derived from these may have attributes of its own.
        if keywords and not name.startswith("_") and type(self).__module__ == __name__:
            refuse_attribute(type(self).__name__, name, keywords, self.of_the_call())
        super().__setattr__(name, value)

    def _checked(self, keywords: dict[str, Any]) -> dict[str, Any]:
        """The keywords, if the function would take them: complain now, not in the first step."""
        known = self.keywords_of_options
        type(self).make_options(**{name: value for name, value in keywords.items() if name in known})
        return keywords

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.keywords.items() if value is not None)


class DistillationLoss(_Loss):
    """`distillation_loss` with its keywords fixed.

    Equivalent PyTorch (temperature T, every row counts)::

        x = F.log_softmax(student_logits.float() / T, -1)
        y = F.log_softmax(teacher_logits.float() / T, -1)
        loss = T * T * (y.exp() * (y - x)).sum(-1).mean()

    The keywords are those of `distillation_loss` without `weight` and `denominator`, which go to the call. They are
    attributes too, checked when the module is made and when one is set (`criterion.temperature = 2.0`).

    Shapes: student and teacher logits [..., V]; labels, if any, integer [...]; result a scalar, or [...] with
    `reduction="none"`. Dtypes, errors and the paper: see `distillation_loss`.

    Example::

        criterion = DistillationLoss(temperature=2.0, hard_weight=0.5)
        criterion(student(x), teacher(x), labels).backward()
    """

    loss = staticmethod(distillation_loss)

    def __init__(self, **keywords: Unpack[LogitsKeywords]) -> None:
        super().__init__(**keywords)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        return distillation_loss(
            student_logits, teacher_logits, labels, weight=weight, denominator=denominator, **self.keywords
        )


class BinaryDistillationLoss(_Loss):
    """`binary_distillation_loss` with its keywords fixed: logits that each are a distribution of their own.

    Equivalent PyTorch (temperature T, every element counts)::

        s, t = student_logits.float() / T, teacher_logits.float() / T
        p = t.sigmoid()
        soft = p * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - p) * (F.logsigmoid(-t) - F.logsigmoid(-s))
        loss = T * T * soft.mean()

    The keywords are those of `binary_distillation_loss` without `weight`, `pos_weight` and `denominator`, which go to
    the call. They are attributes too, checked when the module is made and when one is set.

    Shapes: student and teacher logits [...]; labels, if any, floating point [...]; result a scalar, or [...] with
    `reduction="none"`. Dtypes, errors and the paper: see `binary_distillation_loss`.

    Example::

        criterion = BinaryDistillationLoss(temperature=2.0, hard_weight=0.5)
        criterion(student(x), teacher(x), labels.float()).backward()
    """

    loss = staticmethod(binary_distillation_loss)
    make_options = staticmethod(make_binary_options)

    def __init__(self, **keywords: Unpack[BinaryKeywords]) -> None:
        super().__init__(**keywords)

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        pos_weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        return binary_distillation_loss(
            student_logits,
            teacher_logits,
            labels,
            weight=weight,
            pos_weight=pos_weight,
            denominator=denominator,
            **self.keywords,
        )


class SparseDistillationLoss(_Loss):
    """`sparse_distillation_loss` with its keywords fixed: a teacher of which K classes a row are known.

    Equivalent PyTorch (temperature T, every row counts)::

        x = F.log_softmax(student_logits.float() / T, -1).gather(-1, teacher_indices)
        p, y = teacher_log_probs.exp(), teacher_log_probs
        r, R = 1 - p.sum(-1), 1 - x.exp().sum(-1)
        loss = T * T * ((p * (y - x)).sum(-1) + r * (r.log() - R.log())).mean()

    The keywords are those of `sparse_distillation_loss` without `weight` and `denominator`, which go to the call. They
    are attributes too, checked when the module is made and when one is set.

    Shapes: student logits [..., V]; indices (int64 or int32) and log-probabilities [..., K]; labels, if any, integer
    [...]; result a scalar, or [...] with `reduction="none"`. Dtypes, errors and papers: see `sparse_distillation_loss`.

    Example::

        criterion = SparseDistillationLoss(temperature=2.0)
        indices, log_probs = top_k_targets(teacher(x), 64, temperature=2.0)  # or from a file
        criterion(student(x), indices, log_probs).backward()
    """

    loss = staticmethod(sparse_distillation_loss)
    make_options = staticmethod(make_sparse_options)
    keywords_of_options = _Loss.keywords_of_options | {"tail"}

    def __init__(self, **keywords: Unpack[SparseLogitsKeywords]) -> None:
        super().__init__(**keywords)

    def forward(
        self,
        student_logits: Tensor,
        teacher_indices: Tensor,
        teacher_log_probs: Tensor,
        labels: Tensor | None = None,
        *,
        weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        return sparse_distillation_loss(
            student_logits,
            teacher_indices,
            teacher_log_probs,
            labels,
            weight=weight,
            denominator=denominator,
            **self.keywords,
        )


class LinearDistillationLoss(_Loss):
    """`linear_distillation_loss` with its keywords fixed.

    Equivalent PyTorch (temperature T, no bias, every row counts), of which only a chunk of rows exists at a time::

        x = F.log_softmax(F.linear(student_hidden, student_weight).float() / T, -1)
        y = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float() / T, -1)
        loss = T * T * (y.exp() * (y - x)).sum(-1).mean()

    The keywords are those of `linear_distillation_loss` without `student_head`, `teacher_head`, `student_bias`,
    `teacher_bias`, `teacher_indices`, `teacher_log_probs`, `weight`, `denominator` and `num_rows_in`, which go to the
    call. They are attributes too, checked when the module is made and when one is set (`criterion.temperature = 2.0`).

    Shapes: hidden states [..., H], heads [V, H], biases [V]; labels, if any, integer [...]; result a scalar, or [...]
    with `reduction="none"`. Dtypes, errors and papers: see `linear_distillation_loss`.

    Example::

        criterion = LinearDistillationLoss(temperature=2.0)
        criterion(student_hidden, student.lm_head.weight, teacher_hidden, teacher.lm_head.weight).backward()
    """

    loss = staticmethod(linear_distillation_loss)

    def __init__(self, **keywords: Unpack[LinearKeywords]) -> None:
        super().__init__(**keywords)

    def _checked(self, keywords: dict[str, Any]) -> dict[str, Any]:
        keywords = super()._checked(keywords)
        check_memory_budget(keywords["memory_budget"])
        one_of("tail", keywords["tail"], TAILS)
        for side in ("student", "teacher"):
            keywords[f"{side}_softcap"] = check_softcap(side, keywords[f"{side}_softcap"])
            keywords[f"{side}_scale"] = check_scale(side, keywords[f"{side}_scale"])
        return keywords

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_head: nn.Module | None = None,
        teacher_head: nn.Module | None = None,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        weight: Tensor | None = None,
        denominator: float | Tensor | None = None,
        num_rows_in: int | None = None,
        teacher_indices: Tensor | None = None,
        teacher_log_probs: Tensor | None = None,
    ) -> Tensor:
        return linear_distillation_loss(
            student_hidden,
            student_weight,
            teacher_hidden,
            teacher_weight,
            labels,
            student_head=student_head,
            teacher_head=teacher_head,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            weight=weight,
            denominator=denominator,
            num_rows_in=num_rows_in,
            teacher_indices=teacher_indices,
            teacher_log_probs=teacher_log_probs,
            **self.keywords,
        )
