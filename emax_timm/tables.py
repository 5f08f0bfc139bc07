"""Markdown tables, and documents in which a command maintains its output."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import UsageError
from .files import check_target

__all__ = ["heading", "marks", "row", "text_around", "write_between"]


def row(cells: Sequence[str]) -> str:
    """Format a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def heading(cells: Sequence[str]) -> list[str]:
    """Format the two rows of a table's header; all columns but the first are right-aligned."""
    return [row(cells), row(["---", *["---:"] * (len(cells) - 1)])]


def marks(name: str) -> tuple[str, str]:
    """Return the two lines of a document between which a command's output stands."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_between(path: Path, name: str, text: str) -> None:
    """Replace the text between the marks in a file, in one step or not at all.

    Raises:
        UsageError: If the file lacks the marks, or cannot be written.
    """
    before, after = text_around(path, name)
    text = text.replace("\n", "\r\n" if before.endswith("\r\n") else "\n")
    target = path.resolve()  # a symbolic link stays one
    try:
        with tempfile.TemporaryDirectory(prefix=".emax-", dir=target.parent) as folder:
            temporary = Path(folder, target.name)
            temporary.write_bytes((before + text + after).encode())
            shutil.copymode(target, temporary)
            os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def text_around(path: Path, name: str) -> tuple[str, str]:
    """Read a file's text up to the line of the first mark, and from that of the second on.

    Raises:
        UsageError: If the file lacks the marks, or cannot be changed.
    """
    begin, end = marks(name)
    try:
        # It is opened for writing too, so that a read-only file is refused here.
        with path.open("r+", encoding="utf-8", newline="") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot change {path}: {error}") from error
    check_target(path.resolve())
    marked = [i for i, line in enumerate(lines) if line.rstrip() in (begin, end)]
    if [lines[i].rstrip() for i in marked] != [begin, end]:
        raise UsageError(f"{path} must have the line {begin} once and, below it, {end} once")
    first, last = marked
    return "".join(f"{line}\n" for line in lines[: first + 1]), "\n".join(lines[last:])
