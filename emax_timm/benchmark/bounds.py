"""Upper bounds on ratios of measurements, and whether they hold."""

from collections.abc import Sequence
from typing import NamedTuple

from ..tables import row

__all__ = ["Bound", "verdict"]


class Bound(NamedTuple):
    """An upper bound: in the measurement `what`, `method` is at most `ratio` times `over`."""

    what: str
    method: str
    over: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.what}: {self.method} / {self.over}"


def verdict(name: str, most: float, values: Sequence[float], holds: bool) -> str:
    """Format a table row: the name of a bound, its limit, the measured values, and the verdict."""
    figures = [f"{value:.2f}" for value in (most, *values)]
    return row([name, *figures, "holds" if holds else "missed"])
