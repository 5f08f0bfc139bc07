"""The time that an epoch spends on data and on computation, and its progress on the terminal."""

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
    """The time spent training in an epoch, on this rank.

    Attributes:
        images: Number of images trained on, over all ranks.
        wait: Seconds spent waiting for batches.
        compute: Seconds spent in training steps. On a GPU a step returns before its kernels have
            run, but the next step waits for the outcome of this one, so that over many steps no
            time is lost.
    """

    images: int = 0
    wait: float = 0.0
    compute: float = 0.0

    @property
    def seconds(self) -> float:
        """Seconds spent training, without validation and checkpoints."""
        return self.wait + self.compute

    @property
    def images_per_second(self) -> float:
        """Images per second over all ranks; 0 before the first step."""
        return self.images / (self.seconds or math.inf)

    @property
    def data_wait(self) -> float:
        """Fraction of the training time that was spent waiting for batches, in [0, 1]."""
        return self.wait / (self.seconds or math.inf)

    def waiting(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield the batches, and measure how long each of them is waited for."""
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
        """Measure the time of a step that trains on `images` images over all ranks."""
        start = time.monotonic()
        yield
        self.compute += time.monotonic() - start
        self.images += images


class Progress:
    """Progress through the steps of an epoch: a bar on a terminal, else lines.

    Args:
        title: Text in front of the progress.
        steps: Number of steps in the epoch.
        interval: Number of steps between lines.
        enabled: False prints nothing, as on all ranks but one.
        done: Number of steps that an earlier process of a resumed run has done.
    """

    def __init__(self, title: str, steps: int, interval: int, enabled: bool, done: int = 0) -> None:
        self.title, self.steps, self.interval, self.enabled = title, steps, interval, enabled
        self.start = time.monotonic()
        self.first = self.done = done
        self.bar = None
        if enabled and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=done, desc=title, unit="step", leave=False)

    def step(self, **values: float) -> None:
        """Count one step as done and show `values`."""
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
        """Yield the items and count each as a step; the progress is closed at the end."""
        try:
            for item in items:
                yield item
                self.step()
        finally:
            self.close()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self.bar is not None:
            self.bar.close()
