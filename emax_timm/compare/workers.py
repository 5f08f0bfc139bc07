"""Processes that make runs: on CPUs one on each core, pinned to it, with one thread.

On a GPU one process makes several runs side by side.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..files import write_text
from ..runner import FailedRunError
from ..training.config import UsageError, option
from ..training.signals import Stop, Stopped
from .run import JOB, PARENT, RESULT

__all__ = ["LOG", "StudyOptions", "Workers", "cores", "has_result", "open_workers", "slots"]

LOG = "log.txt"  # what the process of a run prints
POLL = 0.1  # seconds between looks at the processes
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass
class StudyOptions:
    """The options of the commands that make the runs of a study."""

    study: str | None = option(
        None, "YAML file or name of a study", positional=True, metavar="STUDY"
    )
    output: str = option("runs", "folder for the folder of the study", metavar="DIR")
    jobs: int = option(
        0,
        "runs or trials at a time (default: on CPUs one on each core, pinned to it, with one "
        "thread; on a GPU all runs of a seed, in one process, or one trial)",
        bounds=(0, 4096),
    )
    device: str = option("", "device to train on (default: cuda if available, else cpu)")
    data_dir: str | None = option(None, "root folder of the data set, in place of the study's")


def cores() -> list[int]:
    """Return the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class Process(NamedTuple):
    """A process, the core that it is pinned to, and the file that it prints into."""

    process: subprocess.Popen
    core: int | None
    log: Path


class Workers:
    """At most so many processes at a time, each making a run, or several of them.

    Args:
        slots: For each process the core that it is pinned to; None leaves its threads alone.
        stop: Holds the signal that asks this process to stop, if there was one.
    """

    def __init__(self, slots: list[int | None], stop: Stop) -> None:
        self.free, self.stop = list(slots), stop
        self.running: dict[Path, Process] = {}
        self.asked: set[Path] = set()  # to stop

    def start(self, jobs: Mapping[Path, dict[str, Any]]) -> None:
        """Start a process that makes the run of each folder; there must be a free slot."""
        core = self.free.pop(0)
        for folder, job in jobs.items():
            write_text(folder / JOB, json.dumps({**job, "core": core}, indent=1))
        environment = os.environ | {PARENT: str(os.getpid())}
        environment |= ONE_THREAD if core is not None else {}
        path = next(iter(jobs)) / LOG
        with path.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "emax_timm.compare.run", *map(str, jobs)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        self.running |= dict.fromkeys(jobs, Process(process, core, path))

    def ended(self) -> list[Path]:
        """Wait a moment; return the runs that have ended well since the last call.

        Raises:
            FailedRunError: If a run failed; the other processes go on.
            Stopped: If this process was asked to stop.
        """
        time.sleep(POLL)
        if self.stop.number:
            raise Stopped(self.stop.number)
        done = []
        for folder, one in list(self.running.items()):
            status = one.process.poll()
            if status is None:
                continue
            del self.running[folder]
            if one not in self.running.values():
                self.free.append(one.core)
            # A process that was asked as it ended had no handler of the signal any more.
            asked = folder in self.asked and status in (128 + signal.SIGTERM, -signal.SIGTERM)
            if status and not asked:
                names = [folder, *(f for f, other in self.running.items() if other == one)]
                what = f"failed: {_last_line(one.log)}"
                if status < 0:
                    name = signal.Signals(-status).name
                    what = f"was killed by {name}" + " (no memory left?)" * (name == "SIGKILL")
                raise FailedRunError(f"{', '.join(map(str, names))} {what}")
            done.append(folder)
        return done

    def end(self, folder: Path) -> None:
        """Ask the process of a run to stop; it writes a checkpoint first."""
        self.asked.add(folder)
        self.running[folder].process.terminate()

    def end_all(self) -> None:
        """Ask all processes to stop, and wait for them."""
        for one in self.running.values():
            one.process.terminate()
        for one in self.running.values():
            one.process.wait()


@contextlib.contextmanager
def open_workers(jobs: int, device: str, stop: Stop) -> Iterator[Workers]:
    """Open `jobs` workers, or on CPUs one for each core if it is 0; they end with the context.

    Raises:
        UsageError: If there are fewer cores than jobs.
    """
    workers = Workers(slots(jobs, device), stop)
    try:
        yield workers
    finally:
        workers.end_all()


def slots(jobs: int, device: str) -> list[int | None]:
    """Return for each of the processes the core that it is pinned to, or None.

    Raises:
        UsageError: If there are fewer cores than jobs.
    """
    if device != "cpu":
        return [None] * (jobs or 1)
    here = cores()
    if jobs > len(here):
        raise UsageError(f"--jobs {jobs}: a run takes a core, and there are {len(here)}")
    return list(here[: jobs or len(here)])


def has_result(folder: Path) -> bool:
    """Return whether a run has ended."""
    return (folder / RESULT).exists()


def _last_line(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it printed nothing")
