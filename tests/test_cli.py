"""The command line: what it runs, what it writes, what it refuses."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

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
        with pytest.raises(KeyboardInterrupt):
            cli.main([*argv, "--out", str(broken)])
    assert not (broken / "student.safetensors").exists()
    assert "has no student yet: finish the run" in refused(capsys, "evaluate", str(broken))
    assert cli.main(["distill", "--resume", str(broken), "--quiet"]) == 0
    assert (broken / "student.safetensors").read_bytes() == (whole / "student.safetensors").read_bytes()


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.toml"
    file.write_text("stepz = 3\n")
    assert "stepz: Extra inputs are not permitted" in refused(capsys, "distill", "digits", "--config", str(file))
    file.write_text('steps = "many"\n')
    assert "steps: Input should be a valid integer" in refused(capsys, "distill", "digits", "--config", str(file))
    file.write_text("steps = = 3\n")
    assert "settings.toml: " in refused(capsys, "distill", "digits", "--config", str(file))
    assert f"there is no {tmp_path / 'none.toml'}" in refused(
        capsys, "distill", "--config", str(tmp_path / "none.toml")
    )
    assert "unrecognized arguments: --stepz" in refused(capsys, "distill", "digits", "--stepz", "3")
    assert "steps: Input should be greater than 0" in refused(capsys, "distill", "digits", "--steps", "0")
    assert "(flags): divergence must be one of 'forward_kl', 'reverse_kl'" in refused(
        capsys, "distill", "digits", "--divergence", "kl"
    )
    assert "beta has no meaning for divergence='tvd'" in refused(
        capsys, "distill", "digits", "--divergence", "tvd", "--beta", "2"
    )
    assert "inplace has no meaning with fused_linear" in refused(
        capsys, "distill", "--inplace", "true", "--fused-linear"
    )
    assert "unrecognized arguments: --fused-linear" in refused(capsys, "distill", "digits", "--fused-linear")
    assert "recipe must be one of code-lm, digits; got 'digit'" in refused(capsys, "distill", "digit")
    assert "is not empty" in refused(capsys, "distill", "digits", "--out", str(tmp_path))
    assert "unknown command 'distil'; known: distill, evaluate, benchmark, doctor" in refused(capsys, "distil")
    assert "only --quiet goes with it" in refused(capsys, "distill", "digits", "--resume", str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["settings.toml"]


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
    from reptile_ext.training.recipes import code_lm

    texts = [Path(module.__file__).read_text(encoding="utf-8") for module in (argparse, json, subprocess)]
    monkeypatch.setattr(code_lm, "standard_library", lambda: (texts[:2], texts[2:]))
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
    assert all(command in said for command in ("distill", "evaluate", "benchmark", "doctor"))
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
