"""The plot of what the dynamic grouping of a study's networks does."""

import statistics
from pathlib import Path
from typing import Any

from .grouping import AS_TRAINED
from .grouping_report import Groupings, change_by, share_of_counts
from .plot import save_figure
from .study import Study

__all__ = ["draw_grouping"]


def draw_grouping(study: Study, backbone: str, groupings: Groupings, path: Path) -> None:
    """Draw for each method the shares of the counts, the forced accuracies and the gradients.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4.2 * len(groupings)), layout="constrained")
    figure.suptitle(f"{study.name}: dynamic grouping on {backbone}", fontsize=11)
    axes = figure.subplots(len(groupings), 3, squeeze=False)
    for row_of_axes, (method, runs) in zip(axes, groupings.items(), strict=True):
        contents = list(runs.values())
        _draw_shares(row_of_axes[0], method, contents)
        _draw_forced(row_of_axes[1], contents)
        _draw_norms(row_of_axes[2], contents)
    save_figure(figure, path)


def _draw_shares(axis: Any, method: str, contents: list[dict[str, Any]]) -> None:
    layers = list(contents[0]["layers"])
    shares = [share_of_counts(contents, [name], lambda layer: layer["chosen"]) for name in layers]
    below = [0.0] * len(layers)
    for count in sorted({count for share in shares for count in share}):
        values = [share.get(count, 0.0) for share in shares]
        axis.barh(layers, values, left=below, label=str(count))
        below = [a + b for a, b in zip(below, values, strict=True)]
    axis.set(title=f"{method}: chosen group counts", xlabel="% of test images", xlim=(0, 100))
    axis.tick_params(axis="y", labelsize=7)
    axis.invert_yaxis()
    axis.legend(fontsize=7, ncols=8, loc="upper center", bbox_to_anchor=(0.5, -0.14))


def _draw_forced(axis: Any, contents: list[dict[str, Any]]) -> None:
    names = [name for name in contents[0]["top1"] if name != AS_TRAINED]
    for place, name in enumerate(names):
        found = change_by(contents, name)
        assert found is not None
        axis.errorbar(place, found.mean, yerr=found.half_width or 0, marker="o", capsize=4)
    axis.axhline(0, color="grey", linewidth=0.8)
    labels = [name.replace("layer's ", "layer's\n") for name in names]
    axis.set_xticks(range(len(names)), labels, fontsize=7)
    axis.set(title="all layers forced to one count", ylabel=f"top-1 - {AS_TRAINED} (points)")


def _draw_norms(axis: Any, contents: list[dict[str, Any]]) -> None:
    recorded = [content["gradients"] for content in contents if content["gradients"]]
    axis.set(title="gradients of the controllers", xlabel="step", yscale="log")
    if not recorded:
        axis.text(0.5, 0.5, "not recorded", ha="center", transform=axis.transAxes)
        return
    for layer in recorded[0]["layers"]:
        columns = []
        for gradients in recorded:
            own = gradients["layers"][layer]
            pairs = zip(own["controller"], own["other"], strict=True)
            columns.append([a / b if b else float("nan") for a, b in pairs])
        mean = [statistics.mean(values) for values in zip(*columns, strict=False)]
        axis.plot(recorded[0]["step"][: len(mean)], mean, label=layer, linewidth=1)
    axis.set_ylabel("norm of the controller / of the other parameters")
    axis.legend(fontsize=6)
