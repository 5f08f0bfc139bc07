"""The trackers that a run may also be logged to; each is a package of its own."""

import contextlib
import importlib.util
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ..files import replace_file
from .config import UsageError

__all__ = ["TRACKERS", "check_packages", "open_trackers"]

PROJECT = "emax-timm"

# Takes an epoch and the numbers that belong to it.
Log = Callable[[int, dict[str, float]], object]


@contextmanager
def _tensorboard(folder: Path, config: dict[str, Any], epoch: int) -> Iterator[Log]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(folder / "tensorboard", purge_step=epoch) as writer:

        def log(epoch: int, row: dict[str, float]) -> None:
            for name, value in row.items():
                writer.add_scalar(name, value, epoch)
            writer.flush()

        yield log


@contextmanager
def _trackio(folder: Path, config: dict[str, Any], epoch: int) -> Iterator[Log]:
    import trackio

    # It knows runs by their names only.
    name = f"{folder.name}-{_run_id(folder)}"
    trackio.init(PROJECT, name=name, config=config, resume="allow", embed=False)
    try:
        yield lambda epoch, row: trackio.log(row, step=epoch)
    finally:
        trackio.finish()


@contextmanager
def _wandb(folder: Path, config: dict[str, Any], epoch: int) -> Iterator[Log]:
    import wandb

    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=folder.name,
        id=_run_id(folder),
        resume="allow",
        dir=folder,
        config=config,
        allow_val_change=True,  # a resumed run may have more epochs
        settings=wandb.Settings(console="off"),
    ) as run:
        yield lambda epoch, row: run.log(row, step=epoch)


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}


def check_packages(names: Iterable[str]) -> None:
    """Refuse trackers whose package is not there.

    Raises:
        UsageError: With the extra to install.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"--log-to {name} needs the package {name}: "
                f"pip install {name}, or 'emax-timm[track]' for all of them"
            )


@contextmanager
def open_trackers(
    names: Iterable[str], folder: Path, config: dict[str, Any], epoch: int = 0
) -> Iterator[Log]:
    """Open trackers for a run; gives the function that logs to all of them.

    No failure of a tracker, at its start or later, ends the run: it is told once.

    Args:
        names: Keys of `TRACKERS`.
        folder: The run's; its name is that of the run.
        config: Plain values.
        epoch: The first one that will be logged. tensorboard drops what it has from there on; the
            others keep it, for a resumed run repeats an epoch with the same numbers.
    """
    failed = set()

    def attempt(name: str, action: Callable[..., Any], *args: Any) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is the run's
                return action(*args)
        except Exception as error:
            if name not in failed:
                # Not its text, which may hold a key.
                kind = type(error).__name__
                message = f"warning: {name} failed ({kind}); the run goes on"
                print(message, file=sys.stderr, flush=True)
            failed.add(name)

    managers = {name: TRACKERS[name](folder, config, epoch) for name in dict.fromkeys(names)}
    logs = {name: attempt(name, manager.__enter__) for name, manager in managers.items()}
    logs = {name: log for name, log in logs.items() if log is not None}

    def log_to_all(epoch: int, row: dict[str, float]) -> None:
        for name, log in logs.items():
            attempt(name, log, epoch, row)

    try:
        yield log_to_all
    finally:
        for name in logs:
            # A tracker may show that the run was cut short. A name for the error would be a cycle
            # that holds its traceback and so the loader and its workers.
            attempt(name, managers[name].__exit__, *sys.exc_info())


def _run_id(folder: Path) -> str:
    """The run's name to the services, the same after it was resumed and unlike that of any other.

    The folder's name alone may have been that of a run whose folder was deleted.
    """
    path = folder / "run_id"
    if not path.exists():
        replace_file(path, lambda file: file.write_text(secrets.token_hex(4) + "\n"))
    return path.read_text().strip()
