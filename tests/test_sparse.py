"""`sparse_distillation_loss`: a teacher of K classes a row (docs/contract.md, "Sparse teachers").

The oracle (`exact`) writes a row's two distributions out in float64, class by class, as docs/contract.md has them,
each divergence by its definition and leaves the gradient to autograd: nothing of it is the reference's or the kernels'.
The rival (`plain`) is what one writes in PyTorch, in the arithmetic of the logits.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import BETAS, DTYPES, EPSILON, INSTRUCTION_SETS, WRITTEN_OUT, make_logits, name_of, pair
from torch import Tensor

import reptile_ext
from reptile_ext import captured_mass, functional, ops, reference, sampled_targets, sparse, top_k_targets
from reptile_ext.options import DIVERGENCE_TABLE, DIVERGENCES, TAILS, make_options, make_sparse_options
from reptile_ext.sparse_chunks import loss_in_chunks

loss_of = reptile_ext.sparse_distillation_loss
# Every divergence in every tail that it goes with: one that is new in the registry is among them.
CASES = [(tail, name) for tail in TAILS for name in DIVERGENCES if tail in DIVERGENCE_TABLE[name].tails]
every_case = pytest.mark.parametrize(("tail", "divergence"), CASES)


# A dtype matters to the passes over the student's row, which know the tail but not the divergence.
def cases_and_dtypes(cases: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("tail", "divergence", "dtype"),
        [(*case, dtype) for case in cases for dtype in DTYPES if dtype == torch.float32 or case[1] == "forward_kl"],
        ids=lambda x: name_of(x) if isinstance(x, torch.dtype) else None,
    )


every_case_and_dtype = cases_and_dtypes(CASES)
pytestmark = pytest.mark.filterwarnings("ignore:tail='zero'")


def keywords_of(tail: str, divergence: str) -> dict[str, Any]:
    return {"tail": tail, "divergence": divergence, "beta": BETAS.get(divergence)}


# ------------------------------------------------------------------------------------------------------- the oracle


def definition(divergence: str, beta: float | None, p: Tensor, y: Tensor, q: Tensor, x: Tensor) -> Tensor:
    """D of distributions and their logarithms, over the last dimension. A p or q of 0 adds what the limit is."""

    def kl(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
        mass = a > 0
        return torch.where(mass, a * (torch.where(mass, log_a, 0.0) - torch.where(mass, log_b, 0.0)), 0.0).sum(-1)

    def mix(log_a: Tensor, log_b: Tensor, of_a: float) -> Tensor:
        top = torch.maximum(log_a, log_b).detach()
        top = torch.where(top.isfinite(), top, 0.0)
        m = of_a * (log_a - top).exp() + (1 - of_a) * (log_b - top).exp()
        return torch.where(m > 0, m, 1.0).log() + top

    default = DIVERGENCE_TABLE[divergence].beta
    b = beta if beta is not None or default is None else default.default
    if divergence == "forward_kl":
        return kl(p, y, x)
    if divergence == "reverse_kl":
        return kl(q, x, y)
    if divergence == "symmetric_kl":
        return (1 - b) * kl(p, y, x) + b * kl(q, x, y)
    if divergence in ("jsd", "scaled_jsd"):
        m = mix(y, x, b)
        return (b * kl(p, y, m) + (1 - b) * kl(q, x, m)) / (b * (1 - b) if divergence == "scaled_jsd" else 1)
    if divergence == "skew_kl":
        return kl(p, y, mix(y, x, b))
    if divergence == "skew_reverse_kl":
        return kl(q, x, mix(x, y, b))
    if divergence == "tvd":
        return 0.5 * (p - q).abs().sum(-1)
    if divergence == "hellinger":
        both = (p > 0) & (q > 0)
        half = 0.5 * (torch.where(both, x, 0.0) + torch.where(both, y, 0.0))
        return 1 - torch.where(both, half.exp(), 0.0).sum(-1)
    if divergence == "soft_cross_entropy":
        return -torch.where(p > 0, p * torch.where(p > 0, x, 0.0), 0.0).sum(-1)
    assert divergence not in WRITTEN_OUT
    options = make_options(divergence=divergence, beta=beta)
    rows = reference.Rows(x, y, x, y, None, options.beta, options.one_minus_beta)
    return options.soft_scale * reference.ROW_DIVERGENCES[options.kernel()](rows)[0]


def rows_by_definition(s: Tensor, ids: Tensor, log_probs: Tensor, tail: str, divergence: str, beta: Any) -> Tensor:
    """D of rows [N, V] of logits over T_s, in their arithmetic. Every row has a class listed."""
    found = []
    for z, row_ids, row_y in zip(s, ids, log_probs.to(s.dtype), strict=True):
        kept = row_ids >= 0
        listed, y = row_ids[kept].long(), row_y[kept]
        others = torch.ones_like(z, dtype=torch.bool)
        others[listed] = False
        x_all = z.log_softmax(-1)
        x, p = x_all[listed], y.exp()
        if tail == "zero":
            found.append((p * (y - x)).sum() if divergence == "forward_kl" else -(p * x).sum())
            continue
        if tail == "bucket" and others.any():
            r = 1 - p.sum()
            y = torch.cat([y, r.clamp(min=0).log().view(1)])
            x = torch.cat([x, (x_all[others].logsumexp(-1)).view(1)])
        y = y - y.logsumexp(-1)
        if tail == "restrict":
            x = x - x.logsumexp(-1)
        if tail == "renormalize":  # all V classes
            whole = torch.full_like(z, -torch.inf)
            whole[listed] = y
            y, x = whole, x_all
        found.append(definition(divergence, beta, y.exp(), y, x.exp(), x))
    return torch.stack(found)


def by_definition(
    student: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None = None, *, arithmetic: Any, **keywords: Any
) -> Tensor:
    t_s, t_t = pair(keywords.get("temperature", 1.0))
    s = student.to(arithmetic)
    d = rows_by_definition(
        s.flatten(0, -2) / t_s,
        ids.flatten(0, -2),
        log_probs.flatten(0, -2),
        keywords.get("tail", "bucket"),
        keywords.get("divergence", "forward_kl"),
        keywords.get("beta"),
    )
    losses = t_s * t_t * d
    if keywords.get("hard_weight"):
        assert labels is not None
        losses = losses + keywords["hard_weight"] * F.cross_entropy(
            s.flatten(0, -2),
            labels.flatten().long(),
            ignore_index=-100,
            label_smoothing=keywords.get("label_smoothing", 0.0),
            reduction="none",
        )
    if labels is not None:
        losses = torch.where(labels.flatten() == -100, 0.0, losses)
    losses = losses.view(student.shape[:-1])
    return losses if keywords.get("reduction") == "none" else losses.sum() / max(1, int((labels != -100).sum()))


def value_and_gradient(of: Any, s: Tensor, *args: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
    leaf = s.detach().requires_grad_()
    loss = of(leaf, *args, **keywords)
    weights = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.dim() else None
    return loss.detach(), torch.autograd.grad(loss, leaf, weights)[0]


def sizes(s: Tensor, ids: Tensor, log_probs: Tensor, keywords: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What rounding errors are proportional to: of the losses [N], and of the gradient [N, V]. As in oracle.py, of
    terms that are as large as p, q and their logarithms can make them."""
    t_s, t_t = pair(keywords.get("temperature", 1.0))
    scale = t_s * t_t * make_options(divergence=keywords["divergence"], beta=keywords["beta"]).soft_scale
    z = s.double() / t_s
    x = z.log_softmax(-1)
    q, p = x.exp(), torch.zeros_like(x)
    safe = ids.clamp(min=0)
    y = torch.where(ids >= 0, log_probs.double(), -torch.inf)
    p.scatter_add_(-1, safe, y.exp())
    # |x − y| of the listed, and of all others together.
    apart = torch.where(ids >= 0, (x.gather(-1, safe) - y).abs(), 0.0)
    of_listed = torch.zeros_like(x).scatter_add_(-1, safe, apart)
    rest = torch.where(p > 0, 0.0, q).sum(-1).clamp(min=1e-300).log() - (1 - p.sum(-1)).clamp(min=1e-9).log()
    distance = torch.where(p > 0, of_listed, rest.abs().unsqueeze(-1)).nan_to_num(0.0)
    mean = ((q + p) * distance).sum(-1, keepdim=True)
    gradient = scale / t_s * (q + p) * (1 + distance + mean)
    if keywords.get("tail") == "restrict":  # relative to what the listed have of the student
        inside = torch.where(p > 0, q, 0.0).sum(-1, keepdim=True)
        gradient = gradient / inside.clamp(min=1e-30)
    if keywords.get("hard_weight"):
        gradient = gradient + keywords["hard_weight"] * (s.double().softmax(-1) + 1)
    gradient = gradient.maximum(gradient.amax(-1, keepdim=True) * 2**-20)
    return scale * (1 + mean.squeeze(-1)) + keywords.get("hard_weight", 0.0), gradient


def assert_right(s: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None = None, **keywords: Any) -> None:
    """THE TOLERANCE RULE of oracle.py: our error ≤ plain PyTorch's in that dtype + ε, each row's."""
    keywords = {"divergence": "forward_kl", "beta": None, "reduction": "none", **keywords}
    arithmetic = torch.float64 if torch.float64 in (s.dtype, log_probs.dtype) else torch.float32
    given = (ids, log_probs, labels)
    found = value_and_gradient(loss_of, s, *given, **keywords)
    right = value_and_gradient(by_definition, s.double(), *given, arithmetic=torch.float64, **keywords)
    rival = value_and_gradient(by_definition, s, *given, arithmetic=arithmetic, **keywords)
    assert found[0].dtype == arithmetic
    assert found[1].dtype == s.dtype
    for a, b, c, size in zip(found, right, rival, sizes(s, ids, log_probs, keywords), strict=True):
        size = size + (b.abs() if b.dim() == 1 else 0)
        epsilon = EPSILON[a.dtype if b.dim() == 1 else s.dtype]
        rounding = 0.0 if b.dim() == 1 else 1.01 * torch.finfo(s.dtype).eps * b.abs()
        rounding = rounding + (2.0**-24 if s.dtype == torch.float16 and b.dim() == 2 else 0)
        allowed = ((c.double() - b).abs() / size).nan_to_num(0.0).amax() + epsilon
        error = ((a.double() - b).abs() - rounding) / size
        assert not error.isnan().any()
        assert error.max() <= allowed, (error.max().item(), allowed.item())


def targets(
    t: Tensor, k: int, temperature: float = 1.0, dtype: torch.dtype = torch.float32, padded: bool = True
) -> tuple[Tensor, Tensor]:
    """Some of a teacher's likeliest classes, in no order; the second row has fewer."""
    ids, log_probs = top_k_targets(t.double(), k, temperature)
    order = torch.rand(ids.shape, generator=torch.Generator().manual_seed(3)).argsort(-1)
    ids, log_probs = ids.gather(-1, order), log_probs.gather(-1, order).to(dtype)
    if padded and k > 2 and ids.shape[0] > 1:
        ids[1, 1::2] = -1
        log_probs[1, 1::2] = -torch.inf
    return ids, log_probs


def make_labels(rows: int, vocab_size: int) -> Tensor:
    labels = torch.randint(vocab_size, (rows,), generator=torch.Generator().manual_seed(1))
    labels[2::3] = -100
    return labels


# ------------------------------------------------------------------------------------------------- what it computes


@every_case
@pytest.mark.parametrize("kind", ["random", "flat", "near_equal"])
def test_reference_and_kernel_equal_the_definition(kind: str, tail: str, divergence: str) -> None:
    """In float64, value and gradient, with hard labels; the classes listed have from 1/10 to nearly all of the mass."""
    s, t = make_logits(kind, 5, 40, torch.float64)
    ids, log_probs = targets(t, 6, 1.5, torch.float64)
    labels = make_labels(5, 40)
    labels[0] = ids[0, 0]
    keywords = keywords_of(tail, divergence) | {
        "temperature": (2.0, 1.5),
        "hard_weight": 0.7,
        "label_smoothing": 0.1,
        "reduction": "none",
    }
    given = (ids, log_probs, labels)
    right = value_and_gradient(by_definition, s, *given, arithmetic=torch.float64, **keywords)
    for of in (reference.sparse_distillation_loss, loss_of):
        for a, b in zip(value_and_gradient(of, s, *given, **keywords), right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@every_case_and_dtype
def test_kernel(dtype: torch.dtype, tail: str, divergence: str, each_set: str) -> None:
    for kind in ("random", "near_equal"):
        s, t = make_logits(kind, 3, 90, dtype)
        ids, log_probs = targets(t, 9, 1.3, torch.float64 if dtype == torch.float64 else torch.float32)
        assert_right(s, ids, log_probs, temperature=(1.7, 1.3), **keywords_of(tail, divergence))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("temperature", [1.0, (2.0, 1.0)])
@pytest.mark.parametrize("vocab_size", [1, 2, 31, 64, 257, 5000])
def test_soft_and_hard_loss(vocab_size: int, temperature: Any, dtype: torch.dtype, each_set: str) -> None:
    s, t = make_logits("random", 5, vocab_size, dtype)
    for k in {1, min(7, vocab_size), min(vocab_size, 300)}:
        ids, log_probs = targets(t, k)
        labels = make_labels(5, vocab_size)
        labels[0] = ids[0].max()
        for smoothing in (0.0, 0.2):
            keywords = {"temperature": temperature, "hard_weight": 0.6, "label_smoothing": smoothing}
            assert_right(s, ids, log_probs, labels, **keywords)


@pytest.mark.parametrize("kind", ["late_peak", "rising", "peaked"])
@pytest.mark.parametrize("tail", TAILS)
def test_logits_far_apart(tail: str, kind: str, each_set: str) -> None:
    """Maxima that the first classes say nothing of, and lists that have all but e^-10000 of either side."""
    for dtype in (torch.float32, torch.float64):
        s, t = make_logits(kind, 4, 3000, dtype)
        ids, log_probs = targets(t, 20, padded=False)
        found = value_and_gradient(loss_of, s, ids, log_probs, tail=tail, reduction="none")
        right = value_and_gradient(
            by_definition, s.double(), ids, log_probs, tail=tail, reduction="none", arithmetic=torch.float64
        )
        epsilon = 1e-5 if dtype == torch.float32 else 1e-11
        for a, b in zip(found, right, strict=True):
            assert b.isfinite().all()
            torch.testing.assert_close(a.double(), b, rtol=epsilon, atol=epsilon)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_an_offset_of_all_logits_changes_nothing(temperature: float, each_set: str) -> None:
    """Up to 2^19, where a rounded product of a logit would have lost all that the classes differ by."""
    s, t = make_logits("random", 3, 700)
    s = (16 * s).round() / 16
    ids, log_probs = targets(t, 9, temperature)
    keywords = {"temperature": temperature, "hard_weight": 0.5, "label_smoothing": 0.1, "reduction": "none"}
    given = (ids, log_probs, make_labels(3, 700))
    right = value_and_gradient(by_definition, s.double(), *given, arithmetic=torch.float64, tail="bucket", **keywords)
    for offset in (0.0, 4096.0, -(2.0**19), 2.0**19):
        assert torch.equal((s + offset).double(), s.double() + offset)
        for a, b in zip(value_and_gradient(loss_of, s + offset, *given, **keywords), right, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=4e-6, atol=4e-7 * b.abs().max().item())
        in_double = value_and_gradient(loss_of, s.double() + offset, *given, **keywords)
        for a, b in zip(in_double, right, strict=True):
            torch.testing.assert_close(a, b, rtol=4e-14, atol=4e-14 * b.abs().max().item())


@pytest.mark.parametrize("logit", [-2.3e9, 2.0**23 + 1, 3e30])
def test_equal_logits_of_any_size_are_equal_probabilities(logit: float, each_set: str) -> None:
    """Over a small temperature, where a product of the logit is off by more than float32's exponents reach."""
    s = torch.full((1, 31), logit)
    ids, log_probs = torch.tensor([[25]]), torch.zeros(1, 1)
    keywords: dict[str, Any] = {"tail": "renormalize", "temperature": 0.01, "temperature_scaling": "none"}
    loss, gradient = value_and_gradient(loss_of, s, ids, log_probs, **keywords)
    assert abs(loss.item() / math.log(31) - 1) < 1e-6
    right = torch.full((1, 31), 1 / 31)
    right[0, 25] -= 1
    torch.testing.assert_close(gradient, right / 0.01, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_logits_at_the_end_of_their_range(dtype: torch.dtype, each_set: str) -> None:
    """All that is not listed at the least number there is, as masks are made: it is far away, and still pulled."""
    n, k, least = 1000, 4, torch.finfo(dtype).min
    s = torch.full((1, n), least, dtype=dtype)
    s[0, :k] = torch.arange(k)
    ids, log_probs = torch.arange(k).view(1, k), torch.full((1, k), 0.2).log()
    loss, gradient = value_and_gradient(loss_of, s, ids, log_probs)
    assert abs(loss.item() / (0.2 * -least) - 1) < 1e-6
    right = torch.full((1, n), -0.2 / (n - k), dtype=torch.float64)
    right[0, :k] = torch.arange(k).double().softmax(-1) - 0.2
    torch.testing.assert_close(gradient.double(), right, rtol=4e-6 + torch.finfo(dtype).eps, atol=1e-7)


def test_what_is_left_of_the_student_has_its_digits(each_set: str) -> None:
    """R = 1e-9, of which 1 − Σ q in float32 would be 0 or 1e-7: log R, and so the loss, to six digits."""
    s = torch.zeros(1, 1001)
    s[0, 0] = 20 + math.log(1000) + 0.7
    ids, log_probs = torch.tensor([[0]]), torch.tensor([[0.99]]).log()
    found = value_and_gradient(loss_of, s, ids, log_probs, reduction="none")
    right = value_and_gradient(
        by_definition, s.double(), ids, log_probs, reduction="none", arithmetic=torch.float64, tail="bucket"
    )
    torch.testing.assert_close(found[0].double(), right[0], rtol=4e-6, atol=0)
    torch.testing.assert_close(found[1].double(), right[1], rtol=4e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@every_case
def test_all_classes_listed_is_the_dense_loss(tail: str, divergence: str, dtype: torch.dtype) -> None:
    """In any order, at two temperatures. ("zero" takes log-probabilities as they were rounded.)"""
    s, t = make_logits("random", 6, 33, dtype)
    ids, log_probs = targets(t, 33, 2.0, torch.float64 if dtype == torch.float64 else torch.float32, padded=False)
    keywords = {"divergence": divergence, "beta": BETAS.get(divergence), "temperature": (1.5, 2.0)}
    found = value_and_gradient(loss_of, s, ids, log_probs, tail=tail, **keywords)
    right = value_and_gradient(reptile_ext.distillation_loss, s, t, **keywords)
    epsilon = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(found[0], right[0], rtol=epsilon, atol=epsilon)
    torch.testing.assert_close(found[1], right[1], rtol=max(epsilon, torch.finfo(dtype).eps), atol=epsilon)


def test_truncate_leaves_out_what_the_student_does_not_have() -> None:
    """As `distillation_loss` does: the teacher's classes from V on, scaled away. All its classes are listed here."""
    s, t = make_logits("random", 6, 40, torch.float64)
    s = s[:, :25].contiguous()
    ids, log_probs = targets(t, 40, padded=False, dtype=torch.float64)
    for tail in TAILS:
        found = value_and_gradient(loss_of, s, ids, log_probs, tail=tail, vocab="truncate")
        right = value_and_gradient(reptile_ext.distillation_loss, s, t, vocab="truncate")
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    few = targets(t, 9, padded=False, dtype=torch.float64)
    for tail in TAILS:
        both = [
            value_and_gradient(of, s, *few, tail=tail, vocab="truncate")
            for of in (loss_of, reference.sparse_distillation_loss)
        ]
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match=r"teacher_indices must lie in \[-1, 25\), .*vocab='truncate'"):
        loss_of(s, ids, log_probs)


def test_rounding_of_what_is_left_out_does_not_turn_the_loss_around(each_set: str) -> None:
    """Classes that the student does not have, with more than all of the mass by rounding: others have it among them,
    not less than nothing."""
    s = torch.randn(1, 25)
    ids, log_probs = torch.tensor([[30, 3]]), torch.tensor([[0.01978, -6.6]])
    for of in (loss_of, reference.sparse_distillation_loss):
        for tail in TAILS:
            found = value_and_gradient(of, s, ids, log_probs, tail=tail, vocab="truncate")
            right = value_and_gradient(of, s, torch.tensor([[3]]), torch.zeros(1, 1), tail=tail)
            for a, b in zip(found, right, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("soft_weight", [1.0, 0.0])
def test_a_row_of_classes_that_the_student_lacks_has_no_divergence(
    tail: str, soft_weight: float, each_set: str
) -> None:
    """Truncated, rows of which no class is left are 0 and their gradient is that of the label alone; one that is broken
    besides is NaN. The others are as they were."""
    s, t = make_logits("random", 5, 40)
    s = s[:, :25].contiguous()
    ids, log_probs = targets(t, 4, padded=False)
    ids[1] = torch.tensor([30, 39, 25, -1])
    ids[3:] = torch.tensor([25, 26, 27, 28])
    log_probs[1] = torch.tensor([0.25, 0.25, 0.5, 0]).log()  # all of the mass
    log_probs[3] = torch.tensor([0.01, 0.02, 0.03, 0.04]).log()
    labels = torch.tensor([3, 7, 1, 24, 0])
    keywords = {"tail": tail, "vocab": "truncate", "reduction": "sum"}
    hard = {"hard_weight": 0.5, "label_smoothing": 0.1, "soft_weight": soft_weight, "temperature": 2.0}
    cut, whole = torch.tensor([1, 3]), torch.tensor([0, 2])
    of_labels = 0.5 * F.cross_entropy(s[cut], labels[cut], label_smoothing=0.1, reduction="sum")
    for of in (loss_of, reference.sparse_distillation_loss):
        found = value_and_gradient(of, s[cut], ids[cut], log_probs[cut], **keywords)
        assert found[0] == 0
        assert not found[1].any()
        found = value_and_gradient(of, s[cut], ids[cut], log_probs[cut], labels[cut], **keywords, **hard)
        torch.testing.assert_close(found[0], of_labels)
        assert found[1].abs().sum(-1).min() > 0.1
        together = torch.cat([whole, cut])
        both = value_and_gradient(of, s[together], ids[together], log_probs[together], **keywords)
        alone = value_and_gradient(of, s[whole], ids[whole], log_probs[whole], **keywords)
        torch.testing.assert_close(both[0], alone[0])
        assert torch.equal(both[1][:2], alone[1])
        for broken in (torch.nan, torch.inf, -torch.inf):
            row = s[3:4].clone()
            if broken == -torch.inf:
                row[:] = broken
            else:
                row[0, 5] = broken
            losses, gradient = value_and_gradient(of, row, ids[3:4], log_probs[3:4], **keywords)
            assert losses.isnan()
            assert gradient.isnan().all()
    ours = value_and_gradient(loss_of, s, ids, log_probs, labels, **keywords, **hard)
    theirs = value_and_gradient(reference.sparse_distillation_loss, s, ids, log_probs, labels, **keywords, **hard)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("replacement", [True, False])
def test_sampled_targets_are_unbiased(replacement: bool) -> None:
    """The mean gradient over many draws with "renormalize" is that of all classes; of the top k it is not. Without
    replacement there is far less noise about it."""
    s, t = make_logits("random", 1, 12, torch.float64)
    right = value_and_gradient(reptile_ext.distillation_loss, s, t, temperature=1.5)[1]
    rows = 20_000
    ids, log_probs = sampled_targets(
        t.expand(rows, -1), 5, 1.5, generator=torch.Generator().manual_seed(0), replacement=replacement
    )
    many = s.expand(rows, -1).clone()
    each = value_and_gradient(loss_of, many, ids, log_probs, tail="renormalize", temperature=1.5, reduction="sum")[1]
    noise = each.std(0) / math.sqrt(rows)
    assert ((each.mean(0) - right[0]).abs() <= 4 * noise + 1e-7).all()
    # T² q is T² times a multinomial's share, whose variance is p (1 − p) / 5.
    p = (t[0] / 1.5).softmax(-1)
    of_multinomial = 1.5 * (p * (1 - p) / 5).sqrt()
    ratio = (each.std(0) / of_multinomial).square().mean()
    assert (0.9 < ratio < 1.1) if replacement else ratio < 0.5
    biased = value_and_gradient(loss_of, s, *top_k_targets(t, 5, 1.5), tail="renormalize", temperature=1.5)[1]
    assert (biased - right).abs().max() > 0.02


@pytest.mark.parametrize(("num_samples", "vocab_size"), [(1, 40), (7, 40), (39, 40), (40, 40), (64, 40), (64, 3000)])
@pytest.mark.parametrize("scale", [0.0, 1.0, 30.0])
def test_draws_without_replacement(num_samples: int, vocab_size: int, scale: float) -> None:
    """Classes above the threshold with their own probability, the others with one weight; all of them different, in
    order, and their weights add up to 1."""
    t = scale * torch.randn(50, vocab_size, generator=torch.Generator().manual_seed(2))
    t[:, 5] = -torch.inf
    ids, log_probs = sampled_targets(t, num_samples, generator=torch.Generator().manual_seed(3))
    p, listed = t.double().softmax(-1), ids >= 0
    assert (listed.sum(-1) <= min(num_samples, vocab_size - 1)).all()
    if scale < 30:  # none of the probabilities is next to nothing
        assert (listed.sum(-1) == min(num_samples, vocab_size - 1)).all()
    assert not (ids == 5).any()
    assert (log_probs[~listed] == -torch.inf).all()
    ordered = torch.where(listed, ids, vocab_size + torch.arange(num_samples))
    assert (ordered[:, 1:] > ordered[:, :-1]).all()
    torch.testing.assert_close(captured_mass(log_probs), torch.ones(50))
    for row, row_ids, row_y in zip(p, ids, log_probs.double().exp(), strict=True):
        is_normal = row_y > 1e-30  # of others float32 has few digits
        weights, own = row_y[is_normal], row[row_ids[is_normal]]
        tau = weights.min()  # or a class with its own, if all are
        torch.testing.assert_close(weights, torch.maximum(own, tau), rtol=1e-5, atol=0)
        left_out = row.clone()
        left_out[row_ids[row_ids >= 0]] = 0
        assert left_out.max() <= max(tau * (1 + 1e-5), 1e-30)


# ----------------------------------------------------------------------------------------------------- the promises


# "zero" takes log-probabilities as they were rounded; a cross entropy is no divergence.
@cases_and_dtypes([case for case in CASES if case[0] != "zero" and case[1] != "soft_cross_entropy"])
def test_equal_rows_give_exactly_zero(tail: str, divergence: str, dtype: torch.dtype, each_set: str) -> None:
    """Where it can be known that they are equal: all classes are compared, or those listed among themselves."""
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    z = (3 * torch.randn(7, 70, generator=torch.Generator().manual_seed(0))).log_softmax(-1).to(dtype)
    order = torch.rand(7, 70, generator=torch.Generator().manual_seed(1)).argsort(-1)
    for k in {70, 70 if tail != "restrict" else 9}:
        ids = order[:, :k].contiguous()
        loss, gradient = value_and_gradient(
            loss_of, z, ids, z.gather(-1, ids).to(arithmetic), **keywords_of(tail, divergence), reduction="none"
        )
        assert (loss == 0).all()
        assert (gradient == 0).all()


@pytest.mark.parametrize("divergence", [name for tail, name in CASES if tail == "bucket" and "entropy" not in name])
def test_bucket_at_the_teacher_is_zero_to_rounding(divergence: str) -> None:
    s = 3 * torch.randn(7, 500, dtype=torch.float64)
    ids, log_probs = targets(s, 20, dtype=torch.float64)
    loss, gradient = value_and_gradient(loss_of, s, ids, log_probs, **keywords_of("bucket", divergence))
    assert 0 <= loss < 1e-14 if divergence != "tvd" else loss < 1e-14
    if divergence != "tvd":  # whose sign is any, of equal numbers that were rounded apart
        assert gradient.abs().max() < 1e-13


@pytest.mark.parametrize(("tail", "divergence"), [case for case in CASES if case[0] != "zero"])
def test_divergence_is_never_negative(tail: str, divergence: str) -> None:
    for kind in ("random", "near_equal", "flat"):
        s, t = make_logits(kind, 30, 60)
        ids, log_probs = targets(t, 8)
        assert (loss_of(s, ids, log_probs, **keywords_of(tail, divergence), reduction="none") >= 0).all()


def test_bug_16_a_cut_kl_below_zero_is_said_once_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """verl #7856: Σ_K p (y − x) goes below 0 and pushes the student past the teacher. Here "zero" is that sum,
    unclamped, and says so; "bucket" is at least 0, and 0 at the teacher."""
    t = torch.randn(3, 50, dtype=torch.float64)
    ids, log_probs = top_k_targets(t, 4)
    s = t.clone().scatter_add_(-1, ids, torch.full(ids.shape, 3.0, dtype=torch.float64))
    monkeypatch.setattr(sparse, "_warned_of_zero", False)
    with pytest.warns(UserWarning, match="tail='zero' .* no divergence, may be negative.*tail='bucket'"):
        loss = loss_of(s, ids, log_probs, tail="zero", reduction="none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = loss_of(s, ids, log_probs, tail="zero", reduction="none")
        bucket = [loss_of(z, ids, log_probs, reduction="none") for z in (s, t)]
        monkeypatch.setattr(sparse, "_warned_of_zero", False)
        loss_of(s, ids, log_probs, tail="zero", divergence="soft_cross_entropy")
    x = s.log_softmax(-1).gather(-1, ids)
    right = (log_probs.exp() * (log_probs - x)).sum(-1)
    assert (right < 0).all()
    torch.testing.assert_close(loss, right, rtol=1e-13, atol=1e-14)
    assert torch.equal(loss, again)
    assert (bucket[0] > 0).all()
    assert bucket[1].abs().max() < 1e-14


@every_case
def test_masked_classes(tail: str, divergence: str, each_set: str) -> None:
    """−inf of the student outside of the list, and in both at a class of it, is as if there were no such class."""
    s, t = make_logits("random", 5, 30)
    ids, log_probs = targets(t, 7, padded=False)
    keywords = keywords_of(tail, divergence) | {"reduction": "none"}
    outside = torch.ones(5, 30, dtype=torch.bool).scatter_(-1, ids, False)
    masked = outside & (torch.arange(30) % 3 == 0)
    log_probs = log_probs.clone()
    log_probs[:, 2] = -torch.inf  # a class of the list that neither has
    log_probs = log_probs.log_softmax(-1) - 0.2
    full = s.masked_fill(masked, -torch.inf).scatter(-1, ids[:, 2:3], -torch.inf)
    found = value_and_gradient(loss_of, full, ids, log_probs, **keywords)
    assert not found[0].isnan().any()
    assert (found[1][masked] == 0).all()
    for r in range(5):
        keep = full[r] > -torch.inf
        place = keep.cumsum(-1) - 1
        few = ids[r] != ids[r, 2]
        right = value_and_gradient(
            loss_of,
            full[r, keep].view(1, -1),
            place[ids[r, few]].view(1, -1),
            log_probs[r, few].view(1, -1),
            **keywords,
        )
        torch.testing.assert_close(found[0][r : r + 1], right[0], rtol=2e-6, atol=1e-7)
        factor = torch.linspace(0.5, 2, 5)[r] / 0.5
        torch.testing.assert_close(found[1][r, keep], factor * right[1][0], rtol=1e-5, atol=1e-6)


def test_labels_where_all_others_are_masked_and_the_listed_are_far_below_zero(each_set: str) -> None:
    """The exponential of a reference point of nothing, 0, over the others' is infinite, and was multiplied by 0."""
    for dtype in (torch.float32, torch.float64):
        s = torch.full((1, 40), -torch.inf, dtype=dtype)
        s[0, 3], s[0, 7] = -1000, -1001
        ids, log_probs, labels = torch.tensor([[3, 7]]), torch.tensor([[0.5, 0.5]]).log(), torch.tensor([7])
        loss, gradient = value_and_gradient(loss_of, s, ids, log_probs, labels, soft_weight=0.0, hard_weight=1.0)
        q = torch.tensor([1.0, 0.0], dtype=torch.float64).softmax(-1)
        assert abs(loss.item() + math.log(q[1])) < 1e-6
        right = torch.zeros(1, 40, dtype=torch.float64)
        right[0, 3], right[0, 7] = q[0], q[1] - 1
        torch.testing.assert_close(gradient.double(), right, rtol=1e-6, atol=0)


def test_mass_where_the_student_is_masked(each_set: str) -> None:
    """Listed or not, teacher mass where the student has none makes forward KL +inf, and its gradient finite."""
    s = torch.randn(3, 8)
    s[0, 2] = -torch.inf  # of the list
    s[1, 3:] = -torch.inf  # all that is not listed
    ids, log_probs = torch.tensor([[0, 1, 2]]).expand(3, 3), torch.tensor([[0.2, 0.3, 0.4]]).log().expand(3, 3)
    loss, gradient = value_and_gradient(loss_of, s, ids, log_probs, reduction="none")
    assert loss.isinf().tolist() == [True, True, False]
    assert gradient.isfinite().all()
    reverse, of_reverse = value_and_gradient(
        loss_of, s, ids, torch.tensor([[0.5, 0.0, 0.5]]).log().expand(3, 3), divergence="reverse_kl", reduction="none"
    )
    assert (reverse == torch.inf).all()
    assert of_reverse.isfinite().all()


@every_case_and_dtype
def test_a_broken_row_is_visible_and_stays_alone(dtype: torch.dtype, tail: str, divergence: str, each_set: str) -> None:
    s, t = make_logits("random", 8, 700, dtype)
    ids, log_probs = targets(t, 7, padded=False)
    keywords = keywords_of(tail, divergence) | {"reduction": "none", "temperature": 2.0}
    whole = value_and_gradient(loss_of, s, ids, log_probs, **keywords)
    outside = next(v for v in range(600, 700) if v not in ids[1:3].flatten().tolist())
    s, log_probs = s.clone(), log_probs.clone()
    s[1, outside] = torch.nan
    s[2, outside] = torch.inf
    s[3, ids[3, 4]] = torch.nan
    s[4, ids[4, 4]] = torch.inf
    s[5] = -torch.inf
    log_probs[6, 2] = torch.nan
    broken = [1, 2, 3, 4, 5, 6]
    for of in (loss_of, reference.sparse_distillation_loss):
        loss, gradient = value_and_gradient(of, s, ids, log_probs, **keywords)
        assert loss[broken].isnan().all()
        assert gradient[broken].isnan().all()
        for a, b in zip((loss, gradient), whole, strict=True):
            torch.testing.assert_close(a[[0, 7]], b[[0, 7]], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("tail", TAILS)
def test_a_row_of_masked_classes_alone_is_broken_whatever_is_listed(tail: str, each_set: str) -> None:
    for ids in ([2, 0], [-1, -1]):
        s, teacher = torch.full((2, 40), -torch.inf), (torch.tensor([ids, [0, 1]]), torch.full((2, 2), 0.5).log())
        s[1] = 0
        loss, gradient = value_and_gradient(loss_of, s, *teacher, tail=tail, reduction="none")
        assert loss.isnan().tolist() == [True, False]
        assert gradient[0].isnan().all()
        assert gradient[1].isfinite().all()


@pytest.mark.parametrize("inplace", [False, True])
def test_ignored_rows_are_never_read(inplace: bool, each_set: str) -> None:
    s, t = make_logits("random", 6, 50)
    ids, log_probs = targets(t, 5)
    labels, weight = torch.tensor([1, -100, 2, 3, 4, 5]), torch.tensor([1.0, 1.0, 0.0, 2.0, 0.5, 1.0])
    keywords = {"weight": weight, "hard_weight": 0.5, "temperature": 2.0}
    right = value_and_gradient(loss_of, s, ids, log_probs, labels, **keywords)
    s, ids, log_probs = s.clone(), ids.clone(), log_probs.clone()
    for row, garbage in ((1, torch.nan), (2, torch.inf)):
        s[row], ids[row], log_probs[row] = garbage, 99, torch.nan
    labels[2] = 77
    leaf = s.requires_grad_()
    loss = loss_of(leaf * 1, ids, log_probs, labels, inplace=inplace, **keywords)
    loss.backward()
    assert leaf.grad is not None
    torch.testing.assert_close(loss, right[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, right[1], rtol=1e-6, atol=1e-9)
    assert (leaf.grad[1:3] == 0).all()
    by_reference = value_and_gradient(reference.sparse_distillation_loss, s, ids, log_probs, labels, **keywords)
    torch.testing.assert_close(by_reference[0], right[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(by_reference[1], right[1], rtol=1e-5, atol=1e-7)


def test_rows_without_a_class_listed() -> None:
    """Of a teacher of which nothing is known, "bucket" and "zero" say 0; the others have nothing to compare: NaN."""
    s, ids = torch.randn(2, 5), torch.tensor([[-1, -1], [0, 3]])
    log_probs = torch.tensor([[-torch.inf, torch.nan], [-1.0, -2.0]])  # padding is not read
    for of in (loss_of, reference.sparse_distillation_loss):
        for tail in TAILS:
            loss, gradient = value_and_gradient(of, s, ids, log_probs, tail=tail, reduction="none")
            assert loss[1].isfinite()
            if tail in ("bucket", "zero"):
                assert loss[0] == 0
                assert gradient[0].abs().max() <= 1e-7
            else:
                assert loss[0].isnan()
                assert gradient[0].isnan().all()


def test_probabilities_above_one_by_rounding_are_scaled() -> None:
    """bfloat16 log-probabilities whose sum is 1.02: as if divided by it, with nothing left for the other classes."""
    s = torch.randn(1, 9, dtype=torch.float64)
    ids, log_probs = torch.tensor([[0, 1, 2]]), torch.tensor([[0.5, 0.3, 0.22]]).log().to(torch.bfloat16)
    mass = captured_mass(log_probs).double()
    assert mass > 1.01
    found = value_and_gradient(loss_of, s, ids, log_probs)
    right = value_and_gradient(loss_of, s, ids, log_probs.double() - mass.log())
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


# --------------------------------------------------------------------------- what went wrong for others who did this


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("divergence", ["forward_kl", "symmetric_kl", "jsd"])
def test_equal_rows_with_a_shared_mask_that_are_listed_in_full_are_equal(
    divergence: str, dtype: torch.dtype, each_set: str
) -> None:
    """What rounding leaves of the teacher's mass is not infinitely far from a student who has nothing there."""
    s = torch.randn(64, 300, dtype=torch.float64)
    s[:, torch.randperm(300)[40:]] = -torch.inf
    ids, log_probs = top_k_targets(s, 64, 1.0)
    for of in (loss_of, reference.sparse_distillation_loss):
        loss, gradient = value_and_gradient(
            of, s.to(dtype), ids, log_probs.to(dtype), divergence=divergence, reduction="none"
        )
        # A logarithm's rounding moves its class by eps / 2 of it, and the divergence by the square of that.
        assert (loss < torch.finfo(dtype).eps ** 2 + 1e-6).all()
        assert gradient.isfinite().all()
        # Mass that is really there stays infinitely far, or as far as the divergence goes.
        fewer = torch.full_like(s, -torch.inf).scatter(-1, ids[:, :20], s.gather(-1, ids[:, :20])).to(dtype)
        less = value_and_gradient(
            of, fewer, ids[:, :20], log_probs[:, :20].to(dtype), divergence=divergence, reduction="none"
        )[0]
        assert (less == torch.inf).all() if divergence != "jsd" else (less > 0.001).all()


def test_two_classes_of_which_one_is_listed_lose_nothing() -> None:
    """verl #7806: q = (0.6, 0.4), p = (0.9, 0.1), one class: the cut sum was −0.243, clamped to 0 without a gradient,
    where the reverse KL is 0.311239. Of two classes the bucket is the other one."""
    s, ids, log_probs = torch.tensor([[0.6, 0.4]]).log(), torch.tensor([[0]]), torch.tensor([[0.9]]).log()
    loss, gradient = value_and_gradient(loss_of, s, ids, log_probs, divergence="reverse_kl")
    right = value_and_gradient(
        reptile_ext.distillation_loss, s, torch.tensor([[0.9, 0.1]]).log(), divergence="reverse_kl"
    )
    assert abs(loss.item() - 0.311239) < 1e-6
    torch.testing.assert_close((loss, gradient), right, rtol=1e-6, atol=1e-7)


@every_case
def test_padding_by_minus_infinity_gives_no_nan(tail: str, divergence: str, each_set: str) -> None:
    """TRL #5594: reverse KL's gradient was NaN where shorter samples were padded by −inf."""
    s, t = make_logits("random", 3, 30)
    ids, log_probs = top_k_targets(t, 5)
    wide, padded = F.pad(ids, (0, 3), value=-1), F.pad(log_probs, (0, 3), value=-torch.inf)
    found = value_and_gradient(loss_of, s, wide, padded, **keywords_of(tail, divergence))
    right = value_and_gradient(loss_of, s, ids, log_probs, **keywords_of(tail, divergence))
    assert found[1].isfinite().all()
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)
    assert captured_mass(padded).equal(captured_mass(log_probs))


def test_forward_is_forward_and_reverse_is_reverse() -> None:
    """TRL #4935 had them exchanged, by F.kl_div's order of arguments."""
    s, ids = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log(), torch.tensor([[0, 2]])
    p, q = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64), torch.tensor([0.7, 0.1, 0.2], dtype=torch.float64)
    for divergence, right in (("forward_kl", (p * (p / q).log()).sum()), ("reverse_kl", (q * (q / p).log()).sum())):
        found = loss_of(s, ids, p[:2].log().view(1, 2), divergence=divergence)
        torch.testing.assert_close(found, right)


def test_the_teachers_temperature_is_that_of_its_log_probabilities() -> None:
    """Liger #441, verl #5592: log-probabilities made at one temperature cannot be brought to another once they are cut.
    They are taken as they are; T_t only scales the loss, and T_s the student."""
    s, t = make_logits("random", 4, 30, torch.float64)
    ids, log_probs = top_k_targets(t, 30, 3.0)
    right = value_and_gradient(reptile_ext.distillation_loss, s, t, temperature=(2.0, 3.0))
    for a, b in zip(value_and_gradient(loss_of, s, ids, log_probs, temperature=(2.0, 3.0)), right, strict=True):
        torch.testing.assert_close(a, b)
    plainly = value_and_gradient(loss_of, s, ids, log_probs, temperature=(2.0, 3.0), temperature_scaling="none")
    torch.testing.assert_close(6 * plainly[0], right[0])
    torch.testing.assert_close(6 * plainly[1], right[1])


def test_logits_and_probabilities_in_the_place_of_log_probabilities_are_refused() -> None:
    """axolotl #2692: a negative loss, of data made by one's own program."""
    s, t = make_logits("random", 4, 30)
    values, ids = t.topk(5)
    for wrong in (values, t.softmax(-1).gather(-1, ids)):
        with pytest.raises(ValueError, match=r"teacher_log_probs must be logarithms .* \(top_k_targets makes them"):
            loss_of(s, ids, wrong)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_small_probabilities_in_the_place_of_their_logarithms_are_refused(dtype: torch.dtype) -> None:
    """Each is below what rounding may make of a logarithm; together they are more than 1. Rounded logarithms of all
    classes, in any dtype, are not."""
    s, t = make_logits("random", 4, 3000)
    ids = t.topk(2500).indices
    probabilities = (t / 4).softmax(-1).gather(-1, ids).to(dtype)
    assert probabilities.max() < 0.1
    for of in (loss_of, reference.sparse_distillation_loss):
        with pytest.raises(ValueError, match=r"teacher_log_probs must .* 1 at most; got a row of sum 2[45]\d\d"):
            of(s, ids, probabilities)
        few = ids[:, :3].contiguous()
        with pytest.raises(ValueError, match=r"got a row of sum 1\.1[0-9]* \(F\.log_softmax"):
            of(s, few, torch.full((4, 3), -0.9985, dtype=dtype))
        for flat in (t, 0 * t):
            log_probs = flat.log_softmax(-1).gather(-1, ids).to(dtype)
            assert of(s, ids, log_probs).isfinite()
        # What stands where there is no class is not read.
        of(s, torch.where(ids == ids[:, :1], ids, -1), torch.where(ids == ids[:, :1], -0.1, 1e4).to(dtype))


def test_a_first_position_without_log_probabilities_is_ignored_by_its_label() -> None:
    """axolotl #2700, ms-swift #9671: servers give none for the first token; dropped, all others move by one."""
    s, t = make_logits("random", (2, 5), 30)
    ids, log_probs = top_k_targets(t, 4)
    ids[:, 0], log_probs[:, 0] = -1, -torch.inf
    labels = torch.ones(2, 5, dtype=torch.int64)
    labels[:, 0] = -100
    found = loss_of(s, ids, log_probs, labels)
    torch.testing.assert_close(found, loss_of(s[:, 1:], ids[:, 1:], log_probs[:, 1:]))


def test_the_mass_outside_of_the_list_is_pulled_to_the_teachers() -> None:
    """verl #7856: the mass outside of the list was free. Here its gradient pulls it to the teacher's r, classes in
    proportion to q."""
    s, ids = torch.zeros(1, 101, dtype=torch.float64), torch.tensor([[0]])
    loss, gradient = value_and_gradient(loss_of, s, ids, torch.tensor([[0.9]], dtype=torch.float64).log())
    q = 1 / 101
    torch.testing.assert_close(gradient[0, 0].item(), q - 0.9)
    torch.testing.assert_close(gradient[0, 1:], torch.full((100,), (1 - q - 0.1) / 100, dtype=torch.float64))
    assert loss > 0


# ---------------------------------------------------------------------------------------- from rows to a loss, layouts


def test_mean_sum_none_and_denominator() -> None:
    s, t = make_logits("random", (2, 6), 20)
    ids, log_probs = top_k_targets(t, 4)
    labels = make_labels(12, 20).view(2, 6)
    weight = torch.rand(2, 6) + 0.1
    keywords = {"hard_weight": 0.5, "weight": weight}
    each = loss_of(s, ids, log_probs, labels, reduction="none", **keywords)
    assert each.shape == (2, 6)
    count = (weight * (labels != -100)).sum()
    torch.testing.assert_close(loss_of(s, ids, log_probs, labels, reduction="sum", **keywords), each.sum())
    torch.testing.assert_close(loss_of(s, ids, log_probs, labels, **keywords), each.sum() / count)
    for denominator in (12.5, torch.tensor(12.5)):
        torch.testing.assert_close(
            loss_of(s, ids, log_probs, labels, denominator=denominator, **keywords), each.sum() / 12.5
        )
    assert loss_of(s, ids, log_probs, torch.full_like(labels, -100)) == 0
    assert loss_of(s[:0], ids[:0], log_probs[:0]) == 0
    assert loss_of(s, ids, log_probs, labels, soft_weight=0.0, hard_weight=1.0).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("inplace", [False, True])
def test_layouts(inplace: bool, dtype: torch.dtype) -> None:
    """Strides of all three, the class dimension anywhere, int32."""
    s, t = make_logits("random", (3, 5), 37, dtype)
    ids, log_probs = top_k_targets(t, 6)
    labels = make_labels(15, 37).view(3, 5)
    keywords = {"hard_weight": 0.5, "label_smoothing": 0.1, "temperature": 2.0, "inplace": inplace}

    def run(lay: Any, ids: Tensor, log_probs: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
        leaf = s.clone().requires_grad_()
        loss = loss_of(lay(leaf * 1), ids, log_probs, labels, **keywords, **more)
        loss.backward()
        assert leaf.grad is not None
        return loss.detach(), leaf.grad

    right = run(lambda z: z, ids, log_probs)
    wide = F.pad(ids, (1, 2), value=-1)
    ways = {
        "class first": (lambda z: z.movedim(-1, 0).contiguous().movedim(0, -1), ids, log_probs, {}),
        "every second": (lambda z: z.repeat_interleave(2, -1)[..., ::2], ids, log_probs, {}),
        "padded": (lambda z: F.pad(z, (1, 2), value=torch.nan)[..., 1:-2], ids, log_probs, {}),
        "views": (lambda z: z, wide[..., 1:-2], log_probs.transpose(0, 1).contiguous().transpose(0, 1), {}),
        "int32": (lambda z: z, ids.int(), log_probs.double().float(), {}),
        "padding": (lambda z: z, wide, F.pad(log_probs, (1, 2), value=0.7), {}),
        "dim=1": (lambda z: z.movedim(-1, 1), ids, log_probs, {"dim": 1}),
    }
    for name, (lay, i, y, more) in ways.items():
        for a, b in zip(run(lay, i, y, **more), right, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6 if a.dtype == torch.float32 else 2**-7, atol=1e-7, msg=name)


def test_an_expanded_student_and_teacher() -> None:
    s, ids = torch.randn(1, 20), torch.tensor([[3, 7]])
    log_probs = torch.tensor([[-1.0, -2.0]])
    found = loss_of(s.expand(4, -1), ids.expand(4, -1), log_probs.expand(4, -1), reduction="none")
    torch.testing.assert_close(found, loss_of(s, ids, log_probs, reduction="none").expand(4))
    student = (s.requires_grad_() * 1).expand(4, -1)
    with pytest.raises(ValueError, match="do not share memory"):
        loss_of(student, ids.expand(4, -1), log_probs.expand(4, -1), inplace=True)


@pytest.mark.parametrize("dtypes", [(a, b) for a in DTYPES for b in DTYPES], ids=str)
def test_dtypes_of_the_log_probabilities(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    s, t = make_logits("random", 5, 60, dtypes[0])
    ids, log_probs = targets(t, 7, dtype=dtypes[1])
    assert_right(s, ids, log_probs, make_labels(5, 60), hard_weight=0.5)


def test_the_largest_vocabulary_and_list(each_set: str) -> None:
    s, t = make_logits("random", 2, 151_936)
    ids, log_probs = targets(t, 4096, padded=False)
    assert_right(s, ids, log_probs)
    fresh = value_and_gradient(loss_of, s.repeat(4, 1), ids.repeat(4, 1), log_probs.repeat(4, 1), reduction="sum")[1]
    once = value_and_gradient(loss_of, s, ids, log_probs, reduction="sum")[1]  # not past the caches
    assert torch.equal(fresh[:2], once)


def test_same_bits_with_any_number_of_threads() -> None:
    s, t = make_logits("random", 100, 2000, torch.bfloat16)
    ids, log_probs = targets(t, 30)
    labels = make_labels(100, 2000)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append(value_and_gradient(loss_of, s, ids, log_probs, labels, hard_weight=0.5, temperature=2.0))
    for loss, gradient in found[1:]:
        assert torch.equal(loss, found[0][0])
        assert torch.equal(gradient, found[0][1])


def test_the_order_of_the_list_does_not_matter_beyond_rounding() -> None:
    s, t = make_logits("random", 4, 500)
    ids, log_probs = top_k_targets(t, 64)
    right = value_and_gradient(loss_of, s, ids, log_probs)
    found = value_and_gradient(loss_of, s, ids.flip(-1), log_probs.flip(-1))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


# -------------------------------------------------------------------------------------------------------- autograd


@every_case
def test_gradients_equal_finite_differences(tail: str, divergence: str) -> None:
    s, t = make_logits("random", 3, 9, torch.float64)
    ids, log_probs = targets(t, 4, dtype=torch.float64)
    labels = make_labels(3, 9)
    keywords = keywords_of(tail, divergence) | {"temperature": (1.5, 2.0), "hard_weight": 0.5, "label_smoothing": 0.1}

    def of(s: Tensor) -> Tensor:
        return loss_of(s, ids, log_probs, labels, **keywords)

    assert torch.autograd.gradcheck(of, (s.requires_grad_(),))
    assert torch.autograd.gradgradcheck(of, (s,))


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_equals_the_default(reduction: str, dtype: torch.dtype, each_set: str) -> None:
    s, t = make_logits("random", 9, 1041, dtype)
    ids, log_probs = targets(t, 12)
    labels = make_labels(9, 1041)
    keywords = {"hard_weight": 0.5, "label_smoothing": 0.2, "temperature": 2.0, "reduction": reduction}
    right = value_and_gradient(loss_of, s, ids, log_probs, labels, **keywords)[1]
    leaf = s.clone().requires_grad_()
    loss = loss_of(leaf * 1, ids, log_probs, labels, inplace=True, **keywords)
    factor = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view(loss.shape) if loss.dim() else None
    loss.backward(factor)
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad, right, rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="leaf"):
        loss_of(leaf, ids, log_probs, inplace=True)
    loss = loss_of(leaf * 1, ids, log_probs, inplace=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        torch.autograd.grad(loss, leaf, create_graph=True)


def test_a_second_backward_and_what_is_ignored_times_infinity() -> None:
    s, t = make_logits("random", 6, 9)
    ids, log_probs = targets(t, 3)
    labels = make_labels(6, 9)
    leaf = s.requires_grad_()
    loss = loss_of(leaf, ids, log_probs, labels)
    (first,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    torch.testing.assert_close(first, second)
    for factor in (torch.inf, torch.nan):
        (gradient,) = torch.autograd.grad(loss_of(leaf, ids, log_probs, labels), leaf, torch.tensor(factor))
        assert (gradient[labels == -100] == 0).all()
        assert not gradient[labels != -100].isfinite().any()


@pytest.mark.parametrize("needs_gradient", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_opcheck(reduction: str, needs_gradient: bool) -> None:
    s, t = make_logits("random", 5, 8, torch.float64)
    ids, log_probs = targets(t, 3, dtype=torch.float64)
    options = make_sparse_options(hard_weight=0.5, reduction=reduction)
    constants = (make_labels(5, 8), torch.rand(5, dtype=torch.float64), None)
    numbers = (*ops.numbers(options), ids, 0, False)
    torch.library.opcheck(
        ops.sparse_distillation_loss,
        (s.clone().requires_grad_(needs_gradient), log_probs, *constants, None, *numbers, needs_gradient),
    )
    torch.library.opcheck(
        ops.sparse_distillation_loss_,
        (s.clone(), log_probs, *constants, None, *numbers),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inside torch
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_equals_eager(backend: str) -> None:
    torch.compiler.reset()

    def step(s: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor) -> Tensor:
        return loss_of(s * 2, ids, log_probs, labels, tail="renormalize", temperature=2.0, hard_weight=0.5)

    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    for rows in (6, 11):
        s, t = make_logits("random", rows, 17)
        given = (s, *targets(t, 4), make_labels(rows, 17))
        right = value_and_gradient(step, *given)
        for a, b in zip(value_and_gradient(compiled, *given), right, strict=True):
            torch.testing.assert_close(a, b)


def test_exported_equals_eager() -> None:
    class Module(torch.nn.Module):
        def forward(self, s: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
            return loss_of(s, ids, log_probs, divergence="jsd", vocab="truncate")

    s, t = make_logits("random", 6, 17)
    ids, log_probs = targets(t, 4)
    program = torch.export.export(Module(), (s, ids, log_probs), strict=True)
    right = loss_of(s, ids, log_probs, divergence="jsd", vocab="truncate")
    torch.testing.assert_close(program.module()(s, ids, log_probs), right)


@every_case
def test_torch_func(tail: str, divergence: str) -> None:
    s, t = make_logits("random", 6, 17, torch.float64)
    ids, log_probs = targets(t, 4, dtype=torch.float64)

    def of(s: Tensor, ids: Tensor, log_probs: Tensor) -> Tensor:
        return loss_of(s, ids, log_probs, reduction="sum", **keywords_of(tail, divergence))

    each = torch.func.vmap(torch.func.grad(of))(s, ids, log_probs)
    torch.testing.assert_close(each, value_and_gradient(of, s, ids, log_probs)[1])
    v = torch.randn_like(s)
    _, tangent = torch.func.jvp(lambda s: of(s, ids, log_probs), (s,), (v,))
    torch.testing.assert_close(tangent, (each * v).sum())


def test_wrong_values_under_vmap() -> None:
    s, ids, log_probs = torch.randn(3, 6), torch.tensor([[0, 1], [2, 3], [4, 4]]), torch.full((3, 2), -1.0)
    with pytest.raises(ValueError, match=r"teacher_indices must differ .*; got 4 twice"):
        torch.vmap(loss_of)(s, ids, log_probs)


def test_autocast_and_checkpoint() -> None:
    s, t = make_logits("random", 4, 40)
    ids, log_probs = targets(t, 5)
    right = value_and_gradient(loss_of, s, ids, log_probs)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_of(s.bfloat16(), ids, log_probs).dtype == torch.float32
        assert torch.equal(loss_of(s, ids, log_probs), right[0])

    def checkpointed(s: Tensor) -> Tensor:
        loss: Tensor = torch.utils.checkpoint.checkpoint(
            lambda s: loss_of(s * 1, ids, log_probs), s, use_reentrant=False
        )
        return loss

    for a, b in zip(value_and_gradient(checkpointed, s), right, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_of_the_logits_size_is_allocated_in_place() -> None:
    from torch.profiler import ProfilerActivity, profile

    s, t = make_logits("random", 64, 4096)
    ids, log_probs = targets(t, 8)
    leaf = s.requires_grad_()
    student = leaf * 1
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss_of(student, ids, log_probs, inplace=True)
    assert max(e.cpu_memory_usage for e in seen.key_averages()) < s.numel()


# -------------------------------------------------------------------------------------------- targets and interface


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rows", [(), (3,), (2, 0), (700, 3)])
def test_top_k_targets(rows: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse, "_CHUNK_BYTES", 1 << 14)  # several chunks
    t = 4 * torch.randn(*rows, 50, dtype=torch.float64).to(dtype)
    ids, log_probs = top_k_targets(t, 6, 1.7)
    assert ids.dtype == torch.int64
    assert log_probs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ids.shape == log_probs.shape == (*rows, 6)
    right = (t.double() / 1.7).log_softmax(-1)
    torch.testing.assert_close(log_probs.double(), right.topk(6).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(right.gather(-1, ids), right.topk(6).values)
    assert (ids.sort(-1).values.diff(dim=-1) > 0).all()


def test_targets_of_masked_classes_and_large_logits() -> None:
    t = torch.tensor([[1e6, 1e6 + 1, -torch.inf, -torch.inf]])
    ids, log_probs = top_k_targets(t, 3)
    assert ids.tolist() == [[1, 0, -1]]
    torch.testing.assert_close(log_probs[0, :2].double(), torch.tensor([1.0, 0.0]).double().log_softmax(-1))
    assert log_probs[0, 2] == -torch.inf
    ids, log_probs = sampled_targets(t, 8, replacement=True)
    assert set(ids.flatten().tolist()) <= {0, 1, -1}
    torch.testing.assert_close(captured_mass(log_probs), torch.ones(1))


def test_captured_mass() -> None:
    t = torch.randn(4, 30)
    p = t.softmax(-1)
    for k in (1, 5, 30):
        ids, log_probs = top_k_targets(t, k)
        torch.testing.assert_close(captured_mass(log_probs), p.gather(-1, ids).sum(-1))
    assert captured_mass(log_probs.bfloat16()).dtype == torch.float32
    assert captured_mass(torch.full((2, 3), -torch.inf)).tolist() == [0, 0]
    padded = captured_mass(torch.tensor([[-0.5, 0.0], [-1.0, -2.0]]), torch.tensor([[4, -1], [0, 3]]))
    torch.testing.assert_close(padded, torch.tensor([math.exp(-0.5), math.exp(-1) + math.exp(-2)]))
    with pytest.raises(ValueError, match=r"teacher_indices must have the shape of .*, \[2, 2\]; got \[2\]"):
        captured_mass(torch.zeros(2, 2), torch.zeros(2, dtype=torch.int64))


def test_broken_rows_are_drawn_from_visibly() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    logits[1, 3], logits[2, 4], logits[3] = torch.nan, torch.inf, -torch.inf
    ids, log_probs = sampled_targets(logits, 6, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(captured_mass(log_probs, ids)[[0, 4]], torch.ones(2))
    assert ids[1:4].tolist() == [[0, -1, -1, -1, -1, -1]] * 3
    losses = loss_of(torch.zeros(5, 9), ids, log_probs, tail="renormalize", reduction="none")
    assert losses.isnan().tolist() == [False, True, True, True, False]


def test_the_module_is_the_function() -> None:
    s, t = make_logits("random", 6, 17)
    ids, log_probs = targets(t, 4)
    weight = torch.rand(6)
    module = reptile_ext.SparseDistillationLoss(temperature=2.0, divergence="jsd", tail="restrict")
    right = loss_of(s, ids, log_probs, temperature=2.0, divergence="jsd", tail="restrict", weight=weight)
    assert torch.equal(module(s, ids, log_probs, weight=weight), right)
    module.tail = "bucket"
    right = loss_of(s, ids, log_probs, temperature=2.0, divergence="jsd", weight=weight)
    assert torch.equal(module(s, ids, log_probs, weight=weight), right)
    with pytest.raises(ValueError, match="tail must be one of 'bucket', 'restrict'"):
        module.tail = "renormalise"
    with pytest.raises(ValueError, match="divergence='mse' does not go with"):
        reptile_ext.SparseDistillationLoss(divergence="mse")


def test_which_divergences_go_with_which_tail() -> None:
    of = {tail: [name for name in DIVERGENCES if tail in DIVERGENCE_TABLE[name].tails] for tail in TAILS}
    known = [name for name in DIVERGENCES if name in WRITTEN_OUT]
    assert [name for name in known if name not in of["bucket"]] == ["mse", "dkd"]
    assert [name for name in known if name not in of["restrict"]] == ["mse", "dkd"]
    assert [n for n in known if n not in of["renormalize"]] == ["reverse_kl", "symmetric_kl", "mse", "dkd"]
    assert of["zero"] == ["forward_kl", "soft_cross_entropy"]


S, IDS, Y = torch.zeros(3, 5), torch.tensor([[0, 1], [2, 3], [4, -1]]), torch.full((3, 2), -1.0)


@pytest.mark.parametrize("of", [loss_of, reference.sparse_distillation_loss], ids=["kernel", "reference"])
@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"student_logits": [0.5]}, TypeError, "student_logits must be a torch.Tensor; got list"),
        ({"student_logits": S.long()}, TypeError, "student_logits must be float32"),
        ({"student_logits": S[:, :0]}, ValueError, "student_logits needs at least one class"),
        ({"teacher_indices": IDS.float()}, TypeError, "teacher_indices must be int64 or int32; got torch.float32"),
        ({"teacher_indices": IDS[:2]}, ValueError, r"teacher_indices must .* \[3, K\]; got \[2, 2\]"),
        ({"teacher_log_probs": Y.long()}, TypeError, "teacher_log_probs must be float32"),
        ({"teacher_log_probs": Y[:, :1]}, ValueError, r"must have one shape; got \[3, 2\] and \[3, 1\]"),
        (
            {"teacher_indices": IDS[:, :0], "teacher_log_probs": Y[:, :0]},
            ValueError,
            "list 1 to 4096 classes a row; got 0",
        ),
        ({"teacher_indices": IDS + 1}, ValueError, r"teacher_indices must lie in \[-1, 5\), -1 for none.*; got 5"),
        ({"teacher_indices": IDS - 1}, ValueError, r"teacher_indices must lie in \[-1, 5\), -1 for none; got -2"),
        (
            {"teacher_indices": torch.tensor([[0, 1], [2, 3], [4, 4]])},
            ValueError,
            "teacher_indices must differ .* in a row; got 4 twice",
        ),
        ({"teacher_log_probs": Y + 3}, ValueError, "teacher_log_probs must be logarithms of probabilities.*got 2"),
        ({"teacher_log_probs": Y.clone().requires_grad_()}, ValueError, "pass teacher_log_probs.detach()"),
        ({"tail": "top"}, ValueError, "tail must be one of 'bucket', 'restrict', 'renormalize', 'zero'; got 'top'"),
        (
            {"divergence": "mse"},
            ValueError,
            "'mse' does not go with tail='bucket'.*'forward_kl'.* or distillation_loss",
        ),
        ({"divergence": "dkd"}, ValueError, "divergence='dkd' does not go with tail='bucket'"),
        (
            {"divergence": "reverse_kl", "tail": "renormalize"},
            ValueError,
            "'reverse_kl' does not go with tail='renormalize'.*'skew_reverse_kl'.* or tail='bucket' or tail='restrict'",
        ),
        (
            {"divergence": "skew_reverse_kl", "beta": 0.0, "tail": "renormalize"},
            ValueError,
            "at this beta it is reverse",
        ),
        ({"divergence": "tvd", "tail": "zero"}, ValueError, "pass one of 'forward_kl', 'soft_cross_entropy', or tail="),
        ({"hard_weight": 1.0}, ValueError, "labels are needed for hard_weight=1.0"),
        ({"labels": torch.tensor([0, 5, 1]), "hard_weight": 1.0}, ValueError, r"labels must lie in \[0, 5\).*got 5"),
        ({"weight": -torch.ones(3)}, ValueError, "weight must be finite and not negative; got -1"),
        ({"denominator": 0.0}, ValueError, "denominator must be a positive"),
        ({"temperature": 0.0}, ValueError, "temperature must be a positive number"),
    ],
)
def test_bad_input(keywords: dict[str, Any], error: type[Exception], message: str, of: Any) -> None:
    with pytest.raises(error, match=message):
        of(**{"student_logits": S, "teacher_indices": IDS, "teacher_log_probs": Y, **keywords})


def test_checks_before_it_writes() -> None:
    student = torch.randn(300, 200)
    ids, log_probs = top_k_targets(student, 5)
    ids[299, 1] = ids[299, 0]
    before = student.clone()
    with pytest.raises(ValueError, match="twice"):
        loss_of(student, ids, log_probs, inplace=True)
    assert torch.equal(student, before)


def test_bad_targets() -> None:
    for call, message in (
        (lambda: top_k_targets(S, 6), "k must lie between 1 and 5"),
        (lambda: top_k_targets(S, 0), "k must lie between 1 and 5"),
        (lambda: top_k_targets(S, 2, 0.0), "temperature must be a positive number"),
        (lambda: sampled_targets(S, 5000), "num_samples must lie between 1 and 4096"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="teacher_logits must be float32"):
        top_k_targets(S.long(), 2)
    with pytest.raises(TypeError, match="replacement must be True or False; got 1"):
        sampled_targets(S, 5, replacement=1)  # type: ignore[arg-type]


def test_the_operators_refuse_what_would_be_unsafe() -> None:
    numbers = ops.numbers(make_sparse_options())
    z, ids, y = S.clone(), IDS.clone(), Y.clone()

    def call(*tensors: Tensor, tail: int = 0, truncate: bool = False, by: tuple[Any, ...] = numbers) -> None:
        student, indices, log_probs = tensors
        ops.sparse_distillation_loss(student, log_probs, None, None, None, None, *by, indices, tail, truncate, True)

    mse = ops.numbers(make_options(divergence="mse"))
    for tensors, keywords, message in (
        ((z, ids[:2], y[:2]), {}, "indices must have one element"),
        ((z, ids, y[:, :1]), {}, "one shape"),
        ((z, ids.int(), y), {}, "indices must be int64"),
        ((z, ids.t().contiguous().t(), y), {}, "contiguous"),
        ((z, ids + 7, y), {}, r"teacher_indices must lie in \[-1, 5\)"),
        ((z, ids - 9, y), {"truncate": True}, r"teacher_indices must lie in \[-1, 5\)"),
        ((z, ids, y), {"tail": 4}, "tail is unknown"),
        ((z, ids, y), {"by": mse}, "divergence must be one of probabilities"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*tensors, **keywords)
    memory = torch.zeros(40)
    with pytest.raises(RuntimeError, match="memory of its own"):
        ops.sparse_distillation_loss_(
            memory[:15].view(3, 5), memory[10:16].view(3, 2), None, None, None, None, *numbers, ids, 0, False
        )
    call(z, 2**62 + torch.arange(6).view(3, 2), y, truncate=True)


def test_sets_agree() -> None:
    s, t = make_logits("random", 4, 900)
    ids, log_probs = targets(t, 20)
    found = []
    for name in INSTRUCTION_SETS:
        ops.instruction_set(name)
        found.append(value_and_gradient(loss_of, s, ids, log_probs, divergence="jsd"))
    for result in found[1:]:
        for a, b in zip(result, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-8)


def test_devices_without_kernels_take_the_reference() -> None:
    assert not functional.has_kernels(torch.device("xpu"))
    s, t = make_logits("random", 4, 20)
    ids, log_probs = targets(t, 3)
    meta = loss_of(s.to("meta"), ids.to("meta"), log_probs.to("meta"))
    assert meta.shape == ()


# ------------------------------------------------------------------------------------- in the fused linear loss


@every_case
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_linear_loss_equals_the_loss_of_the_logits(reduction: str, tail: str, divergence: str) -> None:
    """With softcap, scale, bias, ignored rows, several chunks; gradients of hidden states, head and bias."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in ((23, 8), (40, 8), 40)
    )
    ids, log_probs = targets(2 * torch.randn(23, 40, generator=generator), 6)
    labels = make_labels(23, 40)
    keywords = keywords_of(tail, divergence) | {"temperature": 2.0, "hard_weight": 0.5, "reduction": reduction}
    logits = 3 * ((hidden @ weight.t() + bias) * 0.5 / 3).tanh()
    right = loss_of(logits, ids, log_probs, labels, **keywords)
    more = {"student_bias": bias, "student_softcap": 3.0, "student_scale": 0.5, "memory_budget": 3000}
    of_teacher = {"teacher_indices": ids, "teacher_log_probs": log_probs}
    for of in (reptile_ext.linear_distillation_loss, reference.linear_distillation_loss):
        found = of(hidden, weight, labels=labels, **of_teacher, **more, **keywords)
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
        wanted = torch.autograd.grad(right.sum(), (hidden, weight, bias), retain_graph=True)
        for a, b in zip(torch.autograd.grad(found.sum(), (hidden, weight, bias)), wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # inside torch
def test_linear_loss_traced_derived_twice_and_as_a_module() -> None:
    hidden = torch.randn(9, 4, dtype=torch.float64).requires_grad_()
    weight = torch.randn(12, 4, dtype=torch.float64).requires_grad_()
    ids, log_probs = targets(torch.randn(9, 12), 3)
    module = reptile_ext.LinearDistillationLoss(tail="renormalize", temperature=2.0)

    def f(hidden: Tensor, weight: Tensor) -> Tensor:
        loss: Tensor = module(hidden, weight, teacher_indices=ids, teacher_log_probs=log_probs)
        return loss

    right = loss_of(hidden @ weight.t(), ids, log_probs, tail="renormalize", temperature=2.0)
    wanted = torch.autograd.grad(right, (hidden, weight), create_graph=True)
    torch.compiler.reset()
    for of in (f, torch.compile(f, backend="aot_eager", fullgraph=True)):
        found = of(hidden, weight)
        torch.testing.assert_close(found, right)
        for a, b in zip(torch.autograd.grad(found, (hidden, weight)), wanted, strict=True):
            torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(f, (hidden, weight))


def test_no_tensor_of_all_logits_exists() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple) else (result,):
                largest[0] = max(largest[0], x.nbytes if isinstance(x, Tensor) else 0)
            return result

    hidden, weight = torch.randn(2000, 4).requires_grad_(), torch.randn(5000, 4).requires_grad_()
    ids = torch.arange(8).expand(2000, -1)
    with Sizes():
        reptile_ext.linear_distillation_loss(
            hidden, weight, teacher_indices=ids, teacher_log_probs=torch.full((2000, 8), -3.0), memory_budget=1 << 20
        )
    assert largest[0] <= 1 << 20


def test_bad_teachers_of_the_linear_loss() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    of_teacher = {"teacher_indices": IDS, "teacher_log_probs": Y}
    for keywords, message in (
        ({**of_teacher, "teacher_hidden": hidden}, "take the place of teacher_hidden; got both"),
        ({**of_teacher, "teacher_scale": 2.0}, "teacher_scale has no meaning"),
        ({**of_teacher, "teacher_indices": IDS + 1}, r"teacher_indices must lie in \[-1, 5\)"),
        ({**of_teacher, "teacher_indices": IDS[:2]}, r"teacher_indices must .* of student_hidden .*\[3, K\]"),
        ({**of_teacher, "divergence": "mse"}, "divergence='mse' does not go with"),
        ({"teacher_hidden": hidden, "teacher_weight": weight, "tail": "zero"}, "tail has no meaning without"),
    ):
        with pytest.raises(ValueError, match=message):
            reptile_ext.linear_distillation_loss(hidden, weight, **keywords)
    with pytest.raises(TypeError, match=r"teacher_log_probs must be a torch\.Tensor; got NoneType"):
        reptile_ext.linear_distillation_loss(hidden, weight, teacher_indices=IDS)


# ------------------------------------------------------------------------- by torch's operations, some rows at a time


@pytest.fixture
def in_chunks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What processes that share the classes compute, in a process that has all of them; nobody looks at values."""
    monkeypatch.setattr("reptile_ext.sparse_chunks._CHUNK_BYTES", 1000)

    def of(s: Tensor, ids: Tensor, log_probs: Tensor, labels: Tensor | None = None, **keywords: Any) -> Tensor:
        denominator = keywords.pop("denominator", None)
        options = make_sparse_options(**keywords)
        return loss_in_chunks(s, ids, log_probs, labels, None, denominator, options, False)

    return of


@every_case
def test_in_chunks_equals_the_reference(in_chunks: Any, tail: str, divergence: str) -> None:
    s, t = make_logits("random", 7, 60, torch.float64)
    s[3, 7] = -torch.inf
    ids, log_probs = targets(t, 6, 1.5, torch.float64)
    labels = make_labels(7, 60)
    for more in ({}, {"hard_weight": 0.5, "label_smoothing": 0.1, "reduction": "none"}, {"denominator": 3.0}):
        keywords = keywords_of(tail, divergence) | {"temperature": (2.0, 1.5), **more}
        right = value_and_gradient(reference.sparse_distillation_loss, s, ids, log_probs, labels, **keywords)
        for a, b in zip(value_and_gradient(in_chunks, s, ids, log_probs, labels, **keywords), right, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
def test_in_chunks_rows_of_classes_that_the_student_lacks(in_chunks: Any, tail: str) -> None:
    s, t = make_logits("random", 4, 40)
    s = s[:, :25].contiguous()
    s[2, 9] = torch.nan
    ids, log_probs = targets(t, 4, padded=False)
    ids[1:3] = torch.tensor([25, 26, 27, 39])
    keywords = {"tail": tail, "vocab": "truncate", "reduction": "none"}
    found = value_and_gradient(in_chunks, s, ids, log_probs, **keywords)
    assert found[0][1] == 0
    right = value_and_gradient(reference.sparse_distillation_loss, s, ids, log_probs, **keywords)
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)


def test_in_chunks_bfloat16_and_broken_rows(in_chunks: Any) -> None:
    s, t = make_logits("random", 6, 90, torch.bfloat16)
    ids, log_probs = targets(t, 6)
    s[2, 80] = torch.nan
    ids[4, 1] = ids[4, 0]  # an error on the CPU, NaN where nobody looks
    loss, gradient = value_and_gradient(in_chunks, s, ids, log_probs, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False, True, False]
    assert gradient.isnan().all(-1).tolist() == loss.isnan().tolist()
    right = value_and_gradient(reference.sparse_distillation_loss, s[:2], ids[:2], log_probs[:2], reduction="none")
    torch.testing.assert_close(loss[:2], right[0], rtol=1e-5, atol=1e-6)
