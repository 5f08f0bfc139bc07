"""EMAX as one node of autograd's graph, with its gradients written out.

Autograd on the formulas of `functional.py` would keep about ten tensors of the size of x. This node
keeps x, the two fine maps and five vectors per sample, and computes the rest again. `docs/emax.md`
derives the gradients.

Dimension letters as in `functional.py`.
"""

import contextlib
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import kernels
from .functional import (
    FineMaps,
    Layer,
    MeanGates,
    apply_attention,
    attend,
    border_means,
    controlled_choice,
    deviations,
    draw_noise,
    emax_plain,
    mean_gates,
    mix_groups,
    output_factor,
    output_scale,
    outside_autocast,
    prepare,
    spatial_attention,
    strip_gates,
    weigh_channels,
)

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
    parts = _tensors(layer)
    constants = (layer.groups, layer.batch_vote, layer.eps, tuple(len(part) for part in parts))
    return _EMAX.apply(x, constants, noise, *itertools.chain(*parts))[0]


def _tensors(layer: Layer) -> list[list[Tensor]]:
    """The fields of `Layer` that hold tensors, in its order."""
    return [
        layer.grouping,
        layer.spatial,
        layer.controller,
        layer.channel,
        layer.gamma,
        layer.global_,
        layer.residual_gate,
    ]


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
        weights = list(itertools.chain(*_tensors(original)[1:]))
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
                    grads = _backward(grouped, grad, layer, fine, pooled, noise)
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


def _backward(
    x: Tensor, grad: Tensor, layer: Layer, fine: FineMaps, pooled: Tensor, noise: Tensor | None
) -> list[Tensor]:
    """Gradients of x and of the parameters, in the order of `_tensors`, from that of the output.

    Args:
        x, grad: [b, F, d, h, w].
        layer: In x's dtype.
        fine, pooled, noise: Of the forward pass.
    """
    pixels = x.shape[3] * x.shape[4]
    mean = fine.mean.flatten(1)  # [b, c]

    # What is small is computed again.
    groups = controlled_choice(mean, layer, noise)
    spatial = spatial_attention(fine, groups.choice, layer.grouping)
    gates = mean_gates(mean, pooled.flatten(1), layer.channel, layer.gamma, layer.global_)
    scale, offset = output_scale(gates, layer.gamma, layer.residual_gate)
    scale, offset = scale.view_as(fine.mean), offset.view_as(fine.mean)

    # out = x * (scale * S + offset)
    grad_scale, grad_offset, grad_spatial = _products(x, grad, spatial, scale)
    gate_grads = _gates_backward(
        grad_scale.flatten(1), grad_offset.flatten(1), mean, scale.flatten(1), gates, layer
    )
    grad_pooled = gate_grads.pooled.view_as(fine.mean) / pixels
    grad_spatial = grad_spatial + _weigh(x, grad_pooled)
    grad_map = grad_spatial * spatial * (1 - spatial)  # [b, F, h, w]

    grad_mean = gate_grads.mean
    grad_controller: list[Tensor] = []
    grad_first = grad_second = grad_map
    grad_score = torch.zeros_like(fine.mean[:, :, 0])
    if layer.grouping:
        same_group, warmup, temperature = layer.grouping
        grad_first, grad_second, grad_score, grad_choice = _mixing_backward(
            grad_map, fine, groups.choice, same_group, warmup.to(mean.dtype)
        )
        if layer.controller:
            soft = groups.soft
            grad_logits = soft * (grad_choice - (soft * grad_choice).sum(1, keepdim=True))
            grad_logits = grad_logits / temperature
            grad_mean = grad_mean + torch.matmul(grad_logits, layer.controller[0])
            grad_controller = [torch.matmul(grad_logits.mT, mean), grad_logits.sum(0)]

    grads = FineGrads(
        grad_first, grad_second, grad_score, grad_mean.view_as(fine.mean), grad_pooled
    )
    grad_x, grad_weights = _fine_maps_backward(
        x, grad, Output(spatial, scale, offset), fine, layer.spatial, grads
    )
    return [
        grad_x,
        *grad_weights,
        *grad_controller,
        *gate_grads.channel,
        *gate_grads.gamma,
        *gate_grads.global_,
        *gate_grads.residual_gate,
    ]


def _mixing_backward(
    grad: Tensor, fine: FineMaps, choice: Tensor, same_group: Tensor, warmup: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the fine maps [b, F, h, w] twice, the scores [b, F] and the choice [b, K], from
    that of the mixed map [b, F, h, w].
    """
    mixing = mix_groups(torch.logsumexp(fine.conv_means, dim=-1), choice, same_group, warmup)
    flat = grad.flatten(2)
    grad_first = torch.matmul(mixing.first.mT, flat).view_as(grad)
    grad_second = torch.matmul(mixing.second.mT, flat).view_as(grad)
    # Of the two matrices, [b, F, F], and of each candidate's second one, [b, K, F, F].
    to_first = torch.matmul(flat, fine.first.flatten(2).mT)
    to_second = torch.matmul(flat, fine.second.flatten(2).mT).unsqueeze(1)
    weighted = mixing.weighted * to_second
    grad_choice = torch.matmul(to_first.flatten(1), mixing.equal.flatten(1).mT)
    grad_choice = warmup * (grad_choice + weighted.sum((2, 3)))
    # Each row of a candidate's matrix is a softmax of the scores.
    grad_score = weighted - mixing.weighted * weighted.sum(3, keepdim=True)
    grad_score = torch.matmul((warmup * choice).unsqueeze(1), grad_score.sum(2)).squeeze(1)
    return grad_first, grad_second, grad_score, grad_choice


class _GateGrads(NamedTuple):
    mean: Tensor
    pooled: Tensor
    channel: list[Tensor]
    gamma: list[Tensor]
    global_: list[Tensor]
    residual_gate: list[Tensor]


def _gates_backward(
    grad_scale: Tensor,
    grad_offset: Tensor,
    mean: Tensor,
    scale: Tensor,
    gates: MeanGates,
    layer: Layer,
) -> _GateGrads:
    """Gradients of what `mean_gates` and `output_scale` take; all tensors [b, c]."""
    grad_mean = grad_fused = torch.zeros_like(mean)
    channel_grads: list[Tensor] = []
    gamma_grads: list[Tensor] = []
    global_grads: list[Tensor] = []
    gate_grads: list[Tensor] = []
    # offset = 1 - alpha + scale * branch, with branch = gamma * w_c; scale = alpha * w_g
    branch = torch.zeros_like(mean)
    if layer.gamma:
        branch = layer.gamma[0] * gates.channel
    grad_scale = grad_scale + grad_offset * branch
    grad_global = grad_scale
    if layer.residual_gate:
        grad_global = grad_scale * layer.residual_gate[0]
        gate_grads = [(grad_scale * gates.global_ - grad_offset).sum(0)]
    if layer.global_:
        grad_fused, global_grads = _squeeze_excite_backward(
            grad_global, gates.fused, gates.global_, gates.global_hidden, layer.global_
        )
    if layer.gamma:
        # fused = pooled + branch * mean
        grad_branch = grad_offset * scale + grad_fused * mean
        gamma_grads = [(grad_branch * gates.channel).sum()]
        grad_mean, channel_grads = _squeeze_excite_backward(
            grad_branch * layer.gamma[0],
            mean,
            gates.channel,
            gates.channel_hidden,
            layer.channel,
        )
        grad_mean = grad_mean + grad_fused * branch
    return _GateGrads(grad_mean, grad_fused, channel_grads, gamma_grads, global_grads, gate_grads)


def _squeeze_excite_backward(
    grad: Tensor, mean: Tensor, gate: Tensor, hidden: Tensor, weights: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    grad = grad * gate * (1 - gate)  # [b, c]
    grad_hidden = torch.matmul(grad, weights[2].flatten(1)) * (hidden > 0)
    grads = [
        torch.matmul(grad_hidden.mT, mean),
        grad_hidden.sum(0),
        torch.matmul(grad.mT, hidden),
        grad.sum(0),
    ]
    return torch.matmul(grad_hidden, weights[0].flatten(1)), grads


def _products(
    x: Tensor, grad: Tensor, spatial: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of x * grad: over the image with and without S, and over d with `scale`.

    Args:
        x, grad: [b, F, d, h, w].
        spatial: [b, F, h, w].
        scale: [b, F, d].

    Returns:
        [b, F, d] twice and [b, F, h, w].
    """
    product = x * grad
    with_map = torch.matmul(product.flatten(3), spatial.flatten(2).unsqueeze(-1)).squeeze(-1)
    return with_map, product.sum((3, 4)), _weigh(product, scale)


def _weigh(x: Tensor, weights: Tensor) -> Tensor:
    """Sums over d of x [b, F, d, h, w] times weights [b, F, d]: [b, F, h, w]."""
    return weigh_channels(x, weights.unsqueeze(2)).squeeze(2)


class Output(NamedTuple):
    """out = x * (scale * S + offset)"""

    spatial: Tensor
    """S, [b, F, h, w]."""
    scale: Tensor
    """[b, F, d]."""
    offset: Tensor
    """[b, F, d]."""


class FineGrads(NamedTuple):
    """Gradients that meet in `fine_maps`."""

    first: Tensor
    """[b, F, h, w]."""
    second: Tensor
    """[b, F, h, w]."""
    score: Tensor
    """Of the logsumexp of `FineMaps.conv_means`, [b, F]."""
    mean: Tensor
    """[b, F, d]."""
    pooled: Tensor
    """Of x * S, the same for all pixels, [b, F, d]."""


def _fine_maps_backward(
    x: Tensor,
    grad: Tensor,
    output: Output,
    fine: FineMaps,
    weights: list[Tensor],
    grads: FineGrads,
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of x [b, F, d, h, w] and of the weights that `fine_maps` takes."""
    conv3x3_weight, conv3x3_bias, gn_bias = weights[2], weights[3], weights[5]
    matrix = conv3x3_weight.flatten(1)  # [d, d * 9]
    constant = torch.softmax(gn_bias, dim=0)  # [d]
    kernel = torch.matmul(constant, matrix).view(-1, 9)
    grad_x, grad_means, borders, grad_strips, strips, grad_kernel, grad_gn = _backward_pass(
        x, grad, output, fine, weights, kernel, grads
    )
    grad_means = grad_means.flatten(0, 1)  # [b * F, d]
    grad_matrix = torch.matmul(grad_means.mT, borders.flatten(0, 1))
    grad_conv3x3_bias = grad_means.sum(0)
    # The kernel is conv3x3, weighted with softmax(gn_bias).
    grad_kernel = grad_kernel.flatten()
    grad_first = grads.first.sum()
    grad_constant = torch.matmul(matrix, grad_kernel) + grad_first * conv3x3_bias
    grad_constant = constant * (grad_constant - torch.dot(constant, grad_constant))
    return grad_x, [
        torch.matmul(grad_strips, strips.mT).sum((0, 1)),
        grad_strips.sum((0, 1, 3)),
        grad_matrix + torch.outer(constant, grad_kernel),
        grad_conv3x3_bias + constant * grad_first,
        grad_gn[0],
        grad_gn[1] + grad_constant,
    ]


def _backward_pass(
    x: Tensor,
    grad: Tensor,
    output: Output,
    fine: FineMaps,
    weights: list[Tensor],
    kernel: Tensor,
    grads: FineGrads,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What of the gradients needs feature maps.

    Returns:
        The gradient of x, [b, F, d, h, w]; of the means of conv3x3(x), [b, F, d]; the border means,
        [b, F, d * 9]; the gradient of what conv1x1 gives for the strips, [b, F, d, h + w], and the
        strips; the gradient of the kernel, [d, 9]; and those of gn's weight and bias, [2, d],
        without what the kernel adds to the latter.
    """
    conv1x1_weight, conv1x1_bias, conv3x3_weight, _, gn_weight, gn_bias = weights
    h, w = x.shape[3], x.shape[4]
    pixels = h * w
    rows, columns, gate_h, gate_w = strip_gates(x, conv1x1_weight, conv1x1_bias)
    deviation = deviations(x, fine.mean, gate_h, gate_w)

    # second = sum over d of scale * (deviation - centre) + softmax * gn_bias
    softmax = torch.softmax(fine.conv_means, dim=-1)  # [b, F, d]
    scale = softmax * gn_weight * fine.rstd
    # Centred, so that a mean of the deviations that is far above their deviation cancels exactly.
    total = grads.second.sum((2, 3)).unsqueeze(-1)  # [b, F, 1]
    second = grads.second - total.unsqueeze(-1) / pixels
    # No matrix product: its long sums round more, and what follows magnifies that.
    grad_scale = (deviation * second.unsqueeze(2)).sum((3, 4))
    grad_softmax = grad_scale * gn_weight * fine.rstd + gn_bias * total
    grad_gn_weight = (grad_scale * softmax * fine.rstd).sum((0, 1))
    grad_gn_bias = (softmax * total).sum((0, 1))
    # The gradient of the gated features, through the map and through their two moments.
    curve = -grad_scale * softmax * gn_weight * fine.rstd.pow(3) / pixels
    grad_gated = _as_image(curve) * (deviation - _as_image(fine.centre))
    grad_gated = grad_gated + _as_image(scale) * second.unsqueeze(2)

    # The softmax is over the border means' products with conv3x3.
    borders = border_means(x, rows, columns)  # [b, F, d, 9]
    inner = (softmax * grad_softmax).sum(-1, keepdim=True)
    grad_means = softmax * (grad_softmax - inner + grads.score.unsqueeze(-1))  # [b, F, d]
    grad_borders = torch.matmul(grad_means, conv3x3_weight.flatten(1)).view_as(borders) / pixels

    moved = _as_each_tap_sees(grads.first)  # [b, F, 9, h, w]
    grad_kernel = torch.matmul(x.flatten(3), moved.flatten(3).mT).sum((0, 1))  # [d, 9]

    # The strip gates, whose gradients are sums of that of their product.
    grad_gate = grad_gated * x
    grad_pre_h = torch.matmul(grad_gate, gate_w.unsqueeze(-1)).squeeze(-1) * gate_h * (1 - gate_h)
    grad_pre_w = torch.matmul(gate_h.unsqueeze(-2), grad_gate).squeeze(-2) * gate_w * (1 - gate_w)
    mixing = conv1x1_weight.flatten(1).mT
    grad_rows = torch.matmul(mixing, grad_pre_h) / w
    grad_columns = torch.matmul(mixing, grad_pre_w) / h

    # What the nine border means leave out, at the borders and again at the corners.
    taps = grad_borders.unflatten(3, [3, 3])
    grad_rows = grad_rows + (grads.mean / pixels + grad_borders.sum(3)).unsqueeze(-1)
    grad_rows = grad_rows - _at_ends(taps.sum(4), h)
    grad_columns = grad_columns - _at_ends(taps.sum(3), w)
    corners = torch.matmul(_ends(h, x).mT, torch.matmul(taps, _ends(w, x)))  # [b, F, d, h, w]

    grad_x = grad * output_factor(output.scale, output.offset, output.spatial)
    grad_x = grad_x + _as_image(grads.pooled) * output.spatial.unsqueeze(2)
    grad_x = grad_x + grad_gated * (gate_h.unsqueeze(-1) * gate_w.unsqueeze(-2))
    grad_x = grad_x + grad_rows.unsqueeze(-1) + grad_columns.unsqueeze(-2) + corners
    grad_x = grad_x + weigh_channels(moved, kernel)
    return (
        grad_x,
        grad_means,
        borders.flatten(2),
        torch.cat([grad_pre_h, grad_pre_w], 3),
        torch.cat([rows, columns], 3),
        grad_kernel,
        torch.stack([grad_gn_weight, grad_gn_bias]),
    )


def _as_image(values: Tensor) -> Tensor:
    """A value per channel, broadcast over the image: [b, F, d, 1, 1]."""
    return values.unsqueeze(-1).unsqueeze(-1)


def _as_each_tap_sees(image: Tensor) -> Tensor:
    """What the transposed correlation passes to each pixel by each tap: [b, F, 9, h, w]."""
    h, w = image.shape[2], image.shape[3]
    padded = F.pad(image, [1, 1, 1, 1])
    moved = [padded[:, :, 2 - i : 2 - i + h, 2 - j : 2 - j + w] for i in range(3) for j in range(3)]
    return torch.stack(moved, 2)


def _ends(size: int, like: Tensor) -> Tensor:
    """[3, size]: the upper taps of a kernel miss the last pixel, the lower ones the first."""
    place = torch.arange(size, device=like.device)
    last, first = place == size - 1, place == 0
    return torch.stack([last, torch.zeros_like(last), first]).to(like.dtype)


def _at_ends(taps: Tensor, size: int) -> Tensor:
    return torch.matmul(taps, _ends(size, taps))
