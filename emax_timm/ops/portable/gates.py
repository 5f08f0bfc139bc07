"""The gates, and the factor on x that follows from them and the spatial attention."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import EMAXWeights, present

__all__ = ["Gates", "mean_gates", "output_factor", "squeeze_excite"]


class Gates(NamedTuple):
    """The gates from the means of x and of x * S, [b, c] each; hidden units are [b, r]."""

    channel: Tensor
    """The channel attention w_c; 0 without the channel gate."""
    channel_hidden: Tensor
    fused: Tensor
    """The mean over the image of the fused features Y_f."""
    global_: Tensor
    """The global attention w_g; 1 without the global gate."""
    global_hidden: Tensor
    scale: Tensor
    """The output is x * (scale * S + offset)."""
    offset: Tensor


def mean_gates(mean: Tensor, pooled: Tensor, weights: EMAXWeights) -> Gates:
    """Compute the gates from the means of x and of x * S, [b, c] each."""
    channel = torch.zeros_like(mean)
    global_ = torch.ones_like(mean)
    channel_hidden, global_hidden = channel, global_
    fused = pooled
    gamma = weights.gamma
    if gamma is not None:
        channel, channel_hidden = squeeze_excite(
            mean,
            present(weights.channel_reduce_weight),
            present(weights.channel_reduce_bias),
            present(weights.channel_expand_weight),
            present(weights.channel_expand_bias),
        )
        # The mean of the fused features follows from these two; they are never written.
        fused = fused + gamma * channel * mean
    global_reduce_weight = weights.global_reduce_weight
    if global_reduce_weight is not None:
        global_, global_hidden = squeeze_excite(
            fused,
            global_reduce_weight,
            present(weights.global_reduce_bias),
            present(weights.global_expand_weight),
            present(weights.global_expand_bias),
        )
    # x + alpha * (x * (S + gamma * w_c) * w_g - x) is one factor on x: x is read once, and
    # alpha = 0 gives a factor of exactly 1.
    scale, offset = global_, torch.zeros_like(global_)
    residual_gate = weights.residual_gate
    if residual_gate is not None:
        scale = residual_gate * global_
        offset = (1 - residual_gate).expand_as(scale)
    if gamma is not None:
        offset = offset + scale * gamma * channel
    return Gates(channel, channel_hidden, fused, global_, global_hidden, scale, offset)


def squeeze_excite(
    mean: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the gate of squeeze-and-excitation (arXiv 1709.01507).

    Args:
        mean: The mean over the image of the features, [b, c].
        reduce_weight: The weight of the first 1x1 convolution, [r, c, 1, 1].
        reduce_bias: The bias of the first 1x1 convolution, [r].
        expand_weight: The weight of the second 1x1 convolution, [c, r, 1, 1].
        expand_bias: The bias of the second 1x1 convolution, [c].

    Returns:
        The gate in (0, 1), [b, c], and the hidden units that it follows from, [b, r].
    """
    hidden = torch.relu(F.linear(mean, reduce_weight.flatten(1), reduce_bias))
    return torch.sigmoid(F.linear(hidden, expand_weight.flatten(1), expand_bias)), hidden


def output_factor(gates: Gates, spatial: Tensor) -> Tensor:
    """Compute scale * S + offset, [b, F, d, ...], for S [b, F, ...]."""
    groups = spatial.shape[1]
    scale, offset = gates.scale.unflatten(1, [groups, -1]), gates.offset.unflatten(1, [groups, -1])
    for _ in range(2, spatial.dim()):
        scale, offset = scale.unsqueeze(-1), offset.unsqueeze(-1)
    return torch.addcmul(offset, scale, spatial.unsqueeze(2))
