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
FINE_MAPS = (256, 1, 1)
POOL_ATTENDED = (2048, 4, 1)
APPLY = (1024, 2, 2)
MAP_GRADIENT = (4096, 4, 1)
PIXEL_SUMS = (256, 1, 1)
INPUT_GRADIENT = (256, 1, 1)
# The same for kernels that walk along rows, in large and small images.
ROWS = {True: (2048, 4, 1), False: (1024, 2, 2)}
POOLED_GRADIENT = {True: (1024, 4, 1), False: (1024, 2, 2)}
# Pixels of a tile of maps, and its warps.
MIX = {True: (16, 2), False: (64, 8)}
UNMIX = (16, 2)
# Rows of a step, and its warps.
CONV1X1 = (32, 2)
# From this number of pixels on an image is large.
LARGE = 512
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
    N: int
    """Rows and columns of a tile of pooled values."""

    def rows(self, size: tuple[int, int, int], height: int, width: int) -> dict[str, int]:
        """Return the tile of `size` of a kernel that walks along rows: its rows and columns."""
        pixels = max(1, size[0] // (self.G * self.D))
        columns = min(power_of_two(width), pixels)
        rows = min(power_of_two(height), max(1, pixels // columns))
        return {"R": rows, "WB": columns, "N": self.N, "STAGES": size[2]}

    def pixels(self, size: tuple[int, int, int], image: int) -> int:
        """Return the pixels of a tile of `size` (elements, warps, stages), at most the image's."""
        return min(power_of_two(image), max(1, size[0] // (self.G * self.D)))


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def tiles_for(channels: int, groups: int, height: int, width: int) -> Tiles:
    """Choose the tiles for x [b, channels, height, width] with so many fine groups."""
    d = channels // groups
    D = power_of_two(d)
    G = min(power_of_two(groups), max(1, CHANNELS // D))
    N = min(power_of_two(height + width), max(1, 1024 // (G * D)))
    return Tiles(d, D, G, -(-groups // G), N)


def share_out(pixels: int, tile: int, programs: int) -> int:
    """Choose among how many programs the pixels of a sample are shared out."""
    return max(1, min(-(-pixels // tile), PROGRAMS // max(1, programs)))
