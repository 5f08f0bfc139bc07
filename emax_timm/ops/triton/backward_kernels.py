"""The kernels of the backward pass, in the order in which they run.

The formulas are those of `ops/portable/backward.py` and `ops/portable/fine_maps_backward.py`, and
`docs/emax.md` derives them. No kernel adds to memory that another program adds to, so the same
input gives the same bits.

What is summed over the batch lies in one matrix, `terms` [b, T], whose columns are added up once:

    0       residual gate, [c]
    c       gamma, [c]
    2 c     logits of the global gate, [c]: the gradient of its second bias
    3 c     logits of the channel gate, [c]: the gradient of its second bias
    4 c     weight of gn, [F, d]
    5 c     bias of gn without its part from the first term, [F, d]
    6 c     means of conv3x3(x), [F, d]
    7 c     second map, [F, d]: the sum over pixels, the same for the channels of a group
    8 c     kernel of the first term, [9, F, d]
    17 c    logits of the group controller, [K], then hidden units of the two gates, [r] each
"""

import triton
import triton.language as tl

from .forward_kernels import (
    GATED_MEAN,
    RSTD,
    SHIFT,
    group_count,
    group_matrices,
    mix_channels,
    output_factors,
    store_pixels,
)
from .tiles import (
    channels_of_program,
    kernel_offset_mask,
    load_channels,
    load_map,
    load_pixels,
    softmax_of_means,
)

__all__ = [
    "channel_gate_gradient",
    "choice_gradient",
    "conv1x1_gradient",
    "input_gradient",
    "map_gradient",
    "parameter_gradients",
    "pixel_sums",
    "pooled_gradient",
    "second_term_gradient",
    "unmix_groups",
]


@triton.jit
def channel_gate_gradient(
    grad_offset, grad_fused, vectors, channel_logits, global_logits, gamma, residual_gate,
    grad_mean, terms, T, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of gamma, of the logits of the channel gate, and of the mean of x."""
    sample = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    place = sample * C + channel
    scale, _, _, branch, attention = output_factors(
        channel_logits, global_logits, gamma, residual_gate, sample, channel, mask, C
    )
    of_branch = tl.load(grad_offset + place, mask=mask, other=0.0) * scale
    of_mean = 0.0 * branch
    if grad_fused is not None:
        of_fused = tl.load(grad_fused + place, mask=mask, other=0.0)
        of_branch += of_fused * tl.load(vectors + place, mask=mask, other=0.0)
        of_mean = of_fused * branch
    to = terms + sample * T + channel
    tl.store(to + C, of_branch * attention, mask=mask)
    of_logits = of_branch * tl.load(gamma).to(tl.float32) * attention * (1.0 - attention)
    tl.store(to + 3 * C, of_logits, mask=mask)
    tl.store(grad_mean + place, of_mean, mask=mask)


@triton.jit(do_not_specialize=["H", "W"])
def map_gradient(
    x, spatial, grad_fused, grad_map, H, W,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr,
    P: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Turn the gradient of S into that of the mixed map before its sigmoid, in place."""
    sample, group, group_mask, _, channel, mask = channels_of_program(tl.program_id(0), F, d, D, G)
    pixels = H * W
    if grad_fused is not None:
        pooled = tl.load(grad_fused + sample * C + channel, mask=mask, other=0.0) / pixels
    base = sample.to(tl.int64) * pixels * F
    step = tl.num_programs(1) * P
    for start in tl.range(tl.program_id(1) * P, pixels, step, num_stages=STAGES):
        pixel = start + tl.arange(0, P)
        inside = pixel < pixels
        place = base + pixel[:, None] * F + group[None, :]
        map_mask = inside[:, None] & group_mask[None, :]
        gradient = tl.load(grad_map + place, mask=map_mask, other=0.0)
        if grad_fused is not None:
            tile = load_pixels(x, sample, pixel, inside, channel, mask, pixels, C)
            gradient += tl.sum(tile * pooled[None], 2)
        attention = tl.load(spatial + place, mask=map_mask, other=0.0)
        tl.store(grad_map + place, gradient * attention * (1.0 - attention), mask=map_mask)


@triton.jit(do_not_specialize=["samples", "pixels"])
def unmix_groups(
    grad_map, maps, score, choice, counts, warmup, grad_maps, products, samples, pixels,
    F: tl.constexpr, K: tl.constexpr, FP: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the two fine maps, and of the two matrices that mix them.

    Each program adds up the latter over its own pixels: products [2, b, programs, F, F].
    """
    sample = tl.program_id(0)
    part = tl.program_id(1)
    parts = tl.num_programs(1)
    group = tl.arange(0, FP)
    exists = group < F
    base = sample.to(tl.int64) * pixels * F
    other = samples.to(tl.int64) * pixels * F
    s = tl.load(warmup)
    count = group_count(choice, counts, sample, K)
    identity, equal, weighted = group_matrices(score, sample, count, F, FP)
    on_first = tl.trans((1 - s) * identity + s * equal)
    on_second = tl.trans((1 - s) * identity + s * weighted)
    to_first = tl.zeros([FP, FP], tl.float32)
    to_second = tl.zeros([FP, FP], tl.float32)
    for start in range(part * P, pixels, parts * P):
        pixel = start + tl.arange(0, P)
        place = base + pixel[None, :] * F + group[:, None]
        mask = (pixel < pixels)[None, :] & exists[:, None]
        gradient = tl.load(grad_map + place, mask=mask, other=0.0)
        term = tl.trans(tl.load(maps + place, mask=mask, other=0.0))
        to_first = tl.dot(gradient, term, acc=to_first, input_precision=PRECISION)
        term = tl.trans(tl.load(maps + other + place, mask=mask, other=0.0))
        to_second = tl.dot(gradient, term, acc=to_second, input_precision=PRECISION)
        first = tl.dot(on_first, gradient, input_precision=PRECISION)
        tl.store(grad_maps + place, first, mask=mask)
        second = tl.dot(on_second, gradient, input_precision=PRECISION)
        tl.store(grad_maps + other + place, second, mask=mask)
    to = products + (sample * parts + part) * F * F + group[:, None] * F + group[None, :]
    mask = exists[:, None] & exists[None, :]
    tl.store(to, to_first, mask=mask)
    tl.store(to + samples * parts * F * F, to_second, mask=mask)


@triton.jit(do_not_specialize=["samples", "parts"])
def choice_gradient(
    products, score, choice, warmup, temperature, softmax, counts, controller_weight, grad_score,
    grad_mean, terms, samples, parts, T,
    C: tl.constexpr, F: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, FP: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of the scores and of the logits of the group controller.

    And of the mean of x through the controller, to which ADD adds.
    """
    sample = tl.program_id(0)
    group = tl.arange(0, FP)
    exists = group < F
    candidate = tl.arange(0, KP)
    both = exists[:, None] & exists[None, :]
    s = tl.load(warmup)
    chosen = group_count(choice, counts, sample, K)
    to_first = tl.zeros([FP, FP], tl.float32)
    to_second = tl.zeros([FP, FP], tl.float32)
    for part in range(parts):
        at = products + (sample * parts + part) * F * F + group[:, None] * F + group[None, :]
        to_first += tl.load(at, mask=both, other=0.0)
        to_second += tl.load(at + samples * parts * F * F, mask=both, other=0.0)
    of_choice = tl.zeros([KP], tl.float32)
    of_score = tl.zeros([FP], tl.float32)
    for k in range(K):
        count = tl.load(counts + k)
        _, equal, weighted = group_matrices(score, sample, count, F, FP)
        inner = weighted * to_second
        value = tl.sum(tl.sum(to_first * equal + inner, 1), 0)
        of_choice = tl.where(candidate == k, s * value, of_choice)
        # Each row of the matrix of a candidate is a softmax of the scores.
        slope = tl.sum(inner - weighted * tl.sum(inner, 1)[:, None], 0)
        of_score += tl.where(count == chosen, s, 0.0) * slope
    tl.store(grad_score + sample * F + group, of_score, mask=exists)
    if softmax is not None:
        soft = tl.load(softmax + sample * K + candidate, mask=candidate < K, other=0.0)
        of_logits = soft * (of_choice - tl.sum(soft * of_choice, 0)) / tl.load(temperature)
        tl.store(terms + sample * T + 17 * C + candidate, of_logits, mask=candidate < K)
        BLOCK: tl.constexpr = 512
        for start in range(0, C, BLOCK):
            channel = start + tl.arange(0, BLOCK)
            of = controller_weight + candidate[:, None] * C + channel[None, :]
            mask = (candidate < K)[:, None] & (channel < C)[None, :]
            weight = tl.load(of, mask=mask, other=0.0).to(tl.float32)
            of_mean = tl.sum(of_logits[:, None] * weight, 0)
            to = grad_mean + sample * C + channel
            if ADD:
                of_mean += tl.load(to, mask=channel < C, other=0.0)
            tl.store(to, of_mean, mask=channel < C)


@triton.jit
def _near(
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
        gate_h = tl.load(strip + row[:, None, None] * C + channel[None], mask=tile_mask, other=0.0)
        address = strip + (H + column)[:, None, None] * C + channel[None]
        gate_w = tl.load(address, mask=tile_mask, other=0.0)
        second = load_map(grad_second, sample, pixel, inside, group, group_mask, pixels, F)
        deviation = tl.where(tile_mask, tile * (gate_h * gate_w) - shift[None], 0.0)
        with_second += deviation * second[:, :, None]
        second_sum += second
        # What an output pixel takes from the offset (dy, dx) comes back from (-dy, -dx).
        k0 += tile * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, 1, H, W, F
        )
        k1 += tile * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, 0, H, W, F
        )
        k2 += tile * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, -1, H, W, F
        )
        k3 += tile * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, 1, H, W, F
        )
        k4 += tile * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, 0, H, W, F
        )
        k5 += tile * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, -1, H, W, F
        )
        k6 += tile * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, 1, H, W, F
        )
        k7 += tile * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, 0, H, W, F
        )
        k8 += tile * _near(
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
    exists = inner < d
    scale, offset, _, _, _ = output_factors(
        channel_logits, global_logits, gamma, residual_gate, sample, channel, mask, C
    )
    shift = load_channels(shifts, SHIFT, sample, samples, channel, mask, C)
    shift += load_channels(vectors, GATED_MEAN, sample, samples, channel, mask, C)
    curve = load_channels(slopes, 0, sample, samples, channel, mask, C)
    second_scale = load_channels(slopes, 1, sample, samples, channel, mask, C)
    mean = tl.load(terms + sample * T + 7 * C + group * d, mask=group_mask, other=0.0) * one
    k0 = tl.load(kernel + inner, mask=exists, other=0.0)[None]
    k1 = tl.load(kernel + d + inner, mask=exists, other=0.0)[None]
    k2 = tl.load(kernel + 2 * d + inner, mask=exists, other=0.0)[None]
    k3 = tl.load(kernel + 3 * d + inner, mask=exists, other=0.0)[None]
    k4 = tl.load(kernel + 4 * d + inner, mask=exists, other=0.0)[None]
    k5 = tl.load(kernel + 5 * d + inner, mask=exists, other=0.0)[None]
    k6 = tl.load(kernel + 6 * d + inner, mask=exists, other=0.0)[None]
    k7 = tl.load(kernel + 7 * d + inner, mask=exists, other=0.0)[None]
    k8 = tl.load(kernel + 8 * d + inner, mask=exists, other=0.0)[None]
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
        gate = tl.load(strip + to_row, mask=tile_mask, other=0.0)
        gate *= tl.load(strip + to_column, mask=tile_mask, other=0.0)
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
        result += k0 * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, 1, H, W, F
        )
        result += k1 * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, 0, H, W, F
        )
        result += k2 * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 1, -1, H, W, F
        )
        result += k3 * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, 1, H, W, F
        )
        result += k4 * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, 0, H, W, F
        )
        result += k5 * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, 0, -1, H, W, F
        )
        result += k6 * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, 1, H, W, F
        )
        result += k7 * _near(
            grad_maps, sample, pixel, inside, group, group_mask, row, column, -1, 0, H, W, F
        )
        result += k8 * _near(
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


@triton.jit(do_not_specialize=["rows"])
def conv1x1_gradient(
    grad_before, pooled, products, rows,
    d: tl.constexpr, DP: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum the gradient of conv1x1 over the rows of a program: products [programs, d, d + 1].

    Both inputs are [b * (h + w) * F, d]; the last column is the gradient of the bias.
    """
    inner = tl.arange(0, DP)
    weight = tl.zeros([DP, DP], tl.float32)
    bias = tl.zeros([DP], tl.float32)
    for start in range(tl.program_id(0) * N, rows, tl.num_programs(0) * N):
        row = start + tl.arange(0, N)
        mask = (row < rows)[:, None] & (inner < d)[None, :]
        place = row[:, None] * d + inner[None, :]
        gradient = tl.load(grad_before + place, mask=mask, other=0.0)
        value = tl.load(pooled + place, mask=mask, other=0.0)
        weight = tl.dot(tl.trans(gradient), value, acc=weight, input_precision=PRECISION)
        bias += tl.sum(gradient, 0)
    to = products + tl.program_id(0) * d * (d + 1)
    exists = inner < d
    place = inner[:, None] * (d + 1) + inner[None, :]
    tl.store(to + place, weight, mask=exists[:, None] & exists[None, :])
    tl.store(to + inner * (d + 1) + d, bias, mask=exists)


@triton.jit(do_not_specialize=["parts"])
def parameter_gradients(
    products, totals, conv3x3_products, conv3x3_weight, conv3x3_bias, gn_bias, grads, parts,
    C: tl.constexpr, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, FP: tl.constexpr,
    CP: tl.constexpr, INPUT: tl.constexpr, TAP: tl.constexpr, GAMMA: tl.constexpr,
):  # fmt: skip
    """Write row o of the gradients of the parameters that all fine groups share, for o < d.

    Args:
        products: What `conv1x1_gradient` wrote, [parts, d, d + 1].
        totals: The columns of `terms`, added up over the batch.
        conv3x3_products: The gradient of conv3x3 through its means, [d, d * 9].
        conv3x3_weight, conv3x3_bias, gn_bias: The parameters.
        grads: Where they go: conv1x1 [d, d] and [d], conv3x3 [d, d * 9] and [d], gn [d] and [d],
            gamma [1].
        parts: The number of programs that wrote `products`.
        C, F, d: Numbers of channels, groups, and channels of a group.
        D, FP, CP: d, F and C as powers of two.
        INPUT, TAP: The strides of an input channel and a kernel offset in conv3x3.
        GAMMA: Whether there is a channel gate.
    """
    o = tl.program_id(0)
    inner = tl.arange(0, D)
    exists = inner < d
    group = tl.arange(0, FP)
    group_mask = group < F

    PARTS: tl.constexpr = 16
    weight = tl.zeros([PARTS, D], tl.float32)
    bias = tl.zeros([PARTS], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        at = products + (part * d + o) * (d + 1)
        there = (part < parts)[:, None] & exists[None, :]
        weight += tl.load(at[:, None] + inner[None, :], mask=there, other=0.0)
        bias += tl.load(at + d, mask=part < parts, other=0.0)
    tl.store(grads + o * d + inner, tl.sum(weight, 0), mask=exists)
    tl.store(grads + d * d + o, tl.sum(bias, 0))
    grads += d * d + d

    # The first term is a correlation with conv3x3, weighted with softmax(gn_bias).
    logits = tl.load(gn_bias + inner, mask=exists, other=float("-inf")).to(tl.float32)
    powers = tl.exp(logits - tl.max(logits, 0))
    constant = powers / tl.sum(powers, 0)
    own = tl.sum(tl.where(inner == o, constant, 0.0), 0)
    of_constant = tl.zeros([D], tl.float32)
    each = group[:, None] * d + inner[None, :]
    mask = group_mask[:, None] & exists[None, :]
    for k in range(9):
        tap = tl.sum(tl.load(totals + (8 + k) * C + each, mask=mask, other=0.0), 0)
        at = o * (9 * d) + inner * INPUT + k * TAP
        through_means = tl.load(conv3x3_products + at, mask=exists, other=0.0)
        tl.store(grads + at, through_means + own * tap, mask=exists)
        if o == 0:
            each_weight = (
                conv3x3_weight + inner[:, None] * (9 * d) + inner[None, :] * INPUT + k * TAP
            )
            weights = tl.load(each_weight, mask=exists[:, None] & exists[None, :], other=0.0)
            of_constant += tl.sum(weights.to(tl.float32) * tap[None, :], 1)
    grads += 9 * d * d

    first = tl.sum(tl.load(totals + 7 * C + group * d, mask=group_mask, other=0.0), 0)
    means = tl.sum(tl.load(totals + 6 * C + group * d + o, mask=group_mask, other=0.0), 0)
    tl.store(grads + o, means + own * first)
    scale = tl.sum(tl.load(totals + 4 * C + group * d + o, mask=group_mask, other=0.0), 0)
    tl.store(grads + d + o, scale)
    if o == 0:
        biases = tl.load(conv3x3_bias + inner, mask=exists, other=0.0).to(tl.float32)
        of_constant += first * biases
        of_constant = constant * (of_constant - tl.sum(constant * of_constant, 0))
        of_level = tl.sum(tl.load(totals + 5 * C + each, mask=mask, other=0.0), 0)
        tl.store(grads + 2 * d + inner, of_constant + of_level, mask=exists)
        if GAMMA:
            every = tl.arange(0, CP)
            gamma = tl.load(totals + C + every, mask=every < C, other=0.0)
            tl.store(grads + 3 * d, tl.sum(gamma, 0))
