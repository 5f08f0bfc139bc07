"""The plot of a study: accuracy against the time that a network takes for an image."""

from pathlib import Path
from typing import Any

from ..files import replace_file
from .costs import speeds
from .report import UNITS, values_of
from .results import Results
from .statistics import paired
from .study import Study

__all__ = ["NEEDED", "draw", "save_figure"]

NEEDED = "the plots need the package matplotlib: pip install 'emax-timm[viz]'"


def draw(study: Study, results: Results, costs: dict[str, Any], backbone: str, path: Path) -> None:
    """Draw the primary metric of every method over its inference time, with 95 % intervals.

    Raises:
        ImportError: If matplotlib is missing.
    """
    from matplotlib.figure import Figure

    metric = study.primary.metric
    figure = Figure(figsize=(7, 5), layout="constrained")
    axis = figure.subplots()
    for method, speed in speeds(study, results, costs, backbone)[0].items():
        values = list(values_of(results, backbone, method, metric).values())
        interval = paired(values, [0.0] * len(values))  # of the mean itself
        time = 1000 / speed.inference
        axis.errorbar(time, interval.mean, yerr=interval.half_width or 0, marker="o", capsize=4)
        axis.annotate(
            method, (time, interval.mean), textcoords="offset points", xytext=(6, 4), fontsize=8
        )
    title, _ = UNITS[metric]
    axis.set(
        title=f"{study.name}: {backbone}; means and 95 % intervals (Student's t over seeds)",
        xlabel="inference, ms per image",
        ylabel=f"test {title}",
    )
    axis.title.set_fontsize(10)
    axis.margins(x=0.12)  # the names stand beside the points
    axis.grid(alpha=0.3)
    save_figure(figure, path)


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib by the suffix of the path, the same for the same results."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "emax_timm", "svg.fonttype": "none"}):
        replace_file(
            path,
            lambda file: figure.savefig(file, format=path.suffix[1:], metadata={"Date": None}),
        )
