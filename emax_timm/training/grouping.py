"""The schedule of EMAX's dynamic grouping over the steps of a run."""

from torch import Tensor, nn

from ..attention import EMAX
from ..attention.schedule import set_layers
from .config import TrainConfig

__all__ = ["GroupingSchedule", "grouping_buffers", "grouping_schedule"]


class GroupingSchedule:
    """Sets the warm-up and the temperature of a model's EMAX layers for a point in training.

    Nothing is written to the device while the values stay the same.

    Args:
        model: Any module, also one in DistributedDataParallel or torch.compile; its layers are
            looked up once.
        steps: Steps of the whole run.
        config: Its `grouping_warmup` and `grouping_temperature` define the schedule.
    """

    def __init__(self, model: nn.Module, steps: int, config: TrainConfig) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, EMAX)]
        self.steps, self.config = steps, config
        self._now: tuple[float, float] | None = None

    def set(self, step: int) -> None:
        """Set the values of a step; no other code may set them in between."""
        if not self.layers:
            return
        warmup, temperature = self.config.grouping_warmup, self.config.grouping_temperature
        values = grouping_schedule(step / self.steps, warmup, temperature)
        if values != self._now:
            set_layers(self.layers, *values)
            self._now = values


def grouping_buffers(model: nn.Module) -> list[Tensor]:
    """Return the buffers of a model that the schedule sets."""
    layers = [module for module in model.modules() if isinstance(module, EMAX)]
    return [buffer for layer in layers for buffer in (layer.warmup, layer.temperature)]


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
