"""How a run gets on: where an epoch's time goes, and its progress on the terminal."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["Progress", "Timing"]

T = TypeVar("T")


@dataclass
class Timing:
    """Where an epoch's training time goes, on this rank.

    Attributes:
        images: Trained on, over all ranks.
        wait: Seconds until batches were there.
        compute: Seconds of the steps. A step ends with work still under way on a GPU, but it waits
            for that of the step before when the ranks agree, so that over many steps none is lost.
    """

    images: int = 0
    wait: float = 0.0
    compute: float = 0.0

    @property
    def seconds(self) -> float:
        """Of training, without validation and checkpoints."""
        return self.wait + self.compute

    @property
    def images_per_second(self) -> float:
        """Over all ranks."""
        return self.images / (self.seconds or math.inf)

    @property
    def data_wait(self) -> float:
        """The fraction of the seconds that was spent waiting."""
        return self.wait / (self.seconds or math.inf)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """The batches, each of them waited for."""
        iterator, end = iter(batches), object()
        while True:
            start = time.monotonic()
            batch: Any = next(iterator, end)
            self.wait += time.monotonic() - start
            if batch is end:
                return
            yield batch

    @contextmanager
    def computing(self, images: int) -> Iterator[None]:
        """A step on so many images of all ranks."""
        start = time.monotonic()
        yield
        self.compute += time.monotonic() - start
        self.images += images


class Progress:
    """Progress through the steps of an epoch: a bar on a terminal, else a line now and then.

    Args:
        title: What the steps belong to.
        steps: Number of steps.
        interval: Steps between lines.
        enabled: False keeps silent, as all but one rank do.
        done: Steps that an earlier process has done.
    """

    def __init__(self, title: str, steps: int, interval: int, enabled: bool, done: int = 0) -> None:
        self.title, self.steps, self.interval, self.enabled = title, steps, interval, enabled
        self.start = time.monotonic()
        self.first = self.done = done
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, desc=title, unit="step", leave=False)

    def step(self, **values: float) -> None:
        """One step is done; `values` are shown."""
        self.done += 1
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            self.bar.update()
        elif self.enabled and self.done % self.interval == 0:
            rate = (self.done - self.first) / (time.monotonic() - self.start)
            shown = [f"{name}: {value:.4g}" for name, value in values.items()]
            shown = [f"step {self.done}/{self.steps}", *shown, f"{rate:.2f} steps/s"]
            print(f"{self.title}  {'  '.join(shown)}", file=sys.stderr, flush=True)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """The items, each of them a step."""
        try:
            for item in items:
                yield item
                self.step()
        finally:
            self.close()

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
