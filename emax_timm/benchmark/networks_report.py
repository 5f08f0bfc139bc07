"""The tables of `emax benchmark models`."""

import math
from typing import Any

from ..tables import heading, row
from .bounds import Bound, verdict
from .gpu import Kernels
from .networks import INFERENCE, PEAK, STEP
from .timing import Measured, described, digits, milliseconds

__all__ = ["report_models"]

UNITS = {INFERENCE: "ms", STEP: "ms", PEAK: "MB"}
# Each bound must hold for every network.
BOUNDS = [
    Bound(INFERENCE, "EMAX, C++", "baseline", 1.1),
    Bound(INFERENCE, "EMAX, compiled", "baseline, compiled", 1.2),
    Bound(STEP, "EMAX, C++", "SE", 1.15),
    Bound(PEAK, "EMAX, C++", "SE", 1.05),
]


def report_models(found: dict[str, Any]) -> str:
    """Format the result of `measure_models` as Markdown."""
    lines = _on_gpu(found) if "cuda" in found["machine"] else _on_cpu(found)
    held = [
        verdict(str(bound), bound.ratio, ratios, max(ratios) <= bound.ratio)
        for bound in BOUNDS
        if (ratios := _ratios(bound, found["models"]))
    ]
    if held:
        lines += [*heading(["bound", "at most", *found["models"], ""]), *held, ""]
    lines.append(
        f"Batch {found['batch']}, {found['size']} x {found['size']}. Medians of {found['rounds']} "
        f"interleaved rounds, quartiles in brackets. {found['dtype']}, {found['memory_format']}; "
        f"{described(found['machine'])}."
    )
    return "\n".join(lines)


def _on_cpu(found: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for base, methods in found["models"].items():
        peers = [peer for peer in ("baseline", "SE", "baseline, compiled") if peer in methods]
        head = [base]
        measured = [
            what
            for what in (INFERENCE, STEP, PEAK)
            if any(figures[what] is not None for figures in methods.values())
        ]
        for what in measured:
            head += [f"{what}, {UNITS[what]}", *(f"/ {peer}" for peer in peers)]
        lines += heading(head)
        for method, figures in methods.items():
            cells = [method]
            for what in measured:
                cells.append(_cell(figures[what]))
                ratios = (_ratio(figures[what], methods[peer][what]) for peer in peers)
                cells += ["-" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios]
            lines.append(row(cells))
        lines.append("")
    return lines


def _on_gpu(found: dict[str, Any]) -> list[str]:
    """Format tables of images per second, memory and kernels; ratios are those of speeds."""
    lines: list[str] = []
    for base, methods in found["models"].items():
        peers = [peer for peer in ("baseline", "SE") if peer in methods]
        measured = [
            what
            for what in (INFERENCE, STEP)
            if all(figures[what] is not None for figures in methods.values())
        ]
        head = [base, "network"]
        for what in measured:
            head += [f"{what}, images/s", *(f"/ {peer}" for peer in peers)]
            head += ["GPU ms", "launches", "first call, s"]
        lines += heading([*head, *(["peak, GiB"] if STEP in measured else [])])
        for method, figures in methods.items():
            cells = [method, figures["network"]]
            for what in measured:
                speed = figures["images per second"]
                cells.append(digits(speed[what]))
                rest = (methods[peer]["images per second"][what] for peer in peers)
                cells += [f"{speed[what] / other:.2f}" for other in rest]
                cells += _kernels(figures, what)
            if STEP in measured:
                cells.append(f"{figures[PEAK] / 2**30:.2f}")
            lines.append(row(cells))
        lines.append("")
    return lines


def _kernels(figures: dict[str, Any], what: str) -> list[str]:
    cost = Kernels(*figures["kernels"][what])
    launches = "-" if cost.launches is None else str(cost.launches)
    milliseconds = digits(1000 * Measured(*cost.seconds).median)
    return [milliseconds, launches, f"{figures['first call'][what]:.1f}"]


def _ratios(bound: Bound, models: dict[str, Any]) -> list[float]:
    """Return the ratio that a bound limits, by network; empty if one was not measured."""
    pairs = [(methods.get(bound.method), methods.get(bound.over)) for methods in models.values()]
    ratios = [
        _ratio(ours[bound.what], theirs[bound.what]) for ours, theirs in pairs if ours and theirs
    ]
    if len(ratios) < len(models) or any(math.isnan(ratio) for ratio in ratios):
        return []
    return ratios


def _ratio(ours: Any, theirs: Any) -> float:
    if ours is None or theirs is None:
        return math.nan
    if isinstance(ours, int):
        return ours / theirs
    return Measured(*ours).median / Measured(*theirs).median


def _cell(figure: Any) -> str:
    if figure is None:
        return "-"
    return f"{figure / 1e6:.0f}" if isinstance(figure, int) else milliseconds(Measured(*figure))
