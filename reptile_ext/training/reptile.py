"""The training loop. Everything `Reptile.fit` does to a student happens in this file, in the order it is written.

The engine is Accelerate, for the part of the work that has nothing to do with distillation and much to do with
machines: which device, how many processes, sharding the loader, DDP's gradient synchronisation, clipping. It asks for
no class to inherit from and no hooks, so that the loop below stays a loop. Mixed precision is torch's own autocast:
Accelerate's would hand the logits back as a float32 copy, and that copy of [rows, V] is what this library avoids.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR
from tqdm.auto import tqdm

from ..benchmark import Contender, peak_extra_bytes
from ..linear import linear_distillation_loss
from ..modules import DistillationLoss, LinearDistillationLoss
from .batches import Sampler, logits_of, num_samples, random_state, set_random_state, split
from .checkpoint import Log, latest_checkpoint, load_checkpoint, save_checkpoint, write_atomically
from .heads import Head, output_layer
from .metrics import METRICS, Evaluation, better, check_metrics

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULES = ("constant", "linear", "cosine")
EVALUATED_ROWS = 512  # whose logits an evaluation has at a time, where a step has none: as many as make a product fast


@dataclass(frozen=True)
class Until:
    """When training is good enough: at the first of the conditions that are given.

    steps:    optimizer steps.
    minutes:  of training, earlier parts of a resumed run included.
    target:   value that `metric` must reach in an evaluation.
    patience: evaluations in a row without a better `metric`; the best student is then put back.
    metric:   one of `METRICS`.
    """

    steps: int | None = None
    minutes: float | None = None
    metric: str = "loss"
    target: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(map(repr, METRICS))}; got {self.metric!r}")
        for name in ("steps", "minutes", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive; got {value!r}")
        if self.steps is self.minutes is self.target is self.patience is None:
            raise ValueError(
                "until needs at least one of steps, minutes, target, patience; got none: it would never end"
            )

    def reason_to_stop(self, progress: Progress) -> str | None:
        """The condition that `progress` fulfils, in words, or None."""
        if self.steps is not None and progress.step >= self.steps:
            return f"{self.steps} steps"
        if self.minutes is not None and progress.seconds >= 60 * self.minutes:
            return f"{self.minutes:g} minutes"
        value = progress.metrics.get(self.metric)
        if (
            self.target is not None
            and value is not None
            and (value == self.target or better(self.metric, value, self.target))
        ):
            return f"{self.metric} {value:.4g} reached {self.target:g}"
        if self.patience is not None and progress.stale >= self.patience:
            return f"no better {self.metric} in {self.patience} evaluations"
        return None


@dataclass
class Progress:
    """Where a run is; what a checkpoint holds besides tensors."""

    step: int = 0
    seconds: float = 0.0
    rows: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # the latest evaluation
    best_metrics: dict[str, float] = field(default_factory=dict)  # the evaluation best in until.metric
    stale: int = 0  # evaluations since then


@dataclass(frozen=True)
class Result:
    """What `fit` did: `metrics` is the last evaluation, or the best one when patience ended the run."""

    steps: int
    seconds: float
    rows: int
    reason: str
    metrics: dict[str, float]


class Reptile:
    """Trains `student` to give the answers of `teacher`.

    Arguments:
        student, teacher: modules that take the same inputs and return logits: a tensor [..., V], or an object with
            `.logits`. The teacher gets no gradient, runs in eval mode, is in no checkpoint, and after `fit` has the
            modes and `requires_grad` it came with. Both are moved to the device. `teacher=None` trains the student
            on the labels alone with the same loop: how a teacher comes to be, and the baseline to compare with.
        metrics: what `evaluate` measures, names from `METRICS`.
        optimizer: makes an optimizer from parameters; default AdamW with `learning_rate` and `weight_decay`.
        schedule: "constant", "linear" or "cosine" (the last two fall to 0 at `until.steps`), after `warmup` steps of
            linear rise; or a function from an optimizer to an LRScheduler that is stepped once a step.
        precision: "float32", or autocast to "bfloat16" or "float16" (with loss scaling).
        accumulate: micro-batches a step. The loss is divided by the number of rows that count in all of them, on all
            processes: k micro-batches of any sizes give the gradient of one batch.
        clip: largest norm of the gradient, or None.
        shift_labels: batches carry a causal language model's inputs as labels; shift them here. False: they are
            already the token that follows.
        dim: the class dimension of the logits.
        seed: of Python, NumPy and torch at the start of `fit`; None leaves them.
        fused_linear: never have the logits of a step in full: the loss takes hidden states and heads, as
            `reptile_ext.linear_distillation_loss`. It is the same training, to rounding;
            `measure_fused_linear` says what it saves. The student must have `get_output_embeddings()`, as Hugging
            Face's language models do, that returns the `torch.nn.Linear` its logits come from; a teacher that has
            none gives its logits. Softcap and scale are read from the models' configs. A model that does anything
            else to its logits is refused when it is first run. `evaluate` has the logits of 512 rows at a time.
        loss: keywords of `reptile_ext.distillation_loss`: temperature, hard_weight, ignore_index, inplace, …; with
            `fused_linear`, memory_budget too, and no inplace.

    A batch is a tensor, a pair (inputs, labels) or a mapping passed to the models as keywords, its "labels" apart.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        *,
        metrics: Sequence[str] = (),
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        learning_rate: float = 1e-3,
        weight_decay: float = 0.01,
        schedule: str | Callable[[Optimizer], LRScheduler] = "constant",
        warmup: int = 0,
        precision: str = "float32",
        accumulate: int = 1,
        clip: float | None = 1.0,
        shift_labels: bool = False,
        dim: int = -1,
        seed: int | None = 0,
        fused_linear: bool = False,
        **loss: Any,
    ) -> None:
        for name in ("reduction", "weight", "denominator"):
            if name in loss:
                raise ValueError(f"{name} is the loop's own affair: the loss is a mean over all rows of a step")
        of_linear = {"memory_budget": loss.pop("memory_budget")} if "memory_budget" in loss else {}
        if of_linear and not fused_linear:
            raise ValueError("memory_budget is for the chunks of fused_linear=True; got it with fused_linear=False")
        if teacher is None and set(loss) - {"ignore_index"}:
            raise ValueError(f"teacher=None leaves no meaning to {sorted(set(loss) - {'ignore_index'})}")
        if teacher is not None:
            _check_apart(student, teacher)
        check_metrics(metrics, teacher is not None)
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be a function or one of {', '.join(map(repr, SCHEDULES))}; got {schedule!r}"
            )
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; got {precision!r}")
        if accumulate < 1:
            raise ValueError(f"accumulate must be at least 1; got {accumulate!r}")
        self.accelerator = Accelerator()
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"Accelerate is set to mixed_precision={self.accelerator.mixed_precision!r}, which would copy the "
                "logits to float32: set it to 'no' and pass precision= to Reptile"
            )
        self.student = student.to(self.accelerator.device)
        self.teacher = None if teacher is None else teacher.to(self.accelerator.device)
        self.metrics = tuple(metrics)
        self.make_optimizer = optimizer or functools.partial(
            torch.optim.AdamW,
            lr=learning_rate,
            weight_decay=weight_decay,
            fused=self.accelerator.device.type in ("cpu", "cuda"),  # four times faster than the loop over parameters
        )
        self.schedule = schedule
        self.warmup = warmup
        self.precision = precision
        self.accumulate = accumulate
        self.clip = clip
        self.shift_labels = shift_labels
        self.dim = dim
        self.seed = seed
        if teacher is None:
            loss |= {"soft_weight": 0.0, "hard_weight": 1.0}  # the cross entropy, by the same kernel
        self.criterion = DistillationLoss(**loss)
        self._of_linear = of_linear
        self.ignore_index: int = loss.get("ignore_index", -100)
        self._rows_per_sample: int | None = None
        self._use_heads(fused_linear)

    def _use_heads(self, fused_linear: bool) -> None:
        """Choose between the loss of logits and that of hidden states and heads."""
        self.student_head = self.teacher_head = None  # where there is none, a model is asked for its logits
        self._linear_keywords: dict[str, Any] = {}
        if not fused_linear:
            return
        keywords = dict(self.criterion.keywords)
        if keywords.pop("inplace"):
            raise ValueError("inplace=True has no meaning with fused_linear=True: there are no logits to write over")
        del keywords["dim"]  # of the loop's logits it is the last
        if self.dim != -1:
            raise ValueError(f"fused_linear=True needs classes in the last dimension, dim=-1; got dim={self.dim!r}")
        LinearDistillationLoss(**keywords, **self._of_linear)  # complain now, not in the first step
        self._linear_keywords = keywords | self._of_linear
        self.student_head = Head("student", self.student)
        if self.teacher is not None and output_layer(self.teacher) is not None:
            self.teacher_head = Head("teacher", self.teacher)

    def fit(
        self,
        train: Iterable[Any],
        eval: Iterable[Any] | None = None,
        *,
        until: Until,
        eval_every: int = 100,
        checkpoint_every: int = 100,
        log_every: int = 10,
        folder: str | Path | None = None,
        resume: bool = False,
        progress_bar: bool = True,
    ) -> Result:
        """Train until good enough.

        train, eval: anything that yields micro-batches and can be read again for the next pass (a DataLoader, a list).
        eval_every, checkpoint_every, log_every: in steps. There is an evaluation and a checkpoint at the end, too.
        folder: gets `metrics.jsonl` and `checkpoints/`; None writes nothing.
        resume: go on from the folder's newest checkpoint, to the same weights, bit for bit on CPU, as a run that was
            never stopped. (With several processes the ranks continue with the main process's random numbers.)

        Raises ValueError for conditions that cannot be measured, FileExistsError for a folder that holds a run when
        `resume` is False, FloatingPointError if the loss is not finite; the last good checkpoint stays in place.
        """
        if eval is None and (until.target is not None or until.patience is not None):
            raise ValueError("until.target and until.patience need eval; got eval=None")
        if until.metric not in ("loss", *self.metrics) and (until.target is not None or until.patience is not None):
            raise ValueError(
                f"until.metric={until.metric!r} is not among the metrics measured: {('loss', *self.metrics)}"
            )
        for name, steps in {
            "eval_every": eval_every,
            "checkpoint_every": checkpoint_every,
            "log_every": log_every,
        }.items():
            if steps < 1:
                raise ValueError(f"{name} must be at least 1; got {steps!r}")
        accelerator, folder = self.accelerator, None if folder is None else Path(folder)
        checkpoint = None if folder is None else latest_checkpoint(folder)
        if checkpoint is not None and not resume:
            raise FileExistsError(
                f"{folder} holds a run at step {int(checkpoint.name)}: pass resume=True, or another folder"
            )

        # 1. Initialise: random numbers, student, optimizer, schedule; or all of it from a checkpoint.
        if self.seed is not None:
            set_seed(self.seed)
        model = accelerator.prepare(self.student)
        optimizer = self.make_optimizer([p for p in model.parameters() if p.requires_grad])
        scheduler = self._make_scheduler(optimizer, until)
        scaler = torch.amp.GradScaler(accelerator.device.type, enabled=self.precision == "float16")
        sampler = Sampler(accelerator.prepare_data_loader(train) if accelerator.num_processes > 1 else train)
        best: dict[str, Tensor] = {}  # the best student so far, kept only where patience will ask for it back
        progress, log_position = Progress(), 0
        if checkpoint is not None:
            state, best = load_checkpoint(checkpoint, self.student)
            progress, log_position = Progress(**state["progress"]), state["log"]
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            scaler.load_state_dict(state["scaler"])
            sampler.load_state_dict(state["sampler"])
            set_random_state(state["random"])
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        writes = folder is not None and accelerator.is_main_process
        log = Log(folder / "metrics.jsonl" if folder is not None and writes else None, log_position)
        bar = tqdm(
            total=until.steps,
            initial=progress.step,
            unit="step",
            disable=not (progress_bar and accelerator.is_main_process),
        )
        rows_done = torch.tensor(progress.rows, device=accelerator.device)
        earlier, started = (progress.rows, progress.seconds), time.perf_counter() - progress.seconds
        reason = until.reason_to_stop(progress)

        with bar, _frozen(self.teacher), _mode(self.student, training=True):
            while reason is None:
                # 2. Sample the micro-batches of a step, and count the rows of all before the loss of any is divided.
                window = [self._receive(batch) for batch in sampler.take(self.accumulate)]
                count = self._count(window)
                loss = torch.zeros((), device=accelerator.device)
                for taken, (inputs, labels) in enumerate(window, start=1):
                    # Gradients of several processes meet in the last backward.
                    with accelerator.no_sync(model) if taken < len(window) else contextlib.nullcontext():
                        # 3. Both forwards, to logits or to what heads make them of. The teacher's keeps no graph.
                        answers = self._answers(model, self.student_head, inputs)
                        teacher_answers = self._teacher_answers(inputs)
                        # 4. Loss: what these rows add to the mean over all rows of the step.
                        rows = count * self._rows_per_count(answers, inputs, labels)
                        share = self._loss(answers, teacher_answers, labels, rows)
                        # 5. Backward. DDP averages what is already divided by a count over all processes: undo it.
                        scaler.scale(share * accelerator.num_processes).backward()
                    loss += share.detach()
                scaler.unscale_(optimizer)
                if self.clip is not None:
                    accelerator.clip_grad_norm_(model.parameters(), self.clip)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()

                # 6. Repeat until good enough.
                progress.step += 1
                progress.seconds = time.perf_counter() - started
                rows_done += rows
                reason = until.reason_to_stop(progress)
                evaluates = eval is not None and (reason is not None or progress.step % eval_every == 0)
                saves = reason is not None or progress.step % checkpoint_every == 0
                if evaluates or saves or progress.step % log_every == 0:
                    value = float(accelerator.reduce(loss, "sum"))
                    if not math.isfinite(value):
                        raise FloatingPointError(
                            f"the loss is {value} at step {progress.step}: lower learning_rate or set clip"
                        )
                    progress.rows = int(rows_done)
                    rate = (progress.rows - earlier[0]) / (progress.seconds - earlier[1])
                    learning_rate = optimizer.param_groups[0]["lr"]
                    log.write(
                        step=progress.step, seconds=progress.seconds, rows=progress.rows, loss=value, lr=learning_rate
                    )
                    shown = {name: f"{metric:.4g}" for name, metric in progress.metrics.items() if name != "loss"}
                    bar.set_postfix({"loss": f"{value:.4g}", **shown, "rows/s": f"{rate:.0f}"}, refresh=False)
                bar.update()
                if evaluates:
                    assert eval is not None
                    progress.metrics = self.evaluate(eval)
                    log.write(step=progress.step, seconds=progress.seconds, eval=progress.metrics)
                    watched = progress.metrics[until.metric]
                    progress.stale += 1
                    if better(until.metric, watched, progress.best_metrics.get(until.metric)):
                        progress.best_metrics, progress.stale = progress.metrics, 0
                        if until.patience is not None:
                            best = {name: tensor.cpu().clone() for name, tensor in self.student.state_dict().items()}
                    reason = reason or until.reason_to_stop(progress)
                    saves = saves or reason is not None
                if saves and folder is not None and writes:
                    state = {
                        "progress": dataclasses.asdict(progress),
                        "optimizer": optimizer.state_dict(),
                        "scheduler": scheduler.state_dict(),
                        "scaler": scaler.state_dict(),
                        "sampler": sampler.state_dict(),
                        "random": random_state(),
                        "log": log.position,
                    }
                    save_checkpoint(folder, progress.step, self.student, best, state)

        metrics = progress.metrics
        if best:
            self.student.load_state_dict(best)
            metrics = progress.best_metrics
        if folder is not None and writes:
            write_atomically(folder / "student.safetensors", lambda path: save_model(self.student, str(path)))
        return Result(progress.step, progress.seconds, progress.rows, reason, metrics)

    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """The loss and `metrics` of the student over all of `data`, every row that counts weighing the same.

        Draws no random number that training would miss. With several processes, each one evaluates all of the data.
        """
        evaluation = Evaluation(self.metrics, self.ignore_index, self.accelerator.device)
        random_numbers = random_state(getattr(data, "generator", None))
        with torch.no_grad(), _frozen(self.teacher), _mode(self.student, training=False):
            for batch in data:
                inputs, all_labels = self._receive(batch)
                answers = self._answers(self.student, self.student_head, inputs)
                parts = self._in_parts(answers, self._teacher_answers(inputs), all_labels)
                for logits, teacher_logits, labels in parts:
                    rows = self._count_rows(logits, labels)
                    loss = self._loss_of_logits(logits, teacher_logits, labels, rows)
                    evaluation.update(loss, int(rows), logits, teacher_logits, labels)
        set_random_state(random_numbers, getattr(data, "generator", None))
        return evaluation.compute()

    def measure_fused_linear(self, batch: Any, repeats: int = 5) -> dict[str, Any]:
        """What `fused_linear` does to memory and time: forward and backward of `batch`, with it and without.

        The teacher's forward is part of it, the optimizer's step is not. The two take turns, after a round that does
        not count. Needs the memory of `fused_linear=False`. Leaves gradients, buffers and random numbers as they were.

        Returns:
            rows, classes: of the student's logits.
            milliseconds: {"logits": …, "fused_linear": …}, medians of `repeats`.
            peak_bytes: in the same form, what a step needs at its peak besides what was there before, gradients of the
                parameters included; median of three. None where the system does not say.

        Raises:
            ValueError: as `fused_linear=True` does, for models and options that it is not for.
        """
        inputs, labels = self._receive(batch)
        device = self.accelerator.device
        shape: dict[str, int] = {}

        def contender(name: str, fused_linear: bool) -> Contender:
            loop = copy.copy(self)
            loop._use_heads(fused_linear)

            def setup() -> None:
                for parameter in self.student.parameters():
                    parameter.grad = None

            def step() -> None:
                answers = loop._answers(self.student, loop.student_head, inputs)
                rows = self._count_rows(answers, labels)
                torch.autograd.backward(loop._loss(answers, loop._teacher_answers(inputs), labels, rows))
                if not fused_linear:
                    shape.update(rows=answers.shape[:-1].numel(), classes=answers.shape[-1])
                if device.type == "cuda":
                    torch.cuda.synchronize(device)

            return Contender(name, setup, step)

        contenders = [contender("logits", False), contender("fused_linear", True)]
        milliseconds: dict[str, list[float]] = {c.name: [] for c in contenders}
        peaks: dict[str, list[int | None]] = {c.name: [] for c in contenders}
        with _frozen(self.teacher), _untouched(self.student), _mode(self.student, training=True):
            for repeat in range(-1, repeats):
                for c in contenders:
                    c.setup()
                    started = time.perf_counter()
                    c.step()
                    if repeat >= 0:
                        milliseconds[c.name].append(1000 * (time.perf_counter() - started))
            for _ in range(3):
                for c in contenders:
                    peaks[c.name].append(_peak_bytes(c, device))
        return {
            **shape,
            "milliseconds": {name: statistics.median(values) for name, values in milliseconds.items()},
            "peak_bytes": {
                name: None if None in values else statistics.median(value for value in values if value is not None)
                for name, values in peaks.items()
            },
        }

    def _receive(self, batch: Any) -> tuple[Any, Tensor | None]:
        """A batch on the device, as (inputs, labels)."""
        return split(send_to_device(batch, self.accelerator.device), self.shift_labels, self.ignore_index)

    def _count(self, batches: list[tuple[Any, Tensor | None]]) -> Tensor:
        """Labels that count or, without labels, samples; in all the batches and on all processes."""
        if len({labels is None for _, labels in batches}) > 1:
            raise ValueError("the micro-batches of a step must all have labels or all have none; got both kinds")
        counts = [num_samples(i) if lab is None else (lab != self.ignore_index).sum() for i, lab in batches]
        count = torch.stack([torch.as_tensor(c, device=self.accelerator.device) for c in counts]).sum()
        total: Tensor = self.accelerator.reduce(count, "sum")
        return total

    def _rows_per_count(self, answers: Tensor, inputs: Any, labels: Tensor | None) -> int:
        """1 with labels; without, the rows of a sample, which are known only now that its answers are."""
        if labels is not None:
            return 1
        rows = answers.shape[:-1].numel() // num_samples(inputs)
        if self._rows_per_sample not in (None, rows) and self.accumulate * self.accelerator.num_processes > 1:
            raise ValueError(
                "without labels, samples that share a step must have the same number of rows; got "
                f"{self._rows_per_sample} and {rows}: give labels, with ignore_index={self.ignore_index} at the padding"
            )
        self._rows_per_sample = rows
        return rows

    def _count_rows(self, answers: Tensor, labels: Tensor | None) -> Tensor:
        """Rows that count, of these alone."""
        if labels is None:
            return torch.tensor(answers.shape[:-1].numel(), device=answers.device)
        return (labels != self.ignore_index).sum()

    def _precision(self) -> torch.autocast:
        dtype = PRECISIONS[self.precision]
        return torch.autocast(self.accelerator.device.type, dtype, enabled=dtype != torch.float32)

    def _answers(self, model: nn.Module, head: Head | None, inputs: Any) -> Tensor:
        """Logits, or the hidden states that `head` makes them of; classes or features last."""
        with self._precision():
            if head is not None:
                return head.hidden_states(lambda: logits_of(model, inputs))
            return logits_of(model, inputs).movedim(self.dim, -1)

    def _teacher_answers(self, inputs: Any) -> Tensor | None:
        # no_grad, not inference_mode: autograd refuses to save an inference tensor for the student's backward.
        with torch.no_grad():
            return None if self.teacher is None else self._answers(self.teacher, self.teacher_head, inputs)

    def _loss(self, answers: Tensor, teacher_answers: Tensor | None, labels: Tensor | None, rows: Tensor) -> Tensor:
        """Sum of the loss over these rows, divided by `rows`."""
        head, teacher_weight = self.student_head, None  # None: the teacher's answers are logits
        if head is None:
            return self._loss_of_logits(answers, teacher_answers, labels, rows)
        keywords = self._linear_keywords
        if teacher_answers is None:
            # The divergence has no weight, so that any teacher does: one of one feature costs next to nothing.
            _check_labels(labels)
            teacher_answers = answers.new_zeros(*answers.shape[:-1], 1)
            teacher_weight = answers.new_zeros(head.weight.shape[0], 1)
        elif self.teacher_head is not None:
            teacher_weight = self.teacher_head.weight
            keywords = keywords | self.teacher_head.keywords("teacher")
        with self._precision():  # of the heads' products, as it is in the models
            return linear_distillation_loss(
                answers,
                head.weight,
                teacher_answers,
                teacher_weight,
                labels,
                denominator=rows.clamp(min=1),
                **head.keywords("student"),
                **keywords,
            )

    def _loss_of_logits(
        self, logits: Tensor, teacher_logits: Tensor | None, labels: Tensor | None, rows: Tensor
    ) -> Tensor:
        if teacher_logits is None:
            _check_labels(labels)
            teacher_logits = logits.detach()  # `criterion` gives the divergence no weight: any logits of this shape do
        loss: Tensor = self.criterion(logits, teacher_logits, labels, denominator=rows.clamp(min=1))
        return loss

    def _in_parts(
        self, answers: Tensor, teacher_answers: Tensor | None, labels: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None, Tensor | None]]:
        """Student's logits, teacher's logits and labels of a batch; where there are heads, of a few rows at a time."""
        if self.student_head is None:
            yield answers, teacher_answers, labels
            return
        rows = answers.shape[:-1]
        if labels is not None and labels.shape != rows:
            raise ValueError(
                f"labels must have the shape of the hidden states' rows, {list(rows)}; got {list(labels.shape)}"
            )
        if teacher_answers is not None and teacher_answers.shape[:-1] != rows:
            raise ValueError(
                f"the teacher must have the student's rows, {list(rows)}; got {list(teacher_answers.shape[:-1])}"
            )
        answers = answers.flatten(0, -2)
        teacher_answers = None if teacher_answers is None else teacher_answers.flatten(0, -2)
        labels = None if labels is None else labels.flatten()
        for start in range(0, answers.shape[0], EVALUATED_ROWS):
            part = slice(start, start + EVALUATED_ROWS)
            with self._precision():
                logits = self.student_head.logits(answers[part])
                of_teacher = None if teacher_answers is None else teacher_answers[part]
                if of_teacher is not None and self.teacher_head is not None:
                    of_teacher = self.teacher_head.logits(of_teacher)
            yield logits, of_teacher, None if labels is None else labels[part]

    def _make_scheduler(self, optimizer: Optimizer, until: Until) -> LRScheduler:
        if not isinstance(self.schedule, str):
            return self.schedule(optimizer)
        warmup = LinearLR(optimizer, 1 / (self.warmup + 1), total_iters=self.warmup)
        if self.schedule == "constant":
            return warmup
        if until.steps is None:
            raise ValueError(f"schedule={self.schedule!r} falls to 0 at until.steps; got until.steps=None")
        falling = max(until.steps - self.warmup, 1)
        main = (
            CosineAnnealingLR(optimizer, falling)
            if self.schedule == "cosine"
            else LinearLR(optimizer, 1.0, 0.0, total_iters=falling)
        )
        return SequentialLR(optimizer, [warmup, main], milestones=[self.warmup]) if self.warmup else main


@contextlib.contextmanager
def _mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Put a module in train or eval mode; give every part its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextlib.contextmanager
def _frozen(teacher: nn.Module | None) -> Iterator[None]:
    """A teacher in eval mode whose parameters want no gradient; afterwards as it was."""
    if teacher is None:
        yield
        return
    wanted = [(parameter, parameter.requires_grad) for parameter in teacher.parameters()]
    with _mode(teacher, training=False):
        teacher.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, requires_grad in wanted:
                parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Gradients, buffers (a BatchNorm's statistics) and random numbers are afterwards as they were."""
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    random_numbers = random_state()
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        set_random_state(random_numbers)


def _peak_bytes(contender: Contender, device: torch.device) -> int | None:
    """Of a step, over what there was before it."""
    if device.type != "cuda":
        return peak_extra_bytes(contender)
    contender.setup()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    contender.step()
    return torch.cuda.max_memory_allocated(device) - before


def _check_labels(labels: Tensor | None) -> None:
    if labels is None:
        raise ValueError("teacher=None trains on labels; got a batch without")


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    own = {id(parameter): name for name, parameter in student.named_parameters()}
    shared = [own[id(parameter)] for parameter in teacher.parameters() if id(parameter) in own]
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} parameters ({shared[0]!r} …): freezing the teacher would freeze "
            "them in the student; pass copy.deepcopy(teacher)"
        )
