"""What a run says of its speed."""

import importlib
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub_testing import REPO
from run_commands import command
from training_testing import MakeTrainer

from emax_cli import main
from emax_timm.training import progress as module
from emax_timm.training.progress import Progress, Timing, working


class Clock:
    """Stands still but for `pass_`."""

    def __init__(self) -> None:
        self.now = 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_timing_splits_wait_from_compute(clock: Clock) -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            clock.pass_(1)
            yield number
        clock.pass_(1)  # to find that there are no more

    timing, seen = Timing(), []
    for batch in timing.waiting(batches()):
        with timing.computing(images=8):
            clock.pass_(3)
            seen.append(batch)
        clock.pass_(100)  # a checkpoint
    assert seen == [0, 1, 2]
    assert (timing.images, timing.wait, timing.compute) == (24, 4, 9)
    assert timing.images_per_second == 24 / 13
    assert timing.data_wait == 4 / 13


def test_timing_of_nothing_is_zero() -> None:
    assert (Timing().images_per_second, Timing().data_wait) == (0, 0)


def test_step_that_fails_is_not_counted(clock: Clock) -> None:
    timing = Timing()
    with pytest.raises(ValueError, match="no"), timing.computing(images=8):
        raise ValueError("no")
    assert timing == Timing()


def wait_for(done: Callable[[], bool]) -> None:
    """Wait until something holds, for 20 seconds at most."""
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets a line follow on a silence of a tenth of a second, in the place of 30."""
    monkeypatch.setattr(module, "SILENCE", 0.1)


def test_silence_without_a_terminal_lasts_half_a_minute() -> None:
    assert module.SILENCE == 30


@pytest.mark.usefixtures("impatient")
def test_first_step_that_takes_long_is_not_silent(capsys: pytest.CaptureFixture[str]) -> None:
    said = ""
    with Progress("epoch 1/1", steps=4, interval=50, enabled=True):

        def spoken() -> bool:
            nonlocal said
            said += capsys.readouterr().err
            return said.count("\n") >= 2  # and again

        wait_for(spoken)
    assert said.startswith("epoch 1/1  step 0/4  0.00 steps/s\n")
    time.sleep(0.3)
    assert capsys.readouterr().err == ""  # it has ended


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with working("exporting") as progress:
        progress.stage("checking")
    with Progress("epoch 1/1", 4, 50, enabled=True) as progress:
        for _ in range(4):
            progress.step(loss=1.0)
    assert capsys.readouterr().err == ""


def test_line_comes_after_every_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("epoch 1/1", 5, 2, enabled=True) as progress:
        for _ in range(5):
            progress.step(loss=1.0)
    lines = capsys.readouterr().err.splitlines()
    starts = ["epoch 1/1  step 2/5  loss: 1", "epoch 1/1  step 4/5  loss: 1"]
    assert [line.rpartition("  ")[0] for line in lines] == starts


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_shows_a_line_that_goes_when_the_work_is_done(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr(module, "SILENCE", 1.0)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: SimpleNamespace(columns=80, lines=24))
    with Progress("exporting", None, 0, enabled=True, delay=0.1) as progress:
        wait_for(lambda: "exporting" in terminal.getvalue())
        progress.stage("checking")
        progress.print("a line of its own")
        wait_for(lambda: terminal.getvalue().count("checking") >= 2)  # its seconds go on
    shown = terminal.getvalue().split("\r")
    assert any(part.startswith("checking  00:0") for part in shown)
    assert any(part.startswith("a line of its own\n") for part in shown)
    assert shown[-1].strip() == ""
    assert "\n" not in shown[-1]


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("name", "words"),
    [
        pytest.param("export", ["tracing AttentionResNet", "comparing "], marks=pytest.mark.slow),
        pytest.param("visualize", ["drawing image 1 of 1"], marks=pytest.mark.slow),
        ("publish", ["publishing me/cats"]),
    ],
)
def test_command_says_what_takes_long(
    name: str,
    words: list[str],
    run: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def upload(*_: object) -> SimpleNamespace:
        time.sleep(0.5)
        return SimpleNamespace(repo=REPO, version="v1", commit="0" * 40, new=True)

    monkeypatch.setattr(importlib.import_module("emax_timm.hub.publish"), "upload", upload)
    push = ["--push"] if name == "publish" else []
    assert main([*command(name, run, images, tmp_path), *push]) == 0
    err = capsys.readouterr().err
    for text in words:
        assert any(line.startswith(text) for line in err.splitlines()), err


@pytest.mark.usefixtures("impatient")
def test_first_epoch_is_not_silent(
    trainer_for: MakeTrainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_for(epochs=1)
    step = trainer.train_step

    def compiling(batches: list[Any]) -> float:
        time.sleep(0.3 * (trainer.step == 0))
        return step(batches)

    monkeypatch.setattr(trainer, "train_step", compiling)
    trainer.train_epoch()
    assert "epoch 1/1  step 0/4" in capsys.readouterr().err
