"""Scenes composed of Fashion-MNIST items, with exact boxes and masks.

The items are the real images of the sample that comes with the package. A scene takes a few of
them at random, scales them, and puts them beside each other on a noisy canvas, so that brightness
alone does not tell items from the canvas. Fragments of other items may clutter it.
"""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset
from torch import Tensor

__all__ = [
    "GROUPS",
    "MEAN",
    "SAMPLE",
    "STD",
    "Items",
    "Scene",
    "compose",
    "load_items",
    "load_sample",
]

SAMPLE = Path(__file__).parent / "fashion_mnist"
MEAN, STD = 0.25, 0.3  # approximate mean and standard deviation of the pixels of scenes

# The classes of scenes, numbered from 1 (0 is the canvas), and the sample's labels in each.
GROUPS = {"top": (0, 2, 3, 4, 6), "trousers": (1,), "shoe": (5, 7, 9), "bag": (8,)}
FRAGMENT = 12  # largest height and width in pixels
GROUP_OF = {label: 1 + i for i, labels in enumerate(GROUPS.values()) for label in labels}


class Items(NamedTuple):
    """Images of single items.

    `pixels` [n, 28, 28] are in 0 to 255, and 0 around the item; `groups` [n] are the classes.
    """

    pixels: np.ndarray
    groups: np.ndarray


class Scene(NamedTuple):
    """Several items on a canvas.

    `image` is [1, s, s] in 0 to 1. `boxes` [k, 4] are x1, y1, x2, y2 in pixels, the right and the
    lower edge exclusive; `groups` [k] are the items' classes; `instances` [s, s] is 0 on the
    canvas and i + 1 on the non-zero pixels of item i.
    """

    image: Tensor
    boxes: Tensor
    groups: Tensor
    instances: Tensor

    @property
    def mask(self) -> Tensor:
        """The class of every pixel, [s, s]; 0 is the canvas."""
        return torch.cat([self.groups.new_zeros(1), self.groups])[self.instances]


def load_items(split: str) -> Items:
    """Load the items of the split "train" (4,000 items) or "test" (1,000)."""
    pixels, labels = load_sample(split)
    return Items(pixels, np.array([GROUP_OF[label] for label in labels.tolist()]))


@functools.cache
def load_sample(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Load the images [n, 28, 28] of the split "train" or "test", and their ten labels [n]."""
    dataset: Any = create_dataset("", root=str(SAMPLE), split=f"{split}.tar", input_img_mode="L")
    pixels, labels = zip(
        *((np.asarray(image), int(label)) for image, label in dataset), strict=True
    )
    return np.stack(pixels), np.array(labels)


def compose(
    items: Items,
    random: np.random.Generator,
    size: int = 96,
    count: tuple[int, int] = (2, 4),
    side: tuple[int, int] = (24, 44),
    clutter: int = 0,
) -> Scene:
    """Compose a random scene.

    Args:
        items: The items to choose from; all classes are equally likely.
        random: The generator of all random choices.
        size: Height and width of the canvas in pixels.
        count: Least and greatest number of items; an item that finds no free place is left out.
        side: Least and greatest height and width to which an item's image is scaled.
        clutter: The number of fragments of other items on the canvas.
    """
    canvas = random.integers(0, 96, (size, size), dtype=np.uint8)
    for _ in range(clutter):
        item = _scaled_item(items, random, side)[1]
        y, x = (int(random.integers(0, max(1, length - FRAGMENT))) for length in item.shape)
        piece = item[y : y + FRAGMENT, x : x + FRAGMENT]
        y, x = (int(random.integers(0, size - length, endpoint=True)) for length in piece.shape)
        box = np.s_[y : y + piece.shape[0], x : x + piece.shape[1]]
        canvas[box] = np.where(piece > 0, piece, canvas[box])
    instances = np.zeros((size, size), dtype=np.int64)
    boxes, groups = [], []
    for _ in range(random.integers(*count, endpoint=True)):
        group, item = _scaled_item(items, random, side)
        height, width = item.shape
        for _attempt in range(20):
            y = int(random.integers(0, size - height, endpoint=True))
            x = int(random.integers(0, size - width, endpoint=True))
            box = np.s_[y : y + height, x : x + width]
            if all(
                x >= b[2] or x + width <= b[0] or y >= b[3] or y + height <= b[1] for b in boxes
            ):
                canvas[box] = np.where(item > 0, item, canvas[box])
                boxes.append((x, y, x + width, y + height))
                groups.append(group)
                instances[box] = np.where(item > 0, len(boxes), 0)
                break
    return Scene(
        torch.from_numpy(canvas).float().unsqueeze(0) / 255,
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(groups, dtype=torch.int64),
        torch.from_numpy(instances),
    )


def _scaled_item(
    items: Items, random: np.random.Generator, side: tuple[int, int]
) -> tuple[int, np.ndarray]:
    """Choose a random item; return its class, and its pixels at a random scale, cropped to it."""
    group = int(random.integers(1, len(GROUPS), endpoint=True))
    index = random.choice(np.flatnonzero(items.groups == group))
    scaled = int(random.integers(*side, endpoint=True))
    item = np.asarray(Image.fromarray(items.pixels[index]).resize((scaled, scaled)))
    rows, columns = np.flatnonzero(item.any(axis=1)), np.flatnonzero(item.any(axis=0))
    return group, item[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
