"""The command line: reptile distill | evaluate | benchmark | cache-teacher | cache-import | cache-info | doctor.

`doctor` has to work where nothing else does, so that this module imports only the standard library; each command
imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import inspect
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ._version import __version__
from .words import did_you_mean

USAGE = """usage: reptile <command> [options]

  distill [recipe]   train a teacher, distil it into a student, compare with the student alone (default: code-lm)
  evaluate <folder>  metrics of the distilled student of a run folder, on what was held out or on --data
  generate <folder> <text>  what the student of a run on texts writes, or says of a text
  export <folder>    that student as an ONNX file or a program of torch.export
  benchmark          time the fused loss against eager PyTorch and torch.compile on this machine
  cache-teacher <model> <file>  keep on disk what a Hugging Face model says of the texts in files, to distil from
  cache-teacher [recipe]  the same of a recipe's teacher, which is trained first, for distill --cache
  cache-import <folder> <file>  a teacher cache from the log-probabilities of a server or a data set
  cache-info <folder>  what a teacher cache is of, what it holds and how exact it is; --verify reads it all
  doctor             say what is installed, whether the kernels load, and what to do if not

reptile <command> --help says more; reptile --version says which version this is.
REPTILE_TRACEBACK=1 in the environment shows where in the program an error comes from.
"""

# What can go wrong with data, disk and memory. Anything else is a mistake of this program and keeps its traceback.
_FAILURES = (ArithmeticError, EOFError, ImportError, MemoryError, OSError, RuntimeError, TypeError, ValueError)

# What PyTorch's and our RuntimeErrors say where there is no memory left.
_NO_MEMORY = ("not enough memory", "out of memory", "allocate memory")


# The names of the recipes, known without the extra that they need.
_RECIPES = ("code-lm", "digits", "language-model", "text-classification", "translation")


class CommandError(Exception):
    """Something the user can put right; the message says what."""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(allow_abbrev=False, **keywords)

    def error(self, message: str) -> NoReturn:
        if message.endswith("expected one argument"):
            message += " (a value that begins with a minus goes in as --flag=-value)"
        raise CommandError(message)

    def read(self, argv: list[str]) -> argparse.Namespace:
        options, unknown = self.parse_known_args(argv)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), "")
            nearest = did_you_mean(flag.split("=")[0], self._option_string_actions)
            self.error(f"unrecognized arguments: {' '.join(unknown)}{nearest}")
        return options


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return the exit code: 0 fine, 1 it failed, 2 the command line, a file of settings or the data they
    ask for is wrong, 130 stopped by Ctrl-C."""
    command, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    commands: dict[str, Callable[[list[str]], int]] = {
        "distill": distill,
        "evaluate": evaluate,
        "generate": generate,
        "export": export,
        "benchmark": benchmark,
        "cache-teacher": cache_teacher,
        "cache-import": cache_import,
        "cache-info": cache_info,
        "doctor": doctor,
    }
    if command in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if command in ("-V", "--version"):
        print(f"reptile_ext {__version__}")
        return 0
    if command not in commands:
        known = f"known: {', '.join(commands)}"
        print(f"reptile: unknown command {command!r}; {known}{did_you_mean(command, commands)}", file=sys.stderr)
        return 2
    try:
        return commands[command](rest)
    except KeyboardInterrupt as stopped:
        print(f"reptile {command}: stopped{stopped}", file=sys.stderr)
        return 130
    except Exception as error:
        ours = isinstance(error, CommandError)
        kind = type(error).__name__
        damaged = kind in ("EOFError", "SafetensorError", "UnpicklingError")
        traceback = os.environ.get("REPTILE_TRACEBACK", "0") not in ("", "0")
        if traceback or not (ours or damaged or isinstance(error, _FAILURES)):
            raise
        words = " ".join(str(error).split("Exception raised from")[0].split())  # without PyTorch's C++ stack
        if damaged:
            words = f"a file is damaged or cut short ({kind}: {words.split('. ')[0]})"
        elif not ours and not isinstance(error, (FloatingPointError, ImportError, TypeError, ValueError)):
            words = f"{kind}: {words}"
        if isinstance(error, MemoryError) or any(what in words for what in _NO_MEMORY):
            words += " (smaller batches and models need less memory)"
        print(f"reptile {command}: {words}", file=sys.stderr)
        return 2 if ours or isinstance(error, (TypeError, ValueError)) else 1


def distill(argv: list[str]) -> int:
    """Train a teacher, distil it into a student, and compare with the same student trained without a teacher."""

    def add_flags(parser: _Parser) -> None:
        parser.add_argument(
            "--fractions",
            type=float,
            nargs="+",
            metavar="SHARE",
            help="few-data curves: run it with each of these shares of the students' training samples",
        )
        parser.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help="of these runs (default: 0 1 2)")

    recipes = _recipes()
    name, recipe, settings, options, folder = _recipe_to_run(
        "distill", argv, distill.__doc__, "runs/RECIPE-TIME", add_flags
    )
    recipes.check(settings)  # before there is a folder
    shares = _fractions(options, folder, recipes.RECORD)
    if options.resume is None:
        _make_empty(folder)
        _write_toml(folder / "config.toml", {"recipe": name, **settings.model_dump(exclude_none=True)})
    print(f"recipe {name}, run folder {folder}", flush=True)
    bars = not options.quiet and sys.stderr.isatty()
    try:
        if shares is not None:
            recipes.run_fractions(recipe, settings, folder, *shares, progress_bar=bars)
            print(f"\nIn {folder}: {recipes.RECORD}, fractions.png, and a run folder for each share and seed")
            return 0
        report = recipes.run(recipe, settings, folder, progress_bar=bars)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"; go on with `reptile distill --resume {shlex.quote(str(folder))}`") from None
    except Exception:
        if options.resume is None:
            _remove_untrained(folder)
        raise
    files = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file()))
    print(f"\n{report['minutes']:.1f} minutes. In {folder}: {files}")
    return 0


def _fractions(options: argparse.Namespace, folder: Path, record: str) -> tuple[list[float], list[int]] | None:
    """The shares and seeds of few-data curves; None for one run."""
    if options.resume is not None:
        if not (folder / record).is_file():
            return None
        begun = json.loads((folder / record).read_text(encoding="utf-8"))
        return begun["fractions"], begun["seeds"]
    if options.fractions is None:
        if options.seeds is not None:
            raise CommandError("--seeds is for --fractions; --seed is that of one run")
        return None
    seeds = [0, 1, 2] if options.seeds is None else options.seeds
    for share in options.fractions:
        if not 0 < share <= 1:
            raise CommandError(f"--fractions must be above 0 and at most 1; got {share:g}")
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise CommandError(f"--seeds must be from 0 to {2**32 - 1}; got {seed}")
    for flag, values in (("--fractions", options.fractions), ("--seeds", seeds)):
        if len(set(values)) < len(values):
            raise CommandError(f"{flag} must differ; got {' '.join(map(str, values))}")
    return options.fractions, seeds


def evaluate(argv: list[str]) -> int:
    """Print the metrics of a run folder's distilled student, as JSON: on the data held out, or on other files."""
    parser = _Parser(prog="reptile evaluate", description=evaluate.__doc__)
    parser.add_argument("folder", type=_path, help="run folder of `reptile distill`")
    parser.add_argument("--data", nargs="+", metavar="FILE", default=(), help="of the kind of those it was trained on")
    o = parser.read(argv)
    for name in o.data:
        if not Path(name).exists() or not name:
            raise CommandError(f"--data must name files, or a folder that datasets saved; there is no {name!r}")
    recipe, settings = _finished_run(o.folder)
    print(json.dumps(_recipes().evaluate(recipe, settings, o.folder, o.data)))
    return 0


def generate(argv: list[str]) -> int:
    """Print what the student of a run on texts makes of a text: a language model its continuation, a classifier its
    labels with their probabilities, a translator its translation."""
    parser = _Parser(prog="reptile generate", description=generate.__doc__)
    parser.add_argument("folder", type=_path, help="run folder of `reptile distill`")
    parser.add_argument("texts", nargs="*", metavar="text", help="default: the lines of standard input")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--temperature", type=float, help="sample at this temperature (default: the likeliest tokens)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default: 0)")
    o = parser.read(argv)
    recipe, _ = _finished_run(o.folder)
    if recipe.task is None:
        raise CommandError(f"generate is for runs on texts; {o.folder} is another one")
    if o.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1; got {o.max_new_tokens}")
    if o.temperature is not None and not 0 < o.temperature < float("inf"):
        parser.error(f"--temperature must be a positive number; got {o.temperature}")
    options: dict[str, Any] = {"max_new_tokens": o.max_new_tokens, "do_sample": o.temperature is not None}
    if o.temperature is not None:
        options["temperature"] = o.temperature
    import torch

    from .families.text import use

    torch.manual_seed(o.seed)
    texts = o.texts or [line.rstrip("\n") for line in sys.stdin]
    if not any(text.strip() for text in texts):
        raise CommandError("text must not be empty; got nothing to go on from")
    for answer in use.answers(o.folder, recipe.task, texts, **options):
        print(answer, flush=True)
    return 0


def export(argv: list[str]) -> int:
    """Write the student of a run on texts for other programs, and compare what is written with the student."""
    parser = _Parser(prog="reptile export", description=export.__doc__)
    parser.add_argument("folder", type=_path, help="run folder of `reptile distill`")
    parser.add_argument("--to", default="onnx", help="onnx or torch-export (default: onnx)")
    parser.add_argument("--out", type=_path, metavar="FILE", help="default: student.onnx or student.pt2 in the folder")
    o = parser.read(argv)
    recipe, _ = _finished_run(o.folder)
    if recipe.task is None:
        raise CommandError(f"export is for runs on texts; {o.folder} is another one")
    from .export import export_model
    from .families.text import use

    student = use.saved_student(o.folder, recipe.task)
    path = o.out or o.folder / ("student.onnx" if o.to == "onnx" else "student.pt2")
    print(json.dumps(export_model(student, use.example_inputs(o.folder, recipe.task), path, o.to)))
    return 0


def _finished_run(folder: Path) -> tuple[Any, Any]:
    """Recipe and settings of a run folder that has a student."""
    values = _read_run(folder, "folder")
    recipe = _recipe(values.pop("recipe", None))
    settings = _checked(recipe.settings, values, folder / "config.toml")
    if not any((folder / name).exists() for name in ("student.safetensors", "model.safetensors")):
        raise CommandError(f"{folder} has no student yet: finish the run with `reptile distill --resume {folder}`")
    return recipe, settings


def benchmark(argv: list[str]) -> int:
    """Time the fused loss against eager PyTorch and torch.compile on this machine."""
    parser = _Parser(prog="reptile benchmark", description=benchmark.__doc__)
    from . import benchmark as benchmark_module
    from .benchmark import training

    parser.add_argument(
        "--training", action="store_true", help="whole steps: two models' forward, loss, backward and optimizer"
    )
    parser.add_argument("--sizes", nargs="+", help=f"of models, with --training (default: {' '.join(training.SIZES)})")
    parser.add_argument("--tokens", type=int, help=f"in a step, with --training (default: {training.TOKENS})")
    parser.add_argument("--shapes", choices=benchmark_module.SHAPES, help="set of shapes (default: default)")
    parser.add_argument("--dtypes", nargs="+", help="default: float32 bfloat16; float32 with --training")
    parser.add_argument(
        "--divergences",
        nargs="+",
        metavar="NAME",
        help="all, or some of them (default: forward_kl, and where it has targets reverse_kl and jsd)",
    )
    parser.add_argument("--repeats", type=int, help="measurements of each case (default: 7; 5 with --training)")
    parser.add_argument("--threads", type=int, help="default: what torch uses")
    parser.add_argument("--vocab", type=int, nargs="+", help="only these vocabulary sizes")
    parser.add_argument("--pairs", type=float, help="student-teacher logit pairs in a case, rows × vocabulary")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes its time")
    parser.add_argument(
        "--out",
        type=_path,
        metavar="FOLDER",
        default=Path("runs") / f"benchmark-{datetime.datetime.now():%Y%m%d-%H%M%S}",
        help="where benchmark.json and benchmark.png go (default: %(default)s)",
    )
    o = parser.read(argv)
    of_either = {"of_losses": ("shapes", "pairs", "divergences"), "of_training": ("sizes", "tokens")}
    for name in of_either["of_losses" if o.training else "of_training"]:
        if getattr(o, name) is not None:
            parser.error(f"--{name} has no meaning {'with' if o.training else 'without'} --training")
    names = ("vocab", "dtypes", "repeats", "threads", *of_either["of_training" if o.training else "of_losses"])
    given = {name: getattr(o, name) for name in names}
    options: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    run = training.run if o.training else benchmark_module.run
    check = training.check if o.training else benchmark_module.check
    defaults = {name: p.default for name, p in inspect.signature(run).parameters.items()}
    check(**{name: options.get(name, defaults[name]) for name in inspect.signature(check).parameters})
    _make_folder(o.out)
    return run(**options, compile=not o.no_compile, out=o.out / "benchmark.json", plot=o.out / "benchmark.png")


def cache_teacher(argv: list[str]) -> int:
    """Train a recipe's teacher, and keep its answers to what the students see and what is held out on disk, in a
    teacher cache: for `reptile distill --cache FOLDER`. (Of a Hugging Face model: `reptile cache-teacher MODEL FILE …
    --help`.)"""
    if _is_of_model(argv):
        return _cache_model(argv)

    def add_flags(parser: _Parser) -> None:
        parser.add_argument(
            "--kind", choices=("sampled", "top_k"), help="drawn or likeliest classes (default: sampled)"
        )
        parser.add_argument("--k", type=int, help="classes kept of each position, 1 to 4096 (default: 64)")

    recipes = _recipes()
    name, recipe, settings, options, folder = _recipe_to_run(
        "cache-teacher", argv, cache_teacher.__doc__, "runs/cache-RECIPE-TIME", add_flags, inside="teacher"
    )
    own = folder / "teacher"  # the teacher's own run folder, beside the rows
    kept = _read_toml(own / "cache.toml") if options.resume is not None and (own / "cache.toml").is_file() else {}
    k = kept.get("k", 64) if options.k is None else options.k
    kind = options.kind or kept.get("kind", "sampled")
    if not 1 <= k <= 4096:
        raise CommandError(f"--k must be from 1 to 4096; got {k}")
    if getattr(settings, "cache", None) is not None:
        raise CommandError(f"--cache is for `reptile distill`; the folder to write is --out; got {settings.cache}")
    if options.resume is None:
        _make_empty(folder)
        _make_folder(own)
        _write_toml(own / "config.toml", {"recipe": name, **settings.model_dump(exclude_none=True)})
        _write_toml(own / "cache.toml", {"kind": kind, "k": k})
    print(f"recipe {name}, cache folder {folder}", flush=True)
    bars = not options.quiet and sys.stderr.isatty()
    try:
        info = recipes.cache_teacher(recipe, settings, folder, kind, k, progress_bar=bars)
    except KeyboardInterrupt:
        again = f"reptile cache-teacher --resume {shlex.quote(str(folder))}"
        raise KeyboardInterrupt(f"; go on with `{again}`") from None
    except Exception:
        if options.resume is None:
            _remove_untrained(own, folder)
        raise
    print(
        f"{info['samples']:,} samples, {info['rows']:,} positions, {info['bytes'] / 1e6:.1f} MB, "
        f"{info['bytes_per_entry']:.2f} bytes an entry"
        + ("" if kind == "sampled" else f"; {k} classes hold {info['captured_mass']:.3f} of the mass")
        + "\n"
        f"`reptile distill --config {shlex.quote(str(own / 'config.toml'))} --cache {shlex.quote(str(folder))}` "
        "distils from it with the same settings"
    )
    return 0


def _is_of_model(argv: list[str]) -> bool:
    """Whether `cache-teacher` has been given a model and files, or their cache to go on with, and not a recipe."""
    if argv and not argv[0].startswith("-"):
        # A word that is neither is a recipe with a mistake in it, unless a file follows.
        is_path = "/" in argv[0] or Path(argv[0]).exists()
        return argv[0] not in _RECIPES and (is_path or any(Path(word).exists() for word in argv[1:]))
    early = _Parser(prog="reptile cache-teacher", add_help=False)
    early.add_argument("--resume", type=_path)
    folder: Path | None = early.parse_known_args(argv)[0].resume
    if folder is not None:
        return (folder / "teacher" / "model.json").is_file()
    return any(Path(word, "config.json").is_file() for word in argv)  # flags came first


def _cache_model(argv: list[str]) -> int:
    """Keep on disk what a Hugging Face causal language model says of the texts in files, in a teacher cache."""
    parser = _Parser(prog="reptile cache-teacher", description=_cache_model.__doc__)
    add = parser.add_argument
    add("model", nargs="?", help="folder as save_pretrained writes it, or a name on the hub")
    add("files", nargs="*", metavar="file", help=".jsonl, .parquet or .txt, also compressed (.gz, .bz2, .xz, .zst)")
    add("--out", type=_path, metavar="FOLDER", help="where to write (default: runs/cache-TIME)")
    add("--resume", type=_path, metavar="FOLDER", help="go on with what was stopped: no other option is needed")
    add("--kind", help="top_k, sampled, or hidden: the states that go into the head (default: top_k)")
    add("--k", type=int, help="classes kept of each position, 1 to 4096 (default: 64)")
    add("--temperature", type=float, help="of the softmax (default: 1)")
    add("--max-kl", type=float, help="nats that coding may cost a position (default: 0.001)")
    add("--seed", type=int, help="of --kind sampled (default: 0)")
    add("--text-column", metavar="NAME", help="default: text")
    add("--id-column", metavar="NAME", help="of the samples' ids (default: the number of the record, from 0)")
    add("--sample-by", help="what a sample of plain text is: line, paragraph, document (default: line)")
    add("--tokenizer", type=_path, metavar="FOLDER", help="default: the model's")
    add("--max-length", type=int, help="tokens kept of a sample (default: the model's context)")
    add("--batch-tokens", type=int, default=4096, help="that go through the model at once (default: 4096)")
    add("--dtype", help="auto, float32, bfloat16 or float16 (default: auto, the checkpoint's)")
    add("--device", help="default: this process's GPU, else cpu")
    add("--allow-pickle", action="store_true", default=None, help="read weights that are no safetensors, too")
    add("--no-save-tokens", dest="save_tokens", action="store_false", default=None, help="leave the token ids out")
    add("--quiet", action="store_true", help="no progress bar")
    options = vars(parser.read(argv))
    out, resume, quiet = (options.pop(name) for name in ("out", "resume", "quiet"))
    if out is not None and resume is not None:
        parser.error("--out and --resume are both folders to write to: give one")
    if resume is None and not options["files"]:
        parser.error(f"a model needs files of texts, MODEL FILE …; got {options['model'] or 'neither'} alone")
    options["files"] = options["files"] or None
    folder = resume or out or Path("runs") / f"cache-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    is_first = os.environ.get("RANK", "0") == "0"
    from .cache import cache_model

    again = f"reptile cache-teacher --resume {shlex.quote(str(folder))}"
    try:
        done = cache_model(
            folder, **options, resume=resume is not None, progress_bar=is_first and not quiet and sys.stderr.isatty()
        )
    except KeyboardInterrupt:
        begun = (folder / "teacher" / "model.json").is_file()
        raise KeyboardInterrupt(f"; go on with `{again}`" if begun else "; nothing was written") from None
    left_out = {
        "empty": done["empty"],
        "without a token": done["without_tokens"],
        "already there": done["there_before"],
    }
    print(
        f"{done['samples']:,} samples, {done['tokens']:,} tokens, {done['tokens_per_second']:,.0f} tokens/s"
        + (f", rank {done['rank']} of {done['world_size']}" if done["world_size"] > 1 else "")
        + "".join(f"; {number:,} {what}" for what, number in left_out.items() if number)
        + (f"; {done['truncated']:,} cut to {done['max_length']:,} tokens" if done["truncated"] else "")
    )
    if "cache" not in done:
        print(f"{folder}: the other processes are at work, or stopped (go on with `{again}` in all of them)")
        return 0
    info = done["cache"]
    print(
        f"{folder}: {info['samples']:,} samples, {info['rows']:,} positions, {info['bytes'] / 1e6:.1f} MB"
        + (f"; {info['k']} classes hold {info['captured_mass']:.3f} of the mass" if info["kind"] == "top_k" else "")
    )
    return 0


def cache_import(argv: list[str]) -> int:
    """Make a teacher cache from the log-probabilities that a server or a data set has written; print what it found, as
    JSON. docs/cache.md has the formats."""
    parser = _Parser(prog="reptile cache-import", description=cache_import.__doc__)
    add = parser.add_argument
    add("folder", type=_path, help="of the cache: a new one, or with --resume one that was stopped")
    add("files", nargs="+", metavar="file", help=".jsonl, .jsonl.gz, .parquet, or - for standard input")
    add("--k", type=int, required=True, help="the most log-probabilities that a position keeps")
    add("--vocab-size", type=int, required=True, help="number of the teacher's classes")
    add("--format", choices=("server", "columns"), default="server", help="server: vLLM, OpenAI, SGLang (default)")
    add(
        "--align",
        choices=("next", "own", "last"),
        help="with --format columns: row t is of the token after token t (next), of token t itself (own), or the rows "
        "are of the last tokens themselves (last)",
    )
    add("--tokenizer", type=_path, metavar="FOLDER", help="with a tokenizer.json: tokens are compared with it")
    add("--id", metavar="KEY", help="of the sample's id (default: the number of the line, from 1)")
    add("--tokens", metavar="KEY", help="of the token ids: the prompt's, or with --format columns all (input_ids)")
    add("--text", metavar="KEY", help="of the same as a text, to compare or in the place of the ids")
    add("--ids", metavar="KEY", help="with --format columns (default: target_token_ids)")
    add("--log-probs", metavar="KEY", help="with --format columns (default: target_logprobs)")
    add("--temperature", type=float, default=1.0, help="at which they were made (default: 1; nothing is computed)")
    add("--teacher", metavar="NAME", help="or a hash, to be asked for when the cache is opened")
    add("--data", metavar="NAME", help="likewise")
    add("--max-kl", type=float, default=1e-3, help="nats that coding may cost a position (default: 0.001)")
    add("--rank", type=int, default=0, help="of several writers with files of their own (default: 0)")
    add("--world-size", type=int, default=1, help="how many there are (default: 1)")
    add("--resume", action="store_true", help="go on: what is in the folder is not read again")
    add("--quiet", action="store_true", help="no progress bar")
    options = vars(parser.read(argv))
    bar = not options.pop("quiet") and sys.stderr.isatty()
    from .cache import import_rows

    try:
        found = import_rows(**options, progress_bar=bar)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("; go on with --resume, the rest as it was") from None
    print(json.dumps(found, indent=2))
    return 0


def cache_info(argv: list[str]) -> int:
    """Print what a teacher cache is of, what it holds and how exact it is, as JSON."""
    parser = _Parser(prog="reptile cache-info", description=cache_info.__doc__)
    parser.add_argument("folder", type=_path, help="folder of `TeacherCache.write`")
    parser.add_argument("--verify", action="store_true", help="read every file and compare its checksum")
    parser.add_argument(
        "--plot", type=_path, metavar="FILE", help="PNG of captured mass and entropy, position by position"
    )
    parser.add_argument(
        "--samples", type=int, default=1000, help="how many samples these are taken from (default: 1000)"
    )
    parser.add_argument(
        "--examples", type=int, default=0, metavar="N", help="show N positions: text, likeliest classes"
    )
    parser.add_argument("--tokenizer", type=_path, metavar="FOLDER", help="of the examples (default: ids)")
    o = parser.read(argv)
    if o.samples < 1:
        parser.error(f"--samples must be at least 1; got {o.samples}")
    if o.examples < 0:
        parser.error(f"--examples must be at least 0; got {o.examples}")
    if o.tokenizer is not None and not o.examples:
        parser.error("--tokenizer is for --examples N")
    from .cache import TeacherCache, report

    cache = TeacherCache.open(o.folder)
    if o.verify:
        cache.verify()
    found = cache.info() | report.of_rows(cache, o.samples, o.plot)
    if o.examples:
        found["examples"] = report.examples(cache, o.examples, o.tokenizer)
    print(json.dumps(found, indent=2, ensure_ascii=False))
    return 0


def doctor(argv: list[str]) -> int:
    """Say what is installed and whether the kernels load. Exit code 0 if they do, 1 if not."""
    _Parser(prog="reptile doctor", description=doctor.__doc__).read(argv)
    problems: list[str] = []

    def show(what: str, value: object) -> None:
        print(f"{what:<34}{value}")

    show("python", f"{platform.python_version()} ({platform.python_implementation()}, {sys.executable})")
    show("machine", f"{platform.machine()}, {platform.system()}, {os.cpu_count()} cores")
    for package in ("torch", "numpy"):
        show(package, _version(package) or "not installed")
    try:
        import torch
    except Exception as error:  # whatever stops it: this command reports
        show("torch loads", f"no: {error}")
        problems.append("torch does not load: pip install 'torch>=2.10'")
        torch = None  # type: ignore[assignment]
    if torch is not None:
        show("threads", f"{torch.get_num_threads()} (torch.set_num_threads, OMP_NUM_THREADS)")
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        show("CUDA", ", ".join(names) if names else f"none (torch built for CUDA: {torch.version.cuda or 'no'})")
        try:
            import reptile_ext
            import reptile_ext.ops
        except Exception as error:
            show("kernels load", "no")
            problems.append(str(error))
        else:
            show("reptile_ext", reptile_ext.__version__)
            show("kernels load", f"yes, from {Path(reptile_ext.__file__).parent}")
            problems += _examine_kernels(torch, reptile_ext, show)
    for extra, packages in _EXTRAS.items():
        missing = [package for package in packages if _version(package) is None]
        state = (
            "installed" if not missing else f"not installed ({', '.join(missing)}): pip install 'reptile_ext[{extra}]'"
        )
        show(f"extra {extra}", state)
    for problem in problems:
        print(f"\nWrong: {problem}")
    print("\nAll is well." if not problems else "")
    return 1 if problems else 0


# Distributions whose absence means that the extra is not installed.
_EXTRAS = {
    "text": ("babel", "peft", "sacrebleu", "transformers", "datasets"),
    "export": ("onnx", "onnxruntime", "onnxscript"),
    "cache": ("datasets", "pyarrow", "safetensors", "tokenizers", "tqdm", "transformers"),
    "train": (
        "accelerate",
        "filelock",
        "matplotlib",
        "pydantic-settings",
        "safetensors",
        "scikit-learn",
        "tokenizers",
        "torchmetrics",
        "tqdm",
    ),
}


def _examine_kernels(torch: Any, reptile_ext: Any, show: Callable[[str, object], None]) -> list[str]:
    """Show what the compiled parts say of themselves, and compute one loss; return what is wrong."""
    problems = []
    try:
        from reptile_ext import _C

        for title, of in (("built", _C.build_info()), ("this processor", _C.cpu_info())):
            for key, value in of.items():
                show(f"{title}: {key}", ", ".join(value) if isinstance(value, (list, tuple)) else value)
    except Exception as error:
        problems.append(
            f"reptile_ext._C does not load ({error}): reinstall with `pip install --force-reinstall --no-deps .`"
        )
    chosen = os.environ.get("REPTILE_EXT_CPU")
    try:
        from reptile_ext import ops

        show("instruction set", ops.instruction_set() + (f" (REPTILE_EXT_CPU={chosen})" if chosen else ""))
        said, is_wrong = ops.cuda_state()
        show("CUDA kernels", said)
        if is_wrong:
            problems.append(f"tensors on a GPU have no kernels: {said}")
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            student = torch.linspace(-2, 2, 48, device=device).reshape(3, 16).requires_grad_()
            teacher = student.detach().flip(-1).contiguous()
            loss = reptile_ext.distillation_loss(student, teacher)
            loss.backward()
            wanted = reptile_ext.reference.distillation_loss(student.detach(), teacher)
            if not torch.allclose(loss.detach(), wanted, rtol=1e-5):
                found = f"{loss.item()} where plain PyTorch gets {wanted.item()}"
                problems.append(f"the kernel on {device} computes {found}: please report it")
    except Exception as error:
        hint = f" (REPTILE_EXT_CPU={chosen} is set: try without)" if chosen else ""
        problems.append(f"the kernels do not run: {error}{hint}")
    return problems


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _recipe_to_run(
    command: str,
    argv: list[str],
    description: str | None,
    default: str,
    add_flags: Callable[[_Parser], None] = lambda parser: None,
    inside: str = "",
) -> tuple[str, Any, Any, argparse.Namespace, Path]:
    """Name, recipe, settings, other options and folder of a command that takes a recipe. Its folder has the settings in
    config.toml, in the folder `inside` it where one is named."""
    # The recipe decides which flags there are, so it is looked for first: the first word, or a key of the file.
    early = _Parser(prog=f"reptile {command}", add_help=False)
    early.add_argument("--config", type=_path)
    early.add_argument("--resume", type=_path)
    known, rest = early.parse_known_args(argv)
    given = bool(argv) and not argv[0].startswith("-")
    if known.resume is not None and (known.config is not None or given or set(rest) - {"--quiet"}):
        raise CommandError("--resume takes recipe and settings from the folder: only --quiet goes with it")
    path, values = known.config, {}
    if known.resume is not None:
        path = known.resume / inside / "config.toml"
        values = _read_run(known.resume / inside, "--resume", command)
    elif path is not None:
        values = _read_toml(path)
    name = values.pop("recipe", "code-lm")
    if given:
        name, argv = argv[0], argv[1:]
    recipe = _recipe(name)

    parser = _Parser(
        prog=f"reptile {command} {name}",
        description=description,
        epilog=f"Recipes: {', '.join(_RECIPES)}; `reptile {command} RECIPE --help` shows one's settings.",
    )
    parser.add_argument("--config", type=_path, metavar="FILE", help="TOML file of settings; flags win over it")
    parser.add_argument("--out", type=_path, metavar="FOLDER", help=f"where to write (default: {default})")
    parser.add_argument("--resume", type=_path, metavar="FOLDER", help="go on with the stopped run in this folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    add_flags(parser)
    settings, options = _settings(recipe.settings, values, parser, argv, path)
    time = f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = options.resume or options.out or Path(default.replace("RECIPE", name).replace("TIME", time))
    return name, recipe, settings, options, folder


def _make_empty(folder: Path) -> None:
    _make_folder(folder)
    if any(folder.iterdir()):
        raise CommandError(f"{folder} is not empty: choose another --out, or go on with it by --resume {folder}")


def _remove_untrained(folder: Path, *around: Path) -> None:
    """Delete a run folder, and those around it, in which nothing has been trained: the same --out must do for the next
    attempt."""
    if all(path.is_file() for path in folder.iterdir()):
        for file in folder.iterdir():
            file.unlink()
        with contextlib.suppress(OSError):
            for one in (folder, *around):
                one.rmdir()


def _recipes() -> Any:
    """The module of the recipes, or a sentence on the extra that it needs."""
    from .training import recipes

    return recipes


def _recipe(name: Any) -> Any:
    recipes = _recipes()
    if not isinstance(name, str) or name not in recipes.NAMES:
        nearest = did_you_mean(str(name), recipes.NAMES)
        raise CommandError(f"recipe must be one of {', '.join(recipes.NAMES)}; got {name!r}{nearest}")
    return recipes.recipe(name)


def _path(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("wanted a path; got ''")
    return Path(text)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise CommandError(f"--out must be a folder; got {folder}, which is a file") from None
    except OSError as error:
        raise CommandError(f"--out must be a folder that can be made; got {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise CommandError(f"--out must be a folder that can be written to; got {folder}")


def _read_run(folder: Path, name: str, command: str = "distill") -> dict[str, Any]:
    """The settings that a run wrote down."""
    if not (folder / "config.toml").is_file():
        why = "which has no config.toml" if folder.is_dir() else "which is no folder"
        raise CommandError(f"{name} must be the run folder of a `reptile {command}`; got {folder}, {why}")
    return _read_toml(folder / "config.toml")


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CommandError(f"--config must be a file; there is no {path}") from None
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # no TOML, or no UTF-8
        raise CommandError(f"{path} is no TOML file: {error}") from error


def _write_toml(path: Path, values: dict[str, Any]) -> None:
    """Numbers, strings and booleans are written alike in TOML and JSON."""
    from .files import write_atomically

    text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in values.items())
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _settings(
    kind: Any, values: dict[str, Any], parser: _Parser, argv: list[str], path: Path | None
) -> tuple[Any, argparse.Namespace]:
    """Settings from the file's values and the flags, which win; and the other options. Unknown keys are errors."""
    from pydantic_settings import CliSettingsSource

    source: Any = CliSettingsSource(kind, root_parser=parser)
    options = parser.read(argv)
    return _checked(kind, values, path, options, _cli_settings_source=source(parsed_args=options)), options


def _checked(
    kind: Any, values: dict[str, Any], path: Path | None, flags: argparse.Namespace | None = None, **source: Any
) -> Any:
    """The settings, or what is wrong with them, by the names that the user gave."""
    from pydantic import ValidationError

    try:
        return kind(**source, **values)
    except ValidationError as error:
        wrong = []
        for e in error.errors():
            name, message = ".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")
            if not e["loc"]:  # of settings that do not go together, which its words name
                wrong.append(message)
            elif e["type"] == "extra_forbidden":
                wrong.append(f"{path}: unknown setting {name!r}{did_you_mean(name, kind.model_fields)}")
            else:
                by_flag = hasattr(flags, name)
                place = f"--{name.replace('_', '-')}" if by_flag else f"{path}: {name}"
                said = f" must{message[12:]}" if message.startswith("Input should") else f": {message}"
                wrong.append(f"{place}{said}; got {e['input']!r}")
        raise CommandError("; ".join(wrong)) from error


if __name__ == "__main__":
    sys.exit(main())
