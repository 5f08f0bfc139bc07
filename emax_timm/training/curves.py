"""Draw the curves of a run from its log."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..files import check_target, replace_file
from ..runner import command
from .config import Parser, UsageError
from .journal import LAYERS, LOG, read_rows
from .sources import run_folder

__all__ = ["curves", "draw_curves"]

FILE = "curves.png"
NEEDED = "curves.png needs the package matplotlib: pip install 'emax-timm[viz]'"


def draw_curves(folder: Path) -> Path:
    """Draw the losses, accuracies, learning rate and mean |residual gate| over the epochs.

    Args:
        folder: The run directory; its log.jsonl is read, and its layers.jsonl if there is one.

    Returns:
        The path of curves.png in the run directory.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If there is no log, or the figure cannot be written.
    """
    # Not pyplot, which has global state and may look for a display.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not (rows := read_rows(folder / LOG)):
        raise FileNotFoundError(f"there are no epochs in {folder / LOG}")
    panels: dict[str, dict[str, list[tuple[int, float]]]] = {
        "loss": {"training": _curve(rows, "train_loss"), "validation": _curve(rows, "val_loss")},
        "validation accuracy (%)": {
            "top-1": _curve(rows, "val_top1"),
            "top-5": _curve(rows, "val_top5"),
        },
        "learning rate": {"": _curve(rows, "lr")},
        "mean |residual gate|": _residual_gates(read_rows(folder / LAYERS)),
    }
    panels = {title: lines for title, lines in panels.items() if any(lines.values())}
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=label, marker=".")
        axis.set(title=title, xlabel="epoch")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if any(lines) and len(lines) <= 20:  # more names would hide the curves
            axis.legend(fontsize="small" if len(lines) <= 4 else "xx-small")
    for axis in axes[len(panels) :]:
        axis.remove()
    path = folder / FILE
    replace_file(path, lambda file: figure.savefig(file, format="png"))
    return path


def draw_at_end(folder: Path) -> None:
    """Draw the curves of a run that has ended; a failure is printed but raises nothing."""
    try:
        draw_curves(folder)
    except ImportError:
        print(f"{NEEDED}, then emax curves {folder}", file=sys.stderr)
    except OSError as error:
        print(f"warning: no {FILE}: {error}", file=sys.stderr)


@command("emax curves")
def curves(argv: Sequence[str], prog: str) -> int:
    """Draw the curves of a run as the command line says; returns the exit status."""
    parser = Parser(prog, description=f"Draw {FILE} into a run directory.", allow_abbrev=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="run directory")
    folder = run_folder(str(parser.parse_args(argv).folder))
    try:
        if folder.is_dir():
            check_target(folder / FILE)
        print(draw_curves(folder))
    except ImportError:
        raise UsageError(NEEDED) from None
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error
    return 0


def _curve(rows: list[dict[str, Any]], column: str) -> list[tuple[int, float]]:
    """Return the points (epoch counted from 1, value) of a column, for rows that have a value."""
    return [(row["epoch"] + 1, row[column]) for row in rows if row[column] is not None]


def _residual_gates(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Return the curve of the mean |residual gate| for each layer."""
    result: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        for name, layer in row.items():
            if name != "epoch" and layer["residual_gate"] is not None:
                result.setdefault(name, []).append((row["epoch"] + 1, layer["residual_gate"]))
    return result
