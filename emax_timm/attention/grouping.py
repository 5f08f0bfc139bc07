"""The group count: how each sample chooses one, and what the choice makes of the fine maps.

Dimension letters as in `layer.py`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .fine_maps import FineMaps
from .layer import Layer

__all__ = [
    "GroupChoice",
    "Mixing",
    "choose_groups",
    "controlled_choice",
    "draw_noise",
    "gumbel_noise",
    "mix_groups",
    "spatial_attention",
]


def draw_noise(x: Tensor, layer: Layer, sample: bool) -> Tensor | None:
    """Gumbel noise for the choice of groups, [b, K], if there is to be any."""
    if not sample or len(layer.controller) == 0:
        return None
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return gumbel_noise(x.new_empty([x.shape[0], layer.controller[1].shape[0]], dtype=dtype))


def gumbel_noise(like: Tensor) -> Tensor:
    """Samples of Gumbel(0, 1) in the shape and dtype of a tensor."""
    # Exponential(1) samples can round to 0, whose logarithm is infinite.
    return -torch.empty_like(like).exponential_().clamp(min=1e-30).log()


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
