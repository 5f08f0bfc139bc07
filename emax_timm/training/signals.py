"""Handle SIGTERM and SIGINT as a request to stop a run at the end of its current step."""

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

from .distributed import DistributedContext

__all__ = ["Stop", "Stopped", "catch_signals", "ignore_signals", "until_signal"]

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):  # noqa: N818  (a request, not an error)
    """The run has stopped on the signal `number` and can be resumed."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class Stop:
    """A signal handler that stores the number of the first signal, and 0 until there is one."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Store the number of a signal, unless there was one before."""
        self.number = self.number or number


@contextmanager
def catch_signals() -> Iterator[Stop]:
    """Record SIGTERM and SIGINT instead of ending the process.

    Only the main thread can install handlers; elsewhere no signal is recorded.
    """
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
            # After a signal, a further one must not change the exit status of the ending process.
            signal.signal(number, signal.SIG_IGN if stop.number else handler)


def _die_with_torchrun() -> None:
    """Have Linux send SIGTERM to this process when torchrun ends.

    torchrun may end without stopping its processes, for example after a second SIGTERM of its own.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        set_death_signal = 1  # PR_SET_PDEATHSIG of linux/prctl.h
        ctypes.CDLL(None).prctl(set_death_signal, int(signal.SIGTERM))


def _end_workers() -> None:
    """Kill the loader's workers that are still alive when the interpreter ends.

    The traceback of an error can keep them alive. multiprocessing would send them SIGTERM, which
    they ignore, and wait for them forever.
    """
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for dead workers
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def until_signal(loader: Any, context: DistributedContext, stop: Stop) -> Iterator[Any]:
    """Yield the batches of a loader until any rank receives a signal.

    The ranks agree on this before each batch, with one all-reduce. Their numbers of batches may
    differ.

    Raises:
        Stopped: On every rank, if any rank has received a signal.
    """
    rounds = int(context.max(torch.tensor(len(loader), device=context.device)))
    batches = iter(loader)
    for _ in range(rounds):
        number = stop.number
        if context.size > 1:  # one process alone would wait for its GPU here
            number = int(context.max(torch.tensor(number, device=context.device)))
        if number:
            raise Stopped(number)
        if (batch := next(batches, None)) is not None:
            yield batch


def ignore_signals(worker: int) -> None:
    """Ignore SIGTERM and SIGINT in a worker of the loader.

    Slurm and terminals signal the workers too, but the run needs them until it stops. They end with
    the process that they load for.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
