"""The forward pass: ten launches, in the order in which they run."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import EMAXWeights, present
from . import config
from .config import power_of_two, share_out
from .kernels import maps, output, pooling, products
from .plan import Launch, Plan, new_buffer, pieces, plan_for, split

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
    weights, plan = plan_for(x, weights, noise)
    b, h, w = plan.b, plan.h, plan.w
    features = as_channels_last(x)
    saved = new_buffer(x, plan.saved())
    kept = Saved(*split(saved, plan.saved()))
    *strips, spatial = pieces(x, [*pooled_sizes(plan), plan.maps])
    pooled = Pooled(*strips)
    pool_and_gate(features, weights, plan, kept.vectors, pooled)
    multiply(
        plan, "conv_means", (pooled.borders, 9 * plan.d, 1),
        (weights.conv3x3_weight, 1, 9 * plan.d), (kept.conv_means, plan.d),
        (b * plan.groups, plan.d, 9 * plan.d), weights.conv3x3_bias,
    )  # fmt: skip

    def fine_maps() -> Launch:
        grid, constants = plan.share_out(config.FINE_MAPS)
        return Launch(maps.fine_maps, grid, constants, config.FINE_MAPS[1])

    plan.launch(
        "fine_maps",
        (features, pooled.gates, kept.vectors, kept.conv_means, weights.gn_weight,
         weights.gn_bias, pooled.kernel, kept.maps, kept.score, b, h, w),
        fine_maps,
    )  # fmt: skip
    mix(plan, weights, kept, noise, spatial, choose=True)
    if weights.gamma is not None:
        _gate(plan, weights, "channel", kept.vectors, kept.channel_hidden, kept.channel_logits)
    factors = output_factors(weights, kept)
    if weights.global_reduce_weight is not None:
        plan.launch(
            "pool_attended",
            (features, spatial, kept.vectors, factors[0], weights.gamma, kept.fused, h, w),
            lambda: Launch(
                output.pool_attended, plan.grid, plan.share_out(config.POOL_ATTENDED)[1],
                config.POOL_ATTENDED[1],
            ),
        )  # fmt: skip
        _gate(plan, weights, "global", kept.fused, kept.global_hidden, kept.global_logits)
    out, contiguous = output_like(x)

    def apply_attention() -> Launch:
        grid, constants = plan.share_out(config.APPLY)
        constants["CONTIGUOUS"] = contiguous
        return Launch(output.apply_attention, grid, constants, config.APPLY[1])

    plan.launch("apply", (features, spatial, *factors, out, h, w), apply_attention)
    return out, [saved] if keep else []


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
    plan: Plan, site: str, a: tuple[Tensor, int, int], b: tuple[Tensor, int, int],
    out: tuple[Tensor, int], sizes: tuple[int, int, int], bias: Tensor | None = None,
    mask: Tensor | None = None, relu: bool = False,
) -> None:  # fmt: skip
    """Compute a [M, K] @ b [K, N] + bias [N] in one launch, after a relu or where mask > 0.

    Args:
        plan: The plan.
        site: A name for this launch.
        a: The left matrix, and the strides of its rows and columns.
        b: The right matrix, likewise.
        out: The result, and the stride of its rows.
        sizes: M, N and K.
        bias: What to add to each row, or None.
        mask: A matrix [M, N], or None.
        relu: Whether to clamp at zero.
    """

    def product() -> Launch:
        M, N, K = sizes
        # Small tiles where there would be few.
        tile = 32 if M * N >= 128 * 32 * 32 else 16
        constants = {
            "BM": tile, "BN": min(tile, max(16, power_of_two(N))),
            "BK": min(config.PRODUCT[0], max(16, power_of_two(K))), "RELU": relu,
            "PRECISION": config.PRECISION,
        }  # fmt: skip
        grid = (-(-M // constants["BM"]) * -(-N // constants["BN"]),)
        return Launch(products.product, grid, constants, config.PRODUCT[1])

    plan.launch(site, (a[0], b[0], bias, mask, out[0], *sizes, *a[1:], *b[1:], out[1]), product)


def pooled_sizes(plan: Plan) -> list[int]:
    """Return the sizes of the tensors of `Pooled`."""
    return [plan.strips, plan.strips, plan.b * plan.c * 9, 9 * plan.d + 1]


def pool_and_gate(
    features: Tensor, weights: EMAXWeights, plan: Plan, vectors: Tensor, pooled: Pooled,
    *backward: Tensor | None,
) -> None:  # fmt: skip
    """Compute `Pooled`, and the vectors of `Saved`.

    For the backward pass, with the tensors that the kernel takes then, the first two vectors alone.
    """

    def launch() -> Launch:
        size = config.ROWS[plan.large]
        constants = plan.walk(size, weights)
        constants |= {"BACKWARD": bool(backward), "PRECISION": config.PRECISION}
        return Launch(pooling.pool_and_gate, (plan.grid[0] + 1,), constants, size[1])

    plan.launch(
        "pool again" if backward else "pool",
        (features, weights.conv1x1_weight, weights.conv1x1_bias, weights.conv3x3_weight,
         weights.conv3x3_bias, weights.gn_bias, *pooled[:2], vectors, *pooled[2:],
         *(backward or (None,) * 9), plan.b, plan.h, plan.w, plan.terms, weights.config.eps),
        launch,
    )  # fmt: skip


def mix(
    plan: Plan, weights: EMAXWeights, kept: Saved, noise: Tensor | None, spatial: Tensor,
    choose: bool,
) -> None:  # fmt: skip
    """Compute the spatial attention [b, h * w, F].

    With `choose` each sample chooses its group count; else it is as it was saved.
    """
    b, c = plan.b, plan.c
    warmup = softmax = None
    controller = (None, None)
    chooses = choose and plan.controlled
    if plan.mixes:
        warmup = weights.warmup
    if chooses:
        controller = (weights.controller_weight, weights.controller_bias)
        softmax = kept.softmax
        if weights.config.batch_vote:
            plan.launch(
                "vote",
                (kept.vectors, *controller, noise, weights.temperature, kept.choice, softmax, b),
                lambda: Launch(maps.vote, (1,), {"C": c, **plan.counts}, 4),
            )  # fmt: skip
            chooses = False

    def mix_groups() -> Launch:
        pixels, warps = config.MIX[plan.large]
        tile = min(max(16, power_of_two(plan.pixels)), pixels)
        constants = {
            "C": c, "F": plan.groups, **plan.counts,
            "FP": max(16, power_of_two(plan.groups)), "P": tile, "CHOOSE": chooses,
            "PRECISION": config.PRECISION,
        }  # fmt: skip
        grid = (b, share_out(plan.pixels, tile, b))
        return Launch(maps.mix_groups, grid, constants, warps)

    plan.launch(
        "mix" if choose else "mix again",
        (kept.maps, kept.score, kept.vectors, *controller, noise if chooses else None,
         weights.temperature if chooses else None, warmup, kept.choice, softmax, spatial,
         b, plan.pixels),
        mix_groups,
    )  # fmt: skip


def _gate(
    plan: Plan, weights: EMAXWeights, name: str, means: Tensor, hidden: Tensor, logits: Tensor
) -> None:
    """Compute the hidden units [b, r] and the logits [b, c] of a squeeze-and-excite gate."""
    b, c, r = plan.b, plan.c, plan.hidden[name]
    reduce = present(getattr(weights, f"{name}_reduce_weight"))
    expand = present(getattr(weights, f"{name}_expand_weight"))
    multiply(
        plan, f"{name} hidden", (means, c, 1), (reduce, 1, c), (hidden, r), (b, r, c),
        getattr(weights, f"{name}_reduce_bias"), relu=True,
    )  # fmt: skip
    multiply(
        plan, f"{name} logits", (hidden, r, 1), (expand, 1, r), (logits, c), (b, c, r),
        getattr(weights, f"{name}_expand_bias"),
    )  # fmt: skip
