"""Statistics of a comparison over seeds: Student's t intervals, and Holm's correction."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Difference", "holm", "paired", "signed", "t_p_value", "t_quantile", "unpaired"]


class Difference(NamedTuple):
    """A mean difference, half the width of its 95 % interval, its two-sided p-value, its seeds.

    With a single pair there are neither interval nor p-value, and neither with values that are not
    finite, such as the loss of a run that diverged.
    """

    mean: float
    half_width: float | None
    p_value: float | None
    size: int


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare values of the same seeds: the t interval of their differences, first - second."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    count = len(differences)
    mean = statistics.mean(differences)
    if count < 2 or not math.isfinite(mean):
        return Difference(mean, None, None, count)
    error = statistics.stdev(differences) / math.sqrt(count)
    return _difference(mean, error, count - 1, count)


def unpaired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare values of independent runs: Welch's t interval of the difference of their means.

    The degrees of freedom are rounded down, so that the interval is rather too wide.
    """
    mean, count = statistics.mean(first) - statistics.mean(second), min(len(first), len(second))
    if count < 2 or not math.isfinite(mean):
        return Difference(mean, None, None, count)
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    sizes = [len(first), len(second)]
    below = sum(part**2 / (size - 1) for part, size in zip(parts, sizes, strict=True))
    freedom = math.floor(sum(parts) ** 2 / below) if below else sum(sizes) - 2
    return _difference(mean, math.sqrt(sum(parts)), max(1, freedom), count)


def _difference(mean: float, error: float, freedom: int, count: int) -> Difference:
    if error == 0:
        return Difference(mean, 0.0, 1.0 if mean == 0 else 0.0, count)
    p_value = t_p_value(mean / error, freedom)
    return Difference(mean, t_quantile(freedom) * error, p_value, count)


def signed(found: Difference | None, digits: int) -> str:
    """Return a difference with its sign, ± half the width of its interval; "" for none."""
    if found is None:
        return ""
    mean = f"{round(found.mean, digits) + 0.0:+.{digits}f}"  # a zero has a plus
    return mean if found.half_width is None else f"{mean} ± {found.half_width:.{digits}f}"


def t_p_value(t: float, freedom: int) -> float:
    """Return the two-sided p-value of t with an integer number of degrees of freedom.

    It is the finite sum 26.7.3 and 26.7.4 of Abramowitz and Stegun.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cos, odd = math.cos(angle), freedom % 2
    term, total = cos if odd else 1.0, 0.0
    for step in range(odd + 2, freedom + 1, 2):
        total += term
        term *= cos**2 * (step - 1) / step
    inner = math.sin(angle) * total
    within = 2 / math.pi * (angle + inner) if odd else inner
    return min(1.0, max(0.0, 1.0 - within))


def t_quantile(freedom: int, level: float = 0.95) -> float:
    """Return the t whose two-sided interval has the level, by bisection."""
    low, high = 0.0, 1e4
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_p_value(middle, freedom) > 1 - level else (low, middle)
    return high


def holm(p_values: Sequence[float], size: int | None = None) -> list[float]:
    """Correct p-values for the number of comparisons by Holm's step-down procedure.

    Args:
        p_values: The p-values.
        size: The number of comparisons, if some of them have no p-value yet.
    """
    size = len(p_values) if size is None else size
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, greatest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        greatest = max(greatest, min(1.0, (size - rank) * p_values[index]))
        corrected[index] = greatest
    return corrected
