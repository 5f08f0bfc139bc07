"""The backward pass of `fine_maps.py`: the gradients of x, where all meet, and of its weights."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import EMAXWeights
from .fine_maps import FineMaps, border_means, deviations, row_and_column_gates, weigh_channels
from .forward import Attended
from .gates import output_factor

__all__ = ["FineGrads", "fine_maps_backward"]


class FineGrads(NamedTuple):
    """The gradients of the loss that the backward pass of `fine_maps` starts from."""

    first: Tensor
    """The gradient of the first term, [b, F, h, w]."""
    second: Tensor
    """The gradient of the second term, [b, F, h, w]."""
    score: Tensor
    """The gradient of the logsumexp of `FineMaps.conv_means`, [b, F]."""
    mean: Tensor
    """The gradient of the mean of x, [b, F, d]."""
    pooled: Tensor
    """The gradient of x * S, which is the same for all pixels, [b, F, d]."""


def fine_maps_backward(
    x: Tensor, grad: Tensor, weights: EMAXWeights, attended: Attended, grads: FineGrads
) -> dict[str, Tensor]:
    """Compute the gradients, by name, of x and of the weights that `fine_maps` uses.

    Args:
        x: The input, [b, F, d, h, w].
        grad: The gradient of the output, [b, F, d, h, w].
        weights: The tensors of the layer, in the dtype of x.
        attended: The results of the forward pass.
        grads: The gradients to start from.
    """
    h, w = x.shape[3], x.shape[4]
    pixels = h * w
    fine = attended.fine
    conv3x3 = weights.conv3x3_weight.flatten(1)  # [d, d * 9]
    rows, columns, gate_h, gate_w = row_and_column_gates(x, weights, plain=False)
    deviation = deviations(x, fine.mean, gate_h, gate_w)
    grad_gated, grad_means, grad_gn_weight, grad_gn_bias = _second_term_backward(
        deviation, weights, fine, grads
    )

    # The means of conv3x3(x) are the products of the border means with its weight.
    borders = border_means(x, rows, columns)  # [b, F, d, 9]
    grad_borders = torch.matmul(grad_means, conv3x3).view_as(borders) / pixels
    # The first term is a correlation with conv3x3, weighted with softmax(gn_bias).
    constant = torch.softmax(weights.gn_bias, dim=0)  # [d]
    kernel = torch.matmul(constant, conv3x3).view(-1, 9)
    moved = _as_each_offset_sees(grads.first)  # [b, F, 9, h, w]
    grad_kernel = torch.matmul(x.flatten(3), moved.flatten(3).mT).sum((0, 1)).flatten()  # [d * 9]
    grad_first = grads.first.sum()
    grad_constant = torch.matmul(conv3x3, grad_kernel) + grad_first * weights.conv3x3_bias
    grad_constant = constant * (grad_constant - torch.dot(constant, grad_constant))

    # The gradients of the row and column gates are sums of that of their product.
    grad_gate = grad_gated * x
    grad_pre_h = torch.matmul(grad_gate, gate_w.unsqueeze(-1)).squeeze(-1) * gate_h * (1 - gate_h)
    grad_pre_w = torch.matmul(gate_h.unsqueeze(-2), grad_gate).squeeze(-2) * gate_w * (1 - gate_w)
    mixing = weights.conv1x1_weight.flatten(1).mT
    grad_rows = torch.matmul(mixing, grad_pre_h) / w
    grad_columns = torch.matmul(mixing, grad_pre_w) / h

    # The nine border means leave out borders, and the corners are added back.
    offsets = grad_borders.unflatten(3, [3, 3])
    grad_rows = grad_rows + (grads.mean / pixels + grad_borders.sum(3)).unsqueeze(-1)
    grad_rows = grad_rows - _at_ends(offsets.sum(4), h)
    grad_columns = grad_columns - _at_ends(offsets.sum(3), w)
    corners = torch.matmul(_ends(h, x).mT, torch.matmul(offsets, _ends(w, x)))  # [b, F, d, h, w]

    grad_x = grad * output_factor(attended.gates, attended.spatial)
    grad_x = grad_x + _as_image(grads.pooled) * attended.spatial.unsqueeze(2)
    grad_x = grad_x + grad_gated * (gate_h.unsqueeze(-1) * gate_w.unsqueeze(-2))
    grad_x = grad_x + grad_rows.unsqueeze(-1) + grad_columns.unsqueeze(-2) + corners
    grad_x = grad_x + weigh_channels(moved, kernel)

    grad_pre = torch.cat([grad_pre_h, grad_pre_w], 3)  # [b, F, d, h + w]
    pooled = torch.cat([rows, columns], 3)
    grad_means, borders = grad_means.flatten(0, 1), borders.flatten(2).flatten(0, 1)  # [b * F, ...]
    return {
        "x": grad_x,
        "conv1x1_weight": torch.matmul(grad_pre, pooled.mT).sum((0, 1)),
        "conv1x1_bias": grad_pre.sum((0, 1, 3)),
        "conv3x3_weight": torch.matmul(grad_means.mT, borders) + torch.outer(constant, grad_kernel),
        "conv3x3_bias": grad_means.sum(0) + constant * grad_first,
        "gn_weight": grad_gn_weight,
        "gn_bias": grad_gn_bias + grad_constant,
    }


def _second_term_backward(
    deviation: Tensor, weights: EMAXWeights, fine: FineMaps, grads: FineGrads
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the inputs of the second term and of the scores.

    The second term is the sum over d of scale * (deviation - gated_mean) + softmax * gn_bias.

    Args:
        deviation: The deviations of the gated features, [b, F, d, h, w].
        weights: The tensors of the layer, in the dtype of `deviation`.
        fine: The fine maps of the forward pass.
        grads: The gradients to start from.

    Returns:
        The gradients of the gated features, [b, F, d, h, w], of the means of conv3x3(x), [b, F, d],
        and of the weight and the bias of gn, [d] each. That of the bias is without its part from
        the first term.
    """
    pixels = deviation.shape[3] * deviation.shape[4]
    softmax = torch.softmax(fine.conv_means, dim=-1)  # [b, F, d]
    scale = softmax * weights.gn_weight * fine.rstd
    # Without its mean, so that a mean of the deviations far above their spread cancels exactly.
    total = grads.second.sum((2, 3)).unsqueeze(-1)  # [b, F, 1]
    second = grads.second - total.unsqueeze(-1) / pixels
    # Not a matrix product, whose long sums round more, which the next steps would magnify.
    grad_scale = (deviation * second.unsqueeze(2)).sum((3, 4))
    grad_softmax = grad_scale * weights.gn_weight * fine.rstd + weights.gn_bias * total
    grad_gn_weight = (grad_scale * softmax * fine.rstd).sum((0, 1))
    grad_gn_bias = (softmax * total).sum((0, 1))
    # The gradient of the gated features goes through the map and through their two moments.
    curve = -grad_scale * softmax * weights.gn_weight * fine.rstd.pow(3) / pixels
    grad_gated = _as_image(curve) * (deviation - _as_image(fine.gated_mean))
    grad_gated = grad_gated + _as_image(scale) * second.unsqueeze(2)
    # The scores are the logsumexps of the means that the softmax is taken of.
    inner = (softmax * grad_softmax).sum(-1, keepdim=True)
    grad_means = softmax * (grad_softmax - inner + grads.score.unsqueeze(-1))
    return grad_gated, grad_means, grad_gn_weight, grad_gn_bias


def _as_image(values: Tensor) -> Tensor:
    """View a value per channel [b, F, d] so that it broadcasts over the image: [b, F, d, 1, 1]."""
    return values.unsqueeze(-1).unsqueeze(-1)


def _as_each_offset_sees(image: Tensor) -> Tensor:
    """Move an image [b, F, h, w] by each of the nine kernel offsets: [b, F, 9, h, w].

    This is what the transposed correlation passes to each pixel by each offset.
    """
    h, w = image.shape[2], image.shape[3]
    padded = F.pad(image, [1, 1, 1, 1])
    moved = [padded[:, :, 2 - i : 2 - i + h, 2 - j : 2 - j + w] for i in range(3) for j in range(3)]
    return torch.stack(moved, 2)


def _ends(size: int, like: Tensor) -> Tensor:
    """Mark the pixels that the offsets -1, 0 and 1 miss: the last, none, the first; [3, size]."""
    place = torch.arange(size, device=like.device)
    last, first = place == size - 1, place == 0
    return torch.stack([last, torch.zeros_like(last), first]).to(like.dtype)


def _at_ends(offsets: Tensor, size: int) -> Tensor:
    return torch.matmul(offsets, _ends(size, offsets))
