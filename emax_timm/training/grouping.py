"""The schedule of EMAX's dynamic grouping over the steps of a run."""

from torch import nn

from ..attention import set_grouping
from .config import TrainConfig

__all__ = ["grouping_course", "schedule_grouping"]


def schedule_grouping(model: nn.Module, progress: float, config: TrainConfig) -> None:
    """Set the grouping of a model's EMAX layers to what it is at a fraction of the steps."""
    warmup, temperature = grouping_course(
        progress, config.grouping_warmup, config.grouping_temperature
    )
    set_grouping(model, warmup=warmup, temperature=temperature)


def grouping_course(
    progress: float, warmup: list[float], temperature: list[float]
) -> tuple[float, float]:
    """EMAX's s and tau at a fraction of the training steps.

    Args:
        progress: Steps done over steps in all, in [0, 1].
        warmup: Fractions between which s rises linearly from 0 to 1.
        temperature: tau at 0 and at 1, linear between.
    """
    start, end = warmup
    rise = (progress - start) / (end - start) if end > start else float(progress >= end)
    first, last = temperature
    return min(1.0, max(0.0, rise)), first + (last - first) * progress
