"""What is known of a layer before it sees an input: its parameters and its constants.

Dimension letters: b batch, c channels, h w height and width, F finest group count, d = c / F
channels of a fine group, K candidate group counts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layer", "prepare"]


class Layer(NamedTuple):
    """The parameters and constants of a layer; an empty list is a part that it does not have."""

    groups: int
    """F."""
    batch_vote: bool
    """As in `choose_groups`."""
    eps: float
    """Added to gn's variance."""
    grouping: list[Tensor]
    """What `mix_groups` and `choose_groups` take: same_group, warmup and temperature. Empty where
    the finest count is the only candidate."""
    spatial: list[Tensor]
    """Weight and bias of conv1x1 ([d, d, 1, 1], [d]), of conv3x3 ([d, d, 3, 3], [d]) and of gn
    ([d], [d])."""
    controller: list[Tensor]
    """Weight [K, c] and bias [K]."""
    channel: list[Tensor]
    """As in `squeeze_excite`."""
    gamma: list[Tensor]
    """[1]; with the channel gate."""
    global_: list[Tensor]
    """As in `squeeze_excite`."""
    residual_gate: list[Tensor]
    """alpha, [c]; without it alpha is 1."""

    def parts(self) -> list[list[Tensor]]:
        """The lists of tensors, in the order of the fields."""
        return list(self[3:])


def prepare(x: Tensor, layer: Layer) -> tuple[Tensor, Layer]:
    """What the functions here compute with: x [b, c, h, w] as [b, F, d, h, w] and the parameters.

    In float32 if x is half precision.
    """
    half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
    dtype = torch.float32 if half else x.dtype
    x = x.to(dtype)
    cast = Layer(
        layer.groups,
        layer.batch_vote,
        layer.eps,
        layer.grouping,
        _cast(layer.spatial, dtype),
        _cast(layer.controller, dtype),
        _cast(layer.channel, dtype),
        _cast(layer.gamma, dtype),
        _cast(layer.global_, dtype),
        _cast(layer.residual_gate, dtype),
    )
    return x.unflatten(1, [layer.groups, -1]), cast  # a view in any memory format


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]
