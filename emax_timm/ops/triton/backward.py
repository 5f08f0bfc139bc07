"""The backward pass: what the forward pass did not save is computed again."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import EMAXWeights, present
from . import backward_kernels, config, products
from .config import power_of_two
from .forward import (
    Saved,
    as_channels_last,
    conv3x3_matrix,
    counts_of,
    mix,
    mixes,
    multiply,
    output_like,
    pool_and_gate,
)
from .plan import Plan, plan_for

__all__ = ["backward"]


class _Pass(NamedTuple):
    """What all steps of a backward pass share."""

    x: Tensor
    """The input, channels_last."""
    weights: EMAXWeights
    plan: Plan
    saved: Saved
    spatial: Tensor
    """The spatial attention, [b, h * w, F]."""
    terms: Tensor
    """What is summed over the batch, [b, T]; `backward_kernels` says what its columns are."""


def backward(
    grad: Tensor, x: Tensor, weights: EMAXWeights, noise: Tensor | None, saved: list[Tensor]
) -> dict[str, Tensor]:
    """Run the backward pass: the gradients of x, laid out like x, and of the weights, by name."""
    weights, plan = plan_for(x, weights, noise, grad)
    kept = _named(saved, weights)
    spatial, _, _ = mix(kept.maps, kept.score, kept.vectors, weights, plan, noise, kept.choice)
    hidden = sum(t.shape[1] for t in (kept.channel_hidden, kept.global_hidden) if t is not None)
    width = 17 * plan.c + len(weights.config.candidates) + hidden
    terms = spatial.new_empty(plan.b, width)
    step = _Pass(as_channels_last(x), weights, plan, kept, spatial, terms)
    grad = as_channels_last(grad.to(x.dtype))

    grad_map, grad_fused, grad_mean, grads = _output_backward(step, grad)
    grad_maps, grad_second, grad_score = grad_map, grad_map, None
    if mixes(weights):
        both, grad_score, grad_mean = _mixing_backward(step, grad_map, grad_mean)
        grad_maps, grad_second = both.unbind()
    grad_x, shared = _fine_maps_backward(
        step, x, grad, grad_fused, grad_mean, grad_maps, grad_second, grad_score
    )
    return {"x": grad_x} | grads | _sums(step, *shared)


def _named(saved: list[Tensor], weights: EMAXWeights) -> Saved:
    """Put the saved tensors back under their names."""
    tensors = iter(saved)
    mixed, channel = mixes(weights), weights.gamma is not None
    controlled = mixed and weights.controller_weight is not None
    global_ = weights.global_reduce_weight is not None
    present = [True] * 4 + [mixed, controlled, channel, channel, global_, global_, global_]
    return Saved(*[next(tensors) if there else None for there in present])  # type: ignore[arg-type]


def _output_backward(
    step: _Pass, grad: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None, dict[str, Tensor]]:
    """Go back through the output and the gates.

    Returns:
        The gradients of the mixed map before its sigmoid, [b, h * w, F], of the means of the fused
        features and of x, [b, c] each, and of the products of the gates, by name.
    """
    x, weights, plan, saved, spatial, terms = step
    c, width = plan.c, terms.shape[1]
    factors = (saved.channel_logits, saved.global_logits, weights.gamma, weights.residual_gate)
    grad_map = torch.empty_like(spatial)
    grad_offset = spatial.new_empty(plan.b, c)
    plan.launch(
        "output_gradient", backward_kernels.output_gradient, plan.samples_grid,
        (x, grad, spatial, *factors, grad_map, grad_offset, terms, plan.h, plan.w, width),
        {**plan.constants, "P": plan.tiles.pixels(config.STREAMING, plan.pixels)},
        config.STREAMING[1],
    )  # fmt: skip
    grads: dict[str, Tensor] = {}
    grad_fused = grad_mean = None
    if saved.fused is not None:
        grad_fused = torch.empty_like(grad_offset)
        _gate_backward(step, "global", saved.fused, grad_fused, False, grads)
    if weights.gamma is not None:
        grad_mean = torch.empty_like(grad_offset)
        block = min(1024, power_of_two(c))
        plan.launch(
            "channel_gate_gradient", backward_kernels.channel_gate_gradient,
            (plan.b, -(-c // block)),
            (grad_offset, grad_fused, saved.vectors, *factors, grad_mean, terms, width),
            {"C": c, "BLOCK": block}, 4,
        )  # fmt: skip
        _gate_backward(step, "channel", saved.vectors[0], grad_mean, True, grads)
    grid, tile = plan.shared_out(config.STREAMING)
    plan.launch(
        "map_gradient", backward_kernels.map_gradient, grid,
        (x, spatial, grad_fused, grad_map, plan.h, plan.w),
        {**plan.constants, "P": tile}, config.STREAMING[1],
    )  # fmt: skip
    return grad_map, grad_fused, grad_mean, grads


def _gate_backward(
    step: _Pass, name: str, means: Tensor, grad_means: Tensor, add: bool, grads: dict[str, Tensor]
) -> None:
    """Go back through a squeeze-and-excite gate, from the gradient of its logits in the terms.

    That of its means goes to `grad_means` [b, c] (with `add` it is added), those of its weights to
    `grads`, and those of its hidden units to the terms.
    """
    _, weights, plan, saved, _, terms = step
    c = plan.c
    reduce = getattr(weights, f"{name}_reduce_weight").flatten(1)
    expand = getattr(weights, f"{name}_expand_weight").flatten(1)
    hidden = present(getattr(saved, f"{name}_hidden"))
    start = 2 * c if name == "global" else 3 * c
    grad_logits = terms[:, start : start + c]
    grad_hidden = terms[:, _hidden_columns(step, name)]
    multiply(plan, f"{name} gradient", grad_logits, expand, mask=hidden, out=grad_hidden)
    r = hidden.shape[1]
    grad_expand, grad_reduce = terms.new_empty(c, r), terms.new_empty(r, c)
    BM, BN, BK = 32, 32, 32
    rows, columns, units = -(-plan.b // BM), -(-c // BN), -(-r // BM)
    plan.launch(
        f"{name} products", products.gate_products, (2 * columns * units + rows * columns,),
        (grad_logits, grad_hidden, means, hidden, reduce, grad_expand, grad_reduce, grad_means,
         plan.b, terms.shape[1]),
        {"C": c, "R": r, "BM": BM, "BN": BN, "BK": BK, "ADD": add,
         "PRECISION": config.PRECISION}, 4,
    )  # fmt: skip
    grads[f"{name}_reduce_weight"], grads[f"{name}_expand_weight"] = grad_reduce, grad_expand


def _hidden_columns(step: _Pass, name: str) -> slice:
    """Return the columns of the terms that hold the hidden units of a gate."""
    start = 17 * step.plan.c + len(step.weights.config.candidates)
    channel = 0 if step.saved.channel_hidden is None else step.saved.channel_hidden.shape[1]
    if name == "channel":
        return slice(start, start + channel)
    return slice(start + channel, step.terms.shape[1])


def _mixing_backward(
    step: _Pass, grad_map: Tensor, grad_mean: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Go back through the mixture over group counts.

    Returns:
        The gradients of the fine maps, [2, b, h * w, F], of the scores, [b, F], and of the mean of
        x, [b, c]. That of the logits of the controller goes to the terms.
    """
    _, weights, plan, saved, _, terms = step
    candidates = weights.config.candidates
    K, b, c, F = len(candidates), plan.b, plan.c, plan.groups
    padded = max(16, power_of_two(F))
    tile = min(max(16, power_of_two(plan.pixels)), config.UNMIX[0])
    parts = config.share_out(plan.pixels, tile, b * 4)
    grad_maps = torch.empty_like(saved.maps)
    sums = grad_map.new_empty(2, b, parts, F, F)
    plan.launch(
        "unmix", backward_kernels.unmix_groups, (b, parts),
        (grad_map, saved.maps, saved.score, saved.choice, weights.warmup, grad_maps, sums, b,
         plan.pixels),
        {"F": F, "FP": padded, "P": tile, "PRECISION": config.PRECISION}, config.UNMIX[1],
    )  # fmt: skip
    grad_score = torch.empty_like(saved.score)
    counts = counts_of(tuple(candidates), grad_map.device)
    add = grad_mean is not None
    if grad_mean is None and weights.controller_weight is not None:
        grad_mean = terms.new_empty(b, c)
    plan.launch(
        "choice", backward_kernels.choice_gradient, (b,),
        (sums, saved.score, saved.choice, weights.warmup, weights.temperature, saved.softmax,
         counts, weights.controller_weight, grad_score, grad_mean, terms, b, parts,
         terms.shape[1]),
        {"C": c, "F": F, "K": K, "KP": power_of_two(K), "FP": padded, "ADD": add}, 4,
    )  # fmt: skip
    return grad_maps, grad_score, grad_mean


def _fine_maps_backward(
    step: _Pass,
    like: Tensor,
    grad: Tensor,
    grad_fused: Tensor | None,
    grad_mean: Tensor | None,
    grad_maps: Tensor,
    grad_second: Tensor,
    grad_score: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Go back through the fine maps.

    Returns:
        The gradient of x, laid out like `like`; and the sums for the gradient of conv1x1 by part,
        [parts, d, d + 1], and the gradient of conv3x3 through its means, [d, d * 9].
    """
    x, weights, plan, saved, spatial, terms = step
    b, c, h, w, d = plan.b, plan.c, plan.h, plan.w, plan.d
    width = terms.shape[1]
    new = terms.new_empty
    pooled, gates, shifts, borders, kernel = pool_and_gate(x, weights, plan, False)
    matrix, strides = conv3x3_matrix(weights)

    grid, tile = plan.shared_out(config.PIXEL_SUMS)
    sums = new(grid[1], b, 11, c)
    plan.launch(
        "pixel_sums", backward_kernels.pixel_sums, grid,
        (x, gates, saved.vectors, shifts, grad_maps, grad_second, sums, b, h, w),
        {**plan.constants, "P": tile}, config.PIXEL_SUMS[1],
    )  # fmt: skip
    grad_means, slopes = new(b * plan.groups, d), new(2, b, c)
    plan.launch(
        "second_term_gradient", backward_kernels.second_term_gradient, plan.samples_grid,
        (sums, saved.vectors, saved.conv_means, weights.gn_weight, weights.gn_bias, grad_score,
         grad_means, slopes, terms, b, grid[1], plan.pixels, width),
        plan.constants, 2,
    )  # fmt: skip
    grad_borders = multiply(plan, "borders", grad_means, matrix)
    before, grad_pooled = new(b, h + w, c), new(b, h + w, c)
    plan.launch(
        "pooled_gradient", backward_kernels.pooled_gradient, plan.samples_grid,
        (x, gates, saved.vectors, shifts, slopes, terms, grad_second, grad_borders, grad_mean,
         weights.conv1x1_weight, before, grad_pooled, b, h, w, width),
        {**plan.constants, **plan.rows, **strides, "PRECISION": config.PRECISION},
        config.ROWS[1],
    )  # fmt: skip
    grad_x, contiguous = output_like(like)
    grid, tile = plan.shared_out(config.INPUT_GRADIENT)
    plan.launch(
        "input_gradient", backward_kernels.input_gradient, grid,
        (x, grad, spatial, saved.channel_logits, saved.global_logits, weights.gamma,
         weights.residual_gate, grad_fused, gates, saved.vectors, shifts, slopes, terms,
         grad_borders, kernel, grad_maps, grad_second, grad_pooled, grad_x, b, h, w, width),
        {**plan.constants, "P": tile, **strides, "CONTIGUOUS": contiguous},
        config.INPUT_GRADIENT[1],
    )  # fmt: skip
    rows = b * (h + w) * plan.groups
    parts = max(1, min(256, rows // 256))
    by_part = new(parts, d, d + 1)
    plan.launch(
        "conv1x1_gradient", backward_kernels.conv1x1_gradient, (parts,),
        (before, pooled, by_part, rows),
        {"d": d, "DP": max(16, plan.tiles.D), "N": config.CONV1X1[0],
         "PRECISION": config.PRECISION}, config.CONV1X1[1],
    )  # fmt: skip
    return grad_x, (by_part, grad_means.t() @ borders)


def _sums(step: _Pass, by_part: Tensor, conv3x3_products: Tensor) -> dict[str, Tensor]:
    """Add up over the batch, and return the gradients of all parameters but the gates' weights."""
    _, weights, plan, saved, _, terms = step
    b, c, d = plan.b, plan.c, plan.d
    K = len(weights.config.candidates)
    controlled = mixes(weights) and weights.controller_weight is not None
    totals = terms.new_empty(terms.shape[1])
    grad_controller = terms.new_empty(K, c) if controlled else None
    block = 128
    programs = -(-terms.shape[1] // block) + (K * -(-c // block) if controlled else 0)
    plan.launch(
        "batch_sums", products.batch_sums, (programs,),
        (terms, saved.vectors, totals, grad_controller, b, terms.shape[1]),
        {"C": c, "K": K, "B": 16, "BLOCK": block}, 4,
    )  # fmt: skip
    grads = _shared_gradients(step, totals, by_part, conv3x3_products)
    if controlled:
        grads["controller_weight"] = present(grad_controller)
        grads["controller_bias"] = totals[17 * c : 17 * c + K]
    if weights.residual_gate is not None:
        grads["residual_gate"] = totals[:c]
    if weights.global_reduce_weight is not None:
        grads["global_expand_bias"] = totals[2 * c : 3 * c]
        grads["global_reduce_bias"] = totals[_hidden_columns(step, "global")]
    if weights.gamma is not None:
        grads["channel_expand_bias"] = totals[3 * c : 4 * c]
        grads["channel_reduce_bias"] = totals[_hidden_columns(step, "channel")]
    return grads


def _shared_gradients(
    step: _Pass, totals: Tensor, by_part: Tensor, conv3x3_products: Tensor
) -> dict[str, Tensor]:
    """Compute the gradients of gamma and of what all fine groups share, by name."""
    weights, plan = step.weights, step.plan
    d = plan.d
    matrix, strides = conv3x3_matrix(weights)
    lengths = {
        "conv1x1_weight": d * d, "conv1x1_bias": d, "conv3x3_weight": 9 * d * d,
        "conv3x3_bias": d, "gn_weight": d, "gn_bias": d, "gamma": 1,
    }  # fmt: skip
    together = totals.new_empty(sum(lengths.values()))
    plan.launch(
        "parameter_gradients", backward_kernels.parameter_gradients, (d,),
        (by_part, totals, conv3x3_products, matrix, weights.conv3x3_bias, weights.gn_bias,
         together, by_part.shape[0]),
        {"C": plan.c, "F": plan.groups, "d": d, "D": plan.tiles.D,
         "FP": power_of_two(plan.groups), "CP": power_of_two(plan.c), **strides,
         "GAMMA": weights.gamma is not None}, 4,
    )  # fmt: skip
    grads = dict(zip(lengths, together.split([*lengths.values()]), strict=True))
    if strides["TAP"] != 1:
        grads["conv3x3_weight"] = grads["conv3x3_weight"].view(d, 3, 3, d).permute(0, 3, 1, 2)
    if weights.gamma is None:
        del grads["gamma"]
    return grads
