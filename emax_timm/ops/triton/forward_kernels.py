"""The kernels of the forward pass, in the order in which they run.

`tiles.py` says what a tile is and how the tensors lie in memory. Shapes and what is computed are
those of `ops/portable/fine_maps.py` and `ops/portable/forward.py`; `docs/emax.md` proves the
shortcuts. A tensor of a part that a layer lacks is None.
"""

import triton
import triton.language as tl

from .tiles import (
    channels_of_program,
    kernel_offset_mask,
    load_channels,
    load_map,
    load_pixels,
    softmax_of_means,
)

__all__ = [
    "apply_attention",
    "fine_maps",
    "group_count",
    "group_matrices",
    "mix_channels",
    "mix_groups",
    "output_factors",
    "pool_and_gate",
    "pool_attended",
    "store_pixels",
    "vote",
]

# The order of the vectors in the stack [4, b, c] that `pool_and_gate` writes.
MEAN = tl.constexpr(0)
SHIFT = tl.constexpr(1)
GATED_MEAN = tl.constexpr(2)
RSTD = tl.constexpr(3)


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


@triton.jit
def _seen(
    x, kernel, sample, pixel, inside, channel, mask, row, column, dy, dx, H, W, C: tl.constexpr
):
    """Return the neighbours of pixels at a kernel offset times that offset's weights."""
    near = kernel_offset_mask(row, column, dy, dx, H, W) & inside
    tile = load_pixels(x, sample, pixel + dy * W + dx, near, channel, mask, H * W, C)
    return tile * kernel[None]


@triton.jit(do_not_specialize=["samples", "H", "W"])
def fine_maps(
    x, gates, vectors, conv_means, gn_weight, gn_bias, kernel, maps, score, samples, H, W,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the two cross-spatial terms of the finest groups, and the scores of the groups."""
    sample, group, group_mask, inner, channel, mask = channels_of_program(
        tl.program_id(0), F, d, D, G
    )
    pixels = H * W
    exists = inner < d
    weight = tl.load(gn_weight + inner, mask=exists, other=0.0)
    bias = tl.load(gn_bias + inner, mask=exists, other=0.0)
    means = tl.load(conv_means + sample * C + channel, mask=mask, other=0.0)
    softmax, logsumexp = softmax_of_means(means, mask)
    if tl.program_id(1) == 0:
        tl.store(score + sample * F + group, logsumexp, mask=group_mask)
    scale = softmax * weight * load_channels(vectors, RSTD, sample, samples, channel, mask, C)
    shift = load_channels(vectors, SHIFT, sample, samples, channel, mask, C)
    shift += load_channels(vectors, GATED_MEAN, sample, samples, channel, mask, C)
    level = tl.sum(softmax * bias, 1)
    offset = tl.load(kernel + 9 * d)
    k0 = tl.load(kernel + inner, mask=exists, other=0.0)
    k1 = tl.load(kernel + d + inner, mask=exists, other=0.0)
    k2 = tl.load(kernel + 2 * d + inner, mask=exists, other=0.0)
    k3 = tl.load(kernel + 3 * d + inner, mask=exists, other=0.0)
    k4 = tl.load(kernel + 4 * d + inner, mask=exists, other=0.0)
    k5 = tl.load(kernel + 5 * d + inner, mask=exists, other=0.0)
    k6 = tl.load(kernel + 6 * d + inner, mask=exists, other=0.0)
    k7 = tl.load(kernel + 7 * d + inner, mask=exists, other=0.0)
    k8 = tl.load(kernel + 8 * d + inner, mask=exists, other=0.0)
    strip = gates + sample * (H + W) * C
    step = tl.num_programs(1) * P
    for start in tl.range(tl.program_id(1) * P, pixels, step, num_stages=STAGES):
        pixel = start + tl.arange(0, P)
        inside = pixel < pixels
        row = pixel // W
        column = pixel % W
        tile_mask = inside[:, None, None] & mask[None]
        gate = tl.load(strip + row[:, None, None] * C + channel[None], mask=tile_mask, other=0.0)
        address = strip + (H + column)[:, None, None] * C + channel[None]
        gate *= tl.load(address, mask=tile_mask, other=0.0)
        tile = load_pixels(x, sample, pixel, inside, channel, mask, pixels, C)
        deviation = tl.where(tile_mask, tile * gate - shift[None], 0.0)
        to = maps + sample.to(tl.int64) * pixels * F + pixel[:, None] * F + group[None, :]
        map_mask = inside[:, None] & group_mask[None, :]
        second = tl.sum(scale[None] * deviation, 2) + level[None, :]
        tl.store(to + samples.to(tl.int64) * pixels * F, second, mask=map_mask)
        sums = tile * k4[None]
        sums += _seen(x, k0, sample, pixel, inside, channel, mask, row, column, -1, -1, H, W, C)
        sums += _seen(x, k1, sample, pixel, inside, channel, mask, row, column, -1, 0, H, W, C)
        sums += _seen(x, k2, sample, pixel, inside, channel, mask, row, column, -1, 1, H, W, C)
        sums += _seen(x, k3, sample, pixel, inside, channel, mask, row, column, 0, -1, H, W, C)
        sums += _seen(x, k5, sample, pixel, inside, channel, mask, row, column, 0, 1, H, W, C)
        sums += _seen(x, k6, sample, pixel, inside, channel, mask, row, column, 1, -1, H, W, C)
        sums += _seen(x, k7, sample, pixel, inside, channel, mask, row, column, 1, 0, H, W, C)
        sums += _seen(x, k8, sample, pixel, inside, channel, mask, row, column, 1, 1, H, W, C)
        tl.store(to, tl.sum(sums, 2) + offset, mask=map_mask)


@triton.jit
def _choose(
    vectors, controller_weight, controller_bias, noise, temperature, sample,
    C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Return the softmax over the candidates of a sample, [KP], and the first of the greatest."""
    CB: tl.constexpr = 128
    candidate = tl.arange(0, KP)
    exists = candidate < K
    products = tl.zeros([KP, CB], tl.float32)
    for start in range(0, C, CB):
        channel = start + tl.arange(0, CB)
        address = controller_weight + candidate[:, None] * C + channel[None, :]
        weight = tl.load(address, mask=exists[:, None] & (channel < C)[None, :], other=0.0)
        mean = tl.load(vectors + sample * C + channel, mask=channel < C, other=0.0)
        products += weight.to(tl.float32) * mean[None, :]
    logits = tl.sum(products, 1)
    logits += tl.load(controller_bias + candidate, mask=exists, other=0.0).to(tl.float32)
    if noise is not None:
        logits += tl.load(noise + sample * K + candidate, mask=exists, other=0.0)
    logits = tl.where(exists, logits / tl.load(temperature), float("-inf"))
    powers = tl.exp(logits - tl.max(logits, 0))
    softmax = powers / tl.sum(powers, 0)
    return softmax, tl.argmax(softmax, 0)


@triton.jit
def vote(
    vectors, controller_weight, controller_bias, noise, temperature, counts, choice, softmax,
    samples, C: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
):  # fmt: skip
    """Give every sample of the batch the most frequent choice, of equals the smallest count."""
    candidate = tl.arange(0, KP)
    votes = tl.zeros([KP], tl.int32)
    for sample in range(samples):
        soft, best = _choose(
            vectors, controller_weight, controller_bias, noise, temperature, sample, C, K, KP
        )
        tl.store(softmax + sample * K + candidate, soft, mask=candidate < K)
        votes += (candidate == best).to(tl.int32)
    count = tl.load(counts + tl.argmax(votes, 0))
    for sample in range(samples):
        tl.store(choice + sample, count.to(tl.float32))


@triton.jit
def group_count(choice, counts, sample, K: tl.constexpr):
    """Return the group count that a sample chose; a single candidate is not written down."""
    if K > 1:
        count = tl.load(choice + sample).to(tl.int32)
    else:
        count = tl.load(counts)
    return count


@triton.jit
def group_matrices(score, sample, count, F: tl.constexpr, FP: tl.constexpr):
    """Return the matrices [FP, FP] that turn fine maps into those of a group count.

    The identity; equal weights within each group; and the softmax of the scores within each group.
    """
    group = tl.arange(0, FP)
    exists = group < F
    size = F // tl.maximum(count, 1)
    coarse = group // tl.maximum(size, 1)
    both = exists[:, None] & exists[None, :]
    same = (coarse[:, None] == coarse[None, :]) & both
    identity = tl.where((group[:, None] == group[None, :]) & both, 1.0, 0.0)
    equal = tl.where(same, 1.0 / size, 0.0)
    scores = tl.load(score + sample * F + group, mask=exists, other=0.0)
    scores = tl.where(same, scores[None, :], -1e30)
    powers = tl.where(same, tl.exp(scores - tl.max(scores, 1)[:, None]), 0.0)
    weighted = powers / tl.maximum(tl.sum(powers, 1), 1e-30)[:, None]
    return identity, equal, weighted


@triton.jit(do_not_specialize=["samples", "pixels"])
def mix_groups(
    maps, score, vectors, controller_weight, controller_bias, noise, temperature, warmup, counts,
    choice, softmax, spatial, samples, pixels,
    C: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, FP: tl.constexpr,
    P: tl.constexpr, CHOOSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write the spatial attention S: the sigmoid of the mixed maps.

    With CHOOSE this also chooses the group count of each sample and writes it; without, it reads
    `choice`. Without a warm-up the grouping is the finest.
    """
    sample = tl.program_id(0)
    group = tl.arange(0, FP)
    exists = group < F
    base = sample.to(tl.int64) * pixels * F
    second = maps + samples.to(tl.int64) * pixels * F
    if warmup is not None:
        if CHOOSE:
            soft, best = _choose(
                vectors, controller_weight, controller_bias, noise, temperature, sample, C, K, KP
            )
            candidate = tl.arange(0, KP)
            known = tl.load(counts + candidate, mask=candidate < K, other=0)
            count = tl.sum(tl.where(candidate == best, known, 0), 0)
            if tl.program_id(1) == 0:
                tl.store(softmax + sample * K + candidate, soft, mask=candidate < K)
                tl.store(choice + sample, count.to(tl.float32))
        else:
            count = group_count(choice, counts, sample, K)
        s = tl.load(warmup)
        identity, equal, weighted = group_matrices(score, sample, count, F, FP)
        on_first = (1 - s) * identity + s * equal
        on_second = (1 - s) * identity + s * weighted
    for start in range(tl.program_id(1) * P, pixels, tl.num_programs(1) * P):
        pixel = start + tl.arange(0, P)
        # Pixels are the columns: the products are three times as fast as with pixels as rows.
        place = base + pixel[None, :] * F + group[:, None]
        mask = (pixel < pixels)[None, :] & exists[:, None]
        term1 = tl.load(maps + place, mask=mask, other=0.0)
        term2 = tl.load(second + place, mask=mask, other=0.0)
        if warmup is not None:
            mixed = tl.dot(on_first, term1, input_precision=PRECISION)
            mixed = tl.dot(on_second, term2, acc=mixed, input_precision=PRECISION)
        else:
            mixed = term1 + term2
        tl.store(spatial + place, 1.0 / (1.0 + tl.exp(-mixed)), mask=mask)


@triton.jit(do_not_specialize=["H", "W"])
def pool_attended(
    x, spatial, vectors, channel_logits, gamma, fused, H, W,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Write the means over the image of the fused features: of x * S, plus gamma * w_c * x."""
    sample, group, group_mask, _, channel, mask = channels_of_program(tl.program_id(0), F, d, D, G)
    pixels = H * W
    sums = tl.zeros([P, G, D], tl.float32)
    for start in tl.range(0, pixels, P, num_stages=STAGES):
        pixel = start + tl.arange(0, P)
        inside = pixel < pixels
        tile = load_pixels(x, sample, pixel, inside, channel, mask, pixels, C)
        attention = load_map(spatial, sample, pixel, inside, group, group_mask, pixels, F)
        sums += tile * attention[:, :, None]
    result = tl.sum(sums, 0) / pixels
    place = sample * C + channel
    if gamma is not None:
        logits = tl.load(channel_logits + place, mask=mask, other=0.0)
        branch = tl.load(gamma).to(tl.float32) / (1.0 + tl.exp(-logits))
        result += branch * tl.load(vectors + place, mask=mask, other=0.0)
    tl.store(fused + place, result, mask=mask)


@triton.jit
def output_factors(
    channel_logits, global_logits, gamma, residual_gate, sample, channel, mask, C: tl.constexpr
):
    """Return the scale and the offset of the output x * (scale * S + offset), [G, D] each.

    Returns:
        The scale; the offset; the global attention w_g; gamma * w_c; the channel attention w_c.
    """
    place = sample * C + channel
    one = tl.where(mask, 1.0, 0.0)
    global_ = one
    if global_logits is not None:
        global_ = 1.0 / (1.0 + tl.exp(-tl.load(global_logits + place, mask=mask, other=0.0)))
    scale = global_
    offset = 0.0 * one
    if residual_gate is not None:
        alpha = tl.load(residual_gate + channel, mask=mask, other=0.0).to(tl.float32)
        scale = alpha * global_
        offset = 1.0 - alpha
    branch = 0.0 * one
    attention = 0.0 * one
    if gamma is not None:
        logits = tl.load(channel_logits + place, mask=mask, other=0.0)
        attention = 1.0 / (1.0 + tl.exp(-logits))
        branch = tl.load(gamma).to(tl.float32) * attention
        offset += scale * branch
    return scale, offset, global_, branch, attention


@triton.jit
def store_pixels(
    to, values, sample, pixel, pixel_mask, channel, mask, pixels, C: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """Store values [P, G, D] to a tensor that is channels_last or contiguous."""
    base = to + sample.to(tl.int64) * pixels * C
    if CONTIGUOUS:
        address = base + channel[None] * pixels + pixel[:, None, None]
    else:
        address = base + pixel[:, None, None] * C + channel[None]
    tile_mask = pixel_mask[:, None, None] & mask[None]
    tl.store(address, values.to(to.dtype.element_ty), mask=tile_mask)


@triton.jit(do_not_specialize=["H", "W"])
def apply_attention(
    x, spatial, channel_logits, global_logits, gamma, residual_gate, out, H, W,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, STAGES: tl.constexpr, CONTIGUOUS: tl.constexpr,
):  # fmt: skip
    """Write the output x * (scale * S + offset)."""
    sample, group, group_mask, _, channel, mask = channels_of_program(tl.program_id(0), F, d, D, G)
    pixels = H * W
    scale, offset, _, _, _ = output_factors(
        channel_logits, global_logits, gamma, residual_gate, sample, channel, mask, C
    )
    step = tl.num_programs(1) * P
    for start in tl.range(tl.program_id(1) * P, pixels, step, num_stages=STAGES):
        pixel = start + tl.arange(0, P)
        inside = pixel < pixels
        tile = load_pixels(x, sample, pixel, inside, channel, mask, pixels, C)
        attention = load_map(spatial, sample, pixel, inside, group, group_mask, pixels, F)
        result = tile * (scale[None] * attention[:, :, None] + offset[None])
        store_pixels(out, result, sample, pixel, inside, channel, mask, pixels, C, CONTIGUOUS)
