"""The pass over x that computes the pooled rows and columns, moments, and the two fine maps."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import EMAXWeights

__all__ = [
    "FineMaps",
    "border_means",
    "correlate",
    "deviations",
    "fine_maps",
    "row_and_column_gates",
    "ungroup",
    "weigh_channels",
]


class FineMaps(NamedTuple):
    """The two cross-spatial terms at the finest grouping, and other values that need x alone."""

    mean: Tensor
    """The mean over the image of x, [b, F, d]."""
    first: Tensor
    """The first term, [b, F, h, w]; the sum of both is the map of EMA before its sigmoid."""
    second: Tensor
    """The second term, [b, F, h, w]."""
    conv_means: Tensor
    """The means over the image of conv3x3(x), [b, F, d]. Their softmax weights the channels in
    `second`; their logsumexp is the score of the second term in a coarser group."""
    gated_mean: Tensor
    """The mean of the gated features less the `shift` of `deviations`, [b, F, d]."""
    rstd: Tensor
    """The reciprocal of the standard deviation of the gated features, [b, F, d]."""


def fine_maps(x: Tensor, weights: EMAXWeights, plain: bool) -> FineMaps:
    """Compute the fine maps of x, from which the maps of every group count follow.

    Args:
        x: The input, [b, F, d, h, w].
        weights: The tensors of the layer, in the dtype of x.
        plain: Whether to use operations that autograd, forward-mode differentiation and graph
            tracers can follow. The others are faster, but some of them write into their results or
            have no second derivative.
    """
    conv3x3 = weights.conv3x3_weight.flatten(1)  # [d, d * 9]
    # gn has one channel per group, so the mean of its output is gn_bias whatever the input: the
    # first softmax is a constant, and its product with conv3x3(x) a one-channel convolution.
    constant = torch.softmax(weights.gn_bias, dim=0)  # [d]
    kernel = torch.matmul(constant, conv3x3).view(-1, 9)  # [d, 9]
    offset = torch.dot(constant, weights.conv3x3_bias)
    rows, columns, gate_h, gate_w = row_and_column_gates(x, weights, plain)
    mean = columns.mean(3)  # [b, F, d]
    deviation = deviations(x, mean, gate_h, gate_w)
    gated_mean = deviation.mean(dim=(3, 4))
    if plain:
        square = deviation.square().mean(dim=(3, 4))
    else:
        # This reads the features once, but its second derivative at 0 is not finite.
        pixels = x.shape[3] * x.shape[4]
        square = torch.linalg.vector_norm(deviation, dim=(3, 4)).square() / pixels
    variance = (square - gated_mean.square()).clamp(min=0)
    rstd = torch.rsqrt(variance + weights.config.eps)  # [b, F, d]

    first = correlate(x, kernel, plain) + offset

    # The second softmax is over the means of conv3x3(x), which are linear in border means of x.
    borders = border_means(x, rows, columns).flatten(2)  # [b, F, d * 9]
    conv_means = F.linear(borders, conv3x3, weights.conv3x3_bias)  # [b, F, d]
    softmax = torch.softmax(conv_means, dim=-1)
    scale = softmax * weights.gn_weight * rstd  # [b, F, d]
    level = torch.matmul(softmax, weights.gn_bias) - (scale * gated_mean).sum(-1)  # [b, F]
    second = weigh_channels(deviation, scale.unsqueeze(2)).squeeze(2)
    second = second + level.unsqueeze(-1).unsqueeze(-1)
    return FineMaps(mean, first, second, conv_means, gated_mean, rstd)


def _column_means(x: Tensor, plain: bool) -> Tensor:
    """Compute the means over h of x [b, F, d, h, w]: [b, F, d, w]."""
    if not plain and _is_compiled_with_short_rows(x):
        # This takes two rows as one. For sums over rows shorter than a vector torch.compile starts
        # all threads anew for every channel, which takes 6 of 8 ms at 1024 x 14 x 14.
        pairs = x.unflatten(3, [-1, 2]).flatten(4).mean(3)
        return pairs.unflatten(3, [2, -1]).mean(3)
    return x.mean(3)


@torch.jit.unused
def _is_compiled_with_short_rows(x: Tensor) -> bool:
    """Say whether torch.compile sees an even number of rows, each shorter than a vector.

    For sizes that vary the answer is no.
    """
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(x.shape[4] < 16) and statically_known_true(x.shape[3] % 2 == 0)


def row_and_column_gates(
    x: Tensor, weights: EMAXWeights, plain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gates of EMA from the pooled rows and columns of x.

    Args:
        x: The input, [b, F, d, h, w].
        weights: The tensors of the layer, in the dtype of x.
        plain: As in `fine_maps`.

    Returns:
        The means of x over w, [b, F, d, h], and over h, [b, F, d, w], and the gates in (0, 1) that
        follow from each, with the same shapes.
    """
    rows, columns = x.mean(4), _column_means(x, plain)
    gate_h = torch.sigmoid(_mix_channels(rows, weights, plain))
    gate_w = torch.sigmoid(_mix_channels(columns, weights, plain))
    return rows, columns, gate_h, gate_w


def _mix_channels(x: Tensor, weights: EMAXWeights, plain: bool) -> Tensor:
    """Apply conv1x1 to x [b, F, d, n]."""
    if plain:
        # With a matrix product torch.export would guard on the sizes of images.
        weight = weights.conv1x1_weight.flatten(2)  # [d, d, 1]
        mixed = F.conv1d(x.flatten(0, 1), weight, weights.conv1x1_bias)
        return mixed.unflatten(0, [x.shape[0], x.shape[1]])
    return torch.matmul(weights.conv1x1_weight.flatten(1), x) + weights.conv1x1_bias.unsqueeze(-1)


def deviations(x: Tensor, mean: Tensor, gate_h: Tensor, gate_w: Tensor) -> Tensor:
    """Compute the gated features less a constant per channel that is near their mean.

    A variance from these deviations is accurate, where E[u^2] - E[u]^2 cancels for features u with
    a large mean.

    Args:
        x: The input, [b, F, d, h, w].
        mean: The mean over the image of x, [b, F, d].
        gate_h: The gates of the rows, [b, F, d, h].
        gate_w: The gates of the columns, [b, F, d, w].

    Returns:
        The deviations, [b, F, d, h, w].
    """
    shift = (gate_h * (mean * gate_w.mean(3)).unsqueeze(-1)).mean(3)  # [b, F, d]
    gate = gate_h.unsqueeze(-1) * gate_w.unsqueeze(-2)
    return torch.addcmul(-shift.unsqueeze(-1).unsqueeze(-1), x, gate)


def border_means(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Compute the means of x that each of the nine kernel offsets sees, over the output positions.

    A zero-padded 3x3 kernel at the offset (dy, dx) sees all of x except the row and the column that
    the offset moves out of the image. Their common corner is subtracted twice and added back once.

    Args:
        x: The input, [b, F, d, h, w].
        rows: The means of x over w, [b, F, d, h].
        columns: The means of x over h, [b, F, d, w].

    Returns:
        The means [b, F, d, 9], with the offsets in row-major order as in a flattened kernel.
    """
    h, w = x.shape[3], x.shape[4]
    # The upper offsets (dy = -1) miss the last row, the lower ones the first; columns likewise.
    # They are padded, because TorchScript's gradient of a stack can lose some of its inputs.
    missed_row = (F.pad(rows[..., -1:], [0, 2]) + F.pad(rows[..., :1], [2, 0])) / h  # [b, F, d, 3]
    missed_column = (F.pad(columns[..., -1:], [0, 2]) + F.pad(columns[..., :1], [2, 0])) / w
    corner = (
        F.pad(x[..., -1:, -1:], [0, 2, 0, 2])
        + F.pad(x[..., -1:, :1], [2, 0, 0, 2])
        + F.pad(x[..., :1, -1:], [0, 2, 2, 0])
        + F.pad(x[..., :1, :1], [2, 0, 2, 0])
    ) / (h * w)  # [b, F, d, 3, 3]
    missed = missed_row.unsqueeze(-1) + missed_column.unsqueeze(-2) - corner
    return rows.mean(-1, keepdim=True) - missed.flatten(-2)


def ungroup(x: Tensor) -> Tensor:
    """View x [b, F, d, ...] as [b, c, ...], in any memory format."""
    # To flatten with d = 1, torch.export would guard on the sizes of images.
    return x.squeeze(2) if x.shape[2] == 1 else x.flatten(1, 2)


def weigh_channels(x: Tensor, weights: Tensor) -> Tensor:
    """Compute t weighted sums over the d channels of each group.

    Args:
        x: The features, [b, F, d, ...].
        weights: The weights [..., t, d], broadcast over b and F.

    Returns:
        The sums, [b, F, t, ...].
    """
    return torch.matmul(weights, x.flatten(3)).unflatten(3, x.shape[3:])


def correlate(x: Tensor, kernel: Tensor, plain: bool) -> Tensor:
    """Correlate each group, padded with zeros, with one 3x3 kernel that has one output channel.

    Args:
        x: The features, [b, F, d, h, w].
        kernel: The kernel, [d, 9].
        plain: As in `fine_maps`.

    Returns:
        The result, [b, F, h, w].
    """
    if not plain:
        return _sum_over_offsets(x, kernel)
    groups = x.shape[1]
    weight = kernel.view(1, -1, 3, 3).expand(groups, -1, -1, -1)
    return F.conv2d(ungroup(x), weight, padding=1, groups=groups)


@torch.jit.unused
def _sum_over_offsets(x: Tensor, kernel: Tensor) -> Tensor:
    h, w = x.shape[3], x.shape[4]
    if torch.compiler.is_compiling():
        images = torch.stack([(x * kernel[:, k, None, None]).sum(2) for k in range(9)], 2)
        padded = F.pad(images, [1, 1, 1, 1])
        moved = [padded[:, :, k, k // 3 : k // 3 + h, k % 3 : k % 3 + w] for k in range(9)]
        return sum(moved[1:], moved[0])
    # One matrix product gives the images of the nine kernel offsets, which then move and add up.
    images = weigh_channels(x, kernel.t())  # [b, F, 9, h, w]
    # They move as flat images, so the values that would wrap around into another row are zeroed.
    grid = images.unflatten(2, [3, 3])
    grid[:, :, :, 0, :, -1] = 0
    grid[:, :, :, 2, :, 0] = 0
    flat = images.flatten(3)
    total = flat[:, :, 4]
    for k in range(9):
        offset = (k // 3 - 1) * w + k % 3 - 1
        if offset > 0:
            total[..., :-offset] += flat[:, :, k, offset:]
        elif offset < 0:
            total[..., -offset:] += flat[:, :, k, :offset]
    return total.unflatten(2, [h, w])
