"""The backend in Triton, for float32, bfloat16 and float16 on GPUs.

Nothing here needs Triton to be imported: the kernels are imported when they are first used.
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from ..backend import Backend
from ..weights import EMAXWeights

__all__ = ["DTYPES", "TRITON"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_GROUP_CHANNELS = 256
MAX_GROUPS = 64
MIN_CAPABILITY = (8, 0)


def _unsupported(x: Tensor, weights: EMAXWeights) -> str | None:
    reason = _device_problem(x.device)
    if reason is not None:
        return reason
    if x.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    groups = weights.config.groups
    if groups > MAX_GROUPS or x.shape[1] > groups * MAX_GROUP_CHANNELS:
        return (
            f"it serves up to {MAX_GROUPS} groups of up to {MAX_GROUP_CHANNELS} channels, "
            f"not {groups} of {x.shape[1] // groups}"
        )
    # torch.compile traces with an interpreter stack of its own, and sees the operators.
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return "transforms of torch.func do not see into it"
    return None


# torch.compile calls this while it traces, instead of tracing the look at modules and devices.
@torch.compiler.assume_constant_result
def _device_problem(device: torch.device) -> str | None:
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "it serves tensors on GPUs, not on cpu"
    elif device.type != "cuda":
        return f"it serves tensors on GPUs, not on {device.type}"
    return _triton_problem() or (None if device.type == "cpu" else _capability_problem(device))


@lru_cache
def _triton_problem() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@lru_cache
def _capability_problem(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 (A100) or newer"
    return None


def _forward(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    from .forward import forward

    with _on_device_of(x):
        return forward(x, weights, noise, keep)


def _backward(
    grad: Tensor, x: Tensor, weights: EMAXWeights, noise: Tensor | None, saved: list[Tensor]
) -> dict[str, Tensor]:
    from .backward import backward

    with _on_device_of(x):
        return backward(grad, x, weights, noise, saved)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Make the GPU of x the current one, to which Triton launches."""
    if x.is_cuda and not torch.compiler.is_compiling() and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


TRITON = Backend("triton", _unsupported, _forward, _backward)
