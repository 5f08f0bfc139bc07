"""EMAX as one node of autograd's graph, whichever backend computes it.

If autograd followed the single operations, it would keep about ten tensors of the size of x. This
node keeps x, the weights and the tensors that the forward pass of the backend saves (two maps per
fine group and five vectors per sample; nothing for sequences and videos), and the backward pass
computes the rest again. A gradient that is to be differentiated again comes from the single
operations.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from .backend import Backend, requested, wanted_backend
from .portable.backward import plain_gradients
from .weights import TENSORS, EMAXWeights

__all__ = ["differentiable"]


def differentiable(
    backend: Backend, x: Tensor, weights: EMAXWeights, noise: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Apply a layer to x [b, c, ...]; the backend computes the forward and the backward pass."""
    config, *tensors = weights
    if peek_interpreter_stack() is not None and not torch.compiler.is_compiling():
        return _TransformedEMAX.apply(x, noise, mask, backend, config, *tensors)[0]
    return _EMAX.apply(x, noise, mask, backend, config, *tensors)


class _EMAX(torch.autograd.Function):
    """The node. A forward pass that gets the context costs less than one beside `setup_context`,
    for which every call would look at the signature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        noise: Tensor | None,
        mask: Tensor | None,
        backend: Backend,
        config: Any,
        *tensors: Tensor | None,
    ) -> Tensor:
        out, saved = backend.forward(x, EMAXWeights(config, *tensors), noise, True, mask)  # type: ignore[arg-type]
        ctx.backend, ctx.config, ctx.requested = backend, config, requested()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, noise, mask, *tensors, *saved)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        x, noise, mask, *kept = ctx.saved_tensors
        tensors, saved = kept[: len(TENSORS)], kept[len(TENSORS) :]
        weights = EMAXWeights(ctx.config, *tensors)
        if torch.compiler.is_compiling():
            grads = _gradients(ctx.backend, grad, x, weights, noise, saved, mask)
        elif torch.is_grad_enabled():
            grads = plain_gradients(grad, x, weights, noise, mask, create_graph=True)
        else:
            with _asking_for(ctx.requested):
                grads = _gradients(ctx.backend, grad, x, weights, noise, saved, mask)
        # In the order of the arguments of `forward`; between x and the tensors none has a gradient.
        return grads.get("x"), None, None, None, None, *[grads.get(name) for name in TENSORS]


class _TransformedEMAX(_EMAX):
    """The same for the transforms of torch.func, which need all that is saved as outputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor,
        noise: Tensor | None,
        mask: Tensor | None,
        backend: Backend,
        config: Any,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        out, saved = backend.forward(x, EMAXWeights(config, *tensors), noise, True, mask)  # type: ignore[arg-type]
        return out, *saved

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, noise, mask, ctx.backend, ctx.config, *tensors = inputs
        ctx.requested = requested()
        _, *saved = output
        ctx.mark_non_differentiable(*saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, noise, mask, *tensors, *saved)


@contextlib.contextmanager
def _asking_for(name: str | None) -> Iterator[None]:
    """Ask for the backend of the forward pass: on GPUs a backward pass has a thread of its own."""
    token = wanted_backend.set(name)
    try:
        yield
    finally:
        wanted_backend.reset(token)


def _gradients(
    backend: Backend,
    grad: Tensor,
    x: Tensor,
    weights: EMAXWeights,
    noise: Tensor | None,
    saved: list[Tensor],
    mask: Tensor | None,
) -> dict[str, Tensor]:
    """Compute the gradients with the backend, by name, in the shapes and dtypes of the tensors."""
    kind = x.device.type
    if kind == "meta":
        grads = backend.backward(grad, x, weights, noise, saved, mask)
    else:
        # This does not ask whether autocast is on: torch.compile traces the backward pass where it
        # is off, and runs it under the autocast of the forward pass.
        with torch.autocast(kind, enabled=False):
            grads = backend.backward(grad, x, weights, noise, saved, mask)
    likes = {"x": x, **weights._asdict()}
    return {name: g.view_as(likes[name]).to(likes[name].dtype) for name, g in grads.items()}
