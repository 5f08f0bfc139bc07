"""A run that is stopped or killed, and continues, ends as one that never stopped: rows 3, 5, 24."""

import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faults_testing import RUN, assert_same_run, keep_only, with_fault
from interpreters import Interpreter
from tiers import mostly_slow
from training_testing import TRAIN, only_line, run_program, state_of

from emax_timm.training import train

SIGNAL_AT = """
def signal_at(self, batches):
    if self.step == {step}:
        os.kill(os.getpid(), {number})
        os.kill(os.getpid(), {number})  # a second one changes nothing
    return step(self, batches)
Trainer.train_step = signal_at
"""
SIGNAL_IN_VALIDATION = """
validate = Trainer.validate
def signal_in(self):
    if self.epoch == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return validate(self)
Trainer.validate = signal_in
"""
SIGNAL_IN_SAVE = """
import emax_timm.training.checkpoint as checkpoint
save = checkpoint.save_checkpoint
def signal_in(folder, saved, keep):
    if saved.state["step"] == 6:
        os.kill(os.getpid(), signal.SIGTERM)
    save(folder, saved, keep)
checkpoint.save_checkpoint = signal_in
"""


@pytest.mark.slow
def test_error_ends_a_run_with_workers(images: Path, tmp_path: Path) -> None:
    # Its traceback holds the loader, so that it is the end of the interpreter that ends them.
    script = with_fault(tmp_path, "Trainer.train_step = lambda self, batches: 1 / 0")
    result = run_program(script, images, *RUN, "-j", "2", cwd=tmp_path, timeout=120)
    assert result.status == 1
    assert result.stderr.splitlines()[-1] == "ZeroDivisionError: division by zero"


@pytest.mark.parametrize("workers", mostly_slow([1, 2]))
def test_number_of_workers_changes_nothing(
    programs: Interpreter, images: Path, whole: Path, tmp_path: Path, workers: int
) -> None:
    result = programs.run(TRAIN, images, *RUN, "-j", str(workers), cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize(
    ("fault", "status", "step"),
    mostly_slow(
        [
            *(
                (SIGNAL_AT.format(step=step, number=int(signal.SIGTERM)), 143, step + 1)
                for step in (0, 2, 3, 5)
            ),
            (SIGNAL_AT.format(step=9, number=int(signal.SIGINT)), 130, 10),
            (SIGNAL_IN_VALIDATION, 143, 8),
            (SIGNAL_IN_SAVE, 143, 7),
        ],
        4,
    ),
    ids=["step 1", "step 3", "last of epoch", "step 6", "SIGINT", "validation", "save"],
)
@pytest.mark.parametrize("workers", mostly_slow([0, 2], 0))
def test_signal_stops_at_the_step_and_the_run_continues(
    images: Path,
    whole: Path,
    tmp_path: Path,
    programs: Interpreter,
    fault: str,
    status: int,
    step: int,
    workers: int,
) -> None:
    script = with_fault(tmp_path, fault)
    argv = [*map(str, [images, *RUN, "-j", workers])]
    result = programs.run(str(script), *argv, cwd=tmp_path)
    assert result.status == status, result.stderr
    assert result.stderr.splitlines()[-1].endswith("continue with --resume")
    assert state_of(tmp_path / "run")["step"] == step
    assert not (tmp_path / "run" / "summary.json").exists()
    assert programs.run(TRAIN, *argv, cwd=tmp_path).status == 0
    assert_same_run(tmp_path / "run", whole)


def test_run_that_continues_elsewhere_warns_of_what_is_not_to_the_bit(
    programs: Interpreter, images: Path, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    keep_only(folder, 10)
    result = programs.run(TRAIN, images, *RUN, "--amp", "--channels-last", cwd=tmp_path)
    assert result.status == 0, result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warning == (
        "warning: not to the bit as it would have continued: "
        "mixed precision was None and is bfloat16; --channels-last was False and is True"
    )


@pytest.mark.parametrize(
    "kills", [1, pytest.param(30, marks=[pytest.mark.slow, pytest.mark.timeout(1800)])]
)
@pytest.mark.slow
def test_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    programs: Interpreter, images: Path, whole: Path, tmp_path: Path, kills: int
) -> None:
    moments, done, runs = random.Random(kills), 0, 0
    while done < kills:
        runs += 1
        folder = tmp_path / str(runs)
        folder.mkdir()
        while True:
            # A run takes about 2 s here; one that gets nowhere would be killed for ever.
            moment = moments.uniform(0.2, 3) if done < kills else None
            result = programs.run(TRAIN, images, *RUN, cwd=folder, kill_after=moment)
            if result.status != -signal.SIGKILL:
                break
            done += 1
        assert result.status == 0, result.stderr
        assert_same_run(folder / "run", whole)
        assert not list((folder / "run").rglob("*.partial"))


WAITS = """
def waits(self, batches):
    if self.step == 2:
        os.mkdir("trains")
        end = time.monotonic() + 60
        while os.path.exists("trains") and time.monotonic() < end:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batches)
Trainer.train_step = waits
"""


def test_second_run_in_a_folder_is_refused_and_a_dead_one_is_no_reason(
    programs: Interpreter,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = with_fault(tmp_path, WAITS)
    monkeypatch.chdir(tmp_path)
    argv = [*map(str, [images, *RUN, "-j", "2"])]
    with ThreadPoolExecutor() as pool:
        first = pool.submit(programs.run, str(script), *argv, cwd=tmp_path)
        while not (tmp_path / "trains").exists():
            assert not first.done(), first.result().stderr
            time.sleep(0.01)
        assert train(argv) == 2
        assert "another process is training in run" in only_line(capsys.readouterr().err)
        (tmp_path / "trains").rmdir()
        assert first.result().status == -signal.SIGKILL
    # Its loader's workers may still live.
    assert programs.run(TRAIN, images, *RUN, "--epochs", "1", cwd=tmp_path).status == 0
