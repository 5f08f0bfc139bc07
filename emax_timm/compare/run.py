"""A process that makes runs of a study: it trains, tests once, and writes result.json of each.

    python -m emax_timm.compare.run RUN_DIRECTORY...

A run directory holds job.json: the options of train.py (`config`), constants to start parameters
from (`init`), a change of the model (`experiment`), the processor that the process is pinned to
(`core`), and what identifies the run.
Several runs take turns, step by step. An interrupted run continues where it stood.
"""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch

from ..attention import EMAX
from ..files import remove, replace_file
from ..models.cost import count_macs
from ..ops import explain
from ..runner import command
from ..training import checkpoint
from ..training.build import build_trainer
from ..training.conditional import base_optimizer
from ..training.config import TrainConfig, from_mapping
from ..training.distributed import DistributedContext, open_distributed_context
from ..training.guard import BadStepError
from ..training.signals import Stop, Stopped, catch_signals
from ..training.trainer import Trainer
from ..version import __version__
from .experiments import EXPERIMENTS, parameters_ending
from .gradients import record_gradients
from .graphs import graphed_passes
from .outcome import results
from .turns import in_turns

__all__ = ["JOB", "PROCESSOR", "RESULT", "environment", "make_runs", "run", "trainer_of"]

JOB, RESULT = "job.json", "result.json"
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
        for folder in folders:
            if not (folder / RESULT).exists():
                seconds = _processor_seconds(folder, len(folders))
                replace_file(folder / PROCESSOR, lambda file, s=seconds: file.write_text(str(s)))
        print(f"{prog}: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    return 0


def _settle_on(core: int | None) -> None:
    """Use one thread of one core, and end with the process that has started this one."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG of linux/prctl.h
        if core is not None:
            os.sched_setaffinity(0, {core})
    if core is not None:
        torch.set_num_threads(1)


def make_runs(jobs: Mapping[Path, dict[str, Any]]) -> None:
    """Make the run of each folder; several take turns, and on a GPU each step is a graph.

    Raises:
        Stopped: If a signal asked for it; checkpoints have been written.
        Exception: The first that a run raises; the others have been stopped like that.
    """
    with catch_signals() as stop:
        if len(jobs) == 1:
            for folder, job in jobs.items():
                make_run(folder, job, stop)
            return

        def maker(folder: Path, job: dict[str, Any]) -> Callable[[Callable[[], None]], None]:
            return lambda hand_over: make_run(folder, job, stop, len(jobs), hand_over)

        errors = in_turns(
            [maker(*each) for each in jobs.items()], lambda: stop(signal.SIGTERM, None)
        )
    for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
        raise error


def make_run(
    folder: Path,
    job: dict[str, Any],
    stop: Stop,
    together: int = 1,
    hand_over: Callable[[], None] | None = None,
) -> None:
    """Train as the job says, test the best weights, and write `RESULT` into the folder.

    Args:
        folder: The run directory.
        job: What is in its `JOB`.
        stop: Holds the signal that asks the run to stop, if there was one.
        together: The number of runs that this process makes side by side.
        hand_over: Called after each of the optimizer's steps, to let the others make one.

    Raises:
        Stopped: If a signal asked for it; a checkpoint has been written.
    """
    settings = {**job["config"], "output": str(folder.parent), "experiment": folder.name}
    settings["resume"] = str(folder) if checkpoint.checkpoints(folder) else "auto"
    config = from_mapping(TrainConfig, settings, str(folder / JOB))
    with open_distributed_context(config.device, config.dist_timeout) as context:
        # A job of an earlier version has no experiment.
        trainer = trainer_of(config, job.get("experiment"), context)
        loader, trainer.test_loader = trainer.test_loader, None  # tested below, with its slices
        if trainer.step == 0:
            start_from(trainer, job["init"])
        record_gradients(trainer, folder)
        if hand_over is not None:
            # All random numbers of a step are drawn by then, and the next step's are seeded anew.
            hook = lambda *_: hand_over()  # noqa: E731
            base_optimizer(trainer.optimizer).register_step_post_hook(hook)
        trainer.stop = stop
        made_with = environment(context)  # of the code that trains: a checkout may change meanwhile
        diverged = None
        try:
            with graphed_passes(trainer):
                trainer.run()
        except BadStepError as error:
            diverged = str(error)
        content = {**job, **made_with, "date": _now(), **_cost(trainer), "diverged": diverged}
        content |= results(trainer, loader)
        content |= {"together": together, "processor_seconds": _processor_seconds(folder, together)}
        if together > 1:
            content["memory_bytes"] = None  # what has been measured is that of all of them
    text = json.dumps(content, indent=1) + "\n"
    replace_file(folder / RESULT, lambda file: file.write_text(text, encoding="utf-8"))
    if (folder / checkpoint.CHECKPOINTS).exists():
        remove(folder / checkpoint.CHECKPOINTS)
        (folder / checkpoint.LAST).unlink(missing_ok=True)


def _processor_seconds(folder: Path, together: int) -> float:
    """Return a run's share of the processor time, without that of processes that were killed."""
    path = folder / PROCESSOR
    before = float(path.read_text()) if path.exists() else 0.0
    return round(before + time.process_time() / together, 1)


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


def environment(context: DistributedContext) -> dict[str, Any]:
    """Return what a measurement is made with: versions, commit, machine, and when."""
    device = context.device
    cuda = device.type == "cuda"
    layer = EMAX(32).to(device)
    backends = explain(torch.zeros(1, 32, 4, 4, device=device), layer.weights())
    return {
        "backend": next(name for name, reason in backends.items() if reason is None),
        "commit": commit(),
        "emax_timm": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "machine": f"{platform.machine()} {_processor()}",
        "date": _now(),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """Return the commit of the checkout that this package is in, with + for changes, if any."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        tracked = git("ls-files", "--error-unmatch", __file__)  # not a repository around a venv
        if not tracked or not (name := git("rev-parse", "--short=12", "HEAD")):
            return None
        return name + ("+" if git("status", "--porcelain", "--", "..") else "")
    except OSError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


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
