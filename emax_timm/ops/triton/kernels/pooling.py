"""The first kernel of both passes: what follows from one sample and one group alone."""

import triton
import triton.language as tl

from .output import output_factors
from .tiles import GATED_MEAN, MEAN, RSTD, SHIFT, channels_of_program

__all__ = ["mix_channels", "pool_and_gate"]


@triton.jit
def _first_kernel(
    conv3x3_weight, conv3x3_bias, gn_bias, kernel,
    d: tl.constexpr, D: tl.constexpr, INPUT: tl.constexpr, TAP: tl.constexpr,
):  # fmt: skip
    """Write the kernel of the first term, [9, d], and behind it the offset: one value."""
    OUTPUTS: tl.constexpr = 16
    TAPS: tl.constexpr = 16 * D
    taps = tl.arange(0, TAPS)
    taps_mask = taps < 9 * d
    inner = tl.arange(0, D)
    bias = tl.load(gn_bias + inner, mask=inner < d, other=float("-inf")).to(tl.float32)
    highest = tl.max(bias, 0)
    total = tl.sum(tl.exp(bias - highest), 0)
    sums = tl.zeros([TAPS], tl.float32)
    offset = 0.0
    for start in range(0, d, OUTPUTS):
        o = start + tl.arange(0, OUTPUTS)
        o_mask = o < d
        logits = tl.load(gn_bias + o, mask=o_mask, other=float("-inf")).to(tl.float32)
        constant = tl.exp(logits - highest) / total
        address = conv3x3_weight + o[:, None] * (9 * d) + taps[None, :]
        weight = tl.load(address, mask=o_mask[:, None] & taps_mask[None, :], other=0.0)
        sums += tl.sum(constant[:, None] * weight.to(tl.float32), 0)
        offset += tl.sum(constant * tl.load(conv3x3_bias + o, mask=o_mask, other=0.0), 0)
    # The weight is [d, d, 9] or [d, 9, d] in memory.
    tap = (taps // TAP) % 9
    tl.store(kernel + tap * d + (taps // INPUT) % d, sums, mask=taps_mask)
    tl.store(kernel + 9 * d, offset)


@triton.jit
def _pool(
    x, grad, spatial, grad_spatial, scale, pooled, sample, group, group_mask, channel, mask, H, W,
    C: tl.constexpr, F: tl.constexpr, D: tl.constexpr, G: tl.constexpr, R: tl.constexpr,
    WB: tl.constexpr, STAGES: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Write the means over w and over h of one sample, and return the means over both, [G, D].

    BACKWARD reads the gradient of the output as well, in the same pass over x: it writes the
    gradient of S, as far as it comes from the output, and returns the sums of x * grad * S and of
    x * grad.
    """
    base = x + sample.to(tl.int64) * H * W * C
    strip = pooled + sample * (H + W) * C
    if BACKWARD:
        of_output = grad + sample.to(tl.int64) * H * W * C
        attention = spatial + sample.to(tl.int64) * H * W * F
        of_attention = grad_spatial + sample.to(tl.int64) * H * W * F
    mean = tl.zeros([G, D], tl.float32)
    with_map = tl.zeros([WB, G, D], tl.float32)
    without = tl.zeros([WB, G, D], tl.float32)
    for left in range(0, W, WB):
        column = left + tl.arange(0, WB)
        sums = tl.zeros([WB, G, D], tl.float32)
        for top in tl.range(0, H, R, num_stages=STAGES):
            row = top + tl.arange(0, R)
            pixel = row[:, None] * W + column[None, :]
            inside = (row < H)[:, None] & (column < W)[None, :]
            at = pixel[:, :, None, None] * C + channel[None, None]
            tile_mask = inside[:, :, None, None] & mask[None, None]
            tile = tl.load(base + at, mask=tile_mask, other=0.0).to(tl.float32)
            rows = tl.sum(tile, 1)
            to_row = strip + row[:, None, None] * C + channel[None]
            row_mask = (row < H)[:, None, None] & mask[None]
            if left > 0:
                rows += tl.load(to_row, mask=row_mask, other=0.0)
            if left + WB >= W:
                rows = rows / W
            tl.store(to_row, rows, mask=row_mask)
            sums += tl.sum(tile, 0)
            if BACKWARD:
                tile *= tl.load(of_output + at, mask=tile_mask, other=0.0).to(tl.float32)
                place = pixel[:, :, None] * F + group[None, None, :]
                map_mask = inside[:, :, None] & group_mask[None, None, :]
                here = tl.load(attention + place, mask=map_mask, other=0.0)
                with_map += tl.sum(tile * here[:, :, :, None], 0)
                without += tl.sum(tile, 0)
                weighted = tl.sum(tile * scale[None, None], 3)
                tl.store(of_attention + place, weighted, mask=map_mask)
        means = sums / H
        to_column = strip + (H + column)[:, None, None] * C + channel[None]
        tl.store(to_column, means, mask=(column < W)[:, None, None] & mask[None])
        mean += tl.sum(means, 0)
        # The next block of columns adds to rows that other threads may have written.
        tl.debug_barrier()
    return mean / W, tl.sum(with_map, 0), tl.sum(without, 0)


@triton.jit
def mix_channels(
    strip, weight, place, place_mask, group, group_mask, inner, channel, mask,
    C: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    OF: tl.constexpr, INTO: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply pooled values with a matrix over the channels of a group: [N, G, D].

    Args:
        strip: The pooled rows and columns of a sample, [h + w, c].
        weight: The matrix; the entry for input i and output o is at i * OF + o * INTO.
        place, place_mask: The rows and columns to take, [N], and which of them exist.
        group, group_mask: The groups, [G], and which of them exist.
        inner, channel, mask: The channels, as `channels_of_program` returns them.
        C, d: The numbers of channels, of x and of a group.
        D, G, N: The sizes of the result.
        OF, INTO: The strides of the matrix.
        PRECISION: That of the product.
    """
    if D >= 16 and N * G >= 16:
        address = strip + place[:, None, None] * C + channel[None]
        value = tl.load(address, mask=place_mask[:, None, None] & mask[None], other=0.0)
        of = tl.arange(0, D)[:, None]
        at = weight + of * OF + inner * INTO
        matrix = tl.load(at, mask=(of < d) & (inner < d), other=0.0).to(tl.float32)
        flat = tl.reshape(value, [N * G, D])
        total = tl.reshape(tl.dot(flat, matrix, input_precision=PRECISION), [N, G, D])
    else:
        total = tl.zeros([N, G, D], tl.float32)
        for i in range(d):
            factor = tl.load(weight + i * OF + inner * INTO, mask=inner < d, other=0.0)
            address = strip + place[:, None] * C + (group * d + i)[None, :]
            value = tl.load(address, mask=place_mask[:, None] & group_mask[None, :], other=0.0)
            total += factor[None].to(tl.float32) * value[:, :, None]
    return total


@triton.jit
def _gate(
    conv1x1_weight, conv1x1_bias, pooled, gates, sample, group, group_mask, inner, channel, mask,
    mean, H, W, C: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the gates of the pooled rows and columns, and return the shift of the deviations."""
    strip = pooled + sample * (H + W) * C
    over_rows = tl.zeros([G, D], tl.float32)
    over_columns = tl.zeros([G, D], tl.float32)
    bias = tl.load(conv1x1_bias + inner, mask=inner < d, other=0.0).to(tl.float32)
    for start in tl.range(0, H + W, N, num_stages=1):
        place = start + tl.arange(0, N)
        place_mask = place < H + W
        before = mix_channels(
            strip, conv1x1_weight, place, place_mask, group, group_mask, inner, channel, mask,
            C, d, D, G, N, 1, d, PRECISION,
        )  # fmt: skip
        gate = 1.0 / (1.0 + tl.exp(-before - bias[None]))
        address = gates + sample * (H + W) * C + place[:, None, None] * C + channel[None]
        tl.store(address, gate, mask=place_mask[:, None, None] & mask[None])
        is_row = place < H
        is_column = place_mask & (place >= H)
        over_rows += tl.sum(tl.where(is_row[:, None, None], gate, 0.0), 0)
        over_columns += tl.sum(tl.where(is_column[:, None, None], gate, 0.0), 0)
    return mean * (over_columns / W) * (over_rows / H)


@triton.jit
def _border_means(
    x, pooled, borders, mean, sample, group, inner, channel, mask, H, W,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, INPUT: tl.constexpr, TAP: tl.constexpr,
):  # fmt: skip
    """Write what each of the nine kernel offsets sees of x on average, in the order of conv3x3."""
    one = 1.0 / (H * W)
    strip = pooled + sample * (H + W) * C + channel
    base = x + sample.to(tl.int64) * H * W * C + channel
    last_row = tl.load(strip + (H - 1) * C, mask=mask, other=0.0) / H
    first_row = tl.load(strip, mask=mask, other=0.0) / H
    last_column = tl.load(strip + (H + W - 1) * C, mask=mask, other=0.0) / W
    first_column = tl.load(strip + H * C, mask=mask, other=0.0) / W
    bottom_right = tl.load(base + (H * W - 1) * C, mask=mask, other=0.0).to(tl.float32) * one
    bottom_left = tl.load(base + (H - 1) * W * C, mask=mask, other=0.0).to(tl.float32) * one
    top_right = tl.load(base + (W - 1) * C, mask=mask, other=0.0).to(tl.float32) * one
    top_left = tl.load(base, mask=mask, other=0.0).to(tl.float32) * one
    # The upper offsets miss the last row, the left ones the last column; the common corner is
    # subtracted twice and added back.
    to = borders + (sample * F + group)[:, None] * (9 * d) + inner * INPUT
    tl.store(to, mean - last_row - last_column + bottom_right, mask=mask)
    tl.store(to + 1 * TAP, mean - last_row, mask=mask)
    tl.store(to + 2 * TAP, mean - last_row - first_column + bottom_left, mask=mask)
    tl.store(to + 3 * TAP, mean - last_column, mask=mask)
    tl.store(to + 4 * TAP, mean, mask=mask)
    tl.store(to + 5 * TAP, mean - first_column, mask=mask)
    tl.store(to + 6 * TAP, mean - first_row - last_column + top_right, mask=mask)
    tl.store(to + 7 * TAP, mean - first_row, mask=mask)
    tl.store(to + 8 * TAP, mean - first_row - first_column + top_left, mask=mask)


@triton.jit
def _moments(
    x, gates, sample, channel, mask, shift, H, W,
    C: tl.constexpr, D: tl.constexpr, G: tl.constexpr, R: tl.constexpr, WB: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Return the mean and the variance of the deviations of one sample, [G, D] each."""
    base = x + sample.to(tl.int64) * H * W * C
    strip = gates + sample * (H + W) * C
    sums = tl.zeros([R, WB, G, D], tl.float32)
    squares = tl.zeros([R, WB, G, D], tl.float32)
    for left in range(0, W, WB):
        column = left + tl.arange(0, WB)
        of_column = strip + (H + column)[:, None, None] * C + channel[None]
        gate_w = tl.load(of_column, mask=(column < W)[:, None, None] & mask[None], other=0.0)
        for top in tl.range(0, H, R, num_stages=STAGES):
            row = top + tl.arange(0, R)
            of_row = strip + row[:, None, None] * C + channel[None]
            gate_h = tl.load(of_row, mask=(row < H)[:, None, None] & mask[None], other=0.0)
            pixel = row[:, None] * W + column[None, :]
            inside = (row < H)[:, None] & (column < W)[None, :]
            at = base + pixel[:, :, None, None] * C + channel[None, None]
            tile_mask = inside[:, :, None, None] & mask[None, None]
            tile = tl.load(at, mask=tile_mask, other=0.0).to(tl.float32)
            deviation = tile * (gate_h[:, None] * gate_w[None]) - shift[None, None]
            deviation = tl.where(tile_mask, deviation, 0.0)
            sums += deviation
            squares += deviation * deviation
    one = 1.0 / (H * W)
    mean = tl.sum(tl.sum(sums, 0), 0) * one
    square = tl.sum(tl.sum(squares, 0), 0) * one
    return mean, tl.maximum(square - mean * mean, 0.0)


@triton.jit
def _output_gradient(
    with_map, without, global_, branch, residual_gate, grad_offset, terms, sample, channel, mask,
    T, C: tl.constexpr,
):  # fmt: skip
    """Write the gradients of the offset, of the residual gate and of the global gate's logits.

    From the gradients of x * S and of x, summed over the pixels, [G, D] each.
    """
    of_scale = with_map + without * branch
    tl.store(grad_offset + sample * C + channel, without, mask=mask)
    to = terms + sample * T + channel
    of_global = of_scale
    if residual_gate is not None:
        tl.store(to, of_scale * global_ - without, mask=mask)
        alpha = tl.load(residual_gate + channel, mask=mask, other=0.0).to(tl.float32)
        of_global = of_scale * alpha
    tl.store(to + 2 * C, of_global * global_ * (1.0 - global_), mask=mask)


@triton.jit(do_not_specialize=["samples", "H", "W"])
def pool_and_gate(
    x, conv1x1_weight, conv1x1_bias, conv3x3_weight, conv3x3_bias, gn_bias,
    pooled, gates, vectors, borders, kernel, grad, spatial, channel_logits, global_logits, gamma,
    residual_gate, grad_spatial, grad_offset, terms, samples, H, W, T, eps,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    R: tl.constexpr, WB: tl.constexpr, N: tl.constexpr, INPUT: tl.constexpr, TAP: tl.constexpr,
    STAGES: tl.constexpr, BACKWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute what a program can know of x from its own channels alone.

    The pooled rows and columns, their gates, the shift of the deviations and the border means. In
    the forward pass also the moments of the gated features; in the backward pass, for which
    the tensors from `grad` on are, the gradients of the output's factors. One program more writes
    the kernel.
    """
    if tl.program_id(0) == 0:
        _first_kernel(conv3x3_weight, conv3x3_bias, gn_bias, kernel, d, D, INPUT, TAP)
    else:
        sample, group, group_mask, inner, channel, mask = channels_of_program(
            tl.program_id(0) - 1, F, d, D, G
        )
        scale = tl.zeros([G, D], tl.float32)
        if BACKWARD:
            scale, _, global_, branch, _ = output_factors(
                channel_logits, global_logits, gamma, residual_gate, sample, channel, mask, C
            )
        mean, with_map, without = _pool(
            x, grad, spatial, grad_spatial, scale, pooled, sample, group, group_mask, channel,
            mask, H, W, C, F, D, G, R, WB, STAGES, BACKWARD,
        )  # fmt: skip
        to = vectors + sample * C + channel
        tl.store(to + MEAN * samples * C, mean, mask=mask)
        shift = _gate(
            conv1x1_weight, conv1x1_bias, pooled, gates, sample, group, group_mask, inner,
            channel, mask, mean, H, W, C, d, D, G, N, PRECISION,
        )  # fmt: skip
        tl.store(to + SHIFT * samples * C, shift, mask=mask)
        _border_means(
            x, pooled, borders, mean, sample, group, inner, channel, mask, H, W, C, F, d, INPUT,
            TAP,
        )  # fmt: skip
        if BACKWARD:
            _output_gradient(
                with_map, without, global_, branch, residual_gate, grad_offset, terms, sample,
                channel, mask, T, C,
            )  # fmt: skip
        else:
            tl.debug_barrier()  # the gates are written by other threads
            gated_mean, variance = _moments(
                x, gates, sample, channel, mask, shift, H, W, C, D, G, R, WB, STAGES
            )
            tl.store(to + GATED_MEAN * samples * C, gated_mean, mask=mask)
            tl.store(to + RSTD * samples * C, tl.rsqrt(variance + eps), mask=mask)
