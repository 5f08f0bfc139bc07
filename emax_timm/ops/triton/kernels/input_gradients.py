"""The gradient of x, and before it those of the pooled rows and columns."""

import triton
import triton.language as tl

from .output import output_factors
from .pooling import mix_channels
from .term_gradients import moved_map
from .tiles import (
    GATED_MEAN,
    SHIFT,
    channels_of_program,
    load_channels,
    load_gate,
    load_kernel,
    load_map,
    load_pixels,
    store_pixels,
)

__all__ = ["input_gradient", "pooled_gradient"]


@triton.jit
def _border_gradients(
    grad_borders, sample, group, inner, mask, k, one,
    F: tl.constexpr, d: tl.constexpr, INPUT: tl.constexpr, TAP: tl.constexpr,
):  # fmt: skip
    """Load the gradient of the mean that the kernel offset k sees, for each pixel: [G, D]."""
    at = grad_borders + (sample * F + group)[:, None] * (9 * d) + inner * INPUT + k * TAP
    return tl.load(at, mask=mask, other=0.0) * one


@triton.jit(do_not_specialize=["samples", "H", "W"])
def pooled_gradient(
    x, gates, vectors, shifts, slopes, terms, grad_second, grad_borders, grad_mean,
    conv1x1_weight, grad_before, grad_pooled, corners, samples, H, W, T,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, WB: tl.constexpr, N: tl.constexpr, INPUT: tl.constexpr, TAP: tl.constexpr,
    STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the pooled rows and columns, [b, h + w, c].

    Through their gates, whose gradients before the sigmoid go to `grad_before`, and through the
    border means and the mean of x. The gradients of the four corners go to `corners` [4, b, c].
    """
    sample, group, group_mask, inner, channel, mask = channels_of_program(
        tl.program_id(0), F, d, D, G
    )
    one = 1.0 / (H * W)
    base = x + sample.to(tl.int64) * H * W * C
    maps = grad_second + sample.to(tl.int64) * H * W * F
    strip = gates + sample * (H + W) * C
    before = grad_before + sample * (H + W) * C
    shift = load_channels(shifts, SHIFT, sample, samples, channel, mask, C)
    shift += load_channels(vectors, GATED_MEAN, sample, samples, channel, mask, C)
    curve = load_channels(slopes, 0, sample, samples, channel, mask, C)
    scale = load_channels(slopes, 1, sample, samples, channel, mask, C)
    mean = tl.load(terms + sample * T + 7 * C + group * d, mask=group_mask, other=0.0) * one
    for left in range(0, W, WB):
        column = left + tl.arange(0, WB)
        column_mask = (column < W)[:, None, None] & mask[None]
        place = (H + column)[:, None, None] * C + channel[None]
        gate_w = tl.load(strip + place, mask=column_mask, other=0.0)
        of_columns = tl.zeros([WB, G, D], tl.float32)
        for top in tl.range(0, H, R, num_stages=STAGES):
            row = top + tl.arange(0, R)
            row_mask = (row < H)[:, None, None] & mask[None]
            of_row = row[:, None, None] * C + channel[None]
            gate_h = tl.load(strip + of_row, mask=row_mask, other=0.0)
            pixel = row[:, None] * W + column[None, :]
            inside = (row < H)[:, None] & (column < W)[None, :]
            at = base + pixel[:, :, None, None] * C + channel[None, None]
            tile_mask = inside[:, :, None, None] & mask[None, None]
            tile = tl.load(at, mask=tile_mask, other=0.0).to(tl.float32)
            of_map = maps + pixel[:, :, None] * F + group[None, None, :]
            map_mask = inside[:, :, None] & group_mask[None, None, :]
            second = tl.load(of_map, mask=map_mask, other=0.0) - mean[None, None]
            gate = gate_h[:, None] * gate_w[None]
            gated = curve[None, None] * (tile * gate - shift[None, None])
            gated += scale[None, None] * second[:, :, :, None]
            product = tl.where(tile_mask, tile * gated, 0.0)
            rows = tl.sum(product * gate_w[None], 1) * gate_h * (1.0 - gate_h)
            if left > 0:
                rows += tl.load(before + of_row, mask=row_mask, other=0.0)
            tl.store(before + of_row, rows, mask=row_mask)
            of_columns += tl.sum(product * gate_h[:, None], 0)
        of_columns *= gate_w * (1.0 - gate_w)
        tl.store(before + place, of_columns, mask=column_mask)
        tl.debug_barrier()  # other threads read them
    t0 = _border_gradients(grad_borders, sample, group, inner, mask, 0, one, F, d, INPUT, TAP)
    t1 = _border_gradients(grad_borders, sample, group, inner, mask, 1, one, F, d, INPUT, TAP)
    t2 = _border_gradients(grad_borders, sample, group, inner, mask, 2, one, F, d, INPUT, TAP)
    t3 = _border_gradients(grad_borders, sample, group, inner, mask, 3, one, F, d, INPUT, TAP)
    t4 = _border_gradients(grad_borders, sample, group, inner, mask, 4, one, F, d, INPUT, TAP)
    t5 = _border_gradients(grad_borders, sample, group, inner, mask, 5, one, F, d, INPUT, TAP)
    t6 = _border_gradients(grad_borders, sample, group, inner, mask, 6, one, F, d, INPUT, TAP)
    t7 = _border_gradients(grad_borders, sample, group, inner, mask, 7, one, F, d, INPUT, TAP)
    t8 = _border_gradients(grad_borders, sample, group, inner, mask, 8, one, F, d, INPUT, TAP)
    to_corner = corners + sample * C + channel
    tl.store(to_corner, t0, mask=mask)
    tl.store(to_corner + samples * C, t2, mask=mask)
    tl.store(to_corner + 2 * samples * C, t6, mask=mask)
    tl.store(to_corner + 3 * samples * C, t8, mask=mask)
    every_row = t0 + t1 + t2 + t3 + t4 + t5 + t6 + t7 + t8
    if grad_mean is not None:
        every_row += tl.load(grad_mean + sample * C + channel, mask=mask, other=0.0) * one
    for start in tl.range(0, H + W, N, num_stages=1):
        place = start + tl.arange(0, N)
        place_mask = place < H + W
        result = mix_channels(
            before, conv1x1_weight, place, place_mask, group, group_mask, inner, channel, mask,
            C, d, D, G, N, d, 1, PRECISION,
        )  # fmt: skip
        is_row = place < H
        result = result / tl.where(is_row, W, H)[:, None, None]
        result += tl.where(is_row[:, None, None], every_row[None], 0.0)
        # The upper offsets miss the last row, the left ones the last column.
        missed = tl.where((place == H - 1)[:, None, None], (t0 + t1 + t2)[None], 0.0)
        missed += tl.where((place == 0)[:, None, None], (t6 + t7 + t8)[None], 0.0)
        missed += tl.where((place == H + W - 1)[:, None, None], (t0 + t3 + t6)[None], 0.0)
        missed += tl.where((place == H)[:, None, None], (t2 + t5 + t8)[None], 0.0)
        address = grad_pooled + sample * (H + W) * C + place[:, None, None] * C + channel[None]
        tl.store(address, result - missed, mask=place_mask[:, None, None] & mask[None])


@triton.jit
def _corner(corners, which, sample, samples, channel, mask, at, C: tl.constexpr):
    """Load the gradient of a corner for the pixels that are it, [P]; zero for all others."""
    address = corners + (which * samples + sample) * C + channel[None]
    address += tl.zeros_like(at)[:, None, None].to(tl.int32)
    return tl.load(address, mask=at[:, None, None] & mask[None], other=0.0)


@triton.jit(do_not_specialize=["samples", "H", "W"])
def input_gradient(
    x, grad, spatial, channel_logits, global_logits, gamma, residual_gate, grad_fused, gates,
    vectors, shifts, slopes, terms, corners, kernel, grad_maps, grad_second, grad_pooled,
    grad_x, samples, H, W, T,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, STAGES: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """Write the gradient of x, where everything meets."""
    sample, group, group_mask, inner, channel, mask = channels_of_program(
        tl.program_id(0), F, d, D, G
    )
    pixels = H * W
    one = 1.0 / pixels
    scale, offset, _, _, _ = output_factors(
        channel_logits, global_logits, gamma, residual_gate, sample, channel, mask, C
    )
    shift = load_channels(shifts, SHIFT, sample, samples, channel, mask, C)
    shift += load_channels(vectors, GATED_MEAN, sample, samples, channel, mask, C)
    curve = load_channels(slopes, 0, sample, samples, channel, mask, C)
    second_scale = load_channels(slopes, 1, sample, samples, channel, mask, C)
    mean = tl.load(terms + sample * T + 7 * C + group * d, mask=group_mask, other=0.0) * one
    k0, k1, k2, k3, k4, k5, k6, k7, k8 = load_kernel(kernel, inner, d)
    if grad_fused is not None:
        pooled = tl.load(grad_fused + sample * C + channel, mask=mask, other=0.0) * one
    strip = gates + sample * (H + W) * C
    of_strip = grad_pooled + sample * (H + W) * C
    step = tl.num_programs(1) * P
    for start in tl.range(tl.program_id(1) * P, pixels, step, num_stages=STAGES):
        pixel = start + tl.arange(0, P)
        inside = pixel < pixels
        row = pixel // W
        column = pixel % W
        tile_mask = inside[:, None, None] & mask[None]
        to_row = row[:, None, None] * C + channel[None]
        to_column = (H + column)[:, None, None] * C + channel[None]
        gate = load_gate(strip, row, column, channel, tile_mask, H, C)
        second = load_map(grad_second, sample, pixel, inside, group, group_mask, pixels, F)
        second = (second - mean[None])[:, :, None]
        tile = load_pixels(x, sample, pixel, inside, channel, mask, pixels, C)
        result = (curve[None] * (tile * gate - shift[None]) + second_scale[None] * second) * gate
        attention = load_map(spatial, sample, pixel, inside, group, group_mask, pixels, F)
        attention = attention[:, :, None]
        tile = load_pixels(grad, sample, pixel, inside, channel, mask, pixels, C)
        result += tile * (scale[None] * attention + offset[None])
        if grad_fused is not None:
            result += pooled[None] * attention
        result += tl.load(of_strip + to_row, mask=tile_mask, other=0.0)
        result += tl.load(of_strip + to_column, mask=tile_mask, other=0.0)
        result += k0[None] * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, 1, H, W, F
        )
        result += k1[None] * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, 0, H, W, F
        )
        result += k2[None] * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, -1, H, W, F
        )
        result += k3[None] * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, 1, H, W, F
        )
        result += k4[None] * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, 0, H, W, F
        )
        result += k5[None] * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, -1, H, W, F
        )
        result += k6[None] * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, 1, H, W, F
        )
        result += k7[None] * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, 0, H, W, F
        )
        result += k8[None] * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, -1, H, W, F
        )
        # The corners that two borders share were subtracted twice.
        bottom = (row == H - 1) & inside
        top = (row == 0) & inside
        right = column == W - 1
        left = column == 0
        result += _corner(corners, 0, sample, samples, channel, mask, bottom & right, C)
        result += _corner(corners, 1, sample, samples, channel, mask, bottom & left, C)
        result += _corner(corners, 2, sample, samples, channel, mask, top & right, C)
        result += _corner(corners, 3, sample, samples, channel, mask, top & left, C)
        store_pixels(grad_x, result, sample, pixel, inside, channel, mask, pixels, C, CONTIGUOUS)
