"""What the backward pass computes on the way: one piece of memory, and its parts."""

from typing import NamedTuple

from torch import Tensor

from . import config
from .config import power_of_two, share_out
from .plan import Plan

__all__ = ["Scratch", "conv1x1_parts", "mixing_parts", "scratch_sizes"]


class Scratch(NamedTuple):
    """What is computed on the way, flat pieces of one tensor in float32.

    A name that begins with `of_` is the gradient of what follows.
    """

    spatial: Tensor
    """The spatial attention, [b, h * w, F]."""
    shifts: Tensor
    """The vectors of `Saved` without moments, [4, b, c]."""
    terms: Tensor
    """What is summed over the batch, [b, T]; `kernels/parameter_gradients.py` names its columns."""
    sums: Tensor
    """The sums over the pixels of a program, [parts, b, 11, c]."""
    of_map: Tensor
    """The mixed map before its sigmoid, [b, h * w, F]."""
    of_maps: Tensor
    """The two fine maps, [2, b, h * w, F]."""
    of_mixing: Tensor
    """The two matrices that mix them, by part, [2, b, parts, F, F]."""
    of_score: Tensor
    """The scores, [b, F]."""
    of_offset: Tensor
    """The offset of the output, [b, c]."""
    of_fused: Tensor
    """The means of the fused features, [b, c]."""
    of_mean: Tensor
    """The mean of x, [b, c]."""
    of_conv_means: Tensor
    """The means of conv3x3(x), [b, F, d]."""
    of_gated: Tensor
    """The two slopes of the gated features, [2, b, c]; see `second_term_gradient`."""
    of_borders: Tensor
    """The border means, [b, F, d * 9]."""
    of_corners: Tensor
    """The four corners, [4, b, c]."""
    of_before: Tensor
    """The gates of the pooled rows and columns before their sigmoid, [b, h + w, c]."""
    of_pooled: Tensor
    """The pooled rows and columns, [b, h + w, c]."""
    of_conv1x1: Tensor
    """conv1x1 by part, [parts, d, d + 1]."""
    of_conv3x3: Tensor
    """conv3x3 through its means, [d, d * 9]."""


def scratch_sizes(plan: Plan) -> list[int]:
    """Return the sizes of the tensors of `Scratch`."""
    vector, d = plan.b * plan.c, plan.d
    return [
        plan.maps,
        4 * vector,
        plan.b * plan.terms,
        plan.share_out(config.PIXEL_SUMS)[0][1] * 11 * vector,
        plan.maps,
        2 * plan.maps * plan.mixes,
        2 * plan.b * mixing_parts(plan)[1] * plan.groups**2 * plan.mixes,
        plan.b * plan.groups * plan.mixes,
        vector,
        vector,
        vector,
        vector,
        2 * vector,
        9 * vector,
        4 * vector,
        plan.strips,
        plan.strips,
        conv1x1_parts(plan) * d * (d + 1),
        9 * d * d,
    ]


def mixing_parts(plan: Plan) -> tuple[int, int]:
    """Return the pixels of a tile of `unmix_groups`, and the programs for a sample."""
    tile = min(max(16, power_of_two(plan.pixels)), config.UNMIX[0])
    return tile, share_out(plan.pixels, tile, plan.b * 4)


def conv1x1_parts(plan: Plan) -> int:
    """Return the number of programs that sum the gradient of conv1x1."""
    return max(1, min(256, plan.strips // plan.d // 256))
