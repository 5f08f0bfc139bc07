"""What the core computes with and what it tells: a layer's weights, and its attention maps.

Dimension letters: see the package's `__init__`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["TENSORS", "EMAXConfig", "EMAXMaps", "EMAXWeights", "bias_of", "in_dtype", "present"]


class EMAXConfig(NamedTuple):
    """The constants of a layer: Python numbers, no tensors."""

    groups: int
    """F, the finest group count."""
    candidates: list[int]
    """The K group counts that a sample chooses among, ascending divisors of F."""
    batch_vote: bool
    """Whether the whole batch takes its most frequent choice (ties: the smallest count)."""
    eps: float
    """Added to the variance in the norm."""


class EMAXWeights(NamedTuple):
    """The constants and tensors of an EMAX layer, named as its parameters; None is a missing part.

    EMA (arXiv 2305.13563) is the layer that has its first six tensors alone.
    """

    config: EMAXConfig
    conv1x1_weight: Tensor
    """[d, d, 1, 1]."""
    conv1x1_bias: Tensor
    """[d]."""
    conv3x3_weight: Tensor
    """[d, d, 3, 3]."""
    conv3x3_bias: Tensor
    """[d]."""
    gn_weight: Tensor
    """[d]."""
    gn_bias: Tensor
    """[d]."""
    controller_weight: Tensor | None = None
    """[K, c]; None if K = 1."""
    controller_bias: Tensor | None = None
    """[K]."""
    channel_reduce_weight: Tensor | None = None
    """[r, c, 1, 1]; None without the channel gate."""
    channel_reduce_bias: Tensor | None = None
    """[r]."""
    channel_expand_weight: Tensor | None = None
    """[c, r, 1, 1]."""
    channel_expand_bias: Tensor | None = None
    """[c]."""
    gamma: Tensor | None = None
    """[1], the weight of the channel gate; None without it."""
    global_reduce_weight: Tensor | None = None
    """[r, c, 1, 1]; None without the global gate."""
    global_reduce_bias: Tensor | None = None
    """[r]."""
    global_expand_weight: Tensor | None = None
    """[c, r, 1, 1]."""
    global_expand_bias: Tensor | None = None
    """[c]."""
    residual_gate: Tensor | None = None
    """alpha, [c]; None is alpha = 1."""
    warmup: Tensor | None = None
    """s in [0, 1], a float32 scalar; None is 0, the finest grouping."""
    temperature: Tensor | None = None
    """tau > 0, a float32 scalar; None without a controller."""


TENSORS = EMAXWeights._fields[1:]
"""The names of the tensors."""


class EMAXMaps(NamedTuple):
    """What an EMAX layer attends to, in float32 (float64 for float64 inputs).

    A part that is switched off holds the constant it contributes: channel 0, global 1.
    """

    spatial: Tensor
    """Spatial attention S in (0, 1), [b, F, h, w]."""
    channel: Tensor
    """Channel attention w_c in (0, 1), [b, c]."""
    global_: Tensor
    """Global attention w_g in (0, 1), [b, c]."""
    group_probs: Tensor
    """Noise-free probabilities of the candidate group counts, [b, K]."""
    group_count: Tensor
    """The most probable candidate, [b], int64."""


def present(tensor: Tensor | None) -> Tensor:
    """The tensor of a part that the layer is known to have."""
    assert tensor is not None
    return tensor


def bias_of(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias of a convolution that has one, [o], with its weight [o, ...]."""
    assert bias is not None
    if torch.jit.is_tracing():
        # To torch.jit.trace it stays optional, and most operators refuse what is. One that does
        # not: no inputs times no weights, plus the bias.
        nothing = weight.flatten(1)[:, :0]
        return F.linear(nothing[0], nothing, bias)
    return bias


def in_dtype(weights: EMAXWeights, dtype: torch.dtype) -> EMAXWeights:
    """The weights in a dtype; warm-up and temperature stay float32.

    Spelt out field by field, because TorchScript cannot loop over a tuple's fields.
    """
    return EMAXWeights(
        config=weights.config,
        conv1x1_weight=weights.conv1x1_weight.to(dtype),
        conv1x1_bias=weights.conv1x1_bias.to(dtype),
        conv3x3_weight=weights.conv3x3_weight.to(dtype),
        conv3x3_bias=weights.conv3x3_bias.to(dtype),
        gn_weight=weights.gn_weight.to(dtype),
        gn_bias=weights.gn_bias.to(dtype),
        controller_weight=_to(weights.controller_weight, dtype),
        controller_bias=_to(weights.controller_bias, dtype),
        channel_reduce_weight=_to(weights.channel_reduce_weight, dtype),
        channel_reduce_bias=_to(weights.channel_reduce_bias, dtype),
        channel_expand_weight=_to(weights.channel_expand_weight, dtype),
        channel_expand_bias=_to(weights.channel_expand_bias, dtype),
        gamma=_to(weights.gamma, dtype),
        global_reduce_weight=_to(weights.global_reduce_weight, dtype),
        global_reduce_bias=_to(weights.global_reduce_bias, dtype),
        global_expand_weight=_to(weights.global_expand_weight, dtype),
        global_expand_bias=_to(weights.global_expand_bias, dtype),
        residual_gate=_to(weights.residual_gate, dtype),
        warmup=weights.warmup,
        temperature=weights.temperature,
    )


def _to(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)
