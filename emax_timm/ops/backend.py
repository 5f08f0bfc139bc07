"""What a backend is: data that `dispatch.BACKENDS` lists in order of preference."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from .weights import EMAXWeights

__all__ = ["Backend"]


class Backend(NamedTuple):
    """One way to compute a layer and its gradients."""

    name: str
    unsupported: Callable[[Tensor, EMAXWeights], str | None]
    """`unsupported(x, weights)`: None where it serves, else the reason in a few words. It must be
    cheap: every forward pass asks."""
    forward: Callable[[Tensor, EMAXWeights, Tensor | None, bool], tuple[Tensor, list[Tensor]]]
    """`forward(x, weights, noise, keep)`: the output, like x [b, c, h, w], and what the backward
    pass needs, if `keep` (else an empty list). The noise is that of the choice of groups, [b, K] in
    float32 (float64 for float64 inputs), or None. It runs without autograd and without autocast."""
    backward: Callable[
        [Tensor, Tensor, EMAXWeights, Tensor | None, list[Tensor]], dict[str, Tensor]
    ]
    """`backward(grad, x, weights, noise, saved)`: the gradients of x and of every tensor of the
    weights that is there but warm-up and temperature, by name ("x", "conv1x1_weight", ...), in any
    float dtype, with the elements of the tensor in its order."""
