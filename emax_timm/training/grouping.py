"""The schedule of EMAX's dynamic grouping over the steps of a run."""

from torch import nn

from ..attention import set_grouping
from .config import TrainConfig

__all__ = ["grouping_schedule", "schedule_grouping"]


def schedule_grouping(model: nn.Module, progress: float, config: TrainConfig) -> None:
    """Set the warm-up and the temperature of a model's EMAX layers for a point in training.

    Args:
        model: Any module, also one in DistributedDataParallel or torch.compile.
        progress: Steps done over steps in all, in [0, 1].
        config: Its `grouping_warmup` and `grouping_temperature` define the schedule.
    """
    warmup, temperature = grouping_schedule(
        progress, config.grouping_warmup, config.grouping_temperature
    )
    set_grouping(model, warmup=warmup, temperature=temperature)


def grouping_schedule(
    progress: float, warmup: list[float], temperature: list[float]
) -> tuple[float, float]:
    """Return EMAX's warm-up s and temperature tau at a point in training.

    Args:
        progress: Steps done over steps in all, in [0, 1].
        warmup: Fractions of the steps between which s rises linearly from 0 to 1.
        temperature: tau at the first and at the last step; it is linear in between.
    """
    start, end = warmup
    rise = (progress - start) / (end - start) if end > start else float(progress >= end)
    first, last = temperature
    return min(1.0, max(0.0, rise)), first + (last - first) * progress
