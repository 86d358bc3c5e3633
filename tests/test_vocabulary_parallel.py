"""distillation_loss(group=...): classes sharded over processes give the loss and the gradients of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import vocabulary_parallel_worker as worker
from distributed_worker import in_processes
from oracle import arithmetic_of, assert_near, exact, keywords_of, make_labels, make_logits
from torch import Tensor

from reptile_ext import reference
from reptile_ext.options import DIVERGENCES

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="this PyTorch is built without gloo"
)
each_world = pytest.mark.parametrize("world_size", [2, 3])


@functools.cache
def all_found(world_size: int) -> dict[int, dict[str, Any]]:
    return in_processes(worker.main, world_size, "together", world_size=world_size)


def found_by(name: str, world_size: int) -> list[Any]:
    """What a function of the worker returns in each process."""
    found = [all_found(world_size)[rank][name] for rank in range(world_size)]
    for rank, result in enumerate(found):
        assert not isinstance(result, str), f"process {rank}:\n{result}"
    return found


def tensor(values: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(dtype)


def joined(parts: list[Any], dtype: torch.dtype = torch.float64) -> Tensor:
    """Gradients of the processes' classes, as one."""
    rows = max(len(part) for part in parts)
    return torch.cat([tensor(part, dtype).reshape(rows, -1) for part in parts], -1)


@each_world
def test_equals_one_process(world_size: int) -> None:
    """By the tolerance rule, for every divergence, dtype and option; the loss is the same in every process."""
    found = found_by("equals", world_size)
    for i, case in enumerate(worker.cases(world_size)):
        dtype, loss, _ = found[0][i]
        assert dtype == str(arithmetic_of(case.student, case.teacher))
        assert [of[i][1] for of in found] == [loss] * world_size, case.keywords
        gradient = joined([of[i][2] for of in found], case.student.dtype)
        result = tensor(loss, arithmetic_of(case.student, case.teacher)), gradient
        try:
            assert_near({"group": result}, case.student, case.teacher, case.labels, **case.keywords)
        except AssertionError as error:
            raise AssertionError(f"{case.keywords} {case.student.dtype}") from error


@each_world
def test_both_gradients_and_those_of_the_gradients(world_size: int) -> None:
    found = found_by("trainable_teacher", world_size)
    for i, divergence in enumerate(DIVERGENCES):
        of = [x.requires_grad_() for x in make_logits("random", 4, 37, torch.float64)]
        keywords = {**keywords_of(divergence), "temperature": (1.5, 2.0), "hard_weight": 0.5}
        loss = exact(*of, make_labels(4, 37), **keywords)
        first = torch.autograd.grad(3 * loss, of, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), of)
        for which, right in enumerate((*first, *first, *second), start=1):
            gradient = joined([of_rank[i][which] for of_rank in found])
            torch.testing.assert_close(gradient, right.detach(), rtol=1e-9, atol=1e-11, msg=f"{divergence} {which}")


@each_world
def test_edges(world_size: int) -> None:
    found = found_by("edges", world_size)
    for divergence in DIVERGENCES:

        def of(name: str, divergence: str = divergence) -> tuple[Tensor, Tensor]:
            key = f"{name} {divergence}"
            assert [str(x[key][0]) for x in found] == [str(found[0][key][0])] * world_size
            return tensor(found[0][key][0]), joined([x[key][1] for x in found])

        loss, gradient = of("equal")
        if divergence != "soft_cross_entropy":
            assert loss.eq(0).all(), divergence
            assert gradient.eq(0).all(), divergence
        loss, gradient = of("masked")
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert gradient[:, 4:9].eq(0).all()
        loss, gradient = of("broken")
        is_broken = torch.tensor([row in (2, 5) for row in range(worker.ROWS)])
        assert loss.isnan().equal(is_broken), divergence
        assert gradient.isnan().all(-1).equal(is_broken), divergence
        assert gradient[~is_broken].isfinite().all()
        loss, gradient = of("ignored")
        assert loss == 0
        assert gradient.eq(0).all()
    loss, gradient = tensor(found[0]["infinite"][0]), joined([x["infinite"][1] for x in found])
    assert loss.isinf().tolist() == [row == 3 for row in range(worker.ROWS)]
    assert gradient.isfinite().all()


@each_world
def test_ways_to_call_it(world_size: int) -> None:
    found = found_by("ways", world_size)
    student, teacher = make_logits("random", 6, 37)
    labels = make_labels(6, 37)
    keywords: dict[str, Any] = {"hard_weight": 0.5, "temperature": 2.0}
    overwritten = joined([of["overwritten"] for of in found])
    torch.testing.assert_close(overwritten, joined([of["inplace"][1] for of in found]))
    for name in ("inplace", "checkpoint", "no_grad", "dim", "truncate", "module"):
        s, at, more = student, labels, {}
        if name == "truncate":
            s, at, more = student[:, :33], labels % 33, {"vocab": "truncate"}
        leaf = s.double().requires_grad_()
        right = exact(leaf, teacher, at, **keywords, **more)
        (of_student,) = torch.autograd.grad(right, leaf)
        for of in found:
            torch.testing.assert_close(tensor(of[name][0]), right.detach(), rtol=1e-5, atol=1e-6, msg=name)
        if name != "no_grad":
            gradient = joined([of[name][1] for of in found])
            torch.testing.assert_close(gradient, of_student, rtol=1e-4, atol=1e-6, msg=name)


@each_world
def test_a_gradient_is_not_multiplied_by_the_number_of_processes(world_size: int) -> None:
    """A trap: the loss looks right and the weights drift. Five steps of a sharded head give one process's weights."""
    found = found_by("training", world_size)
    losses, head, body = worker.training(0, 1)
    assert losses[4] < losses[0]
    for of in found:
        torch.testing.assert_close(tensor(of[0]), tensor(losses), rtol=1e-10, atol=1e-12)
        for mine, right in zip(of[2], body, strict=True):
            torch.testing.assert_close(tensor(mine), tensor(right), rtol=1e-10, atol=1e-12)
    whole = torch.cat([tensor(of[1]).reshape(-1, 8) for of in found])
    torch.testing.assert_close(whole, tensor(head), rtol=1e-10, atol=1e-12)


def test_communication_is_of_the_size_of_the_rows() -> None:
    """At most 15 numbers of 8 bytes a row, and some for the sizes, whatever the number of classes."""
    for found in found_by("communication", 2):
        by_size: dict[tuple[int, int], list[int]] = {}
        for rows, vocab_size, given in found:
            assert 0 < given <= 15 * 8 * rows + 64, (rows, vocab_size)
            by_size.setdefault((rows, vocab_size), []).append(given)
        assert by_size[10, 60] == by_size[10, 6000]
        assert max(by_size[1000, 60]) > 50 * max(by_size[10, 60])


@each_world
def test_dtensors(world_size: int) -> None:
    found = found_by("dtensors", world_size)
    student, teacher = make_logits("random", 6, 37)
    labels = make_labels(6, 37)
    leaf = student.double().requires_grad_()
    right = exact(leaf, teacher, labels, hard_weight=0.5)
    (of_student,) = torch.autograd.grad(right, leaf)
    for of in found:
        for name, placement in (
            ("classes", "Shard(dim=1)"),
            ("classes of images", "Shard(dim=1)"),
            ("replicated", "Replicate()"),
            ("one replicated", "Replicate()"),
            ("replicated labels", "Shard(dim=1)"),
        ):
            assert not isinstance(of[name], str), f"{name}: {of[name]}"
            loss, gradient, placements = of[name]
            assert placement in placements or placement.replace("dim=", "") in placements
            torch.testing.assert_close(tensor(loss), right.detach(), rtol=1e-5, atol=1e-6)
            gradient = tensor(gradient)
            if gradient.dim() == 3:
                gradient = gradient.transpose(1, 2).reshape(6, 37)
            torch.testing.assert_close(gradient, of_student, rtol=1e-4, atol=1e-6)
        few = exact(student[:, : world_size - 1], teacher[:, : world_size - 1], labels.clamp(max=0), hard_weight=0.5)
        torch.testing.assert_close(tensor(of["few classes"][0]), few, rtol=1e-5, atol=1e-6)
        for name, words in {
            "rows": "student_logits is a DTensor sharded over its rows",
            "sharded labels": "labels must be the same in every process",
            "partial": "student_logits is a DTensor of sums that are still to be added up",
            "teacher plain": "teacher_logits must be a DTensor sharded as student_logits is",
            "student plain": "student_logits must be a DTensor sharded as teacher_logits is",
            "teacher over rows": "teacher_logits is a DTensor sharded over its rows",
            "group too": "student_logits is a sharded DTensor, which says its group itself",
        }.items():
            assert isinstance(of[name], str), name
            assert words in of[name], (name, of[name])
            assert any(hint in of[name] for hint in (".to_local()", ".full_tensor()", "group=None")), name


@each_world
def test_processes_that_are_not_called_alike_are_all_told(world_size: int) -> None:
    found = found_by("refused", world_size)
    for of in found:
        for name, words in {
            "group": "TypeError: group must be a torch.distributed.ProcessGroup",
            "sizes": "classes of student_logits and",
            "truncate": "with vocab='truncate' both ranges of a process must begin at the same class",
            "rows": "ValueError: every process of group must have the same rows; they differ",
            "options": "ValueError: every process of group must have the same options",
            "labels": "ValueError: every process of group must have the same labels",
            "weights": "ValueError: every process of group must have the same weights",
            "labels of one": "ValueError: every process of group must have the same options",
            "label": "ValueError: labels must lie in [0, 37) or equal ignore_index=-100; got 37",
            "denominator": "ValueError: denominator must be positive and finite; got 0.0",
            "no classes": "need at least one class",
            "replicated": "where each process has all classes, pass group=None",
        }.items():
            assert words in of[name], (name, of[name])
    assert "ValueError: group must have this process in it" in found[1]["not a member"]


def test_a_process_that_dies_gives_the_others_an_error() -> None:
    found = in_processes(worker.main, 3, "left_alone", world_size=3, expected=2)
    assert sorted(found) == [0, 1]
    assert all(text.startswith("error: ") for text in found.values()), found


@each_world
@pytest.mark.filterwarnings("ignore:tail=")
def test_a_sparse_teacher_equals_one_process(world_size: int) -> None:
    """Every tail and divergence, options, two dtypes, in place; broken rows; what is wrong is said in every process."""
    found = found_by("sparse_teacher", world_size)
    i = 0
    for dtype in (torch.float64, torch.bfloat16):
        student, ids, log_probs, labels = worker.sparse_case(dtype)
        for tail, divergence in worker.SPARSE_CASES:
            for keywords in worker.SPARSE_KEYWORDS if divergence == "forward_kl" else worker.SPARSE_KEYWORDS[1:2]:
                keywords = keywords | keywords_of(divergence) | {"tail": tail}
                leaf = student.detach().double().clone().requires_grad_()
                right = reference.sparse_distillation_loss(leaf, ids, log_probs, labels, **keywords)
                right.sum().backward()
                assert leaf.grad is not None
                of_dtype, loss, _ = found[0][0][i]
                assert [rank[0][i][1] for rank in found] == [loss] * world_size
                assert of_dtype == str(torch.float64 if dtype == torch.float64 else torch.float32)
                gradient = joined([rank[0][i][2] for rank in found])
                close = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-2, "atol": 1e-6}
                torch.testing.assert_close(tensor(loss), right.detach(), **{**close, "rtol": min(close["rtol"], 1e-5)})
                torch.testing.assert_close(gradient, leaf.grad, **close)
                i += 1
    for rank in found:
        assert rank[1] == [False, False, False, True, False, False, False]
        assert [all(row) for row in rank[2]] == rank[1] or not rank[2][0]
        assert "teacher_indices must lie in [-1, 37)" in rank[3][0]
        assert "same teacher_indices and teacher_log_probs" in rank[3][1]


@each_world
def test_sharded_heads_equal_one_process(world_size: int) -> None:
    """linear_distillation_loss(group=...): losses, and gradients of hidden states, heads and biases, of dense, sparse,
    given and trainable teachers, softcaps, several chunks and ignored rows of NaN, in three dtypes."""
    found = found_by("linear", world_size)
    i = 0
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        for case in worker.linear_cases(dtype):
            loss, leaves = worker.linear_call(case, lambda x: x, None)
            (0.3 * loss).sum().backward()
            of_ranks = [of[0][i] for of in found]
            assert [of[0] for of in of_ranks] == [of_ranks[0][0]] * world_size
            close = {torch.float64: {"rtol": 1e-9, "atol": 1e-11}}.get(dtype, {"rtol": 2e-2, "atol": 2e-2})
            torch.testing.assert_close(tensor(of_ranks[0][0]), loss.detach().double(), **close)
            for which, leaf in enumerate(leaves):
                assert leaf.grad is not None
                if which % 3:
                    gradient = torch.cat([tensor(of[1][which]) for of in of_ranks])
                else:
                    gradient = tensor(of_ranks[0][1][which])
                    assert all(of[1][which] == of_ranks[0][1][which] for of in of_ranks)
                assert leaf.grad.isfinite().all()
                torch.testing.assert_close(gradient, leaf.grad.double(), **close)
            i += 1
    for of in found:
        assert of[1] == of[2]
        assert tensor(of[3]).abs().sum() > 0
        said = ("same student_hidden.requires_grad", "same reduce_hidden_gradient", "same rows", "labels must lie in")
        said = (*said, "group must be a torch.distributed.ProcessGroup", *["has no double backward"] * 2)
        for words, message in zip(said, of[4], strict=True):
            assert words in message
