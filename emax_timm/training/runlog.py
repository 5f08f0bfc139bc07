"""What a run says: its progress on the terminal, a row per epoch in its folder."""

import csv
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

__all__ = ["Progress", "RunLog"]

T = TypeVar("T")


class RunLog:
    """log.csv and log.jsonl: the same rows, appended to as epochs end.

    Args:
        folder: The run's folder.
        columns: The keys of every row.
    """

    def __init__(self, folder: Path, columns: list[str]) -> None:
        self.csv, self.jsonl = folder / "log.csv", folder / "log.jsonl"
        self.columns = columns

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; a key that is not a column is an error."""
        new = not self.csv.exists()
        with self.csv.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns)
            if new:
                writer.writeheader()
            writer.writerow(row)
        with self.jsonl.open("a", encoding="utf-8") as file:
            # JSON has no NaN.
            finite = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v
                for k, v in row.items()
            }
            file.write(json.dumps(finite) + "\n")

    def keep(self, epochs: int) -> None:
        """Drop the rows from epoch `epochs` on, which a resumed run writes again."""
        if not self.jsonl.exists():
            return
        lines = self.jsonl.read_text(encoding="utf-8").splitlines()
        rows = [row for line in lines if (row := json.loads(line))["epoch"] < epochs]
        self.csv.unlink(missing_ok=True)
        self.jsonl.unlink()
        for row in rows:
            self.write(row)


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
