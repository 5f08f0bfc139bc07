"""Promises about ratios of measurements, and whether they hold."""

from collections.abc import Sequence
from typing import NamedTuple

from ..tables import row

__all__ = ["Bound", "verdict"]


class Bound(NamedTuple):
    """A promise: of what is measured, a system takes at most `ratio` times what another takes."""

    what: str
    system: str
    over: str
    ratio: float

    def __str__(self) -> str:
        return f"{self.what}: {self.system} / {self.over}"


def verdict(name: str, most: float, values: Sequence[float], holds: bool) -> str:
    """A row of a table: the promise, its bound, what was measured, and whether that holds."""
    figures = [f"{value:.2f}" for value in (most, *values)]
    return row([name, *figures, "holds" if holds else "missed"])
