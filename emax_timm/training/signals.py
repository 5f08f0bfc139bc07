"""SIGTERM and SIGINT ask a run to stop at the end of its step."""

import atexit
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from .distributed import World

__all__ = ["Stop", "Stopped", "catch_signals", "ignore_signals", "until_signal"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818  (a wish, not an error)
    """The run has stopped as a signal asked it to, and can go on; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """Whether a signal has come: its number, else 0. Later ones change nothing."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.number = self.number or number


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """Note signals instead of dying of them; only the main thread can, elsewhere none are noted."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    _die_with_torchrun()
    atexit.register(_end_workers)
    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            # A further one is not to spoil the exit status of a process that ends as it was asked.
            signal.signal(number, signal.SIG_IGN if stop.number else handler)


def _die_with_torchrun() -> None:
    """Have the system send SIGTERM when torchrun ends, which may not have had the time to.

    It does not, for one, after a second SIGTERM of its own.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGTERM))


def _end_workers() -> None:
    """Kill workers that are left when the interpreter ends, as an error's traceback leaves them.

    multiprocessing would send them SIGTERM, which they ignore, and wait for them for ever.
    """
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for dead workers
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def until_signal(loader: Any, world: World, stop: Stop) -> Iterator[Any]:
    """The batches of a loader, until a signal; ranks agree on it before each (one all-reduce).

    Their numbers of batches may differ by one.

    Raises:
        Stopped: On every rank, if any has had a signal.
    """
    rounds = int(world.max(torch.tensor(len(loader), device=world.device)))
    batches = iter(loader)
    for _ in range(rounds):
        if number := int(world.max(torch.tensor(stop.number, device=world.device))):
            raise Stopped(number)
        if (batch := next(batches, None)) is not None:
            yield batch


def ignore_signals(worker: int) -> None:
    """For the loader's workers: Slurm and terminals signal them too, but the run still needs them.

    They end with the process that they load for.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
