"""The training loop. Everything `Reptile.fit` does to a student happens in this file, in the order it is written.

The engine is Accelerate, for the part of the work that has nothing to do with distillation and much to do with
machines: which device, how many processes, sharding the loader, DDP's gradient synchronisation, clipping. It asks for
no class to inherit from and no hooks, so that the loop below stays a loop. Mixed precision is torch's own autocast:
Accelerate's would hand the logits back as a float32 copy, and that copy of [rows, V] is what this library avoids.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
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

from ..files import write_atomically
from .batches import Batch, Sampler, random_state, set_random_state
from .checkpoint import Log, latest_checkpoint, load_checkpoint, save_checkpoint
from .costs import measure_fused_linear
from .metrics import Evaluation, check_metrics
from .modes import frozen, in_mode
from .objective import Objective
from .until import Progress, Result, Until

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCHEDULES = ("constant", "linear", "cosine")


class Reptile:
    """Trains `student` to match `teacher`.

    Arguments:
        student, teacher: modules that take the same inputs and return logits: a tensor [..., V], or an object with
            `.logits`. The teacher gets no gradient, runs in eval mode, is in no checkpoint, and after `fit` has the
            modes and `requires_grad` it came with. Both are moved to the device. `teacher=None` trains the student
            on the labels alone with the same loop: how a teacher comes to be, and the baseline to compare with.
        metrics: what `evaluate` measures, names from `METRICS`.
        optimizer: makes an optimizer from parameters; default AdamW with `learning_rate` and `weight_decay`.
        schedule: "constant", "linear" or "cosine" (the last two fall to 0 at `until.steps`), after a linear warm-up
            of `warmup` steps; or a function from an optimizer to an LRScheduler that is stepped once a step.
        precision: "float32", or autocast to "bfloat16" or "float16" (with loss scaling).
        accumulate: micro-batches a step. The loss is divided by the number of rows that count in all of them, on all
            processes, so that k micro-batches of any sizes give the gradient of one batch.
        clip: largest norm of the gradient, or None.
        shift_labels: labels are a causal language model's input ids; use the next one at each position. False: they
            are already the next ones.
        dim: the class dimension of the logits.
        seed: of Python, NumPy and torch at the start of `fit`; None leaves them.
        fused_linear: never have the logits of a step in full: the loss takes hidden states and heads, as
            `reptile_ext.linear_distillation_loss`. It is the same training, to rounding;
            `measure_fused_linear` says what it saves. The student must have `get_output_embeddings()`, as Hugging
            Face's language models do, that returns the `torch.nn.Linear` its logits come from; a teacher that has
            none gives its logits. Softcap and scale are read from the models' configs. A model that does anything
            else to its logits is an error when it is first run. `evaluate` makes the logits of 512 rows at a time.
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
        self.objective = Objective(
            student,
            teacher,
            dim=dim,
            shift_labels=shift_labels,
            fused_linear=fused_linear,
            autocast=PRECISIONS[precision],
            **loss,
        )
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
        self.seed = seed

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
        until.check_measured(self.metrics, eval is not None)
        for name, steps in {
            "eval_every": eval_every,
            "checkpoint_every": checkpoint_every,
            "log_every": log_every,
        }.items():
            if steps < 1:
                raise ValueError(f"{name} must be at least 1; got {steps!r}")
        accelerator, objective = self.accelerator, self.objective
        folder = None if folder is None else Path(folder)
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
        shares_steps = self.accumulate * accelerator.num_processes > 1
        rows_done = torch.tensor(progress.rows, device=accelerator.device)
        earlier, started = (progress.rows, progress.seconds), time.perf_counter() - progress.seconds
        reason = until.reason_to_stop(progress)

        with bar, frozen(self.teacher), in_mode(self.student, training=True):
            while reason is None:
                # 2. Sample the micro-batches of a step, and count the rows of all before the loss of any is divided.
                window = [self._receive(batch) for batch in sampler.take(self.accumulate)]
                num_items = objective.count(window, self._sum_over_processes) if shares_steps else None
                loss = torch.zeros((), device=accelerator.device)
                for taken, batch in enumerate(window, start=1):
                    # Gradients of several processes meet in the last backward.
                    with accelerator.no_sync(model) if taken < len(window) else contextlib.nullcontext():
                        # 3. Both forwards, to logits or, for fused_linear, hidden states. The teacher's keeps no graph.
                        outputs = objective.student_outputs(model, batch.inputs)
                        teacher_outputs = objective.teacher_outputs(batch.inputs)
                        # 4. Loss: what these rows add to the mean over all rows of the step.
                        rows = objective.num_rows(outputs, batch, num_items)
                        share = objective.loss(outputs, teacher_outputs, batch.labels, rows)
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
                    is_best = progress.evaluated(self.evaluate(eval), until.metric)
                    log.write(step=progress.step, seconds=progress.seconds, eval=progress.metrics)
                    if is_best and until.patience is not None:
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
        """The loss and `metrics` of the student over all of `data`, each counted row with the same weight.

        Leaves the random numbers as they were. With several processes, each one evaluates all of the data.
        """
        objective = self.objective
        evaluation = Evaluation(self.metrics, objective.ignore_index, self.accelerator.device)
        random_numbers = random_state(getattr(data, "generator", None))
        with torch.no_grad(), frozen(self.teacher), in_mode(self.student, training=False):
            for batch in map(self._receive, data):
                outputs = objective.student_outputs(self.student, batch.inputs)
                teacher_outputs = objective.teacher_outputs(batch.inputs)
                for logits, teacher_logits, labels in objective.logits_in_parts(outputs, teacher_outputs, batch.labels):
                    rows = objective.counted_rows(logits, labels)
                    loss = objective.loss_of_logits(logits, teacher_logits, labels, rows)
                    evaluation.update(loss, int(rows), logits, teacher_logits, labels)
        set_random_state(random_numbers, getattr(data, "generator", None))
        return evaluation.compute()

    def measure_fused_linear(self, batch: Any, repeats: int = 5) -> dict[str, Any]:
        """What `fused_linear` does to memory and time: forward and backward of `batch`, with it and without.

        The teacher's forward is part of it, the optimizer's step is not. The two take turns, after a round that does
        not count. Leaves gradients, buffers and random numbers as they were.

        Returns:
            rows, classes: of the student's logits.
            milliseconds: {"logits": …, "fused_linear": …}, medians of `repeats`.
            peak_bytes: in the same form, what a step needs at its peak besides what was there before, gradients of the
                parameters included; median of three. None where the system does not say.
            failed: only if a GPU has not the memory for one of the two: its name and the reason; its figures are None.

        Raises:
            ValueError: as `fused_linear=True` does, for models and options that it is not for.
        """
        return measure_fused_linear(self.objective, self._receive(batch), repeats)

    def _receive(self, batch: Any) -> Batch:
        """A batch on the device, as (inputs, labels)."""
        return self.objective.split(send_to_device(batch, self.accelerator.device))

    def _sum_over_processes(self, count: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(count, "sum")
        return total

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


def _check_apart(student: nn.Module, teacher: nn.Module) -> None:
    own = {id(parameter): name for name, parameter in student.named_parameters()}
    shared = [own[id(parameter)] for parameter in teacher.parameters() if id(parameter) in own]
    if shared:
        raise ValueError(
            f"student and teacher share {len(shared)} parameters ({shared[0]!r} …): freezing the teacher would freeze "
            "them in the student; pass copy.deepcopy(teacher)"
        )
