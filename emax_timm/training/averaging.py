"""The moving average of a model's weights, as timm's, without a search for them in every step."""

from collections.abc import Mapping
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from .grouping import grouping_buffers

__all__ = ["WeightAverage"]


class WeightAverage(ModelEmaV3):
    """timm's moving average of the parameters and buffers of one model.

    The state of the schedule of the grouping is left alone; the trainer sets it.

    Args:
        model: The model, on its device, whose tensors stay the same objects from now on.
        options: Of `ModelEmaV3`, but for `device`, `dtype`, `foreach` and `exclude_buffers`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        scheduled = set(grouping_buffers(model))
        state, own = model.state_dict(keep_vars=True), self.module.state_dict()
        pairs = [(own[name], value) for name, value in state.items() if value not in scheduled]
        # Pairs of the average and the model's tensor; counters are copied, not averaged.
        self._pairs = [pair for pair in pairs if pair[0].is_floating_point()]
        self._counters = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def follow(self, step: int, kept: Mapping[Tensor, Tensor] | None = None) -> None:
        """Move the average towards the model's weights after a step.

        Args:
            step: The number of steps so far.
            kept: The buffers' values after the step by buffer, if the model's own have changed
                since.
        """
        averages, values = _aligned(self._pairs, kept or {})
        self._foreach_lerp_(averages, values, weight=1.0 - self.get_decay(step))
        counts, values = _aligned(self._counters, kept or {})
        if counts:
            torch._foreach_copy_(counts, values)


def _aligned(
    pairs: list[tuple[Tensor, Tensor]], kept: Mapping[Tensor, Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    values = [kept[value] if value in kept else value.detach() for _, value in pairs]
    return [average for average, _ in pairs], values
