"""The image files in folders, for the commands that take images without labels."""

import os
from collections.abc import Iterable
from pathlib import Path

from ...errors import UsageError
from .scan import image_extensions, is_hidden, natural_key

__all__ = ["find_image_files"]


def find_image_files(paths: Iterable[str | Path]) -> list[Path]:
    """Find images: the given files, whatever their names, and the images in the given folders.

    A folder's images are those below it, in natural order (2 before 10); hidden files and folders
    are left out, as in training. A file that is found twice is listed once.

    Raises:
        UsageError: If a path does not exist, or a folder holds no images.
    """
    found: dict[Path, None] = {}
    for path in map(Path, paths):
        if path.is_dir():
            found |= dict.fromkeys(_below(path))
        elif path.exists():
            found[path] = None
        else:
            raise UsageError(f"{path} does not exist")
    return list(found)


def _below(folder: Path) -> list[Path]:
    suffixes, files, seen = image_extensions(), [], set()
    others = 0
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:  # a link to a folder that it is in
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not is_hidden(name)]
        visible = [name for name in names if not is_hidden(name)]
        images = [name for name in visible if os.path.splitext(name)[1].lower() in suffixes]
        others += len(visible) - len(images)
        files += [Path(place, name) for name in images]
    if not files:
        raise UsageError(
            f"{folder} holds no images: none of its {others} files has a suffix of a format that "
            "Pillow reads, such as .jpg, .png or .webp"
        )
    return sorted(files, key=lambda path: natural_key(str(path)))
