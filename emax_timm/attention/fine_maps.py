"""The one pass over x: strips, taps and moments, and the two maps of each fine group from them.

Dimension letters as in `layer.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import exporting

__all__ = [
    "FineMaps",
    "border_means",
    "deviations",
    "fine_maps",
    "strip_gates",
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
    centre: Tensor
    """Mean of the gated features less `shift`, [b, F, d]."""
    rstd: Tensor
    """1 / standard deviation of the gated features, [b, F, d]."""


def fine_maps(x: Tensor, weights: list[Tensor], eps: float) -> FineMaps:
    """The one pass over x that serves every group count.

    Args:
        x: [b, F, d, h, w].
        weights, eps: `spatial` and `eps` of `Layer`.
    """
    conv3x3_weight, conv3x3_bias = weights[2], weights[3]
    gn_weight, gn_bias = weights[4], weights[5]
    # gn has one channel per group, so the mean of its output is gn_bias whatever the input: the
    # first softmax is a constant, and its product with conv3x3(x) a one-channel convolution.
    constant = torch.softmax(gn_bias, dim=0)  # [d]
    kernel = torch.matmul(constant, conv3x3_weight.flatten(1)).view(-1, 9)  # [d, 9]
    offset = torch.dot(constant, conv3x3_bias)
    rows, columns, gate_h, gate_w = strip_gates(x, weights[0], weights[1])
    mean = columns.mean(3)  # [b, F, d]
    deviation = deviations(x, mean, gate_h, gate_w)
    centre = deviation.mean(dim=(3, 4))
    pixels = x.shape[3] * x.shape[4]
    square = torch.linalg.vector_norm(deviation, dim=(3, 4)).square() / pixels
    rstd = torch.rsqrt((square - centre.square()).clamp(min=0) + eps)  # [b, F, d]

    first = correlate(x, kernel) + offset

    # The second softmax is over the spatial means of conv3x3(x), which are linear in x's.
    conv_means = F.linear(
        border_means(x, rows, columns).flatten(2),  # [b, F, d * 9]
        conv3x3_weight.flatten(1),
        conv3x3_bias,
    )  # [b, F, d]
    softmax = torch.softmax(conv_means, dim=-1)
    scale = softmax * gn_weight * rstd  # [b, F, d]
    level = torch.matmul(softmax, gn_bias) - (scale * centre).sum(-1)  # [b, F]
    second = weigh_channels(deviation, scale.unsqueeze(2)).squeeze(2)
    return FineMaps(
        mean, first, second + level.unsqueeze(-1).unsqueeze(-1), conv_means, centre, rstd
    )


def column_means(x: Tensor) -> Tensor:
    """Means over h of x [b, F, d, h, w]: [b, F, d, w]."""
    if torch.jit.is_scripting():
        return x.mean(3)
    if torch.compiler.is_compiling() and not exporting() and _has_short_rows(x):
        # Two rows as one. For a sum over rows shorter than a vector the compiler starts all threads
        # anew for every channel: 6 of 8 ms at 1024 x 14 x 14.
        pairs = x.unflatten(3, [-1, 2]).flatten(4).mean(3)
        return pairs.unflatten(3, [2, -1]).mean(3)
    return x.mean(3)


def _has_short_rows(x: Tensor) -> bool:
    """Whether rows are shorter than a vector and even in number; false for sizes that vary."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return statically_known_true(x.shape[4] < 16) and statically_known_true(x.shape[3] % 2 == 0)


def strip_gates(
    x: Tensor, conv1x1_weight: Tensor, conv1x1_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """EMA's gates of rows and columns.

    Args:
        x: [b, F, d, h, w].

    Returns:
        Means of x over w [b, F, d, h] and over h [b, F, d, w], and the gates in (0, 1) from each.
    """
    rows, columns = x.mean(4), column_means(x)
    mixing, shift = conv1x1_weight.flatten(1), conv1x1_bias.unsqueeze(-1)  # [d, d], [d, 1]
    gate_h = torch.sigmoid(torch.matmul(mixing, rows) + shift)
    gate_w = torch.sigmoid(torch.matmul(mixing, columns) + shift)
    return rows, columns, gate_h, gate_w


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
    """What each tap of a zero-padded 3x3 kernel sees of `x`, averaged over the output positions.

    The tap at offset (dy, dx) sees all of `x` but the row and the column that the offset pushes
    out of the image; their common corner would be subtracted twice and is added back.

    Args:
        x: [b, F, d, h, w].
        rows: Means of x over w, [b, F, d, h].
        columns: Means of x over h, [b, F, d, w].

    Returns:
        [b, F, d, 9], taps in row-major order, as in a flattened kernel.
    """
    h, w = x.shape[3], x.shape[4]
    # The upper taps (dy = -1) miss the last row, the lower ones the first; likewise the columns.
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


def weigh_channels(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over the channels of each group.

    Args:
        x: [b, F, d, h, w].
        weights: [..., t, d], broadcast over b and F.

    Returns:
        [b, F, t, h, w].
    """
    return torch.matmul(weights, x.flatten(3)).unflatten(3, x.shape[3:])


def correlate(x: Tensor, kernel: Tensor) -> Tensor:
    """Correlation of each group with the same zero-padded 3x3 kernel of one output channel.

    Args:
        x: [b, F, d, h, w].
        kernel: [d, 9].

    Returns:
        [b, F, h, w].
    """
    if torch.jit.is_scripting():
        return _conv2d(x, kernel)
    if torch.is_grad_enabled() or exporting():
        return _conv2d(x, kernel)
    return _sum_of_taps(x, kernel)


def _conv2d(x: Tensor, kernel: Tensor) -> Tensor:
    groups = x.shape[1]
    weight = kernel.view(1, -1, 3, 3).expand(groups, -1, -1, -1)
    return F.conv2d(x.flatten(1, 2), weight, padding=1, groups=groups)


def _sum_of_taps(x: Tensor, kernel: Tensor) -> Tensor:
    h, w = x.shape[3], x.shape[4]
    if torch.compiler.is_compiling():
        taps = torch.stack([(x * kernel[:, t, None, None]).sum(2) for t in range(9)], 2)
        padded = F.pad(taps, [1, 1, 1, 1])
        moved = [padded[:, :, t, t // 3 : t // 3 + h, t % 3 : t % 3 + w] for t in range(9)]
        return sum(moved[1:], moved[0])
    # One matrix product for the images of the nine taps, which then need only be moved and added.
    taps = weigh_channels(x, kernel.t())  # [b, F, 9, h, w]
    # In flat images, without what would wrap around into the next row.
    grid = taps.unflatten(2, [3, 3])
    grid[:, :, :, 0, :, -1] = 0
    grid[:, :, :, 2, :, 0] = 0
    flat = taps.flatten(3)
    total = flat[:, :, 4]
    for tap in range(9):
        offset = (tap // 3 - 1) * w + tap % 3 - 1
        if offset > 0:
            total[..., :-offset] += flat[:, :, tap, offset:]
        elif offset < 0:
            total[..., -offset:] += flat[:, :, tap, :offset]
    return total.unflatten(2, [h, w])
