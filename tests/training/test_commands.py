"""The commands as users start them: from a recipe to a validated checkpoint."""

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import yaml
from interpreters import ENVIRONMENT, ROOT, Interpreter
from training_testing import (
    SMALL,
    TRAIN,
    VALIDATE,
    files_in,
    only_line,
    run_on_two_ranks,
    run_program,
)

from emax_cli import main
from emax_timm.training import TrainConfig

METRICS = re.compile(r"top1: (\d+\.\d{3}) top5: (\d+\.\d{3})")
SHORT = ["--epochs", "1", "--val-fraction", "0.9"]


@pytest.mark.slow
def test_quickstart_cut_short_is_validated_to_the_last_digit(
    programs: Interpreter, tmp_path: Path
) -> None:
    recipe = ROOT / "configs" / "quickstart.yaml"
    trained = programs.run(TRAIN, "-c", recipe, *SHORT, "--output", tmp_path / "runs", cwd=tmp_path)
    assert trained.status == 0, trained.stderr
    folder = tmp_path / "runs" / "quickstart"
    assert trained.last_line.startswith(str(folder / "model.safetensors"))
    found = METRICS.findall(trained.last_line)
    assert len(found) == 2  # validation and test
    validated = programs.run(VALIDATE, "--checkpoint", folder / "model.safetensors", cwd=tmp_path)
    assert validated.status == 0, validated.stderr
    assert METRICS.fullmatch(validated.last_line)
    assert METRICS.findall(validated.last_line) == [found[1]]
    assert float(found[1][0]) > 10.0  # better than chance, so that a mix-up of splits would show
    assert found[0] != found[1]
    assert files_in(tmp_path) == {f"runs/quickstart/{name}" for name in files_in(folder)}
    config = yaml.safe_load((folder / "config.yaml").read_text())
    given = yaml.safe_load(recipe.read_text()) | {"epochs": 1, "val_fraction": 0.9}
    assert given.items() <= config.items()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quickstart_reaches_its_accuracy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The default number of threads, as a user has it.
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, ROOT / TRAIN, "-c", ROOT / "configs/quickstart.yaml", "--output", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=590,
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "quickstart"
    summary = json.loads((folder / "summary.json").read_text())
    with capsys.disabled():
        print(f"\nquickstart: {summary['seconds']} s, test top1 {summary['test']['top1']:.1f}")
    assert summary["test"]["top1"] >= 83
    assert summary["epochs"] == 12
    validated = run_program(
        ROOT / VALIDATE, "--checkpoint", folder / "model.safetensors", cwd=tmp_path
    )
    assert METRICS.findall(validated.last_line) == METRICS.findall(done.stdout)[-1:]


@pytest.mark.slow
def test_quickstart_trains_and_validates_on_two_ranks(tmp_path: Path) -> None:
    options = ["-c", "quickstart", *SHORT, "-b", "32", "--model-ema", "--output", tmp_path]
    trained = run_on_two_ranks(ROOT / TRAIN, *options, cwd=tmp_path)
    assert trained.status == 0, trained.stderr
    # One rank speaks and writes.
    splits = [line.split(": ")[0] for line in trained.stdout.splitlines()[:-2]]
    assert splits == ["train", "validation", "test"]
    folder = tmp_path / "quickstart"
    assert not [name for name in files_in(tmp_path) if "partial" in name]
    row = json.loads((folder / "log.jsonl").read_text())
    assert row["step"] == 400 // (32 * 2)
    summary = json.loads((folder / "summary.json").read_text())
    checkpoint = ["--checkpoint", folder / "model.safetensors"]
    one = run_program(ROOT / VALIDATE, *checkpoint, cwd=tmp_path)
    two = run_on_two_ranks(ROOT / VALIDATE, *checkpoint, cwd=tmp_path)
    assert (one.status, two.status) == (0, 0), two.stderr
    assert only_line(two.stdout) == one.last_line
    assert f"{summary['test']['top1']:.3f}" in one.last_line


@pytest.mark.slow
def test_two_ranks_stop_together_at_a_loss_that_is_not_finite(images: Path, tmp_path: Path) -> None:
    options = [images, *SMALL, "--epochs", "2", "--lr", "1e30", "--output", tmp_path]
    result = run_on_two_ranks(ROOT / TRAIN, *options, "--experiment", "run", cwd=tmp_path)
    assert result.status != 0
    for rank in ("train.py: error: ", "train.py (rank 1): error: "):
        assert rank in result.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in result.stderr
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
def test_two_ranks_refuse_a_mistake_in_one_line_each(images: Path, tmp_path: Path) -> None:
    result = run_on_two_ranks(ROOT / TRAIN, images, "--model", "resnet18_emx", cwd=tmp_path)
    assert result.status != 0
    lines = [line for line in result.stderr.splitlines() if "error: unknown model" in line]
    assert 1 <= len(lines) <= 2
    assert not any(tmp_path.iterdir())


def test_progress_is_plain_lines_without_a_terminal(
    programs: Interpreter, images: Path, tmp_path: Path
) -> None:
    options = ["--epochs", "2", "--log-interval", "2", "--output", tmp_path]
    result = programs.run(TRAIN, images, *SMALL, *options, cwd=tmp_path)
    assert result.status == 0, result.stderr
    lines = result.stderr.splitlines()
    steps = [line for line in lines if "step " in line and line.startswith("epoch")]
    shown = [" ".join(line.split()[:4]) for line in steps]
    assert shown == [f"epoch {epoch}/2 step {step}/4" for epoch in (1, 2) for step in (2, 4)]
    assert all("loss: " in line and "lr: 0.05" in line for line in steps[:2])
    assert "\r" not in result.stderr
    assert "\x1b" not in result.stderr
    train, validation, *epochs = result.stdout.splitlines()
    assert train == "train: 32 images of 2 classes: cat 16, dog 16"
    assert validation == "validation: 10 images of 2 classes: cat 5, dog 5"
    assert [line.split()[1] for line in epochs[:2]] == ["1/2", "2/2"]


@pytest.mark.slow
def test_progress_is_a_bar_on_a_terminal(images: Path, tmp_path: Path) -> None:
    main_end, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, ROOT / TRAIN, images, *SMALL, "--epochs", "1", "--output", tmp_path],
        cwd=tmp_path,
        env={**ENVIRONMENT, "TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=terminal,
        text=True,
    )
    os.close(terminal)
    shown = b""
    with contextlib.suppress(OSError):  # raised when the other end is closed
        while part := os.read(main_end, 4096):
            shown += part
    os.close(main_end)
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0, shown
    text = shown.decode()
    bars = [piece for piece in text.split("\r") if piece.startswith("epoch 1/1: ")]
    assert len(bars) > 1
    assert "|" in bars[-1]
    assert "/4 [" in bars[-1]
    assert "loss=" in bars[-1]
    # The bar is taken away, and what stays went to stdout.
    assert "step 4/4" not in text
    assert stdout.splitlines()[2].startswith("epoch 1/1  loss: ")


def test_emax_without_a_command_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        shown = capsys.readouterr()
        assert "emax train" in shown.out
        assert "emax validate" in shown.out
        assert shown.err == ""


@pytest.mark.parametrize(
    ("command", "right"), [("trian", "train"), ("validat", "validate"), ("--train", "train")]
)
def test_emax_names_the_nearest_command(
    capsys: pytest.CaptureFixture[str], command: str, right: str
) -> None:
    assert main([command, "--help"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert only_line(shown.err).startswith("emax: error: ")
    assert only_line(shown.err).endswith(right)


@pytest.mark.parametrize("command", ["train", "validate"])
def test_emax_help_explains_every_flag(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: emax {command} " in shown
    wanted = TrainConfig.__dataclass_fields__ if command == "train" else ["checkpoint", "split"]
    for name in set(wanted) - {"data"}:
        assert f"--{name.replace('_', '-')}" in shown


@pytest.mark.slow
def test_emax_train_and_validate_are_the_commands(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--epochs", "1", "--output", str(tmp_path), "--experiment", "run"]
    assert main(["train", str(images), *options]) == 0
    trained = capsys.readouterr().out.splitlines()[-1]
    assert main(["validate", "--checkpoint", str(tmp_path / "run" / "model.safetensors")]) == 0
    assert trained.endswith(capsys.readouterr().out.splitlines()[-1])
    assert main(["train", str(images), "--modle", "x"]) == 2
    assert only_line(capsys.readouterr().err).startswith("emax train: error: ")


def test_emax_module_of_the_command_is_what_pip_installs() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'emax = "emax_cli:main"' in text
