"""The gradients of the parameters, which a backward pass writes into one piece of memory."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import EMAXWeights
from .plan import Sizes, padded

__all__ = ["Gradients", "hidden_columns", "named_gradients"]


class Gradients(NamedTuple):
    """The gradients as kernels write them, flat pieces of one tensor in float32."""

    totals: Tensor
    """The sums of the terms over the batch; `kernels/parameter_gradients.py` names the columns."""
    shared: Tensor
    """The gradients of what all groups share: the convolutions, the norm, and gamma."""
    channel_reduce: Tensor
    """The gradient of a weight of the channel gate, [r, c]."""
    channel_expand: Tensor
    """Likewise, [c, r]."""
    global_reduce: Tensor
    """The gradient of a weight of the global gate, [r, c]."""
    global_expand: Tensor
    """Likewise, [c, r]."""
    controller: Tensor
    """The gradient of the controller's weight, [K, c]."""


def named_gradients(gradients: Tensor, x: Tensor, weights: EMAXWeights) -> dict[str, Tensor]:
    """Take apart the gradients of the parameters, by name."""
    sizes = Sizes(x.shape, weights)
    c, d, K = sizes.c, sizes.d, sizes.candidates
    totals, shared, *others = sizes.gradients()
    hidden = sizes.hidden
    # In the order of `Gradients`, each of whose tensors is padded; without a name are terms that
    # are of no parameter alone.
    pieces = [
        ("residual_gate", c), ("", c), ("global_expand_bias", c), ("channel_expand_bias", c),
        ("", 13 * c), ("controller_bias", K), ("channel_reduce_bias", hidden["channel"]),
        ("global_reduce_bias", hidden["global"]), ("", padded(totals) - totals),
        ("conv1x1_weight", d * d), ("conv1x1_bias", d), ("conv3x3_weight", 9 * d * d),
        ("conv3x3_bias", d), ("gn_weight", d), ("gn_bias", d), ("gamma", 1),
        ("", padded(shared) - shared),
    ]  # fmt: skip
    names = [
        "channel_reduce_weight", "channel_expand_weight", "global_reduce_weight",
        "global_expand_weight", "controller_weight",
    ]  # fmt: skip
    for name, size in zip(names, others, strict=True):
        pieces += [(name, size), ("", padded(size) - size)]
    parts = gradients.split([size for _, size in pieces])
    grads = {
        name: part
        for (name, size), part in zip(pieces, parts, strict=True)
        if name and size and getattr(weights, name) is not None
    }
    if not sizes.controlled:
        grads.pop("controller_bias", None)
    weight = weights.conv3x3_weight
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        # In the order of the weight.
        grads["conv3x3_weight"] = grads["conv3x3_weight"].view(d, 3, 3, d).permute(0, 3, 1, 2)
    return grads


def hidden_columns(plan: Sizes, name: str) -> slice:
    """Return the columns of the terms that hold the hidden units of a gate."""
    start = 17 * plan.d * plan.groups + plan.candidates
    middle = start + plan.hidden["channel"]
    return slice(start, middle) if name == "channel" else slice(middle, plan.terms)
