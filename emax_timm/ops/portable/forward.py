"""The forward pass of a layer, in the order in which it is computed.

It goes from x to the fine maps of the finest groups, the choice of a group count, the spatial
attention S, the gates and the output. `docs/emax.md` proves the shortcuts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import EMAXConfig, EMAXMaps, EMAXWeights, in_dtype, present
from .fine_maps import FineMaps, fine_maps, ungroup
from .fine_maps_nd import fine_maps_nd, mean_of_sum

__all__ = [
    "Attended",
    "Gates",
    "GroupChoice",
    "Mixing",
    "attend_again",
    "choose_groups",
    "emax_plain",
    "forward",
    "maps_plain",
    "mix_groups",
    "output_factor",
    "prepare",
    "score_groups",
    "squeeze_excite",
]


class GroupChoice(NamedTuple):
    """The choice of a group count by each sample, as weights of the candidates, [b, K] each."""

    logits: Tensor
    """The output of the group controller."""
    soft: Tensor
    """The softmax of (logits + noise) / temperature."""
    choice: Tensor
    """One-hot rows with the gradient of `soft`."""


class Mixing(NamedTuple):
    """The matrices that make the maps of a mixture over group counts from the fine maps."""

    first: Tensor
    """The row-stochastic matrix on the first terms, [b, F, F]."""
    second: Tensor
    """The row-stochastic matrix on the second terms, [b, F, F]."""
    equal: Tensor
    """The first matrix of each candidate, [K, F, F]."""
    weighted: Tensor
    """The second matrix of each candidate, [b, K, F, F]."""


class Gates(NamedTuple):
    """The gates from the means of x and of x * S, [b, c] each; hidden units are [b, r]."""

    channel: Tensor
    """The channel attention w_c; 0 without the channel gate."""
    channel_hidden: Tensor
    fused: Tensor
    """The mean over the image of the fused features Y_f."""
    global_: Tensor
    """The global attention w_g; 1 without the global gate."""
    global_hidden: Tensor
    scale: Tensor
    """The output is x * (scale * S + offset)."""
    offset: Tensor


class Attended(NamedTuple):
    """Everything that a layer computes from x except the output."""

    fine: FineMaps
    groups: GroupChoice
    spatial: Tensor
    """The spatial attention S, [b, F, h, w]."""
    pooled: Tensor
    """The mean over the image of x * S, [b, F, d]; that of x without the global gate."""
    gates: Gates


# Entry points ------------------------------------------------------------------------------------


def forward(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, keep: bool, mask: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Run the forward pass; it saves the fine maps and, with a global gate, `pooled`.

    For sequences and videos it saves nothing, because the backward pass starts from x.
    """
    if x.dim() != 4:
        return emax_plain(x, weights, noise, mask), []
    grouped, cast = prepare(x, weights)
    attended = _attend(grouped, cast, noise, False, None)
    out = _apply_attention(grouped, attended).to(x.dtype)
    saved = []
    if keep:
        # torch.compile refuses to save the same tensor twice.
        pooled = [] if weights.global_reduce_weight is None else [attended.pooled]
        saved = [*attended.fine, *pooled]
    return out, saved


def emax_plain(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, mask: Tensor | None = None
) -> Tensor:
    """Apply a layer to x [b, c, ...] by operations that autograd and graph tracers can follow.

    Args:
        x: The input: sequences [b, c, l], images [b, c, h, w] or videos [b, c, t, h, w].
        weights: The constants and tensors of the layer.
        noise: The noise for the choice of group counts, [b, K], or None.
        mask: Where sequences have tokens, [b, l], or None. The rest of x is returned as it is.
    """
    length = x.shape[2]
    x, mask = _with_a_position(x, mask)
    grouped, cast = prepare(_tokens(x, mask), weights)
    out = _apply_attention(grouped, _attend(grouped, cast, noise, True, mask)).to(x.dtype)
    return out if mask is None else torch.where(mask.unsqueeze(1), out, x)[:, :, :length]


def maps_plain(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, mask: Tensor | None = None
) -> EMAXMaps:
    """Compute the attention maps of a layer; the arguments are those of `emax_plain`."""
    length = x.shape[2]
    x, mask = _with_a_position(x, mask)
    grouped, cast = prepare(_tokens(x, mask), weights)
    attended = _attend(grouped, cast, noise, True, mask)
    spatial = attended.spatial
    if mask is not None:
        spatial = _tokens(spatial, mask)[:, :, :length]
    logits = attended.groups.logits
    candidates = torch.tensor(weights.config.candidates, device=x.device)
    return EMAXMaps(
        spatial=spatial,
        channel=attended.gates.channel,
        global_=attended.gates.global_,
        group_probs=torch.softmax(logits, dim=-1),
        group_count=candidates[logits.argmax(dim=-1)],
    )


def _with_a_position(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Give sequences of no length one position without a token; other inputs stay as they are."""
    if x.dim() == 3 and x.shape[2] == 0:
        return F.pad(x, [0, 1]), torch.zeros([x.shape[0], 1], dtype=torch.bool, device=x.device)
    return x, mask


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Set x [b, any, l] to 0 where the mask [b, l] has no token, whatever stands there."""
    return x if mask is None else torch.where(mask.unsqueeze(1), x, torch.zeros_like(x))


def prepare(x: Tensor, weights: EMAXWeights) -> tuple[Tensor, EMAXWeights]:
    """Prepare x [b, c, ...] as [b, F, d, ...], and the weights, in the dtype to compute in.

    That is float32 if x is in half precision, and else the dtype of x.
    """
    half = x.dtype == torch.float16 or x.dtype == torch.bfloat16
    dtype = torch.float32 if half else x.dtype
    # This is a view in any memory format.
    return x.to(dtype).unflatten(1, [weights.config.groups, -1]), in_dtype(weights, dtype)


def _attend(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, plain: bool, mask: Tensor | None
) -> Attended:
    fine = fine_maps(x, weights, plain) if x.dim() == 5 else fine_maps_nd(x, weights, mask)
    pooled = fine.mean
    groups, spatial = _choose_and_mix(fine, weights, noise, mask)
    if weights.global_reduce_weight is not None:
        pooled = _pool_attended(x, spatial, mask)
    gates = _mean_gates(fine.mean.flatten(1), pooled.flatten(1), weights)
    return Attended(fine, groups, spatial, pooled, gates)


def attend_again(
    fine: FineMaps, pooled: Tensor, weights: EMAXWeights, noise: Tensor | None
) -> Attended:
    """Compute what follows from the saved tensors of the forward pass, without reading x."""
    groups, spatial = _choose_and_mix(fine, weights, noise, None)
    gates = _mean_gates(fine.mean.flatten(1), pooled.flatten(1), weights)
    return Attended(fine, groups, spatial, pooled, gates)


# The choice of a group count, and the mixture of the fine maps that it makes ----------------------


def _choose_and_mix(
    fine: FineMaps, weights: EMAXWeights, noise: Tensor | None, mask: Tensor | None
) -> tuple[GroupChoice, Tensor]:
    groups = _controlled_choice(fine.mean.flatten(1), weights, noise, mask)
    warmup = weights.warmup
    if warmup is None or weights.config.candidates == [weights.config.groups]:
        return groups, torch.sigmoid(fine.first + fine.second)
    mixing = mix_groups(score_groups(fine), groups.choice, weights.config, warmup)
    mixed = torch.matmul(mixing.first, fine.first.flatten(2))
    mixed = mixed + torch.matmul(mixing.second, fine.second.flatten(2))
    return groups, torch.sigmoid(mixed).view_as(fine.first)  # [b, F, ...]


def _controlled_choice(
    mean: Tensor, weights: EMAXWeights, noise: Tensor | None, mask: Tensor | None
) -> GroupChoice:
    """Choose a candidate by the group controller, from the means of x, [b, c]."""
    controller_weight = weights.controller_weight
    if controller_weight is None:
        nothing = torch.zeros_like(mean[:, :1])
        return GroupChoice(nothing, nothing + 1, nothing + 1)
    logits = F.linear(mean, controller_weight, weights.controller_bias)
    temperature = present(weights.temperature)
    voters: Tensor | None = None
    if mask is not None:
        voters = mask.any(1)  # a sequence without tokens has no vote
    choice, soft = choose_groups(logits, temperature, noise, weights.config.batch_vote, voters)
    return GroupChoice(logits, soft, choice)


def choose_groups(
    logits: Tensor,
    temperature: Tensor,
    noise: Tensor | None,
    batch_vote: bool,
    voters: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose one candidate per sample by argmax, with the gradient of a softmax.

    This is the straight-through Gumbel-softmax (arXiv 1611.01144), and a straight-through softmax
    without noise. Of equal values the first candidate is taken, which is the smallest count.

    Args:
        logits: The output of the group controller, [b, K].
        temperature: A scalar tensor, > 0.
        noise: Gumbel noise, [b, K], or None.
        batch_vote: Whether all samples take the most frequent choice of the batch.
        voters: Which samples have a vote, [b]; None for all of them.

    Returns:
        The choice as one-hot rows, and the softmax, [b, K] each.
    """
    if noise is not None:
        logits = logits + noise
    soft = torch.softmax(logits / temperature, dim=-1)
    candidates = torch.arange(soft.shape[1], device=soft.device)
    hard = (candidates == soft.argmax(dim=-1, keepdim=True)).to(soft.dtype)
    if batch_vote:
        votes = hard if voters is None else hard * voters.unsqueeze(1)
        hard = (candidates == votes.sum(0).argmax()).to(soft.dtype).expand_as(soft)
    return hard + (soft - soft.detach()), soft


def score_groups(fine: FineMaps) -> Tensor:
    """Compute the score [b, F] that weights the second term of a fine group in a coarser group.

    It is the logsumexp of the means of the channels. Some tools that read ONNX files do not know
    that operator, so it is computed as the difference of a mean and its log-softmax, which is the
    same for every channel up to rounding; the rounding is least where the softmax is large.
    """
    log_share = torch.log_softmax(fine.conv_means, dim=-1)
    return (log_share.exp().detach() * (fine.conv_means - log_share)).sum(-1)


def mix_groups(score: Tensor, choice: Tensor, config: EMAXConfig, warmup: Tensor) -> Mixing:
    """Compute the matrices that make the maps of a mixture over group counts from the fine maps.

    The terms of a coarse group are convex combinations of those of its fine groups: with equal
    weights for the first term, and with softmax(score) within the group for the second. A mixture
    over candidates is therefore a row-stochastic matrix on the fine maps.

    Args:
        score: The scores of the fine groups, [b, F].
        choice: The weights of the candidates, [b, K].
        config: The constants of the layer.
        warmup: A scalar tensor in [0, 1]; 0 is the finest grouping whatever `choice` is.
    """
    fine = torch.arange(config.groups, device=score.device)
    group = torch.stack([fine // (config.groups // count) for count in config.candidates])
    same_group = group.unsqueeze(-1) == group.unsqueeze(-2)  # [K, F, F]
    # Neither 1 / 3 nor 1 - 0.1f is exact in float32, so float64 inputs need float64 quotients.
    equal = same_group.to(score.dtype)
    equal = equal / equal.sum(-1, keepdim=True)  # [K, F, F]
    warmup = warmup.to(score.dtype)
    # A softmax per row is normalised by the maximum of its group: with one maximum for all groups,
    # those far below it would underflow to 0 / 0.
    scores = score[:, None, None, :].masked_fill(~same_group, float("-inf"))  # [b, K, F, F]
    weighted = torch.softmax(scores, dim=-1)
    rest = (1 - warmup) * torch.eye(score.shape[1], device=score.device, dtype=score.dtype)
    choice = warmup * choice
    first = rest + torch.matmul(choice, equal.flatten(1)).view_as(scores[:, 0])
    second = rest + (choice[:, :, None, None] * weighted).sum(1)
    return Mixing(first, second, equal, weighted)


# The gates, and the factor on x that follows from them and the spatial attention ------------------


def _pool_attended(x: Tensor, spatial: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the mean over the pixels of x [b, F, d, ...] times S [b, F, ...]: [b, F, d]."""
    products = torch.matmul(x.flatten(3), spatial.flatten(2).unsqueeze(-1))
    return mean_of_sum(products.squeeze(-1), x, mask)


def _mean_gates(mean: Tensor, pooled: Tensor, weights: EMAXWeights) -> Gates:
    """Compute the gates from the means of x and of x * S, [b, c] each."""
    channel = torch.zeros_like(mean)
    global_ = torch.ones_like(mean)
    channel_hidden, global_hidden = channel, global_
    fused = pooled
    gamma = weights.gamma
    if gamma is not None:
        channel, channel_hidden = squeeze_excite(
            mean,
            present(weights.channel_reduce_weight),
            present(weights.channel_reduce_bias),
            present(weights.channel_expand_weight),
            present(weights.channel_expand_bias),
        )
        # The mean of the fused features follows from these two; they are never written.
        fused = fused + gamma * channel * mean
    global_reduce_weight = weights.global_reduce_weight
    if global_reduce_weight is not None:
        global_, global_hidden = squeeze_excite(
            fused,
            global_reduce_weight,
            present(weights.global_reduce_bias),
            present(weights.global_expand_weight),
            present(weights.global_expand_bias),
        )
    # x + alpha * (x * (S + gamma * w_c) * w_g - x) is one factor on x: x is read once, and
    # alpha = 0 gives a factor of exactly 1.
    scale, offset = global_, torch.zeros_like(global_)
    residual_gate = weights.residual_gate
    if residual_gate is not None:
        scale = residual_gate * global_
        offset = (1 - residual_gate).expand_as(scale)
    if gamma is not None:
        offset = offset + scale * gamma * channel
    return Gates(channel, channel_hidden, fused, global_, global_hidden, scale, offset)


def squeeze_excite(
    mean: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute the gate of squeeze-and-excitation (arXiv 1709.01507).

    Args:
        mean: The mean over the image of the features, [b, c].
        reduce_weight: The weight of the first 1x1 convolution, [r, c, 1, 1].
        reduce_bias: The bias of the first 1x1 convolution, [r].
        expand_weight: The weight of the second 1x1 convolution, [c, r, 1, 1].
        expand_bias: The bias of the second 1x1 convolution, [c].

    Returns:
        The gate in (0, 1), [b, c], and the hidden units that it follows from, [b, r].
    """
    hidden = torch.relu(F.linear(mean, reduce_weight.flatten(1), reduce_bias))
    return torch.sigmoid(F.linear(hidden, expand_weight.flatten(1), expand_bias)), hidden


def output_factor(gates: Gates, spatial: Tensor) -> Tensor:
    """Compute scale * S + offset, [b, F, d, ...], for S [b, F, ...]."""
    groups = spatial.shape[1]
    scale, offset = gates.scale.unflatten(1, [groups, -1]), gates.offset.unflatten(1, [groups, -1])
    for _ in range(2, spatial.dim()):
        scale, offset = scale.unsqueeze(-1), offset.unsqueeze(-1)
    return torch.addcmul(offset, scale, spatial.unsqueeze(2))


def _apply_attention(x: Tensor, attended: Attended) -> Tensor:
    """Compute the output [b, c, ...], in the dtype and memory format of x [b, F, d, ...]."""
    # x comes first, because the product takes its memory format. The product has four dimensions,
    # because torch.compile would copy one of five for channels_last.
    return ungroup(x) * ungroup(output_factor(attended.gates, attended.spatial))
