"""Tile sizes by shape: how many pixels, groups and warps a program of each kernel works with.

The numbers were chosen from measurements, which `docs/kernels.md` gives. Nothing is tuned at run
time, so the first step costs compilation alone.
"""

import os
from typing import NamedTuple

import torch

__all__ = ["Tiles", "power_of_two", "share_out", "tiles_for"]

# Channels of a tile: 128 bytes of half precision, which is what a warp reads best.
CHANNELS = 64
# Pixels times channels of a tile, its warps, and the tiles that are loaded ahead. Kernels with many
# sums take small tiles.
FINE_MAPS = (512, 2, 1)
STREAMING = (2048, 4, 2)
PIXEL_SUMS = (256, 1, 1)
INPUT_GRADIENT = (512, 1, 1)
# The same for kernels that walk along rows, from this number of pixels on.
ROWS = {512: (2048, 4, 2), 128: (1024, 2, 2), 0: (512, 2, 1)}
# Pixels of a tile of maps, and its warps.
MIX = (64, 4)
UNMIX = (16, 2)
CONV1X1 = (16, 2)
# Terms of a step of a small product, and its warps.
PRODUCT = (64, 4)
# So many programs, if there is work for them, fill a GPU with 132 multiprocessors.
PROGRAMS = 4096
# Of matrix products: three products of parts in tf32 are as exact as one in float32.
PRECISION = "ieee" if torch.version.hip or os.environ.get("TRITON_INTERPRET") == "1" else "tf32x3"


class Tiles(NamedTuple):
    """The compile-time sizes of a layer and an image size."""

    d: int
    """Channels of a fine group."""
    D: int
    """d as a power of two."""
    G: int
    """Fine groups of a tile."""
    blocks: int
    """Tiles along the groups."""
    WB: int
    """Columns of a tile that walks along rows."""
    R: int
    """Rows of such a tile."""
    N: int
    """Rows and columns of a tile of pooled values."""
    row_warps: int
    """Warps of a program that walks along rows."""
    row_stages: int
    """Tiles that it loads ahead."""

    def pixels(self, size: tuple[int, int, int], image: int) -> int:
        """Return the pixels of a tile of `size` (elements, warps, stages) for an image of so many."""
        return min(power_of_two(image), max(1, size[0] // (self.G * self.D)))


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def tiles_for(channels: int, groups: int, height: int, width: int) -> Tiles:
    """Choose the tiles for x [b, channels, height, width] with so many fine groups."""
    d = channels // groups
    D = power_of_two(d)
    G = min(power_of_two(groups), max(1, CHANNELS // D))
    rows = next(size for least, size in ROWS.items() if height * width >= least)
    pixels = max(1, rows[0] // (G * D))
    WB = min(power_of_two(width), pixels)
    R = min(power_of_two(height), max(1, pixels // WB))
    N = min(power_of_two(height + width), max(1, 1024 // (G * D)))
    return Tiles(d, D, G, -(-groups // G), WB, R, N, *rows[1:])


def share_out(pixels: int, tile: int, programs: int) -> int:
    """Choose among how many programs the pixels of a sample are shared out."""
    return max(1, min(-(-pixels // tile), PROGRAMS // max(1, programs)))
