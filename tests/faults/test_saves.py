"""Faults while a checkpoint is written, and damaged ones: rows 1, 2, 15, 16, 23 and 25."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from faults_testing import RUN, assert_same_run, with_fault
from interpreters import Interpreter
from tiers import mostly_slow
from training_testing import TRAIN, VALIDATE, newest_checkpoint, only_line

from emax_timm.training.checkpoint import load_checkpoint
from emax_timm.training.distributed import DistributedContext

SLOW = pytest.mark.slow
CPU = DistributedContext(torch.device("cpu"))

# In the save after the second epoch, `at(operation)` is called before each operation on files and,
# if it writes, once more in the middle of it; `operation` counts from 1.
AT_EACH_OPERATION = """
import pathlib, shutil
import emax_timm.files
counted = []
def watched(owner, name):
    original = getattr(owner, name)
    def operation(*args, **kwargs):
        if counted:
            counted.append(name)
            at(len(counted) - 1)
            if name.startswith("write"):
                original(args[0], args[1][: len(args[1]) // 2])
                at(len(counted) - 1)
        return original(*args, **kwargs)
    setattr(owner, name, operation)
for name in ("write_bytes", "write_text", "rename", "replace", "mkdir", "symlink_to"):
    watched(pathlib.Path, name)
watched(emax_timm.files, "_sync")
watched(shutil, "rmtree")
save = Trainer.save
def counting(self, metrics):
    if self.epoch == 2:
        counted.append("save")
    save(self, metrics)
    if counted:
        open("operations", "w").write(" ".join(counted[1:]))
        counted.clear()
Trainer.save = counting
"""
KILL = """
calls = 0
def at(operation):
    global calls
    calls += operation == {operation}
    if calls == (2 if counted[-1].startswith("write") else 1):
        os.kill(os.getpid(), signal.SIGKILL)
"""
SNAPSHOT = """
taken = 0
def at(operation):
    global taken
    taken += 1
    shutil.copytree("run", f"snapshots/{taken:03}/run", symlinks=True)
"""


def assert_newest_checkpoint_is_whole(folder: Path) -> None:
    """It is that of the save that was cut short, or the one before."""
    state = load_checkpoint(folder, CPU).state
    assert (state["epoch"], state["step"]) in ((1, 7), (2, 8))
    assert (folder / "last.safetensors").is_file()


def assert_continues(folder: Path, programs: Interpreter, images: Path, whole: Path) -> None:
    """The run in `folder`, as a kill left it, ends as if it had not been killed."""
    result = programs.run(TRAIN, images, *RUN, cwd=folder)
    assert result.status == 0, result.stderr
    assert "damaged" not in result.stderr
    assert_same_run(folder / "run", whole)
    assert not list((folder / "run").rglob("*.partial"))


@pytest.mark.parametrize("operation", mostly_slow([2, 5, 9, 13]))
def test_run_killed_in_a_save_continues(
    operation: int, programs: Interpreter, images: Path, whole: Path, tmp_path: Path
) -> None:
    script = with_fault(tmp_path, AT_EACH_OPERATION + KILL.format(operation=operation))
    result = programs.run(str(script), images, *RUN, cwd=tmp_path)
    assert result.status == -signal.SIGKILL, result.stderr
    assert_newest_checkpoint_is_whole(tmp_path / "run")
    assert_continues(tmp_path, programs, images, whole)


@pytest.fixture(scope="module")
def snapshots(
    programs: Interpreter, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """The folder at every operation of a save: what a kill at that moment would leave."""
    folder = tmp_path_factory.mktemp("snapshots")
    script = with_fault(folder, AT_EACH_OPERATION + SNAPSHOT)
    result = programs.run(str(script), images, *RUN, cwd=folder)
    assert result.status == 0, result.stderr
    performed = (folder / "operations").read_text().split()
    assert len(performed) > 15  # the least, of Python 3.10
    assert {"write_bytes", "_sync", "rename", "replace", "symlink_to", "rmtree"} <= set(performed)
    found = sorted((folder / "snapshots").iterdir())
    assert len(found) == len(performed) + sum(name.startswith("write") for name in performed)
    return found


def test_every_operation_of_a_save_leaves_a_whole_checkpoint(snapshots: list[Path]) -> None:
    for snapshot in snapshots:
        assert_newest_checkpoint_is_whole(snapshot / "run")


@SLOW
@pytest.mark.timeout(1200)
def test_run_continues_from_every_operation_of_a_save(
    snapshots: list[Path], programs: Interpreter, images: Path, whole: Path, tmp_path: Path
) -> None:
    for snapshot in snapshots:
        folder = Path(shutil.copytree(snapshot, tmp_path / snapshot.name, symlinks=True))
        assert_continues(folder, programs, images, whole)


FULL_DISK = """
import resource
def full(self, batches):
    if self.step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    return step(self, batches)
Trainer.train_step = full
"""


@pytest.mark.slow
def test_full_disk_is_reported_and_the_checkpoint_before_is_there(
    programs: Interpreter, images: Path, whole: Path, tmp_path: Path
) -> None:
    script = with_fault(tmp_path, FULL_DISK)
    result = programs.run(str(script), images, *RUN, cwd=tmp_path)
    assert result.status == 1
    assert result.stderr.splitlines()[-1] == (
        "train.py: error: cannot write to run: the disk is full"
    )
    assert not list((tmp_path / "run").rglob("*.partial"))
    assert load_checkpoint(tmp_path / "run", CPU).state["step"] == 5
    assert programs.run(TRAIN, images, *RUN, cwd=tmp_path).status == 0
    assert_same_run(tmp_path / "run", whole)


VANISHES = """
def vanishes(self, batches):
    if self.step == 5:
        os.rename("run", "elsewhere")
        {then}
    return step(self, batches)
Trainer.train_step = vanishes
"""


@pytest.mark.parametrize(
    "then", mostly_slow(["pass", "open('run', 'w').close()"]), ids=["gone", "a file"]
)
def test_run_whose_folder_vanishes_says_so_and_leaves_its_checkpoint(
    programs: Interpreter, images: Path, whole: Path, tmp_path: Path, then: str
) -> None:
    script = with_fault(tmp_path, VANISHES.format(then=then))
    result = programs.run(str(script), images, *RUN, cwd=tmp_path)
    assert result.status == 1
    assert result.stderr.splitlines()[-1].startswith("train.py: error: cannot write to run: ")
    (tmp_path / "run").unlink(missing_ok=True)
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    assert load_checkpoint(tmp_path / "run", CPU).state["step"] == 5
    assert programs.run(TRAIN, images, *RUN, cwd=tmp_path).status == 0
    assert_same_run(tmp_path / "run", whole)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def lengthen_header(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes((2 * len(content)).to_bytes(8, "little") + content[8:])


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut weights": lambda folder: cut(folder / "model.safetensors"),
    "flipped average": lambda folder: flip(folder / "averaged.safetensors"),
    "flipped state": lambda folder: flip(folder / "state.pt"),
    "no state": lambda folder: (folder / "state.pt").unlink(),
    "no sums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "empty sums": lambda folder: (folder / "SHA256SUMS").write_bytes(b""),
    "binary sums": lambda folder: (folder / "SHA256SUMS").write_bytes(bytes(range(256))),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
    "a file": lambda folder: (shutil.rmtree(folder), folder.write_bytes(b"")),
}


@pytest.mark.parametrize("damage", mostly_slow(DAMAGES, 0))
def test_damaged_checkpoint_is_left_out_loudly(
    programs: Interpreter, images: Path, whole: Path, tmp_path: Path, damage: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    newest = newest_checkpoint(folder)
    DAMAGES[damage](newest)
    result = programs.run(TRAIN, images, *RUN, cwd=tmp_path)
    assert result.status == 0, result.stderr
    (warning,) = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: a damaged checkpoint is left out: ")
    assert newest.name in warning
    assert_same_run(folder, whole)


def test_run_whose_checkpoints_are_all_damaged_is_refused_and_untouched(
    programs: Interpreter, images: Path, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    for path in (folder / "checkpoints").iterdir():
        cut(path / "state.pt")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    result = programs.run(TRAIN, images, *RUN, cwd=tmp_path)
    assert result.status == 2
    assert "no checkpoint of run is intact: " in only_line(result.stderr)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("damage", [cut, flip, lengthen_header])
@pytest.mark.parametrize("name", ["model.safetensors", "last.safetensors"])
@pytest.mark.parametrize("sums", [True, False])
def test_damaged_weights_are_refused_by_name(
    programs: Interpreter,
    whole: Path,
    tmp_path: Path,
    damage: Callable[[Path], None],
    name: str,
    sums: bool,
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    damage((folder / name).resolve())
    reason = " is damaged: its sha256"
    if not sums:
        for path in folder.rglob("SHA256SUMS"):
            path.unlink()
        if damage is flip:
            return  # nothing but the sum can tell
        reason = " is not a complete safetensors file"
    result = programs.run(VALIDATE, "--checkpoint", folder / name, cwd=tmp_path)
    assert result.status == 2
    assert f"{folder / name}{reason}" in only_line(result.stderr)


@pytest.mark.parametrize("value", ["nan", "65504 * 2 in float16"])
def test_weights_that_are_not_finite_are_refused_by_key(
    programs: Interpreter, whole: Path, tmp_path: Path, value: str
) -> None:
    tensors = safetensors.torch.load_file(whole / "model.safetensors")
    if value == "nan":
        tensors["fc.bias"][1] = torch.nan
    else:
        tensors["fc.bias"] = (tensors["fc.bias"] + 2 * 65504).half()
    shutil.copy(whole / "config.yaml", tmp_path)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    result = programs.run(VALIDATE, "--checkpoint", tmp_path / "model.safetensors", cwd=tmp_path)
    assert result.status == 2
    assert "fc.bias holds values that are not finite" in only_line(result.stderr)
