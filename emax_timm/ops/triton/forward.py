"""The forward pass: ten launches, four of them matrix products of the two gates and one of means."""

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..weights import EMAXWeights, in_dtype, present
from . import config, forward_kernels
from .config import Tiles, power_of_two, tiles_for
from .launch import launch

__all__ = ["Saved", "Sizes", "as_channels_last", "forward", "mix", "pool_and_gate", "prepare"]


class Sizes(NamedTuple):
    """The sizes of x [b, c, h, w] and of the layer."""

    b: int
    c: int
    h: int
    w: int
    groups: int
    tiles: Tiles

    @property
    def pixels(self) -> int:
        return self.h * self.w

    @property
    def constants(self) -> dict[str, int]:
        """What every kernel that works on tiles of x is compiled for."""
        return {"C": self.c, "F": self.groups, "d": self.tiles.d, "D": self.tiles.D, "G": self.tiles.G}

    @property
    def rows(self) -> dict[str, int]:
        """The same for kernels that walk along rows."""
        return {"R": self.tiles.R, "WB": self.tiles.WB, "N": self.tiles.N}

    def grid(self, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
        """Return the grid of a kernel that shares out the pixels of a sample, and its tile."""
        tile = self.tiles.pixels(size, self.pixels)
        programs = self.b * self.tiles.blocks
        return (programs, share_out(self.pixels, tile, programs)), tile


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; a part that a layer lacks is None."""

    maps: Tensor
    """The two fine maps, [2, b, h * w, F]."""
    vectors: Tensor
    """Mean, shift, mean of the deviations and reciprocal of their spread, [4, b, c]."""
    conv_means: Tensor
    """The means of conv3x3(x), [b * F, d]."""
    score: Tensor
    """The scores of the second term in coarser groups, [b, F]."""
    choice: Tensor | None
    """The group count of each sample, [b], int32."""
    softmax: Tensor | None
    """The softmax over the candidates, [b, K]."""
    channel_hidden: Tensor | None
    """Hidden units of the channel gate, [b, r]."""
    channel_logits: Tensor | None
    """The channel gate before its sigmoid, [b, c]."""
    fused: Tensor | None
    """The means of the fused features, [b, c]."""
    global_hidden: Tensor | None
    global_logits: Tensor | None


def prepare(x: Tensor, weights: EMAXWeights) -> tuple[EMAXWeights, Sizes]:
    """Return the weights in float32 and the sizes."""
    if any(t is not None and t.dtype != torch.float32 for t in weights[1:]):
        weights = in_dtype(weights, torch.float32)
    b, c, h, w = x.shape
    groups = weights.config.groups
    return weights, Sizes(b, c, h, w, groups, tiles_for(c, groups, h, w))


def as_channels_last(x: Tensor) -> Tensor:
    """Return x with its channels side by side in memory, copied if they are not."""
    return x.contiguous(memory_format=torch.channels_last)


def share_out(pixels: int, tile: int, programs: int) -> int:
    """Choose among how many programs the pixels of a sample are shared out."""
    return max(1, min(-(-pixels // tile), config.PROGRAMS // max(1, programs)))


def forward(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run the forward pass on x [b, c, h, w]; the output is laid out like x."""
    weights, sizes = prepare(x, weights)
    features = as_channels_last(x)
    _, gates, vectors, borders, kernel = pool_and_gate(features, weights, sizes, True)
    conv3x3 = weights.conv3x3_weight.flatten(1)  # [d, d * 9]
    conv_means = torch.addmm(weights.conv3x3_bias, borders, conv3x3.t())  # [b * F, d]
    maps = x.new_empty(2, sizes.b, sizes.pixels, sizes.groups, dtype=torch.float32)
    score = x.new_empty(sizes.b, sizes.groups, dtype=torch.float32)
    grid, tile = sizes.grid(config.FINE_MAPS)
    launch(
        forward_kernels.fine_maps, grid,
        (features, gates, vectors, conv_means, weights.gn_weight, weights.gn_bias, kernel, maps,
         score, sizes.b, sizes.h, sizes.w),
        {**sizes.constants, "P": tile}, config.FINE_MAPS[1],
    )  # fmt: skip
    spatial, choice, softmax = mix(maps, score, vectors, weights, sizes, noise, None)

    channel_hidden = channel_logits = fused = global_hidden = global_logits = None
    if weights.gamma is not None:
        channel_hidden, channel_logits = _gate_logits(
            vectors[0], weights.channel_reduce_weight, weights.channel_reduce_bias,
            weights.channel_expand_weight, weights.channel_expand_bias,
        )  # fmt: skip
    if weights.global_reduce_weight is not None:
        fused = torch.empty_like(vectors[0])
        tile = sizes.tiles.pixels(config.STREAMING, sizes.pixels)
        launch(
            forward_kernels.pool_attended, (sizes.b * sizes.tiles.blocks,),
            (features, spatial, vectors, channel_logits, weights.gamma, fused, sizes.h, sizes.w),
            {**sizes.constants, "P": tile}, config.STREAMING[1],
        )  # fmt: skip
        global_hidden, global_logits = _gate_logits(
            fused, weights.global_reduce_weight, weights.global_reduce_bias,
            weights.global_expand_weight, weights.global_expand_bias,
        )  # fmt: skip
    out, contiguous = output_like(x)
    grid, tile = sizes.grid(config.STREAMING)
    launch(
        forward_kernels.apply_attention, grid,
        (features, spatial, channel_logits, global_logits, weights.gamma, weights.residual_gate,
         out, sizes.h, sizes.w),
        {**sizes.constants, "P": tile, "CONTIGUOUS": contiguous}, config.STREAMING[1],
    )  # fmt: skip
    if not keep:
        return out, []
    saved = Saved(
        maps, vectors, conv_means, score, choice, softmax, channel_hidden, channel_logits, fused,
        global_hidden, global_logits,
    )  # fmt: skip
    return out, [tensor for tensor in saved if tensor is not None]


def output_like(x: Tensor) -> tuple[Tensor, bool]:
    """Return an empty tensor that is laid out like x, and whether it is contiguous.

    It is channels_last otherwise; other layouts are computed as contiguous ones.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x), False
    return torch.empty_like(x, memory_format=torch.contiguous_format), True


def pool_and_gate(
    features: Tensor, weights: EMAXWeights, sizes: Sizes, moments: bool
) -> tuple[Tensor, ...]:
    """Pool the rows and columns, and compute what follows from one sample and group alone.

    Returns:
        The pooled rows and columns and their gates, [b, h + w, c] each; the vectors [4, b, c] of
        `Saved`, without moments the first two alone; the border means, [b * F, d * 9]; the kernel
        of the first term and its offset, [d * 9 + 1].
    """
    new = features.new_empty
    b, c, h, w = sizes[:4]
    pooled, gates = new(2, b, h + w, c, dtype=torch.float32).unbind()
    vectors = new(4, b, c, dtype=torch.float32)
    borders = new(b * sizes.groups, 9 * sizes.tiles.d, dtype=torch.float32)
    kernel = new(9 * sizes.tiles.d + 1, dtype=torch.float32)
    launch(
        forward_kernels.pool_and_gate, (b * sizes.tiles.blocks + 1,),
        (features, weights.conv1x1_weight, weights.conv1x1_bias, weights.conv3x3_weight,
         weights.conv3x3_bias, weights.gn_bias, pooled, gates, vectors, borders, kernel, b, h, w,
         weights.config.eps),
        {**sizes.constants, **sizes.rows, "MOMENTS": moments}, config.ROWS[1],
    )  # fmt: skip
    return pooled, gates, vectors, borders, kernel


def mix(
    maps: Tensor, score: Tensor, vectors: Tensor, weights: EMAXWeights, sizes: Sizes,
    noise: Tensor | None, choice: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the spatial attention [b, h * w, F], the group counts [b] and their softmax [b, K].

    With `choice` the groups are not chosen again. At the finest grouping there is nothing to choose.
    """
    candidates = weights.config.candidates
    K = len(candidates)
    spatial = torch.empty_like(maps[0])
    softmax = counts = controller_weight = controller_bias = warmup = None
    choose = False
    if mixes(weights):
        warmup = weights.warmup
        counts = counts_of(tuple(candidates), maps.device)
        if choice is None and weights.controller_weight is None:
            choice = counts.expand(sizes.b).contiguous()
        elif choice is None:
            choose = not weights.config.batch_vote
            controller_weight, controller_bias = weights.controller_weight, weights.controller_bias
            choice = maps.new_empty(sizes.b, dtype=torch.int32)
            softmax = maps.new_empty(sizes.b, K)
            if weights.config.batch_vote:
                launch(
                    forward_kernels.vote, (1,),
                    (vectors, controller_weight, controller_bias, noise, weights.temperature,
                     counts, choice, softmax, sizes.b),
                    {"C": sizes.c, "K": K, "KP": power_of_two(K)}, 4,
                )  # fmt: skip
    tile = min(max(16, power_of_two(sizes.pixels)), config.MIX[0])
    grid = (sizes.b, share_out(sizes.pixels, tile, sizes.b))
    launch(
        forward_kernels.mix_groups, grid,
        (maps, score, vectors, controller_weight, controller_bias, noise, weights.temperature,
         warmup, counts, choice, softmax, spatial, sizes.b, sizes.pixels),
        {"C": sizes.c, "F": sizes.groups, "K": K, "KP": power_of_two(K),
         "FP": max(16, power_of_two(sizes.groups)), "P": tile, "CHOOSE": choose,
         "PRECISION": config.PRECISION}, config.MIX[1],
    )  # fmt: skip
    return spatial, choice, softmax


def mixes(weights: EMAXWeights) -> bool:
    """Say whether the maps of a layer are mixtures, and not those of the finest groups alone."""
    return weights.warmup is not None and weights.config.candidates != [weights.config.groups]


def counts_of(candidates: tuple[int, ...], device: torch.device) -> Tensor:
    """Return the candidate group counts as a tensor, [K], int32."""
    if torch.compiler.is_compiling():
        return _counts(candidates, device)
    return _cached_counts(candidates, device)


def _counts(candidates: tuple[int, ...], device: torch.device) -> Tensor:
    # Filled on the device: a copy from the host would keep CUDA graphs from being recorded.
    new = [torch.full([1], count, dtype=torch.int32, device=device) for count in candidates]
    return torch.cat(new)


_cached_counts = lru_cache(maxsize=256)(_counts)


def _gate_logits(
    means: Tensor,
    reduce_weight: Tensor | None,
    reduce_bias: Tensor | None,
    expand_weight: Tensor | None,
    expand_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute the hidden units [b, r] and the logits [b, c] of a squeeze-and-excite gate."""
    reduce, expand = present(reduce_weight).flatten(1), present(expand_weight).flatten(1)
    # One launch each, with the bias and the relu in them.
    hidden = torch._addmm_activation(present(reduce_bias), means, reduce.t())
    return hidden, torch.addmm(present(expand_bias), hidden, expand.t())
