"""The tables of `emax benchmark modules`."""

import math
from collections.abc import Mapping, Sequence
from statistics import geometric_mean
from typing import Any

from ..tables import heading, row
from .bounds import Bound, verdict
from .gpu import Kernels
from .layers import PASSES, SAVED
from .timing import Measured, described, digits, mean_ratio, milliseconds

__all__ = ["report_modules"]

# A bound on `SAVED` is one on the bytes kept for the backward pass, relative to those of x.
BOUNDS = [
    Bound("forward", "EMAX, C++", "naive EMAX", 1 / 8),
    Bound("forward", "EMAX, C++", "SE", 1.5),
    Bound("forward", "EMAX, C++", "CBAM", 0.6),
    Bound("forward", "EMAX, C++", "CBAM, compiled", 1.0),
    Bound("forward + backward", "EMAX, C++", "naive EMAX", 1 / 6),
    Bound("forward + backward", "EMAX, C++", "SE", 1.6),
    Bound("forward + backward", "EMAX, C++", "CBAM", 0.6),
    Bound("forward + backward", "EMAX, C++", "CBAM, compiled", 1.0),
    Bound(SAVED, "EMAX, C++", "x", 1.2),
    Bound("forward", "EMAX, compiled", "naive EMAX", 1 / 4.5),
    Bound("forward", "EMAX, compiled", "SE", 2.8),
    Bound("forward", "EMAX, compiled", "CBAM", 1.2),
    Bound("forward + backward", "EMAX, compiled", "naive EMAX", 1 / 3),
    Bound("forward + backward", "EMAX, compiled", "CBAM", 0.9),
    Bound(SAVED, "EMAX, compiled", "x", 1.2),
    Bound("forward", "EMAX", "naive EMAX", 1 / 2),
]
# A bound holds for the geometric mean over the shapes; one shape may exceed it by this factor.
WORST_SHAPE = 1.5


def report_modules(found: dict[str, Any]) -> str:
    """Format the result of `measure_modules` as Markdown."""
    lines = _on_gpu(found) if "gpu" in found else _on_cpu(found)
    # The bounds are for images.
    bounds = BOUNDS if len(found["shapes"][0]) == 4 else []
    held = [_verdict(bound, ratios) for bound in bounds if (ratios := _ratios(bound, found))]
    if held:
        lines += [*heading(["bound", "at most", "mean", "worst shape", ""]), *held, ""]
    words = f"Medians of {found['rounds']} interleaved rounds, quartiles in brackets; ratios and "
    words += f"{SAVED} are geometric means over the shapes. "
    if "gpu" in found:
        words += "Wall: calls in a row, over their number; GPU: the kernels alone, with the L2 "
        words += "cache flushed before each call. Ratios: mean over the shapes, and worst shape. "
    words += f"{found['dtype']}, {found['memory_format']}; {described(found['machine'])}."
    return "\n".join([*lines, words])


def _on_cpu(found: dict[str, Any]) -> list[str]:
    shapes = _shapes(found)
    lines: list[str] = []
    for passes, times in found["times"].items():
        peers = [name for name in ("naive EMAX", "SE", "CBAM") if name in times]
        saved = [SAVED + " / x"] if passes == PASSES[1] else []
        head = [f"{passes}, ms", *shapes, *(f"/ {peer}" for peer in peers), *saved]
        lines += heading(head)
        for name, measured in times.items():
            cells = [name, *map(milliseconds, measured)]
            cells += [f"{mean_ratio(measured, times[peer]):.2f}" for peer in peers]
            cells += [_saved(found, name) for _ in saved]
            lines.append(row(cells))
        lines.append("")
    return lines


def _on_gpu(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for passes in PASSES:
        kernels = {
            name: [Measured(*Kernels(*one).seconds) for one in costs]
            for name, costs in found["gpu"][passes].items()
        }
        lines += _times(f"{passes}, wall ms", found["times"][passes], _shapes(found))
        lines += _times(f"{passes}, GPU ms", kernels, _shapes(found))
    counts = [f"{what}, {passes}" for passes in PASSES for what in ("launches", "copies")]
    memory = [f"peak MiB, {shape}" for shape in _shapes(found)]
    lines += heading(["a call", *counts, *memory, f"{SAVED} / x"])
    for name, peaks in found["peak"].items():
        cells = [name]
        for passes in PASSES:
            costs = [Kernels(*one) for one in found["gpu"][passes][name]]
            cells += [_most([one.launches for one in costs]), _most([one.copies for one in costs])]
        cells += [digits(peak / 2**20) for peak in peaks]
        lines.append(row([*cells, _saved(found, name)]))
    return [*lines, "", *_each_kernel(found)]


def _each_kernel(found: dict[str, Any]) -> list[str]:
    """Format a table of the kernels of this package: the time of each, by its name."""
    lines: list[str] = []
    for name, costs in found["gpu"][PASSES[1]].items():
        each = [Kernels(*one).each for one in costs]
        if not name.endswith("Triton") or not any(each):
            continue
        lines += heading([f"{name}: kernels of {PASSES[1]}, us", *_shapes(found)])
        kernels = dict.fromkeys(kernel for one in each for kernel in one)
        for kernel in kernels:
            times = [f"{1e6 * one[kernel]:.1f}" if kernel in one else "-" for one in each]
            lines.append(row([kernel, *times]))
        lines.append("")
    return lines


def _times(
    title: str, times: Mapping[str, Sequence[Sequence[float]]], shapes: Sequence[str]
) -> list[str]:
    """Format a table of times with their ratios to SE and to CBAM."""
    peers = [peer for peer in ("SE", "CBAM") if peer in times]
    lines = heading([title, *shapes, *(f"/ {peer}" for peer in peers)])
    for name, measured in times.items():
        ours = [Measured(*one) for one in measured]
        cells = [name, *map(milliseconds, ours)]
        for peer in peers:
            pairs = zip(ours, (Measured(*one) for one in times[peer]), strict=True)
            ratios = [a.median / b.median for a, b in pairs]
            cells.append(f"{geometric_mean(ratios):.2f} (worst {max(ratios):.2f})")
        lines.append(row(cells))
    return [*lines, ""]


def _shapes(found: dict[str, Any]) -> list[str]:
    return ["x".join(map(str, shape)) for shape in found["shapes"]]


def _saved(found: dict[str, Any], name: str) -> str:
    # Some methods save nothing, and geometric_mean refuses zeros.
    ratios = found["saved"][name]
    return f"{math.prod(ratios) ** (1 / len(ratios)):.2f}"


def _most(counts: Sequence[int | None]) -> str:
    """Format the largest count over the shapes."""
    known = [count for count in counts if count is not None]
    return str(max(known)) if known else "-"


def _ratios(bound: Bound, found: dict[str, Any]) -> list[float]:
    """Return the ratio that a bound limits, for each shape; empty if it was not measured."""
    if bound.what == SAVED:
        return found["saved"].get(bound.method, [])
    times = found["times"][bound.what]
    pairs = zip(times.get(bound.method, []), times.get(bound.over, []), strict=False)
    return [ours.median / theirs.median for ours, theirs in pairs]


def _verdict(bound: Bound, ratios: list[float]) -> str:
    mean, worst = geometric_mean(ratios), max(ratios)
    holds = mean <= bound.ratio and worst <= WORST_SHAPE * bound.ratio
    return verdict(str(bound), bound.ratio, [mean, worst], holds)
