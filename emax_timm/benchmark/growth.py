"""`emax benchmark growth`: how a layer's time and memory grow with its input.

Channels, side, batch and factor are halved and doubled from a base point, one of them at a time.
The exponents of growth are slopes on logarithmic axes, fitted by least squares.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..files import replace_file
from ..tables import heading, row
from ..training.config import UsageError
from .layers import PASSES, SAVED, Costs, has_factor, measure_shape, random_features
from .methods import available
from .timing import conditions, described

__all__ = ["Exponent", "Point", "check_drawing", "draw_growth", "exponent", "measure_growth"]

# The axes, with the fields of a point that grow together along them.
AXES = {
    "channels": ("channels",),
    "side": ("height", "width"),
    "batch": ("batch",),
    "factor": ("factor",),
}
METHODS = ("naive EMAX", "EMAX", "EMAX, C++", "SE")


class Point(NamedTuple):
    """The size of an input, and the factor of the layers that have one."""

    batch: int
    channels: int
    height: int
    width: int
    factor: int


class Exponent(NamedTuple):
    """The exponent p of a cost that grows as size ** p."""

    value: float
    error: float
    """Standard error."""


def measure_growth(
    base: Point,
    steps: int,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    methods: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure methods along each axis.

    Args:
        base: The point in the middle of every axis.
        steps: How often the base is halved, and how often it is doubled.
        rounds: How often each time is measured.
        device: The device of the inputs and the layers.
        dtype: Their dtype.
        memory_format: The memory format of the inputs.
        methods: The methods, of `layers.METHODS`; None for those of `METHODS` that are available.

    Returns:
        `axes[axis]` with its `sizes`, and `costs[what][method]` at each size: the median seconds
        per call for each of `PASSES`, and the bytes kept for the backward pass. Methods without a
        factor are not on its axis.

    Raises:
        BackendError: If the C++ backend is requested, but is not built.
        UsageError: If the base cannot be halved so often, or if `factor` does not divide the
            channels at every point.
    """
    if methods is None:
        methods = available(METHODS, device, dtype)
    on_axis = {axis: [n for n in methods if axis != "factor" or has_factor(n)] for axis in AXES}
    series = {axis: _series(axis, base, steps) for axis, names in on_axis.items() if names}
    found: dict[Point, Costs] = {}
    # All axes share the base.
    points = list(dict.fromkeys(point for along in series.values() for point in along))
    for point in tqdm(points, "points", leave=False, disable=None):
        x = random_features(point[:4], device, dtype, memory_format)
        names = [name for name in methods if point.factor == base.factor or has_factor(name)]
        found[point] = measure_shape(names, x, rounds, point.factor)
    axes: dict[str, Any] = {}
    for axis, along in series.items():
        sizes = [getattr(point, AXES[axis][0]) for point in along]
        costs = _costs([found[point] for point in along], on_axis[axis])
        axes[axis] = {"sizes": sizes, "costs": costs}
    return {
        **conditions(device, dtype, memory_format, rounds),
        "base": base._asdict(),
        "axes": axes,
    }


def _costs(results: Sequence[Costs], names: Sequence[str]) -> dict[str, Any]:
    """Turn the results of `measure_shape` at each point into costs by kind and by method."""
    costs: dict[str, Any] = {
        passes: {name: [one.times[passes][name].median for one in results] for name in names}
        for passes in PASSES
    }
    costs[SAVED] = {name: [one.saved[name] for one in results] for name in names}
    return costs


def _series(axis: str, base: Point, steps: int) -> list[Point]:
    sizes = {name: getattr(base, name) for name in AXES[axis]}
    for name, size in sizes.items():
        if size % 2**steps:
            raise UsageError(f"the {name} {size} cannot be halved {steps} times")
    points = []
    for step in range(-steps, steps + 1):
        grown = {name: round(size * 2.0**step) for name, size in sizes.items()}
        points.append(base._replace(**grown))
        if points[-1].channels % points[-1].factor:
            raise UsageError(
                f"{points[-1].channels} channels do not have {points[-1].factor} groups, so the "
                f"{axis} would not be all that changes; take more channels, or fewer steps"
            )
    return points


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> Exponent:
    """Fit the slope of log(cost) over log(size) by least squares, at three sizes or more."""
    if min(costs) <= 0:  # some layers keep no bytes
        return Exponent(math.nan, math.nan)
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    mean_x, mean_y = fmean(x), fmean(y)
    spread = sum((a - mean_x) ** 2 for a in x)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / spread
    rest = sum((b - mean_y - slope * (a - mean_x)) ** 2 for a, b in zip(x, y, strict=True))
    return Exponent(slope, math.sqrt(rest / (len(x) - 2) / spread))


def report_growth(found: dict[str, Any]) -> str:
    """Format the exponents in the result of `measure_growth` as Markdown."""
    lines: list[str] = []
    for what in (*PASSES, SAVED):
        lines += heading([f"exponent of {what}", *found["axes"]])
        for method in found["axes"]["channels"]["costs"][what]:
            cells = [method]
            for axis in found["axes"].values():
                costs = axis["costs"][what].get(method)
                cells.append("-" if costs is None else _cell(exponent(axis["sizes"], costs)))
            lines.append(row(cells))
        lines.append("")
    ranges = ", ".join(
        f"{axis} {min(series['sizes'])} to {max(series['sizes'])}"
        for axis, series in found["axes"].items()
    )
    base = "x".join(str(found["base"][name]) for name in Point._fields[:4])
    lines.append(
        f"p of cost ~ size^p, least squares over powers of two, with standard errors: {ranges}, "
        f"each with the rest as in {base} and factor {found['base']['factor']}. Medians of "
        f"{found['rounds']} interleaved rounds. {found['dtype']}, {found['memory_format']}; "
        f"{described(found['machine'])}."
    )
    return "\n".join(lines)


def _cell(fitted: Exponent) -> str:
    return "-" if math.isnan(fitted.value) else f"{fitted.value:.2f} ± {fitted.error:.2f}"


def check_drawing() -> None:
    """Raise UsageError if matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError(
            "the plot needs the package matplotlib: pip install 'emax-timm[viz]'"
        ) from None


def draw_growth(found: dict[str, Any], path: Path) -> None:
    """Plot the result of `measure_growth` as an SVG file, with a column for each axis."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    units = dict.fromkeys(PASSES, ("ms", 1e3)) | {SAVED: ("MB", 1e-6)}
    # The same numbers give the same file, and text stays text.
    with matplotlib.rc_context({"svg.hashsalt": "emax", "svg.fonttype": "none"}):
        figure = Figure(figsize=(13, 8), layout="constrained")
        panels = figure.subplots(len(units), len(found["axes"]), sharey="row", sharex="col")
        for column, (axis, series) in enumerate(found["axes"].items()):
            for line, (what, (unit, scale)) in enumerate(units.items()):
                panel, sizes = panels[line][column], series["sizes"]
                for number, (method, costs) in enumerate(series["costs"][what].items()):
                    label = f"{method}: {_cell(exponent(sizes, costs))}"
                    values = [scale * cost for cost in costs]
                    # Dashes leave EMAX's curve visible where C++ saves the same bytes.
                    style = "--" if "C++" in method else "-"
                    panel.plot(sizes, values, f"{style}.", label=label, color=f"C{number}")
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.xaxis.set_major_locator(FixedLocator(sizes))
                for each in (panel.xaxis, panel.yaxis):
                    each.set_minor_locator(NullLocator())
                panel.xaxis.set_major_formatter("{x:.0f}")
                panel.grid(alpha=0.3)
                panel.legend(fontsize="x-small")
                if column == 0:
                    panel.set_ylabel(f"{what}, {unit}")
                if line == len(units) - 1:
                    panel.set_xlabel(axis)
        replace_file(path, lambda file: figure.savefig(file, format="svg", metadata={"Date": None}))
