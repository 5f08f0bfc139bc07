"""EMAX's attention maps and its output as pure functions of the input and the parameters.

Everything that this puts together is exact: the shortcuts are identities, proved in `docs/emax.md`.
Together they need one pass over the finest groups whatever the number of candidate group counts,
and no d-to-d 3x3 convolution.

Dimension letters as in `layer.py`.
"""

from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

from .fine_maps import FineMaps, fine_maps
from .gates import MeanGates, mean_gates, output_factor, output_scale
from .grouping import GroupChoice, controlled_choice, draw_noise, spatial_attention
from .layer import Layer, prepare

__all__ = [
    "Attended",
    "EMAXMaps",
    "apply_attention",
    "attend",
    "emax_maps",
    "emax_plain",
    "outside_autocast",
]


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


def outside_autocast(function: Callable) -> Callable:
    """Keep autocast from turning the matrix products of `function(x, ...)` into half precision.

    TorchScript compiles the undecorated function and cannot leave autocast: there the products
    are half precision. It looks the function's names up in this module, where the wrapper is from.
    """

    @wraps(function)
    def wrapper(x: Tensor, *args, **kwargs):
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):  # which meta tensors have none of
            with torch.autocast(kind, enabled=False):
                return function(x, *args, **kwargs)
        return function(x, *args, **kwargs)

    return wrapper


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


class Attended(NamedTuple):
    """All that a layer computes of x but the output."""

    fine: FineMaps
    groups: GroupChoice
    spatial: Tensor
    """S, [b, F, h, w]."""
    pooled: Tensor
    """Mean of x * S over the image, [b, F, d]; of x without the global gate."""
    gates: MeanGates


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


def pool_attended(x: Tensor, spatial: Tensor) -> Tensor:
    """Means over the image of x [b, F, d, h, w] times S [b, F, h, w]: [b, F, d]."""
    products = torch.matmul(x.flatten(3), spatial.flatten(2).unsqueeze(-1))
    return products.squeeze(-1) / (x.shape[3] * x.shape[4])


def apply_attention(x: Tensor, layer: Layer, attended: Attended) -> Tensor:
    """The output of a layer, [b, c, h, w], in the dtype and memory format of x [b, F, d, h, w]."""
    scale, offset = output_scale(attended.gates, layer.gamma, layer.residual_gate)
    scale, offset = scale.view_as(attended.fine.mean), offset.view_as(attended.fine.mean)
    # x comes first: its memory format is the product's. The product has four dimensions: of a view
    # of five the compiler would make a copy for channels_last.
    return x.flatten(1, 2) * output_factor(scale, offset, attended.spatial).flatten(1, 2)
