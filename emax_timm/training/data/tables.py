"""The text of `emax data`: a table with a column for each split, and the files at fault."""

from collections.abc import Iterable, Sequence

from .inspection import SplitReport

__all__ = ["text_report"]

LABELS = (
    *("images", "classes", "of each", "unreadable", "formats", "modes", "width x height"),
    *("aspect ratio", "wrong extension", "several frames", "EXIF-rotated", "duplicates"),
)

# Number of files or groups that are named for each reason.
NAMED = 10


def text_report(reports: dict[str, SplitReport], shared: Sequence[dict[str, list[str]]]) -> str:
    """Return the report on the splits of a data set.

    Args:
        reports: What is in each split, by name.
        shared: Groups of files with the same pixels in several splits, by split.
    """
    rows = zip(LABELS, *map(_cells, reports.values()), strict=True)
    table = [("", *reports), *rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in table
    ]
    for name, report in reports.items():
        lines += [f"{name}: at fault: {problem}" for problem in report.problems]
        lines += [f"{name}: {line}" for line in report.left_out]
        found = (f"{path}: {reason}" for path, reason in report.unreadable.items())
        lines += _first(f"{name}: unreadable", found, len(report.unreadable))
        lines += _first(f"{name}: wrong extension", report.misnamed, len(report.misnamed))
        conflicts = [", ".join(group) for group in report.conflicts]
        lines += _first(f"{name}: the same image in several classes", conflicts, len(conflicts))
        others = [", ".join(g) for g in report.duplicates if g not in report.conflicts]
        lines += _first(f"{name}: the same image", others, len(others))
    groups = [
        ", ".join(f"{split}/{path}" for split, paths in group.items() for path in paths)
        for group in shared
    ]
    return "\n".join(lines + _first("the same image in several splits", groups, len(groups)))


def _cells(report: SplitReport) -> list[str]:
    """Return the cells of a split's column."""
    counts = sorted(report.classes.items(), key=lambda pair: pair[1])
    smallest, middle, largest = (f"{w} x {h}" for w, h in report.sizes or [(0, 0)] * 3)
    least, median, most = report.aspect_ratios or [0.0] * 3
    some = bool(report.sizes)
    copies = sum(len(group) - 1 for group in report.duplicates)
    return [
        str(sum(report.classes.values())),
        str(len(report.classes)),
        f"{counts[0][1]} ({counts[0][0]}) to {counts[-1][1]} ({counts[-1][0]})" if counts else "-",
        str(len(report.unreadable)),
        _counts(report.formats),
        _counts(report.modes),
        f"{smallest} to {largest}, median {middle}" if some else "-",
        f"{least:.2f} to {most:.2f}, median {median:.2f}" if some else "-",
        str(len(report.misnamed)),
        str(report.animated),
        str(report.rotated),
        f"{copies}, {len(report.conflicts)} in several classes"
        if report.conflicts
        else str(copies),
    ]


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "-"


def _first(title: str, items: Iterable[str], count: int) -> list[str]:
    """Return a line for each of the first items, and one on how many more there are."""
    lines = [f"{title}: {item}" for item, _ in zip(items, range(NAMED), strict=False)]
    more = [f"{title}: {count - NAMED} more; --format json has all"] if count > NAMED else []
    return lines + more
