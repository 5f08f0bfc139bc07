"""The forward pass: ten launches, in the order in which they run."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import EMAXWeights, present
from . import config, forward_kernels, products
from .config import power_of_two
from .plan import Plan, plan_for

__all__ = [
    "Saved",
    "as_channels_last",
    "conv3x3_matrix",
    "counts_of",
    "forward",
    "mix",
    "mixes",
    "multiply",
    "output_like",
    "pool_and_gate",
]


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
    """Hidden units of the global gate, [b, r]."""
    global_logits: Tensor | None
    """The global gate before its sigmoid, [b, c]."""


def forward(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run the forward pass on x [b, c, h, w]; the output is laid out like x."""
    weights, plan = plan_for(x, weights, noise)
    b, c = plan.b, plan.c
    features = as_channels_last(x)
    _, gates, vectors, borders, kernel = pool_and_gate(features, weights, plan, True)
    matrix, _ = conv3x3_matrix(weights)
    conv_means = multiply(plan, "conv_means", borders, matrix.t(), weights.conv3x3_bias)
    maps = vectors.new_empty(2, b, plan.pixels, plan.groups)
    score = vectors.new_empty(b, plan.groups)
    grid, tile = plan.shared_out(config.FINE_MAPS)
    plan.launch(
        "fine_maps", forward_kernels.fine_maps, grid,
        (features, gates, vectors, conv_means, weights.gn_weight, weights.gn_bias, kernel, maps,
         score, b, plan.h, plan.w),
        {**plan.constants, "P": tile}, config.FINE_MAPS[1],
    )  # fmt: skip
    spatial, choice, softmax = mix(maps, score, vectors, weights, plan, noise, None)

    channel_hidden = channel_logits = fused = global_hidden = global_logits = None
    if weights.gamma is not None:
        channel_hidden, channel_logits = _gate_logits(plan, weights, "channel", vectors[0])
    if weights.global_reduce_weight is not None:
        fused = vectors.new_empty(b, c)
        plan.launch(
            "pool_attended", forward_kernels.pool_attended, plan.samples_grid,
            (features, spatial, vectors, channel_logits, weights.gamma, fused, plan.h, plan.w),
            {**plan.constants, "P": plan.tiles.pixels(config.STREAMING, plan.pixels)},
            config.STREAMING[1],
        )  # fmt: skip
        global_hidden, global_logits = _gate_logits(plan, weights, "global", fused)
    out, contiguous = output_like(x)
    grid, tile = plan.shared_out(config.STREAMING)
    plan.launch(
        "apply_attention", forward_kernels.apply_attention, grid,
        (features, spatial, channel_logits, global_logits, weights.gamma, weights.residual_gate,
         out, plan.h, plan.w),
        {**plan.constants, "P": tile, "CONTIGUOUS": contiguous}, config.STREAMING[1],
    )  # fmt: skip
    if not keep:
        return out, []
    saved = Saved(
        maps, vectors, conv_means, score, choice, softmax, channel_hidden, channel_logits, fused,
        global_hidden, global_logits,
    )  # fmt: skip
    return out, [tensor for tensor in saved if tensor is not None]


def as_channels_last(x: Tensor) -> Tensor:
    """Return x with its channels side by side in memory, copied if they are not."""
    return x.contiguous(memory_format=torch.channels_last)


def output_like(x: Tensor) -> tuple[Tensor, bool]:
    """Return an empty tensor that is laid out like x, and whether it is contiguous.

    It is channels_last otherwise; for other layouts of x it is contiguous.
    """
    if x.is_contiguous(memory_format=torch.channels_last):
        return torch.empty_like(x), False
    return torch.empty_like(x, memory_format=torch.contiguous_format), True


def conv3x3_matrix(weights: EMAXWeights) -> tuple[Tensor, dict[str, int]]:
    """View the weight of conv3x3 as a matrix [d, d * 9], in whatever order it has in memory.

    Returns:
        The matrix, and the strides of an input channel and of a kernel offset in its rows.
    """
    weight = weights.conv3x3_weight
    if weight.is_contiguous():
        return weight.flatten(1), {"INPUT": 9, "TAP": 1}
    if weight.is_contiguous(memory_format=torch.channels_last):
        return weight.permute(0, 2, 3, 1).flatten(1), {"INPUT": 1, "TAP": weight.shape[1]}
    return weight.contiguous().flatten(1), {"INPUT": 9, "TAP": 1}


def multiply(
    plan: Plan, site: str, a: Tensor, b: Tensor, bias: Tensor | None = None,
    mask: Tensor | None = None, out: Tensor | None = None, relu: bool = False,
) -> Tensor:  # fmt: skip
    """Compute a [M, K] @ b [K, N] + bias [N] in one launch, after a relu or where mask > 0."""
    M, K = a.shape
    N = b.shape[1]
    if out is None:
        out = a.new_empty(M, N)
    BM, BN = 32, min(32, max(16, power_of_two(N)))
    plan.launch(
        site, products.product, (-(-M // BM) * -(-N // BN),),
        (a, b, bias, mask, out, M, N, K, a.stride(0), b.stride(0), b.stride(1), out.stride(0)),
        {"BM": BM, "BN": BN, "BK": min(64, max(16, power_of_two(K))), "RELU": relu,
         "PRECISION": config.PRECISION}, 4,
    )  # fmt: skip
    return out


def pool_and_gate(
    features: Tensor, weights: EMAXWeights, plan: Plan, moments: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pool the rows and columns, and compute what follows from one sample and group alone.

    Returns:
        The pooled rows and columns and their gates, [b, h + w, c] each; the vectors [4, b, c] of
        `Saved`, without moments the first two alone; the border means, [b * F, d * 9]; the kernel
        of the first term and its offset, [9 * d + 1].
    """
    b, c, h, w, d = plan.b, plan.c, plan.h, plan.w, plan.d
    matrix, strides = conv3x3_matrix(weights)
    new = weights.gn_weight.new_empty
    pooled, gates, vectors = new(b, h + w, c), new(b, h + w, c), new(4, b, c)
    borders, kernel = new(b * plan.groups, 9 * d), new(9 * d + 1)
    plan.launch(
        "moments" if moments else "pool", forward_kernels.pool_and_gate,
        (plan.samples_grid[0] + 1,),
        (features, weights.conv1x1_weight, weights.conv1x1_bias, matrix, weights.conv3x3_bias,
         weights.gn_bias, pooled, gates, vectors, borders, kernel, b, h, w, weights.config.eps),
        {**plan.constants, **plan.rows, **strides, "MOMENTS": moments,
         "PRECISION": config.PRECISION}, config.ROWS[1],
    )  # fmt: skip
    return pooled, gates, vectors, borders, kernel


def mix(
    maps: Tensor, score: Tensor, vectors: Tensor, weights: EMAXWeights, plan: Plan,
    noise: Tensor | None, choice: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Compute the spatial attention [b, h * w, F], the group counts [b] and their softmax [b, K].

    With `choice` the groups are not chosen again. At the finest grouping there is nothing to choose.
    """
    candidates = weights.config.candidates
    b, c, K = plan.b, plan.c, len(candidates)
    spatial = maps.new_empty(b, plan.pixels, plan.groups)
    softmax = counts = warmup = None
    controller = (None, None)
    chosen, choose = choice, False
    if mixes(weights):
        warmup = weights.warmup
        counts = counts_of(tuple(candidates), maps.device)
        if chosen is None and weights.controller_weight is None:
            chosen = counts.expand(b).contiguous()
        elif chosen is None:
            choose = not weights.config.batch_vote
            controller = (weights.controller_weight, weights.controller_bias)
            chosen, softmax = counts.new_empty(b), maps.new_empty(b, K)
            if weights.config.batch_vote:
                plan.launch(
                    "vote", forward_kernels.vote, (1,),
                    (vectors, *controller, noise, weights.temperature, counts, chosen, softmax, b),
                    {"C": c, "K": K, "KP": power_of_two(K)}, 4,
                )  # fmt: skip
    tile = min(max(16, power_of_two(plan.pixels)), config.MIX[0])
    plan.launch(
        "mix" if choice is None else "mix again", forward_kernels.mix_groups,
        (b, config.share_out(plan.pixels, tile, b)),
        (maps, score, vectors, *controller, noise, weights.temperature, warmup, counts, chosen,
         softmax, spatial, b, plan.pixels),
        {"C": c, "F": plan.groups, "K": K, "KP": power_of_two(K),
         "FP": max(16, power_of_two(plan.groups)), "P": tile, "CHOOSE": choose,
         "PRECISION": config.PRECISION}, config.MIX[1],
    )  # fmt: skip
    return spatial, chosen, softmax


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
    plan: Plan, weights: EMAXWeights, name: str, means: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute the hidden units [b, r] and the logits [b, c] of a squeeze-and-excite gate."""
    reduce, expand = (
        present(getattr(weights, f"{name}_{step}_weight")).flatten(1)
        for step in ("reduce", "expand")
    )
    reduce_bias = getattr(weights, f"{name}_reduce_bias")
    hidden = multiply(plan, f"{name} hidden", means, reduce.t(), reduce_bias, relu=True)
    expand_bias = getattr(weights, f"{name}_expand_bias")
    return hidden, multiply(plan, f"{name} logits", hidden, expand.t(), expand_bias)
