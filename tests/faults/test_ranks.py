"""Two ranks under torchrun: rows 4, 6 to 9, 21 and 22 of the faults in docs/training.md."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults_testing import NAN_AT, RUN, assert_same_run, keep_only, with_fault
from interpreters import ENVIRONMENT, ROOT, Interpreter, Result
from tiers import mostly_slow
from training_testing import (
    TRAIN,
    VALIDATE,
    newest_checkpoint,
    rows_without_seconds,
    run_on_two_ranks,
    state_of,
)

SLOW = pytest.mark.slow
pytestmark = pytest.mark.timeout(400)
GRACE = 30  # seconds between torchrun's SIGTERM to its workers and its SIGKILL

# Rank 0 tells the test that the moment for a signal has come, and continues when it has one.
TELL = """
def tell():
    open("ready", "w").close()
    while not signal.getsignal(signal.SIGTERM).number:
        time.sleep(0.01)
"""
IN_STEP = """
def in_step(self, batches):
    if self.step == 2 and rank == 0:
        tell()
    return step(self, batches)
Trainer.train_step = in_step
"""
IN_VALIDATION = """
validate = Trainer.validate
def in_validation(self):
    if self.epoch == 1 and rank == 0:
        tell()
    return validate(self)
Trainer.validate = in_validation
"""
IN_SAVE = """
import emax_timm.training.checkpoint as checkpoint
write_folder = checkpoint.write_folder
def in_save(path, files):
    if path.name.endswith("step-00000003"):
        tell()
    write_folder(path, files)
checkpoint.write_folder = in_save
"""
# torchrun tells of the ranks that failed, not of the statuses of all.
STATUS = """
program = train
def train():
    status = program()
    with open(f"partial{rank}", "w") as file:
        file.write(str(status))
    os.rename(f"partial{rank}", f"status{rank}")
    return status
"""


def start(folder: Path, script: Path, *arguments: str | Path) -> subprocess.Popen[str]:
    """A script under torchrun, in the background."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *map(str, arguments)],
        cwd=folder,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, seconds: float) -> str:
    """The text of a file that will be there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"no {path} in {seconds} s"
        time.sleep(0.02)
    return path.read_text()


# As where a file system shows the newest checkpoint to one host later than to the other.
HIDES = """
import emax_timm.training.checkpoint as checkpoint
found = checkpoint.checkpoints
checkpoint.checkpoints = lambda folder: found(folder)[rank:]
"""


@SLOW
def test_ranks_that_would_begin_at_different_steps_are_refused(
    images: Path, whole_on_two_ranks: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(whole_on_two_ranks, tmp_path / "run", symlinks=True))
    before = newest_checkpoint(run)
    script = with_fault(tmp_path, HIDES)
    result = run_on_two_ranks(script, "--resume", run, "--epochs", "9", cwd=tmp_path)
    assert result.status != 0
    assert "error: the ranks would begin at different places: step " in result.stderr
    assert newest_checkpoint(run) == before


@pytest.mark.parametrize(
    ("fault", "number", "workers", "epoch", "step"),
    [
        pytest.param(IN_STEP, signal.SIGTERM, 0, 1, 3, id="step", marks=SLOW),
        pytest.param(IN_STEP, signal.SIGINT, 1, 1, 3, id="SIGINT", marks=SLOW),
        pytest.param(IN_VALIDATION, signal.SIGTERM, 0, 1, 4, id="validation", marks=SLOW),
        pytest.param(IN_SAVE, signal.SIGTERM, 0, 1, 4, id="save", marks=SLOW),
    ],
)
def test_signal_to_torchrun_stops_all_ranks_and_the_run_continues(
    images: Path,
    whole_on_two_ranks: Path,
    tmp_path: Path,
    fault: str,
    number: int,
    workers: int,
    epoch: int,
    step: int,
) -> None:
    script = with_fault(tmp_path, TELL + fault + STATUS)
    torchrun = start(tmp_path, script, images, *RUN, "-j", str(workers))
    wait_for(tmp_path / "ready", 120)
    begin = time.monotonic()
    for _ in range(2):
        torchrun.send_signal(number)
        time.sleep(0.1)
    errors = torchrun.communicate(timeout=GRACE)[1]
    statuses = [wait_for(tmp_path / f"status{rank}", GRACE) for rank in (0, 1)]
    assert time.monotonic() - begin < GRACE
    assert torchrun.returncode != 0
    assert statuses == [str(128 + number)] * 2, errors
    state = state_of(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (epoch, step)
    assert not (tmp_path / "run" / "summary.json").exists()
    result = run_on_two_ranks(ROOT / TRAIN, images, *RUN, cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert_same_run(tmp_path / "run", whole_on_two_ranks)


AFTER_AGREEING = """
judge = Trainer._judge
def after_agreeing(self, verdict):
    first = verdict.made is None  # a step that the host waits for is judged twice
    made = judge(self, verdict)
    if first and self.step == 2 and rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return made
Trainer._judge = after_agreeing
"""


@SLOW
def test_signal_to_one_rank_stops_all_at_the_same_step(images: Path, tmp_path: Path) -> None:
    script = with_fault(tmp_path, AFTER_AGREEING + STATUS)
    result = run_on_two_ranks(script, images, *RUN, cwd=tmp_path)
    assert [(tmp_path / f"status{rank}").read_text() for rank in (0, 1)] == ["143"] * 2
    assert state_of(tmp_path / "run")["step"] == 4, result.stderr


@SLOW
def test_run_on_four_ranks_continues_to_the_bit(images: Path, tmp_path: Path) -> None:
    # More than two can be added up in several orders.
    options = [*RUN, "-b", "4", "--model-kwargs", "channels=[64,64,64,64]"]
    launch = {"options": ["--nproc-per-node", "4"]}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    whole.mkdir()
    stopped.mkdir()
    assert run_on_two_ranks(ROOT / TRAIN, images, *options, cwd=whole, **launch).status == 0
    script = with_fault(stopped, AFTER_AGREEING)
    assert run_on_two_ranks(script, images, *options, cwd=stopped, **launch).status != 0
    keep_only(stopped / "run", 3)
    assert run_on_two_ranks(ROOT / TRAIN, images, *options, cwd=stopped, **launch).status == 0
    assert_same_run(stopped / "run", whole / "run")


DIES = """
def dies(self, batches):
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and (rank, self.step) == (1, 3):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, batches)
Trainer.train_step = dies
"""


@pytest.mark.slow
def test_rank_that_dies_is_restarted_and_nothing_is_lost(
    images: Path, whole_on_two_ranks: Path, tmp_path: Path
) -> None:
    script = with_fault(tmp_path, DIES)
    result = run_on_two_ranks(script, images, *RUN, cwd=tmp_path, options=["--max-restarts=1"])
    assert result.status == 0, result.stderr
    assert "exitcode: -9) local_rank: 1" in result.stderr
    assert_same_run(tmp_path / "run", whole_on_two_ranks)


HANGS = """
def hangs(self, batches):
    if (rank, self.step) == (1, 3):
        time.sleep(300)
    return step(self, batches)
Trainer.train_step = hangs
"""


@SLOW
def test_rank_that_hangs_is_named(images: Path, tmp_path: Path) -> None:
    script = with_fault(tmp_path, HANGS)
    result = run_on_two_ranks(script, images, *RUN, "--dist-timeout", "20", cwd=tmp_path)
    assert result.status != 0
    assert "error: rank 1 has ended or hangs: " in result.stderr
    assert state_of(tmp_path / "run")["step"] == 3


INFINITE_GRADIENT_AT = """
def infinite_at(self, batches):
    if self.step == 5 and rank == 1:
        self.model.fc.weight.register_hook(lambda gradient: gradient * float("inf"))
    return step(self, batches)
Trainer.train_step = infinite_at
"""


@SLOW
@pytest.mark.parametrize(
    ("fault", "ranks"),
    [
        pytest.param(NAN_AT.format(factor="float('nan')"), "1", id="loss"),
        # It is the sum over the ranks, so it is not known whose it was.
        pytest.param(INFINITE_GRADIENT_AT, "0, 1", id="gradient"),
    ],
)
def test_all_ranks_stop_before_a_step_that_is_not_finite_on_one(
    images: Path, whole_on_two_ranks: Path, tmp_path: Path, fault: str, ranks: str
) -> None:
    script = with_fault(tmp_path, fault)
    result = run_on_two_ranks(script, images, *RUN, cwd=tmp_path)
    assert result.status != 0
    assert f"not finite at step 6 of epoch 3 on rank {ranks};" in result.stderr
    assert "samples at step 6 of epoch 3 on rank 1: " in result.stderr
    assert state_of(tmp_path / "run")["step"] == 5
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run_on_two_ranks(ROOT / TRAIN, images, *RUN, cwd=tmp_path).status == 0
    assert_same_run(tmp_path / "run", whole_on_two_ranks)


@SLOW
def test_run_continues_with_a_warning_where_the_number_of_ranks_changes(
    programs: Interpreter, images: Path, whole: Path, whole_on_two_ranks: Path, tmp_path: Path
) -> None:
    for name, source, step in (("one", whole, 10), ("two", whole_on_two_ranks, 5)):
        (tmp_path / name).mkdir()
        keep_only(Path(shutil.copytree(source, tmp_path / name / "run", symlinks=True)), step)

    def resume(name: str, ranks: int, batch: str) -> Result:
        folder, command = tmp_path / name, [images, *RUN, "-b", batch]
        if ranks == 1:
            return programs.run(TRAIN, *command, cwd=folder)
        return run_on_two_ranks(ROOT / TRAIN, *command, cwd=folder)

    refusal = "the run stands in the middle of an epoch of"
    change = "warning: not to the bit as it would have continued: the number of ranks was"
    for name, ranks, batch in (("one", 2, "8"), ("two", 1, "8")):
        result = resume(name, ranks, batch)
        assert result.status != 0
        assert refusal in result.stderr
    for name, ranks, batch in (("one", 2, "4"), ("two", 1, "16")):
        result = resume(name, ranks, batch)
        assert result.status == 0, result.stderr
        assert f"{change} {3 - ranks} and is {ranks}" in result.stderr
        rows = rows_without_seconds(tmp_path / name / "run" / "log.jsonl")
        assert [row["epoch"] for row in rows] == [0, 1, 2]


@pytest.mark.parametrize("torchrun", mostly_slow([False, True], 0))
def test_images_that_do_not_divide_are_counted_once_each(
    torchrun: bool,
    programs: Interpreter,
    images: Path,
    whole: Path,
    tmp_path: Path,
) -> None:
    data = Path(shutil.copytree(images, tmp_path / "images"))
    (data / "validation" / "cat" / "0.png").unlink()
    command = ["--checkpoint", whole / "model.safetensors", "--data-dir", data, "-b", "2"]
    alone = programs.run(VALIDATE, *command, cwd=tmp_path)
    if torchrun:
        together = run_on_two_ranks(ROOT / VALIDATE, *command, cwd=tmp_path)
    else:
        together = programs.run(VALIDATE, *command, cwd=tmp_path, ranks=2)
    assert (alone.status, together.status) == (0, 0), together.stderr
    assert together.last_line == alone.last_line
    ninths = {f"top1: {100 * right / 9:.3f}" for right in range(10)}
    assert alone.last_line.split(" top5")[0] in ninths


def test_accuracy_of_two_ranks_is_that_of_validate_on_one(
    programs: Interpreter, whole_on_two_ranks: Path, tmp_path: Path
) -> None:
    found = json.loads((whole_on_two_ranks / "summary.json").read_text())["validation"]
    weights = whole_on_two_ranks / "model.safetensors"
    alone = programs.run(VALIDATE, "--checkpoint", weights, cwd=tmp_path)
    assert alone.last_line == f"top1: {found['top1']:.3f} top5: {found['top5']:.3f}"
