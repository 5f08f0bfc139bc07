"""Markdown tables, and documents that hold the output of a command."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .errors import UsageError

__all__ = ["heading", "marks", "row", "text_around", "write_between"]


def row(cells: Sequence[str]) -> str:
    """A row of a table."""
    return f"| {' | '.join(cells)} |"


def heading(cells: Sequence[str]) -> list[str]:
    """The first two rows of a table of which all but the first column are figures."""
    return [row(cells), row(["---", *["---:"] * (len(cells) - 1)])]


def marks(name: str) -> tuple[str, str]:
    """The lines of a document between which is the output of a command."""
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def write_between(path: Path, name: str, text: str) -> None:
    """Replace what is between the marks in a file, in one step or not at all.

    Raises:
        UsageError: If the file lacks the marks, or cannot be written.
    """
    before, after = text_around(path, name)
    text = text.replace("\n", "\r\n" if before.endswith("\r\n") else "\n")
    target = path.resolve()  # a link stays one
    try:
        with tempfile.TemporaryDirectory(prefix=".emax-", dir=target.parent) as folder:
            temporary = Path(folder, target.name)
            temporary.write_bytes((before + text + after).encode())
            shutil.copymode(target, temporary)
            os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from error


def text_around(path: Path, name: str) -> tuple[str, str]:
    """The text of a file up to the first mark's line, and from the second one's on.

    Raises:
        UsageError: If the file lacks them, or cannot be changed.
    """
    begin, end = marks(name)
    try:
        # For writing too, so that a file that must not change is refused.
        with path.open("r+", encoding="utf-8", newline="") as file:
            lines = file.read().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot change {path}: {error}") from error
    marked = [i for i, line in enumerate(lines) if line.rstrip() in (begin, end)]
    if [lines[i].rstrip() for i in marked] != [begin, end]:
        raise UsageError(f"{path} must have the line {begin} once and, below it, {end} once")
    first, last = marked
    return "".join(f"{line}\n" for line in lines[: first + 1]), "\n".join(lines[last:])
