"""What a run says: its progress on the terminal, a row per epoch in its folder."""

import csv
import io
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from ..files import replace_file

__all__ = ["Progress", "RunLog"]

T = TypeVar("T")


class RunLog:
    """log.csv and log.jsonl: the same rows, appended to as epochs end.

    Args:
        folder: The run's folder.
        columns: The keys of every row.
        rows: Those of earlier epochs; whatever else the files hold is dropped.
    """

    def __init__(self, folder: Path, columns: list[str], rows: Sequence[dict[str, Any]]) -> None:
        self.csv, self.jsonl = folder / "log.csv", folder / "log.jsonl"
        self.columns = columns
        header = self._csv_line(dict(zip(columns, columns, strict=True)))
        past = {
            self.csv: header + "".join(map(self._csv_line, rows)),
            self.jsonl: "".join(map(_json_line, rows)),
        }
        for path, text in past.items():
            replace_file(path, lambda file, text=text: file.write_bytes(text.encode()))

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; a key that is not a column is an error."""
        for path, line in ((self.csv, self._csv_line(row)), (self.jsonl, _json_line(row))):
            with path.open("ab") as file:
                file.write(line.encode())

    def _csv_line(self, row: dict[str, Any]) -> str:
        line = io.StringIO()
        csv.DictWriter(line, self.columns).writerow(row)
        return line.getvalue()


def _json_line(row: dict[str, Any]) -> str:
    # JSON has no NaN.
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
    }
    return json.dumps(finite) + "\n"


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
