"""The gradients of the mixture of the maps and of the choice of group counts."""

import triton
import triton.language as tl

from .maps import candidate_counts, group_count, group_matrices
from .tiles import channels_of_program, load_pixels

__all__ = ["choice_gradient", "map_gradient", "unmix_groups"]


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
    grad_map, maps, score, choice, warmup, grad_maps, products, samples, pixels,
    F: tl.constexpr, COUNTS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, FP: tl.constexpr,
    P: tl.constexpr, PRECISION: tl.constexpr,
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
    count = group_count(choice, sample, COUNTS, K)
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
    products, score, choice, warmup, temperature, softmax, controller_weight, grad_score,
    grad_mean, terms, samples, parts, T,
    C: tl.constexpr, F: tl.constexpr, COUNTS: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    FP: tl.constexpr, ADD: tl.constexpr,
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
    chosen = group_count(choice, sample, COUNTS, K)
    to_first = tl.zeros([FP, FP], tl.float32)
    to_second = tl.zeros([FP, FP], tl.float32)
    for part in range(parts):
        at = products + (sample * parts + part) * F * F + group[:, None] * F + group[None, :]
        to_first += tl.load(at, mask=both, other=0.0)
        to_second += tl.load(at + samples * parts * F * F, mask=both, other=0.0)
    known = candidate_counts(COUNTS, K, KP)
    of_choice = tl.zeros([KP], tl.float32)
    of_score = tl.zeros([FP], tl.float32)
    for k in range(K):
        count = tl.sum(tl.where(candidate == k, known, 0), 0)
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
