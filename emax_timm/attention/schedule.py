"""The schedule of dynamic grouping over training, as it stands in a model's EMAX layers."""

import math

import torch
from torch import nn

from .emax import EMAX

__all__ = ["set_grouping"]


def set_grouping(
    model: nn.Module, *, warmup: float | None = None, temperature: float | None = None
) -> int:
    """Set the schedule of dynamic grouping on all EMAX layers of a model, in place.

    Args:
        model: Any module; a DistributedDataParallel or compiled one too.
        warmup: s in [0, 1]: 0 groups as EMA does, 1 as the controller chooses. None keeps it.
        temperature: tau > 0 of the straight-through softmax. None keeps it.

    Returns:
        The number of EMAX layers found; those of a scripted model are not.

    Raises:
        ValueError: If a value is out of its range.
    """
    if warmup is not None and not 0 <= warmup <= 1:
        raise ValueError(f"warmup must be in [0, 1], not {warmup!r}")
    smallest = torch.finfo(torch.float32).tiny
    if temperature is not None and not smallest <= temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, not {temperature!r}")
    layers = [module for module in model.modules() if isinstance(module, EMAX)]
    for layer in layers:
        if warmup is not None:
            layer.warmup.fill_(warmup)
        if temperature is not None:
            layer.temperature.fill_(temperature)
    return len(layers)
