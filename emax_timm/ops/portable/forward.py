"""The forward pass of a layer, in the order in which it is computed.

It goes from x to the fine maps of the finest groups, the choice of a group count, the spatial
attention S, the gates and the output. `docs/emax.md` proves the shortcuts.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..weights import EMAXMaps, EMAXWeights, detached, in_dtype
from .fine_maps import FineMaps, fine_maps, ungroup
from .fine_maps_nd import fine_maps_nd, mean_of_sum
from .gates import Gates, mean_gates, output_factor
from .grouping import GroupChoice, controlled_choice, mix_groups, score_groups

__all__ = ["Attended", "attend_again", "emax_plain", "forward", "maps_plain", "prepare"]


class Attended(NamedTuple):
    """Everything that a layer computes from x except the output."""

    fine: FineMaps
    groups: GroupChoice
    spatial: Tensor
    """The spatial attention S, [b, F, h, w]."""
    pooled: Tensor
    """The mean over the image of x * S, [b, F, d]; that of x without the global gate."""
    gates: Gates


def forward(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, keep: bool, mask: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Run the forward pass; it saves the fine maps and, with a global gate, `pooled`.

    For sequences and videos it saves nothing, because the backward pass starts from x.
    """
    if x.dim() != 4:
        return emax_plain(x, weights, noise, mask), []
    grouped, cast = prepare(x, detached(weights))
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
    gates = mean_gates(fine.mean.flatten(1), pooled.flatten(1), weights)
    return Attended(fine, groups, spatial, pooled, gates)


def attend_again(
    fine: FineMaps, pooled: Tensor, weights: EMAXWeights, noise: Tensor | None
) -> Attended:
    """Compute what follows from the saved tensors of the forward pass, without reading x."""
    groups, spatial = _choose_and_mix(fine, weights, noise, None)
    gates = mean_gates(fine.mean.flatten(1), pooled.flatten(1), weights)
    return Attended(fine, groups, spatial, pooled, gates)


def _choose_and_mix(
    fine: FineMaps, weights: EMAXWeights, noise: Tensor | None, mask: Tensor | None
) -> tuple[GroupChoice, Tensor]:
    groups = controlled_choice(fine.mean.flatten(1), weights, noise, mask)
    warmup = weights.warmup
    if warmup is None or weights.config.candidates == [weights.config.groups]:
        return groups, torch.sigmoid(fine.first + fine.second)
    mixing = mix_groups(score_groups(fine), groups.choice, weights.config, warmup)
    mixed = torch.matmul(mixing.first, fine.first.flatten(2))
    mixed = mixed + torch.matmul(mixing.second, fine.second.flatten(2))
    return groups, torch.sigmoid(mixed).view_as(fine.first)  # [b, F, ...]


def _pool_attended(x: Tensor, spatial: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the mean over the pixels of x [b, F, d, ...] times S [b, F, ...]: [b, F, d]."""
    products = torch.matmul(x.flatten(3), spatial.flatten(2).unsqueeze(-1))
    return mean_of_sum(products.squeeze(-1), x, mask)


def _apply_attention(x: Tensor, attended: Attended) -> Tensor:
    """Compute the output [b, c, ...], in the dtype and memory format of x [b, F, d, ...]."""
    # x comes first, because the product takes its memory format. The product has four dimensions,
    # because torch.compile would copy one of five for channels_last.
    return ungroup(x) * ungroup(output_factor(attended.gates, attended.spatial))
