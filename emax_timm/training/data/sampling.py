"""The samples of each batch, and the randomness of a run as a function of the place in it.

Every random draw comes from a generator that is seeded with the purpose of the draw, and never
depends on earlier draws. The seed of an augmentation is (seed, epoch, sample), that of a batch's
mixup its first sample, that of the order of an epoch (seed, epoch), that of a step (seed, step,
rank). So a run does not depend on the number of workers, and one that is resumed in the middle of
an epoch needs no state of a generator.
"""

import hashlib
import random
import struct
import sys
from collections.abc import Iterator
from multiprocessing.sharedctypes import RawArray, RawValue
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from .decoding import CorruptImageError

__all__ = ["Key", "KeyedBatches", "KeyedDataset", "KeyedErasing", "seed_step"]

# The purposes that generators are seeded for.
_ORDER, _SAMPLE, _BATCH, _ERASING, _STEP = range(5)

# Number of images tried for one place in a batch before the error is raised.
ATTEMPTS = 100


class Key(NamedTuple):
    """Identifies a sample of a run; `view` counts the repetitions of an image within an epoch."""

    epoch: int
    image: int
    view: int = 0


class KeyedBatches(Sampler[list[Key]]):
    """Batches of one rank, in a new order every epoch; an incomplete last one is dropped.

    Ranks take turns within a global batch, so that its samples depend on its size alone.

    Args:
        length: Number of images.
        batch_size: Images per rank and batch.
        seed: Seed of the run.
        rank, size: This rank and the number of ranks.
        repeats: Number of views of each image that follow each other; an epoch still has `length`
            views (repeated augmentation, https://arxiv.org/abs/1902.05509).
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        size: int = 1,
        repeats: int = 1,
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.size, self.repeats = rank, size, repeats
        self.epoch = self.first = 0
        self._ordered: tuple[int, np.ndarray] | None = None

    def start(self, epoch: int, first: int = 0) -> None:
        """Make the next iteration begin at batch `first` of epoch `epoch`."""
        self.epoch, self.first = epoch, first

    def __len__(self) -> int:
        """Return the number of batches in a whole epoch."""
        return self.length // (self.batch_size * self.size)

    def __iter__(self) -> Iterator[list[Key]]:
        order = self._order()
        for number in range(self.first, len(self)):
            yield self._batch(order, number)

    def batch(self, number: int) -> list[Key]:
        """Return the samples of a batch of the current epoch."""
        return self._batch(self._order(), number)

    def _order(self) -> np.ndarray:
        if self._ordered is None or self._ordered[0] != self.epoch:
            generator = torch.Generator().manual_seed(_state(self.seed, _ORDER, self.epoch))
            self._ordered = self.epoch, torch.randperm(self.length, generator=generator).numpy()
        return self._ordered[1]

    def _batch(self, order: np.ndarray, number: int) -> list[Key]:
        whole = self.batch_size * self.size
        slots = np.arange(number * whole + self.rank, (number + 1) * whole, self.size)
        images = order[slots // self.repeats].tolist()
        views = (slots % self.repeats).tolist()
        return [Key(self.epoch, *pair) for pair in zip(images, views, strict=True)]


class KeyedDataset(Dataset):
    """A map-style data set indexed by `Key`s, whose augmentation depends on the key alone.

    It runs in the loader's workers, or in the main process if there are none. After a batch it
    leaves the generators of Python, numpy and torch's CPU seeded for collation, which may draw from
    them.

    A corrupt image is replaced by another one, drawn at random for the key. `corrupt` is shared by
    all processes: for each image it is one plus the last epoch in which the image could not be
    read, or 0; `any_corrupt` is 1 once there is one.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed
        # No lock is needed, because all workers write the same value for an image and epoch.
        self.corrupt, self.any_corrupt = RawArray("i", len(dataset)), RawValue("b", 0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Any:
        _seed_cpu(self.seed, _SAMPLE, *key)
        index = key.image
        for _ in range(ATTEMPTS - 1):
            try:
                return self.dataset[index]
            except CorruptImageError as error:
                if not self.corrupt[index]:
                    print(f"skipped {error}", file=sys.stderr, flush=True)
                self.corrupt[index], self.any_corrupt.value = key.epoch + 1, 1
            index = random.randrange(len(self))
        return self.dataset[index]

    def count_corrupt(self, keys: list[Key]) -> int:
        """Count the samples of a loaded batch that replace a corrupt image."""
        return sum(self.corrupt[key.image] == key.epoch + 1 for key in keys)

    def __getitems__(self, keys: list[Key]) -> list[Any]:
        samples = [self[key] for key in keys]
        _seed_cpu(self.seed, _BATCH, *keys[0])
        return samples


class KeyedErasing:
    """timm's RandomErasing with random numbers that depend on the place in the run alone.

    The prefetcher calls it on whole batches, in the main process.
    """

    def __init__(self, erasing: Any, seed: int, rank: int) -> None:
        self.erasing, self.seed, self.rank = erasing, seed, rank
        self.epoch = self.number = 0

    def start(self, epoch: int, first: int = 0) -> None:
        """Start counting batches at `first` of epoch `epoch`."""
        self.epoch, self.number = epoch, first

    def __call__(self, images: Tensor) -> Tensor:
        _seed_all(self.seed, _ERASING, self.epoch, self.number, self.rank)
        self.number += 1
        return self.erasing(images)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed all generators that a training step draws from, on every device."""
    _seed_all(seed, _STEP, step, rank)


def _state(*key: int) -> int:
    """Hash a key of integers of at most 64 bits to a seed of 64 bits."""
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _seed_cpu(*key: int) -> int:
    # This costs every sample a few microseconds.
    state = _state(*key)
    random.seed(state)
    np.random.seed(state & 0xFFFFFFFF)
    torch.default_generator.manual_seed(state)
    return state


def _seed_all(*key: int) -> None:
    torch.manual_seed(_seed_cpu(*key))
