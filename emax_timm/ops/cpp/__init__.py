"""The backend in C++, for float32 and bfloat16 on CPUs; `emax kernels build` compiles it."""

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor

from ..backend import Backend
from ..weights import TENSORS, EMAXWeights
from .library import problem

__all__ = ["CPP", "DTYPES"]

DTYPES = (torch.float32, torch.bfloat16)
# The operator returns a gradient for every tensor that is there, in order, except for these.
_WITHOUT_GRADIENT = ("warmup", "temperature")


def _unsupported(x: Tensor, weights: EMAXWeights) -> str | None:
    if x.device.type != "cpu":
        return f"it serves tensors on the CPU, not on {x.device.type}"
    if x.ndim != 4:
        return f"it serves 2 dimensions (images) alone, not {x.ndim - 2}"
    if x.dtype not in DTYPES:
        return f"it serves float32 and bfloat16, not {str(x.dtype).removeprefix('torch.')}"
    if isinstance(x, FakeTensor):
        return "fake tensors have no data"
    # torch.compile traces with an interpreter stack of its own, and sees the operators.
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return "transforms of torch.func do not see into it"
    return problem()


def _forward(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, keep: bool, mask: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Run the forward pass; it saves the same tensors as the portable backend."""
    (groups, candidates, batch_vote, eps), *tensors = weights
    out, *saved = torch.ops.emax_timm.forward(
        x, tensors, noise, groups, candidates, batch_vote, eps, keep
    )
    return out, saved


def _backward(
    grad: Tensor,
    x: Tensor,
    weights: EMAXWeights,
    noise: Tensor | None,
    saved: list[Tensor],
    mask: Tensor | None,
) -> dict[str, Tensor]:
    (groups, candidates, batch_vote, eps), *tensors = weights
    # Without a global gate the forward pass saves no mean of x * S, and the mean of x replaces it.
    kept = saved if len(saved) > 6 else [*saved, saved[0]]
    grads = torch.ops.emax_timm.backward(
        x, grad, tensors, noise, kept, groups, candidates, batch_vote, eps
    )
    names = [
        name
        for name, tensor in zip(TENSORS, tensors, strict=True)
        if tensor is not None and name not in _WITHOUT_GRADIENT
    ]
    return dict(zip(["x", *names], grads, strict=True))


CPP = Backend("cpp", _unsupported, _forward, _backward)
