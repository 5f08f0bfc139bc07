"""The backward pass: what the forward pass did not save is computed again."""

from collections.abc import Iterator
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
from .gradients import Gradients, hidden_columns
from .kernels import input_gradients, map_gradients, parameter_gradients, products, term_gradients
from .plan import Plan, Sizes, conv3x3_strides, plan_for, split
from .program import Launch
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
    grads: Gradients
    grad_x: Tensor
    """The gradient of x, laid out like x."""
    contiguous: bool
    """Whether that is contiguous; else it is channels_last."""


def backward(grad: Tensor, x: Tensor, weights: EMAXWeights, saved: Tensor) -> tuple[Tensor, Tensor]:
    """Run the backward pass.

    Returns:
        The gradient of x, laid out like x, and those of the parameters, which `named_gradients`
        takes apart.
    """
    weights, plan = plan_for("backward", x, weights, grad, saved)
    features, grad = as_channels_last(x), as_channels_last(grad.to(x.dtype))
    scratch, gradients = plan.new_buffer(x, _sizes), plan.new_buffer(x, Sizes.gradients)
    grad_x, contiguous = output_like(x)

    def launches() -> Iterator[Launch]:
        parts = split(scratch, _sizes(plan))
        step = _Pass(
            features, grad, weights, plan, Saved(*split(saved, plan.saved())), Scratch(*parts[4:]),
            Pooled(*parts[:4]), Gradients(*split(gradients, plan.gradients())), grad_x, contiguous,
        )  # fmt: skip
        yield mix(plan, weights, step.saved, step.scratch.spatial, False)
        yield from _output_backward(step)
        if plan.mixes:
            yield from _mixing_backward(step)
        yield from _fine_maps_backward(step)
        yield from _add_up(step)

    plan.run((features, grad, *weights[1:], saved, scratch, gradients, grad_x), launches)
    return grad_x, gradients


def _sizes(plan: Plan) -> list[int]:
    return [*pooled_sizes(plan), *scratch_sizes(plan)]


def _output_backward(step: _Pass) -> Iterator[Launch]:
    """Go back through the output and the gates, to the mixed map before its sigmoid."""
    x, grad, weights, plan, saved, scratch, pooled, *_ = step
    c, h, w, width = plan.c, plan.h, plan.w, plan.terms
    factors = output_factors(weights, saved)
    yield pool_and_gate(
        x, weights, plan, scratch.shifts, pooled, grad, scratch.spatial, *factors,
        scratch.of_map, scratch.of_offset, scratch.terms,
    )  # fmt: skip
    of_fused = None
    if weights.global_reduce_weight is not None:
        of_fused = scratch.of_fused
        yield from _gate_backward(step, "global", saved.fused, saved.global_hidden, of_fused)
    if weights.gamma is not None:
        block = min(1024, power_of_two(c))
        yield Launch(
            products.channel_gate_gradient,
            (scratch.of_offset, of_fused, saved.vectors, *factors, scratch.of_mean, scratch.terms,
             width),
            (plan.b, -(-c // block)), {"C": c, "BLOCK": block}, 4,
        )  # fmt: skip
        yield from _gate_backward(
            step, "channel", saved.vectors, saved.channel_hidden, scratch.of_mean
        )
    yield plan.shared_out(
        map_gradients.map_gradient, (x, scratch.spatial, of_fused, scratch.of_map, h, w),
        config.MAP_GRADIENT,
    )  # fmt: skip


def _gate_backward(
    step: _Pass, name: str, means: Tensor, hidden: Tensor, of_means: Tensor
) -> Iterator[Launch]:
    """Go back through a squeeze-and-excite gate, from the gradient of its logits in the terms.

    The gradient of its means goes to `of_means` [b, c], to which that of the channel gate is added;
    that of its hidden units goes to the terms.
    """
    weights, plan, scratch = step.weights, step.plan, step.scratch
    b, c, r, width = plan.b, plan.c, plan.hidden[name], plan.terms
    reduce = getattr(weights, f"{name}_reduce_weight")
    expand = getattr(weights, f"{name}_expand_weight")
    of_logits = scratch.terms[2 * c if name == "global" else 3 * c :]
    of_hidden = scratch.terms[hidden_columns(plan, name).start :]
    yield multiply(
        (of_logits, width, 1), (expand, r, 1), (of_hidden, width), (b, r, c), mask=hidden
    )
    tile = 32
    rows, columns, units = -(-b // tile), -(-c // tile), -(-r // tile)
    constants = {
        "C": c, "R": r, "BM": tile, "BN": tile, "BK": tile, "ADD": name == "channel",
        "PRECISION": config.PRECISION,
    }  # fmt: skip
    grads = step.grads._asdict()
    yield Launch(
        products.gate_products,
        (of_logits, of_hidden, means, hidden, reduce, grads[f"{name}_expand"],
         grads[f"{name}_reduce"], of_means, b, width),
        (2 * columns * units + rows * columns,), constants, 4,
    )  # fmt: skip


def _mixing_backward(step: _Pass) -> Iterator[Launch]:
    """Go back through the mixture over group counts."""
    weights, plan, saved, scratch = step.weights, step.plan, step.saved, step.scratch
    b, c, F = plan.b, plan.c, plan.groups
    padded = max(16, power_of_two(F))
    tile, parts = mixing_parts(plan)
    yield Launch(
        map_gradients.unmix_groups,
        (scratch.of_map, saved.maps, saved.score, saved.choice, weights.warmup,
         scratch.of_maps, scratch.of_mixing, b, plan.pixels),
        (b, parts),
        {"F": F, **plan.counts, "FP": padded, "P": tile, "PRECISION": config.PRECISION},
        config.UNMIX[1],
    )  # fmt: skip
    yield Launch(
        map_gradients.choice_gradient,
        (scratch.of_mixing, saved.score, saved.choice, weights.warmup, weights.temperature,
         saved.softmax if plan.controlled else None, weights.controller_weight,
         scratch.of_score, scratch.of_mean, scratch.terms, b, parts, plan.terms),
        (b,),
        {"C": c, "F": F, **plan.counts, "FP": padded, "ADD": weights.gamma is not None}, 4,
    )  # fmt: skip


def _fine_maps_backward(step: _Pass) -> Iterator[Launch]:
    """Go back through the fine maps, to the gradient of x."""
    x, grad, weights, plan, saved, scratch, pooled, *_ = step
    b, h, w, d, width = plan.b, plan.h, plan.w, plan.d, plan.terms
    of_first = of_second = scratch.of_map
    if plan.mixes:
        of_first, of_second = scratch.of_maps, scratch.of_maps[plan.maps :]
    parts = plan.share_out(config.PIXEL_SUMS)[0][1]
    yield plan.shared_out(
        term_gradients.pixel_sums,
        (x, pooled.gates, saved.vectors, scratch.shifts, of_first, of_second, scratch.sums, b, h,
         w),
        config.PIXEL_SUMS,
    )  # fmt: skip
    yield Launch(
        term_gradients.second_term_gradient,
        (scratch.sums, saved.vectors, saved.conv_means, weights.gn_weight, weights.gn_bias,
         scratch.of_score if plan.mixes else None, scratch.of_conv_means, scratch.of_gated,
         scratch.terms, b, parts, plan.pixels, width),
        plan.grid, plan.constants, 2,
    )  # fmt: skip
    rows = b * plan.groups
    yield multiply(
        (scratch.of_conv_means, d, 1), (weights.conv3x3_weight, 9 * d, 1),
        (scratch.of_borders, 9 * d), (rows, 9 * d, d),
    )  # fmt: skip
    yield multiply(
        (scratch.of_conv_means, 1, d), (pooled.borders, 9 * d, 1), (scratch.of_conv3x3, 9 * d),
        (d, 9 * d, rows),
    )  # fmt: skip
    size = config.POOLED_GRADIENT[plan.large]
    has_mean = weights.gamma is not None or plan.controlled
    yield Launch(
        input_gradients.pooled_gradient,
        (x, pooled.gates, saved.vectors, scratch.shifts, scratch.of_gated, scratch.terms,
         of_second, scratch.of_borders, scratch.of_mean if has_mean else None,
         weights.conv1x1_weight, scratch.of_before, scratch.of_pooled, scratch.of_corners, b, h,
         w, width),
        plan.grid, {**plan.walk(size, weights), "PRECISION": config.PRECISION}, size[1],
    )  # fmt: skip
    yield _conv1x1_backward(step)
    has_global_gate = weights.global_reduce_weight is not None
    yield plan.shared_out(
        input_gradients.input_gradient,
        (x, grad, scratch.spatial, *output_factors(weights, saved),
         scratch.of_fused if has_global_gate else None, pooled.gates, saved.vectors,
         scratch.shifts, scratch.of_gated, scratch.terms, scratch.of_corners, pooled.kernel,
         of_first, of_second, scratch.of_pooled, step.grad_x, b, h, w, width),
        config.INPUT_GRADIENT, CONTIGUOUS=step.contiguous,
    )  # fmt: skip


def _conv1x1_backward(step: _Pass) -> Launch:
    """Compute the gradient of conv1x1, by part."""
    plan, scratch = step.plan, step.scratch
    D = plan.tiles.D
    rows = config.CONV1X1[0] // (2 if D > 32 else 1)
    return Launch(
        parameter_gradients.conv1x1_gradient,
        (scratch.of_before, step.pooled.pooled, scratch.of_conv1x1, plan.strips // plan.d),
        (conv1x1_parts(plan),),
        {"d": plan.d, "DP": max(16, D), "N": rows, "PRECISION": config.PRECISION},
        config.CONV1X1[1],
    )


def _add_up(step: _Pass) -> Iterator[Launch]:
    """Add up over the batch: the gradients of all parameters but the gates' weights."""
    weights, plan, scratch, grads = step.weights, step.plan, step.scratch, step.grads
    c, d, K = plan.c, plan.d, plan.candidates
    block = 128
    programs = -(-plan.terms // block)
    if plan.controlled:
        programs += K * -(-c // block)
    yield Launch(
        parameter_gradients.batch_sums,
        (scratch.terms, step.saved.vectors, grads.totals,
         grads.controller if plan.controlled else None, plan.b, plan.terms),
        (programs,), {"C": c, "K": K, "B": 16, "BLOCK": block}, 4,
    )  # fmt: skip
    constants = {
        "C": c, "F": plan.groups, "d": d, "D": plan.tiles.D, "FP": power_of_two(plan.groups),
        "CP": power_of_two(c), **conv3x3_strides(weights), "GAMMA": weights.gamma is not None,
    }  # fmt: skip
    yield Launch(
        parameter_gradients.parameter_gradients,
        (scratch.of_conv1x1, grads.totals, scratch.of_conv3x3, weights.conv3x3_weight,
         weights.conv3x3_bias, weights.gn_bias, grads.shared, conv1x1_parts(plan)),
        (d,), constants, 4,
    )  # fmt: skip
