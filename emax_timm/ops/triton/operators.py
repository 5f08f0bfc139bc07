"""Both passes as operators of torch.library, which torch.compile calls without looking inside.

Nothing is left for a compiler to fuse: all steps of a pass are kernels of this package. Compiling
a layer therefore costs no more than a call, and in a compiled graph the same plans launch the same
kernels, in CUDA graphs as well.
"""

import torch
from torch import Tensor

from ..weights import EMAXConfig, EMAXWeights
from . import backward as backward_pass
from . import forward as forward_pass
from .forward import output_like
from .plan import Sizes, new_buffer, size_problem
from .program import on_device_of

__all__ = ["backward", "forward"]

_CONFIG = "int groups, int[] candidates, bool batch_vote, float eps"


@torch.library.custom_op(
    "emax_triton::forward",
    mutates_args=(),
    schema=f"(Tensor x, Tensor?[] tensors, Tensor? noise, {_CONFIG}, bool keep) -> Tensor[]",
)
def forward(
    x: Tensor,
    tensors: list[Tensor | None],
    noise: Tensor | None,
    groups: int,
    candidates: list[int],
    batch_vote: bool,
    eps: float,
    keep: bool,
) -> list[Tensor]:
    """Run the forward pass: the output and, with `keep`, what is saved."""
    weights = _weights(tensors, groups, candidates, batch_vote, eps)
    if problem := size_problem(x.shape):
        raise ValueError(f"EMAX's compiled Triton backend does not serve: {problem}")
    with on_device_of(x):
        out, saved = forward_pass.forward(x, weights, noise, keep)
    return [out, *saved]


@forward.register_fake
def _(x, tensors, noise, groups, candidates, batch_vote, eps, keep):
    sizes = Sizes(x.shape, _weights(tensors, groups, candidates, batch_vote, eps)).saved()
    return [output_like(x)[0], *[new_buffer(x, sizes)] * keep]


@torch.library.custom_op(
    "emax_triton::backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor?[] tensors, Tensor saved, {_CONFIG}) -> Tensor[]",
)
def backward(
    grad: Tensor,
    x: Tensor,
    tensors: list[Tensor | None],
    saved: Tensor,
    groups: int,
    candidates: list[int],
    batch_vote: bool,
    eps: float,
) -> list[Tensor]:
    """Run the backward pass: the gradient of x, and those of the parameters in one tensor."""
    weights = _weights(tensors, groups, candidates, batch_vote, eps)
    with on_device_of(x):
        return [*backward_pass.backward(grad, x, weights, saved)]


@backward.register_fake
def _(grad, x, tensors, saved, groups, candidates, batch_vote, eps):
    sizes = Sizes(x.shape, _weights(tensors, groups, candidates, batch_vote, eps)).gradients()
    return [output_like(x)[0], new_buffer(x, sizes)]


def _weights(
    tensors: list[Tensor | None], groups: int, candidates: list[int], batch_vote: bool, eps: float
) -> EMAXWeights:
    return EMAXWeights(EMAXConfig(groups, list(candidates), batch_vote, eps), *tensors)  # type: ignore[arg-type]
