"""The backend in Triton, for float32, bfloat16 and float16 on GPUs.

Nothing here needs Triton to be imported: the kernels are imported when they are first used.
"""

import importlib.util
import logging
import os
from functools import lru_cache

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor

from ..backend import Backend, requested
from ..portable import PORTABLE
from ..weights import EMAXWeights
from .plan import size_problem
from .program import KernelError, on_device_of

__all__ = ["DTYPES", "TRITON"]

_logger = logging.getLogger(__name__)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_GROUPS = 64
MAX_GROUP_CHANNELS = 64  # with more, the products of a group spill registers
MIN_CAPABILITY = (8, 0)
MIN_TRITON = (3, 3)  # older launchers take other arguments


def _unsupported(x: Tensor, weights: EMAXWeights) -> str | None:
    """Return why this backend does not serve; on a GPU, where one expects it to, say so once."""
    reason = _reason(x, weights)
    if reason is not None and x.is_cuda and not torch.compiler.is_compiling():
        _report(reason)
    return reason


@lru_cache
def _report(reason: str) -> None:
    _logger.warning("EMAX runs without its Triton backend: %s", reason)


def _reason(x: Tensor, weights: EMAXWeights) -> str | None:
    reason = _device_problem(x.device) or _failure
    if reason is not None:
        return reason
    if x.ndim != 4:
        return f"it serves 2 dimensions (images) alone, not {x.ndim - 2}"
    if x.dtype not in DTYPES:
        return f"it serves float32, bfloat16 and float16, not {str(x.dtype).removeprefix('torch.')}"
    groups = weights.config.groups
    if groups > MAX_GROUPS or x.shape[1] > groups * MAX_GROUP_CHANNELS:
        return (
            f"it serves up to {MAX_GROUPS} groups of up to {MAX_GROUP_CHANNELS} channels, "
            f"not {groups} of {x.shape[1] // groups}"
        )
    # Sizes that vary in a compiled graph are checked when it runs: here they would be guarded.
    if not torch.compiler.is_compiling() and (problem := size_problem(x.shape)):
        return problem
    if isinstance(x, FakeTensor):
        return "fake tensors have no data"
    # torch.compile traces with an interpreter stack of its own, and sees the operators.
    if not torch.compiler.is_compiling() and peek_interpreter_stack() is not None:
        return "transforms of torch.func do not see into it"
    return None


# torch.compile calls this while it traces, instead of tracing the look at modules and devices.
@torch.compiler.assume_constant_result
def _device_problem(device: torch.device) -> str | None:
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            return "it serves tensors on GPUs, not on the CPU"
    elif device.type != "cuda":
        return f"it serves tensors on GPUs, not on {device.type}"
    return _triton_problem() or (_capability_problem(device) if device.type == "cuda" else None)


@lru_cache
def _triton_problem() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    try:
        import triton

        if tuple(map(int, triton.__version__.split(".")[:2])) < MIN_TRITON:
            return f"it needs Triton 3.3 or newer, not {triton.__version__}"
        from . import operators  # noqa: F401  torch.compile needs them registered
    except Exception as error:
        return f"Triton cannot be imported ({_last_line(error)})"
    return None


@lru_cache
def _capability_problem(device: torch.device) -> str | None:
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MIN_CAPABILITY:
        return "it needs a GPU of compute capability 8.0 or newer"
    return None


_failure: str | None = None
"""Why a kernel failed on this machine; from then on another backend serves."""


def _forward(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, keep: bool, mask: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Run the forward pass; it saves one tensor.

    An empty batch is left to the portable backend, and so is a kernel that fails.
    """
    if torch.compiler.is_compiling():
        config, *tensors = weights
        out, *saved = torch.ops.emax_triton.forward(x, tensors, noise, *config, keep)
        return out, saved
    if x.numel():
        from .forward import forward

        try:
            with on_device_of(x):
                return forward(x, weights, noise, keep)
        except KernelError as error:
            _give_way(error)
    return PORTABLE.forward(x, weights, noise, keep, mask)


def _backward(
    grad: Tensor,
    x: Tensor,
    weights: EMAXWeights,
    noise: Tensor | None,
    saved: list[Tensor],
    mask: Tensor | None,
) -> dict[str, Tensor]:
    from .backward import backward
    from .gradients import named_gradients

    if torch.compiler.is_compiling():
        config, *tensors = weights
        grad_x, gradients = torch.ops.emax_triton.backward(grad, x, tensors, saved[0], *config)
        return {"x": grad_x, **named_gradients(gradients, x, weights)}
    if len(saved) == 1:
        try:
            with on_device_of(x):
                grad_x, gradients = backward(grad, x, weights, saved[0])
            return {"x": grad_x, **named_gradients(gradients, x, weights)}
        except KernelError as error:
            _give_way(error)
            _, saved = PORTABLE.forward(x, weights, noise, True, mask)
    return PORTABLE.backward(grad, x, weights, noise, saved, mask)


def _give_way(error: KernelError) -> None:
    """Let another backend serve from now on, and say so once.

    Raises:
        BackendError: If this backend was requested.
    """
    global _failure
    from ..dispatch import BackendError

    reason = f"a kernel cannot be compiled here ({_last_line(error.args[0])})"
    if requested() == TRITON.name:
        raise BackendError(f"the backend {TRITON.name} was asked for, but {reason}") from error
    _report(reason)
    _failure = reason


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[-1:])}"


TRITON = Backend("triton", _unsupported, _forward, _backward)
