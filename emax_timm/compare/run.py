"""A process that makes runs of a study: it trains, tests once, and writes result.json of each.

    python -m emax_timm.compare.run RUN_DIRECTORY...

A run directory holds job.json: the options of train.py (`config`), constants to start parameters
from (`init`), a change of the model (`experiment`), the processor that the process is pinned to
(`core`), and what identifies the run.
Several runs take turns, step by step. An interrupted run continues where it stood.
"""

import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from ..files import remove, write_text
from ..models.cost import count_macs
from ..runner import FailedRunError, command
from ..training import checkpoint
from ..training.build import build_trainer
from ..training.conditional import base_optimizer
from ..training.config import TrainConfig, from_mapping
from ..training.distributed import DistributedContext, open_distributed_context
from ..training.guard import BadStepError
from ..training.signals import Stop, Stopped, catch_signals
from ..training.trainer import Trainer
from .experiments import EXPERIMENTS, parameters_ending
from .gradients import record_gradients
from .graphs import graphed_passes, with_own_generator
from .outcome import results
from .provenance import environment, now
from .turns import in_turns

__all__ = ["JOB", "PARENT", "PROCESSOR", "RESULT", "make_runs", "run", "trainer_of"]

JOB, RESULT = "job.json", "result.json"
PARENT = "EMAX_STARTED_BY"  # the variable with the number of the process that has started this one
PROCESSOR = "processor_seconds.txt"  # of the processes of a run that were stopped


@command("python -m emax_timm.compare.run")
def run(argv: Sequence[str], prog: str) -> int:
    """Make the runs of the directories that `argv` names; returns the exit status."""
    folders = [Path(name) for name in argv]
    jobs = {f: json.loads((f / JOB).read_text(encoding="utf-8")) for f in folders}
    _settle_on(jobs[folders[0]]["core"])
    try:
        make_runs(jobs)
    except Stopped as stopped:
        print(f"{prog}: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    return 0


def _settle_on(core: int | None) -> None:
    """Use one thread of one core, and end with the process that has started this one."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG of linux/prctl.h
        if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
            raise FailedRunError("the process that has started this one has ended")
        if core is not None:
            os.sched_setaffinity(0, {core})
    if core is not None:
        torch.set_num_threads(1)


def make_runs(jobs: Mapping[Path, dict[str, Any]]) -> None:
    """Make the run of each folder; several take turns, and on a GPU each step is a graph.

    Raises:
        Stopped: If a signal asked for it; checkpoints have been written.
        Exception: What the first one raises that fails; the others have been stopped like that.
    """
    with catch_signals() as stop:
        if len(jobs) == 1:
            for folder, job in jobs.items():
                make_run(folder, job, stop)
            return

        makers = [
            functools.partial(_make_beside, folder, {**job, "together": len(jobs)}, stop)
            for folder, job in jobs.items()
        ]
        errors = in_turns(makers, lambda: stop(signal.SIGTERM, None))
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error


def _make_beside(
    folder: Path, job: dict[str, Any], stop: Stop, hand_over: Callable[[], None]
) -> None:
    """Make one of several runs, and say which it is if it fails."""
    try:
        make_run(folder, job, stop, hand_over)
    except Stopped:
        raise
    except torch.OutOfMemoryError as error:
        raise FailedRunError(
            f"{folder}: the device's memory is too small for {job['together']} runs side by side; "
            "make fewer at a time with --jobs"
        ) from error
    except Exception:
        print(f"{folder} has failed", file=sys.stderr)
        raise


def make_run(
    folder: Path, job: dict[str, Any], stop: Stop, hand_over: Callable[[], None] | None = None
) -> None:
    """Train as the job says, test the best weights, and write `RESULT` into the folder.

    Args:
        folder: The run directory.
        job: What is in its `JOB`.
        stop: Holds the signal that asks the run to stop, if there was one.
        hand_over: Lets the other runs of the process make a step each; it is called after each of
            the optimizer's steps.

    Raises:
        Stopped: If a signal asked for it; a checkpoint has been written.
    """
    settings = {**job["config"], "output": str(folder.parent), "experiment": folder.name}
    settings["resume"] = str(folder) if checkpoint.checkpoints(folder) else "auto"
    config = from_mapping(TrainConfig, settings, str(folder / JOB))
    spent = _Spent(folder, hand_over is None)
    with open_distributed_context(config.device, config.dist_timeout) as context:
        if hand_over is not None:
            hand_over = with_own_generator(hand_over, context.device)
        # A job of an earlier version has no experiment.
        trainer = trainer_of(config, job.get("experiment"), context)
        loader, trainer.test_loader = trainer.test_loader, None  # tested below, with its slices
        if trainer.step == 0:
            start_from(trainer, job["init"])
        record_gradients(trainer, folder)
        if hand_over is not None:
            # All random numbers of a step are drawn by then, and the next step's are seeded anew.
            hook = functools.partial(spent.elsewhere, trainer, hand_over)
            base_optimizer(trainer.optimizer).register_step_post_hook(hook)
        trainer.stop = stop
        made_with = environment(context)  # of the code that trains: a checkout may change meanwhile
        diverged = None
        try:
            with graphed_passes(trainer):
                trainer.run()
        except BadStepError as error:
            diverged = str(error)
        except Stopped:
            spent.note()
            raise
        content = {"together": 1, **job, **made_with, "date": now()}
        content |= {**_cost(trainer), "diverged": diverged, **results(trainer, loader)}
        content["processor_seconds"] = spent.seconds()
        if content["together"] > 1:
            content["memory_bytes"] = None  # what has been measured is that of all of them
    write_text(folder / RESULT, json.dumps(content, indent=1) + "\n")
    if (folder / checkpoint.CHECKPOINTS).exists():
        remove(folder / checkpoint.CHECKPOINTS)
        (folder / checkpoint.LAST).unlink(missing_ok=True)


class _Spent:
    """The processor time of a run, without that of processes that were killed.

    Args:
        folder: The run directory, which holds that of processes that were stopped.
        alone: Whether all of the process's time is this run's, from its start.
    """

    def __init__(self, folder: Path, alone: bool) -> None:
        self.path = folder / PROCESSOR
        self.others = 0.0 if alone else time.process_time()

    def elsewhere(self, trainer: Trainer, hand_over: Callable[[], None], *_: Any) -> None:
        """Hand over, and leave out the time that the others take."""
        start, processor = time.monotonic(), time.process_time()
        hand_over()
        trainer.timing.elsewhere += time.monotonic() - start
        self.others += time.process_time() - processor

    def seconds(self) -> float:
        """Return the time so far."""
        before = float(self.path.read_text()) if self.path.exists() else 0.0
        return round(before + time.process_time() - self.others, 1)

    def note(self) -> None:
        """Write the time so far into the folder, for the process that goes on."""
        write_text(self.path, str(self.seconds()))


def trainer_of(config: TrainConfig, experiment: str | None, context: DistributedContext) -> Trainer:
    """Build the trainer of a run; nothing is written."""
    return build_trainer(config, context, EXPERIMENTS[experiment] if experiment else None)


@torch.no_grad()
def start_from(trainer: Trainer, init: dict[str, float]) -> None:
    """Set the parameters whose names end so to constants.

    Raises:
        UsageError: If there are none for one of the ends.
    """
    models = [trainer.model, *([trainer.averaged.module] if trainer.averaged else [])]
    for end, value in init.items():
        for model in models:
            for parameter in parameters_ending(model, end):
                parameter.fill_(value)


def _cost(trainer: Trainer) -> dict[str, Any]:
    """Return parameters and MACs of the model (without its experiment's), and training's time."""
    config = trainer.config
    with torch.device("meta"):
        model = timm.create_model(
            config.model,
            num_classes=config.num_classes,
            in_chans=config.in_chans,
            **config.model_kwargs,
        )
        macs = count_macs(model, torch.zeros(1, *trainer.data_config["input_size"]))
    speeds = sorted(row["images_per_second"] for row in trainer.rows)
    return {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "macs": macs,
        "steps": trainer.step,
        "epochs": trainer.epoch,
        "best_epoch": trainer.best_epoch,
        "validation": trainer.best and trainer.best._asdict(),
        "seconds": round(trainer.seconds, 1),
        "training_images_per_second": speeds[len(speeds) // 2] if speeds else None,
        "memory_bytes": _peak_memory(trainer.context),
    }


def _peak_memory(context: DistributedContext) -> int:
    if context.device.type == "cuda":
        return torch.cuda.max_memory_allocated(context.device)
    if sys.platform == "win32":
        return 0
    import resource

    # In KiB on Linux, in bytes on macOS.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
