"""The pass over x for sequences and videos, one axis at a time; `fine_maps.py` has that for images.

It is made of operations that autograd, forward-mode differentiation and graph tracers can follow.
n is the number of axes, and a pixel is a position of a sequence or of a video. Sequences can have a
mask: what is written below holds for the tokens of a sequence alone, in their order. Before this
pass x is set to 0 where there is no token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import EMAXWeights
from .fine_maps import FineMaps, weigh_channels

__all__ = ["axis_gates", "border_means_nd", "correlate_nd", "fine_maps_nd", "mean_of_sum"]


def fine_maps_nd(x: Tensor, weights: EMAXWeights, mask: Tensor | None) -> FineMaps:
    """Compute the fine maps of x, from which the maps of every group count follow.

    Args:
        x: The input, [b, F, d, l] or [b, F, d, t, h, w].
        weights: The tensors of the layer, in the dtype of x.
        mask: Where the sequences have tokens, [b, l], or None.
    """
    pixels = list(range(3, x.dim()))
    conv3x3 = weights.conv3x3_weight.flatten(1)  # [d, d * 3^n]
    # As for images, the first softmax is a constant and its term a one-channel convolution.
    constant = torch.softmax(weights.gn_bias, dim=0)  # [d]
    kernel = torch.matmul(constant, conv3x3).view(weights.gn_bias.shape[0], -1)  # [d, 3^n]
    first = correlate_nd(x, kernel, mask) + torch.dot(constant, weights.conv3x3_bias)

    gated = x
    for gate in axis_gates(x, weights):
        gated = gated * gate
    deviation = gated - _as_pixels(mean_of_sum(gated.sum(pixels), x, mask), x)
    if mask is not None:
        deviation = deviation * mask.unsqueeze(1).unsqueeze(1)
    variance = mean_of_sum(deviation.square().sum(pixels), x, mask)
    rstd = torch.rsqrt(variance + weights.config.eps)  # [b, F, d]

    borders = border_means_nd(x, mask).flatten(2)  # [b, F, d * 3^n]
    conv_means = F.linear(borders, conv3x3, weights.conv3x3_bias)  # [b, F, d]
    softmax = torch.softmax(conv_means, dim=-1)
    second = weigh_channels(deviation, (softmax * weights.gn_weight * rstd).unsqueeze(2)).squeeze(2)
    second = second + _as_pixels(torch.matmul(softmax, weights.gn_bias), x)
    mean = mean_of_sum(x.sum(pixels), x, mask)
    # The deviations are from the mean itself, so theirs is 0.
    return FineMaps(mean, first, second, conv_means, torch.zeros_like(mean), rstd)


def mean_of_sum(total: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
    """Divide sums over the pixels of x [b, F, d, ...] by their number, or by that of the tokens.

    Args:
        total: The sums, [b, F, any].
        x: The features that were summed up; their last axes give the number of pixels.
        mask: Where the sequences have tokens, [b, l], or None. The sums of a sequence without any
            are 0, and so are its means.
    """
    if mask is not None:
        return total / mask.sum(1).clamp(min=1).unsqueeze(-1).unsqueeze(-1)
    pixels = 1
    for size in x.shape[3:]:
        pixels = pixels * size
    return total / pixels


def axis_gates(x: Tensor, weights: EMAXWeights) -> list[Tensor]:
    """Compute the gates in (0, 1) of each axis of x [b, F, d, ...] from its means over the others.

    The gates of an axis have its size there and 1 in the others. A sequence has no other axes: its
    gates follow from x itself.
    """
    mixing = weights.conv1x1_weight.flatten(1)  # [d, d]
    gates: list[Tensor] = []
    for axis in range(3, x.dim()):
        pooled = x
        for other in range(3, x.dim()):
            if other != axis:
                pooled = pooled.mean(other, keepdim=True)
        mixed = _weigh(pooled, mixing)
        gates.append(torch.sigmoid(mixed + _as_pixels(weights.conv1x1_bias, x)))
    return gates


def border_means_nd(x: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the means of x that each of the 3^n kernel offsets sees, over the output pixels.

    Along an axis a zero-padded kernel sees at its three offsets all but the last pixel, all, and
    all but the first. These sums replace the pixels of one axis after another. Multiplied out, that
    is inclusion and exclusion over the faces, edges and corners that an offset moves out.

    Args:
        x: The input, [b, F, d, ...].
        mask: Where the sequences have tokens, [b, l], or None.

    Returns:
        The means [b, F, d, 3^n], with the offsets in row-major order as in a flattened kernel.
    """
    sums = x
    for _ in range(3, x.dim()):
        # The new axis comes before the others, so that after the last step the first is outermost.
        total = sums.sum(-1).unsqueeze(3)
        if mask is None:
            first, last = sums.select(-1, 0).unsqueeze(3), sums.select(-1, -1).unsqueeze(3)
        else:
            first, last = _first_and_last_token(sums, mask)
        sums = torch.cat([total - last, total, total - first], 3)
    return mean_of_sum(sums.flatten(2), x, mask).unflatten(2, [x.shape[2], -1])


def _first_and_last_token(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Select the first and the last token of x [b, F, d, l]: [b, F, d, 1] each.

    In a sequence without tokens both are the first position, where x is 0.
    """
    place = torch.arange(mask.shape[1], device=mask.device)
    first = mask.to(torch.uint8).argmax(1)
    last = (place * mask).amax(1)
    shape = [-1, x.shape[1], x.shape[2], -1]
    first, last = first.view(-1, 1, 1, 1).expand(shape), last.view(-1, 1, 1, 1).expand(shape)
    return x.gather(3, first), x.gather(3, last)


def correlate_nd(x: Tensor, kernel: Tensor, mask: Tensor | None) -> Tensor:
    """Correlate each group, padded with zeros, with one kernel that has one output channel.

    Args:
        x: The features, [b, F, d, ...].
        kernel: The kernel, [d, 3^n].
        mask: Where the sequences have tokens, [b, l], or None.

    Returns:
        The result, [b, F, ...].
    """
    axes = x.dim() - 3
    neighbours: list[Tensor] = []
    if mask is None:
        x = F.pad(x, [1, 1] * axes)
    else:
        length = mask.shape[1]
        neighbours = [_before(mask), length + 1 - _before(mask.flip(1)).flip(1)]
    rows = kernel.t().unflatten(0, [3, -1])  # [3, 3^(n - 1), d]
    total: list[Tensor] = []
    # One offset along the first axis after another, because the images of all offsets at once would
    # be 27 / d times as large as x.
    for k in range(3):
        seen = x if mask is not None else x.narrow(3, k, x.shape[3] - 2)
        images = _weigh(seen, rows[k])  # [b, F, 3^(n - 1), ...]
        for axis in range(x.dim() - 1, 3, -1):
            moved, size = images.unflatten(2, [-1, 3]), x.shape[axis] - 2
            images = moved[:, :, :, 0].narrow(axis, 0, size)
            images = images + moved[:, :, :, 1].narrow(axis, 1, size)
            images = images + moved[:, :, :, 2].narrow(axis, 2, size)
        image = images.squeeze(2)
        if mask is not None and k != 1:
            index = neighbours[k // 2].unsqueeze(1).expand_as(image)
            image = F.pad(image, [1, 1]).gather(-1, index)
        total.append(image)
    return total[0] + total[1] + total[2]


def _weigh(x: Tensor, weights: Tensor) -> Tensor:
    """Compute t sums over d of x [b, F, d, ...] by the weights [t, d]: [b, F, t, ...]."""
    # Products of a batch with one matrix that is copied for each of it are several times faster.
    return weigh_channels(x, weights.expand(x.shape[0], x.shape[1], -1, -1).contiguous())


def _before(mask: Tensor) -> Tensor:
    """Find the last token before each position, [b, l], counted from 1; 0 means none."""
    length = mask.shape[1]
    place = torch.arange(1, length + 1, device=mask.device)
    return F.pad(place * mask, [1, 0])[:, :length].cummax(1)[0]


def _as_pixels(values: Tensor, x: Tensor) -> Tensor:
    """View values per channel or group so that they broadcast over the pixels of x."""
    for _ in range(3, x.dim()):
        values = values.unsqueeze(-1)
    return values
