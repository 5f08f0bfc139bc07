"""The backward pass: what the forward pass did not save is computed again."""

from typing import NamedTuple

from torch import Tensor

from ..weights import EMAXWeights
from . import config
from .config import power_of_two
from .forward import (
    Pooled,
    Saved,
    as_channels_last,
    mix,
    multiply,
    output_factors,
    output_like,
    pool_and_gate,
    pooled_sizes,
)
from .gradients import hidden_columns
from .kernels import input_gradients, map_gradients, parameter_gradients, products, term_gradients
from .plan import (
    Launch,
    Plan,
    conv3x3_strides,
    new_buffer,
    pieces,
    plan_for,
    split,
)
from .scratch import Scratch, conv1x1_parts, mixing_parts, scratch_sizes

__all__ = ["backward"]


class _Pass(NamedTuple):
    """This is what all steps of a backward pass share."""

    x: Tensor
    """The input, channels_last."""
    grad: Tensor
    """The gradient of the output, channels_last."""
    weights: EMAXWeights
    plan: Plan
    saved: Saved
    scratch: Scratch
    pooled: Pooled
    grads: dict[str, Tensor]
    """The gradients of the parameters by name, flat pieces of one tensor."""


def backward(
    grad: Tensor, x: Tensor, weights: EMAXWeights, noise: Tensor | None, saved: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the backward pass.

    Returns:
        The gradient of x, laid out like x, and those of the parameters, which `named_gradients`
        takes apart.
    """
    weights, plan = plan_for(x, weights, noise, grad)
    parts = pieces(x, [*pooled_sizes(plan), *scratch_sizes(plan)])
    sizes = plan.gradients()
    gradients = new_buffer(x, [*sizes.values()])
    step = _Pass(
        as_channels_last(x), as_channels_last(grad.to(x.dtype)), weights, plan,
        Saved(*split(saved, plan.saved())), Scratch(*parts[4:]), Pooled(*parts[:4]),
        dict(zip(sizes, split(gradients, [*sizes.values()]), strict=True)),
    )  # fmt: skip
    mix(plan, weights, step.saved, noise, step.scratch.spatial, choose=False)
    _output_backward(step)
    if plan.mixes:
        _mixing_backward(step)
    grad_x = _fine_maps_backward(step, x)
    _add_up(step)
    return grad_x, gradients


def _output_backward(step: _Pass) -> None:
    """Go back through the output and the gates, to the mixed map before its sigmoid."""
    x, grad, weights, plan, saved, scratch, pooled, _ = step
    c, h, w, width = plan.c, plan.h, plan.w, plan.terms
    factors = output_factors(weights, saved)
    pool_and_gate(
        x, weights, plan, scratch.shifts, pooled, grad, scratch.spatial, *factors,
        scratch.of_map, scratch.of_offset, scratch.terms,
    )  # fmt: skip
    of_fused = None
    if weights.global_reduce_weight is not None:
        of_fused = scratch.of_fused
        _gate_backward(step, "global", saved.fused, saved.global_hidden, of_fused)
    if weights.gamma is not None:
        block = min(1024, power_of_two(c))
        plan.launch(
            "channel_gate_gradient",
            (scratch.of_offset, of_fused, saved.vectors, *factors, scratch.of_mean, scratch.terms,
             width),
            lambda: Launch(
                products.channel_gate_gradient, (plan.b, -(-c // block)),
                {"C": c, "BLOCK": block}, 4,
            ),
        )  # fmt: skip
        _gate_backward(step, "channel", saved.vectors, saved.channel_hidden, scratch.of_mean)

    def map_gradient() -> Launch:
        grid, constants = plan.share_out(config.MAP_GRADIENT)
        return Launch(map_gradients.map_gradient, grid, constants, config.MAP_GRADIENT[1])

    plan.launch("map_gradient", (x, scratch.spatial, of_fused, scratch.of_map, h, w), map_gradient)


def _gate_backward(step: _Pass, name: str, means: Tensor, hidden: Tensor, of_means: Tensor) -> None:
    """Go back through a squeeze-and-excite gate, from the gradient of its logits in the terms.

    The gradient of its means goes to `of_means` [b, c], to which that of the channel gate is added;
    that of its hidden units goes to the terms.
    """
    _, _, weights, plan, _, scratch, _, grads = step
    b, c, r, width = plan.b, plan.c, plan.hidden[name], plan.terms
    reduce = getattr(weights, f"{name}_reduce_weight")
    expand = getattr(weights, f"{name}_expand_weight")
    of_logits = scratch.terms[2 * c if name == "global" else 3 * c :]
    of_hidden = scratch.terms[hidden_columns(plan, name).start :]
    multiply(
        plan, f"{name} gradient", (of_logits, width, 1), (expand, r, 1), (of_hidden, width),
        (b, r, c), mask=hidden,
    )  # fmt: skip

    def gate_products() -> Launch:
        tile = 32
        rows, columns, units = -(-b // tile), -(-c // tile), -(-r // tile)
        constants = {
            "C": c, "R": r, "BM": tile, "BN": tile, "BK": tile, "ADD": name == "channel",
            "PRECISION": config.PRECISION,
        }  # fmt: skip
        grid = (2 * columns * units + rows * columns,)
        return Launch(products.gate_products, grid, constants, 4)

    plan.launch(
        f"{name} products",
        (of_logits, of_hidden, means, hidden, reduce, grads[f"{name}_expand_weight"],
         grads[f"{name}_reduce_weight"], of_means, b, width),
        gate_products,
    )  # fmt: skip


def _mixing_backward(step: _Pass) -> None:
    """Go back through the mixture over group counts."""
    _, _, weights, plan, saved, scratch, _, _ = step
    b, c, F = plan.b, plan.c, plan.groups
    padded = max(16, power_of_two(F))
    tile, parts = mixing_parts(plan)
    plan.launch(
        "unmix",
        (scratch.of_map, saved.maps, saved.score, saved.choice, weights.warmup,
         scratch.of_maps, scratch.of_mixing, b, plan.pixels),
        lambda: Launch(
            map_gradients.unmix_groups, (b, parts),
            {"F": F, **plan.counts, "FP": padded, "P": tile, "PRECISION": config.PRECISION},
            config.UNMIX[1],
        ),
    )  # fmt: skip
    plan.launch(
        "choice",
        (scratch.of_mixing, saved.score, saved.choice, weights.warmup, weights.temperature,
         saved.softmax if plan.controlled else None, weights.controller_weight,
         scratch.of_score, scratch.of_mean, scratch.terms, b, parts, plan.terms),
        lambda: Launch(
            map_gradients.choice_gradient, (b,),
            {"C": c, "F": F, **plan.counts, "FP": padded,
             "ADD": weights.gamma is not None}, 4,
        ),
    )  # fmt: skip


def _fine_maps_backward(step: _Pass, like: Tensor) -> Tensor:
    """Go back through the fine maps: the gradient of x, laid out like `like`."""
    x, grad, weights, plan, saved, scratch, pooled, _ = step
    b, h, w, d, width = plan.b, plan.h, plan.w, plan.d, plan.terms
    of_first = of_second = scratch.of_map
    if plan.mixes:
        of_first, of_second = scratch.of_maps, scratch.of_maps[plan.maps :]
    parts = plan.share_out(config.PIXEL_SUMS)[0][1]

    def pixel_sums() -> Launch:
        grid, constants = plan.share_out(config.PIXEL_SUMS)
        return Launch(term_gradients.pixel_sums, grid, constants, config.PIXEL_SUMS[1])

    plan.launch(
        "pixel_sums",
        (x, pooled.gates, saved.vectors, scratch.shifts, of_first, of_second, scratch.sums, b, h,
         w),
        pixel_sums,
    )  # fmt: skip
    plan.launch(
        "second_term_gradient",
        (scratch.sums, saved.vectors, saved.conv_means, weights.gn_weight, weights.gn_bias,
         scratch.of_score if plan.mixes else None, scratch.of_conv_means, scratch.of_gated,
         scratch.terms, b, parts, plan.pixels, width),
        lambda: Launch(term_gradients.second_term_gradient, plan.grid, plan.constants, 2),
    )  # fmt: skip
    rows = b * plan.groups
    multiply(
        plan, "borders", (scratch.of_conv_means, d, 1),
        (weights.conv3x3_weight, 9 * d, 1), (scratch.of_borders, 9 * d), (rows, 9 * d, d),
    )  # fmt: skip
    multiply(
        plan, "conv3x3", (scratch.of_conv_means, 1, d), (pooled.borders, 9 * d, 1),
        (scratch.of_conv3x3, 9 * d), (d, 9 * d, rows),
    )  # fmt: skip

    def pooled_gradient() -> Launch:
        size = config.POOLED_GRADIENT[plan.large]
        constants = {**plan.walk(size, weights), "PRECISION": config.PRECISION}
        return Launch(input_gradients.pooled_gradient, plan.grid, constants, size[1])

    has_mean = weights.gamma is not None or plan.controlled
    plan.launch(
        "pooled_gradient",
        (x, pooled.gates, saved.vectors, scratch.shifts, scratch.of_gated, scratch.terms,
         of_second, scratch.of_borders, scratch.of_mean if has_mean else None,
         weights.conv1x1_weight, scratch.of_before, scratch.of_pooled, scratch.of_corners, b, h,
         w, width),
        pooled_gradient,
    )  # fmt: skip
    _conv1x1_backward(step)
    grad_x, contiguous = output_like(like)

    def input_gradient() -> Launch:
        grid, constants = plan.share_out(config.INPUT_GRADIENT)
        constants["CONTIGUOUS"] = contiguous
        kernel = input_gradients.input_gradient
        return Launch(kernel, grid, constants, config.INPUT_GRADIENT[1])

    has_global_gate = weights.global_reduce_weight is not None
    plan.launch(
        "input_gradient",
        (x, grad, scratch.spatial, *output_factors(weights, saved),
         scratch.of_fused if has_global_gate else None, pooled.gates, saved.vectors,
         scratch.shifts, scratch.of_gated, scratch.terms, scratch.of_corners, pooled.kernel,
         of_first, of_second, scratch.of_pooled, grad_x, b, h, w, width),
        input_gradient,
    )  # fmt: skip
    return grad_x


def _conv1x1_backward(step: _Pass) -> None:
    """Compute the gradient of conv1x1, by part."""
    plan, scratch = step.plan, step.scratch

    def conv1x1_gradient() -> Launch:
        D = plan.tiles.D
        rows = config.CONV1X1[0] // (2 if D > 32 else 1)
        constants = {"d": plan.d, "DP": max(16, D), "N": rows, "PRECISION": config.PRECISION}
        kernel = parameter_gradients.conv1x1_gradient
        return Launch(kernel, (conv1x1_parts(plan),), constants, config.CONV1X1[1])

    plan.launch(
        "conv1x1",
        (scratch.of_before, step.pooled.pooled, scratch.of_conv1x1, plan.strips // plan.d),
        conv1x1_gradient,
    )


def _add_up(step: _Pass) -> None:
    """Add up over the batch: the gradients of all parameters but the gates' weights."""
    _, _, weights, plan, saved, scratch, _, grads = step
    c, d, K = plan.c, plan.d, plan.candidates
    block = 128
    programs = -(-plan.terms // block)
    if plan.controlled:
        programs += K * -(-c // block)
    plan.launch(
        "batch_sums",
        (scratch.terms, saved.vectors, grads["totals"],
         grads["controller_weight"] if plan.controlled else None, plan.b, plan.terms),
        lambda: Launch(
            parameter_gradients.batch_sums, (programs,),
            {"C": c, "K": K, "B": 16, "BLOCK": block}, 4,
        ),
    )  # fmt: skip

    def of_shared() -> Launch:
        constants = {
            "C": c, "F": plan.groups, "d": d, "D": plan.tiles.D,
            "FP": power_of_two(plan.groups), "CP": power_of_two(c), **conv3x3_strides(weights),
            "GAMMA": weights.gamma is not None,
        }  # fmt: skip
        return Launch(parameter_gradients.parameter_gradients, (d,), constants, 4)

    plan.launch(
        "parameter_gradients",
        (scratch.of_conv1x1, grads["totals"], scratch.of_conv3x3, weights.conv3x3_weight,
         weights.conv3x3_bias, weights.gn_bias, grads["shared"], conv1x1_parts(plan)),
        of_shared,
    )  # fmt: skip
