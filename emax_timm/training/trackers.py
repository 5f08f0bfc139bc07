"""Experiment trackers that a run may log to as well; each needs a package of its own."""

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

# Logs an epoch's numbers, by their names.
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

    # trackio identifies runs by their names only.
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
        reinit="create_new",  # not the run of another trainer in this process
        settings=wandb.Settings(console="off"),
    ) as run:
        yield lambda epoch, row: run.log(row, step=epoch)


TRACKERS: dict[str, Callable[[Path, dict[str, Any], int], AbstractContextManager[Log]]] = {
    "tensorboard": _tensorboard,
    "trackio": _trackio,
    "wandb": _wandb,
}


def check_packages(names: Iterable[str]) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        UsageError: If one is missing; the message says what to install.
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
    """Open the trackers of a run, and yield a function that logs to all of them.

    A tracker that fails, at once or later, does not end the run: a warning is printed once.

    Args:
        names: Keys of `TRACKERS`.
        folder: The run directory, which also gives the run its name.
        config: The configuration, as plain values.
        epoch: The first epoch that will be logged. tensorboard drops what it has from there on; the
            others keep it, because a resumed run repeats an epoch with the same numbers.
    """
    failed = set()

    def attempt(name: str, action: Callable[..., Any], *args: Any) -> Any:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for the run
                return action(*args)
        except Exception as error:
            if name not in failed:
                # Not the error's text, which may hold an API key.
                kind = type(error).__name__
                message = f"warning: {name} failed ({kind}); the run continues"
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
            # The error lets a tracker show that the run was cut short. Bound to a name, it would be
            # in a reference cycle that keeps its traceback alive, and so the loader's workers.
            attempt(name, managers[name].__exit__, *sys.exc_info())


def _run_id(folder: Path) -> str:
    """Return the run's identifier for the trackers, which stays the same when the run is resumed.

    The folder's name alone could be that of an earlier run whose folder was deleted.
    """
    path = folder / "run_id"
    if not path.exists():
        replace_file(path, lambda file: file.write_text(secrets.token_hex(4) + "\n"))
    return path.read_text().strip()
