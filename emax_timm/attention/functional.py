"""EMAX's attention maps as pure functions of the input and the parameters.

Everything here is exact: the shortcuts are identities, proved in `docs/emax.md`. Together they
need one pass over the finest groups whatever the number of candidate group counts, and no
d-to-d 3x3 convolution.

Dimension letters: b batch, c channels, h w height and width, F finest group count, d = c / F
channels of a fine group, K candidate group counts.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["EMAXMaps", "ema_map", "emax_maps"]


class EMAXMaps(NamedTuple):
    """What an EMAX layer attends to, in float32 (float64 for float64 inputs).

    A part that is switched off holds the constant it contributes: channel 0, global 1.
    """

    spatial: Tensor
    """Spatial attention S in (0, 1), [b, F, h, w]."""
    channel: Tensor
    """Channel attention w_c in (0, 1), [b, c]."""
    global_: Tensor
    """Global attention w_g in (0, 1), [b, c]."""
    group_probs: Tensor
    """Noise-free probabilities of the candidate group counts, [b, K]."""
    group_count: Tensor
    """The most probable candidate, [b], int64."""


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


def fine_maps(
    x: Tensor,
    conv1x1_weight: Tensor,
    conv1x1_bias: Tensor,
    conv3x3_weight: Tensor,
    conv3x3_bias: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two cross-spatial terms at the finest grouping, and what coarser ones need of them.

    Args:
        x: [b, F, d, h, w].

    Returns:
        `mean` of x over the image [b, F, d]; the terms `first` and `second`, [b, F, h, w], whose
        sum is EMA's map before its sigmoid; `score` [b, F], the log of the weight that a fine
        group's second term has in a coarser group.
    """
    groups = x.shape[1]
    rows, columns = x.mean(4), x.mean(3)  # [b, F, d, h], [b, F, d, w]
    mean = rows.mean(3)  # [b, F, d]

    mixing, shift = conv1x1_weight.flatten(1), conv1x1_bias.unsqueeze(-1)  # [d, d], [d, 1]
    gate_h = torch.sigmoid(torch.matmul(mixing, rows) + shift)  # [b, F, d, h]
    gate_w = torch.sigmoid(torch.matmul(mixing, columns) + shift)  # [b, F, d, w]
    gated = x * (gate_h.unsqueeze(-1) * gate_w.unsqueeze(-2))  # [b, F, d, h, w]
    # Centred first: E[u^2] - E[u]^2 would lose the variance of features with a large mean.
    centred = gated - gated.mean(dim=(3, 4), keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(dim=(3, 4)) + eps)  # [b, F, d]

    # gn has one channel per group, so the mean of its output is gn_bias whatever the input: the
    # first softmax is a constant, and its product with conv3x3(x) a one-channel convolution.
    constant = torch.softmax(gn_bias, dim=0)  # [d]
    kernel = torch.matmul(constant, conv3x3_weight.flatten(1)).view(1, -1, 3, 3)  # [1, d, 3, 3]
    offset = torch.dot(constant, conv3x3_bias)
    first = F.conv2d(x.flatten(1, 2), kernel.expand(groups, -1, -1, -1), padding=1, groups=groups)

    # The second softmax is over the spatial means of conv3x3(x), which are linear in x's.
    means = F.linear(
        border_means(x, rows, columns).flatten(2),  # [b, F, d * 9]
        conv3x3_weight.flatten(1),
        conv3x3_bias,
    )  # [b, F, d]
    weights = torch.softmax(means, dim=-1)
    scale = (weights * gn_weight * rstd).unsqueeze(-1).unsqueeze(-1)  # [b, F, d, 1, 1]
    second = (scale * centred).sum(2) + torch.matmul(weights, gn_bias).unsqueeze(-1).unsqueeze(-1)
    return mean, first + offset, second, torch.logsumexp(means, dim=-1)


def choose_groups(logits: Tensor, temperature: Tensor, sample: bool, batch_vote: bool) -> Tensor:
    """One-hot choice of a candidate, by argmax, with the gradient of a softmax.

    Straight-through Gumbel-softmax (arXiv 1611.01144) where `sample`, else without the noise.
    Ties take the first candidate, the smallest count.

    Args:
        logits: [b, K].
        temperature: Scalar tensor, > 0.
        sample: Add Gumbel noise.
        batch_vote: Every sample takes the batch's most frequent choice.

    Returns:
        [b, K].
    """
    if sample:
        # Exponential(1) samples can round to 0, whose logarithm is infinite.
        noise = torch.empty_like(logits).exponential_().clamp(min=1e-30)
        logits = logits - noise.log()
    soft = torch.softmax(logits / temperature, dim=-1)
    hard = F.one_hot(soft.argmax(dim=-1), soft.shape[1]).to(soft.dtype)
    if batch_vote:
        winner = hard.sum(0).argmax(dim=-1, keepdim=True)  # [1]
        hard = F.one_hot(winner, soft.shape[1]).to(soft.dtype).expand_as(soft)
    return hard + (soft - soft.detach())


def mix_groups(
    first: Tensor,
    second: Tensor,
    score: Tensor,
    choice: Tensor,
    same_group: Tensor,
    warmup: Tensor,
) -> Tensor:
    """The map of a mixture over candidate group counts, from the fine maps alone.

    A coarse group's terms are convex combinations of those of its fine groups: equal weights for
    the first, softmax(score) within the group for the second. So a mixture over candidates is a
    row-stochastic matrix on the fine maps.

    Args:
        first, second: Cross-spatial terms at the finest grouping, [b, F, h, w].
        score: [b, F].
        choice: Weights of the candidates, [b, K].
        same_group: Whether two fine groups share a group of candidate k, bool [K, F, F].
        warmup: Scalar tensor in [0, 1]; 0 is the finest grouping whatever `choice` says.

    Returns:
        [b, F, h, w].
    """
    # A third is no float32 number, nor is 1 - 0.1f: float64 inputs need float64 quotients.
    equal = same_group.to(score.dtype)
    equal = equal / equal.sum(-1, keepdim=True)  # [K, F, F]
    warmup = warmup.to(score.dtype)
    # A softmax per row, hence normalised by the maximum of its group: one maximum for all would
    # underflow to 0 / 0 in groups far below it.
    scores = score[:, None, None, :].masked_fill(~same_group, float("-inf"))  # [b, K, F, F]
    finest = torch.eye(first.shape[1], device=score.device, dtype=score.dtype)
    rest = (1 - warmup) * finest
    choice = warmup * choice
    mix_first = rest + torch.matmul(choice, equal.flatten(1)).view_as(scores[:, 0])
    mix_second = rest + (choice[:, :, None, None] * torch.softmax(scores, dim=-1)).sum(1)
    mixed = torch.matmul(mix_first, first.flatten(2)) + torch.matmul(mix_second, second.flatten(2))
    return mixed.view_as(first)


def squeeze_excite(mean: Tensor, weights: list[Tensor]) -> Tensor:
    """Squeeze-and-excitation's gate (arXiv 1709.01507): [b, c] means to [b, c] in (0, 1).

    Args:
        weights: Weight and bias of the reducing, then of the expanding 1x1 convolution.
    """
    hidden = torch.relu(F.linear(mean, weights[0].flatten(1), weights[1]))
    return torch.sigmoid(F.linear(hidden, weights[2].flatten(1), weights[3]))


def _outside_autocast(function: Callable) -> Callable:
    """Keep autocast from turning the matrix products of `function(x, ...)` into half precision.

    TorchScript compiles the undecorated function and cannot leave autocast: there the products
    are half precision.
    """

    @wraps(function)
    def wrapper(x: Tensor, *args, **kwargs):
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):  # which meta tensors have none of
            with torch.autocast(kind, enabled=False):
                return function(x, *args, **kwargs)
        return function(x, *args, **kwargs)

    return wrapper


def _as(tensors: list[Tensor], like: Tensor) -> list[Tensor]:
    return [tensor.to(like.dtype) for tensor in tensors]


@_outside_autocast
def ema_map(x: Tensor, spatial_weights: list[Tensor], eps: float) -> Tensor:
    """EMA's spatial attention in (0, 1): [b, c, h, w] to [b, F, h, w].

    Args:
        x: [b, c, h, w], computed with in float32 if it is half precision.
        spatial_weights, eps: As in `emax_maps`.
    """
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        x = x.float()
    spatial = _as(spatial_weights, x)
    groups = x.shape[1] // spatial[1].shape[0]
    _, first, second, _ = fine_maps(
        x.unflatten(1, [groups, -1]),
        spatial[0],
        spatial[1],
        spatial[2],
        spatial[3],
        spatial[4],
        spatial[5],
        eps,
    )
    return torch.sigmoid(first + second)


@_outside_autocast
def emax_maps(
    x: Tensor,
    group_counts: Tensor,
    same_group: Tensor | None,
    warmup: Tensor,
    temperature: Tensor,
    spatial_weights: list[Tensor],
    eps: float,
    controller_weights: list[Tensor],
    channel_weights: list[Tensor],
    gamma: Tensor | None,
    global_weights: list[Tensor],
    sample: bool,
    batch_vote: bool,
) -> EMAXMaps:
    """All attention maps of an EMAX layer; an empty list of weights leaves that part out.

    Args:
        x: [b, c, h, w], computed with in float32 if it is half precision.
        group_counts: Candidates, ascending, int64 [K].
        same_group: As in `mix_groups`; None where the finest count is the only candidate.
        warmup: Scalar tensor in [0, 1]: 0 groups as EMA does, 1 as the controller chooses.
        temperature: Scalar tensor, > 0.
        spatial_weights: Weight and bias of conv1x1 ([d, d, 1, 1], [d]), of conv3x3
            ([d, d, 3, 3], [d]) and of gn ([d], [d]).
        eps: Added to gn's variance.
        controller_weights: Weight [K, c] and bias [K]; empty where K = 1.
        channel_weights, global_weights: As in `squeeze_excite`.
        gamma: [1], or None without the channel gate.
        sample: Draw Gumbel noise for the choice of groups.
        batch_vote: As in `choose_groups`.
    """
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        x = x.float()
    spatial, controller = _as(spatial_weights, x), _as(controller_weights, x)
    channel_gate, global_gate = _as(channel_weights, x), _as(global_weights, x)
    groups = x.shape[1] // spatial[1].shape[0]
    grouped = x.unflatten(1, [groups, -1])  # [b, F, d, h, w], a view in any memory format

    mean, first, second, score = fine_maps(
        grouped, spatial[0], spatial[1], spatial[2], spatial[3], spatial[4], spatial[5], eps
    )
    mean = mean.flatten(1)  # [b, c]
    if len(controller) > 0:
        logits = F.linear(mean, controller[0], controller[1])  # [b, K]
        choice = choose_groups(logits, temperature, sample, batch_vote)
    else:
        logits = torch.zeros_like(mean[:, :1])
        choice = torch.ones_like(logits)
    if same_group is None:
        mixed = first + second
    else:
        mixed = mix_groups(first, second, score, choice, same_group, warmup)
    attention = torch.sigmoid(mixed)  # [b, F, h, w]

    # The mean of the fused features follows from that of X * S; they are never written.
    pixels = x.shape[2] * x.shape[3]
    fused = torch.matmul(grouped.flatten(3), attention.flatten(2).unsqueeze(-1)) / pixels
    fused = fused.flatten(1)  # [b, c]
    channel = torch.zeros_like(mean)
    if gamma is not None:
        channel = squeeze_excite(mean, channel_gate)
        fused = fused + gamma.to(x.dtype) * channel * mean
    global_ = torch.ones_like(mean)
    if len(global_gate) > 0:
        global_ = squeeze_excite(fused, global_gate)

    return EMAXMaps(
        spatial=attention,
        channel=channel,
        global_=global_,
        group_probs=torch.softmax(logits, dim=-1),
        group_count=group_counts[logits.argmax(dim=-1)],
    )
