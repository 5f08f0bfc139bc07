"""The gradients of the parameters, which a backward pass writes into one piece of memory."""

import torch
from torch import Tensor

from ..weights import EMAXWeights
from .plan import Sizes, split

__all__ = ["hidden_columns", "named_gradients"]


def named_gradients(gradients: Tensor, x: Tensor, weights: EMAXWeights) -> dict[str, Tensor]:
    """Take apart the gradients of the parameters, by name."""
    plan = Sizes(x.shape, weights)
    sizes = plan.gradients()
    parts = dict(zip(sizes, split(gradients, [*sizes.values()]), strict=True))
    grads = {name: parts[name][:size] for name, size in sizes.items() if size}
    totals, shared = grads.pop("totals"), grads.pop("shared")
    c, d, K = plan.d * plan.groups, plan.d, plan.candidates
    names = ["conv1x1_weight", "conv1x1_bias", "conv3x3_weight", "conv3x3_bias", "gn_weight"]
    parts = shared.split([d * d, d, 9 * d * d, d, d, d, 1])
    grads |= zip([*names, "gn_bias", "gamma"], parts, strict=True)
    if weights.gamma is None:
        del grads["gamma"]
    weight = weights.conv3x3_weight
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        # In the order of the weight.
        grads["conv3x3_weight"] = grads["conv3x3_weight"].view(d, 3, 3, d).permute(0, 3, 1, 2)
    if plan.controlled:
        grads["controller_bias"] = totals[17 * c : 17 * c + K]
    if weights.residual_gate is not None:
        grads["residual_gate"] = totals[:c]
    for name, start in (("global", 2 * c), ("channel", 3 * c)):
        if plan.hidden[name]:
            grads[f"{name}_expand_bias"] = totals[start : start + c]
            grads[f"{name}_reduce_bias"] = totals[hidden_columns(plan, name)]
    return grads


def hidden_columns(plan: Sizes, name: str) -> slice:
    """Return the columns of the terms that hold the hidden units of a gate."""
    start = 17 * plan.d * plan.groups + plan.candidates
    middle = start + plan.hidden["channel"]
    return slice(start, middle) if name == "channel" else slice(middle, plan.terms)
