"""What others compute, wherever they define it as we do: `distillation_loss` against their losses and gradients.

The definitions part in a few places. Each test says where, and maps the arguments:

    T²                   we multiply by T_s·T_t unless temperature_scaling="none"; most others do not
    what a mean is over  ours: the rows that count; others: the first dimension, all elements, or the rows
    whose share β is     of our mixtures: the teacher's (the first argument's); of symmetric_kl: that of reverse KL
    β = 0 and β = 1      forward and reverse KL: our scaled_jsd goes there continuously; theirs jumps there from jsd,
                         whose own limits are 0

How near, in the units of oracle.py, class by class. In float64 the two agree to its ε; a peer that computes in float32
whatever it is given can agree to float32's only. In float32 our error is at most theirs plus ε.
Logits are random and moderately peaked: where others overflow, cancel or are known to be wrong, nothing is compared.

Peers that are not installed are skipped. CONTRIBUTING.md says how to get them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import EPSILON, INSTRUCTION_SETS, error, make_labels, make_logits, pair, run, sizes
from torch import Tensor

from reptile_ext import distillation_loss, ops

EXTRA = "needs the extra `peers`: pip install '.[test,peers]'"
BARE = "needs more than the extra `peers`: pip install --no-deps torchdistill==1.1.5 torchtune==0.6.1"
VOCAB_SIZE = 517  # full vectors and a remainder on every instruction set


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors this small gain nothing by threads. conftest.py puts their number back."""
    torch.set_num_threads(1)


def logits(kind: str, rows: int | tuple[int, ...] = 6) -> tuple[Tensor, Tensor]:
    """Student and teacher [..., V], the same numbers in float32 and float64. "peaked": in every row one class has about
    0.95 of the probability, in every other row the same class on both sides."""
    student, teacher = make_logits("random", rows, VOCAB_SIZE)
    if kind == "peaked":
        at = torch.arange(student[..., 0].numel()).view(*student.shape[:-1], 1)
        student.scatter_(-1, 5 * at, student.logsumexp(-1, keepdim=True) + 3)
        teacher.scatter_(-1, 5 * at + at % 2, teacher.logsumexp(-1, keepdim=True) + 3)
    return student, teacher


def compare(
    peer: Callable[[Tensor, Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    loss_in: torch.dtype = torch.float64,
    gradient_in: torch.dtype = torch.float64,
    **keywords: Any,
) -> None:
    """Asserts that the peer and `distillation_loss` with these keywords have one loss and one gradient, as the top of
    this file says. `loss_in`, `gradient_in`: the arithmetic in which the peer has them for float64 logits."""
    leading = student.movedim(keywords.get("dim", -1), -1).shape[:-1]
    grad_output = torch.full(leading if keywords.get("reduction") == "none" else (), -2.5, dtype=torch.float64)
    if grad_output.dim():  # what backward() gets: a number of its own for each row
        grad_output += torch.arange(grad_output.numel()).view(leading)
    before = ops.instruction_set()

    def both(dtype: torch.dtype) -> tuple[dict[str, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]]:
        s, t = student.to(dtype), teacher.to(dtype)
        ours = {}
        try:
            for name in INSTRUCTION_SETS:
                ops.instruction_set(name)
                ours[name] = run(distillation_loss, s, t, labels, grad_output=grad_output, **keywords)
        finally:
            ops.instruction_set(before)
        return ours, run(peer, s, t, grad_output=grad_output)

    ours64, theirs64 = both(torch.float64)
    ours32, theirs32 = both(torch.float32)
    right = ours64[before]
    loss_size, gradient_size, slack = sizes(student, teacher, labels, grad_output, right[0], keywords)
    for i, what, arithmetic, size in (
        (0, "loss", loss_in, (loss_size,)),
        (1, "gradient", gradient_in, (gradient_size, slack)),
    ):
        their_error = error(theirs32[i], right[i], *size)
        for name in INSTRUCTION_SETS:
            apart = error(theirs64[i], ours64[name][i], *size)
            assert apart <= EPSILON[arithmetic], f"{what} on {name}: {apart:.3g} apart in {arithmetic}"
            our_error = error(ours32[name][i], right[i], *size)
            assert our_error <= their_error + EPSILON[torch.float32], (
                f"{what} on {name}: our error {our_error:.3g} > theirs {their_error:.3g} + {EPSILON[torch.float32]:.3g}"
            )


SINGLE = {"loss_in": torch.float32, "gradient_in": torch.float32}
every_kind = pytest.mark.parametrize("kind", ["random", "peaked"])

# ---------------------------------------------------------------------------------------------------------- PyTorch


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """KL(a ‖ b). F.kl_div takes its arguments the other way round: the approximation first."""
    return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)


def mixture(log_a: Tensor, log_b: Tensor, beta: float) -> Tensor:
    """log(β a + (1−β) b)"""
    if beta in (0.0, 1.0):
        return log_a if beta else log_b
    return torch.logaddexp(log_a + math.log(beta), log_b + math.log1p(-beta))


def jsd(x: Tensor, y: Tensor, beta: float) -> Tensor:
    m = mixture(y, x, beta)
    return beta * kl(y, m) + (1 - beta) * kl(x, m)


# Divergence: its rows by functions of PyTorch, of T-scaled logits s and t and their log-probabilities x and y.
PYTORCH: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda s, t, x, y, beta: kl(y, x),
    "reverse_kl": lambda s, t, x, y, beta: kl(x, y),
    "symmetric_kl": lambda s, t, x, y, beta: torch.lerp(kl(y, x), kl(x, y), beta),
    "jsd": lambda s, t, x, y, beta: jsd(x, y, beta),
    "scaled_jsd": lambda s, t, x, y, beta: jsd(x, y, beta) / (beta * (1 - beta)),
    "skew_kl": lambda s, t, x, y, beta: kl(y, mixture(y, x, beta)),
    "skew_reverse_kl": lambda s, t, x, y, beta: kl(x, mixture(x, y, beta)),
    "tvd": lambda s, t, x, y, beta: 0.5 * F.l1_loss(x.exp(), y.exp(), reduction="none").sum(-1),
    "hellinger": lambda s, t, x, y, beta: 0.5 * F.mse_loss((x / 2).exp(), (y / 2).exp(), reduction="none").sum(-1),
    "soft_cross_entropy": lambda s, t, x, y, beta: F.cross_entropy(s, y.exp(), reduction="none"),
    "mse": lambda s, t, x, y, beta: F.mse_loss(s, t, reduction="none").mean(-1),
}
BETAS = {
    "symmetric_kl": (0.0, 0.3, 1.0),
    "jsd": (0.1, 0.5, 0.9),
    "scaled_jsd": (0.1, 0.5, 0.9),
    "skew_kl": (0.0, 0.1, 0.7),
    "skew_reverse_kl": (0.0, 0.1, 0.7),
}


@every_kind
@pytest.mark.parametrize(
    ("temperature", "scaling"), [(1.0, "t2"), (4.0, "t2"), (4.0, "none"), ((2.0, 0.7), "t2")], ids=str
)
@pytest.mark.parametrize(
    ("divergence", "beta"), [(name, beta) for name in PYTORCH for beta in BETAS.get(name, (None,))]
)
def test_pytorch(
    divergence: str, beta: float | None, temperature: float | tuple[float, float], scaling: str, kind: str
) -> None:
    """PyTorch's losses know no temperature: logits are divided, and the loss is multiplied by T_s·T_t, outside."""
    t_s, t_t = pair(temperature)

    def peer(student: Tensor, teacher: Tensor) -> Tensor:
        s, t = student / t_s, teacher / t_t
        rows = PYTORCH[divergence](s, t, s.log_softmax(-1), t.log_softmax(-1), beta)
        return rows * (t_s * t_t if scaling == "t2" else 1.0)

    keywords = {"temperature": temperature, "temperature_scaling": scaling, "reduction": "none"}
    compare(peer, *logits(kind), divergence=divergence, beta=beta, **keywords)


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_pytorch_kl_is_dkd_with_a_beta_of_its_own_in_every_row(temperature: float, kind: str) -> None:
    """Forward KL is TCKD + (1 − p_label) NCKD: what decoupled KD sets out to decouple (Zhao et al. 2022, eq. 7)."""
    student, teacher = logits(kind)
    labels = make_labels(len(student), VOCAB_SIZE).clamp(min=0)
    labels[0], labels[1] = student[0].argmax(), teacher[1].argmax()
    p = (teacher.double() / temperature).softmax(-1)
    of_others = p.scatter(-1, labels.unsqueeze(-1), 0.0).sum(-1)  # 1 − p_label would have lost digits

    def peer(s: Tensor, t: Tensor) -> Tensor:
        x, y = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        return temperature**2 * F.kl_div(x, y, reduction="batchmean", log_target=True)

    for i in range(len(student)):
        row = slice(i, i + 1)
        keywords = {"divergence": "dkd", "beta": of_others[i].item(), "temperature": temperature}
        compare(peer, student[row], teacher[row], labels[row], **keywords)


@every_kind
def test_pytorch_distributions(kind: str) -> None:
    """torch.distributions.kl_divergence has its arguments in the order of KL(a ‖ b)."""

    def forward(s: Tensor, t: Tensor) -> Tensor:
        a, b = (torch.distributions.Categorical(logits=z / 2, validate_args=False) for z in (t, s))
        return torch.distributions.kl_divergence(a, b).mean()

    keywords = {"temperature": 2.0, "temperature_scaling": "none"}
    compare(forward, *logits(kind), **keywords)
    compare(lambda s, t: forward(t, s), *logits(kind), divergence="reverse_kl", **keywords)


@every_kind
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 3])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_pytorch_cross_entropy(reduction: str, ignore_index: int, label_smoothing: float, kind: str) -> None:
    """The same mean: over the labels that are not ignored. No temperature in it, whatever that of the soft loss is."""
    student, teacher = logits(kind)
    labels = make_labels(len(student), VOCAB_SIZE)
    labels = torch.where(labels == -100, ignore_index, labels)
    keywords = {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}

    def peer(s: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(s, labels, **keywords)

    compare(peer, student, teacher, labels, soft_weight=0.0, hard_weight=1.0, temperature=3.0, **keywords)


@every_kind
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both:UserWarning")  # F.kl_div's
def test_pytorch_kl_div_of_images(reduction: str, kind: str) -> None:
    """[B, V, H, W]. F.kl_div's "batchmean" divides by B, not by the B·H·W rows, its "mean" by all B·V·H·W elements."""
    student, teacher = (z.movedim(-1, 1).contiguous() for z in logits(kind, (2, 3, 2)))

    def peer(s: Tensor, t: Tensor) -> Tensor:
        return F.kl_div(s.log_softmax(1), t.log_softmax(1), reduction=reduction, log_target=True)

    compare(peer, student, teacher, dim=1, denominator={"batchmean": 2, "mean": student.numel(), "sum": 1}[reduction])


# ----------------------------------------------------------------------------------------------------- torchmetrics


@every_kind
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_torchmetrics(reduction: str, kind: str) -> None:
    """kl_divergence(p, q) is KL(p ‖ q); jensen_shannon_divergence is jsd at β = ½. Means over the rows. The latter gets
    probabilities: of log-probabilities it subtracts log 2 in float32, also in float64."""
    metrics = pytest.importorskip("torchmetrics.functional.regression", reason="needs the extra `test`")

    def kl(s: Tensor, t: Tensor) -> Tensor:
        return metrics.kl_divergence(t.log_softmax(-1), s.log_softmax(-1), log_prob=True, reduction=reduction)

    def jsd(s: Tensor, t: Tensor) -> Tensor:
        return metrics.jensen_shannon_divergence(t.softmax(-1), s.softmax(-1), reduction=reduction)

    compare(kl, *logits(kind), reduction=reduction)
    compare(lambda s, t: kl(t, s), *logits(kind), divergence="reverse_kl", reduction=reduction)
    compare(jsd, *logits(kind), divergence="jsd", reduction=reduction)


# ----------------------------------------------------------------------------------------------------- Liger-Kernel


def their_jsd(beta: float) -> dict[str, Any]:
    """The keywords of what Liger and TRL call generalised JSD: m = β p + (1−β) q like ours, except that β = 0 and β = 1
    stand for forward and reverse KL, which are the limits of scaled_jsd."""
    return {"divergence": "jsd" if 0 < beta < 1 else "scaled_jsd", "beta": beta}


@pytest.fixture
def liger() -> Callable[..., Callable[[Tensor, Tensor], Tensor]]:
    """Liger's fused linear JSD with the identity for a head, so that the hidden states are the logits."""
    module = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss", reason=EXTRA)

    def make(labels: Tensor, soft: float = 1.0, hard: float = 0.0, **keywords: Any) -> Any:
        loss_fn = module.LigerFusedLinearJSDLoss(
            weight_soft_loss=soft, weight_hard_loss=hard, compiled=False, chunk_size=2, **keywords
        )

        def peer(s: Tensor, t: Tensor) -> Tensor:
            head = torch.eye(s.shape[-1], dtype=s.dtype)
            return loss_fn(s, head, t, head, labels)

        return peer

    return make


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_liger_jsd(liger: Any, beta: float, temperature: float, kind: str) -> None:
    """No T². The mean is over the labels that are not ignored, of the whole batch, however it is chunked. The chunks
    are summed in float32, whatever the logits are; their gradients stay in the logits' dtype."""
    student, teacher = logits(kind, 7)
    for ignore_index in (-100, 3):
        labels = make_labels(7, VOCAB_SIZE)
        labels = torch.where(labels == -100, ignore_index, labels)
        options = {"temperature": temperature, "ignore_index": ignore_index}
        common = {**options, "loss_in": torch.float32}
        compare(
            liger(labels, beta=beta, **options),
            student,
            teacher,
            labels,
            temperature_scaling="none",
            **common,
            **their_jsd(beta),
        )
        # T² can go into their weight; inside, scaled_jsd is theirs too, by a factor.
        peer = liger(labels, soft=0.7 * temperature**2, beta=beta, **options)
        factor = beta * (1 - beta) if 0 < beta < 1 else 1.0
        compare(peer, student, teacher, labels, divergence="scaled_jsd", beta=beta, soft_weight=0.7 * factor, **common)


@every_kind
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_liger_with_hard_labels(liger: Any, beta: float, kind: str) -> None:
    """The cross entropy is at temperature 1 and divided by the same count. It is in float32, float64 logits or not."""
    student, teacher = logits(kind, 7)
    labels = make_labels(7, VOCAB_SIZE)
    peer = liger(labels, soft=0.6, hard=0.3, beta=beta, temperature=2.0)
    keywords = {"temperature": 2.0, "temperature_scaling": "none", "soft_weight": 0.6, "hard_weight": 0.3}
    compare(peer, student, teacher, labels, **SINGLE, **keywords, **their_jsd(beta))


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_liger_heads(beta: float) -> None:
    """The gradients of hidden states, head and bias."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss", reason=EXTRA)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    leaves = [normal(7, 16), normal(VOCAB_SIZE, 16), normal(VOCAB_SIZE)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    teacher = normal(7, 24), normal(VOCAB_SIZE, 24) / 2, normal(VOCAB_SIZE)
    labels = make_labels(7, VOCAB_SIZE)
    loss_fn = chunked_loss.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=2.0, compiled=False, chunk_size=3
    )
    theirs = loss_fn(*leaves[:2], *teacher[:2], labels, leaves[2], teacher[2])
    ours = distillation_loss(
        F.linear(*leaves), F.linear(*teacher), labels, temperature=2.0, temperature_scaling="none", **their_jsd(beta)
    )
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-6, atol=0)
    found, right = torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves)
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-14)


def test_liger_with_every_label_ignored(liger: Any) -> None:
    """Both: a loss of 0 with a gradient of 0, not NaN."""
    student, teacher = logits("random", 7)
    labels = torch.full((7,), -100)
    ours = run(distillation_loss, student, teacher, labels, divergence="jsd", hard_weight=0.5)
    for found in (ours, run(liger(labels, hard=0.5), student, teacher)):
        assert found[0].item() == 0.0
        assert (found[1] == 0).all()


# -------------------------------------------------------------------------------------------------------------- TRL


@pytest.fixture(scope="module")
def trl_loss() -> Callable[..., Tensor]:
    return pytest.importorskip("trl.experimental.gkd.gkd_trainer", reason=EXTRA).GKDTrainer.generalized_jsd_loss


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl_jsd(trl_loss: Any, beta: float, temperature: float, kind: str) -> None:
    """No T². β is the teacher's share of the mixture, as ours. "batchmean" is over the labels that are not −100."""
    student, teacher = logits(kind, (2, 4))
    labels = make_labels((2, 4), VOCAB_SIZE)
    options = {"beta": beta, "temperature": temperature}

    def peer(s: Tensor, t: Tensor) -> Tensor:
        return trl_loss(s, t, labels, **options)

    keywords = {"temperature": temperature, "temperature_scaling": "none"}
    compare(peer, student, teacher, labels, **keywords, **their_jsd(beta))


@pytest.mark.parametrize("labelled", [False, True], ids=["", "labelled"])
@pytest.mark.parametrize("reduction", ["batchmean", "sum", "mean", "none"])
@pytest.mark.parametrize("beta", [0.0, 0.4])
def test_trl_reductions(trl_loss: Any, beta: float, reduction: str, labelled: bool) -> None:
    """Without labels "batchmean" divides by the first dimension, sequences and not tokens; "mean" always divides by
    elements, rows times classes; "none" leaves the classes unsummed, and drops the ignored rows."""
    student, teacher = logits("random", (2, 4))
    labels = make_labels((2, 4), VOCAB_SIZE) if labelled else None
    count = (labels != -100).sum().item() if labelled else 8

    def peer(s: Tensor, t: Tensor) -> Tensor:
        loss = trl_loss(s, t, labels, beta=beta, reduction=reduction)
        if reduction != "none":
            return loss
        rows = loss.sum(-1)
        return torch.zeros(2, 4, dtype=s.dtype).masked_scatter(labels != -100, rows) if labelled else rows

    denominator = {"batchmean": count if labelled else 2, "mean": count * VOCAB_SIZE, "sum": None, "none": None}
    compare(
        peer,
        student,
        teacher,
        labels,
        reduction=reduction if reduction in ("sum", "none") else "mean",
        denominator=denominator[reduction],
        **their_jsd(beta),
    )


@pytest.mark.parametrize("count", [23, torch.tensor(23)], ids=["number", "tensor"])
def test_trl_num_items_in_batch(trl_loss: Any, count: int | Tensor) -> None:
    """A count that is known globally only, for gradient accumulation: our denominator."""
    student, teacher = logits("random", (2, 4))
    labels = make_labels((2, 4), VOCAB_SIZE)

    def peer(s: Tensor, t: Tensor) -> Tensor:
        return trl_loss(s, t, labels, beta=0.4, num_items_in_batch=count)

    compare(peer, student, teacher, labels, divergence="jsd", beta=0.4, denominator=count)


@pytest.fixture
def trl_chunked() -> Callable[..., Tensor]:
    """TRL's other JSD, whose gradient is written by hand: a loss for each row. The identity for a head."""
    kernels = pytest.importorskip("trl.kernels.chunked_divergence", reason=EXTRA)

    def rows(s: Tensor, t: Tensor, *options: Any) -> Tensor:
        head = torch.eye(s.shape[-1], dtype=s.dtype)
        return kernels.ChunkedDivergenceFunction.apply(s, head, None, t, head, None, *options)[0]

    return rows


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_trl_chunked_jsd(trl_chunked: Any, beta: float, temperature: float, kind: str) -> None:
    """No T², and β as above; float32 whatever it is given."""

    def peer(s: Tensor, t: Tensor) -> Tensor:
        return trl_chunked(s, t, beta, temperature)

    keywords = {**SINGLE, "temperature": temperature, "temperature_scaling": "none", "reduction": "none"}
    compare(peer, *logits(kind), **keywords, **their_jsd(beta))


@every_kind
@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_trl_chunked_jsd_of_capped_logits(trl_chunked: Any, beta: float, kind: str) -> None:
    """Scale, softcap, temperature, in this order. Ours gets the first two, and their derivatives, by autograd."""

    def peer(s: Tensor, t: Tensor) -> Tensor:
        return trl_chunked(s, t, beta, 2.0, 0.5, 8.0, 0.8, 9.0).mean()

    def ours(s: Tensor, t: Tensor) -> Tensor:
        s, t = 8 * (0.5 * s / 8).tanh(), 9 * (0.8 * t / 9).tanh()
        return distillation_loss(s, t, temperature=2.0, temperature_scaling="none", **their_jsd(beta))

    student, teacher = logits(kind)
    theirs = run(peer, student, teacher)
    torch.testing.assert_close(run(ours, student, teacher), theirs, rtol=1e-4, atol=1e-8)


# ------------------------------------------------------------------------------- torchdistill, torchtune, MMRazor


def their_file(distribution: str, path: str, reason: str) -> ModuleType:
    """One module of a package that is installed but cannot be imported as a whole: it wants more than its losses do."""
    try:
        file = importlib.metadata.distribution(distribution).locate_file(path)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(reason)
    spec = importlib.util.spec_from_file_location(f"{distribution}_{Path(path).stem}", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [None, 0.3])
def test_torchdistill_kd(alpha: float | None, temperature: float, kind: str) -> None:
    """α·CE + (1 − α)·T²·KL, each a mean over the rows. Without α there is no CE, and no T² either."""
    losses = pytest.importorskip("torchdistill.losses.mid_level", reason=BARE)
    student, teacher = logits(kind)
    labels = make_labels(len(student), VOCAB_SIZE).clamp(min=0)
    beta = 1.0 if alpha is None else None
    loss_fn = losses.KDLoss("s", "output", "t", "output", temperature=temperature, alpha=alpha, beta=beta)

    def peer(s: Tensor, t: Tensor) -> Tensor:
        return loss_fn({"s": {"output": s}}, {"t": {"output": t}}, labels)

    weights = {"temperature_scaling": "none"} if alpha is None else {"soft_weight": 1 - alpha, "hard_weight": alpha}
    compare(peer, student, teacher, labels, temperature=temperature, **weights)


@every_kind
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_torchtune(ratio: float, kind: str) -> None:
    """Its forward KL leaves the teacher's entropy out: our soft_cross_entropy. Its symmetric KL is made of that, and
    `sym_kd_ratio` is the forward KL's share: our 1 − β. The mean is over the labels that are not ignored; no
    temperature; float32 whatever it is given."""
    theirs = their_file("torchtune", "torchtune/modules/loss/kd_losses.py", BARE)
    student, teacher = logits(kind, 7)
    labels = make_labels(7, VOCAB_SIZE)

    def peer(loss_fn: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda s, t: loss_fn(s, t, labels)

    compare(peer(theirs.ForwardKLLoss()), student, teacher, labels, divergence="soft_cross_entropy", **SINGLE)
    compare(peer(theirs.ReverseKLLoss()), student, teacher, labels, divergence="reverse_kl", **SINGLE)

    symmetric = theirs.SymmetricKLLoss(sym_kd_ratio=ratio)
    y = teacher[labels != -100].log_softmax(-1)
    entropy = -(y.exp() * y).sum(-1).mean()

    def with_entropy(s: Tensor, t: Tensor) -> Tensor:
        return symmetric(s, t, labels) - ratio * entropy

    compare(with_entropy, student, teacher, labels, divergence="symmetric_kl", beta=1 - ratio, **SINGLE)


@pytest.fixture
def mmrazor(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Files of MMRazor, for which a registry stands in: the package would want MMCV, compiled."""
    registry = ModuleType("mmrazor.registry")
    registry.MODELS = SimpleNamespace(register_module=lambda: lambda cls: cls)
    monkeypatch.setitem(sys.modules, "mmrazor", ModuleType("mmrazor"))
    monkeypatch.setitem(sys.modules, "mmrazor.registry", registry)
    return lambda name: their_file("mmrazor", f"mmrazor/models/losses/{name}.py", EXTRA)


@every_kind
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 8.0), (1.0, 0.0), (0.5, 2.0)])
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")  # theirs
def test_mmrazor_dkd(mmrazor: Any, alpha: float, beta: float, temperature: float, kind: str) -> None:
    """α·TCKD + β·NCKD, with T²: ours with a β of β/α, α times. A mean over the rows. No label is ignored."""
    student, teacher = logits(kind)
    labels = make_labels(len(student), VOCAB_SIZE).clamp(min=0)
    labels[0], labels[1] = student[0].argmax(), teacher[1].argmax()
    loss_fn = mmrazor("decoupled_kd").DKDLoss(tau=temperature, alpha=alpha, beta=beta)

    def peer(s: Tensor, t: Tensor) -> Tensor:
        return loss_fn(s, t, labels)

    keywords = {"beta": beta / alpha, "soft_weight": alpha, "temperature": temperature}
    compare(peer, student, teacher, labels, divergence="dkd", **keywords)


@every_kind
@pytest.mark.parametrize("reduction", ["batchmean", "mean", "sum"])
@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss by both:UserWarning")  # F.kl_div's
def test_mmrazor_kl(mmrazor: Any, reduction: str, kind: str) -> None:
    """T² as we have it; [B, V, H, W], of which "batchmean" divides by B and "mean" by all elements."""
    student, teacher = (z.movedim(-1, 1).contiguous() for z in logits(kind, (2, 3, 2)))
    loss_fn = mmrazor("kl_divergence").KLDivergence(tau=4.0, reduction=reduction, loss_weight=0.5)
    denominator = {"batchmean": 2, "mean": student.numel(), "sum": 1}[reduction]
    compare(loss_fn, student, teacher, dim=1, temperature=4.0, soft_weight=0.5, denominator=denominator)
