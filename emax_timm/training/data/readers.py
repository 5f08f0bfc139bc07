"""A reader of the images in a folder or a tar, which refuses what is no data set.

It takes the place of timm's two readers, with the same labels in the same order, but reads every
format that Pillow decodes, skips hidden files, and knows what it has left out.
"""

import os
import tarfile
from collections import Counter
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from ...errors import UsageError
from .scan import LOOSE, ImageFile, LeftOut, Scan, natural_key, scan

__all__ = ["LAYOUT", "SPLIT_NAMES", "ImageReader", "read_class_map"]

LAYOUT = "images lie in SPLIT/CLASS/, as in train/cat/1.png"

# The names of splits, with timm's synonyms.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "eval", "evaluation"),
    "test": ("test", "testing"),
}


class ImageReader:
    """The images of one split, in a folder or a tar, with their labels.

    Args:
        root: A folder of class folders, or an uncompressed tar of them.
        class_map: Labels by the names of class folders; images in other folders are left out. None
            numbers the classes in natural order.
        map_name: The name of the file that the class map is from, for messages.
        extensions: Extensions of images, in lower case; by default those that Pillow decodes.

    Attributes:
        class_to_idx: Labels by the names of the classes.
        files, targets: The images and their labels.
        left_out: What is in the folder and not read, by reason.
        unmapped: Numbers of images by the class folders that the class map does not name.
        notes: What is likely to be a mistake, one line each.

    Raises:
        UsageError: If the folder or tar cannot be read, or is no data set: it has no images, no
            class folders, class folders without images, or folders of splits.
    """

    def __init__(
        self,
        root: Path,
        class_map: dict[str, int] | None = None,
        map_name: str = "",
        extensions: frozenset[str] | None = None,
    ) -> None:
        self.root, self._map_name = root, map_name
        found = _scan(root, extensions)
        labels: Counter[str] = Counter()
        for folder, images in found.folders.items():
            if images:
                labels[os.path.basename(folder)] += images
        if class_map is None:
            names = sorted(labels, key=lambda name: (natural_key(name), name))
            class_map = {name: index for index, name in enumerate(names)}
        self.class_to_idx: dict[str, int] = class_map
        self.unmapped = {name: labels[name] for name in labels if name not in class_map}
        self.left_out: dict[str, LeftOut] = found.left_out
        self._check(found, labels)
        self.notes = _notes(found)
        targets = {
            folder: class_map[label]
            for folder in found.folders
            if (label := os.path.basename(folder)) in class_map
        }
        self.files: list[ImageFile] = found.files
        if self.unmapped:
            self.files = [file for file in found.files if file.folder in targets]
        self.targets: list[int] = [targets[file.folder] for file in self.files]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[BinaryIO, int]:
        file, target = self.files[index], self.targets[index]
        if file.place is None:
            return open(os.path.join(self.root, file.path), "rb"), target
        offset, size = file.place
        # The tar is opened for each image, so that no workers share a position in it.
        with open(self.root, "rb") as tar:
            tar.seek(offset)
            return BytesIO(tar.read(size)), target

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return the file of an image, relative to the root unless `absolute`."""
        path = self.files[index].path
        if basename:
            return os.path.basename(path)
        return os.path.join(self.root, path) if absolute else path

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Return the files of all images."""
        return [self.filename(index, basename, absolute) for index in range(len(self))]

    def _check(self, found: Scan, labels: Counter[str]) -> None:
        """Refuse what is no data set."""
        if not labels:
            raise UsageError(_without_images(found))
        tops = {folder.split("/")[0] for folder in found.folders}
        if len(tops) > 1 and tops <= {name for names in SPLIT_NAMES.values() for name in names}:
            raise UsageError(
                f"{self.root} holds folders of splits ({_some(tops)}), not of classes; "
                "give it as --data-dir, and name the split with the flags"
            )
        if len(self.unmapped) == len(labels):
            raise UsageError(
                f"the class map {self._map_name} names none of the {len(labels)} class folders "
                f"in {self.root} ({_some(labels)}); it names {_some(self.class_to_idx)}"
            )
        barren = found.barren()
        if self._map_name:
            barren = [name for name in barren if os.path.basename(name) in self.class_to_idx]
        if barren:
            raise UsageError(
                f"{self.root} has class folders without images: {_some(barren)}; fill them, or "
                f"take them away{_left_out_there(found)}"
            )


def _scan(root: Path, extensions: frozenset[str] | None) -> Scan:
    if root.is_file() and root.suffix.lower() != ".tar":
        raise UsageError(f"{root} is neither a folder nor an uncompressed .tar file")
    try:
        return scan(root, extensions)
    except OSError as error:
        raise UsageError(f"cannot read {error.filename or root}: {error.strerror}") from None
    except tarfile.TarError as error:
        raise UsageError(f"{root} is not an uncompressed tar, or damaged: {error}") from None


def _without_images(found: Scan) -> str:
    if loose := found.left_out.get(LOOSE):
        return (
            f"{found.root} has {loose.number} images, such as {loose.example}, but no class "
            f"folders; {LAYOUT}"
        )
    if any(".cls" in reason for reason in found.left_out):
        return f"{found.root} has no class folders but labels; give it as --dataset wds/NAME"
    return f"{found.root} holds no images; {LAYOUT}{_left_out_there(found)}"


def _left_out_there(found: Scan) -> str:
    """Say what else is there, in which the missing images may be."""
    texts = [f"{left.number} {reason}" for reason, left in found.left_out.items()]
    return f" (it has files that are not read: {', '.join(texts)})" if texts else ""


def _notes(found: Scan) -> list[str]:
    """Describe layouts that are read otherwise than they may be meant."""
    filled = {folder for folder, images in found.folders.items() if images}
    folders: dict[str, list[str]] = {}
    for folder in filled:
        folders.setdefault(os.path.basename(folder), []).append(folder)
    notes = [
        f"class {label} is gathered from {len(where)} folders: {_some(where)}"
        for label, where in sorted(folders.items())
        if len(where) > 1
    ]
    inside = {folder for folder in filled if os.path.dirname(folder) in filled}
    if inside:
        notes.append(f"folders within class folders are classes of their own: {_some(inside)}")
    return notes


def _some(names: Any) -> str:
    """Return the first names, in order, and how many more there are."""
    names = sorted(names, key=natural_key)
    more = len(names) - 5
    return ", ".join(names[:5]) + (f" and {more} more" if more > 0 else "")


def read_class_map(path: Path) -> dict[str, int]:
    """Read the labels of classes from a text file with one class name per line, in label order.

    Lines without a name at the end, a byte order mark and the line ends of Windows are allowed.

    Raises:
        UsageError: If the file cannot be read, has no names, a name twice, or a line without a
            name before the last.
    """
    if path.suffix.lower() != ".txt":
        raise UsageError(f"{path}: a class map is a .txt file, one class per line")
    try:
        names = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise UsageError(f"cannot read the class map {path}: {reason}") from None
    labels: dict[str, int] = {}
    for index, name in enumerate(map(str.strip, names)):
        if not name:
            raise UsageError(f"line {index + 1} of the class map {path} is empty")
        if name in labels:
            first = labels[name] + 1
            raise UsageError(f"the class map {path} has {name} in lines {first} and {index + 1}")
        labels[name] = index
    if not labels:
        raise UsageError(f"the class map {path} is empty")
    return labels
