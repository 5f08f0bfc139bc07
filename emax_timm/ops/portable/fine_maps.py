"""The one pass over x: pooled rows and columns, moments, and the two maps of each fine group."""

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
    """The two cross-spatial terms at the finest grouping, and what else depends on x alone."""

    mean: Tensor
    """Of x over the image, [b, F, d]."""
    first: Tensor
    """[b, F, h, w]; the sum of the two is EMA's map before its sigmoid."""
    second: Tensor
    """[b, F, h, w]."""
    conv_means: Tensor
    """Of conv3x3(x) over the image, [b, F, d]. Their softmax weighs the channels in `second`; their
    logsumexp is the score of a fine group's second term in a coarser group."""
    gated_mean: Tensor
    """Mean of the gated features less `shift`, [b, F, d]."""
    rstd: Tensor
    """1 / standard deviation of the gated features, [b, F, d]."""


def fine_maps(x: Tensor, weights: EMAXWeights, plain: bool) -> FineMaps:
    """The one pass over x that serves every group count.

    Args:
        x: [b, F, d, h, w].
        weights: In the dtype of x.
        plain: By operations that autograd, forward-mode and graph tracers can follow. Without,
            faster ones, some of which write into their results or have no second derivative.
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
        # One read of the features; but at 0 its second derivative is not finite.
        pixels = x.shape[3] * x.shape[4]
        square = torch.linalg.vector_norm(deviation, dim=(3, 4)).square() / pixels
    variance = (square - gated_mean.square()).clamp(min=0)
    rstd = torch.rsqrt(variance + weights.config.eps)  # [b, F, d]

    first = correlate(x, kernel, plain) + offset

    # The second softmax is over the spatial means of conv3x3(x), which are linear in x's.
    borders = border_means(x, rows, columns).flatten(2)  # [b, F, d * 9]
    conv_means = F.linear(borders, conv3x3, weights.conv3x3_bias)  # [b, F, d]
    softmax = torch.softmax(conv_means, dim=-1)
    scale = softmax * weights.gn_weight * rstd  # [b, F, d]
    level = torch.matmul(softmax, weights.gn_bias) - (scale * gated_mean).sum(-1)  # [b, F]
    second = weigh_channels(deviation, scale.unsqueeze(2)).squeeze(2)
    second = second + level.unsqueeze(-1).unsqueeze(-1)
    return FineMaps(mean, first, second, conv_means, gated_mean, rstd)


def _column_means(x: Tensor, plain: bool) -> Tensor:
    """Means over h of x [b, F, d, h, w]: [b, F, d, w]."""
    if not plain and _is_compiled_with_short_rows(x):
        # Two rows as one. For a sum over rows shorter than a vector the compiler starts all threads
        # anew for every channel: 6 of 8 ms at 1024 x 14 x 14.
        pairs = x.unflatten(3, [-1, 2]).flatten(4).mean(3)
        return pairs.unflatten(3, [2, -1]).mean(3)
    return x.mean(3)


@torch.jit.unused
def _is_compiled_with_short_rows(x: Tensor) -> bool:
    """Whether rows are shorter than a vector and even in number; false for sizes that vary."""
    if not torch.compiler.is_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(x.shape[4] < 16) and statically_known_true(x.shape[3] % 2 == 0)


def row_and_column_gates(
    x: Tensor, weights: EMAXWeights, plain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EMA's gates of pooled rows and columns.

    Args:
        x: [b, F, d, h, w].
        weights, plain: As in `fine_maps`.

    Returns:
        Means of x over w [b, F, d, h] and over h [b, F, d, w], and the gates in (0, 1) from each.
    """
    rows, columns = x.mean(4), _column_means(x, plain)
    gate_h = torch.sigmoid(_mix_channels(rows, weights, plain))
    gate_w = torch.sigmoid(_mix_channels(columns, weights, plain))
    return rows, columns, gate_h, gate_w


def _mix_channels(x: Tensor, weights: EMAXWeights, plain: bool) -> Tensor:
    """conv1x1 of x [b, F, d, n]."""
    if plain:
        # With a matrix product torch.export would guard on the sizes of images.
        weight = weights.conv1x1_weight.flatten(2)  # [d, d, 1]
        mixed = F.conv1d(x.flatten(0, 1), weight, weights.conv1x1_bias)
        return mixed.unflatten(0, [x.shape[0], x.shape[1]])
    return torch.matmul(weights.conv1x1_weight.flatten(1), x) + weights.conv1x1_bias.unsqueeze(-1)


def deviations(x: Tensor, mean: Tensor, gate_h: Tensor, gate_w: Tensor) -> Tensor:
    """The gated features less a constant per channel that is near their mean.

    Their moments do not cancel as E[u^2] - E[u]^2 would of features with a large mean.

    Args:
        x: [b, F, d, h, w].
        mean: Of x over the image, [b, F, d].
        gate_h, gate_w: [b, F, d, h] and [b, F, d, w].

    Returns:
        [b, F, d, h, w].
    """
    shift = (gate_h * (mean * gate_w.mean(3)).unsqueeze(-1)).mean(3)  # [b, F, d]
    gate = gate_h.unsqueeze(-1) * gate_w.unsqueeze(-2)
    return torch.addcmul(-shift.unsqueeze(-1).unsqueeze(-1), x, gate)


def border_means(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """What each offset of a zero-padded 3x3 kernel sees of `x`, averaged over the output positions.

    The kernel offset (dy, dx) sees all of `x` but the row and the column that the offset pushes
    out of the image; their common corner would be subtracted twice and is added back.

    Args:
        x: [b, F, d, h, w].
        rows: Means of x over w, [b, F, d, h].
        columns: Means of x over h, [b, F, d, w].

    Returns:
        [b, F, d, 9], offsets in row-major order, as in a flattened kernel.
    """
    h, w = x.shape[3], x.shape[4]
    # The upper offsets (dy = -1) miss the last row, the lower ones the first; likewise columns.
    # Padded rather than stacked: TorchScript's gradient of a stack can lose some of its inputs.
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
    """x [b, F, d, h, w] as [b, c, h, w], a view in any memory format."""
    # With d = 1, torch.export would guard on the sizes of images to flatten.
    return x.squeeze(2) if x.shape[2] == 1 else x.flatten(1, 2)


def weigh_channels(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over the channels of each group.

    Args:
        x: [b, F, d, h, w].
        weights: [..., t, d], broadcast over b and F.

    Returns:
        [b, F, t, h, w].
    """
    return torch.matmul(weights, x.flatten(3)).unflatten(3, x.shape[3:])


def correlate(x: Tensor, kernel: Tensor, plain: bool) -> Tensor:
    """Correlation of each group with the same zero-padded 3x3 kernel of one output channel.

    Args:
        x: [b, F, d, h, w].
        kernel: [d, 9].
        plain: As in `fine_maps`.

    Returns:
        [b, F, h, w].
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
    # One matrix product for the images of the nine offsets, which then need only be moved and
    # added.
    images = weigh_channels(x, kernel.t())  # [b, F, 9, h, w]
    # In flat images, without what would wrap around into the next row.
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
