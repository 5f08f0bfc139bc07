"""The choice of a group count, and the mixture of the fine maps that it makes."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import EMAXConfig, EMAXWeights, present
from .fine_maps import FineMaps

__all__ = [
    "GroupChoice",
    "Mixing",
    "choose_groups",
    "controlled_choice",
    "mix_groups",
    "score_groups",
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


def controlled_choice(
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
