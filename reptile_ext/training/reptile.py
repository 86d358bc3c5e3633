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
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
    send_to_device,
    set_seed,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ..cache import TeacherCache
from ..files import write_atomically
from .batches import Batch, is_empty
from .checkpoint import Log, find_checkpoint, load_checkpoint, save_checkpoint, writing_to
from .costs import measure_fused_linear
from .data import DataState, Sampler, check_data, random_state, set_random_state
from .each_teacher import by_teacher
from .guards import (
    Unchanged,
    check_apart,
    check_finite,
    check_precision,
    check_trainable,
    make_accelerator,
    naming_unused_parameters,
    stays_where_it_is,
)
from .metrics import Evaluation, FirstClass, check_metrics
from .modes import being_trained, frozen, in_mode
from .objective import Objective, Teacher, check_keywords
from .on_policy import OnPolicy
from .schedules import SCHEDULES, as_function, share_of_rate
from .until import Progress, Result, Until
from .weights import copy_state, put_state, save_weights

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
IDLE_STEPS = 10  # steps in a row without a row that counts, or skipped by float16's scaler, before a word is said


class Reptile:
    """Trains `student` to match `teacher`.

    Arguments:
        student, teacher: modules that take the same inputs and return logits: a tensor [..., V], or an object with
            `.logits`. The teacher gets no gradient, runs in eval mode, is in no checkpoint, and after `fit` has the
            modes and `requires_grad` it came with. It may be any function that returns logits, several in a list (with
            `teacher_weights`) or, by name, in a dict, of which each sample may have its own: a batch that is a mapping
            says which, a number or a name for each sample, under "teacher". "batch": every batch has its
            answers; or a `TeacherCache`, which has them on disk: every batch says by "sample_id" which (docs/cache.md,
            "In training"); one of kind "hidden" needs
            `fused_linear`, and pays where the K likeliest classes hold too little of the mass and the teacher's head is
            small beside the student. `teacher=None` trains the student on the labels alone with the same loop: how a
            teacher comes to be, and the baseline to compare with. Models are moved to the device, but those that are
            quantised, offloaded or spread over devices: they are used where they are. A student in train mode keeps its
            parts' modes; one in eval mode is trained in train mode, all but frozen parts (without a parameter that
            wants a gradient).
        metrics: what `evaluate` measures, names from `METRICS`.
        optimizer: makes an optimizer from parameters; default AdamW with `learning_rate` and `weight_decay`.
        schedule: "constant", "linear" or "cosine" (the last two fall to 0 at `until.steps`), after a linear warm-up
            of `warmup` steps; or a function from an optimizer to an LRScheduler that is stepped once a step. The rate
            of a step depends on its number and on `until` alone: a run that is resumed for longer has, from there on,
            the rates of a run planned for the longer time. A scheduler of your own goes on as it was saved.
        precision: "float32", or autocast to "bfloat16" or "float16" (with loss scaling).
        accumulate: micro-batches a step. The loss is divided by the number of rows that count in all of them, on all
            processes, so that k micro-batches of any sizes give the gradient of one batch.
        clip: largest norm of the gradient, or None.
        shift_labels: labels are a causal language model's input ids; use the next one at each position. False: they
            are already the next ones. None, the default: as the student's own loss does (see `Objective`).
        dim: the class dimension of the logits.
        seed: of Python, NumPy and torch at the start of `fit`; None leaves them.
        fused_linear: never have the logits of a step in full: the loss takes hidden states and heads, as
            `reptile_ext.linear_distillation_loss`. It is the same training, to rounding;
            `measure_fused_linear` says what it saves. The student must have `get_output_embeddings()`, as Hugging
            Face's language models do, that returns the `torch.nn.Linear` its logits come from; a teacher that has
            none gives its logits. Softcap and scale are read from the models' configs. A model that does anything
            else to its logits is an error when it is first run. `evaluate` makes the logits of 512 rows at a time.
        binary: one logit a sample, [B] or [B, 1], or many labels, [B, L], each a distribution of its own: the loss is
            `reptile_ext.binary_distillation_loss`, whose keywords are `loss` then, and labels are numbers from 0 to 1.
            accuracy counts elements, f1 and average_precision are means over labels. See `Objective`.
        find_unused_parameters: for several processes: let parameters go without a gradient in a step.
        on_policy: with this probability, from 0 to 1, or a schedule as temperature has it, such as "linear:0->1", a
            micro-batch has its prompts alone and the student's own completions of them; the loss is then the
            divergence over the sampled tokens, with no hard_weight. See docs/training.md, "On-policy distillation".
        generate: keywords of transformers' `generate` for it, `max_new_tokens` among them.
        teacher_head, teacher_weights, teacher_inputs, student_inputs, auxiliary: see `Objective`.
        loss: keywords of `reptile_ext.distillation_loss`: temperature, hard_weight, ignore_index, inplace, …; with
            `fused_linear`, memory_budget too, and no inplace; with a cache of log-probabilities, those of
            `sparse_distillation_loss`. temperature and hard_weight may be schedules: a function
            of the number of steps done, or "linear:4->1" or "cosine:4->1" from the first step to `until.steps`.

    A batch is a tensor, a pair (inputs, labels), a triple (inputs, labels, sample_weight) or a mapping passed to the
    models as keywords, but for "labels", "sample_weight", "teacher_logits", "teacher_inputs", "student_inputs",
    "sample_id" and "teacher_rows", and "teacher" where there are several. See `Objective`. A step
    without a row that counts is none: it changes nothing and is not counted.

    With torchrun or accelerate launch, the processes share each step. Data are the same in all of them and are shared
    out; dropout is not the same.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | Sequence[Teacher] | Mapping[str, Teacher] | TeacherCache | str | None,
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
        shift_labels: bool | None = None,
        dim: int = -1,
        seed: int | None = 0,
        fused_linear: bool = False,
        binary: bool = False,
        find_unused_parameters: bool = False,
        on_policy: float | str | Callable[[int], float] = 0.0,
        generate: Mapping[str, Any] | None = None,
        teacher_head: Any = None,
        teacher_weights: Sequence[float] | None = None,
        teacher_inputs: Callable[[Any], Any] | None = None,
        student_inputs: Callable[[Any], Any] | None = None,
        auxiliary: Mapping[str, float] | None = None,
        inplace: bool | None = None,
        **loss: Any,
    ) -> None:
        check_keywords(Reptile, loss)
        metrics = (metrics,) if isinstance(metrics, str) else tuple(metrics)
        check_metrics(metrics, teacher is not None, binary)
        if isinstance(schedule, str) and schedule not in SCHEDULES:
            raise ValueError(
                f"schedule must be a function or one of {', '.join(map(repr, SCHEDULES))}; got {schedule!r}"
            )
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(map(repr, PRECISIONS))}; got {precision!r}")
        for name, number, least in (("accumulate", accumulate, 1), ("warmup", warmup, 0)):
            if not isinstance(number, int) or number < least:
                raise ValueError(f"{name} must be a whole number of at least {least}; got {number!r}")
        for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be finite and at least 0; got {value!r}")
        if clip is not None and not clip > 0:
            raise ValueError(f"clip must be positive, or None; got {clip!r}")
        self._schedules = {
            name: loss[name]
            for name in ("temperature", "hard_weight")
            if callable(loss.get(name)) or isinstance(loss.get(name), str)
        }
        if "temperature" in self._schedules and isinstance(teacher, TeacherCache):
            raise ValueError(
                f"temperature: the teacher's answers in {teacher.folder} were written at {teacher.temperature:g} and "
                "cannot be had at another: it may be no schedule"
            )
        loss |= {name: as_function(name, of, 1)(0) for name, of in self._schedules.items()}
        self.objective = Objective(
            student,
            teacher,
            teacher_head=teacher_head,
            teacher_weights=teacher_weights,
            teacher_inputs=teacher_inputs,
            student_inputs=student_inputs,
            dim=dim,
            shift_labels=shift_labels,
            auxiliary=auxiliary,
            fused_linear=fused_linear,
            binary=binary,
            autocast=PRECISIONS[precision],
            inplace=inplace,
            **loss,
        )
        # A constant is a schedule too; what a function returns is checked at each step.
        self._on_policy = on_policy if callable(on_policy) or isinstance(on_policy, str) else None
        first = on_policy if self._on_policy is None else as_function("on_policy", on_policy, 1)(0)
        self._share_on_policy = _check_share(first)
        samples = self._on_policy is not None or self._share_on_policy > 0
        if generate is not None and not samples:
            raise ValueError("generate is for the completions of on_policy; got it with on_policy=0")
        self._sampling = OnPolicy(self.objective, generate) if samples else None
        check_trainable(student)
        check_precision(student, precision)
        for one in self.objective.teachers:
            if isinstance(one, nn.Module):
                check_apart(student, one)
        self.accelerator = make_accelerator(find_unused_parameters)
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"Accelerate is set to mixed_precision={self.accelerator.mixed_precision!r}, which would copy the "
                "logits to float32: set it to 'no' and pass precision= to Reptile"
            )
        self.student, self.teacher = student, teacher
        for model in (student, *self.objective.teachers):
            if isinstance(model, nn.Module) and not stays_where_it_is(model):
                model.to(self.accelerator.device)
        self.metrics = metrics
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
        until: Until | int,
        eval_every: int = 100,
        checkpoint_every: int = 100,
        log_every: int = 10,
        folder: str | Path | None = None,
        resume: bool | Literal["last_good"] = False,
        progress_bar: bool = True,
        callback: Callable[[dict[str, Any]], object] | None = None,
    ) -> Result:
        """Train until good enough.

        train, eval: anything that yields micro-batches and can be read again for the next pass (a DataLoader, a list).
            Loader, data set and samplers that have `set_epoch` are told the number of each pass, 0, 1, 2, …
        until: a number is that of steps.
        eval_every, checkpoint_every, log_every: in steps. There is an evaluation and a checkpoint at the end, too.
        folder: gets `metrics.jsonl` and `checkpoints/`; None writes nothing.
        resume: go on from the folder's newest checkpoint, to the same weights, bit for bit on CPU, as a run that was
            never stopped. Data that make this impossible are warned of before the first step. See docs/training.md.
            "last_good": from the newest whose files are whole, with a warning if that is not the newest.
        callback: called after each step in the main process with its step, epochs, seconds, rows, lr, loss (a tensor:
            reading it waits for the device) and, where there was an evaluation, eval, for a tracker of your own.

        Raises ValueError for conditions that cannot be measured and for a damaged checkpoint, FileExistsError for a
        folder that holds a run when `resume` is False, RuntimeError for a folder that another run is writing to,
        OSError if it cannot be written to, FloatingPointError if the loss is not finite; the last good checkpoint
        stays in place.
        """
        if isinstance(until, int) and not isinstance(until, bool):
            until = Until(steps=until)
        if not isinstance(until, Until):
            raise TypeError(f"until must be an Until, such as Until(steps=1000), or a number of steps; got {until!r}")
        check_data("train", train)
        if eval is not None:
            check_data("eval", eval)
        if eval is train and getattr(train, "persistent_workers", False):
            raise ValueError(
                "train and eval are the same loader, whose persistent workers can read one pass at a time: an "
                "evaluation would end the pass that is trained on. Pass two loaders"
            )
        until.check_measured(self.metrics, eval is not None)
        if self._schedules and until.metric == "loss" and (until.target is not None or until.patience is not None):
            raise ValueError(
                f"a schedule of {' and '.join(self._schedules)} changes what loss means from step to step: give "
                "until.target and until.patience another metric"
            )
        for name, steps in {
            "eval_every": eval_every,
            "checkpoint_every": checkpoint_every,
            "log_every": log_every,
        }.items():
            if steps < 1:
                raise ValueError(f"{name} must be at least 1; got {steps!r}")
        folder = None if folder is None else Path(folder)
        writes = folder is not None and self.accelerator.is_main_process
        with writing_to(cast("Path", folder), self.student) if writes else contextlib.nullcontext():
            result = self._fit(
                train, eval, until, eval_every, checkpoint_every, log_every, folder, resume, progress_bar, callback
            )
            self.accelerator.wait_for_everyone()  # nobody looks for files that are still being written
        return result

    def _fit(
        self,
        train: Iterable[Any],
        eval: Iterable[Any] | None,
        until: Until,
        eval_every: int,
        checkpoint_every: int,
        log_every: int,
        folder: Path | None,
        resume: bool | Literal["last_good"],
        progress_bar: bool,
        callback: Callable[[dict[str, Any]], object] | None,
    ) -> Result:
        accelerator, objective = self.accelerator, self.objective
        checkpoint = self._find_checkpoint(folder, resume)
        if checkpoint is not None and not resume:
            raise FileExistsError(
                f"{folder} holds a run at step {int(checkpoint.name)}: pass resume=True, or another folder"
            )

        # 1. Initialise: random numbers, student, optimizer, schedule; or all of it from a checkpoint.
        sampler = self._sample(train, until)
        if folder is not None and sampler.problems:
            warnings.warn(f"this run cannot be resumed exactly: {'; '.join(sampler.problems)}", stacklevel=2)
        if self.seed is not None:
            set_seed(self.seed, device_specific=True)  # other dropout in each process
        total = self._steps_of(until, train)
        model = accelerator.prepare(self.student)
        optimizer = self.make_optimizer([p for p in model.parameters() if p.requires_grad])
        scheduler = self._make_scheduler(optimizer, total)
        scaler = torch.amp.GradScaler(accelerator.device.type, enabled=self.precision == "float16")
        schedules = {name: as_function(name, of, total) for name, of in self._schedules.items()}
        on_policy = None if self._on_policy is None else as_function("on_policy", self._on_policy, total)
        best: dict[str, Any] = {}  # the best student so far, kept only where patience will ask for it back
        progress, log_position = Progress(), 0
        if checkpoint is not None:
            state, best = load_checkpoint(checkpoint, self.student)
            progress, log_position = Progress(**state["progress"]), state["log"]
            optimizer.load_state_dict(state["optimizer"])
            self._resume_schedule(scheduler, optimizer, state["scheduler"])
            scaler.load_state_dict(state["scaler"])
            sampler.load_state_dict(state["sampler"])
            self._resume_random_numbers(state["random"])
            if until.patience is not None and (not best or state.get("metric", until.metric) != until.metric):
                # So far nobody kept the best student, or another one was: patience begins here.
                best, progress.best_metrics, progress.stale = {}, {}, 0
        if schedules:  # also for who evaluates after a run that was at its end already
            objective.set_keywords(**{name: of(progress.step) for name, of in schedules.items()})
        writes = folder is not None and accelerator.is_main_process
        log = Log(folder / "metrics.jsonl" if folder is not None and writes else None, log_position)
        bar = tqdm(
            total=until.steps,
            initial=progress.step,
            unit="step",
            disable=not (progress_bar and accelerator.is_main_process),
        )
        earlier, started = (progress.rows, progress.seconds), time.perf_counter() - progress.seconds
        idle, skipped, last_pass = 0, 0, sampler.passes
        reason = until.reason_to_stop(progress)

        with bar, frozen(objective.teachers), being_trained(self.student):
            while reason is None:
                if schedules:
                    objective.set_keywords(**{name: of(progress.step) for name, of in schedules.items()})
                # 2. Sample the micro-batches of a step, and count the rows of all before the loss of any is divided.
                if on_policy is not None:
                    self._share_on_policy = _check_share(on_policy(progress.step))
                window = [part for batch in sampler.take(self.accumulate) for part in self._parts(batch)]
                reduce = self._sum_over_processes if accelerator.num_processes > 1 else None
                num_items: Any = objective.count(window, reduce).tolist()  # on the host, where the batches are
                stepped = (num_items[-1] if isinstance(num_items, list) else num_items) > 0
                loss, rows = torch.zeros((), device=accelerator.device), cast("float | Tensor", 0.0)
                if stepped:
                    if accelerator.num_processes == 1:  # several wait for each other at each micro-batch
                        window = [batch for batch in window if not is_empty(batch.inputs)]
                    guard = None if progress.step or idle else Unchanged(objective.teachers, self.student)
                    for taken, batch in enumerate(map(self.on_device, window), start=1):
                        # Gradients of several processes meet in the last backward.
                        alone = accelerator.no_sync(model) if taken < len(window) else contextlib.nullcontext()
                        with alone, naming_unused_parameters():
                            # 3. Both forwards, to logits or, for fused_linear, hidden states. The teacher's keeps no
                            # graph.
                            own = objective.for_batch(batch)
                            outputs = own.student_outputs(model, batch)
                            teacher_outputs = own.teacher_outputs(batch)
                            # 4. Loss: what these rows add to the mean over all rows of the step.
                            rows = own.num_rows(outputs, batch, num_items)
                            share = own.loss(outputs, teacher_outputs, batch, rows, overwrite=True)
                            del outputs, teacher_outputs
                            # 5. Backward. DDP averages what is already divided by a count over all processes: undo it.
                            scaler.scale(share * accelerator.num_processes).backward()
                        loss += share.detach()
                    scaler.unscale_(optimizer)
                    if self.clip is not None:
                        accelerator.clip_grad_norm_(model.parameters(), self.clip)
                    scale = scaler.get_scale()
                    scaler.step(optimizer)
                    scaler.update()
                    stepped = scaler.get_scale() >= scale  # else float16 overflowed, and the optimizer did nothing
                    skipped = 0 if stepped else skipped + 1
                    if guard is not None:
                        guard.check()
                    if stepped:
                        scheduler.step()
                    optimizer.zero_grad()
                    if skipped == 100:
                        raise FloatingPointError(
                            f"float16 overflowed in {skipped} steps in a row after step {progress.step}: use bfloat16"
                        )
                    idle, last_pass = 0, sampler.passes
                else:
                    idle += 1
                    self._say_idle(idle, sampler.passes - last_pass)

                # 6. Repeat until good enough.
                progress.step += int(stepped)
                progress.seconds = time.perf_counter() - started
                progress.epochs = sampler.passes
                progress.rows += int(rows) if stepped else 0
                reason = until.reason_to_stop(progress)
                evaluates = eval is not None and (reason is not None or (stepped and progress.step % eval_every == 0))
                saves = reason is not None or (stepped and progress.step % checkpoint_every == 0)
                learning_rate = optimizer.param_groups[0]["lr"]
                if stepped and (evaluates or saves or progress.step % log_every == 0):
                    value = float(accelerator.reduce(loss, "sum"))
                    if not math.isfinite(value):
                        raise FloatingPointError(
                            f"the loss is {value} at step {progress.step}: lower learning_rate or set clip"
                        )
                    if evaluates or saves:
                        check_finite(self.student, progress.step)
                    rate = (progress.rows - earlier[0]) / (progress.seconds - earlier[1])
                    log.write(
                        step=progress.step, seconds=progress.seconds, rows=progress.rows, loss=value, lr=learning_rate
                    )
                    shown = {name: f"{metric:.4g}" for name, metric in progress.metrics.items() if name != "loss"}
                    bar.set_postfix({"loss": f"{value:.4g}", **shown, "rows/s": f"{rate:.0f}"}, refresh=False)
                bar.update(int(stepped))
                if evaluates:
                    assert eval is not None
                    is_best = progress.evaluated(self.evaluate(eval), until.metric)
                    log.write(step=progress.step, seconds=progress.seconds, eval=progress.metrics)
                    if is_best and until.patience is not None:
                        best = copy_state(self.student)
                    reason = reason or until.reason_to_stop(progress)
                    saves = saves or reason is not None
                if callback is not None and stepped:
                    total_loss = accelerator.reduce(loss, "sum")
                    values = dataclasses.asdict(progress) | {"loss": total_loss, "lr": learning_rate}
                    known = ("step", "epochs", "seconds", "rows", "loss", "lr")
                    if accelerator.is_main_process:
                        callback(
                            {name: values[name] for name in known} | ({"eval": progress.metrics} if evaluates else {})
                        )
                if saves and folder is not None:
                    numbers = gather_object([random_state()])
                    if writes:
                        state = {
                            "progress": dataclasses.asdict(progress),
                            "optimizer": optimizer.state_dict(),
                            "scheduler": scheduler.state_dict(),
                            "scaler": scaler.state_dict(),
                            "sampler": sampler.state_dict(),
                            "random": numbers,
                            "metric": until.metric,
                            "log": log.position,
                        }
                        save_checkpoint(folder, progress.step, self.student, best, state)

        metrics = progress.metrics
        if best:
            put_state(self.student, best)
            metrics = progress.best_metrics
        if folder is not None and writes:
            write_atomically(folder / "student.safetensors", lambda path: save_weights(path, self.student))
        return Result(progress.step, progress.seconds, progress.rows, reason, metrics)

    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """The loss and `metrics` of the student over all of `data`, each counted row with the same weight, or its own.

        Leaves the random numbers, and what the data draw on, as they were. With several processes, each one evaluates
        all of the data.
        """
        check_data("eval", data)
        objective = self.objective
        evaluation = Evaluation(self.metrics, objective.ignore_index, self.accelerator.device, objective.binary)
        random_numbers, put_data_back = random_state(), DataState("eval", data).hold()
        with torch.no_grad(), frozen(objective.teachers), in_mode(self.student, training=False):
            for batch in (self.on_device(part) for found in data for part in self.objective.parts(found)):
                objective = self.objective.for_batch(batch)
                if is_empty(batch.inputs):
                    continue
                outputs = objective.student_outputs(self.student, batch)
                teacher_outputs = objective.teacher_outputs(batch)
                for logits, teacher_logits, part in objective.logits_in_parts(outputs, teacher_outputs, batch):
                    rows = objective.counted_rows(logits, part)
                    loss = objective.loss_of_logits(logits, teacher_logits, part, rows)
                    answer = self._answer(teacher_logits, logits.shape[-1])
                    evaluation.update(loss, float(rows), logits, answer, part.labels, part.weight)
        set_random_state(random_numbers)
        put_data_back()
        return evaluation.compute()

    def evaluate_teacher(self, data: Iterable[Any]) -> dict[str, float]:
        """The `metrics` of labels (all but "loss" and "agreement"), of what the teacher says of `data`.

        Raises ValueError for a teacher that is None or a cache: there are no logits to measure."""
        objective = self.objective
        if self.teacher is None or objective.cache is not None:
            raise ValueError("evaluate_teacher needs a teacher that is a model or a function")
        check_data("eval", data)
        names = tuple(name for name in self.metrics if name not in ("loss", "agreement"))
        evaluation = Evaluation(names, objective.ignore_index, self.accelerator.device, objective.binary)
        random_numbers, put_data_back = random_state(), DataState("eval", data).hold()
        with torch.no_grad(), frozen(objective.teachers), in_mode(self.student, training=False):
            for batch in (self.on_device(part) for found in data for part in self.objective.parts(found)):
                objective = self.objective.for_batch(batch)
                if is_empty(batch.inputs):
                    continue
                outputs = objective.student_outputs(self.student, batch)  # which say the rows
                teacher_outputs = objective.teacher_outputs(batch)
                for logits, teacher_logits, part in objective.logits_in_parts(outputs, teacher_outputs, batch):
                    rows = objective.counted_rows(logits, part)
                    answer = self._answer(teacher_logits, logits.shape[-1])
                    assert isinstance(answer, Tensor)
                    if len(teacher_logits) > 1:  # probabilities
                        answer = answer.clamp(min=torch.finfo(answer.dtype).tiny).log()
                    evaluation.update(torch.zeros(()), float(rows), answer, None, part.labels, part.weight)
        set_random_state(random_numbers)
        put_data_back()
        return {name: value for name, value in evaluation.compute().items() if name != "loss"}

    def _answer(self, teacher_logits: Sequence[Tensor], classes: int) -> Tensor | FirstClass | None:
        """What the teachers say together: the weighted mean of their probabilities; of K classes, which is first."""
        if self.objective.cache is not None and len(teacher_logits) == 2:
            indices, log_probs = teacher_logits
            return FirstClass.of(indices, log_probs, self.objective.shared_classes(classes))
        if len(teacher_logits) < 2:
            return teacher_logits[0] if teacher_logits else None
        weights = self.objective.teacher_weights
        if self.objective.binary:
            probability = sum(w * x.float().sigmoid() for w, x in zip(weights, teacher_logits, strict=True))
            return probability - 0.5  # type: ignore[return-value]  # as a logit: positive where the answer is yes
        classes = min(x.shape[-1] for x in teacher_logits)
        return sum(w * x[..., :classes].float().softmax(-1) for w, x in zip(weights, teacher_logits, strict=True))  # type: ignore[return-value]

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
        batch = self.objective.with_fused_linear(True).split(batch)  # which counts rows while the batch is on the host
        return measure_fused_linear(self.objective, self.on_device(batch), repeats)

    def on_device(self, batch: Batch) -> Batch:
        return Batch(*(send_to_device(part, self.accelerator.device) for part in batch))

    def _parts(self, batch: Any) -> list[Batch]:
        """A micro-batch in its parts, with completions of the student's in its share of them. A share of 0 draws no
        random number."""
        sampling, objective = self._sampling, self.objective
        if sampling is None or not self._share_on_policy or float(torch.rand(())) >= self._share_on_policy:
            found = objective.parts(batch)
        elif not objective.has_choice:
            found = [sampling.sample(batch)]
        else:
            parts = by_teacher(batch, objective.teacher_names, len(objective.teachers))
            found = [sampling.sample(part)._replace(of_teacher=i) for i, part in parts]
        if self.accelerator.num_processes > 1 and found[0].of_teacher is not None:
            raise ValueError(
                "a teacher for each sample is for one process; got several, which would wait for each other"
            )
        return found

    def _sum_over_processes(self, count: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(count, "sum")
        return total

    def _find_checkpoint(self, folder: Path | None, resume: bool | str) -> Path | None:
        """What the main process finds; if that is an error, all raise it, so that nobody waits for somebody."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                found = [find_checkpoint(folder, resume)]
            except ValueError as error:
                found = [error]
        broadcast_object_list(found)
        if isinstance(found[0], ValueError):
            raise found[0]
        return cast("Path | None", found[0])

    def _sample(self, train: Iterable[Any], until: Until) -> Sampler:
        """The micro-batches of this process; their random numbers are the same in all processes."""
        accelerator = self.accelerator
        seed = [int(torch.randint(2**31, ())) if self.seed is None else self.seed]
        data, share = train, (0, 1)
        if accelerator.num_processes > 1:
            broadcast_object_list(seed)
            if isinstance(train, DataLoader) and getattr(train.batch_sampler, "batch_size", None) is not None:
                data = accelerator.prepare_data_loader(train, device_placement=False)
            else:  # which Accelerate cannot share out
                share = accelerator.process_index, accelerator.num_processes
        return Sampler(data, seed=(seed[0] + 0x5EED) % 2**32, look_ahead=until.epochs is not None, share=share)

    def _steps_of(self, until: Until, train: Iterable[Any]) -> int | None:
        """How many steps a run will have that only steps or epochs end; None if that cannot be told."""
        found = [] if until.steps is None else [until.steps]
        if until.epochs is not None:
            with contextlib.suppress(TypeError):
                batches = math.ceil(len(train) / self.accelerator.num_processes)  # type: ignore[arg-type]
                found.append(math.ceil(batches / self.accumulate) * until.epochs)
        return min(found, default=None)

    def _say_idle(self, idle: int, passes: int) -> None:
        ignored = f"no row that counts (labels other than ignore_index={self.objective.ignore_index}, weights above 0)"
        if passes >= 2:
            raise ValueError(f"train must have rows to learn from; got a whole pass with {ignored}")
        if idle == IDLE_STEPS:
            warnings.warn(f"{idle} steps in a row have {ignored}, and change nothing", stacklevel=3)

    def _make_scheduler(self, optimizer: Optimizer, total: int | None) -> LRScheduler:
        if not isinstance(self.schedule, str):
            return self.schedule(optimizer)
        if self.schedule != "constant" and total is None:
            raise ValueError(
                f"schedule={self.schedule!r} falls to 0 at until.steps; got until.steps=None"
                " and no epochs of a known length"
            )
        self._share_of_rate = functools.partial(share_of_rate, self.schedule, self.warmup, total)
        return LambdaLR(optimizer, self._share_of_rate)

    def _resume_schedule(self, scheduler: LRScheduler, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Go on at the saved step: with the rates that are planned now, but for a scheduler of the user's own."""
        if not isinstance(self.schedule, str):
            scheduler.load_state_dict(state)
            return
        step = state["last_epoch"]
        scheduler.last_epoch, scheduler._step_count = step, state["_step_count"]
        for group, base in zip(optimizer.param_groups, scheduler.base_lrs, strict=True):
            group["initial_lr"] = base
            group["lr"] = base * self._share_of_rate(step)
        scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _resume_random_numbers(self, numbers: list[dict[str, Any]]) -> None:
        own, processes = self.accelerator.process_index, self.accelerator.num_processes
        if len(numbers) == processes:
            set_random_state(numbers[own])
        else:
            warnings.warn(
                f"the run was stopped with {len(numbers)} processes and goes on with {processes}: not to the same bits",
                stacklevel=3,
            )


def _check_share(share: Any) -> float:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
        raise ValueError(f"on_policy must be a probability, from 0 to 1, or a schedule of it; got {share!r}")
    return float(share)
