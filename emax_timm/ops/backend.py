"""The interface of a backend, and which one was requested; `dispatch.BACKENDS` lists them."""

import os
from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from .weights import EMAXWeights

__all__ = ["Backend", "requested", "wanted_backend"]

wanted_backend: ContextVar[str | None] = ContextVar("emax_backend", default=None)
"""What `use_backend` asks for; None leaves it to the environment."""


class Backend(NamedTuple):
    """An implementation of the forward and the backward pass of EMAX and EMA layers."""

    name: str
    unsupported: Callable[[Tensor, EMAXWeights], str | None]
    """`unsupported(x, weights)` returns None if the backend serves these tensors, else the reason
    in a few words. It must be cheap, because every forward pass calls it."""
    forward: Callable[
        [Tensor, EMAXWeights, Tensor | None, bool, Tensor | None], tuple[Tensor, list[Tensor]]
    ]
    """`forward(x, weights, noise, keep, mask)` returns the output, which is like x [b, c, ...], and
    the tensors that the backward pass needs (an empty list without `keep`). The noise for the
    choice of group counts is [b, K] in float32 (float64 for float64 inputs) or None. The mask of
    sequences is [b, l], true where there is a token, or None, as it is for images and videos.
    Autograd and autocast are off."""
    backward: Callable[
        [Tensor, Tensor, EMAXWeights, Tensor | None, list[Tensor], Tensor | None],
        dict[str, Tensor],
    ]
    """`backward(grad, x, weights, noise, saved, mask)` returns the gradients by name ("x",
    "conv1x1_weight", ...): those of x and of every tensor in the weights except the warm-up and
    the temperature; it may leave out what requires no gradient. They may have any float dtype, and
    any shape with the elements in order."""


# torch.compile calls this while it traces, instead of tracing the look at the environment.
@torch.compiler.assume_constant_result
def requested() -> str | None:
    """Return the name of the backend that was requested, or None."""
    name = wanted_backend.get() or os.environ.get("EMAX_BACKEND") or "auto"
    return None if name == "auto" else name
