"""What the tests of training share: tiny data sets and options, and programs run as processes.

Run as a script this file is the server behind `Programs`: it imports torch and timm once and forks
a process per program, which spares the seconds that every start of Python would cost.
"""

import atexit
import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
TRAIN, VALIDATE = "train.py", "validate.py"

# A model that trains an epoch of `image_folder` in under a second.
SMALL_MODEL = ["--model", "resnet10t_emax", "--model-kwargs", "channels=[8,8,8,8]"]
SMALL = [
    *SMALL_MODEL,
    *["--img-size", "32", "-b", "8", "-j", "0", "--warmup-epochs", "0", "--lr", "0.05"],
]

# Every name that a process under test may write to is given to it, so its environment is small.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TQDM_"))},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


# `trainer_for` of conftest.py: options to a Trainer.
MakeTrainer = Callable[..., Any]


class Result(NamedTuple):
    """What a finished process leaves."""

    status: int
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stdout.splitlines()[-1]


def run_program(*command: str | Path, cwd: Path, timeout: float = 250) -> Result:
    """Run a Python script or `-m module` in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def run_on_two_ranks(*command: str | Path, cwd: Path, options: Sequence[str] = ()) -> Result:
    """Run a script under torchrun, which may have more options."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return run_program(*launcher, *command, cwd=cwd)


class Programs:
    """Starts train.py and validate.py in processes of their own, quickly."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def run(
        self, script: str, *arguments: str | Path, cwd: Path, kill_after: float | None = None
    ) -> Result:
        """Run a script of the checkout in the folder `cwd`; SIGKILL it after so many seconds."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = [script, list(map(str, arguments)), str(cwd), str(out), str(err), kill_after]
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            status = int(self.server.stdout.readline())
            return Result(status, out.read_text(), err.read_text())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(30)


def serve() -> None:
    """Fork a process for every line that comes in, and answer with its exit status."""
    import emax_timm.training  # noqa: F401  (what makes a start slow)

    for line in sys.stdin:
        script, arguments, cwd, out, err, kill_after = json.loads(line)
        child = os.fork()
        if child == 0:
            os.chdir(cwd)
            for descriptor, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
            sys.argv = [script, *arguments]
            sys.path[0] = str(ROOT)
            status = 1
            try:
                runpy.run_path(str(ROOT / script), run_name="__main__")
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else 0
            except BaseException:
                sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            atexit._run_exitfuncs()  # as the interpreter does; multiprocessing ends workers there
            os._exit(status)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)  # in vain if it has ended
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def image_folder(
    root: Path,
    splits: Sequence[str] = ("train", "validation"),
    classes: Sequence[str] = ("cat", "dog"),
    counts: Sequence[int] = (16, 5),
) -> Path:
    """Write an ImageFolder of PNG and JPEG files whose classes differ in colour.

    Args:
        root: Where to.
        splits: Folders with a folder per class.
        classes: Names of those.
        counts: Images per class in each split.
    """
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for split, count in zip(splits, counts, strict=False):
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = random.integers(0, 256, (40, 36, 3)).astype(np.uint8)
                pixels[..., number % 3] //= 3
                Image.fromarray(pixels).save(folder / f"{index}.{('png', 'jpg')[index % 2]}")
    return root


def files_in(folder: Path) -> set[str]:
    """Names of all files below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def newest_checkpoint(folder: Path) -> Path:
    """The folder of a run's newest checkpoint."""
    return max((folder / "checkpoints").glob("epoch-*"))


def state_of(folder: Path) -> dict[str, Any]:
    """The training state in a run's newest checkpoint."""
    import torch

    return torch.load(newest_checkpoint(folder) / "state.pt", weights_only=True)


def sum_up(folder: Path) -> None:
    """Make the sums of a folder fit its files."""
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt")]
    sums = [f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (folder / "SHA256SUMS").write_text("".join(sums))


def left_by(folder: Path) -> dict[str, Any]:
    """All that a run leaves but for its seconds: weights, averages, state, best, log."""
    import safetensors.torch

    newest = newest_checkpoint(folder)
    state = state_of(folder)
    del state["seconds"], state["timing"], state["environment"]
    state["rows"] = [without_seconds(row) for row in state["rows"]]
    files = {path.name: path for path in newest.glob("*.safetensors")}
    files["best"] = folder / "model.safetensors"
    weights = {name: safetensors.torch.load_file(path) for name, path in files.items()}
    layers = (folder / "layers.jsonl").read_text()
    log = rows_without_seconds(folder / "log.jsonl")
    return {**state, **weights, "log": log, "layers of the log": layers}


def without_seconds(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a log, but for the columns that differ from run to run."""
    times = ("seconds", "images_per_second", "data_wait")
    return {key: value for key, value in row.items() if key not in times}


def rows_without_seconds(path: Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl, likewise."""
    return [without_seconds(json.loads(line)) for line in path.read_text().splitlines()]


def same_tensors(first: Any, second: Any) -> bool:
    """Whether two nests of containers hold bitwise the same."""
    import torch

    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same_tensors(value, second[key]) for key, value in first.items()
        )
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same_tensors, first, second))
    return first == second


def only_line(text: str) -> str:
    """The single line of a text."""
    lines = text.splitlines()
    assert len(lines) == 1, text
    return lines[0]


def flags(values: Iterable[Any]) -> list[str]:
    return [str(value) for value in values]


if __name__ == "__main__":
    serve()
