"""What the processes of test_vocabulary_parallel.py run: a module of its own, so that a spawned process can import it.

Each function takes a rank and the number of processes, and returns what the test compares, in lists and numbers.
"""

from __future__ import annotations

import datetime
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from oracle import DTYPES, keywords_of, make_labels, make_logits
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils.checkpoint import checkpoint

import reptile_ext
from reptile_ext.options import DIVERGENCE_TABLE, DIVERGENCES, TAILS

ROWS = 7
SPARSE_CASES = [(tail, name) for tail in TAILS for name in DIVERGENCES if tail in DIVERGENCE_TABLE[name].tails]


def main(rank: int, port: int, world_size: int, name: str, results: Any) -> None:
    """Puts (rank, what `left_alone` returns) into `results`, or what each function of `TOGETHER` does, by name; in its
    place the traceback of its error."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=10 if name == "left_alone" else 120),
        )
        if name == "left_alone":
            results.put((rank, left_alone(rank, world_size)))
            return
        found: dict[str, Any] = {}
        for function in TOGETHER:  # to start processes takes longer than all of these
            try:
                found[function.__name__] = function(rank, world_size)
            except Exception:
                found[function.__name__] = traceback.format_exc()
        results.put((rank, found))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, traceback.format_exc()))


class Case(NamedTuple):
    """Logits, and where the ranges of the processes end; `keywords` are the loss's."""

    student: Tensor
    teacher: Tensor
    labels: Tensor
    ends: list[int]
    keywords: dict[str, Any]


# Ranges of uneven sizes, one of them of a single class and one of none.
ENDS = {37: {2: [20, 37], 3: [5, 6, 37]}, 600: {2: [599, 600], 3: [0, 511, 600]}}
_KEYWORDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 2.0, "hard_weight": 0.5},
    {"temperature": (1.5, 3.0), "hard_weight": 0.3, "label_smoothing": 0.2, "reduction": "none"},
    {"weight": True, "hard_weight": 0.7, "soft_weight": 0.0},
    {"weight": True, "denominator": 7.0, "hard_weight": 1.0, "label_smoothing": 1.0, "temperature_scaling": "none"},
    {"reduction": "sum", "ignore_index": 3, "hard_weight": 0.5},
)
_KINDS = ("random", "near_equal", "peaked", "late_peak", "flat")


def cases(world_size: int) -> Iterator[Case]:
    """Every divergence with every set of keywords; dtypes, sizes and kinds of logits take turns."""
    number = 0
    for divergence in DIVERGENCES:
        for keywords in _KEYWORDS:
            number += 1
            dtype, kind = DTYPES[number % len(DTYPES)], _KINDS[number % len(_KINDS)]
            vocab_size = tuple(ENDS)[number % len(ENDS)]
            student, teacher = make_logits(kind, ROWS, vocab_size, dtype, seed=number)
            labels = make_labels(ROWS, vocab_size, seed=number)
            labels[0] = 3  # of whoever holds it, if it counts at all
            labels[labels == -100] = keywords.get("ignore_index", -100)
            keywords = {**keywords_of(divergence), **keywords}
            if keywords.get("weight"):
                keywords["weight"] = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 3.0])
            yield Case(student, teacher, labels, ENDS[vocab_size][world_size], keywords)


def part(logits: Tensor, ends: list[int], rank: int, dim: int = -1) -> Tensor:
    """A process's own classes, as a leaf."""
    first = ends[rank - 1] if rank else 0
    return logits.narrow(dim, first, ends[rank] - first).detach().clone().requires_grad_()


def numbers(x: Tensor) -> Any:
    return x.detach().to(torch.float64).tolist()


def equals(rank: int, world_size: int) -> list[Any]:
    """Loss and student's gradient of every case."""
    found = []
    for case in cases(world_size):
        student, teacher = part(case.student, case.ends, rank), part(case.teacher, case.ends, rank).detach()
        loss = reptile_ext.distillation_loss(student, teacher, case.labels, group=dist.group.WORLD, **case.keywords)
        loss.sum().backward()
        assert student.grad is not None
        assert student.grad.dtype == student.dtype
        found.append((str(loss.dtype), numbers(loss), numbers(student.grad)))
    return found


def trainable_teacher(rank: int, world_size: int) -> list[Any]:
    """Loss, both gradients, and those of a function of the gradients: mutual learning, and a gradient penalty."""
    found = []
    for divergence in DIVERGENCES:
        student, teacher = make_logits("random", 4, 37, torch.float64)
        ends = ENDS[37][world_size]
        of = part(student, ends, rank), part(teacher, ends, rank)
        keywords = {**keywords_of(divergence), "temperature": (1.5, 2.0), "hard_weight": 0.5}
        loss = reptile_ext.distillation_loss(*of, make_labels(4, 37), group=dist.group.WORLD, **keywords)
        first = torch.autograd.grad(3 * loss, of, retain_graph=True)
        again = torch.autograd.grad(3 * loss, of, create_graph=True)
        # A sum over all classes, of which each process adds those it holds: so is the gradient of it.
        penalty = sum(g.square().sum() for g in again)
        second = torch.autograd.grad(penalty, of)
        found.append([numbers(loss), *map(numbers, (*first, *again, *second))])
    return found


def edges(rank: int, world_size: int) -> dict[str, Any]:
    """What the losses promise at the edges, with classes of several processes."""
    ends = ENDS[37][world_size]
    found: dict[str, Any] = {}

    def run(name: str, student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any) -> None:
        of = part(student, ends, rank), part(teacher, ends, rank).detach()
        loss = reptile_ext.distillation_loss(*of, labels, group=dist.group.WORLD, **keywords)
        (gradient,) = torch.autograd.grad(loss.sum(), of[0])
        found[name] = numbers(loss), numbers(gradient)

    for divergence in DIVERGENCES:
        keywords = {**keywords_of(divergence), "reduction": "none"}
        labels = make_labels(ROWS, 37)
        student, teacher = make_logits("random", ROWS, 37)
        run(f"equal {divergence}", student, student, labels, **keywords)
        student[:, 4:9] = teacher[:, 4:9] = -torch.inf
        labels[labels == 4] = 0
        run(f"masked {divergence}", student, teacher, torch.where((labels >= 4) & (labels < 9), 0, labels), **keywords)
        student[2, 36], teacher[5, 0] = torch.nan, torch.inf
        run(f"broken {divergence}", student, teacher, labels.fill_(10), **keywords)
        student, teacher = make_logits("random", ROWS, 37)
        student[1] = torch.nan
        labels[:] = -100
        run(f"ignored {divergence}", student, teacher, labels, **keywords | {"reduction": "mean"})
    student, teacher = make_logits("random", ROWS, 37)
    student[3, 30] = -torch.inf
    run("infinite", student, teacher, reduction="none")
    return found


def ways(rank: int, world_size: int) -> dict[str, Any]:
    """In place, without gradients, under checkpoint, another class dimension, more classes of one, as a module."""
    ends, group = ENDS[37][world_size], dist.group.WORLD
    student, teacher = make_logits("random", 6, 37)
    labels = make_labels(6, 37)
    of = {"labels": labels, "hard_weight": 0.5, "temperature": 2.0, "group": group}
    t = part(teacher, ends, rank).detach()
    found: dict[str, Any] = {}

    leaf = part(student, ends, rank)
    logits = leaf * 1.0
    loss = reptile_ext.distillation_loss(logits, t, inplace=True, **of)
    loss.backward()
    found["inplace"] = numbers(loss), numbers(leaf.grad)
    found["overwritten"] = numbers(logits)

    leaf = part(student, ends, rank)
    loss = checkpoint(lambda x: reptile_ext.distillation_loss(x * 1.0, t, **of), leaf, use_reentrant=False)
    loss.backward()
    found["checkpoint"] = numbers(loss), numbers(leaf.grad)

    leaf = part(student, ends, rank)
    with torch.no_grad():
        found["no_grad"] = numbers(reptile_ext.distillation_loss(leaf, t, **of)), None

    images = [x.view(2, 3, 37).transpose(1, 2).contiguous() for x in (student, teacher)]
    leaf = part(images[0], ends, rank, dim=1)
    of["labels"] = labels.view(2, 3)
    loss = reptile_ext.distillation_loss(leaf, part(images[1], ends, rank, dim=1).detach(), dim=1, **of)
    loss.backward()
    assert leaf.grad is not None
    found["dim"] = numbers(loss), numbers(leaf.grad.transpose(1, 2).reshape(6, -1))

    of["labels"] = labels % 33
    leaf = part(student[:, :33], [*ends[:-1], 33], rank)
    loss = reptile_ext.distillation_loss(leaf, t, vocab="truncate", **of)
    loss.backward()
    found["truncate"] = numbers(loss), numbers(leaf.grad)

    criterion = reptile_ext.DistillationLoss(hard_weight=0.5, temperature=2.0, group=group)
    leaf = part(student, ends, rank)
    loss = criterion(leaf, t, labels)
    loss.backward()
    found["module"] = numbers(loss), numbers(leaf.grad)
    return found


def training(rank: int, world_size: int) -> Any:
    """A head whose classes are sharded, trained for some steps: its weights afterwards, and those of the body, whose
    gradient is the sum over the processes, as a column-parallel layer has it."""
    torch.manual_seed(0)
    body, head = torch.nn.Linear(5, 8, dtype=torch.float64), torch.randn(37, 8, dtype=torch.float64)
    inputs, teacher = torch.randn(9, 5, dtype=torch.float64), 3 * torch.randn(9, 37, dtype=torch.float64)
    ends = ENDS[37][world_size] if world_size > 1 else [37]
    own = part(head, ends, rank, dim=0)
    group = dist.group.WORLD if world_size > 1 else None
    optimizer = torch.optim.SGD([*body.parameters(), own], lr=0.5)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = reptile_ext.distillation_loss(
            body(inputs) @ own.t(), part(teacher, ends, rank).detach(), temperature=2.0, group=group
        )
        loss.backward()
        if world_size > 1:
            for p in body.parameters():
                dist.all_reduce(p.grad)
        optimizer.step()
        losses.append(loss.item())
    return losses, numbers(own), [numbers(p) for p in body.parameters()]


_OTHER_COLLECTIVES = ("all_to_all", "broadcast", "reduce_scatter_tensor", "gather", "all_gather_object", "send")


def communication(rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """Bytes that this process gives to collectives, forward and backward, by rows and classes."""
    given = 0

    def counting(collective: Callable[..., Any], which: int) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal given
            given += arguments[which].numel() * arguments[which].element_size()
            return collective(*arguments, **keywords)

        return call

    before = {name: getattr(dist, name) for name in ("all_reduce", "all_gather", *_OTHER_COLLECTIVES)}
    dist.all_reduce, dist.all_gather = counting(dist.all_reduce, 0), counting(dist.all_gather, 1)
    for name in _OTHER_COLLECTIVES:
        setattr(dist, name, None)  # would fail if it was called
    found = []
    torch.manual_seed(rank)
    for rows, vocab_size in ((10, 60), (10, 6000), (1000, 60)):
        for divergence in DIVERGENCES:
            given = 0
            student, teacher = torch.randn(rows, vocab_size), torch.randn(rows, vocab_size)
            labels = torch.zeros(rows, dtype=torch.int64)
            loss = reptile_ext.distillation_loss(
                student.requires_grad_(),
                teacher,
                labels,
                divergence=divergence,
                hard_weight=0.5,
                group=dist.group.WORLD,
            )
            loss.backward()
            found.append((rows, vocab_size, given))
    for name, collective in before.items():
        setattr(dist, name, collective)
    return found


def dtensors(rank: int, world_size: int) -> dict[str, Any]:
    """Logits that are DTensors say their group themselves, or what to do with them is said."""
    mesh = init_device_mesh("cpu", (world_size,))
    student, teacher = make_logits("random", 6, 37)
    labels = make_labels(6, 37)
    found: dict[str, Any] = {}

    def distributed(x: Tensor, placement: Any) -> DTensor:
        local = x
        if placement.is_shard():
            chunks = x.chunk(world_size, placement.dim)
            local = chunks[rank] if rank < len(chunks) else x.narrow(placement.dim, 0, 0)
        return DTensor.from_local(local.contiguous(), mesh, [placement], shape=x.shape, stride=x.stride())

    def run(name: str, s: Any, t: Any, *rows: Any, **keywords: Any) -> None:
        if isinstance(s, Tensor) and s.is_leaf:
            s = s.detach().requires_grad_()
        try:
            loss = reptile_ext.distillation_loss(s, t, *rows, hard_weight=0.5, **keywords)
            loss.backward()
            assert type(loss) is Tensor
            gradient = s.grad.full_tensor() if isinstance(s.grad, DTensor) else s.grad
            placements = str(s.grad.placements) if isinstance(s.grad, DTensor) else ""
            found[name] = numbers(loss), numbers(gradient), placements
        except (TypeError, ValueError) as error:
            found[name] = str(error)

    for name, dim, view in (("classes", -1, (6, 37)), ("classes of images", 1, (2, 37, 3))):
        s, t = (x if dim == -1 else x.view(2, 3, 37).transpose(1, 2).contiguous() for x in (student, teacher))
        at = labels if dim == -1 else labels.view(2, 3)
        assert s.shape == view
        over_classes = Shard(dim % s.ndim)
        run(name, distributed(s, over_classes), distributed(t, over_classes), at, dim=dim)
    run("replicated", distributed(student, Replicate()), distributed(teacher, Replicate()), labels)
    run("one replicated", distributed(student, Replicate()), teacher, labels)
    run(
        "replicated labels",
        distributed(student, Shard(1)),
        distributed(teacher, Shard(1)),
        distributed(labels, Replicate()),
    )
    run("rows", distributed(student, Shard(0)), distributed(teacher, Shard(0)), labels)
    run("sharded labels", distributed(student, Shard(1)), distributed(teacher, Shard(1)), distributed(labels, Shard(0)))
    run("partial", DTensor.from_local(student, mesh, [Partial()]), distributed(teacher, Shard(1)), labels)
    run("teacher plain", distributed(student, Shard(1)), teacher, labels)
    run("student plain", student, distributed(teacher, Shard(1)), labels)
    run("teacher over rows", distributed(student, Shard(1)), distributed(teacher, Shard(0)), labels)
    run("group too", distributed(student, Shard(1)), distributed(teacher, Shard(1)), labels, group=dist.group.WORLD)
    few = [distributed(x[:, : world_size - 1], Shard(1)) for x in (student, teacher)]  # a process has none
    run("few classes", *few, labels.clamp(max=0))
    return found


def refused(rank: int, world_size: int) -> dict[str, str]:
    """What the processes are told when they are not called alike. Each of them is: nobody waits."""
    ends, group = ENDS[37][world_size], dist.group.WORLD
    student, teacher = make_logits("random", 4, 37)
    labels = make_labels(4, 37).clamp(min=0)
    s, t = part(student, ends, rank), part(teacher, ends, rank).detach()
    found: dict[str, str] = {}

    def run(name: str, *arguments: Any, **keywords: Any) -> None:
        try:
            reptile_ext.distillation_loss(*arguments, **keywords)
            found[name] = "no error"
        except (TypeError, ValueError) as error:
            found[name] = f"{type(error).__name__}: {error}"

    run("group", s, t, group="world")
    run("sizes", s, t[:, :-1] if rank == world_size - 1 else t, group=group)
    run("truncate", s, t[:, :-1] if rank == 0 else t, vocab="truncate", group=group)
    run("rows", s[: 4 - rank], t[: 4 - rank], group=group)
    run("options", s, t, temperature=1.0 + rank, group=group)
    run("labels", s, t, labels + (rank == 1), hard_weight=0.5, group=group)
    run("weights", s, t, weight=torch.full((4,), 1.0 + rank), group=group)
    run("labels of one", s, t, labels if rank else None, group=group)
    labels[0] = 37
    run("label", s, t, labels, hard_weight=0.5, group=group)
    run("denominator", s, t, denominator=torch.tensor(0.0), group=group)
    run("no classes", s[:, :0], t[:, :0], group=group)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        reptile_ext.distillation_loss(student, teacher, group=group)  # all classes in every process
        found["replicated"] = " ".join(str(w.message) for w in warned)
    alone = dist.new_group([0])
    if rank == 1:
        run("not a member", s, t, group=alone)
    return found


def left_alone(rank: int, world_size: int) -> str:
    """The last process is gone before the loss; the others are told within the group's timeout."""
    student, teacher = make_logits("random", 4, 37)
    dist.barrier()
    if rank == world_size - 1:
        os._exit(1)
    try:
        reptile_ext.distillation_loss(student, teacher, group=dist.group.WORLD)
    except RuntimeError as error:
        return f"error: {error}"
    return "no error"


SPARSE_KEYWORDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": (2.0, 1.5), "hard_weight": 0.5},
    {"temperature": 2.0, "hard_weight": 0.3, "label_smoothing": 0.2, "reduction": "none"},
    {"soft_weight": 0.0, "hard_weight": 1.0, "reduction": "sum"},
)


def sparse_case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = make_logits("random", ROWS, 37, dtype)
    student[4, 30] = -torch.inf
    ids, log_probs = reptile_ext.top_k_targets(teacher.double(), 6, 1.5)
    ids[2, 3], log_probs[2, 3] = -1, -torch.inf
    return student, ids, log_probs.float(), make_labels(ROWS, 37)


def sparse_teacher(rank: int, world_size: int) -> Any:
    """Losses and gradients of every divergence and tail; what a broken row, wrong indices and lists that differ do; and
    how much is communicated."""
    warnings.filterwarnings("ignore", message="tail=")
    group, found = dist.group.WORLD, []
    for dtype in (torch.float64, torch.bfloat16):
        student, ids, log_probs, labels = sparse_case(dtype)
        for tail, divergence in SPARSE_CASES:
            for keywords in SPARSE_KEYWORDS if divergence == "forward_kl" else SPARSE_KEYWORDS[1:2]:
                keywords = keywords | keywords_of(divergence) | {"tail": tail}
                own = part(student, ENDS[37][world_size], rank)
                logits = own * 1
                inplace = divergence == "jsd"
                loss = reptile_ext.sparse_distillation_loss(
                    logits, ids, log_probs, labels, group=group, inplace=inplace, **keywords
                )
                (loss * torch.ones_like(loss)).sum().backward()
                assert own.grad is not None
                assert not inplace or torch.equal(logits.detach(), own.grad)
                found.append((str(loss.dtype), loss.tolist(), own.grad.tolist()))
    student, ids, log_probs, labels = sparse_case(torch.float64)
    student[3, 20] = torch.nan
    own = part(student, ENDS[37][world_size], rank)
    broken = reptile_ext.sparse_distillation_loss(own, ids, log_probs, reduction="none", group=group)
    broken.sum().backward()
    assert own.grad is not None
    said = []
    for wrong_ids, wrong_y in ((ids + 37, log_probs), (ids, log_probs - (rank == 0) * 0.5)):
        try:
            reptile_ext.sparse_distillation_loss(own, wrong_ids, wrong_y, group=group)
        except ValueError as error:
            said.append(str(error))
    mesh = init_device_mesh("cpu", (world_size,))
    even = student.detach()[:, :36].nan_to_num(0.0)
    sharded = DTensor.from_local(even.chunk(world_size, -1)[rank].contiguous(), mesh, [Shard(1)], run_check=False)
    kept = torch.where(ids < 36, ids, -1)
    by_dtensor = reptile_ext.sparse_distillation_loss(sharded, kept, log_probs)
    right = reptile_ext.sparse_distillation_loss(even, kept, log_probs)
    torch.testing.assert_close(by_dtensor, right)
    return found, broken.isnan().tolist(), own.grad.isnan().tolist(), said


class LinearCase(NamedTuple):
    """Hidden states and heads of all classes; `keywords` are the loss's."""

    student: list[Tensor]  # hidden states, weight, bias
    teacher: list[Tensor]
    labels: Tensor
    keywords: dict[str, Any]


LINEAR_KEYWORDS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 2.0, "hard_weight": 0.5, "memory_budget": 200},
    {"reduction": "none", "student_softcap": 2.0, "teacher_softcap": 3.0, "memory_budget": 1},
    {"weight": True, "student_scale": 0.5, "hard_weight": 0.3, "label_smoothing": 0.1, "memory_budget": 200},
    {"reduction": "sum", "denominator": 5.0, "divergence": "jsd", "memory_budget": 600},
    {"divergence": "reverse_kl", "trainable": True, "memory_budget": 600},
    {"sparse": True, "tail": "renormalize", "hard_weight": 0.5, "memory_budget": 300},
    {"sparse": True, "memory_budget": 1},
    {"given": True, "memory_budget": 300},
)


def linear_cases(dtype: torch.dtype) -> Iterator[LinearCase]:
    for number, keywords in enumerate(LINEAR_KEYWORDS):
        generator = torch.Generator().manual_seed(number)
        of = [
            [(torch.randn(*shape, generator=generator) * 0.7).to(dtype) for shape in ((ROWS, h), (37, h), (37,))]
            for h in (5, 6)
        ]
        labels = make_labels(ROWS, 37, seed=number)
        of[0][0][labels == -100] = torch.nan  # hidden states that are not to be read
        keywords = dict(keywords)
        if keywords.get("weight"):
            keywords["weight"] = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25, 3.0])
        yield LinearCase(of[0], of[1], labels, keywords)


def linear_call(case: LinearCase, own: Callable[[Tensor], Tensor], group: Any) -> tuple[Tensor, list[Tensor]]:
    """The loss of a process's classes, which `own` cuts out of a dimension 0, and all the tensors that learn."""
    keywords = dict(case.keywords)
    trainable, sparse, given = (keywords.pop(name, False) for name in ("trainable", "sparse", "given"))
    hidden, weight, bias = case.student
    leaves = [x.detach().clone().requires_grad_() for x in (hidden, own(weight), own(bias))]
    keywords["student_bias"] = leaves[2]
    if group is not None:
        keywords["group"] = group
    of_teacher = case.teacher[0] @ case.teacher[1].t() + case.teacher[2]
    if sparse:
        ids, log_probs = reptile_ext.top_k_targets(of_teacher, 5)
        return reptile_ext.linear_distillation_loss(
            *leaves[:2], None, None, case.labels, teacher_indices=ids, teacher_log_probs=log_probs, **keywords
        ), leaves
    if given:
        logits = own(of_teacher.t()).t().contiguous()
        return reptile_ext.linear_distillation_loss(*leaves[:2], logits, None, case.labels, **keywords), leaves
    teacher = [x.detach().clone() for x in (case.teacher[0], own(case.teacher[1]), own(case.teacher[2]))]
    if trainable:
        leaves += [x.requires_grad_() for x in teacher]
    loss = reptile_ext.linear_distillation_loss(
        *leaves[:2], *teacher[:2], case.labels, teacher_bias=teacher[2], **keywords
    )
    return loss, leaves


def linear(rank: int, world_size: int) -> Any:
    """Loss and gradients of every case; a frozen head; hidden states whose gradient is left; and what is refused."""
    ends = {2: [20, 37], 3: [5, 30, 37]}[world_size]
    group, found = dist.group.WORLD, []

    def own(x: Tensor) -> Tensor:
        first = ends[rank - 1] if rank else 0
        return x[first : ends[rank]]

    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for case in linear_cases(dtype):
            loss, leaves = linear_call(case, own, group)
            (0.3 * loss).sum().backward()
            found.append((numbers(loss), [numbers(x.grad) for x in leaves if x.grad is not None]))
    case = next(linear_cases(torch.float64))
    hidden, weight, bias = case.student
    teacher = (case.teacher[0], own(case.teacher[1]))
    keywords: dict[str, Any] = {"student_bias": own(bias), "group": group}
    leaf = hidden.clone().requires_grad_()
    frozen = reptile_ext.linear_distillation_loss(leaf, own(weight), *teacher, case.labels, **keywords)
    frozen.backward()
    of_own = hidden.clone().requires_grad_()
    reptile_ext.linear_distillation_loss(
        of_own, own(weight), *teacher, case.labels, reduce_hidden_gradient=False, **keywords
    ).backward()
    assert leaf.grad is not None
    assert of_own.grad is not None
    total = of_own.grad.clone()
    dist.all_reduce(total)
    assert not torch.equal(of_own.grad, leaf.grad)
    torch.testing.assert_close(total, leaf.grad)
    with torch.no_grad():
        alone = reptile_ext.linear_distillation_loss(leaf, own(weight), *teacher, case.labels, **keywords)

    def of_hidden(x: Tensor) -> Tensor:
        return reptile_ext.linear_distillation_loss(x, own(weight), *teacher, case.labels, **keywords)

    said = []
    for wrong in (
        lambda: reptile_ext.linear_distillation_loss(
            leaf if rank else hidden, own(weight), *teacher, case.labels, **keywords
        ),
        lambda: reptile_ext.linear_distillation_loss(
            leaf, own(weight), *teacher, case.labels, reduce_hidden_gradient=rank == 0, **keywords
        ),
        lambda: reptile_ext.linear_distillation_loss(
            leaf[rank:], own(weight), teacher[0][rank:], teacher[1], case.labels[rank:], **keywords
        ),
        lambda: reptile_ext.linear_distillation_loss(leaf, own(weight), *teacher, case.labels + 37, **keywords),
        lambda: reptile_ext.linear_distillation_loss(
            leaf, own(weight), *teacher, case.labels, **(keywords | {"group": "all"})
        ),
    ):
        try:
            wrong()
            said.append("nothing")
        except (TypeError, ValueError) as error:
            said.append(str(error))
    for twice in (
        lambda x: torch.autograd.grad(of_hidden(x), x, create_graph=True),
        lambda x: torch.func.grad(of_hidden)(x.detach()),
    ):
        try:
            twice(leaf)
            said.append("nothing")
        except RuntimeError as error:
            said.append(str(error))
    return found, numbers(frozen), numbers(alone), numbers(leaf.grad), said


TOGETHER = (linear, sparse_teacher, equals, trainable_teacher, edges, ways, training, dtensors, refused, communication)
