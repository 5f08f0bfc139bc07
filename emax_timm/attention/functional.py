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

from ..kernels import exporting

__all__ = ["EMAXMaps", "Layer", "emax_maps", "emax_plain"]


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


class Layer(NamedTuple):
    """The parameters and constants of a layer; an empty list is a part that it does not have."""

    groups: int
    """F."""
    batch_vote: bool
    """As in `choose_groups`."""
    eps: float
    """Added to gn's variance."""
    grouping: list[Tensor]
    """What `mix_groups` and `choose_groups` take: same_group, warmup and temperature. Empty where
    the finest count is the only candidate."""
    spatial: list[Tensor]
    """Weight and bias of conv1x1 ([d, d, 1, 1], [d]), of conv3x3 ([d, d, 3, 3], [d]) and of gn
    ([d], [d])."""
    controller: list[Tensor]
    """Weight [K, c] and bias [K]."""
    channel: list[Tensor]
    """As in `squeeze_excite`."""
    gamma: list[Tensor]
    """[1]; with the channel gate."""
    global_: list[Tensor]
    """As in `squeeze_excite`."""
    residual_gate: list[Tensor]
    """alpha, [c]; without it alpha is 1."""


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


def weigh_channels(x: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums over the channels of each group.

    Args:
        x: [b, F, d, h, w].
        weights: [..., t, d], broadcast over b and F.

    Returns:
        [b, F, t, h, w].
    """
    return torch.matmul(weights, x.flatten(3)).unflatten(3, x.shape[3:])


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


def choose_groups(
    logits: Tensor, temperature: Tensor, noise: Tensor | None, batch_vote: bool
) -> tuple[Tensor, Tensor]:
    """One-hot choice of a candidate, by argmax, with the gradient of a softmax.

    Straight-through Gumbel-softmax (arXiv 1611.01144); without noise, a straight-through softmax.
    Ties take the first candidate, the smallest count.

    Args:
        logits: [b, K].
        temperature: Scalar tensor, > 0.
        noise: Gumbel noise, [b, K], or None.
        batch_vote: Every sample takes the batch's most frequent choice.

    Returns:
        The choice and the softmax, [b, K] each.
    """
    if noise is not None:
        logits = logits + noise
    soft = torch.softmax(logits / temperature, dim=-1)
    candidates = torch.arange(soft.shape[1], device=soft.device)
    hard = (candidates == soft.argmax(dim=-1, keepdim=True)).to(soft.dtype)
    if batch_vote:
        hard = (candidates == hard.sum(0).argmax()).to(soft.dtype).expand_as(soft)
    return hard + (soft - soft.detach()), soft


class GroupChoice(NamedTuple):
    """How much of each candidate group count a sample takes, [b, K] each."""

    logits: Tensor
    soft: Tensor
    """softmax((logits + noise) / temperature)."""
    choice: Tensor
    """One-hot."""


def controlled_choice(mean: Tensor, layer: Layer, noise: Tensor | None) -> GroupChoice:
    """The controller's choice of a candidate from the means of x, [b, c]."""
    if len(layer.controller) == 0:
        nothing = torch.zeros_like(mean[:, :1])
        return GroupChoice(nothing, nothing + 1, nothing + 1)
    logits = F.linear(mean, layer.controller[0], layer.controller[1])
    choice, soft = choose_groups(logits, layer.grouping[2], noise, layer.batch_vote)
    return GroupChoice(logits, soft, choice)


def gumbel_noise(like: Tensor) -> Tensor:
    """Samples of Gumbel(0, 1) in the shape and dtype of a tensor."""
    # Exponential(1) samples can round to 0, whose logarithm is infinite.
    return -torch.empty_like(like).exponential_().clamp(min=1e-30).log()


class Mixing(NamedTuple):
    """A mixture over candidate group counts, as it acts on the fine maps."""

    first: Tensor
    """Row-stochastic matrix on the first terms, [b, F, F]."""
    second: Tensor
    """Row-stochastic matrix on the second terms, [b, F, F]."""
    equal: Tensor
    """First matrix of each candidate, [K, F, F]."""
    weighted: Tensor
    """Second matrix of each candidate, [b, K, F, F]."""


def mix_groups(score: Tensor, choice: Tensor, same_group: Tensor, warmup: Tensor) -> Mixing:
    """How the maps of a mixture over candidate group counts follow from the fine maps.

    A coarse group's terms are convex combinations of those of its fine groups: equal weights for
    the first, softmax(score) within the group for the second. So a mixture over candidates is a
    row-stochastic matrix on the fine maps.

    Args:
        score: [b, F].
        choice: Weights of the candidates, [b, K].
        same_group: Whether two fine groups share a group of candidate k, bool [K, F, F].
        warmup: Scalar tensor in [0, 1]; 0 is the finest grouping whatever `choice` says.
    """
    # A third is no float32 number, nor is 1 - 0.1f: float64 inputs need float64 quotients.
    equal = same_group.to(score.dtype)
    equal = equal / equal.sum(-1, keepdim=True)  # [K, F, F]
    warmup = warmup.to(score.dtype)
    # A softmax per row, hence normalised by the maximum of its group: one maximum for all would
    # underflow to 0 / 0 in groups far below it.
    scores = score[:, None, None, :].masked_fill(~same_group, float("-inf"))  # [b, K, F, F]
    weighted = torch.softmax(scores, dim=-1)
    rest = (1 - warmup) * torch.eye(score.shape[1], device=score.device, dtype=score.dtype)
    choice = warmup * choice
    first = rest + torch.matmul(choice, equal.flatten(1)).view_as(scores[:, 0])
    second = rest + (choice[:, :, None, None] * weighted).sum(1)
    return Mixing(first, second, equal, weighted)


def squeeze_excite(mean: Tensor, weights: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Squeeze-and-excitation's gate (arXiv 1709.01507).

    Args:
        mean: [b, c].
        weights: Weight and bias of the reducing, then of the expanding 1x1 convolution.

    Returns:
        The gate in (0, 1), [b, c], and the hidden units that it is made from.
    """
    hidden = torch.relu(F.linear(mean, weights[0].flatten(1), weights[1]))
    return torch.sigmoid(F.linear(hidden, weights[2].flatten(1), weights[3])), hidden


def spatial_attention(fine: FineMaps, choice: Tensor, grouping: list[Tensor]) -> Tensor:
    """Spatial attention S in (0, 1), [b, F, h, w], of a mixture over candidates.

    Args:
        choice: Weights of the candidates, [b, K].
        grouping: As in `Layer`.
    """
    if len(grouping) == 0:
        return torch.sigmoid(fine.first + fine.second)
    mixing = mix_groups(torch.logsumexp(fine.conv_means, dim=-1), choice, grouping[0], grouping[1])
    mixed = torch.matmul(mixing.first, fine.first.flatten(2))
    mixed = mixed + torch.matmul(mixing.second, fine.second.flatten(2))
    return torch.sigmoid(mixed).view_as(fine.first)


class MeanGates(NamedTuple):
    """Gates from the means of x and of x * S."""

    channel: Tensor
    """w_c, [b, c]; 0 without the channel gate."""
    channel_hidden: Tensor
    """Its hidden units."""
    fused: Tensor
    """Mean of the fused features, [b, c]."""
    global_: Tensor
    """w_g, [b, c]; 1 without the global gate."""
    global_hidden: Tensor
    """Its hidden units."""


def mean_gates(
    mean: Tensor,
    pooled: Tensor,
    channel_weights: list[Tensor],
    gamma: list[Tensor],
    global_weights: list[Tensor],
) -> MeanGates:
    """Channel and global attention, from the means of x and of x * S, [b, c] each."""
    channel = torch.zeros_like(mean)
    global_ = torch.ones_like(mean)
    channel_hidden, global_hidden = channel, global_
    fused = pooled
    if len(gamma) > 0:
        channel, channel_hidden = squeeze_excite(mean, channel_weights)
        # The mean of the fused features follows from these two; they are never written.
        fused = fused + gamma[0] * channel * mean
    if len(global_weights) > 0:
        global_, global_hidden = squeeze_excite(fused, global_weights)
    return MeanGates(channel, channel_hidden, fused, global_, global_hidden)


def output_scale(
    gates: MeanGates, gamma: list[Tensor], residual_gate: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Scale and offset, [b, c] each, of the factor scale * S + offset on x.

    x + alpha * (x * (S + gamma * w_c) * w_g - x) is one factor on x: x is read once, and alpha = 0
    gives a factor of exactly 1.
    """
    scale, offset = gates.global_, torch.zeros_like(gates.global_)
    if len(residual_gate) > 0:
        scale = residual_gate[0] * gates.global_
        offset = (1 - residual_gate[0]).expand_as(scale)
    if len(gamma) > 0:
        offset = offset + scale * gamma[0] * gates.channel
    return scale, offset


def output_factor(scale: Tensor, offset: Tensor, spatial: Tensor) -> Tensor:
    """scale * S + offset, [b, F, d, h, w], of [b, F, d] twice and [b, F, h, w]."""
    return torch.addcmul(
        offset.unsqueeze(-1).unsqueeze(-1), scale.unsqueeze(-1).unsqueeze(-1), spatial.unsqueeze(2)
    )


def outside_autocast(function: Callable) -> Callable:
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


def prepare(x: Tensor, layer: Layer) -> tuple[Tensor, Layer]:
    """What the functions here compute with: x [b, c, h, w] as [b, F, d, h, w] and the parameters.

    In float32 if x is half precision.
    """
    half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
    dtype = torch.float32 if half else x.dtype
    x = x.to(dtype)
    cast = Layer(
        layer.groups,
        layer.batch_vote,
        layer.eps,
        layer.grouping,
        _cast(layer.spatial, dtype),
        _cast(layer.controller, dtype),
        _cast(layer.channel, dtype),
        _cast(layer.gamma, dtype),
        _cast(layer.global_, dtype),
        _cast(layer.residual_gate, dtype),
    )
    return x.unflatten(1, [layer.groups, -1]), cast  # a view in any memory format


def _cast(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [tensor.to(dtype) for tensor in tensors]


class Attended(NamedTuple):
    """All that a layer computes of x but the output."""

    fine: FineMaps
    groups: GroupChoice
    spatial: Tensor
    """S, [b, F, h, w]."""
    pooled: Tensor
    """Mean of x * S over the image, [b, F, d]; of x without the global gate."""
    gates: MeanGates


def pool_attended(x: Tensor, spatial: Tensor) -> Tensor:
    """Means over the image of x [b, F, d, h, w] times S [b, F, h, w]: [b, F, d]."""
    products = torch.matmul(x.flatten(3), spatial.flatten(2).unsqueeze(-1))
    return products.squeeze(-1) / (x.shape[3] * x.shape[4])


def attend(x: Tensor, layer: Layer, noise: Tensor | None) -> Attended:
    """Compute the attention of x.

    Args:
        x, layer: As `prepare` returns them.
        noise: As in `choose_groups`.
    """
    fine = fine_maps(x, layer.spatial, layer.eps)
    mean = fine.mean.flatten(1)  # [b, c]
    groups = controlled_choice(mean, layer, noise)
    spatial = spatial_attention(fine, groups.choice, layer.grouping)
    pooled = fine.mean
    if len(layer.global_) > 0:
        pooled = pool_attended(x, spatial)
    gates = mean_gates(mean, pooled.flatten(1), layer.channel, layer.gamma, layer.global_)
    return Attended(fine, groups, spatial, pooled, gates)


def apply_attention(x: Tensor, layer: Layer, attended: Attended) -> Tensor:
    """The output of a layer, [b, c, h, w], in the dtype and memory format of x [b, F, d, h, w]."""
    scale, offset = output_scale(attended.gates, layer.gamma, layer.residual_gate)
    scale, offset = scale.view_as(attended.fine.mean), offset.view_as(attended.fine.mean)
    # x comes first: its memory format is the product's. The product has four dimensions: of a view
    # of five the compiler would make a copy for channels_last.
    return x.flatten(1, 2) * output_factor(scale, offset, attended.spatial).flatten(1, 2)


def draw_noise(x: Tensor, layer: Layer, sample: bool) -> Tensor | None:
    """Gumbel noise for the choice of groups, [b, K], if there is to be any."""
    if not sample or len(layer.controller) == 0:
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return gumbel_noise(x.new_empty([x.shape[0], layer.controller[1].shape[0]], dtype=dtype))


@outside_autocast
def emax_maps(x: Tensor, layer: Layer, group_counts: Tensor, sample: bool) -> EMAXMaps:
    """The attention maps of a layer.

    Args:
        x: [b, c, h, w].
        group_counts: Candidates, ascending, int64 [K].
        sample: Draw noise for the choice of groups.
    """
    noise = draw_noise(x, layer, sample)
    x, layer = prepare(x, layer)
    attended = attend(x, layer, noise)
    logits = attended.groups.logits
    return EMAXMaps(
        spatial=attended.spatial,
        channel=attended.gates.channel,
        global_=attended.gates.global_,
        group_probs=torch.softmax(logits, dim=-1),
        group_count=group_counts[logits.argmax(dim=-1)],
    )


@outside_autocast
def emax_plain(x: Tensor, layer: Layer, noise: Tensor | None) -> Tensor:
    """Apply a layer to x [b, c, h, w], keeping layout and dtype; autograd sees each operation."""
    grouped, layer = prepare(x, layer)
    out = apply_attention(grouped, layer, attend(grouped, layer, noise))
    return out.to(x.dtype)
