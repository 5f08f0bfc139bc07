"""EMAX as one node of autograd's graph, with the gradients of `gradients.py`.

Autograd on the formulas of `functional.py` would keep about ten tensors of the size of x. This node
keeps x, the two fine maps and five vectors per sample, and computes the rest again.

Dimension letters as in `layer.py`.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from .fine_maps import FineMaps
from .functional import apply_attention, attend, emax_plain, outside_autocast
from .gradients import backward
from .grouping import draw_noise
from .layer import Layer, prepare

__all__ = ["emax"]


def emax(x: Tensor, layer: Layer, sample: bool) -> Tensor:
    """Apply a layer to x [b, c, h, w], keeping layout and dtype.

    Args:
        sample: Draw noise for the choice of groups.
    """
    noise = draw_noise(x, layer, sample)
    if not torch.jit.is_scripting():
        return _emax(x, layer, noise)
    return emax_plain(x, layer, noise)


@outside_autocast
def _emax(x: Tensor, layer: Layer, noise: Tensor | None) -> Tensor:
    if kernels.exporting():
        return emax_plain(x, layer, noise)
    if not torch.is_grad_enabled():
        if kernels.serve(x):
            return kernels.forward(x, layer, noise, keep=False)[0]
        return emax_plain(x, layer, noise)
    parts = layer.parts()
    constants = (layer.groups, layer.batch_vote, layer.eps, tuple(len(part) for part in parts))
    return _EMAX.apply(x, constants, noise, *itertools.chain(*parts))[0]


def _layer(constants: tuple[Any, ...], flat: Sequence[Tensor]) -> Layer:
    groups, batch_vote, eps, sizes = constants
    ends = itertools.accumulate(sizes)
    parts = [list(flat[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    return Layer(groups, batch_vote, eps, *parts)


class _EMAX(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(  # type: ignore[override]
        x: Tensor, constants: tuple[Any, ...], noise: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        layer = _layer(constants, tensors)
        if kernels.serve(x):
            return tuple(kernels.forward(x, layer, noise, keep=True))
        grouped, layer = prepare(x, layer)
        attended = attend(grouped, layer, noise)
        out = apply_attention(grouped, layer, attended).to(x.dtype)
        # torch.compile refuses the same tensor twice.
        pooled = [attended.pooled] if layer.global_ else []
        return out, *attended.fine, *pooled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.constants, *tensors = inputs
        kept = output[1:]
        ctx.has_global_gate = len(kept) > len(FineMaps._fields)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *kept, *tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        grad = grad_outputs[0]
        x, *kept = ctx.saved_tensors
        fine, kept = FineMaps(*kept[:6]), kept[6:]
        pooled, kept = (kept[0], kept[1:]) if ctx.has_global_gate else (fine.mean, kept)
        noise, tensors = kept[0], kept[1:]
        nothing: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        if grad is None:
            return tuple(nothing)
        original = _layer(ctx.constants, tensors)
        weights = list(itertools.chain(*original.parts()[1:]))
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            grads = _differentiable_gradients(x, original, noise, grad, weights)
        else:
            with _no_autocast(x):
                if kernels.serve(x):
                    grads = kernels.backward(x, grad, original, fine, pooled, noise)
                else:
                    grouped, layer = prepare(x, original)
                    grad = grad.to(grouped.dtype).unflatten(1, grouped.shape[1:3])
                    if torch.compiler.is_compiling():
                        ready = grad[:1, :1, :1].sum((3, 4), keepdim=True) == 0  # one channel's
                        grouped = _when(ready, grouped)
                        first, second = _when(ready[0], fine.first), _when(ready[0], fine.second)
                        fine = fine._replace(first=first, second=second)
                    grads = backward(grouped, grad, layer, fine, pooled, noise)
            typed = zip(grads, [x, *weights], strict=True)
            grads = [g.view_as(tensor).to(tensor.dtype) for g, tensor in typed]
        return grads[0], *nothing[1 : -len(weights)], *grads[1:]


def _when(ready: Tensor, x: Tensor) -> Tensor:
    """x, whatever `ready` holds, but not before it is there.

    `ready` comes from the gradient of the output. What follows from saved tensors alone
    torch.compile would compute in the forward pass, as far as it occurs there or costs a matrix
    product, and keep for the backward pass: a third of x at 14 x 14.
    """
    return torch.where(ready, x, x)


def _no_autocast(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Whether autocast is on or not: torch.compile traces the backward pass where it is off, and
    runs it under the autocast of the forward pass.
    """
    kind = x.device.type
    return contextlib.nullcontext() if kind == "meta" else torch.autocast(kind, enabled=False)


def _differentiable_gradients(
    x: Tensor, layer: Layer, noise: Tensor | None, grad: Tensor, weights: list[Tensor]
) -> list[Tensor | None]:
    """Gradients that can be differentiated again, of x and the weights (create_graph=True)."""
    inputs = [tensor for tensor in (x, *weights) if tensor.requires_grad]
    out = emax_plain(x, layer, noise)
    grads = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
    return [next(grads) if tensor.requires_grad else None for tensor in (x, *weights)]
