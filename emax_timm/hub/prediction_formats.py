"""Formats in which `emax predict` prints predictions: a table to read, CSV and JSON lines."""

import csv
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["FORMATS", "Prediction"]


class Prediction(NamedTuple):
    """A predicted class: its name and its probability."""

    name: str
    probability: float


Writer = Callable[[Path, Sequence[Prediction]], None]
"""Prints the predictions for an image, the most probable first."""

# Longer paths and names of classes are printed whole, but do not widen the column of all others.
WIDEST_PATH, WIDEST_NAME = 60, 24


def _table(paths: Sequence[Path], names: Sequence[str], top: int) -> Writer:
    path_width = min(WIDEST_PATH, max([5, *(len(_shown(path)) for path in paths)]))
    name_width = min(WIDEST_NAME, max([5, *map(len, names)]))
    titles = [f"{f'top {rank}':<{name_width + 7}}" for rank in range(1, min(top, len(names)) + 1)]
    print("  ".join([f"{'image':<{path_width}}", *titles]).rstrip(), flush=True)

    def write(path: Path, found: Sequence[Prediction]) -> None:
        cells = [f"{p.name:<{name_width}}  {p.probability:.3f}" for p in found]
        print("  ".join([f"{_shown(path):<{path_width}}", *cells]), flush=True)

    return write


def _csv(paths: Sequence[Path], names: Sequence[str], top: int) -> Writer:
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(["path", "rank", "label", "probability"])

    def write(path: Path, found: Sequence[Prediction]) -> None:
        for rank, (name, probability) in enumerate(found, start=1):
            table.writerow([_shown(path), rank, name, f"{probability:.6g}"])
        sys.stdout.flush()

    return write


def _jsonl(paths: Sequence[Path], names: Sequence[str], top: int) -> Writer:
    def write(path: Path, found: Sequence[Prediction]) -> None:
        rows = [{"label": p.name, "probability": float(f"{p.probability:.6g}")} for p in found]
        print(json.dumps({"path": str(path), "predictions": rows}), flush=True)

    return write


def _shown(path: Path) -> str:
    """Return a path that can be printed, whatever bytes its name has."""
    return str(path).encode(errors="surrogateescape").decode(errors="replace").replace("\n", " ")


# By its name, a function of all paths, the names of all classes and the number of classes to print,
# which prints the header, if there is one.
FORMATS: dict[str, Callable[[Sequence[Path], Sequence[str], int], Writer]] = {
    "table": _table,
    "csv": _csv,
    "jsonl": _jsonl,
}
