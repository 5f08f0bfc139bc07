"""The images of a report, and their classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..training.config import UsageError
from ..training.data.image_files import find_image_files

__all__ = ["Source", "find_images", "spread"]


class Source(NamedTuple):
    """An image file, its name in the report, and its class: "" if it has none."""

    path: Path
    name: str
    label: str


def find_images(paths: Sequence[str]) -> list[Source]:
    """Find the images of a report: the given files, and the images in given folders, sorted.

    The class of an image in a subfolder is the name of the outermost subfolder.

    Raises:
        UsageError: If there are no paths, a path does not exist, or a folder holds no images.
    """
    if not paths:
        raise UsageError("nothing to look at: give --images DIR or files")
    found = []
    for path in map(Path, paths):
        files = find_image_files([path])
        found += _in_folder(path, files) if path.is_dir() else [Source(path, path.name, "")]
    return found


def _in_folder(folder: Path, files: Sequence[Path]) -> list[Source]:
    names = [path.relative_to(folder) for path in files]
    return [
        Source(path, name.as_posix(), name.parts[0] if len(name.parts) > 1 else "")
        for path, name in zip(files, names, strict=True)
    ]


def spread(sources: Sequence[Source], limit: int) -> list[Source]:
    """Select at most `limit` images, balanced over the classes, in their original order."""
    seen: dict[str, int] = {}
    ranked = []
    for position, source in enumerate(sources):
        seen[source.label] = seen.get(source.label, 0) + 1
        ranked.append((seen[source.label], position))
    return [sources[position] for _, position in sorted(sorted(ranked)[:limit], key=lambda r: r[1])]
