"""What a name on a command line stands for: a model of timm, a run directory or a checkpoint.

Every command asks here, so that each takes a run by its folder (`runs/photos`), as timm writes it
(`local-dir:runs/photos`), or by a file of weights in it (`runs/photos/last.safetensors`).
"""

import re
from pathlib import Path
from typing import NamedTuple

import timm

from . import checkpoint
from .config import UsageError, nearest

__all__ = ["Source", "find_source", "run_folder", "weights_file"]

_LOCAL = "local-dir:"


class Source(NamedTuple):
    """This is what a name stands for."""

    model: str
    """The model as timm names it; `local-dir:FOLDER` for a run."""
    weights: Path | None
    """A file of weights that was named; None for the model's own."""
    folder: Path | None
    """The run directory; None for a model that timm or the hub knows."""


def find_source(name: str) -> Source:
    """Find out what a name stands for; of the files, only their presence is looked at.

    Args:
        name: The name of a timm model, `hf-hub:ORG/NAME`, `local-dir:FOLDER`, a run directory, a
            folder of one of its checkpoints, or a .safetensors file in one of these. A timm model
            takes precedence over a folder of its name, which is then `./NAME`.

    Raises:
        UsageError: If it is none of these; the message says what is missing, or the nearest name.
    """
    local = name.startswith(_LOCAL)
    if not local and (re.match(r"[\w+.-]{2,}:", name) or timm.is_model(name)):
        return Source(name, None, None)
    path = Path(name.removeprefix(_LOCAL))
    if path.is_dir() and (path / checkpoint.MODEL_CONFIG).is_file():
        return Source(f"{_LOCAL}{path}", None, path)
    if path.is_dir() and _is_checkpoint(path):
        path /= checkpoint.WEIGHTS
    elif path.is_dir():
        raise UsageError(
            f"{path} is no run directory: it has no {checkpoint.MODEL_CONFIG}{_nearest_run(path)}"
        )
    elif not path.exists():
        raise UsageError(_unknown(name, path, local))
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: weights are read from .safetensors files only")
    folder = _home(path, checkpoint.MODEL_CONFIG)
    if folder is None:
        raise UsageError(
            f"there is no {checkpoint.MODEL_CONFIG} beside {path}: name the model with --model"
        )
    return Source(f"{_LOCAL}{folder}", path, folder)


def weights_file(name: str) -> Path:
    """Return the file of weights that a path stands for: of a folder, its model.safetensors.

    Raises:
        UsageError: If there is none.
    """
    path = Path(name.removeprefix(_LOCAL))
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"there is no file or folder {path}{_nearest_run(path.parent, path.name)}")
    if (path / checkpoint.BEST).is_file():
        return path / checkpoint.BEST
    hint = ""
    if saved := checkpoint.checkpoints(path):
        hint = f": the run has no best weights yet; its newest checkpoint is {saved[0]}"
    elif not (path / checkpoint.MODEL_CONFIG).is_file():
        hint = _nearest_run(path)
    raise UsageError(f"{path} has no {checkpoint.BEST}{hint}")


def run_folder(name: str) -> Path:
    """Return the run directory that a path stands for: of a file in it, the folder around it."""
    path = Path(name.removeprefix(_LOCAL))
    if path.is_file() or _is_checkpoint(path):
        file = path if path.is_file() else path / checkpoint.WEIGHTS
        return _home(file, checkpoint.CONFIG) or file.parent
    return path


def _is_checkpoint(path: Path) -> bool:
    return path.parent.name == checkpoint.CHECKPOINTS and path.name.startswith("epoch-")


def _home(file: Path, needed: str) -> Path | None:
    """Return the run directory of a file in it or in one of its checkpoints; None if there is none.

    Args:
        file: The file.
        needed: The name of a file that the run directory must have.
    """
    folders = [file.parent]
    if _is_checkpoint(file.parent.absolute()):
        # Within the folder of a checkpoint, a relative path does not name the run directory.
        folder = file.parent if len(file.parent.parts) > 2 else file.parent.absolute()
        folders.append(folder.parent.parent)
    return next((folder for folder in folders if (folder / needed).is_file()), None)


def _unknown(name: str, path: Path, local: bool) -> str:
    if local or path.name != name or path.suffix == ".safetensors":
        return f"there is no file or folder {path}{_nearest_run(path.parent, path.name)}"
    names = timm.list_models()
    return f"unknown model {name}; the nearest is {nearest(name, names)}"


def _nearest_run(folder: Path, name: str = "") -> str:
    """Return the end of a message that names a run in a folder; empty if it has none."""
    runs = [path.parent.name for path in sorted(folder.glob(f"*/{checkpoint.MODEL_CONFIG}"))]
    return f"; the nearest run is {folder / nearest(name, runs)}" if runs else ""
