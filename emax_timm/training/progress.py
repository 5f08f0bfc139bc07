"""The time that an epoch spends on data and on computation, and the progress of what takes long."""

import math
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["Progress", "Timing", "working"]

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
        elsewhere: Seconds within steps in which other runs of the process had their turns; they
            are not counted in `compute`.
    """

    images: int = 0
    wait: float = 0.0
    compute: float = 0.0
    elsewhere: float = 0.0

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
        start = time.monotonic() - self.elsewhere
        yield
        self.compute += time.monotonic() - self.elsewhere - start
        self.images += images


# Seconds without a line after which one says that work goes on, where there is no terminal.
SILENCE = 30.0


class Progress:
    """Progress through steps: a bar on a terminal, else lines, at least one every 30 seconds.

    Lines come from a thread too, because a step may take minutes: the first one compiles a model.

    Args:
        title: Text in front of the progress.
        steps: Number of steps; None if it is unknown.
        interval: Number of steps between lines; 0 for lines every 30 seconds only.
        enabled: False prints nothing, as on all ranks but one.
        done: Number of steps that an earlier process of a resumed run has done.
        unit: What a step is, in the singular.
        delay: Seconds before a bar is shown.
    """

    def __init__(
        self,
        title: str,
        steps: int | None,
        interval: int,
        enabled: bool,
        done: int = 0,
        unit: str = "step",
        delay: float = 0.0,
    ) -> None:
        self.title, self.steps, self.enabled = title, steps, enabled
        self.terminal = enabled and sys.stderr.isatty()
        self.interval = interval if enabled and not self.terminal else 0
        self.unit, self.delay = unit, delay
        self.start = self.spoken = time.monotonic()
        self.first = self.done = done
        self.bar: tqdm | None = None
        self._ended = threading.Event()
        self._talking = threading.Thread(target=self._keep_talking, daemon=True)
        if enabled:
            if self.terminal and not delay:
                self._open_bar()
            self._talking.start()

    def step(self, count: int = 1, /, **values: float) -> None:
        """Count `count` steps as done and show `values`."""
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()})
            self.bar.update(count)
        elif (
            self.enabled and not self.terminal and self.interval and self.done % self.interval == 0
        ):
            self._say(*(f"{name}: {value:.4g}" for name, value in values.items()))

    def stage(self, title: str) -> None:
        """Begin another stage of the work: the text in front of the progress changes."""
        self.title = title
        if self.bar is not None:
            self.bar.set_description_str(title)

    def print(self, line: str) -> None:
        """Print a line to stderr, above a bar."""
        if self.bar is not None:
            self.bar.clear()
        print(line, file=sys.stderr, flush=True)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items and count each as a step; the progress is closed at the end."""
        with self:
            for item in items:
                yield item
                self.step()

    def close(self) -> None:
        """Remove the bar from the terminal."""
        if self.enabled and not self._ended.is_set():
            self._ended.set()
            self._talking.join()
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _say(self, *values: str) -> None:
        self.spoken = time.monotonic()
        seconds = self.spoken - self.start
        if self.steps is None and not self.done:
            shown = [f"{seconds:.0f} s"]
        else:
            rate = (self.done - self.first) / max(seconds, 1e-9)
            of = "" if self.steps is None else f"/{self.steps}"
            shown = [f"{self.unit} {self.done}{of}", *values, f"{rate:.2f} {self.unit}s/s"]
        print(f"{self.title}  {'  '.join(shown)}", file=sys.stderr, flush=True)

    def _open_bar(self) -> None:
        form = None if self.steps else "{desc}  {elapsed}"
        self.bar = tqdm(
            total=self.steps,
            initial=self.done,
            desc=self.title,
            unit=self.unit,
            leave=False,
            bar_format=form,
        )
        self.bar.start_t -= time.monotonic() - self.start  # before the bar was opened

    def _keep_talking(self) -> None:
        """Show the time that has passed, or say that the work goes on after a long silence."""
        while not self._ended.wait(SILENCE / 30):
            if not self.terminal:
                if time.monotonic() - self.spoken >= SILENCE:
                    self._say()
            elif self.bar is not None:
                self.bar.refresh()
            elif time.monotonic() - self.start >= self.delay:
                self._open_bar()


def working(title: str, enabled: bool = True) -> Progress:
    """Show that work without countable steps goes on; a context manager, and see `Progress.stage`.

    On a terminal the line appears after two seconds, and goes when the work is done.
    """
    return Progress(title, None, 0, enabled, delay=2.0)
