"""Bugs that other distillation losses have shipped, one test each; the numbers are those of the project's list."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import (
    DTYPES,
    INSTRUCTION_SETS,
    assert_near,
    check,
    every_divergence,
    exact,
    keywords_of,
    labels_of,
    make_labels,
    make_logits,
    name_of,
    plain,
    run,
)

import reptile_ext
from reptile_ext import ops, reference

INF = float("inf")


@every_divergence
@pytest.mark.parametrize("temperature", [2.0, 4.0, (2.0, 3.0)])
def test_bug_01_t2_multiplies_the_gradient_too(temperature: Any, divergence: str) -> None:
    """T² was applied to the value alone, so that the gradient was 4 times too small at T = 2 and 16 times at T = 4."""
    student, teacher = make_logits("random", 4, 40, torch.float64)
    labels, keywords = labels_of(divergence, 4, 40), {"temperature": temperature, **keywords_of(divergence)}
    scale = temperature[0] * temperature[1] if isinstance(temperature, tuple) else temperature**2
    without = run(reptile_ext.distillation_loss, student, teacher, labels, temperature_scaling="none", **keywords)
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
    torch.testing.assert_close(loss, scale * without[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(gradient, scale * without[1], rtol=1e-12, atol=1e-15)
    # And the gradient is the value's: by finite differences along a random direction.
    direction = torch.randn_like(student)
    ahead, behind = (
        reptile_ext.distillation_loss(student + h * direction, teacher, labels, **keywords) for h in (1e-5, -1e-5)
    )
    torch.testing.assert_close((ahead - behind) / 2e-5, (gradient * direction).sum(), rtol=1e-6, atol=1e-9)


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_03_a_smaller_vocabulary_is_not_padded_with_zeros(dtype: torch.dtype, divergence: str) -> None:
    """A smaller student vocabulary was filled up with logits of 0, classes that then had mass: two models that agree on
    every class they share had a divergence of 0.21. It must be 0, and so the gradient, whichever side is the larger."""
    _, logits = make_logits("random", 4, 64, dtype)
    labels, keywords = make_labels(4, 50), {"vocab": "truncate", **keywords_of(divergence)}
    for student, teacher in ((logits[:, :50], logits), (logits, logits[:, :50])):
        loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
        if divergence != "soft_cross_entropy":
            assert loss.item() == 0.0
            assert (gradient == 0).all()
        cut = run(reptile_ext.distillation_loss, logits[:, :50], logits[:, :50], labels, **keywords)
        torch.testing.assert_close(loss, cut[0])
        torch.testing.assert_close(gradient[:, :50], cut[1])
        assert (gradient[:, 50:] == 0).all()


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_04_ignored_rows_are_in_neither_sum_nor_count(dtype: torch.dtype, divergence: str) -> None:
    """A masked row was left out of the sum but not out of the count (or the reverse), so that masking changed the
    loss of the rest. Masking half of a batch must be the same as not having that half, for soft and hard loss."""
    student, teacher = make_logits("random", 8, 50, dtype)
    labels = torch.arange(8)
    masked = torch.where(labels % 2 == 0, labels, -100)
    keywords = {"hard_weight": 0.5, "temperature": 2.0, **keywords_of(divergence)}
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, masked, **keywords)
    half = run(reptile_ext.distillation_loss, student[::2], teacher[::2], labels[::2], **keywords)
    torch.testing.assert_close(loss, half[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[::2], half[1], rtol=torch.finfo(dtype).eps, atol=0)
    assert (gradient[1::2] == 0).all()
    # A batch that is twice its own half: masking the copy leaves the mean where it was.
    twice = torch.cat([student, student]), torch.cat([teacher, teacher]), torch.cat([labels, labels * 0 - 100])
    once = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
    torch.testing.assert_close(reptile_ext.distillation_loss(*twice, **keywords), once[0], rtol=1e-6, atol=0)


@every_divergence
def test_bug_05_a_class_masked_on_both_sides_is_no_nan(each_set: str, divergence: str) -> None:
    """A class at −inf in both rows gave exp(−inf)·(−inf − −inf) = NaN, as F.kl_div with log_target does. It must count
    for nothing, in loss and gradient."""
    student, teacher = make_logits("random", 4, 30)
    labels, keywords = torch.tensor([9, 8, 7, 6]), keywords_of(divergence)
    right = run(reptile_ext.distillation_loss, student[:, 5:], teacher[:, 5:], labels - 5, **keywords)
    student[:, :5] = teacher[:, :5] = -INF
    if divergence in ("forward_kl", "reverse_kl", "jsd"):
        rival = run(plain, student, teacher, labels, **keywords)
        assert rival[0].isnan() or rival[1].isnan().any(), "plain PyTorch has the bug, so this input shows it"
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
    torch.testing.assert_close(loss, right[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient[:, 5:], right[1], rtol=1e-5, atol=1e-8)
    assert (gradient[:, :5] == 0).all()


@every_divergence
@pytest.mark.parametrize("depth", [80.0, 104.0, 150.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_06_log_probabilities_below_the_smallest_float(depth: float, dtype: torch.dtype, divergence: str) -> None:
    """Where both log-probabilities lie below about −104 their exponentials are 0 in float32 and the divergence became
    NaN, or, cancelling badly, negative. The classes must be as good as absent."""
    student, teacher = make_logits("random", 3, 40, torch.float64)
    student[:, 7:] -= depth
    teacher[:, 7:] -= depth
    student, teacher = student.to(dtype), teacher.to(dtype)
    labels, keywords = torch.tensor([0, 1, 2]), keywords_of(divergence)
    check(student, teacher, labels, sets=INSTRUCTION_SETS, **keywords)
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
    assert loss > 0
    assert gradient.isfinite().all()
    if depth > 104 and dtype != torch.float64 and divergence != "mse":
        assert (gradient[:, 7:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_06_jsd_is_not_negative_and_does_not_jump_at_its_limits(dtype: torch.dtype) -> None:
    """The Jensen-Shannon divergence of bfloat16 logits came out negative; and a generalised one jumped as β went to 0
    or 1, where it tends to 0, and divided by β (1−β) to forward and reverse KL."""
    student, teacher = make_logits("near_equal", 64, 700, dtype)
    for beta in (0.5, 0.1, 1e-3, 1e-6):
        assert (
            reptile_ext.distillation_loss(student, teacher, divergence="jsd", beta=beta, reduction="none") >= 0
        ).all()
    student, teacher = make_logits("random", 8, 700, dtype)

    def of(divergence: str, beta: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        return run(reptile_ext.distillation_loss, student, teacher, divergence=divergence, beta=beta)

    rounding = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 1e-4}
    for beta, limit in ((1e-9, "forward_kl"), (1 - 1e-9, "reverse_kl")):
        torch.testing.assert_close(of("scaled_jsd", beta), of(limit), **rounding)
    for beta in (1e-9, 1 - 1e-9):
        assert of("jsd", beta)[0] < 1e-6


@every_divergence
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_bug_07_16_bit_logits_are_widened_first(dtype: torch.dtype, divergence: str) -> None:
    """Logits were divided by the temperature, or exponentiated, in bfloat16 before the cast to float32: gradients 4 to
    23 % wrong, unnoticed because the test's oracle did the same. The oracle here is float64 from the logits on, and
    would reject that program."""
    student, teacher = make_logits("random", 4, 1000, dtype)
    labels = labels_of(divergence, 4, 1000)
    check(student, teacher, labels, sets=INSTRUCTION_SETS, temperature=3.0, **keywords_of(divergence))
    if divergence != "forward_kl":
        return

    def rounds_too_early(s: torch.Tensor, t: torch.Tensor, *_: Any, temperature: float) -> torch.Tensor:
        x, y = F.log_softmax((s / temperature).float(), -1), F.log_softmax((t / temperature).float(), -1)
        return temperature**2 * F.kl_div(x, y, reduction="batchmean", log_target=True)

    wrong = run(rounds_too_early, student, teacher, temperature=3.0)
    with pytest.raises(AssertionError, match="our error"):
        assert_near({"": wrong}, student, teacher, temperature=3.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_08_tvd_pulls_nowhere_where_p_is_q(each_set: str, dtype: torch.dtype) -> None:
    """The total variation's gradient at p = q was that of p < q, so equal models moved. The subgradient there is 0: in
    rows that are equal, and in single classes of rows that are not."""
    student, teacher = make_logits("random", 4, 1000, dtype)
    student[:2] = teacher[:2]
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, divergence="tvd", reduction="none")
    assert (loss[:2] == 0).all()
    assert (gradient[:2] == 0).all()
    assert gradient[2:].any(-1).all()
    # Two classes exchanged and the others equal: the equal ones are pulled by nothing but the normaliser.
    teacher = torch.tensor([[1.0, 2.0, 0.5, 0.25]], dtype=dtype)
    student = teacher[:, [1, 0, 2, 3]]
    _, gradient = run(reptile_ext.distillation_loss, student, teacher, divergence="tvd")
    q = student.double().softmax(-1)
    sign = torch.tensor([[1.0, -1.0, 0.0, 0.0]])
    wanted = 0.5 * q * (sign - (q * sign).sum())
    torch.testing.assert_close(gradient.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_09_row_losses_pass_on_a_gradient_of_their_own(dtype: torch.dtype, divergence: str) -> None:
    """reduction="none" gave gradients that ignored what came from above, or none at all. Each row's must be its own
    gradient times its own factor; a row with factor 0 gets 0."""
    student, teacher = make_logits("random", (3, 4), 33, dtype)
    labels = make_labels((3, 4), 33)
    grad_output = torch.tensor([[1.0, -2.0, 0.0, 0.5], [3.0, 1e-3, -1.0, 1.0], [0.0, 7.0, 1.0, 100.0]])
    keywords = {"reduction": "none", "hard_weight": 0.5, **keywords_of(divergence)}
    found = run(reptile_ext.distillation_loss, student, teacher, labels, grad_output=grad_output, **keywords)
    assert_near({"": found}, student, teacher, labels, grad_output=grad_output, **keywords)
    assert (found[1][grad_output == 0] == 0).all()
    assert found[1][grad_output * (labels >= 0) != 0].any(-1).all()
    # The rows' mean, taken by hand, is reduction="mean".
    leaf = student.clone().requires_grad_()
    losses = reptile_ext.distillation_loss(leaf, teacher, labels, **keywords)
    (losses.sum() / (labels >= 0).sum()).backward()
    whole = run(reptile_ext.distillation_loss, student, teacher, labels, **{**keywords, "reduction": "mean"})
    torch.testing.assert_close(leaf.grad, whole[1], rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@every_divergence
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_bug_10_micro_batches_are_divided_by_the_global_count(
    dtype: torch.dtype, as_tensor: bool, divergence: str
) -> None:
    """With gradient accumulation every micro-batch was divided by its own number of tokens, so that tokens of short
    micro-batches weighed more. With `denominator` the micro-batches add up to the whole batch."""
    student, teacher = make_logits("random", (6, 5), 33, dtype)
    labels = make_labels((6, 5), 33)
    labels[0], labels[1, 1:] = -100, -100  # micro-batches of very different sizes
    keywords = {"hard_weight": 0.5, **keywords_of(divergence)}
    loss, gradient = run(reptile_ext.distillation_loss, student, teacher, labels, **keywords)
    count = (labels != -100).sum()
    denominator = count if as_tensor else count.item()
    leaf = student.clone().requires_grad_()
    total = torch.zeros((), dtype=loss.dtype)
    naive = torch.zeros((), dtype=loss.dtype)
    for i in range(0, 6, 2):
        part = slice(i, i + 2)
        micro = reptile_ext.distillation_loss(
            leaf[part], teacher[part], labels[part], **keywords, denominator=denominator
        )
        micro.backward()
        total += micro.detach()
        naive += reptile_ext.distillation_loss(student[part], teacher[part], labels[part], **keywords) / 3
    torch.testing.assert_close(total, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(leaf.grad, gradient, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)
    assert (naive - loss).abs() > 0.01 * loss, "per-micro-batch means are another objective, so this input shows it"


@every_divergence
def test_bug_11_ignored_rows_under_torch_compile(divergence: str) -> None:
    """Compiled, the loss was corrupted at ignored rows. NaN in their logits must not reach anything, and the compiled
    loss and gradient must be those of eager."""
    torch.compiler.reset()
    student, teacher = make_logits("random", 6, 40)
    labels = make_labels(6, 40)
    student[labels == -100] = torch.nan
    teacher[labels == -100] = INF

    def f(s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return reptile_ext.distillation_loss(s * 2, t, labels, hard_weight=0.5, **keywords_of(divergence))

    right = run(f, student, teacher, labels)
    found = run(torch.compile(f, backend="inductor", fullgraph=True), student, teacher, labels)
    torch.testing.assert_close(found, right)
    assert found[0].isfinite()
    assert (found[1][labels == -100] == 0).all()
    assert found[1][labels != -100].isfinite().all()


@pytest.mark.parametrize(
    "keywords",
    [
        {"temperature": 4.0},
        {"temperature": (2.0, 5.0), "temperature_scaling": "none"},
        {"temperature": 2.0, "hard_weight": 0.3, "soft_weight": 0.7, "label_smoothing": 0.1},
        {"soft_weight": 0.0, "hard_weight": 1.0},
        {"reduction": "sum", "vocab": "truncate"},
    ],
    ids=str,
)
def test_bug_12_every_path_has_the_same_objective(keywords: dict[str, Any]) -> None:
    """Switching the fast path on dropped the T² or mixed in a cross entropy. Kernel, traced operator, torch.func's
    fallback, the module and the reference must agree in value and gradient, default arguments included."""
    student, teacher = make_logits("random", 6, 40)
    if "vocab" in keywords:
        teacher = teacher[:, :33]
    labels = make_labels(6, 33)
    torch.compiler.reset()

    def functional(s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, **keywords: Any) -> torch.Tensor:
        return reptile_ext.distillation_loss(s, t, labels, **keywords)

    right = run(reference.distillation_loss, student, teacher, labels, **keywords)
    close = {"rtol": 1e-5, "atol": 1e-6}
    for path in (
        reptile_ext.distillation_loss,
        reptile_ext.DistillationLoss(**keywords),
        torch.compile(functional, backend="inductor", fullgraph=True),
    ):
        options = {} if isinstance(path, torch.nn.Module) else keywords
        torch.testing.assert_close(run(path, student, teacher, labels, **options), right, **close)
    transformed = torch.func.grad_and_value(lambda s: functional(s, teacher, labels, **keywords))(student)
    torch.testing.assert_close((transformed[1], transformed[0]), right, **close)


def test_bug_12_nothing_but_what_was_asked_for() -> None:
    """Labels alone mix nothing in: they only say which rows are in."""
    student, teacher = make_logits("random", 6, 40, torch.float64)
    labels = torch.arange(6)
    for loss_fn in (reptile_ext.distillation_loss, exact):
        with_labels = run(loss_fn, student, teacher, labels, temperature=2.0)
        without = run(loss_fn, student, teacher, temperature=2.0)
        torch.testing.assert_close(with_labels, without, rtol=0, atol=0)
        right = 4 * F.kl_div((student / 2).log_softmax(-1), (teacher / 2).softmax(-1), reduction="batchmean")
        torch.testing.assert_close(with_labels[0], right)


@every_divergence
@pytest.mark.parametrize("learns", ["nobody", "student", "teacher"])
def test_bug_15_no_gradient_is_computed_for_what_is_frozen(
    learns: str, divergence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients were computed, and memory taken, for frozen parts. Every gradient that the operator computes must be
    one that somebody asked for."""
    computed: list[torch.Size] = []
    operator = ops.distillation_loss

    def counted(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        loss, gradient = operator(*arguments)
        if gradient.numel():
            computed.append(gradient.shape)
        return loss, gradient

    monkeypatch.setattr(ops, "distillation_loss", counted)
    student, teacher = make_logits("random", 4, 40)
    student, teacher = student.requires_grad_(learns == "student"), teacher[:, :30].requires_grad_(learns == "teacher")
    keywords = {"vocab": "truncate", **keywords_of(divergence)}
    loss = reptile_ext.distillation_loss(student, teacher, make_labels(4, 30), **keywords)
    if loss.requires_grad:
        loss.backward()
    assert computed == {"nobody": [], "student": [(4, 40)], "teacher": [(4, 30)]}[learns]


@every_divergence
def test_bug_16_a_cut_vocabulary_does_not_make_the_loss_negative(divergence: str) -> None:
    """Over a part of the classes, without normalising over it, a "KL" goes below 0 unnoticed. Cut by vocab="truncate",
    both sides are normalised over the classes they share."""
    student, teacher = make_logits("random", 64, 400)
    labels, keywords = labels_of(divergence, 64, 30), {"reduction": "none", "vocab": "truncate"}
    p, q = teacher.softmax(-1)[:, :30], student.softmax(-1)[:, :30]
    assert ((p * (p / q).log()).sum(-1) < 0).any(), "not normalised, it is negative, so this input shows it"
    loss = reptile_ext.distillation_loss(student[:, :30], teacher, labels, **keywords, **keywords_of(divergence))
    assert (loss >= 0).all()


@every_divergence
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(("ours", "theirs"), [(151_936, 152_064), (152_064, 151_936)])
def test_bug_17_vocabularies_of_different_padding(ours: int, theirs: int, dtype: torch.dtype, divergence: str) -> None:
    """151,936 against 152,064 classes, two paddings of one tokenizer, was an error in most libraries. Here it is one
    that says how to go on; and the loss is that of the classes they share."""
    student, teacher = make_logits("random", 2, 152_064, dtype)
    student, teacher = student[:, :ours], teacher[:, :theirs]
    labels, keywords = torch.tensor([5, 151_935]), keywords_of(divergence)
    with pytest.raises(ValueError, match=rf"teacher_logits has {theirs} classes and student_logits has {ours}"):
        reptile_ext.distillation_loss(student, teacher, labels, **keywords)
    check(student, teacher, labels, vocab="truncate", **keywords)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_bug_20_jsd_of_distributions_without_a_common_class(each_set: str, dtype: torch.dtype) -> None:
    """An AVX-512 Jensen-Shannon kernel gave 0 for disjoint distributions, and no test drew a probability of 0. It is
    log 2 there: for classes that are masked, and for those whose probability underflows."""
    for far in (-INF, -300.0 if dtype != torch.float64 else -2000.0):
        student, teacher = make_logits("random", 3, 100, dtype)
        student[:, ::2] = far
        teacher[:, 1::2] = far
        loss, gradient = run(reptile_ext.distillation_loss, student, teacher, divergence="jsd", reduction="none")
        torch.testing.assert_close(loss.double(), torch.full((3,), 2.0).double().log(), rtol=1e-6, atol=0)
        assert gradient.isfinite().all()
