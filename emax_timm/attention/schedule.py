"""The schedule of dynamic grouping over training: its state is in the EMAX layers of a model."""

import math

import torch
from torch import nn

from .emax import EMAX

__all__ = ["set_grouping"]


def set_grouping(
    model: nn.Module, *, warmup: float | None = None, temperature: float | None = None
) -> int:
    """Set warm-up and temperature of the dynamic grouping in all EMAX layers of a model, in place.

    A training loop of your own calls it in every step; `train.py` does so by `--grouping-warmup`
    and `--grouping-temperature`. `docs/emax.md` explains both.

    Args:
        model: Any module, also one in DistributedDataParallel or torch.compile.
        warmup: How much of each layer's own choice of a group count is used, s in [0, 1]: at 0 the
            channels are grouped as EMA groups them, at 1 as the layer chooses. None keeps it.
        temperature: Temperature tau > 0 of the softmax that the choice has its gradient from. None
            keeps it.

    Returns:
        The number of EMAX layers that were found; the layers of a scripted model are not.

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
