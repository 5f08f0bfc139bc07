"""What the tests of training share: tiny data sets and options, and what runs leave."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from interpreters import ENVIRONMENT, Result

TRAIN, VALIDATE = "train.py", "validate.py"

# A model that trains an epoch of `image_folder` in under a second.
SMALL_MODEL = ["--model", "resnet10t_emax", "--model-kwargs", "channels=[8,8,8,8]"]
SMALL = [
    *SMALL_MODEL,
    *["--img-size", "32", "-b", "8", "-j", "0", "--warmup-epochs", "0", "--lr", "0.05"],
]

# `trainer_for` of conftest.py: options to a Trainer.
MakeTrainer = Callable[..., Any]


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
    """The folder of the newest checkpoint of a run."""
    return max((folder / "checkpoints").glob("epoch-*"))


def state_of(folder: Path) -> dict[str, Any]:
    """The training state in a run's newest checkpoint."""
    import torch

    return torch.load(newest_checkpoint(folder) / "state.pt", weights_only=True)


def sum_up(folder: Path) -> None:
    """Make the sums of a folder fit its files."""
    suffixes = (".safetensors", ".pt")
    files = [p for p in folder.iterdir() if p.suffix in suffixes or p.name == "config.json"]
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
