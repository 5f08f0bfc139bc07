"""What the kernels share: which tile of x a program works on, and how it loads it.

A tile is [P, G, D]: P pixels, G fine groups and the D channels of each, with D and G rounded up to
powers of two. Features lie in memory as channels_last does, so that a tile is read in vectors
along its channels whatever the height and width are. The axis of the groups is kept apart from
that of the channels, so that a map, which has one value per group, is broadcast over channels.

Maps are [b, h * w, F], vectors of channels [b, c], and the pooled rows and columns [b, h + w, c],
rows before columns. Sums are in float32.
"""

import triton
import triton.language as tl

__all__ = [
    "GATED_MEAN",
    "MEAN",
    "RSTD",
    "SHIFT",
    "channels_of_program",
    "kernel_offset_mask",
    "load_channels",
    "load_gate",
    "load_kernel",
    "load_map",
    "load_pixels",
    "softmax_of_means",
    "store_pixels",
]

# The order of the vectors in the stack [4, b, c] that `pool_and_gate` writes.
MEAN = tl.constexpr(0)
SHIFT = tl.constexpr(1)
GATED_MEAN = tl.constexpr(2)
RSTD = tl.constexpr(3)


@triton.jit
def channels_of_program(
    program, F: tl.constexpr, d: tl.constexpr, D: tl.constexpr, G: tl.constexpr
):
    """Return the sample, the groups [G] and the channels [G, D] of a program.

    Programs are counted by samples, and within a sample by blocks of G groups.

    Returns:
        The sample; the groups and which of them exist, [G]; the channels within a group, [1, D];
        the channels and which of them exist, [G, D].
    """
    blocks: tl.constexpr = (F + G - 1) // G
    sample = program // blocks
    group = (program % blocks) * G + tl.arange(0, G)
    group_mask = group < F
    inner = tl.arange(0, D)[None, :]
    channel = group[:, None] * d + inner
    return sample, group, group_mask, inner, channel, (inner < d) & group_mask[:, None]


@triton.jit
def load_channels(vectors, n, sample, samples, channel, mask, C: tl.constexpr):
    """Load the values [G, D] of vector n of a stack of vectors [n, b, c]."""
    return tl.load(vectors + (n * samples + sample) * C + channel, mask=mask, other=0.0)


@triton.jit
def load_pixels(x, sample, pixel, pixel_mask, channel, mask, pixels, C: tl.constexpr):
    """Load x at pixels [P] and channels [G, D] as float32: [P, G, D]."""
    base = x + sample.to(tl.int64) * pixels * C
    address = base + pixel[:, None, None] * C + channel[None]
    tile_mask = pixel_mask[:, None, None] & mask[None]
    return tl.load(address, mask=tile_mask, other=0.0).to(tl.float32)


@triton.jit
def load_gate(strip, row, column, channel, tile_mask, H, C: tl.constexpr):
    """Load the products [P, G, D] of the gates of the rows and columns, [h + w, c], of pixels."""
    of_row = strip + row[:, None, None] * C + channel[None]
    of_column = strip + (H + column)[:, None, None] * C + channel[None]
    gate = tl.load(of_row, mask=tile_mask, other=0.0)
    return gate * tl.load(of_column, mask=tile_mask, other=0.0)


@triton.jit
def load_kernel(kernel, inner, d: tl.constexpr):
    """Load the kernel of the first term [9, d]: nine times [1, D], to be held in registers."""
    exists = inner < d
    return (
        tl.load(kernel + inner, mask=exists, other=0.0),
        tl.load(kernel + d + inner, mask=exists, other=0.0),
        tl.load(kernel + 2 * d + inner, mask=exists, other=0.0),
        tl.load(kernel + 3 * d + inner, mask=exists, other=0.0),
        tl.load(kernel + 4 * d + inner, mask=exists, other=0.0),
        tl.load(kernel + 5 * d + inner, mask=exists, other=0.0),
        tl.load(kernel + 6 * d + inner, mask=exists, other=0.0),
        tl.load(kernel + 7 * d + inner, mask=exists, other=0.0),
        tl.load(kernel + 8 * d + inner, mask=exists, other=0.0),
    )


@triton.jit
def load_map(maps, sample, pixel, pixel_mask, group, group_mask, pixels, F: tl.constexpr):
    """Load a map at pixels [P] and groups [G]: [P, G]."""
    address = maps + sample.to(tl.int64) * pixels * F + pixel[:, None] * F + group[None, :]
    return tl.load(address, mask=pixel_mask[:, None] & group_mask[None, :], other=0.0)


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


@triton.jit
def kernel_offset_mask(row, column, dy, dx, H, W):
    """Say which pixels have a neighbour at the offset (dy, dx) inside the image."""
    y = row + dy
    x = column + dx
    return (y >= 0) & (y < H) & (x >= 0) & (x < W)


@triton.jit
def softmax_of_means(conv_means, mask):
    """Return the softmax over D of the means of conv3x3(x), [G, D], and their logsumexp, [G]."""
    scores = tl.where(mask, conv_means, -1e30)
    highest = tl.max(scores, 1)
    powers = tl.where(mask, tl.exp(scores - highest[:, None]), 0.0)
    total = tl.maximum(tl.sum(powers, 1), 1e-30)
    return powers / total[:, None], highest + tl.log(total)
