"""Fashion scenes: one whole item of Fashion-MNIST among fragments of others, on a noisy canvas.

A network must find the item, whose place and size vary, before it can tell its class. Every scene
is composed when it is asked for. In training its random choices come from the generators that the
sampler seeds with (seed, epoch, sample), so that they are fresh in each epoch and a function of the
place in the run; elsewhere they depend on the split and the index alone.
"""

import functools
import itertools
import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch.utils.data import Dataset
from torchvision.datasets import FashionMNIST

from ...errors import UsageError, nearest
from ...samples.make_fashion_mnist import CLASSES
from ...samples.scenes import load_sample

__all__ = ["NAMES", "FashionScenes", "open_scenes"]

FRAGMENTS = 14  # in a scene
POOL = 4096  # fragments to choose from, cut in advance
NOISE = 96  # the canvas is noise below this level of 255
# The seeds of what does not depend on a run: the held-out items, the fragments, fixed scenes.
_HELD_OUT, _POOL, _SIDES, _FIXED = range(4)


class Layout(NamedTuple):
    """The sizes of a scene in pixels.

    `canvas` is its side, `least` and `greatest` bound the side that the item's image, of 28 x 28
    pixels, is scaled to, and `fragment` is the side of a fragment.
    """

    canvas: int
    least: int
    greatest: int
    fragment: int


LAYOUTS = {"96": Layout(96, 18, 72, 12), "48": Layout(48, 9, 36, 6)}
SOURCES = ("fashion_mnist", "sample")
NAMES = tuple(f"{source}_{size}" for source in SOURCES for size in LAYOUTS)
# The validation split is a tenth of the training items.
SPLITS = ("train", "validation", "train+validation", "test")


class FashionScenes(Dataset):
    """Scenes of one item each: scene i holds item i, and has its label.

    Args:
        pixels: The items, uint8 [n, 28, 28], 0 around them.
        labels: Their classes, [n].
        layout: The sizes of a scene.
        seed: Distinguishes the splits' fragments and fixed scenes.
        fresh: Compose a new scene at every access, for training; otherwise scene i is always the
            same.

    Attributes:
        class_to_idx: The labels by the names of the classes.
        slices: For each slice of the fixed scenes its indices, by the bounds of the item's size.
    """

    def __init__(
        self, pixels: np.ndarray, labels: np.ndarray, layout: Layout, seed: int, fresh: bool
    ) -> None:
        self.pixels, self.labels, self.layout = pixels, labels, layout
        self.targets = labels  # as other data sets call them
        self.seed, self.fresh = seed, fresh
        self.class_to_idx = {name: label for label, name in enumerate(CLASSES)}
        sides = np.random.default_rng([seed, _SIDES])
        self.sides = sides.integers(layout.least, layout.greatest, len(labels), endpoint=True)
        steps = np.arange(layout.fragment)
        self._offsets = (steps[:, None] * layout.canvas + steps).reshape(-1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Return a scene, of mode L, and its label."""
        if self.fresh:
            generator = np.random.default_rng(random.getrandbits(63))
            side = generator.integers(self.layout.least, self.layout.greatest, endpoint=True)
        else:
            generator = np.random.default_rng([self.seed, _FIXED, index])
            side = self.sides[index]
        scene = self._compose(generator, self.pixels[index], int(side))
        return Image.fromarray(scene), int(self.labels[index])

    def fixed(self) -> "FashionScenes":
        """Return the same items in fixed scenes, as for validation."""
        return FashionScenes(self.pixels, self.labels, self.layout, self.seed, fresh=False)

    @property
    def slices(self) -> dict[str, np.ndarray]:
        _, least, greatest, _ = self.layout
        bounds = np.linspace(least, greatest + 1, 4).round().astype(int)
        return {
            f"{low} to {high - 1} px": np.flatnonzero((self.sides >= low) & (self.sides < high))
            for low, high in itertools.pairwise(bounds)
        }

    @functools.cached_property
    def _pool(self) -> np.ndarray:
        """Fragments [n, side * side] of random items at random scales, 0 around them."""
        generator = np.random.default_rng([self.seed, _POOL])
        _, least, greatest, part = self.layout
        pool = np.zeros((POOL, part, part), np.uint8)
        items = generator.integers(0, len(self), POOL)
        sides = generator.integers(least, greatest, POOL, endpoint=True)
        places = generator.random((POOL, 2))
        for fragment, item, side, place in zip(pool, items, sides, places, strict=True):
            scaled = _scaled(self.pixels[item], int(side))
            y, x = (place * np.maximum(1, np.array(scaled.shape) - part)).astype(int)
            piece = scaled[y : y + part, x : x + part]
            fragment[: piece.shape[0], : piece.shape[1]] = piece
        return pool.reshape(POOL, -1)

    def _compose(self, generator: np.random.Generator, item: np.ndarray, side: int) -> np.ndarray:
        size, _, _, part = self.layout
        canvas = generator.integers(0, NOISE, size * size, dtype=np.uint8)
        values = self._pool[generator.integers(0, POOL, FRAGMENTS)]
        corners = generator.integers(0, size - part, (2, FRAGMENTS), endpoint=True)
        places = (corners[0] * size + corners[1])[:, None] + self._offsets
        shown = values > 0
        canvas[places[shown]] = values[shown]
        canvas = canvas.reshape(size, size)
        whole = _scaled(item, side)
        height, width = whole.shape
        y, x = generator.integers(0, (size - height, size - width), endpoint=True)
        box = canvas[y : y + height, x : x + width]
        np.copyto(box, whole, where=whole > 0)
        return canvas


def _scaled(item: np.ndarray, side: int) -> np.ndarray:
    """Scale an item's image to a side, and crop it to the item."""
    scaled = np.asarray(Image.fromarray(item).resize((side, side)))
    rows, columns = np.flatnonzero(scaled.any(axis=1)), np.flatnonzero(scaled.any(axis=0))
    return scaled[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def open_scenes(name: str, root: str | Path, split: str, training: bool, download: bool) -> Any:
    """Open a split of the scenes `name`, one of `NAMES`.

    Args:
        name: Items and size of the canvas: fashion_mnist_96, fashion_mnist_48 (all items), or
            sample_96, sample_48 (those that come with the package).
        root: The folder of Fashion-MNIST as torchvision has it; unused for the sample.
        split: train, validation (a fixed tenth of the training items), train+validation or test.
        training: Whether the scenes are fresh at every access.
        download: Whether torchvision may download Fashion-MNIST.

    Raises:
        UsageError: If there is no such data set or split, or its items are not there.
    """
    if name not in NAMES:
        raise UsageError(f"there are no scenes {name}; the nearest is {nearest(name, NAMES)}")
    if split not in SPLITS:
        raise UsageError(
            f"scenes/{name} has no split {split}; the nearest of {', '.join(SPLITS)} "
            f"is {nearest(split, SPLITS)}"
        )
    source, _, size = name.rpartition("_")
    part = "test" if split == "test" else "train"
    pixels, labels = load_sample(part) if source == "sample" else _load(root, part, download)
    if split in ("train", "validation"):
        order = np.random.default_rng(_HELD_OUT).permutation(len(labels))
        held_out = len(labels) // 10
        chosen = np.sort(order[:held_out] if split == "validation" else order[held_out:])
        pixels, labels = pixels[chosen], labels[chosen]
    return FashionScenes(pixels, labels, LAYOUTS[size], SPLITS.index(split), fresh=training)


def _load(root: str | Path, part: str, download: bool) -> tuple[np.ndarray, np.ndarray]:
    try:
        whole = FashionMNIST(str(root), train=part == "train", download=download)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot read the items of the scenes from {root}: {reason}") from None
    return whole.data.numpy(), whole.targets.numpy()
