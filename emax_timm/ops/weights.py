"""The tuples that the core takes and returns: the weights of a layer, and its attention maps.

The package's `__init__` explains the letters in the shapes.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "TENSORS",
    "EMAXConfig",
    "EMAXMaps",
    "EMAXWeights",
    "bias_of",
    "detached",
    "in_dtype",
    "present",
]


class EMAXConfig(NamedTuple):
    """The constants of a layer, which are Python numbers and no tensors."""

    groups: int
    """The finest group count F."""
    candidates: list[int]
    """The K group counts that a sample chooses among: divisors of F in ascending order."""
    batch_vote: bool
    """Whether all samples take the most frequent choice of the batch (of equals the smallest)."""
    eps: float
    """The number that the norm adds to the variance."""


class EMAXWeights(NamedTuple):
    """The constants and tensors of an EMAX layer, by the names of its parameters.

    A part that the layer does not have is None. EMA (arXiv 2305.13563) has the first six tensors
    alone. The shapes are those of images; the kernels of sequences and videos have one and three
    axes in place of two.
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
    """The weight of the channel gate, [1]; None without that gate."""
    global_reduce_weight: Tensor | None = None
    """[r, c, 1, 1]; None without the global gate."""
    global_reduce_bias: Tensor | None = None
    """[r]."""
    global_expand_weight: Tensor | None = None
    """[c, r, 1, 1]."""
    global_expand_bias: Tensor | None = None
    """[c]."""
    residual_gate: Tensor | None = None
    """The residual gate alpha, [c]; None means alpha = 1."""
    warmup: Tensor | None = None
    """The warm-up s in [0, 1], a float32 scalar; None means 0, which is the finest grouping."""
    temperature: Tensor | None = None
    """The temperature tau > 0, a float32 scalar; None without a controller."""


TENSORS = EMAXWeights._fields[1:]
"""The names of the tensors of `EMAXWeights`, in their order."""


class EMAXMaps(NamedTuple):
    """The attention maps of an EMAX layer, as `EMAX.attention` and `capture_attention` give them.

    The maps are float32, or float64 for float64 inputs. The map of a part that is switched off is
    constant: 0 for the channel attention, 1 for the global attention.
    """

    spatial: Tensor
    """The spatial attention S in (0, 1), one map per fine group, [b, F, h, w]; for videos
    [b, F, t, h, w], and for sequences [b, F, l], 0 where there is no token."""
    channel: Tensor
    """The channel attention w_c in (0, 1), [b, c]."""
    global_: Tensor
    """The global attention w_g in (0, 1), [b, c]."""
    group_probs: Tensor
    """The probabilities of the candidate group counts, without noise, [b, K]."""
    group_count: Tensor
    """The most probable group count of each sample, [b], int64."""


def present(tensor: Tensor | None) -> Tensor:
    """Return the tensor of a part that the layer is known to have, for the type checker."""
    assert tensor is not None
    return tensor


def bias_of(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the bias [o] of a convolution that is known to have one; its weight is [o, ...]."""
    assert bias is not None
    if torch.jit.is_tracing():
        # For torch.jit.trace the bias stays optional, and most operators refuse optional tensors.
        # `linear` takes one: the product of no inputs with no weights, plus the bias.
        nothing = weight.flatten(1)[:, :0]
        return F.linear(nothing[0], nothing, bias)
    return bias


def detached(weights: EMAXWeights) -> EMAXWeights:
    """Return the weights as tensors that require no gradient.

    By whether an operand requires one, `torch.matmul` chooses its products even where no graph is
    made, so that a frozen weight would change the last bits; the choice for one that requires one
    costs a copy of the other operand.
    """
    config, *tensors = weights
    return EMAXWeights(config, *[None if t is None else t.detach() for t in tensors])  # type: ignore[arg-type]


def in_dtype(weights: EMAXWeights, dtype: torch.dtype) -> EMAXWeights:
    """Convert the weights to a dtype; the warm-up and the temperature stay float32.

    The fields are spelt out because TorchScript cannot loop over those of a tuple.
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
