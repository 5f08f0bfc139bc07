"""The plot of a study: accuracy against the time that a network takes for an image."""

import math
from pathlib import Path
from typing import Any

from ..files import replace_file, writing_to
from .costs import speeds
from .report import UNITS, is_paired, values_of
from .results import Results
from .statistics import Difference, paired
from .study import Study

__all__ = ["NEEDED", "draw", "save_figure"]

NEEDED = "the plots need the package matplotlib: pip install 'emax-timm[viz]'"


def draw(study: Study, results: Results, costs: dict[str, Any], backbone: str, path: Path) -> None:
    """Draw the primary metric of every method over its inference time, with 95 % intervals.

    The range is that of the methods that are paired and did not diverge. Others that lie outside
    stand at the border with their value, so that the differences can be seen.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    metric = study.primary.metric
    title, digits = UNITS[metric]
    speed = speeds(study, results, costs, backbone)[0]
    means: dict[str, Difference] = {}
    for method in speed:
        values = list(values_of(results, backbone, method, metric).values())
        means[method] = paired(values, [0.0] * len(values))  # the interval of the mean itself
    diverged = {method for (_, method, _), run in results.items() if run["diverged"]}
    low, high = _limits(
        [
            mean
            for method, mean in means.items()
            if is_paired(study, backbone, method) and method not in diverged
        ]
    )
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for method, mean in means.items():
        time = 1000 / speed[method].inference
        look: dict[str, Any] = {"marker": "o", "yerr": mean.half_width or 0}
        place: dict[str, Any] = {"xytext": (6, 4)}
        name, height = method, mean.mean
        if height < low or height > high:
            look = {"marker": "v" if height < low else "^", "clip_on": False}
            name, height = f"{method}: {height:.{digits}f}", min(max(height, low), high)
            place = {"xytext": (0, 8 if height == low else -16), "ha": "center"}
        axis.errorbar(time, height, capsize=4, **look)
        axis.annotate(name, (time, height), textcoords="offset points", fontsize=8, **place)
    axis.set(
        title=f"{study.name}: {backbone}; means and 95 % intervals (Student's t over seeds)",
        xlabel="inference, ms per image",
        ylabel=f"test {title}",
        ylim=(low, high) if math.isfinite(low) else None,
    )
    axis.title.set_fontsize(10)
    axis.margins(x=0.12)  # the names stand beside the points
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def _limits(means: list[Difference]) -> tuple[float, float]:
    """Return limits that hold these intervals, with a margin; infinite ones if there are none."""
    finite = [mean for mean in means if math.isfinite(mean.mean)]
    if not finite:
        return -math.inf, math.inf
    low = min(mean.mean - (mean.half_width or 0) for mean in finite)
    high = max(mean.mean + (mean.half_width or 0) for mean in finite)
    margin = 0.08 * (high - low) or 1.0
    return low - margin, high + margin


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib by the suffix of the path, the same for the same results."""
    import matplotlib

    settings: Any = {"svg.hashsalt": "emax_timm", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), writing_to(path):
        replace_file(
            path,
            lambda file: figure.savefig(file, format=path.suffix[1:], metadata={"Date": None}),
        )
