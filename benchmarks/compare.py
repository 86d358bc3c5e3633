"""Has the loss become slower? `python benchmarks/compare.py REV [REV2]` compares a commit with another one, or with the
working tree, on this machine.

Both are built into temporary folders, and a process for each imports its build. The two take turns on every case, A B
and B A, so that what slows the machine down slows both. A turn is some steps (forward and backward, at T = 2), the
first of which does not count, large logits with caches full of other data. Its time is that of the fastest step: what
disturbs a step makes it slower, never faster. Two turns that follow each other give a ratio of times, B / A. Reported
are the medians of times and ratios, and the interval in which the true median of the ratios lies with 99 % confidence,
whatever their distribution.

Where that interval is above 1, B is slower beyond the noise; if the median is above 1 by more than the tolerance as
well, the exit code is 1. What the interval does not know is luck that lasts as long as a process, as where its memory
lies: the tolerance is for that.

Exit codes: 0 no case is slower by more than the tolerance, 1 some are, 2 the two could not be compared.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import importlib.util
import json
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> Any:
    """A file of this tree's package, by its path: the package itself is another build's, or is not installed."""
    spec = importlib.util.spec_from_file_location(f"_compare_{name}", ROOT / "reptile_ext" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


timing, files = load("timing"), load("files")

SHAPES = ((64, 10), (1024, 1000), (256, 32_000), (64, 128_256))
OF_EVERY_DIVERGENCE = (256, 32_000)

TEMPERATURE = 2.0
AT_LEAST, AT_MOST, TURN_NS = 5, 200, 30_000_000  # timed steps of a turn, and no more than AT_LEAST after so long
CONFIDENCE = 0.99
FEWEST_ROUNDS = 4  # of two ratios each: the fewest from which an interval of that confidence follows


class CompareError(Exception):
    """The two cannot be compared; the message says why."""


class Case(NamedTuple):
    divergence: str
    dtype: str
    rows: int
    vocab: int
    inplace: bool

    @property
    def is_large(self) -> bool:
        return bool(self.rows * self.vocab >= timing.LARGE_PAIRS)

    def __str__(self) -> str:
        where = "in place" if self.inplace else "new gradient"
        return f"{self.divergence} {self.dtype} [{self.rows}, {self.vocab}] {where}"


def cases(divergences: Sequence[str], words: Sequence[str] = ()) -> list[Case]:
    """forward_kl at all shapes, the other divergences in place at one; of those the ones whose names have all words."""
    of_forward_kl = [
        Case("forward_kl", dtype, *shape, inplace)
        for dtype in timing.DTYPES
        for shape in SHAPES
        for inplace in (True, False)
    ]
    of_others = [Case(d, dtype, *OF_EVERY_DIVERGENCE, True) for dtype in timing.DTYPES for d in divergences]
    found = dict.fromkeys(of_forward_kl + of_others)
    return [case for case in found if all(word in str(case) for word in words)]


# ------------------------------------------------------------------------------------------- a side: the child process
# Of its build it knows `reptile_ext.distillation_loss` alone: anything else another commit may lack or name otherwise.


def serve(site: Path, requests: TextIO, replies: TextIO) -> None:
    """Say what the build in `site` can do; then time a turn of each case that comes in, until no more do."""
    from reptile_ext import distillation_loss

    verify(site)
    print(json.dumps(known_divergences(distillation_loss)), file=replies, flush=True)
    for line in requests:
        ns, loss = turn(Case(*json.loads(line)), distillation_loss)
        print(json.dumps({"ns": ns, "loss": loss}), file=replies, flush=True)


def verify(site: Path) -> None:
    """Everything of the package that this process has loaded comes from `site`, or the figures would be another's."""
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "reptile_ext"}
    files = [*torch.ops.loaded_libraries, *(module.__file__ for module in modules.values())]
    others = [file for file in files if file is None or not Path(file).resolve().is_relative_to(site.resolve())]
    if others:
        raise SystemExit(f"the build in {site} was to be imported, and {others[0]} was")


def known_divergences(loss_of: Callable[..., Tensor]) -> list[str]:
    """Those that `distillation_loss` names when it is asked for one that does not exist."""
    logits = torch.zeros(2, 3)
    try:
        loss_of(logits, logits, divergence="?")
    except TypeError:  # a commit from before that keyword
        return ["forward_kl"]
    except ValueError as error:
        return re.findall(r"'(\w+)'", str(error))
    raise SystemExit("distillation_loss accepts divergence='?'")


@functools.cache
def logits_of(dtype: str) -> Any:
    """Memory for the logits of all cases of a dtype, the same in both processes."""
    return timing.Logits(dtype, max(n * v for n, v in SHAPES))


def turn(case: Case, loss_of: Callable[..., Tensor]) -> tuple[int, float]:
    """Nanoseconds of the fastest timed step, and the loss."""
    student, teacher, buffer = logits_of(case.dtype).of_shape(case.rows, case.vocab)
    leaf = student.detach().requires_grad_()
    others = [teacher]
    keywords: dict[str, Any] = {"temperature": TEMPERATURE, "inplace": case.inplace}
    if case.divergence != "forward_kl":
        keywords["divergence"] = case.divergence
        if timing.needs_labels(loss_of, case.divergence):
            others.append(torch.arange(case.rows) % case.vocab)

    def setup() -> Tensor:
        leaf.grad = None
        logits: Tensor = timing.produced(buffer.copy_(student)) if case.inplace else leaf
        if case.is_large:
            timing.flush_caches()
        return logits

    def step(logits: Tensor) -> Tensor:
        loss = loss_of(logits, *others, **keywords)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    contender = timing.Contender(str(case), setup, step)
    loss = contender.run()
    times = timing.Stopwatch().in_a_row(contender, least=AT_LEAST, most=AT_MOST, enough_ns=TURN_NS)
    return min(times), loss.item()


# ----------------------------------------------------------------------------------------------- building and comparing


class Side:
    """A process that times the build in `site`."""

    def __init__(self, name: str, site: Path) -> None:
        self.name = name
        # -S: no .pth files, whose hooks of editable installs come before PYTHONPATH. A session of its own: Ctrl-C is
        # for the parent, which ends both.
        self._process = subprocess.Popen(
            [sys.executable, "-S", __file__, "--serve", str(site)],
            env={
                **os.environ,
                "PYTHONSAFEPATH": "1",
                "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)]),
            },
            cwd=site,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            self.divergences: list[str] = self._read()  # the first thing it says
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError), self._process as process:  # of a request that nobody read
            process.kill()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CompareError(f"the process of {self.name} ended with {self._process.wait()}; it said why above")
        return json.loads(line)

    def time(self, case: Case) -> tuple[int, float]:
        """Nanoseconds and loss of a turn."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is nothing to read
            self._process.stdin.write(json.dumps(case) + "\n")
            self._process.stdin.flush()
        reply = self._read()
        return reply["ns"], reply["loss"]


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise CompareError(f"{' '.join(command)}: {result.stderr.strip()}")
    return result.stdout.strip()


@contextlib.contextmanager
def checkout(revision: str | None, folder: Path) -> Iterator[Path]:
    """A worktree of a commit in `folder`, for as long as it is needed; without a revision the one we are in."""
    if revision is None:
        yield ROOT
        return
    try:
        git("worktree", "add", "--quiet", "--detach", str(folder), revision)
        yield folder
    finally:
        with contextlib.suppress(CompareError):  # it was not even added
            git("worktree", "remove", "--force", str(folder))


def describe(revision: str | None) -> str:
    if revision is None:
        return f"working tree of {git('describe', '--always', '--dirty', '--abbrev=8')}"
    return git("log", "-1", "--format=%h %s", f"{revision}^{{commit}}", "--")


def build(revision: str | None, work: Path, name: str) -> Path:
    """A folder with the package as of a revision, built with this Python."""
    site = work / f"site-{name}"
    with checkout(revision, work / f"tree-{name}") as tree:
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", f"--target={site}"]
        # The CPU's kernels are what is compared; a commit that knows no such option ignores it.
        command += ["--config-settings=cmake.define.REPTILE_EXT_CUDA=off"]
        command += [f"--config-settings=build-dir={work / f'build-{name}'}", str(tree)]
        result = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise CompareError(f"{name} does not build:\n{result.stdout}")
    return site


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """Where the true median lies with `CONFIDENCE`; of too few values, anywhere.

    Each value is below the true median with probability ½, so how many are follows Binomial(n, ½).
    """
    n, k, tail = len(values), 0, 0.0
    while (tail := tail + math.comb(n, k) / 2**n) <= (1 - CONFIDENCE) / 2:
        k += 1
    ordered = sorted(values)
    return (ordered[k - 1], ordered[n - k]) if k else (0.0, math.inf)


class Comparison(NamedTuple):
    """One case; `turns` are nanoseconds of A and B in turns that followed each other."""

    case: Case
    turns: list[tuple[int, int]]
    losses: tuple[float, float]

    @property
    def ms(self) -> tuple[float, float]:
        a, b = (statistics.median(times) / 1e6 for times in zip(*self.turns, strict=True))
        return a, b

    @property
    def ratio(self) -> float:
        return statistics.median(b / a for a, b in self.turns)

    @property
    def interval(self) -> tuple[float, float]:
        return interval_of_median([b / a for a, b in self.turns])

    def verdict(self, tolerance: float) -> str:
        low, high = self.interval
        if low > 1:
            return "SLOWER" if self.ratio > 1 + tolerance else "slower"
        return "faster" if high < 1 else "-"

    def as_json(self, tolerance: float) -> dict[str, Any]:
        return {
            **self.case._asdict(),
            "ms": self.ms,
            "ratio": self.ratio,
            "interval": self.interval,
            "verdict": self.verdict(tolerance),
            "losses": self.losses,
            "turns_ns": self.turns,
        }


def compare(a: Any, b: Any, chosen: Sequence[Case], rounds: int, progress: TextIO) -> list[Comparison]:
    """Time all cases on sides `a` and `b`, `rounds` times over, two turns of each side each time."""
    turns: dict[Case, list[tuple[int, int]]] = {case: [] for case in chosen}
    losses: dict[Case, tuple[float, float]] = {}
    for round_ in range(rounds):
        print(f"round {round_ + 1} of {rounds}", file=progress, flush=True)
        for case in chosen:
            for first, second in ((a, b), (b, a)):
                found = {side: side.time(case) for side in (first, second)}
                (ns_a, loss_a), (ns_b, loss_b) = found[a], found[b]
                turns[case].append((ns_a, ns_b))
                losses[case] = loss_a, loss_b
    return [Comparison(case, turns[case], losses[case]) for case in chosen]


def report(results: Sequence[Comparison], tolerance: float) -> str:
    """A table and what follows from it."""
    wide = max(len(str(r.case)) for r in results)
    lines = [f"{'case':{wide}} {'A ms':>9} {'B ms':>9} {'B / A':>7} {f'{CONFIDENCE:.0%}':>15}"]
    for r in results:
        a, b = r.ms
        between = f"{r.interval[0]:.3f} - {r.interval[1]:.3f}"
        verdict = r.verdict(tolerance)
        if not math.isclose(*r.losses, rel_tol=1e-3):
            verdict += f"  computes another loss: {r.losses[0]:.6g}, now {r.losses[1]:.6g}"
        lines.append(f"{r.case!s:{wide}} {a:9.4g} {b:9.4g} {r.ratio:7.3f} {between:>15} {verdict}")
    lines.append("")
    for verdict, words in (
        ("SLOWER", f"slower beyond the noise, and by more than {tolerance:.0%}"),
        ("slower", f"slower beyond the noise, by no more than {tolerance:.0%}"),
        ("faster", "faster beyond the noise"),
        ("-", "no difference beyond the noise"),
    ):
        if found := [r for r in results if r.verdict(tolerance) == verdict]:
            lines.append(f"{len(found)} of {len(results)} cases: {words}")
    return "\n".join(lines)


def run(o: argparse.Namespace) -> int:
    names = [describe(o.revision), describe(o.other)]
    for letter, name in zip("AB", names, strict=True):
        print(f"{letter}: {name}")
    with contextlib.ExitStack() as stack:
        work = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="reptile-compare-", ignore_cleanup_errors=True))
        )
        sites = []
        for letter, revision in (("A", o.revision), ("B", o.other)):
            print(f"building {letter}", file=sys.stderr, flush=True)
            sites.append(build(revision, work, letter))
        a, b = (
            stack.enter_context(contextlib.closing(Side(letter, site)))
            for letter, site in zip("AB", sites, strict=True)
        )
        chosen = cases([d for d in a.divergences if d in b.divergences], o.cases)
        if not chosen:
            raise CompareError(
                f"no case has all of {o.cases} in its name; there are:\n" + "\n".join(map(str, cases(a.divergences)))
            )
        results = compare(a, b, chosen, o.rounds, sys.stderr)
    print(report(results, o.tolerance))
    if o.json is not None:
        document = {
            "A": names[0],
            "B": names[1],
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": platform.platform(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "rounds": o.rounds,
            "tolerance": o.tolerance,
            "confidence": CONFIDENCE,
            "results": [r.as_json(o.tolerance) for r in results],
        }
        files.write_json(o.json, document)
        print(f"wrote {o.json}")
    return int(any(r.verdict(o.tolerance) == "SLOWER" for r in results))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("revision", metavar="REV", help="the commit to compare with")
    parser.add_argument("other", metavar="REV2", nargs="?", help="the other commit (default: the working tree)")
    parser.add_argument(
        "--cases", nargs="+", default=[], metavar="WORD", help="only those with all words in their name"
    )
    parser.add_argument("--rounds", type=int, default=10, help="of two turns of each side (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=0.05, help="a share of the time (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    o = parser.parse_args(argv)
    if o.rounds < FEWEST_ROUNDS:
        parser.error(f"--rounds must be at least {FEWEST_ROUNDS}: fewer prove nothing; got {o.rounds}")
    if not 0 <= o.tolerance < math.inf:
        parser.error(f"--tolerance must be a finite number >= 0; got {o.tolerance}")
    try:
        return run(o)
    except CompareError as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]), sys.stdin, sys.stdout)
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: clean up
        sys.exit(main())
