"""The backward pass: what the forward pass did not save is computed again."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..weights import EMAXWeights, present
from . import backward_kernels, config, forward_kernels
from .config import power_of_two
from .forward import (
    Saved,
    Sizes,
    as_channels_last,
    counts_of,
    mix,
    mixes,
    output_like,
    pool_and_gate,
    prepare,
    share_out,
)
from .launch import launch

__all__ = ["backward"]


class _Pass(NamedTuple):
    """What all steps of a backward pass share."""

    x: Tensor
    """The input, channels_last."""
    weights: EMAXWeights
    sizes: Sizes
    saved: Saved
    spatial: Tensor
    """The spatial attention, [b, h * w, F]."""
    terms: Tensor
    """What is summed over the batch, [b, T]; `backward_kernels` says what its columns are."""


def backward(
    grad: Tensor, x: Tensor, weights: EMAXWeights, noise: Tensor | None, saved: list[Tensor]
) -> dict[str, Tensor]:
    """Run the backward pass: the gradients of x, laid out like x, and of the weights, by name."""
    weights, sizes = prepare(x, weights)
    kept = _named(saved, weights)
    spatial, _, _ = mix(kept.maps, kept.score, kept.vectors, weights, sizes, noise, kept.choice)
    hidden = sum(t.shape[1] for t in (kept.channel_hidden, kept.global_hidden) if t is not None)
    width = 17 * sizes.c + len(weights.config.candidates) + hidden
    terms = spatial.new_empty(sizes.b, width)
    step = _Pass(as_channels_last(x), weights, sizes, kept, spatial, terms)
    grad = as_channels_last(grad.to(x.dtype))

    grad_map, grad_fused, grad_mean, grads = _output_backward(step, grad)
    grad_maps, grad_second, grad_score = grad_map, grad_map, None
    if mixes(weights):
        grad_maps, grad_score = _mixing_backward(step, grad_map)
        grad_maps, grad_second = grad_maps.unbind()
        if weights.controller_weight is not None:
            columns = slice(17 * sizes.c, 17 * sizes.c + len(weights.config.candidates))
            logits = terms[:, columns]
            grads["controller_weight"] = logits.t() @ kept.vectors[0]
            if grad_mean is None:
                grad_mean = logits @ weights.controller_weight
            else:
                grad_mean.addmm_(logits, weights.controller_weight)
    grad_x, shared = _fine_maps_backward(
        step, x, grad, grad_fused, grad_mean, grad_maps, grad_second, grad_score
    )
    totals = terms.sum(0)
    return {"x": grad_x} | grads | _sums(step, totals) | _shared_gradients(step, totals, *shared)


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
    x, weights, sizes, saved, spatial, terms = step
    c, width = sizes.c, terms.shape[1]
    factors = (saved.channel_logits, saved.global_logits, weights.gamma, weights.residual_gate)
    grad_map = torch.empty_like(spatial)
    grad_offset = spatial.new_empty(sizes.b, c)
    tile = sizes.tiles.pixels(config.STREAMING, sizes.pixels)
    launch(
        backward_kernels.output_gradient, (sizes.b * sizes.tiles.blocks,),
        (x, grad, spatial, *factors, grad_map, grad_offset, terms, sizes.h, sizes.w, width),
        {**sizes.constants, "P": tile}, config.STREAMING[1],
    )  # fmt: skip
    grads: dict[str, Tensor] = {}
    grad_fused = grad_mean = None
    if saved.fused is not None:
        grad_fused = _gate_backward(
            step, "global", terms[:, 2 * c : 3 * c], saved.fused, saved.global_hidden, None, grads
        )
    if weights.gamma is not None:
        grad_mean = torch.empty_like(grad_offset)
        block = min(1024, power_of_two(c))
        launch(
            backward_kernels.channel_gate_gradient, (sizes.b, -(-c // block)),
            (grad_offset, grad_fused, saved.vectors, *factors, grad_mean, terms, width),
            {"C": c, "BLOCK": block}, 4,
        )  # fmt: skip
        _gate_backward(
            step, "channel", terms[:, 3 * c : 4 * c], saved.vectors[0], saved.channel_hidden,
            grad_mean, grads,
        )  # fmt: skip
    grid, tile = sizes.grid(config.STREAMING)
    launch(
        backward_kernels.map_gradient, grid,
        (x, spatial, grad_fused, grad_map, sizes.h, sizes.w),
        {**sizes.constants, "P": tile}, config.STREAMING[1],
    )  # fmt: skip
    return grad_map, grad_fused, grad_mean, grads


def _gate_backward(
    step: _Pass, name: str, grad_logits: Tensor, means: Tensor, hidden: Tensor | None,
    add_to: Tensor | None, grads: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """Go back through a squeeze-and-excite gate: the gradient of its means, [b, c].

    The gradients of its weights go to `grads`, those of its hidden units to the terms.
    """
    reduce = getattr(step.weights, f"{name}_reduce_weight").flatten(1)
    expand = getattr(step.weights, f"{name}_expand_weight").flatten(1)
    hidden = present(hidden)
    columns = _hidden_columns(step, name)
    grad_hidden = torch.ops.aten.threshold_backward(grad_logits @ expand, hidden, 0)
    step.terms[:, columns] = grad_hidden
    grads[f"{name}_reduce_weight"] = grad_hidden.t() @ means
    grads[f"{name}_expand_weight"] = grad_logits.t() @ hidden
    if add_to is None:
        return grad_hidden @ reduce
    return add_to.addmm_(grad_hidden, reduce)


def _hidden_columns(step: _Pass, name: str) -> slice:
    """Return the columns of the terms that hold the hidden units of a gate."""
    start = 17 * step.sizes.c + len(step.weights.config.candidates)
    channel = 0 if step.saved.channel_hidden is None else step.saved.channel_hidden.shape[1]
    if name == "channel":
        return slice(start, start + channel)
    return slice(start + channel, step.terms.shape[1])


def _mixing_backward(step: _Pass, grad_map: Tensor) -> tuple[Tensor, Tensor]:
    """Go back through the mixture over group counts.

    Returns:
        The gradients of the fine maps, [2, b, h * w, F], and of the scores, [b, F]. That of the
        logits of the controller goes to the terms.
    """
    _, weights, sizes, saved, _, terms = step
    candidates = weights.config.candidates
    K, b, F = len(candidates), sizes.b, sizes.groups
    padded = max(16, power_of_two(F))
    tile = min(max(16, power_of_two(sizes.pixels)), config.UNMIX[0])
    parts = share_out(sizes.pixels, tile, b * 4)
    grad_maps = torch.empty_like(saved.maps)
    products = grad_map.new_empty(2, b, parts, F, F)
    launch(
        backward_kernels.unmix_groups, (b, parts),
        (grad_map, saved.maps, saved.score, saved.choice, weights.warmup, grad_maps, products, b,
         sizes.pixels),
        {"F": F, "FP": padded, "P": tile, "PRECISION": config.PRECISION}, config.UNMIX[1],
    )  # fmt: skip
    grad_score = torch.empty_like(saved.score)
    counts = counts_of(tuple(candidates), grad_map.device)
    launch(
        backward_kernels.choice_gradient, (b,),
        (products, saved.score, saved.choice, weights.warmup, weights.temperature, saved.softmax,
         counts, grad_score, terms, b, parts, terms.shape[1]),
        {"C": sizes.c, "F": F, "K": K, "KP": power_of_two(K), "FP": padded}, 4,
    )  # fmt: skip
    return grad_maps, grad_score


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
    x, weights, sizes, saved, spatial, terms = step
    b, c, h, w = sizes[:4]
    width, d = terms.shape[1], sizes.tiles.d
    new = spatial.new_empty
    pooled, gates, shifts, borders, kernel = pool_and_gate(x, weights, sizes, False)

    grid, tile = sizes.grid(config.PIXEL_SUMS)
    sums = new(grid[1], b, 11, c)
    launch(
        backward_kernels.pixel_sums, grid,
        (x, gates, saved.vectors, shifts, grad_maps, grad_second, sums, b, h, w),
        {**sizes.constants, "P": tile}, config.PIXEL_SUMS[1],
    )  # fmt: skip
    grad_means, slopes = new(b * sizes.groups, d), new(2, b, c)
    launch(
        backward_kernels.second_term_gradient, (b * sizes.tiles.blocks,),
        (sums, saved.vectors, saved.conv_means, weights.gn_weight, weights.gn_bias, grad_score,
         grad_means, slopes, terms, b, grid[1], sizes.pixels, width),
        sizes.constants, 2,
    )  # fmt: skip
    grad_borders = grad_means @ weights.conv3x3_weight.flatten(1)
    before, grad_pooled = new(2, b, h + w, c).unbind()
    launch(
        backward_kernels.pooled_gradient, (b * sizes.tiles.blocks,),
        (x, gates, saved.vectors, shifts, slopes, terms, grad_second, grad_borders, grad_mean,
         weights.conv1x1_weight, before, grad_pooled, b, h, w, width),
        {**sizes.constants, **sizes.rows}, config.ROWS[1],
    )  # fmt: skip
    grad_x, contiguous = output_like(like)
    grid, tile = sizes.grid(config.INPUT_GRADIENT)
    launch(
        backward_kernels.input_gradient, grid,
        (x, grad, spatial, saved.channel_logits, saved.global_logits, weights.gamma,
         weights.residual_gate, grad_fused, gates, saved.vectors, shifts, slopes, terms,
         grad_borders, kernel, grad_maps, grad_second, grad_pooled, grad_x, b, h, w, width),
        {**sizes.constants, "P": tile, "CONTIGUOUS": contiguous}, config.INPUT_GRADIENT[1],
    )  # fmt: skip
    rows = b * (h + w) * sizes.groups
    parts = max(1, min(256, rows // 256))
    products = new(parts, d, d + 1)
    launch(
        backward_kernels.conv1x1_gradient, (parts,), (before, pooled, products, rows),
        {"d": d, "DP": max(16, sizes.tiles.D), "N": config.CONV1X1[0],
         "PRECISION": config.PRECISION}, config.CONV1X1[1],
    )  # fmt: skip
    return grad_x, (products, grad_means.t() @ borders)


def _shared_gradients(
    step: _Pass, totals: Tensor, products: Tensor, conv3x3_products: Tensor
) -> dict[str, Tensor]:
    """Compute the gradients of the parameters that all fine groups share, by name."""
    weights, sizes = step.weights, step.sizes
    d = sizes.tiles.d
    lengths = {
        "conv1x1_weight": d * d, "conv1x1_bias": d, "conv3x3_weight": 9 * d * d,
        "conv3x3_bias": d, "gn_weight": d, "gn_bias": d,
    }  # fmt: skip
    grads = totals.new_empty(sum(lengths.values()))
    launch(
        backward_kernels.parameter_gradients, (d,),
        (products, totals, conv3x3_products, weights.conv3x3_weight, weights.conv3x3_bias,
         weights.gn_bias, grads, products.shape[0]),
        {"C": sizes.c, "F": sizes.groups, "d": d, "D": sizes.tiles.D,
         "FP": power_of_two(sizes.groups)}, 4,
    )  # fmt: skip
    return dict(zip(lengths, grads.split([*lengths.values()]), strict=True))


def _sums(step: _Pass, totals: Tensor) -> dict[str, Tensor]:
    """Take the gradients that are sums over the batch alone from the totals, by name."""
    weights, c = step.weights, step.sizes.c
    grads = {}
    if weights.residual_gate is not None:
        grads["residual_gate"] = totals[:c]
    if weights.global_reduce_weight is not None:
        grads["global_expand_bias"] = totals[2 * c : 3 * c]
        grads["global_reduce_bias"] = totals[_hidden_columns(step, "global")]
    if weights.gamma is not None:
        grads["gamma"] = totals[c : 2 * c].sum()
        grads["channel_expand_bias"] = totals[3 * c : 4 * c]
        grads["channel_reduce_bias"] = totals[_hidden_columns(step, "channel")]
    if weights.controller_weight is not None and mixes(weights):
        end = 17 * c + len(weights.config.candidates)
        grads["controller_bias"] = totals[17 * c : end]
    return grads
