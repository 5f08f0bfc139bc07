"""The `emax data` command: open every image of a data set, and say what is in it."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError
from ...files import check_target, replace_file, writing_to
from ...runner import command
from ..config import AT_LEAST_0, from_mapping, option, parse_settings
from ..progress import Progress
from .contact_sheet import contact_sheet
from .datasets import open_folder
from .decoding import ImageFiles
from .inspection import SplitReport, duplicates_across, inspections
from .labels import class_names, same_classes, several_classes
from .readers import LAYOUT, SPLIT_NAMES, ImageReader
from .report import left_out
from .scan import is_hidden
from .tables import text_report

__all__ = ["data", "find_splits"]


@dataclass
class DataReportOptions:
    """Open every image of a folder or tar, and report classes, sizes, duplicates and faults."""

    data: str | None = option(
        None, "folder of splits, or one split: a folder or tar", positional=True
    )
    splits: list[str] = option([], "names of the splits (default: those that are there)")
    class_map: str = option("", "text file with one class name per line, in label order")
    input_key: str | None = option(None, "extensions of images, such as .png;.jpg (default: all)")
    workers: int = option(4, "processes that open images; 0 for none", "-j", bounds=AT_LEAST_0)
    contact_sheet: str = option("", "PNG file to draw images of every class to", metavar="FILE")
    format: str = option("table", "output; json names all files", choices=("table", "json"))


@command("emax data")
def data(argv: Sequence[str], prog: str) -> int:
    """Report what is in a data set; returns the exit status: 1 if something in it is at fault."""
    settings = parse_settings(DataReportOptions, argv, prog)
    options = from_mapping(DataReportOptions, settings, "the command line")
    if not options.data:
        raise UsageError(f"no data: give a folder or a .tar file; {LAYOUT}")
    splits = find_splits(Path(options.data), options.splits)
    sheet = Path(options.contact_sheet) if options.contact_sheet else None
    if sheet is not None and (sheet.suffix.lower() != ".png" or not sheet.parent.is_dir()):
        raise UsageError(f"--contact-sheet {sheet} must be a .png file in a folder that is there")
    if sheet is not None:
        check_target(sheet)
    reports: dict[str, SplitReport] = {}
    readers: dict[str, ImageReader] = {}
    files: dict[str, dict[bytes, list[str]]] = {}
    for name, path in splits.items():
        report = reports[name] = SplitReport(str(path))
        try:
            reader = open_folder(path, options.class_map, options.input_key)
        except UsageError as error:
            report.problems.append(str(error))
            continue
        _describe(report, reader, readers)
        readers[name] = reader
        progress = Progress(name, len(reader), interval=1000, enabled=True)
        files[name] = report.gather(reader, progress.track(inspections(reader, options.workers)))
    shared = duplicates_across(files)
    if options.format == "json":
        found = {name: dataclasses.asdict(report) for name, report in reports.items()}
        print(json.dumps({"splits": found, "duplicates across splits": shared}, indent=1))
    else:
        print(text_report(reports, shared))
    if sheet is not None:
        with writing_to(sheet):
            replace_file(sheet, lambda partial: contact_sheet(readers).save(partial, "PNG"))
        print(f"drawn: {sheet}", file=sys.stderr)
    return int(any(report.problems or report.unreadable for report in reports.values()))


def _describe(report: SplitReport, reader: ImageReader, before: dict[str, ImageReader]) -> None:
    """Fill in what the names say: classes, problems and what was left out."""
    names = class_names(reader) or []
    counts = [0] * len(names)
    for target in reader.targets:
        counts[target] += 1
    report.classes = dict(zip(names, counts, strict=True))
    report.left_out = left_out(ImageFiles(reader, "RGB"))
    try:
        several_classes(names, report.source)
        for first in list(before.values())[:1]:
            same_classes(class_names(first), names, report.source)
    except UsageError as error:
        report.problems.append(str(error))


def find_splits(root: Path, names: Sequence[str] = ()) -> dict[str, Path]:
    """Return the splits of a data set by name: its folders and tars with names of splits.

    Args:
        root: A folder of splits, or a single split.
        names: The names of the splits; those that are there if empty.

    Raises:
        UsageError: If the root or a split does not exist.
    """
    if not root.exists():
        raise UsageError(f"{root} does not exist")
    if names:
        found = {name: root / name for name in names}
        for path in found.values():
            if not path.exists():
                raise UsageError(f"there is no split {path}")
        return found
    if root.is_file():
        return {root.stem: root}
    known = [name for synonyms in SPLIT_NAMES.values() for name in synonyms]
    candidates = [root / f"{name}{suffix}" for name in known for suffix in ("", ".tar")]
    there = [path for path in candidates if path.exists()]
    folders = [path for path in root.iterdir() if path.is_dir() and not is_hidden(path.name)]
    # A class may be called train, too: it then has no folders in it, and other classes beside it.
    alone = all(folder in there for folder in folders)
    found = {path.stem: path for path in there if alone or path.is_file() or _has_folders(path)}
    return found or {root.resolve().name: root}


def _has_folders(folder: Path) -> bool:
    return any(path.is_dir() and not is_hidden(path.name) for path in folder.iterdir())
