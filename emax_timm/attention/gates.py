"""Channel, global and residual gates, and the factor on x that they make of the spatial attention.

Dimension letters as in `layer.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["MeanGates", "mean_gates", "output_factor", "output_scale", "squeeze_excite"]


class MeanGates(NamedTuple):
    """Gates from the means of x and of x * S."""

    channel: Tensor
    """w_c, [b, c]; 0 without the channel gate."""
    channel_hidden: Tensor
    """Its hidden units."""
    fused: Tensor
    """Mean of the fused features, [b, c]."""
    global_: Tensor
    """w_g, [b, c]; 1 without the global gate."""
    global_hidden: Tensor
    """Its hidden units."""


def mean_gates(
    mean: Tensor,
    pooled: Tensor,
    channel_weights: list[Tensor],
    gamma: list[Tensor],
    global_weights: list[Tensor],
) -> MeanGates:
    """Channel and global attention, from the means of x and of x * S, [b, c] each."""
    channel = torch.zeros_like(mean)
    global_ = torch.ones_like(mean)
    channel_hidden, global_hidden = channel, global_
    fused = pooled
    if len(gamma) > 0:
        channel, channel_hidden = squeeze_excite(mean, channel_weights)
        # The mean of the fused features follows from these two; they are never written.
        fused = fused + gamma[0] * channel * mean
    if len(global_weights) > 0:
        global_, global_hidden = squeeze_excite(fused, global_weights)
    return MeanGates(channel, channel_hidden, fused, global_, global_hidden)


def squeeze_excite(mean: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Squeeze-and-excitation's gate (arXiv 1709.01507).

    Args:
        mean: [b, c].
        weights: Weight and bias of the reducing, then of the expanding 1x1 convolution.

    Returns:
        The gate in (0, 1), [b, c], and the hidden units that it is made from.
    """
    hidden = torch.relu(F.linear(mean, weights[0].flatten(1), weights[1]))
    return torch.sigmoid(F.linear(hidden, weights[2].flatten(1), weights[3])), hidden


def output_scale(
    gates: MeanGates, gamma: list[Tensor], residual_gate: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Scale and offset, [b, c] each, of the factor scale * S + offset on x.

    x + alpha * (x * (S + gamma * w_c) * w_g - x) is one factor on x: x is read once, and alpha = 0
    gives a factor of exactly 1.
    """
    scale, offset = gates.global_, torch.zeros_like(gates.global_)
    if len(residual_gate) > 0:
        scale = residual_gate[0] * gates.global_
        offset = (1 - residual_gate[0]).expand_as(scale)
    if len(gamma) > 0:
        offset = offset + scale * gamma[0] * gates.channel
    return scale, offset


def output_factor(scale: Tensor, offset: Tensor, spatial: Tensor) -> Tensor:
    """scale * S + offset, [b, F, d, h, w], of [b, F, d] twice and [b, F, h, w]."""
    return torch.addcmul(
        offset.unsqueeze(-1).unsqueeze(-1), scale.unsqueeze(-1).unsqueeze(-1), spatial.unsqueeze(2)
    )
