"""The output, from the maps and the gates, and what the global gate is made from."""

import triton
import triton.language as tl

from .tiles import channels_of_program, load_map, load_pixels, store_pixels

__all__ = ["apply_attention", "output_factors", "pool_attended"]


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
