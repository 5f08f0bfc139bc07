"""The part of a study's report that is about the dynamic grouping, in Markdown."""

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..tables import heading, row
from .grouping import AS_TRAINED
from .results import GROUPING, read_content
from .statistics import Difference, paired, signed
from .study import Study

__all__ = [
    "Groupings",
    "change_by",
    "grouping_report",
    "read_groupings",
    "share_of_counts",
]

# What `grouping.analyse` has found, by the method and the seed.
Groupings = dict[str, dict[int, dict[str, Any]]]
QUARTERS = 4


def read_groupings(study: Study, folder: Path, backbone: str) -> Groupings:
    """Read what has been found for the runs of a backbone, in the order of the study.

    Raises:
        UsageError: If a file is damaged.
    """
    found: Groupings = {}
    for run in study.runs():
        path = folder / run.folder / GROUPING
        if run.cell.backbone == backbone and path.exists():
            kinds = {"weights": str, "top1": dict, "layers": dict, "gradients": dict}
            found.setdefault(run.cell.method, {})[run.seed] = read_content(path, kinds)
    return found


def grouping_report(groupings: Groupings) -> list[str]:
    """Return the tables of a backbone; nothing if nothing has been found."""
    lines: list[str] = []
    for method, runs in groupings.items():
        contents = list(runs.values())
        lines += ["", f"### Dynamic grouping of {method}, over {len(runs)} seeds", ""]
        lines += [*_accuracy(contents), "", *_shares(contents)]
        if all(content["gradients"] for content in contents):
            lines += ["", *_norms(contents)]
    return lines


def _accuracy(contents: list[dict[str, Any]]) -> list[str]:
    lines = heading(["group counts of every layer", "top-1 (%)", f"- {AS_TRAINED}"])
    for name in contents[0]["top1"]:
        values = [content["top1"][name] for content in contents]
        mean = f"{statistics.mean(values):.2f}"
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        lines.append(row([name, mean + spread, signed(change_by(contents, name), 2)]))
    return [
        *lines,
        "",
        "The trained networks with each layer's count forced to one for all images. Mean ± "
        "standard deviation; the difference ± half the width of its 95 % interval (Student's t "
        "over seeds).",
    ]


def change_by(contents: list[dict[str, Any]], name: str) -> Difference | None:
    """Return what forcing changes, seed by seed."""
    if name == AS_TRAINED:
        return None
    first, second = ([content["top1"][key] for content in contents] for key in (name, AS_TRAINED))
    return paired(first, second)


def _shares(contents: list[dict[str, Any]]) -> list[str]:
    """Tabulate the shares of the group counts by layer, and over all layers by slice and class."""
    layers = contents[0]["layers"]
    every = sorted({count for layer in layers.values() for count in layer["group_counts"]})
    lines = heading(["images (%) whose count is", *map(str, every)])
    for name in layers:
        share = share_of_counts(contents, [name], lambda layer: layer["chosen"])
        lines.append(_row_of(name, share, every))
    for kind in ("by_slice", "by_class"):
        for part in next(iter(layers.values()))[kind]:
            share = share_of_counts(contents, layers, lambda layer, k=kind, p=part: layer[k][p])
            lines.append(_row_of(f"all layers, {part}", share, every))
    return [*lines, "", "Means over the seeds, on the test split."]


def share_of_counts(
    contents: list[dict[str, Any]],
    names: Iterable[str],
    counts_of: Callable[[dict[str, Any]], list[int]],
) -> dict[int, float]:
    """Return the share in per cent of each group count, over some layers and all seeds."""
    total: dict[int, int] = {}
    for content in contents:
        for name in names:
            layer = content["layers"][name]
            for count, images in zip(layer["group_counts"], counts_of(layer), strict=True):
                total[count] = total.get(count, 0) + images
    images = max(1, sum(total.values()))
    return {count: 100 * number / images for count, number in total.items()}


def _row_of(name: str, share: dict[int, float], every: list[int]) -> str:
    return row([name, *(f"{share[count]:.1f}" if count in share else "" for count in every)])


def _norms(contents: list[dict[str, Any]]) -> list[str]:
    """Tabulate the norms of the gradients: medians over the steps of each quarter of a run."""
    names = [f"controller, quarter {number}" for number in range(1, 1 + QUARTERS)]
    lines = heading(["norm of the gradient", *names, "other parameters of the layer"])
    for layer in contents[0]["gradients"]["layers"]:
        cells = [layer]
        for quarter in range(QUARTERS):
            values = [_quarter(c["gradients"], layer, quarter) for c in contents]
            cells.append(f"{statistics.mean(values):.2g}")
        other = [statistics.median(c["gradients"]["layers"][layer]["other"]) for c in contents]
        lines.append(row([*cells, f"{statistics.mean(other):.2g}"]))
    whole = [statistics.median(content["gradients"]["network"]) for content in contents]
    return [
        *lines,
        "",
        "L2 norms; medians over the recorded steps of a quarter of the run, the last column over "
        "all, and means over the seeds. That of the whole network is "
        f"{statistics.mean(whole):.2g}.",
    ]


def _quarter(gradients: dict[str, Any], layer: str, quarter: int) -> float:
    steps, values = gradients["step"], gradients["layers"][layer]["controller"]
    last = steps[-1] + 1
    own = [
        value
        for step, value in zip(steps, values, strict=True)
        if QUARTERS * step // last == quarter
    ]
    return statistics.median(own or values)
