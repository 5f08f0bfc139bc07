"""The gradients of a layer, written out; `docs/emax.md` derives them.

Dimension letters as in `layer.py`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .fine_gradients import FineGrads, Output, fine_maps_backward
from .fine_maps import FineMaps, weigh_channels
from .gates import MeanGates, mean_gates, output_scale
from .grouping import controlled_choice, mix_groups, spatial_attention
from .layer import Layer

__all__ = ["backward"]


def backward(
    x: Tensor, grad: Tensor, layer: Layer, fine: FineMaps, pooled: Tensor, noise: Tensor | None
) -> list[Tensor]:
    """Gradients of x and of the parameters, in the order of `Layer`, from that of the output.

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
    grad_x, grad_weights = fine_maps_backward(
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
