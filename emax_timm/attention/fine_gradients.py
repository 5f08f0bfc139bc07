"""The gradients of the weights that `fine_maps.py` takes, and of x, where those of a layer meet.

Dimension letters as in `layer.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fine_maps import FineMaps, border_means, deviations, strip_gates, weigh_channels
from .gates import output_factor

__all__ = ["FineGrads", "Output", "fine_maps_backward"]


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


def fine_maps_backward(
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
