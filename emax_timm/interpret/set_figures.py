"""Figures of a whole model: group counts over a data set, gates, and both over training."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..attention import EMAX
from .figures import new_figure

__all__ = ["choices_figure", "gates_figure", "training_figure"]

Choices = Mapping[str, Mapping[str, Mapping[int, int]]]
"""The number of images that chose a group count, by layer, class and count."""


def choices_figure(choices: Choices) -> Any:
    """Draw how often each group count is chosen: a panel for each layer, a bar for each class.

    Args:
        choices: The number of images by layer, class and group count; every layer has the same
            classes.
    """
    import matplotlib

    classes = list(next(iter(choices.values())))
    counts = sorted(
        {count for layer in choices.values() for found in layer.values() for count in found}
    )
    figure = new_figure(10, 0.55 + (0.75 + 0.24 * len(classes)) * -(-len(choices) // 2))
    grid = figure.subplots(-(-len(choices) // 2), 2, squeeze=False, sharey=True).flatten()
    colors = matplotlib.colormaps["viridis"].resampled(max(2, len(counts)))
    for axis, (layer, found) in zip(grid, choices.items(), strict=False):
        left = [0.0] * len(classes)
        for index, count in enumerate(counts):
            shares = [
                found[name].get(count, 0) / max(1, sum(found[name].values())) for name in classes
            ]
            label = f"{count} group" + "s" * (count > 1)
            axis.barh(classes, shares, left=left, color=colors(index), label=label)
            left = [sum(pair) for pair in zip(left, shares, strict=True)]
        axis.set_title(layer, fontsize="medium")
        axis.set_xlim(0, 1)
    grid[0].invert_yaxis()  # the panels share their y axis, so this inverts all of them
    for axis in grid[len(choices) :]:
        axis.remove()
    figure.supxlabel("share of the images", fontsize="medium")
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)
    return figure


def gates_figure(model: nn.Module) -> Any:
    """Draw gamma, and the mean and the range of the residual gate, of every EMAX layer."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, EMAX)}
    names = list(layers)
    figure = new_figure(10, 1.1 + 0.3 * len(layers))
    left, right = figure.subplots(1, 2, sharey=True)
    gammas = [0.0 if m.gamma is None else m.gamma.item() for m in layers.values()]
    left.barh(names, gammas)
    left.set(title="gamma (channel attention)")
    gates: list[Tensor] = [m.residual_gate.detach().float() for m in layers.values()]
    means = [gate.mean().item() for gate in gates]
    spread = [
        [mean - gate.min().item() for mean, gate in zip(means, gates, strict=True)],
        [gate.max().item() - mean for mean, gate in zip(means, gates, strict=True)],
    ]
    right.errorbar(means, names, xerr=spread, fmt="o", capsize=3)
    right.set(title="residual gate, mean and range")
    right.invert_yaxis()
    for axis in (left, right):
        axis.axvline(0, color="grey", linewidth=0.8)
        axis.grid(alpha=0.3, axis="x")
    return figure


def training_figure(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Draw the gates and the mean chosen group count of every EMAX layer by training epoch.

    Args:
        rows: The rows of a run's layers.jsonl: an epoch's `training.statistics.layer_statistics`
            each.
    """
    from matplotlib.ticker import MaxNLocator

    lines: dict[str, dict[str, list[tuple[int, float]]]] = {
        "gamma": {},
        "mean |residual gate|": {},
        "mean chosen group count": {},
    }
    for row in rows:
        for name, layer in row.items():
            if name == "epoch":
                continue
            images = max(1, sum(layer["histogram"]))
            pairs = zip(layer["group_counts"], layer["histogram"], strict=True)
            values = (
                layer.get("gamma"),
                layer["residual_gate"],
                sum(count * chosen for count, chosen in pairs) / images,
            )
            for curves, value in zip(lines.values(), values, strict=True):
                if value is not None:
                    curves.setdefault(name, []).append((row["epoch"] + 1, value))
    figure = new_figure(11, 3.6)
    for axis, (title, curves) in zip(figure.subplots(1, 3), lines.items(), strict=True):
        for name, points in curves.items():
            axis.plot(*zip(*points, strict=True), label=name, marker=".")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
    handles, labels = figure.axes[1].get_legend_handles_labels()
    if len(handles) <= 20:  # more names would hide the curves
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    return figure
