"""What a run says: its progress on the terminal, a row per epoch in its folder."""

import csv
import io
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ..files import replace_file
from .statistics import scalars

__all__ = ["LAYERS", "LOG", "Progress", "RunLog", "Timing", "read_rows"]

LOG, LAYERS = "log.jsonl", "layers.jsonl"

T = TypeVar("T")


class RunLog:
    """log.csv and log.jsonl, the same rows, and layers.jsonl; appended to as epochs end.

    Args:
        folder: The run's folder.
        columns: The keys of every row.
        rows, layers: Those of earlier epochs; whatever else the files hold is dropped.
        track: Is also given the epoch and the numbers of every row that is written.
    """

    def __init__(
        self,
        folder: Path,
        columns: list[str],
        rows: Sequence[dict[str, Any]],
        layers: Sequence[dict[str, Any]],
        track: Callable[[int, dict[str, float]], object],
    ) -> None:
        self.csv, self.jsonl, self.layers = folder / "log.csv", folder / LOG, folder / LAYERS
        self.columns, self.track = columns, track
        header = self._csv_line(dict(zip(columns, columns, strict=True)))
        past = {
            self.csv: header + "".join(map(self._csv_line, rows)),
            self.jsonl: "".join(map(_json_line, rows)),
            self.layers: "".join(map(_json_line, layers)),
        }
        for path, text in past.items():
            if text:
                replace_file(path, lambda file, text=text: file.write_bytes(text.encode()))
            else:
                path.unlink(missing_ok=True)

    def write(self, row: dict[str, Any], layers: dict[str, Any]) -> None:
        """Append a row; a key that is not a column is an error.

        Args:
            row: The columns of the epoch.
            layers: The epoch and, by its name, the statistics of each EMAX layer; empty for none.
        """
        _append(self.csv, self._csv_line(row))
        _append(self.jsonl, _json_line(row))
        if layers:
            _append(self.layers, _json_line(layers))
        # The epoch is the trackers' step.
        numbers = {k: v for k, v in row.items() if v is not None and k not in ("epoch", "step")}
        by_name = {name: values for name, values in layers.items() if name != "epoch"}
        self.track(row["epoch"], numbers | scalars(by_name))

    def _csv_line(self, row: dict[str, Any]) -> str:
        line = io.StringIO()
        csv.DictWriter(line, self.columns).writerow(row)
        return line.getvalue()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; none if there is no file.

    A last line without its end was being written when the run was killed, and is left out.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def _append(path: Path, line: str) -> None:
    with path.open("ab") as file:
        file.write(line.encode())


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row)) + "\n"


def _finite(value: Any) -> Any:
    """The value with None for every number that JSON lacks, at any depth."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
