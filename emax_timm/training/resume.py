"""Save the whole state of a run as a checkpoint, and restore it."""

from dataclasses import asdict
from typing import Any

import timm
import torch
from torch.utils.data import IterableDataset

from ..version import __version__
from .checkpoint import Checkpoint
from .config import UsageError
from .evaluate import Metrics
from .progress import Timing
from .run import Run

__all__ = ["restore", "rewind", "snapshot"]


def snapshot(run: Run) -> Checkpoint:
    """Return all state that `restore` needs to resume the run at its next step."""
    averaged = None if run.averaged is None else run.averaged.module.state_dict()
    plateau = _plateau(run)
    state = {
        "epoch": run.epoch,
        "step": run.step,
        "steps_per_epoch": run.steps_per_epoch,
        "losses": run.losses,
        "recent": list(run.guard.recent),
        "timing": asdict(run.timing),
        "broken": run.guard.corrupt,
        "best": run.best and tuple(run.best),
        "best_epoch": run.best_epoch,
        "seconds": run.seconds,
        "rows": run.rows,
        "layers": run.layers,
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "plateau": plateau and plateau.state_dict(),
        "lr_without_noise": getattr(run.scheduler, "restore_lr", None),  # plateau needs it too
        "environment": _environment(run),
    }
    return Checkpoint(run.model.state_dict(), averaged, state)


def restore(run: Run, saved: Checkpoint) -> None:
    """Restore the state of a run from its checkpoint.

    Warns of changes, such as another device, after which the results are not bit-identical.

    Raises:
        UsageError: If the checkpoint is from a run with another model or optimizer, or from the
            middle of an epoch with another number of steps.
    """
    try:
        _load(run, saved)
        steps, environment = saved.state["steps_per_epoch"], saved.state["environment"]
        changes = [
            f"{name} was {environment[name]} and is {value}"
            for name, value in _environment(run).items()
            if environment[name] != value
        ]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"the run was made with other options: {error}") from None
    if steps != run.steps_per_epoch:
        if run.step != run.epoch * steps:
            raise UsageError(
                f"the run stands in the middle of an epoch of {steps} steps, which now has "
                f"{run.steps_per_epoch}: give the same data and, with --batch-size and "
                "--grad-accum-steps, the same global batch"
            )
        run.step = run.epoch * run.steps_per_epoch
    if changes:
        run.context.warn(f"not to the bit as it would have continued: {'; '.join(changes)}")
    if run.step > run.epoch * run.steps_per_epoch:
        _warn_within_epoch(run)
    if run.scheduler is not None:
        if run.epoch and _plateau(run) is None:
            run.scheduler.step(run.epoch)
        run.scheduler.step_update(run.step)


def rewind(run: Run, step: int) -> None:
    """Go back to where the last step that was launched began, which has not changed the weights."""
    run.guard.undo()
    run.update.drop()
    if run.step > step:
        run.update.revert()
        run.step = step
        if run.scheduler is not None:
            run.scheduler.step_update(step)
    run.groupings[0].set(max(0, step - 1))


def _load(run: Run, saved: Checkpoint) -> None:
    state = saved.state
    run.model.load_state_dict(saved.model)
    run.optimizer.load_state_dict(_with_own_options(run, state["optimizer"]))
    run.scaler.load_state_dict(state["scaler"])
    if run.averaged is not None:
        if saved.averaged is None:
            raise ValueError("it has no averaged weights")
        run.averaged.module.load_state_dict(saved.averaged)
    if (plateau := _plateau(run)) is not None:
        plateau.load_state_dict(state["plateau"])
        run.scheduler.restore_lr = state["lr_without_noise"]  # type: ignore
    run.epoch, run.step, run.seconds = state["epoch"], state["step"], state["seconds"]
    run.best = Metrics(*state["best"]) if state["best"] else None
    run.best_epoch = state["best_epoch"]
    run.losses, run.rows, run.layers = state["losses"], state["rows"], state["layers"]
    run.timing = Timing(**state["timing"])
    run.guard.corrupt = state["broken"]
    run.guard.recent.extend(state["recent"])


def _with_own_options(run: Run, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of an optimizer with the options of this one, which may have changed."""
    before, now = state["param_groups"], run.optimizer.param_groups
    if len(before) != len(now):
        return state  # which torch refuses
    names = {"weight_decay", "momentum", "eps", "betas", "fused", "foreach", *run.config.opt_kwargs}
    if run.scheduler is None:
        names.add("lr")
    groups = [
        {**saved, **{name: own[name] for name in names & own.keys()}}
        for saved, own in zip(before, now, strict=True)
    ]
    return {**state, "param_groups": groups}


def _warn_within_epoch(run: Run) -> None:
    if isinstance(run.train_loader.dataset, IterableDataset):
        run.context.warn("the data are a stream: the epoch continues with its first images again")
    if run.context.size > 1 and run.config.no_ddp_bb and not run.config.sync_bn:
        run.context.warn("--no-ddp-bb: all ranks continue with the batch norm statistics of rank 0")


def _plateau(run: Run) -> Any:
    """Return torch's scheduler inside timm's plateau, the only one with state; else None."""
    return getattr(run.scheduler, "lr_scheduler", None)


def _environment(run: Run) -> dict[str, Any]:
    """Return what the bits of a result depend on, besides the numbers in the configuration."""
    device, config = run.context.device, run.config
    cuda = device.type == "cuda"
    return {
        "the number of ranks": run.context.size,
        "the device": torch.cuda.get_device_name(device) if cuda else device.type,
        "the number of CPU threads": None if cuda else torch.get_num_threads(),
        "--torchcompile": config.torchcompile,
        "mixed precision": config.amp_dtype if config.amp else None,
        "--channels-last": config.channels_last,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "emax_timm": __version__,
    }
