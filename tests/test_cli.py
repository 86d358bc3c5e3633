"""The command line: what it runs, what it writes, what it refuses."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import reptile_ext
from reptile_ext import cli

# digits with everything small, so that a whole run takes a second
TINY = ["--teacher-steps", "60", "--steps", "40", "--eval-every", "20", "--teacher-channels", "8", "--quiet"]


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command line that must be refused with exit code 2; return what it said."""
    try:
        code = cli.main(argv)
    except SystemExit as stop:  # argparse's own refusals
        code = stop.code  # type: ignore[assignment]
    assert code == 2
    return capsys.readouterr().err


def test_digits_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe as shipped: the taught student is better, and the folder holds what is promised."""
    folder = tmp_path / "run"
    assert cli.main(["distill", "digits", "--out", str(folder), "--quiet"]) == 0
    said = capsys.readouterr().out
    for words in (
        "teacher",
        "student, distilled",
        "student, no teacher",
        "macro F1",
        "loss fwd + bwd",
        "training step",
    ):
        assert words in said

    report = json.loads((folder / "report.json").read_text())
    teacher, student, alone = (report["models"][name] for name in ("teacher", "student", "student alone"))
    assert teacher["accuracy"] > 0.96
    assert alone["accuracy"] > 0.7  # the baseline is no straw man
    for metric in ("accuracy", "f1"):
        assert student[metric] > alone[metric] + 0.01
    assert student["cross_entropy"] < alone["cross_entropy"] - 0.05
    assert student["parameters"] == alone["parameters"] < teacher["parameters"] / 10

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert {line["model"] for line in lines} == {"teacher", "student", "student alone"}
    last = [line for line in lines if line["model"] == "student" and "eval" in line][-1]
    assert last["step"] == 800
    assert last["eval"]["accuracy"] == student["accuracy"]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not [path for path in folder.rglob("*") if ".tmp-" in path.name]

    assert cli.main(["evaluate", str(folder)]) == 0
    measured = json.loads(capsys.readouterr().out)
    for metric in ("accuracy", "f1", "cross_entropy"):
        assert measured[metric] == pytest.approx(student[metric], rel=1e-5)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path: Path) -> None:
    import tomllib

    file = tmp_path / "settings.toml"
    file.write_text('recipe = "digits"\nsteps = 30\nteacher_steps = 50\nlearning_rate = 5e-3\n')
    folder = tmp_path / "run"
    argv = ["distill", *TINY[2:], "--config", str(file), "--out", str(folder), "--steps", "20"]
    assert cli.main(argv) == 0
    used = tomllib.loads((folder / "config.toml").read_text())
    assert (used["recipe"], used["steps"], used["teacher_steps"], used["learning_rate"]) == ("digits", 20, 50, 5e-3)
    assert used["transfer_images"] == 50  # the default, written down too

    # What a run wrote is a file of settings, and gives the same run.
    again = tmp_path / "again"
    assert cli.main(["distill", "--quiet", "--config", str(folder / "config.toml"), "--out", str(again)]) == 0
    assert (again / "student.safetensors").read_bytes() == (folder / "student.safetensors").read_bytes()


def test_environment_variables_are_no_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEPS", "7")
    folder = tmp_path / "run"
    assert cli.main(["distill", "digits", *TINY, "--out", str(folder)]) == 0
    assert "steps = 40\n" in (folder / "config.toml").read_text().splitlines(keepends=True)


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    argv = ["distill", "digits", *TINY, "--checkpoint-every", "10"]
    assert cli.main([*argv, "--out", str(whole)]) == 0

    from reptile_ext.training import Reptile

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:  # stopped in the evaluation of the student's 20th step
        evaluate = Reptile.evaluate
        patch.setattr(
            Reptile, "evaluate", lambda self, data: stop() if self.teacher is not None else evaluate(self, data)
        )
        assert cli.main([*argv, "--out", str(broken)]) == 130
    said = capsys.readouterr().err
    assert said.splitlines() == [f"reptile distill: stopped; go on with `reptile distill --resume {broken}`"]
    assert not (broken / "student.safetensors").exists()
    assert "has no student yet: finish the run" in refused(capsys, "evaluate", str(broken))
    assert cli.main(["distill", "--resume", str(broken), "--quiet"]) == 0
    assert (broken / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "settings.toml"
    for text, words in (
        ("stepz = 3\n", f"{file}: unknown setting 'stepz'; did you mean steps?"),
        (
            'steps = "many"\n',
            f"{file}: steps must be a valid integer, unable to parse string as an integer; got 'many'",
        ),
        ("steps = true\n", f"{file}: steps: wanted a number; got True"),
        ("steps = = 3\n", f"{file} is no TOML file: "),
        (
            'recipe = "digit"\n',
            "got 'digit'; did you mean digits?",
        ),
        (
            "recipe = [1]\n",
            "got [1]",
        ),
    ):
        file.write_text(text)
        assert words in refused(capsys, "distill", *(() if "recipe" in text else ("digits",)), "--config", str(file))
    file.write_bytes(b"\xff")
    assert "settings.toml is no TOML file: " in refused(capsys, "distill", "--config", str(file))
    assert f"{tmp_path} cannot be read: " in refused(capsys, "distill", "--config", str(tmp_path))
    for argv, words in (
        ("distill --config none.toml", "--config must be a file; there is no none.toml"),
        ("distill digits --stepz 3", "unrecognized arguments: --stepz 3; did you mean --steps?"),
        (
            "distill digits --teacher_steps=3",
            "unrecognized arguments: --teacher_steps=3; did you mean --teacher-steps?",
        ),
        ("distill digits --steps 0", "--steps must be greater than or equal to 1; got '0'"),
        ("distill digits --temperature -1", "--temperature must be greater than 0; got '-1'"),
        (
            "distill digits --temperature -inf",
            "argument --temperature: expected one argument (a value that begins with",
        ),
        ("distill digits --precision half", "--precision must be 'float32', 'bfloat16' or 'float16'; got 'half'"),
        ("distill digits --divergence kl", "divergence must be one of 'forward_kl', 'reverse_kl'"),
        ("distill digits --divergence tvd --beta 2", "beta has no meaning for divergence='tvd'"),
        ("distill digits --temperature 1e31", "temperature must be a positive number, 1e-30 to 1e30"),
        ("distill digits --transfer-images 1248", "--transfer-images must be less than or equal to 1247; got '1248'"),
        ("distill --inplace true --fused-linear", "inplace has no meaning with fused_linear"),
        ("distill --teacher-heads 3", "teacher_width must be a multiple of teacher_heads; got 128 and 3"),
        ("distill --transfer-tokens 9", "transfer_tokens must be at least length, 64; got 9"),
        ("distill digits --fused-linear", "unrecognized arguments: --fused-linear"),
        (
            "distill digit",
            "got 'digit'; did you mean digits?",
        ),
        (f"distill digits --out {tmp_path}", "is not empty: choose another --out"),
        (f"distill digits --out {file}", f"--out must be a folder; got {file}, which is a file"),
        (f"distill digits --out {file}/run", f"--out must be a folder that can be made; got {file}/run: "),
        (f"benchmark --out {file}", f"--out must be a folder; got {file}, which is a file"),
        (f"distill digits --resume {tmp_path}", "only --quiet goes with it"),
        (
            f"distill --resume {tmp_path}",
            f"--resume must be the run folder of a `reptile distill`; got {tmp_path}, which",
        ),
        (f"evaluate {tmp_path}", f"folder must be the run folder of a `reptile distill`; got {tmp_path}, which has no"),
        ("evaluate", "the following arguments are required: folder"),
        (
            "distil",
            "unknown command 'distil'; known: distill, evaluate, generate, export, benchmark, cache-teacher, "
            "cache-import, cache-info, doctor; did you mean distill?",
        ),
        ("benchmark --repeat 3", "unrecognized arguments: --repeat 3; did you mean --repeats?"),
        ("cache-teacher --k 0", "--k must be from 1 to 4096; got 0"),
        (f"cache-teacher --cache {tmp_path}", "--cache is for `reptile distill`; the folder to write is --out"),
        (f"cache-teacher --resume {tmp_path}", "--resume must be the run folder of a `reptile cache-teacher`; got "),
        ("cache-teacher digits --out run", "recipe: its samples are others in every pass"),
        (
            f"distill --cache {tmp_path} --out run",
            f"cache: {tmp_path} is no teacher cache: {tmp_path}/manifest.json is",
        ),
        ("doctor --verbose", "unrecognized arguments: --verbose"),
    ):
        assert words in refused(capsys, *argv.split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.toml"]


class Trained(BaseException):
    """Everything was accepted and made, and a model computes: what tests raise in the place of its first forward."""


def trained(*_: object, **__: object) -> None:
    raise Trained


def a_little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from reptile_ext.training.recipes import code_lm

    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, json, subprocess)]
    monkeypatch.setattr(code_lm, "standard_library", lambda: (texts[:2], texts[2:]))


# What makes the rest of a command line quick.
SMALL = (
    "--vocabulary 300 --length 16 --transfer-tokens 2000 --held-out-tokens 1000 --teacher-width 16 --student-width 16"
)
COMMANDS = {
    "distill code-lm": SMALL.split(),
    "distill digits": ["--teacher-channels", "8"],
    "cache-teacher code-lm": SMALL.split(),
    "evaluate": [],
    "benchmark": [],
    "doctor": [],
}
NUMBERS = ("-1", "0", "nan", "inf", "-inf", "1e400", "99999999999999999999")


def answer(capsys: pytest.CaptureFixture[str], argv: list[str], name: str) -> str | None:
    """None if the command line is accepted and training would begin; else what is wrong with the refusal, or ""."""
    try:
        code: object = cli.main(argv)
    except Trained:
        capsys.readouterr()
        return None
    except SystemExit as stop:
        code = f"exit {stop.code}"
    except Exception as error:
        code = repr(error)
    said = capsys.readouterr().err
    named = name.lstrip("-").replace("-", "_") in said.replace("-", "_")
    return "" if code == 2 and said.count("\n") == 1 and named else f"{argv}: {code}: {said}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_takes_a_value_or_says_what_is_wrong(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever flags there are: accepted, models and data included, or refused in a line that names the flag, and then
    nothing is left behind."""
    from reptile_ext.training import recipes

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "__call__", trained)
    monkeypatch.setattr("reptile_ext.benchmark.program._measure_and_print", trained)
    a_little_text(monkeypatch)
    parsers: list[argparse.ArgumentParser] = []

    def parser_of(parser: argparse.ArgumentParser, argv: list[str]) -> None:
        parsers.append(parser)
        raise Trained

    with monkeypatch.context() as patch:
        patch.setattr(cli._Parser, "read", parser_of)
        with pytest.raises(Trained):
            cli.main(command.split())
    actions = [action for action in parsers[-1]._actions if action.dest != "help"]
    fields = recipes.recipe(command.split()[1]).settings.model_fields if " " in command else {}
    assert {"--" + name.replace("_", "-") for name in fields} <= {s for a in actions for s in a.option_strings}

    wrong, tried, accepted = [], 0, 0
    for action in actions:
        field = fields.get(action.dest)
        limits = [getattr(m, side, 4096) for m in (field.metadata if field else ()) for side in ("ge", "le")]
        for value in (*NUMBERS, "x", "", *(str(limit) for limit in limits if limit < 4096)):
            given = [f"{flag}={value}" for flag in action.option_strings[:1]] or [value]
            where = ["no-run"] if command == "evaluate" and action.option_strings else []
            found = answer(capsys, [*command.split(), *where, *COMMANDS[command], *given], action.dest)
            tried += 1
            accepted += found is None
            wrong += [found] if found else []
            if found == "":
                assert list(tmp_path.iterdir()) == [], given
            for path in tmp_path.iterdir():
                shutil.rmtree(path)
    assert not wrong, "\n".join(wrong)
    assert accepted < tried or not actions
    needed = [action.dest for action in actions if not action.option_strings]
    assert answer(capsys, [*command.split(), *needed, "--nonsense"], "--nonsense") == ""


@pytest.mark.parametrize("name", ["code-lm", "digits"])
def test_every_setting_of_a_file_is_taken_or_named(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reptile_ext.training import recipes

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.nn.Module, "__call__", trained)
    a_little_text(monkeypatch)
    wrong = []
    for field in recipes.recipe(name).settings.model_fields:
        for value in (*NUMBERS, '"x"', '""', "true", "[1]", "{ a = 1 }", "1979-05-27"):
            (tmp_path / "settings.toml").write_text(f"{field} = {value}\n")
            command = f"distill {name} --config settings.toml --out run".split()
            small = COMMANDS[f"distill {name}"]
            flags = dict(zip(small[::2], small[1::2], strict=True))
            flags.pop("--" + field.replace("_", "-"), None)
            found = answer(capsys, [*command, *itertools.chain(*flags.items())], field)
            wrong += [f"{value} {found}"] if found else []
            shutil.rmtree(tmp_path / "run", ignore_errors=True)
    assert not wrong, "\n".join(wrong)


def test_what_only_the_data_can_say(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before anything is trained; the folder is free for the next attempt."""
    a_little_text(monkeypatch)
    for flags, words in (
        ("--transfer-tokens 99999999", "transfer_tokens must be at most the text's, "),
        ("--held-out-tokens 99999999", "held_out_tokens must be at most the text's, "),
        (
            "--length 999999 --transfer-tokens 999999 --held-out-tokens 999999",
            "length must be below the number of tokens",
        ),
    ):
        assert words in refused(capsys, "distill", *SMALL.split(), *flags.split(), "--out", str(tmp_path / "run"))
        assert not (tmp_path / "run").exists()
    # More memory than any machine has.
    monkeypatch.setattr(torch.nn, "Linear", lambda *_: torch.empty(2**50))
    assert cli.main(["distill", "digits", "--out", str(tmp_path / "run")]) == 1
    assert "(smaller batches and models need less memory)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_failures_are_a_line_and_the_traceback_is_there_for_the_asking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from safetensors import SafetensorError

    from reptile_ext.training import recipes

    def failing(error: BaseException) -> tuple[int, str]:
        def fail(*_: object, **__: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(recipes, "run", fail)
            try:
                code = cli.main(["distill", "digits", "--out", str(tmp_path / "run")])
            finally:
                shutil.rmtree(tmp_path / "run", ignore_errors=True)
        return code, capsys.readouterr().err

    for error, code, words in (
        (ValueError("labels must\nlie in [0, 5)"), 2, "reptile distill: labels must lie in [0, 5)\n"),
        (OSError(28, "No space left on device"), 1, "reptile distill: OSError: [Errno 28] No space left on device\n"),
        (
            RuntimeError("not enough memory: you tried to allocate 9 bytes.\nException raised from x\nframe #0"),
            1,
            "reptile distill: RuntimeError: not enough memory: you tried to allocate 9 bytes. "
            "(smaller batches and models need less memory)\n",
        ),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "(smaller batches and models need less memory)\n"),
        (
            SafetensorError("too small"),
            1,
            "reptile distill: a file is damaged or cut short (SafetensorError: too small)\n",
        ),
        (KeyboardInterrupt(), 130, f"stopped; go on with `reptile distill --resume {tmp_path / 'run'}`\n"),
    ):
        found = failing(error)
        assert found[0] == code
        assert found[1].endswith(words)
        assert found[1].count("\n") == 1
    with pytest.raises(AssertionError):  # a mistake of the program
        failing(AssertionError())
    monkeypatch.setenv("REPTILE_TRACEBACK", "1")
    with pytest.raises(ValueError, match="labels"):
        failing(ValueError("labels"))
    monkeypatch.setenv("REPTILE_TRACEBACK", "0")

    argv = ["distill", "digits", *TINY, "--out", str(tmp_path / "run"), "--teacher-learning-rate", "1e30"]
    assert cli.main(argv) == 1
    assert capsys.readouterr().err.startswith("reptile distill: teacher: the loss is ")


def test_a_run_folder_that_is_broken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    config = folder / "config.toml"
    for text, words in (
        (
            "steps = 3\n",
            "got None",
        ),
        ('recipe = "digitz"\n', "got 'digitz'; did you mean digits?"),
        (
            'recipe = "digits"\nsteps = 0\nmomentum = 1\n',
            f"{config}: steps must be greater than or equal to 1; got 0; ",
        ),
        ("recipe = \n", f"{config} is no TOML file: "),
        ('recipe = "digits"\n', "has no student yet: finish the run"),
    ):
        config.write_text(text)
        assert words in refused(capsys, "evaluate", str(folder))
    (folder / "student.safetensors").write_bytes(b"cut short")
    assert f"{folder / 'student.safetensors'} is damaged, or no safetensors file" in refused(
        capsys, "evaluate", str(folder)
    )


def test_a_process_says_no_more_than_a_line(tmp_path: Path) -> None:
    def reptile(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
        code = f"import sys; from reptile_ext import cli; sys.exit(cli.main({list(argv)!r}))"
        return run_python(code, **environment)

    done = reptile("distill", "digits", "--temperature", "-1", "--out", str(tmp_path / "run"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "reptile distill: --temperature must be greater than 0; got '-1'\n"
    assert not (tmp_path / "run").exists()
    done = reptile("benchmark", "--pairs", "0", REPTILE_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_a_divergence_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Chosen by flags, kept in the folder, taken up again from there; a β that is left out is left out of the file."""
    for name, flags in (("jsd", ["--divergence", "jsd", "--beta", "0.3"]), ("dkd", ["--divergence", "dkd"])):
        assert cli.main(["distill", "digits", *TINY, *flags, "--out", str(tmp_path / name), "--quiet"]) == 0
        text = (tmp_path / name / "config.toml").read_text()
        assert f'divergence = "{name}"' in text
        assert ("beta = 0.3" in text) == (name == "jsd")
        assert cli.main(["evaluate", str(tmp_path / name)]) == 0
    jsd, dkd = ((tmp_path / name / "student.safetensors").read_bytes() for name in ("jsd", "dkd"))
    assert jsd != dkd


def test_fused_linear_trains_the_same_and_says_what_it_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By one switch; without it there is no such line. On a little text, so that a whole run takes seconds."""
    a_little_text(monkeypatch)
    small = ["--vocabulary", "400", "--length", "16", "--transfer-tokens", "2000", "--held-out-tokens", "1000"]
    small += ["--teacher-width", "16", "--student-width", "16", "--teacher-steps", "20", "--steps", "20", "--quiet"]
    reports, said = {}, {}
    for switch in ([], ["--fused-linear"]):
        folder = tmp_path / f"run{len(switch)}"
        assert cli.main(["distill", "code-lm", *small, *switch, "--out", str(folder)]) == 0
        reports[bool(switch)] = json.loads((folder / "report.json").read_text())
        said[bool(switch)] = capsys.readouterr().out
    assert "fused_linear = true" in (tmp_path / "run1" / "config.toml").read_text()
    for name, values in reports[True]["models"].items():
        for metric, value in values.items():
            if metric != "seconds":
                assert value == pytest.approx(reports[False]["models"][name][metric], rel=1e-3), (name, metric)

    measured = reports[True]["fused_linear"]
    assert (measured["rows"], measured["classes"]) == (4 * 16, 400)
    for what in ("milliseconds", "peak_bytes"):
        assert measured[what].keys() == {"logits", "fused_linear"}
    lines = said[True].splitlines()
    head = next(i for i, line in enumerate(lines) if line.split()[:3] == ["64", "×", "400"])
    times = measured["milliseconds"]
    saved = f"{1 - times['fused_linear'] / times['logits']:.0%}"
    assert lines[head + 1].split() == ["fwd", "+", "bwd,", "ms", *(f"{t:.2f}" for t in times.values()), saved]
    assert "fused linear" not in said[False]
    assert "fused_linear" not in reports[False]

    assert cli.main(["evaluate", str(tmp_path / "run1")]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["accuracy"] == pytest.approx(reports[True]["models"]["student"]["accuracy"])


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in ("distill", "evaluate", "benchmark", "doctor", "--version"))
    for flag in ("-V", "--version"):
        assert cli.main([flag]) == 0
        assert capsys.readouterr().out == f"reptile_ext {reptile_ext.__version__}\n"
    with pytest.raises(SystemExit) as stop:
        cli.main(["distill", "digits", "--help"])
    assert stop.value.code == 0
    assert "--transfer-images" in capsys.readouterr().out


def test_doctor_finds_this_installation_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    said = capsys.readouterr().out
    for words in ("torch", "numpy", "threads", "CUDA", "instruction set", "kernels load", "All is well."):
        assert words in said


def test_doctor_says_what_is_wrong() -> None:
    """In a process of its own: the kernels of this one are loaded already."""
    done = run_python(
        "import sys, torch\n"
        "def broken(path):\n"
        "    raise OSError('undefined symbol: aoti_torch_nonsense')\n"
        "torch.ops.load_library = broken\n"
        "from reptile_ext.cli import main\n"
        "sys.exit(main(['doctor']))\n"
    )
    assert done.returncode == 1, done.stderr
    assert "kernels load" in done.stdout
    assert "Wrong: " in done.stdout
    assert "aoti_torch_nonsense" in done.stdout


def doctor_where(*changes: str, **environment: str) -> str:
    """What it says where torch, before the kernels are loaded, is changed so; and the exit code, on a last line."""
    lines = ["import sys, torch", *changes, "from reptile_ext.cli import main", "print(main(['doctor']))"]
    done = run_python("\n".join(lines), **environment)
    assert not done.stderr, done.stderr
    return done.stdout


FOR_CUDA = "torch.version.cuda = '13.0'"
NO_GPU = "import pathlib, shutil; shutil.which = lambda name: None"
A_GPU = "import shutil; shutil.which = lambda name: name"
# The library, but for what only a torch for CUDA has; of it the doctor asks for one function.
LOADED = [
    "import ctypes; from types import SimpleNamespace",
    "load, torch.ops.load_library = torch.ops.load_library, lambda path: '_cuda' in path or load(path)",
    "CDLL, ctypes.CDLL = ctypes.CDLL, lambda path: SimpleNamespace(reptile_ext_cuda_problem=SimpleNamespace()) "
    "if '_cuda' in path else CDLL(path)",
]


@pytest.fixture
def with_cuda_file(tmp_path: Path) -> Callable[[bytes], dict[str, str]]:
    """An environment in which the package has a _cuda.so of these bytes."""

    def make(content: bytes) -> dict[str, str]:
        copy = tmp_path / "reptile_ext"
        (source,) = (Path(p) for p in reptile_ext.__path__ if (Path(p) / "_ops.so").exists())
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns("_cuda.so", "__pycache__"))
        shutil.copytree(
            Path(reptile_ext.__file__).parent,
            copy,
            ignore=shutil.ignore_patterns("*.so", "__pycache__"),
            dirs_exist_ok=True,
        )
        if content:
            (copy / "_cuda.so").write_bytes(content)
        return {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}

    return make


@pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch without CUDA")
def test_doctor_tells_a_torch_without_cuda_on_a_machine_with_a_gpu() -> None:
    said = doctor_where(NO_GPU)
    assert "there is no NVIDIA GPU here" in said or Path("/dev/nvidiactl").exists()
    said = doctor_where(A_GPU)
    assert "torch" in said
    assert "is built without CUDA: install one for it" in said
    assert "--index-url https://download.pytorch.org/whl/cu130" in said
    assert "All is well" not in said
    assert said.endswith("\n1\n")


def test_doctor_tells_kernels_that_are_missing_from_those_that_are_broken(
    with_cuda_file: Callable[[bytes], dict[str, str]], tmp_path: Path
) -> None:
    environment = with_cuda_file(b"")
    for gpu, code in ((A_GPU, 1), (NO_GPU, 0)):  # nothing is missing where there is no GPU
        said = doctor_where(FOR_CUDA, gpu, **environment)
        assert "was built where there was no CUDA compiler: put nvcc on the PATH" in said
        assert said.endswith(f"\n{code}\n")
    whole = next(p for p in (Path(p) / "_ops.so" for p in reptile_ext.__path__) if p.exists()).read_bytes()
    for content in (
        b"\x7fELF\x02\x01\x01",
        whole[:100_000],
        whole[:-1],
        b"not a library, but long enough to be read" * 100,
    ):
        (tmp_path / "reptile_ext" / "_cuda.so").write_bytes(content)
        said = doctor_where(FOR_CUDA, NO_GPU, **environment)
        assert "CUDA kernels are broken (" in said
        assert "pip install --force-reinstall --no-deps ." in said
        assert said.endswith("\n1\n")


@pytest.mark.parametrize(
    ("error", "gpu", "wrong", "words"),
    [
        (
            "Found no NVIDIA driver on your system. Please check",
            NO_GPU,
            False,
            "loaded, and unused: Found no NVIDIA driver",
        ),
        (
            "The NVIDIA driver on your system is too old (found version 11040). Please update",
            A_GPU,
            True,
            "is too old (found version 11040)): update the driver to one for CUDA 13.0",
        ),
    ],
)
def test_doctor_tells_what_the_driver_is(
    error: str, gpu: str, wrong: bool, words: str, with_cuda_file: Callable[[bytes], dict[str, str]]
) -> None:
    """torch's own words, which cannot be had here without a driver of that age."""
    fails = f"torch.cuda.init = lambda: (_ for _ in ()).throw(RuntimeError({error!r}))"
    said = doctor_where(FOR_CUDA, gpu, *LOADED, fails, **with_cuda_file(b"anything"))
    assert words in said
    assert said.endswith(f"\n{int(wrong)}\n")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            "no kernel image is available for execution on the device",
            "it is sm_75; the kernels are for sm_80 and later",
        ),
        ("CUDA driver version is insufficient for CUDA runtime version", "update the driver"),
    ],
)
def test_doctor_tells_a_device_that_is_too_old(
    error: str, words: str, with_cuda_file: Callable[[bytes], dict[str, str]]
) -> None:
    said = doctor_where(
        FOR_CUDA,
        *LOADED,
        "torch.cuda.init, torch.cuda.device_count = lambda: None, lambda: 1",
        "torch.cuda.get_device_capability, torch.cuda.get_device_name = lambda i: (7, 5), lambda i: 'T4'",
        "import reptile_ext.ops as ops",
        f"ops.cuda_problem = lambda device: {'do not run on cuda:0 (' + error + ')'!r}",
        **with_cuda_file(b"anything"),
    )
    assert error in said
    assert words in said
    assert said.endswith("\n1\n")


def test_a_missing_extra_is_named() -> None:
    done = run_python(
        "import sys; sys.modules['accelerate'] = None; from reptile_ext import cli; sys.exit(cli.main(['distill']))"
    )
    assert done.returncode == 1
    assert "needs the extra 'train': pip install 'reptile_ext[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_importing_the_package_imports_no_extra() -> None:
    done = run_python(
        "import sys, reptile_ext, reptile_ext.cli\n"
        "extra = 'accelerate torchmetrics safetensors tokenizers sklearn matplotlib pydantic'\n"
        "print(sorted(set(extra.split()) & set(sys.modules)))\n"
    )
    assert done.stdout.strip() == "[]", done.stderr
