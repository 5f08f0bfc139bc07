"""The fine maps, the choice of group counts, and the mixture of the maps."""

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
    load_kernel,
    load_pixels,
    softmax_of_means,
)

__all__ = ["candidate_counts", "fine_maps", "group_count", "group_matrices", "mix_groups", "vote"]


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
    k0, k1, k2, k3, k4, k5, k6, k7, k8 = load_kernel(kernel, inner, d)
    strip = gates + sample * (H + W) * C
    step = tl.num_programs(1) * P
    for start in tl.range(tl.program_id(1) * P, pixels, step, num_stages=STAGES):
        pixel = start + tl.arange(0, P)
        inside = pixel < pixels
        row = pixel // W
        column = pixel % W
        tile_mask = inside[:, None, None] & mask[None]
        gate = load_gate(strip, row, column, channel, tile_mask, H, C)
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
def candidate_counts(COUNTS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Return the K candidate group counts, [KP]: the digits of COUNTS in base 128, lowest first.

    They are compiled in, so that no tensor of them has to be kept for all layers and streams.
    """
    candidate = tl.arange(0, KP)
    counts = tl.zeros([KP], tl.int32)
    for k in tl.static_range(K):
        counts = tl.where(candidate == k, (COUNTS >> (7 * k)) & 127, counts)
    return counts


@triton.jit
def vote(
    vectors, controller_weight, controller_bias, noise, temperature, choice, softmax, samples,
    C: tl.constexpr, COUNTS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
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
    known = candidate_counts(COUNTS, K, KP)
    count = tl.sum(tl.where(candidate == tl.argmax(votes, 0), known, 0), 0)
    for sample in range(samples):
        tl.store(choice + sample, count.to(tl.float32))


@triton.jit
def group_count(choice, sample, COUNTS: tl.constexpr, K: tl.constexpr):
    """Return the group count that a sample chose; a single candidate is not written down."""
    if K > 1:
        count = tl.load(choice + sample).to(tl.int32)
    else:
        count = tl.full([], COUNTS, tl.int32)
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
    maps, score, vectors, controller_weight, controller_bias, noise, temperature, warmup, choice,
    softmax, spatial, samples, pixels,
    C: tl.constexpr, F: tl.constexpr, COUNTS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    FP: tl.constexpr, P: tl.constexpr, CHOOSE: tl.constexpr, PRECISION: tl.constexpr,
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
            known = candidate_counts(COUNTS, K, KP)
            count = tl.sum(tl.where(candidate == best, known, 0), 0)
            if tl.program_id(1) == 0:
                tl.store(softmax + sample * K + candidate, soft, mask=candidate < K)
                tl.store(choice + sample, count.to(tl.float32))
        else:
            count = group_count(choice, sample, COUNTS, K)
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
