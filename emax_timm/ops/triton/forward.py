"""The forward pass: ten launches, in the order in which they run."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import EMAXWeights, present
from . import config
from .config import power_of_two, share_out
from .kernels import maps, output, pooling, products
from .plan import Plan, Sizes, plan_for, split
from .program import Launch

__all__ = [
    "Pooled",
    "Saved",
    "as_channels_last",
    "forward",
    "mix",
    "multiply",
    "output_factors",
    "output_like",
    "pool_and_gate",
    "pooled_sizes",
]


class Saved(NamedTuple):
    """What the backward pass needs of the forward pass; a part that a layer lacks is empty.

    All are flat pieces of one tensor in float32.
    """

    maps: Tensor
    """The two fine maps, [2, b, h * w, F]."""
    vectors: Tensor
    """Mean, shift, mean of the deviations and reciprocal of their spread, [4, b, c]."""
    conv_means: Tensor
    """The means of conv3x3(x), [b, F, d]."""
    score: Tensor
    """The scores of the second term in coarser groups, [b, F]."""
    choice: Tensor
    """The group count of each sample, [b]."""
    softmax: Tensor
    """The softmax over the candidates, [b, K]."""
    channel_hidden: Tensor
    """Hidden units of the channel gate, [b, r]."""
    channel_logits: Tensor
    """The channel gate before its sigmoid, [b, c]."""
    fused: Tensor
    """The means of the fused features, [b, c]."""
    global_hidden: Tensor
    """Hidden units of the global gate, [b, r]."""
    global_logits: Tensor
    """The global gate before its sigmoid, [b, c]."""


class Pooled(NamedTuple):
    """What follows from one sample and group alone, and is computed in both passes."""

    pooled: Tensor
    """The pooled rows and columns, [b, h + w, c]."""
    gates: Tensor
    """Their gates, [b, h + w, c]."""
    borders: Tensor
    """The border means, [b, F, d * 9], in the order of conv3x3."""
    kernel: Tensor
    """The kernel of the first term, [9, d], and its offset."""


def forward(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run the forward pass on x [b, c, h, w]; the output is laid out like x."""
    weights, plan = plan_for("forward", x, weights, noise)
    features = as_channels_last(x)
    saved, scratch = plan.new_buffer(x, Sizes.saved), plan.new_buffer(x, _scratch_sizes)
    out, contiguous = output_like(x)
    plan.run(
        (features, *weights[1:], noise, saved, scratch, out),
        lambda: _launches(features, weights, noise, plan, saved, scratch, out, contiguous),
    )
    return out, [saved] if keep else []


def _scratch_sizes(plan: Plan) -> list[int]:
    return [*pooled_sizes(plan), plan.maps]


def _launches(
    x: Tensor, weights: EMAXWeights, noise: Tensor | None, plan: Plan, saved: Tensor,
    scratch: Tensor, out: Tensor, contiguous: bool,
) -> Iterator[Launch]:  # fmt: skip
    b, h, w = plan.b, plan.h, plan.w
    kept = Saved(*split(saved, plan.saved()))
    *strips, spatial = split(scratch, _scratch_sizes(plan))
    pooled = Pooled(*strips)
    yield pool_and_gate(x, weights, plan, kept.vectors, pooled)
    yield multiply(
        (pooled.borders, 9 * plan.d, 1), (weights.conv3x3_weight, 1, 9 * plan.d),
        (kept.conv_means, plan.d), (b * plan.groups, plan.d, 9 * plan.d), weights.conv3x3_bias,
    )  # fmt: skip
    arguments = (
        x, pooled.gates, kept.vectors, kept.conv_means, weights.gn_weight, weights.gn_bias,
        pooled.kernel, kept.maps, kept.score, b, h, w,
    )  # fmt: skip
    yield plan.shared_out(maps.fine_maps, arguments, config.FINE_MAPS)
    if plan.controlled and weights.config.batch_vote:
        yield _vote(plan, weights, kept, noise)
    yield mix(plan, weights, kept, spatial, True, noise)
    if weights.gamma is not None:
        yield from _gate(
            plan, weights, "channel", kept.vectors, kept.channel_hidden, kept.channel_logits
        )
    factors = output_factors(weights, kept)
    if weights.global_reduce_weight is not None:
        arguments = (x, spatial, kept.vectors, factors[0], weights.gamma, kept.fused, h, w)
        _, constants = plan.share_out(config.POOL_ATTENDED)
        yield Launch(output.pool_attended, arguments, plan.grid, constants, config.POOL_ATTENDED[1])
        yield from _gate(
            plan, weights, "global", kept.fused, kept.global_hidden, kept.global_logits
        )
    arguments = (x, spatial, *factors, out, h, w)
    yield plan.shared_out(output.apply_attention, arguments, config.APPLY, CONTIGUOUS=contiguous)


def output_factors(weights: EMAXWeights, kept: Saved) -> tuple[Tensor | None, ...]:
    """Return what the scale and the offset of the output follow from."""
    return (
        None if weights.gamma is None else kept.channel_logits,
        None if weights.global_reduce_weight is None else kept.global_logits,
        weights.gamma,
        weights.residual_gate,
    )


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


def multiply(
    a: tuple[Tensor, int, int], b: tuple[Tensor, int, int], out: tuple[Tensor, int],
    sizes: tuple[int, int, int], bias: Tensor | None = None, mask: Tensor | None = None,
    relu: bool = False,
) -> Launch:  # fmt: skip
    """Compute a [M, K] @ b [K, N] + bias [N] in one launch, after a relu or where mask > 0.

    Args:
        a: The left matrix, and the strides of its rows and columns.
        b: The right matrix, likewise.
        out: The result, and the stride of its rows.
        sizes: M, N and K.
        bias: What to add to each row, or None.
        mask: A matrix [M, N], or None.
        relu: Whether to clamp at zero.
    """
    M, N, K = sizes
    # Small tiles where there would be few.
    tile = 32 if M * N >= 128 * 32 * 32 else 16
    constants = {
        "BM": tile, "BN": min(tile, max(16, power_of_two(N))),
        "BK": min(config.PRODUCT[0], max(16, power_of_two(K))), "RELU": relu,
        "PRECISION": config.PRECISION,
    }  # fmt: skip
    grid = (-(-M // constants["BM"]) * -(-N // constants["BN"]),)
    arguments = (a[0], b[0], bias, mask, out[0], *sizes, *a[1:], *b[1:], out[1])
    return Launch(products.product, arguments, grid, constants, config.PRODUCT[1])


def pooled_sizes(plan: Plan) -> list[int]:
    """Return the sizes of the tensors of `Pooled`."""
    return [plan.strips, plan.strips, plan.b * plan.c * 9, 9 * plan.d + 1]


def pool_and_gate(
    features: Tensor, weights: EMAXWeights, plan: Plan, vectors: Tensor, pooled: Pooled,
    *backward: Tensor | None,
) -> Launch:  # fmt: skip
    """Compute `Pooled`, and the vectors of `Saved`.

    For the backward pass, with the tensors that the kernel takes then, the first two vectors alone.
    """
    size = config.ROWS[plan.large]
    constants = plan.walk(size, weights)
    constants |= {"BACKWARD": bool(backward), "PRECISION": config.PRECISION}
    arguments = (
        features, weights.conv1x1_weight, weights.conv1x1_bias, weights.conv3x3_weight,
        weights.conv3x3_bias, weights.gn_bias, *pooled[:2], vectors, *pooled[2:],
        *(backward or (None,) * 9), plan.b, plan.h, plan.w, plan.terms, weights.config.eps,
    )  # fmt: skip
    return Launch(pooling.pool_and_gate, arguments, (plan.grid[0] + 1,), constants, size[1])


def _vote(plan: Plan, weights: EMAXWeights, kept: Saved, noise: Tensor | None) -> Launch:
    """Choose the group count of the whole batch."""
    arguments = (
        kept.vectors, weights.controller_weight, weights.controller_bias, noise,
        weights.temperature, kept.choice, kept.softmax, plan.b,
    )  # fmt: skip
    return Launch(maps.vote, arguments, (1,), {"C": plan.c, **plan.counts}, 4)


def mix(
    plan: Plan, weights: EMAXWeights, kept: Saved, spatial: Tensor, forward: bool,
    noise: Tensor | None = None,
) -> Launch:  # fmt: skip
    """Compute the spatial attention [b, h * w, F].

    In the forward pass each sample chooses its group count, unless the batch has voted; in the
    backward pass it is as it was saved.
    """
    b, c = plan.b, plan.c
    chooses = forward and plan.controlled and not weights.config.batch_vote
    controller = (weights.controller_weight, weights.controller_bias, noise, weights.temperature)
    pixels, warps = config.MIX[plan.large]
    tile = min(max(16, power_of_two(plan.pixels)), pixels)
    constants = {
        "C": c, "F": plan.groups, **plan.counts,
        "FP": max(16, power_of_two(plan.groups)), "P": tile, "CHOOSE": chooses,
        "PRECISION": config.PRECISION,
    }  # fmt: skip
    arguments = (
        kept.maps, kept.score, kept.vectors, *(controller if chooses else (None,) * 4),
        weights.warmup if plan.mixes else None, kept.choice, kept.softmax if chooses else None,
        spatial, b, plan.pixels,
    )  # fmt: skip
    grid = (b, share_out(plan.pixels, tile, b))
    return Launch(maps.mix_groups, arguments, grid, constants, warps)


def _gate(
    plan: Plan, weights: EMAXWeights, name: str, means: Tensor, hidden: Tensor, logits: Tensor
) -> Iterator[Launch]:
    """Compute the hidden units [b, r] and the logits [b, c] of a squeeze-and-excite gate."""
    b, c, r = plan.b, plan.c, plan.hidden[name]
    reduce = present(getattr(weights, f"{name}_reduce_weight"))
    expand = present(getattr(weights, f"{name}_expand_weight"))
    yield multiply(
        (means, c, 1), (reduce, 1, c), (hidden, r), (b, r, c),
        getattr(weights, f"{name}_reduce_bias"), relu=True,
    )  # fmt: skip
    yield multiply(
        (hidden, r, 1), (expand, 1, r), (logits, c), (b, c, r),
        getattr(weights, f"{name}_expand_bias"),
    )  # fmt: skip
