"""Every mistake gets a ValueError or TypeError whose words name the argument, what came and what is wanted."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import reptile_ext
from reptile_ext import reference
from reptile_ext.options import DIVERGENCE_TABLE, DIVERGENCES

FUNCTIONS = pytest.mark.parametrize(
    "loss_fn", [reptile_ext.distillation_loss, reference.distillation_loss], ids=["kernel", "reference"]
)

KNOWN = ", ".join(map(repr, DIVERGENCES))

# keyword, bad value, error, words of the message
KEYWORDS: list[tuple[str, Any, type[Exception], str]] = [
    (
        "divergence",
        "kl",
        ValueError,
        f"divergence must be one of {KNOWN}; got 'kl'; divergence='forward_kl' is KL(teacher, student)",
    ),
    ("divergence", "reverse-kl", ValueError, "got 'reverse-kl'; did you mean reverse_kl?"),
    ("divergence", "mirrored_dkd", ValueError, f"divergence must be one of {KNOWN}; got 'mirrored_dkd'"),
    ("divergence", None, TypeError, f"divergence must be a string, one of {KNOWN}; got None"),
    ("divergence", ["jsd"], TypeError, f"divergence must be a string, one of {KNOWN}; got ['jsd']"),
    ("beta", 0.5, ValueError, "beta has no meaning for divergence='forward_kl'; got beta=0.5, wanted None"),
    ("temperature", 0.0, ValueError, "temperature must be a positive number, 1e-30 to 1e30, or a pair"),
    ("temperature", 1e-31, ValueError, "got 1e-31"),
    ("temperature", (1.0, 1e31), ValueError, "got 1e+31"),
    ("temperature", -2.0, ValueError, "got -2.0"),
    (
        "temperature",
        float("nan"),
        ValueError,
        "temperature must be a positive number, 1e-30 to 1e30, or a pair (student, teacher)",
    ),
    ("temperature", float("inf"), ValueError, "got inf"),
    ("temperature", (1.0, 0.0), ValueError, "temperature must be a positive number, 1e-30 to 1e30,"),
    ("temperature", (float("nan"), 1.0), ValueError, "got nan"),
    ("temperature", (1.0, 2.0, 3.0), ValueError, "temperature must be one number or a pair (student, teacher); got 3"),
    ("temperature", [1.0], ValueError, "temperature must be one number or a pair (student, teacher); got 1"),
    ("temperature", "2", TypeError, "temperature must be a positive number, 1e-30 to 1e30, or a pair"),
    ("temperature", None, TypeError, "got NoneType"),
    ("temperature", True, TypeError, "got bool"),
    ("temperature", (True, 1.0), TypeError, "got bool"),
    ("temperature", torch.tensor(2.0), TypeError, "got Tensor"),
    ("temperature", {}, TypeError, "got dict"),
    ("temperature", np.ones(2), TypeError, "temperature must be a positive number, 1e-30 to 1e30, or a pair"),
    ("temperature_scaling", "T2", ValueError, "temperature_scaling must be one of 't2', 'none'; got 'T2'"),
    ("temperature_scaling", None, TypeError, "temperature_scaling must be a string, one of 't2', 'none'; got None"),
    ("soft_weight", -1.0, ValueError, "soft_weight must be a finite number >= 0; got -1.0"),
    ("soft_weight", float("nan"), ValueError, "soft_weight must be a finite number >= 0; got nan"),
    ("soft_weight", torch.tensor(1.0), TypeError, "soft_weight must be a finite number >= 0; got Tensor"),
    ("soft_weight", True, TypeError, "soft_weight must be a finite number >= 0; got bool"),
    ("hard_weight", -0.1, ValueError, "hard_weight must be a finite number >= 0; got -0.1"),
    ("hard_weight", float("inf"), ValueError, "hard_weight must be a finite number >= 0; got inf"),
    ("hard_weight", "1", TypeError, "hard_weight must be a finite number >= 0; got str"),
    ("label_smoothing", 1.5, ValueError, "label_smoothing must be a number between 0 and 1; got 1.5"),
    ("label_smoothing", -0.1, ValueError, "label_smoothing must be a number between 0 and 1; got -0.1"),
    ("label_smoothing", float("nan"), ValueError, "label_smoothing must be a number between 0 and 1; got nan"),
    ("label_smoothing", None, TypeError, "label_smoothing must be a number between 0 and 1; got NoneType"),
    ("ignore_index", 1.0, TypeError, "ignore_index must be an integer; got float"),
    ("ignore_index", None, TypeError, "ignore_index must be an integer; got NoneType"),
    ("reduction", "average", ValueError, "reduction must be one of 'none', 'mean', 'sum'; got 'average'"),
    (
        "reduction",
        "batchmean",
        ValueError,
        "got 'batchmean'; reduction='mean' divides by the number of rows, as ",
    ),
    ("reduction", None, TypeError, "reduction must be a string, one of 'none', 'mean', 'sum'; got None"),
    ("vocab", "pad", ValueError, "vocab must be one of 'error', 'truncate'; got 'pad'"),
    ("vocab", True, TypeError, "vocab must be a string, one of 'error', 'truncate'; got True"),
    ("dim", 0.5, TypeError, "dim must be an integer; got float"),
    ("dim", False, TypeError, "dim must be an integer; got bool"),
    ("dim", 2, ValueError, "dim must lie between -2 and 1 for student_logits of shape [3, 5]; got 2"),
    ("dim", -3, ValueError, "dim must lie between -2 and 1 for student_logits of shape [3, 5]; got -3"),
    ("inplace", 1, TypeError, "inplace must be True or False; got int"),
    ("inplace", None, TypeError, "inplace must be True or False; got NoneType"),
    ("denominator", 0, ValueError, "denominator must be a positive, finite number or a 0-d tensor; got 0"),
    ("denominator", -1.0, ValueError, "denominator must be a positive, finite number or a 0-d tensor; got -1.0"),
    ("denominator", float("nan"), ValueError, "denominator must be a positive, finite number or a 0-d tensor; got nan"),
    (
        "denominator",
        np.ones(2),
        TypeError,
        "denominator must be a positive, finite number or a 0-d tensor; got ndarray",
    ),
    ("denominator", "4", TypeError, "denominator must be a positive, finite number or a 0-d tensor; got str"),
    ("denominator", torch.ones(1), ValueError, "denominator must be a number or a 0-d tensor; got shape [1]"),
    ("denominator", torch.tensor(True), TypeError, "denominator must be a real number; got torch.bool"),
    ("denominator", torch.tensor(1j), TypeError, "denominator must be a real number; got torch.complex64"),
]


@FUNCTIONS
@pytest.mark.parametrize(("name", "value", "kind", "words"), KEYWORDS, ids=[f"{k[0]}={k[1]}" for k in KEYWORDS])
def test_keywords(loss_fn: Any, name: str, value: Any, kind: type[Exception], words: str) -> None:
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    # A legal call with the same number first: what was remembered of it must not excuse this one.
    if name in ("temperature", "soft_weight"):
        loss_fn(student, teacher, **{name: (1.0, 1.0) if isinstance(value, tuple) else 1.0})
    if name == "dim":
        loss_fn(student, teacher, dim=0)
    with pytest.raises(kind) as caught:
        loss_fn(student, teacher, **{name: value})
    assert words in str(caught.value)
    if name != "denominator" and not (name == "dim" and isinstance(value, int) and value):  # those need the tensors
        with pytest.raises(kind, match=re.escape(words)):
            reptile_ext.DistillationLoss(**{name: value})  # complains when it is made


def test_an_equal_legal_keyword_does_not_excuse_one_of_a_wrong_type() -> None:
    """True == 1 == 1.0 and hash alike: remembering checked keywords must not mix them up."""
    logits = torch.randn(3, 5)
    legal = {"temperature": 1.0, "soft_weight": 1.0, "hard_weight": 0.0, "label_smoothing": 0.0, "dim": 1}
    for name, value in legal.items():
        reptile_ext.distillation_loss(logits, logits, **{name: value})
        with pytest.raises(TypeError, match=f"{name} must be"):
            reptile_ext.distillation_loss(logits, logits, **{name: bool(value)})
    reptile_ext.distillation_loss(logits, logits, inplace=False)
    with pytest.raises(TypeError, match="inplace must be True or False; got int"):
        reptile_ext.distillation_loss(logits, logits, inplace=0)
    reptile_ext.distillation_loss(logits, logits, dim=1)
    with pytest.raises(TypeError, match="dim must be an integer; got float"):
        reptile_ext.distillation_loss(logits, logits, dim=1.0)


S, T = torch.zeros(3, 5), torch.zeros(3, 5)
# student, teacher, other arguments, error, words of the message
TENSORS: dict[str, tuple[Any, Any, dict[str, Any], type[Exception], str]] = {
    "student a list": (
        [1.0],
        T,
        {},
        TypeError,
        "student_logits must be a torch.Tensor; got list: pass torch.as_tensor() of it",
    ),
    "student an array": (
        np.zeros((3, 5)),
        T,
        {},
        TypeError,
        "student_logits must be a torch.Tensor; got ndarray: pass torch.from_numpy() of it",
    ),
    "a model's output": (
        SimpleNamespace(logits=S),
        T,
        {},
        TypeError,
        "student_logits must be a torch.Tensor; got SimpleNamespace: pass its .logits",
    ),
    "a model's output as a dict": (
        S,
        {"logits": T},
        {},
        TypeError,
        'teacher_logits must be a torch.Tensor; got dict: pass its ["logits"]',
    ),
    "a dict without logits": (
        S,
        {"scores": T},
        {},
        TypeError,
        "teacher_logits must be a torch.Tensor; got dict with the keys 'scores'",
    ),
    "a model's output as a tuple": (S, (T, None), {}, TypeError, "got tuple: pass its [0]"),
    "a model": (torch.nn.Linear(2, 5), T, {}, TypeError, "got Linear: pass what it returns"),
    "labels where the teacher goes": (
        S,
        torch.zeros(3).long(),
        {},
        TypeError,
        "teacher_logits must be float32, bfloat16, float16 or float64; got torch.int64 (class numbers go in as labels)",
    ),
    "the teacher where labels go": (S, T, {"labels": T}, ValueError, "[3]; got [3, 5] of torch.float32"),
    "labels an array": (
        S,
        T,
        {"labels": np.zeros(3, dtype=int)},
        TypeError,
        "labels must be a torch.Tensor; got ndarray: pass torch.from_numpy() of it",
    ),
    "weight a list": (
        S,
        T,
        {"weight": [1.0, 1.0, 0.0]},
        TypeError,
        "weight must be a torch.Tensor; got list: pass torch.as_tensor() of it",
    ),
    "teacher None": (S, None, {}, TypeError, "teacher_logits must be a torch.Tensor; got NoneType"),
    "integer student": (
        S.long(),
        T,
        {},
        TypeError,
        "student_logits must be float32, bfloat16, float16 or float64; got torch.int64",
    ),
    "boolean teacher": (
        S,
        T.bool(),
        {},
        TypeError,
        "teacher_logits must be float32, bfloat16, float16 or float64; got torch.bool",
    ),
    "complex student": (S.cfloat(), T, {}, TypeError, "got torch.complex64"),
    "float8 teacher": (S, T.to(torch.float8_e4m3fn), {}, TypeError, "got torch.float8_e4m3fn"),
    "0-d": (
        torch.zeros(()),
        torch.zeros(()),
        {},
        ValueError,
        "student_logits must have a class dimension; got a 0-dim",
    ),
    "rows differ": (S, torch.zeros(4, 5), {}, ValueError, "outside the class dimension (dim=-1), [3, 5]; got [4, 5]"),
    "ndim differs": (
        S,
        torch.zeros(3, 1, 5),
        {},
        ValueError,
        "teacher_logits must have the shape of student_logits, [3, 5]; got [3, 1, 5]",
    ),
    "would broadcast": (S, torch.zeros(1, 5), {}, ValueError, "[3, 5]; got [1, 5]"),
    "V differ": (
        S,
        torch.zeros(3, 6),
        {},
        ValueError,
        "teacher_logits has 6 classes and student_logits has 5 (dim=-1); both need the same number, "
        "or pass vocab='truncate'",
    ),
    "rows differ, truncate": (S, torch.zeros(4, 6), {"vocab": "truncate"}, ValueError, "[3, 5]; got [4, 6]"),
    "no classes": (
        torch.zeros(3, 0),
        torch.zeros(3, 0),
        {},
        ValueError,
        "need at least one class in dim=-1; got [3, 0]",
    ),
    "no classes, truncate": (
        S,
        torch.zeros(3, 0),
        {"vocab": "truncate"},
        ValueError,
        "need at least one class in dim=-1",
    ),
    "devices differ": (
        S,
        T.to("meta"),
        {},
        ValueError,
        "teacher_logits must be on the device of student_logits, cpu; got meta",
    ),
    "labels missing": (S, T, {"hard_weight": 0.5}, ValueError, "labels are needed for hard_weight=0.5; got None"),
    "labels a list": (S, T, {"labels": [0, 1, 2]}, TypeError, "labels must be a torch.Tensor; got list"),
    "float labels": (
        S,
        T,
        {"labels": torch.zeros(3)},
        TypeError,
        "labels must have an integer dtype (int64, int32, int16, int8, uint8, uint16, uint32); got torch.float32",
    ),
    "boolean labels": (
        S,
        T,
        {"labels": torch.zeros(3).bool()},
        TypeError,
        "uint32); got torch.bool",
    ),
    "labels too few": (
        S,
        T,
        {"labels": torch.zeros(2).long()},
        ValueError,
        "labels must have the shape of student_logits without the class dimension, [3]; got [2]",
    ),
    "one-hot labels": (
        S,
        T,
        {"labels": torch.zeros(3, 5).long()},
        ValueError,
        "without the class dimension, [3]; got [3, 5]: pass labels.argmax(dim) of one-hot rows",
    ),
    "labels elsewhere": (
        S,
        T,
        {"labels": torch.zeros(3, device="meta").long()},
        ValueError,
        "labels must be on the device",
    ),
    "weight a number": (S, T, {"weight": 1.0}, TypeError, "weight must be a torch.Tensor; got float"),
    "weight of classes": (S, T, {"weight": torch.ones(5)}, ValueError, "without the class dimension, [3]; got [5]"),
    "a mask": (S, T, {"weight": torch.ones(3).bool()}, TypeError, "got torch.bool (a mask goes in as mask.float())"),
    "integer weight": (
        S,
        T,
        {"weight": torch.ones(3).long()},
        TypeError,
        "weight must be float32, bfloat16, float16 or float64; got torch.int64 (a mask goes in as mask.float())",
    ),
    "weight elsewhere": (
        S,
        T,
        {"weight": torch.ones(3, device="meta")},
        ValueError,
        "weight must be on the device of student_logits, cpu; got meta",
    ),
    "weight that learns": (
        S,
        T,
        {"weight": torch.ones(3, requires_grad=True)},
        ValueError,
        "weight is a constant of the loss",
    ),
    "denominator that learns": (
        S,
        T,
        {"denominator": torch.tensor(3.0, requires_grad=True)},
        ValueError,
        "denominator is a constant of the loss and gets no gradient",
    ),
    "denominator elsewhere": (
        S,
        T,
        {"denominator": torch.tensor(1.0, device="meta")},
        ValueError,
        "denominator must be on the CPU; got meta",
    ),
    "denominator without a sum": (
        S,
        T,
        {"denominator": 3.0, "reduction": "none"},
        ValueError,
        "denominator divides the sum over rows, and reduction='none' has no sum",
    ),
}


@FUNCTIONS
@pytest.mark.parametrize(("student", "teacher", "others", "kind", "words"), TENSORS.values(), ids=TENSORS.keys())
def test_tensors(
    loss_fn: Any, student: Any, teacher: Any, others: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind) as caught:
        loss_fn(student, teacher, **others)
    assert words in str(caught.value)


NAN = float("nan")
WANTED_BETAS = {
    "symmetric_kl": "a number between 0 and 1",
    "jsd": "a number between 0 (at least 1e-30) and 1, both excluded",
    "scaled_jsd": "0 or a number from 1e-30 to 1",
    "skew_kl": "0 or a number from 1e-30 to 1, 1 excluded",
    "skew_reverse_kl": "0 or a number from 1e-30 to 1, 1 excluded",
    "dkd": "a finite number >= 0",
}
WRONG_BETAS = {
    "symmetric_kl": (-0.1, 1.5, NAN, float("inf")),
    "jsd": (0, 0.0, 1.0, -1.0, 1e-31, NAN),
    "scaled_jsd": (-0.1, 1.1, 1e-40, NAN),
    "skew_kl": (1.0, -0.1, 1e-31, NAN),
    "skew_reverse_kl": (1.0, -0.1, 1e-31, NAN),
    "dkd": (-1.0, float("inf"), NAN),
}
# divergence, bad value, error, words of the message
BETAS: list[tuple[str, Any, type[Exception], str]] = [
    (name, beta, ValueError, f"beta must be {WANTED_BETAS[name]}, for divergence={name!r}; got {beta}")
    for name, betas in WRONG_BETAS.items()
    for beta in betas
]
BETAS += [
    (name, wrong, TypeError, f"beta must be {wanted}, for divergence={name!r}; got {type(wrong).__name__}")
    for name, wanted in WANTED_BETAS.items()
    for wrong in ("0.5", True, torch.tensor(0.5), [0.5])
]
BETAS += [
    (name, 0.5, ValueError, f"beta has no meaning for divergence={name!r}; got beta=0.5, wanted None")
    for name in DIVERGENCES
    if DIVERGENCE_TABLE[name].beta is None
]


@FUNCTIONS
@pytest.mark.parametrize(("name", "beta", "kind", "words"), BETAS)
def test_betas(loss_fn: Any, name: str, beta: Any, kind: type[Exception], words: str) -> None:
    student, teacher, labels = torch.randn(3, 5), torch.randn(3, 5), torch.tensor([0, 1, 2])
    loss_fn(student, teacher, labels, divergence=name)  # the default is legal
    for call in (
        lambda: loss_fn(student, teacher, labels, divergence=name, beta=beta),
        lambda: reptile_ext.DistillationLoss(divergence=name, beta=beta),
    ):
        with pytest.raises(kind) as caught:
            call()
        assert words in str(caught.value)


@FUNCTIONS
def test_dkd_needs_labels(loss_fn: Any) -> None:
    with pytest.raises(ValueError, match="labels are needed for divergence='dkd'; got None"):
        loss_fn(S, T, divergence="dkd")


@FUNCTIONS
@pytest.mark.parametrize("label", [5, -1, -99, 2**40, -(2**62)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_labels_out_of_range(loss_fn: Any, label: int, dtype: torch.dtype) -> None:
    """An error even if no hard loss asks for the label: a wrong label is a wrong data set."""
    labels = torch.tensor([0, label, -100])
    words = re.escape(f"labels must lie in [0, 5) or equal ignore_index=-100; got {label}")
    for requires_grad in (False, True):
        student = S.to(dtype).clone().requires_grad_(requires_grad)
        for hard_weight in (0.0, 1.0):
            with pytest.raises(ValueError, match=words):
                loss_fn(student, T.to(dtype), labels, hard_weight=hard_weight)
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 5) or equal ignore_index=7; got ")):
        loss_fn(S, T, labels, ignore_index=7)


@FUNCTIONS
def test_labels_out_of_a_truncated_range(loss_fn: Any) -> None:
    """The teacher has 4 classes, so label 4 of the student's 5 cannot be compared."""
    with pytest.raises(ValueError, match=re.escape("labels must lie in [0, 4)")):
        loss_fn(S, torch.zeros(3, 4), torch.tensor([0, 4, 1]), vocab="truncate", hard_weight=1.0)


@FUNCTIONS
@pytest.mark.parametrize("weight", [-0.5, float("nan"), float("inf")])
def test_wrong_weights(loss_fn: Any, weight: float) -> None:
    with pytest.raises(ValueError, match=rf"weight must be finite and not negative; got {weight}"):
        loss_fn(S, T, weight=torch.tensor([1.0, weight, 0.0]))


def test_numpy_numbers_are_numbers() -> None:
    """They come out of configuration files and sweeps."""
    student, teacher = torch.randn(3, 5), torch.randn(3, 5)
    right = reptile_ext.distillation_loss(student, teacher, temperature=2.0, denominator=4.0)
    found = reptile_ext.distillation_loss(student, teacher, temperature=np.float32(2.0), denominator=np.float64(4.0))
    assert torch.equal(found, right)


def test_a_head_is_no_weight_and_an_output_no_hidden_states() -> None:
    hidden, head = torch.zeros(3, 4), torch.nn.Linear(4, 5)
    right: dict[str, Any] = {
        "student_hidden": hidden,
        "student_weight": head.weight,
        "teacher_hidden": hidden,
        "teacher_weight": head.weight,
    }
    reptile_ext.linear_distillation_loss(**right)
    wrong: list[tuple[str, Any, str]] = [
        ("student_weight", head, "student_weight must be a torch.Tensor; got Linear: pass it as student_head"),
        ("teacher_weight", head, "teacher_weight must be a torch.Tensor; got Linear: pass it as teacher_head"),
        (
            "student_hidden",
            SimpleNamespace(last_hidden_state=hidden),
            "SimpleNamespace: pass its .last_hidden_state",
        ),
        ("teacher_hidden", (hidden,), "teacher_hidden must be a torch.Tensor; got tuple: pass its [0]"),
        ("weight", torch.ones(3, dtype=torch.bool), "got torch.bool (a mask goes in as mask.float())"),
    ]
    for name, value, words in wrong:
        with pytest.raises(TypeError, match=re.escape(words)):
            reptile_ext.linear_distillation_loss(**{**right, name: value})


@pytest.mark.parametrize("kind", [reptile_ext.DistillationLoss, reptile_ext.LinearDistillationLoss])
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("temprature", "; did you mean temperature?"),
        ("T", "; did you mean temperature?"),
        ("alpha", "; did you mean hard_weight and soft_weight?"),
        ("weight", "; weight goes to the call"),
        ("xyz", ""),
    ],
)
def test_unknown_keywords(kind: Any, name: str, words: str) -> None:
    with pytest.raises(TypeError) as caught:
        kind(**{name: 1.0})
    assert str(caught.value) == f"{kind.__name__}() got an unexpected keyword argument {name!r}{words}"
