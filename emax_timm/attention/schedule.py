"""The schedule of dynamic grouping over training: its state is in the EMAX layers of a model."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .emax import EMAX

__all__ = ["set_grouping", "set_layers"]


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
    set_layers(layers, warmup, temperature)
    return len(layers)


@torch.no_grad()
def set_layers(layers: Sequence[EMAX], warmup: float | None, temperature: float | None) -> None:
    """Set the values, which must be in their ranges, of EMAX layers; None keeps a value.

    On a GPU it takes two kernels in all, not one for each layer.
    """
    values = {"warmup": warmup, "temperature": temperature}
    given = {name: value for name, value in values.items() if value is not None}
    buffers = [getattr(layer, name) for name in given for layer in layers]
    if buffers:
        torch._foreach_zero_(buffers)
        torch._foreach_add_(buffers, [value for value in given.values() for _ in layers])
