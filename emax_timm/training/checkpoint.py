"""The files of a run.

    config.yaml          the resolved configuration
    model.safetensors    the weights with the best metric (averaged ones if averaging is on)
    config.json          timm's description of that model: the folder is a timm `local-dir:` model
    SHA256SUMS           the sha256 of these two, in the format of the sha256sum command
    checkpoints/         the newest few, each a folder epoch-0002-step-00002502 with
        model.safetensors  averaged.safetensors  state.pt  SHA256SUMS
    last.safetensors     a link to the weights of the newest; where there are no symbolic links
                         (Windows without its developer mode) a hard link, else a copy
    log.csv log.jsonl    a row per epoch
    layers.jsonl         statistics of the EMAX layers, a row per epoch
    curves.png           the curves of these logs, drawn at the end
    summary.json         the result
    run_id               the identifier of the run for the trackers of --log-to
    tensorboard/ wandb/  the local files of these trackers

Weights are safetensors; `state.pt` (optimizer, counters, log rows) holds tensors and plain
containers and is read with torch's restricted unpickler. Every file and every checkpoint is written
under a temporary name, synced to the disk and renamed when complete.
"""

import io
import pickle
import re
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..files import SUMS, check_sum, read_sums, remove, replace_file, sha256_of, write_folder
from .config import UsageError
from .distributed import DistributedContext

__all__ = [
    "BEST",
    "CONFIG",
    "LAST",
    "MODEL_CONFIG",
    "Checkpoint",
    "checkpoints",
    "load_checkpoint",
    "load_weights",
    "read_checked",
    "read_weights",
    "replace_summed",
    "save_best",
    "save_checkpoint",
    "serialized",
]

CONFIG, MODEL_CONFIG = "config.yaml", "config.json"
BEST, LAST = "model.safetensors", "last.safetensors"
CHECKPOINTS = "checkpoints"
WEIGHTS, AVERAGED, STATE = "model.safetensors", "averaged.safetensors", "state.pt"


_NAME = re.compile(r"epoch-(\d+)-step-(\d+)")


class Checkpoint(NamedTuple):
    """The state of a run: state dicts of the model and its average, and all else in `state`."""

    model: dict[str, Tensor]
    averaged: dict[str, Tensor] | None
    state: dict[str, Any]


def save_best(model: nn.Module, folder: Path) -> None:
    """Write the model's weights, and their sha256, as the best of the run in `folder`."""
    replace_summed(folder / BEST, serialized(model.state_dict()))


def replace_summed(path: Path, content: bytes) -> None:
    """Write a file of the run, and its sha256; at every moment the file is what the sums say."""
    new, sums = sha256_of(content), _sums(path.parent)
    # While the file is replaced, the sums of the old and the new one are both valid.
    _write_sums(path.parent, {**sums, path.name: {new, *sums.get(path.name, set())}})
    replace_file(path, lambda file: file.write_bytes(content))
    _write_sums(path.parent, {**sums, path.name: {new}})


def _write_sums(folder: Path, sums: dict[str, set[str]]) -> None:
    lines = [f"{value}  {name}\n" for name, found in sums.items() for value in sorted(found)]
    replace_file(folder / SUMS, lambda file: file.write_text("".join(lines)))


def save_checkpoint(folder: Path, saved: Checkpoint, keep: int) -> None:
    """Write a checkpoint of the run in `folder` and remove all but the newest `keep`."""
    name = f"epoch-{saved.state['epoch']:04}-step-{saved.state['step']:08}"
    buffer = io.BytesIO()
    torch.save(saved.state, buffer)
    files = {WEIGHTS: serialized(saved.model), STATE: buffer.getvalue()}
    if saved.averaged is not None:
        files[AVERAGED] = serialized(saved.averaged)
    sums = "".join(f"{sha256_of(content)}  {file}\n" for file, content in files.items())
    path = folder / CHECKPOINTS / name
    path.parent.mkdir(exist_ok=True)
    if path.exists() and not _is_intact(path):
        remove(path)
    if not path.exists():  # one of the same step has the same content
        write_folder(path, {**files, SUMS: sums.encode()})
    _link_last(folder, path / WEIGHTS)
    # What sorts above is damaged, or of an epoch that had more steps when it was written.
    present = checkpoints(folder)
    place = present.index(path)
    for old in [*present[:place], *present[place + keep :]]:
        remove(old)


def _link_last(folder: Path, weights: Path) -> None:
    link = folder / f"{LAST}.partial"
    link.unlink(missing_ok=True)
    try:
        link.symlink_to(weights.relative_to(folder))
    except (NotImplementedError, OSError):
        try:
            link.hardlink_to(weights)
        except (NotImplementedError, OSError):
            shutil.copyfile(weights, link)
    link.replace(folder / LAST)


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints, the newest first."""
    found = {path: _NAME.fullmatch(path.name) for path in (folder / CHECKPOINTS).glob("epoch-*")}
    places = {path: (int(name[1]), int(name[2])) for path, name in found.items() if name}
    return sorted(places, key=places.__getitem__, reverse=True)


def load_checkpoint(folder: Path, context: DistributedContext) -> Checkpoint:
    """Load the newest undamaged checkpoint of the run in `folder`; warns of damaged ones.

    Args:
        folder: The run directory.
        context: The distributed context.

    Raises:
        UsageError: If there is none.
    """
    damaged: list[str] = []
    for path in checkpoints(folder):
        try:
            found = _read_checkpoint(path)
        except UsageError as error:
            damaged.append(str(error))
            continue
        for reason in damaged:
            context.warn(f"a damaged checkpoint is left out: {reason}")
        return found
    if damaged:
        raise UsageError(f"no checkpoint of {folder} is intact: {damaged[0]}")
    raise UsageError(f"there is no run to resume: {folder} has no checkpoint")


def _is_intact(path: Path) -> bool:
    try:
        _read_checkpoint(path)
    except UsageError:
        return False
    return True


def _read_checkpoint(path: Path) -> Checkpoint:
    sums = _sums(path)
    if not {WEIGHTS, STATE} <= sums.keys():
        raise UsageError(f"{path / SUMS} lacks {WEIGHTS} or {STATE}")
    averaged = read_weights(path / AVERAGED) if AVERAGED in sums else None
    return Checkpoint(read_weights(path / WEIGHTS), averaged, _read_state(path / STATE))


def _read_state(path: Path) -> dict[str, Any]:
    """Read a `state.pt` file, which can yield plain data only, into the host's memory.

    An optimizer moves what belongs on the device; the steps that it counts on the host would make
    it wait for the device.
    """
    content = read_checked(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about other pickles, which are refused
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds {type(state).__name__}")
        return state
    except Exception as error:
        # torch's message is not shown, as it advises turning the restricted unpickler off.
        reason = "it is damaged, or holds more than plain data"
        reason = reason if isinstance(error, pickle.UnpicklingError) else str(error)
        raise UsageError(f"{path} is not a complete training state: {reason}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file; its sha256 is checked if `SHA256SUMS` beside it has one.

    Raises:
        UsageError: If the file is missing, has another sha256 or is no complete safetensors file.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: weights are read from .safetensors files only")
    content = read_checked(path)
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise UsageError(f"{path} is not a complete safetensors file: {error}") from None


def read_checked(path: Path) -> bytes:
    """Read a file; its sha256 is checked if `SHA256SUMS` beside it has one.

    Raises:
        UsageError: If the file is missing or has another sha256.
    """
    try:
        file = path.resolve(strict=True)  # the sums are beside the file, not beside a link to it
        content = file.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file {path}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    try:
        check_sum(file, content)
    except ValueError as error:
        # The name that was asked for, not that of the file which a link leads to.
        raise UsageError(str(error).replace(str(file), str(path), 1)) from None
    return content


def _sums(folder: Path) -> dict[str, set[str]]:
    try:
        return read_sums(folder)
    except ValueError as error:
        raise UsageError(str(error)) from None


def serialized(tensors: dict[str, Tensor]) -> bytes:
    """Return the content of a safetensors file; the same tensors give the same bytes."""
    whole = {name: value.detach().contiguous() for name, value in tensors.items()}
    return safetensors.torch.save(whole, metadata={"format": "pt"})


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a safetensors file into the model; its keys and shapes must be those of the model.

    Raises:
        UsageError: If the file cannot be read, is of another architecture, or holds values that are
            not finite.
    """
    tensors = read_weights(path)
    _check_keys(model.state_dict(), tensors, path)
    model.load_state_dict(tensors)


def _check_keys(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    def problem() -> str | None:
        missing, added = sorted(expected.keys() - found), sorted(found.keys() - expected)
        if missing:
            more = f" and {len(missing) - 1} more keys" if len(missing) > 1 else ""
            return f"it lacks {missing[0]}{more}"
        if added:
            more = f" and {len(added) - 1} more keys" if len(added) > 1 else ""
            return f"it has {added[0]}{more}, which the model lacks"
        for name, value in expected.items():
            if value.shape != found[name].shape:
                return f"{name} is {list(found[name].shape)}, in the model {list(value.shape)}"
        return None

    if reason := problem():
        raise UsageError(
            f"{path} holds weights of another model: {reason}; "
            "give the --model and --model-kwargs that it was trained with"
        )
    for name, value in found.items():
        if not value.isfinite().all():
            raise UsageError(f"{path}: {name} holds values that are not finite")
