"""The gradients of the two terms of the fine maps, summed over the pixels."""

import triton
import triton.language as tl

from .tiles import (
    GATED_MEAN,
    RSTD,
    SHIFT,
    channels_of_program,
    kernel_offset_mask,
    load_channels,
    load_gate,
    load_map,
    load_pixels,
    softmax_of_means,
)

__all__ = ["moved_map", "pixel_sums", "second_term_gradient"]


@triton.jit
def moved_map(
    maps, sample, pixel, inside, group, group_mask, row, column, dy, dx, H, W, F: tl.constexpr
):
    """Load what the neighbours at the offset (dy, dx) have of a map: [P, G, 1]."""
    near = kernel_offset_mask(row, column, dy, dx, H, W) & inside
    return load_map(
        maps, sample, pixel + dy * W + dx, near, group, group_mask, H * W, F
    )[:, :, None]  # fmt: skip


@triton.jit(do_not_specialize=["samples", "H", "W"])
def pixel_sums(
    x, gates, vectors, shifts, grad_maps, grad_second, sums, samples, H, W,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum over the pixels of a program what the gradients of the second term and the kernel need.

    Into sums [parts, b, 11, c]: the deviations times the gradient of the second map; that gradient;
    and x times the gradient of the first map as each of the nine kernel offsets sees it.
    """
    sample, group, group_mask, _, channel, mask = channels_of_program(tl.program_id(0), F, d, D, G)
    pixels = H * W
    shift = load_channels(shifts, SHIFT, sample, samples, channel, mask, C)
    shift += load_channels(vectors, GATED_MEAN, sample, samples, channel, mask, C)
    strip = gates + sample * (H + W) * C
    zero = tl.zeros([P, G, D], tl.float32)
    k0, k1, k2, k3, k4, k5, k6, k7, k8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    with_second = zero
    second_sum = tl.zeros([P, G], tl.float32)
    step = tl.num_programs(1) * P
    for start in tl.range(tl.program_id(1) * P, pixels, step, num_stages=STAGES):
        pixel = start + tl.arange(0, P)
        inside = pixel < pixels
        row = pixel // W
        column = pixel % W
        tile_mask = inside[:, None, None] & mask[None]
        tile = load_pixels(x, sample, pixel, inside, channel, mask, pixels, C)
        gate = load_gate(strip, row, column, channel, tile_mask, H, C)
        second = load_map(grad_second, sample, pixel, inside, group, group_mask, pixels, F)
        deviation = tl.where(tile_mask, tile * gate - shift[None], 0.0)
        with_second += deviation * second[:, :, None]
        second_sum += second
        # What an output pixel takes from the offset (dy, dx) comes back from (-dy, -dx).
        k0 += tile * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, 1, H, W, F
        )
        k1 += tile * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, 0, H, W, F
        )
        k2 += tile * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, -1, H, W, F
        )
        k3 += tile * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, 1, H, W, F
        )
        k4 += tile * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, 0, H, W, F
        )
        k5 += tile * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, -1, H, W, F
        )
        k6 += tile * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, 1, H, W, F
        )
        k7 += tile * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, 0, H, W, F
        )
        k8 += tile * moved_map(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, -1, H, W, F
        )
    to = sums + (tl.program_id(1) * samples + sample) * 11 * C + channel
    tl.store(to, tl.sum(with_second, 0), mask=mask)
    tl.store(to + C, tl.sum(second_sum, 0)[:, None] + tl.zeros([G, D], tl.float32), mask=mask)
    tl.store(to + 2 * C, tl.sum(k0, 0), mask=mask)
    tl.store(to + 3 * C, tl.sum(k1, 0), mask=mask)
    tl.store(to + 4 * C, tl.sum(k2, 0), mask=mask)
    tl.store(to + 5 * C, tl.sum(k3, 0), mask=mask)
    tl.store(to + 6 * C, tl.sum(k4, 0), mask=mask)
    tl.store(to + 7 * C, tl.sum(k5, 0), mask=mask)
    tl.store(to + 8 * C, tl.sum(k6, 0), mask=mask)
    tl.store(to + 9 * C, tl.sum(k7, 0), mask=mask)
    tl.store(to + 10 * C, tl.sum(k8, 0), mask=mask)


@triton.jit(do_not_specialize=["samples", "parts", "pixels"])
def second_term_gradient(
    sums, vectors, conv_means, gn_weight, gn_bias, grad_score, grad_means, slopes, terms,
    samples, parts, pixels, T,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    """Add up the sums, and compute the gradients of the second term's inputs but for the features.

    Into slopes [2, b, c]: what the deviations and the gradient of the second map are multiplied
    with in the gradient of the gated features; see `gated_gradient`.
    """
    sample, group, group_mask, inner, channel, mask = channels_of_program(
        tl.program_id(0), F, d, D, G
    )
    to = terms + sample * T + channel
    with_second = tl.zeros([G, D], tl.float32)
    total = tl.zeros([G, D], tl.float32)
    for part in range(parts):
        at = sums + (part * samples + sample) * 11 * C + channel
        with_second += tl.load(at, mask=mask, other=0.0)
        total += tl.load(at + C, mask=mask, other=0.0)
    for k in range(9):
        tap = tl.zeros([G, D], tl.float32)
        for part in range(parts):
            at = sums + (part * samples + sample) * 11 * C + channel
            tap += tl.load(at + (2 + k) * C, mask=mask, other=0.0)
        tl.store(to + (8 + k) * C, tap, mask=mask)
    weight = tl.load(gn_weight + inner, mask=inner < d, other=0.0).to(tl.float32)
    bias = tl.load(gn_bias + inner, mask=inner < d, other=0.0).to(tl.float32)
    means = tl.load(conv_means + sample * C + channel, mask=mask, other=0.0)
    softmax, _ = softmax_of_means(means, mask)
    rstd = load_channels(vectors, RSTD, sample, samples, channel, mask, C)
    of_softmax = with_second * weight * rstd + bias * total
    mean = tl.sum(softmax * of_softmax, 1)
    if grad_score is not None:
        mean -= tl.load(grad_score + sample * F + group, mask=group_mask, other=0.0)
    of_means = softmax * (of_softmax - mean[:, None])
    place = sample * C + channel
    tl.store(grad_means + place, of_means, mask=mask)
    curve = -with_second * softmax * weight * rstd * rstd * rstd / pixels
    tl.store(slopes + place, curve, mask=mask)
    tl.store(slopes + samples * C + place, softmax * weight * rstd, mask=mask)
    tl.store(to + 4 * C, with_second * softmax * rstd, mask=mask)
    tl.store(to + 5 * C, softmax * total, mask=mask)
    tl.store(to + 6 * C, of_means, mask=mask)
    tl.store(to + 7 * C, total, mask=mask)
