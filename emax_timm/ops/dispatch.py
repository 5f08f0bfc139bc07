"""The entry points of the core, and the one place where a backend is chosen.

Scripting, tracing, export and forward-mode differentiation follow single operations; they always
see those of the portable backend.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import wraps

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .autograd import differentiable
from .backend import Backend, requested, wanted_backend
from .cpp import CPP
from .portable import PORTABLE
from .portable.forward import emax_plain, maps_plain
from .triton import TRITON
from .weights import EMAXMaps, EMAXWeights

__all__ = [
    "BACKENDS",
    "BackendError",
    "check_input",
    "check_mask",
    "choose",
    "draw_noise",
    "emax",
    "emax_maps",
    "explain",
    "exporting",
    "outside_autocast",
    "report_fallback",
    "requested",
    "use_backend",
]

_logger = logging.getLogger(__name__)

BACKENDS: tuple[Backend, ...] = (TRITON, CPP, PORTABLE)
"""The backends in order of preference; the last one serves every input."""


class BackendError(RuntimeError):
    """The backend that was requested cannot serve; the message is one line that says why."""

    exit_code = 2


def emax(x: Tensor, weights: EMAXWeights, training: bool, mask: Tensor | None = None) -> Tensor:
    """Apply an EMAX or EMA layer to x, with the best backend that serves.

    Args:
        x: The input: images [b, c, h, w] or, with weights for them, sequences [b, c, l] or videos
            [b, c, t, h, w].
        weights: The constants and tensors of the layer.
        training: Whether to draw noise for the choice of group counts.
        mask: Where sequences have tokens, [b, l]; None means everywhere.

    Returns:
        The output, which has the shape, dtype and memory format of x.

    Raises:
        BackendError: If a backend was requested that cannot serve.
        ValueError: If x or the mask does not have its shape, or the mask is not boolean.
    """
    check_input(
        x, weights.config.groups * weights.gn_bias.shape[0], weights.conv3x3_weight.dim() - 2
    )
    check_mask(x, mask)
    noise = draw_noise(x, weights.config.candidates, training)
    if not torch.jit.is_scripting():
        return _emax(x, weights, noise, mask)
    return emax_plain(x, weights, noise, mask)


def emax_maps(
    x: Tensor, weights: EMAXWeights, training: bool, mask: Tensor | None = None
) -> EMAXMaps:
    """Compute the attention maps of a layer for x, with the portable backend.

    Args:
        x: The input, as in `emax`.
        weights: The constants and tensors of the layer.
        training: Whether to draw noise for the choice of group counts.
        mask: Where sequences have tokens, [b, l]; None means everywhere.

    Raises:
        ValueError: If x or the mask does not have its shape, or the mask is not boolean.
    """
    check_input(
        x, weights.config.groups * weights.gn_bias.shape[0], weights.conv3x3_weight.dim() - 2
    )
    check_mask(x, mask)
    noise = draw_noise(x, weights.config.candidates, training)
    if not torch.jit.is_scripting():
        return _maps(x, weights, noise, mask)
    return maps_plain(x, weights, noise, mask)


def draw_noise(x: Tensor, candidates: list[int], training: bool) -> Tensor | None:
    """Draw Gumbel(0, 1) noise [b, K] for the choice of group counts, or None if none is needed."""
    if len(candidates) == 1 or not training:
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    noise = torch.empty([x.shape[0], len(candidates)], dtype=dtype, device=x.device)
    # Exponential(1) samples can round to 0, whose logarithm is infinite.
    return -noise.exponential_().clamp(min=1e-30).log()


def outside_autocast(function: Callable) -> Callable:
    """Decorate `function(x, ...)` so that autocast does not turn its products to half precision.

    TorchScript compiles the undecorated function and cannot leave autocast, so there the matrix
    products are in half precision.
    """

    @wraps(function)
    def wrapper(x: Tensor, *args, **kwargs):
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):  # meta tensors have no autocast
            with torch.autocast(kind, enabled=False):
                return function(x, *args, **kwargs)
        return function(x, *args, **kwargs)

    return wrapper


@outside_autocast
def _emax(x: Tensor, weights: EMAXWeights, noise: Tensor | None, mask: Tensor | None) -> Tensor:
    if exporting():
        # With another memory format torch.export would guard on strides.
        return emax_plain(x.contiguous(), weights, noise, mask)
    if torch.jit.is_tracing() or forward_ad._current_level >= 0:
        return emax_plain(x, weights, noise, mask)
    backend = choose(x, weights)
    if x.ndim != 4 and torch.compiler.is_compiling():
        # The backward pass of sequences and videos calls autograd, which torch.compile cannot see.
        return emax_plain(x, weights, noise, mask)
    if not torch.is_grad_enabled():
        return backend.forward(x, weights, noise, False, mask)[0]
    return differentiable(backend, x, weights, noise, mask)


@outside_autocast
def _maps(x: Tensor, weights: EMAXWeights, noise: Tensor | None, mask: Tensor | None) -> EMAXMaps:
    return maps_plain(x, weights, noise, mask)


def check_input(x: Tensor, channels: int, dims: int) -> None:
    """Check that x is [b, channels, l], [b, channels, h, w] or [b, channels, t, h, w].

    Args:
        x: The input.
        channels: The number of channels c.
        dims: The number of the other axes but the batch: 1, 2 or 3.

    Raises:
        ValueError: If it is not.
    """
    if x.dim() != dims + 2 or x.shape[1] != channels:
        axes = ["l", "h, w", "t, h, w"][dims - 1]
        raise ValueError(f"x must be [b, {channels}, {axes}], not {list(x.shape)}")


def check_mask(x: Tensor, mask: Tensor | None) -> None:
    """Check that the mask of sequences x [b, c, l] is boolean and [b, l].

    Raises:
        ValueError: If it is not.
    """
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be a torch.bool tensor, not {mask.dtype}")
        if mask.dim() != 2 or mask.shape[0] != x.shape[0] or mask.shape[1] != x.shape[2]:
            wanted = [x.shape[0], x.shape[2]]
            raise ValueError(f"mask must be [b, l] = {wanted}, not {list(mask.shape)}")


def exporting() -> bool:
    """Say whether torch.export is tracing, which needs single operations.

    torch 2.6 cannot say so, and its compiler knows too little of autograd nodes; there this is true
    of torch.compile as well.
    """
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()


# The choice --------------------------------------------------------------------------------------


def choose(x: Tensor, weights: EMAXWeights) -> Backend:
    """Choose the first backend that serves these tensors, or the one that was requested.

    Raises:
        BackendError: If the requested backend does not serve, or does not exist.
    """
    wanted = requested()
    for backend in BACKENDS:
        if wanted is None or backend.name == wanted:
            reason = backend.unsupported(x, weights)
            if reason is None:
                return backend
            if wanted is not None:
                raise BackendError(f"the backend {wanted} was asked for, but {reason}")
    raise BackendError(_unknown(wanted))


def explain(x: Tensor, weights: EMAXWeights) -> dict[str, str | None]:
    """Map the name of each backend to None if it serves these tensors, else to why it does not."""
    return {backend.name: backend.unsupported(x, weights) for backend in BACKENDS}


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend that computes EMAX and EMA layers inside a `with` block.

    It overrules the environment variable EMAX_BACKEND, can be nested, and holds for the calling
    thread or task alone. A backward pass always uses the backend of its forward pass. Code that
    torch.compile has compiled keeps the backend that it was compiled with.

    Args:
        name: "triton" (GPUs), "cpp" (C++, on CPUs), "portable" (PyTorch), or "auto" for the best
            that can serve.

    Raises:
        RuntimeError: If there is no such backend or, in a forward pass inside the block, if it
            cannot serve the tensors at hand (a `BackendError`); `emax backends` says why.
    """
    if name != "auto" and name not in [backend.name for backend in BACKENDS]:
        raise BackendError(_unknown(name))
    token = wanted_backend.set(name)
    try:
        yield
    finally:
        wanted_backend.reset(token)


def report_fallback(reason: str) -> None:
    """Log, once for each reason, that a layer computes by calls of its children.

    Raises:
        BackendError: If a backend was requested that does not call children.
    """
    wanted = requested()
    if wanted not in (None, PORTABLE.name):
        raise BackendError(f"the backend {wanted} was asked for, but {reason}")
    if reason not in _reported:
        _reported.add(reason)
        _logger.warning("EMAX calls its layers one by one, which is slower: %s", reason)


_reported: set[str] = set()


def _unknown(name: str | None) -> str:
    known = ", ".join(["auto", *(backend.name for backend in BACKENDS)])
    return f"unknown backend {name}: EMAX_BACKEND and use_backend take one of {known}"
