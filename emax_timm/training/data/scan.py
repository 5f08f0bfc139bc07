"""Find the images of a folder or a tar by their names; no image is opened.

Everything that is left out is counted by its reason, so that no image is missed silently.
"""

import os
import posixpath
import re
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from timm.data import get_img_extensions

__all__ = [
    "HIDDEN",
    "LOOSE",
    "ImageFile",
    "LeftOut",
    "Scan",
    "image_extensions",
    "is_hidden",
    "natural_key",
    "scan",
]

# Formats that Pillow recognises but leaves to others to decode: to a handler that another package
# registers, to Windows, or to Ghostscript. Of MPEG it knows no more than the size.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}

# Names, in lower case, that operating systems and storage devices leave in folders of images.
# Those that begin with a dot (.DS_Store, ._1.png, .ipynb_checkpoints) are hidden in any case.
_SYSTEM_NAMES = {
    *("__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    *("$recycle.bin", "system volume information", "lost+found"),
    *("@eadir", "@tmp", "@recycle", "@__thumb", "#recycle", "#snapshot"),
}

# Reasons for which files are left out.
HIDDEN = "hidden or of the operating system"
LOOSE = "in no class folder"
NO_FILE = "no regular file"


def image_extensions() -> frozenset[str]:
    """Return the extensions of the images that are read, in lower case and with their dot.

    They are those of all formats that Pillow decodes by itself, and what timm has been told of.
    """
    registered = Image.registered_extensions()  # this loads all of Pillow's formats
    decoded = {*Image.OPEN, "MPO"} - _NOT_DECODED  # MPO is opened as the JPEG that it begins with
    return frozenset(name for name, kind in registered.items() if kind in decoded) | set(
        get_img_extensions()
    )


class ImageFile(NamedTuple):
    """An image by its names.

    Attributes:
        folder: The class folder relative to the root, with "/" in it on every system; a tar within
            a tar counts as a folder.
        name: The name of the file.
        place: Offset and size of its bytes in the tar; None in a folder.
    """

    folder: str
    name: str
    place: tuple[int, int] | None = None

    @property
    def path(self) -> str:
        """The path relative to the root."""
        return f"{self.folder}/{self.name}"


class LeftOut(NamedTuple):
    """How many files or folders were left out for a reason, and one of them."""

    number: int
    example: str


@dataclass
class Scan:
    """The images of a folder or tar, and what else is in it.

    Attributes:
        root: The folder or the tar.
        extensions: Extensions of images.
        files: The images that are in class folders.
        folders: Number of images in each folder itself, for all folders but hidden ones.
        left_out: What is no image in a class folder, by reason.
    """

    root: Path
    extensions: frozenset[str]
    files: list[ImageFile] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, LeftOut] = field(default_factory=dict)

    def leave_out(self, reason: str, path: str) -> None:
        """Count a file or folder as left out."""
        before = self.left_out.get(reason, LeftOut(0, path))
        self.left_out[reason] = before._replace(number=before.number + 1)

    def add(self, folder: str, name: str, place: tuple[int, int] | None = None) -> None:
        """Add a file that is no hidden one, or leave it out."""
        # Names do not begin with a dot, so that what is behind the last one is the extension.
        stem, dot, extension = name.rpartition(".")
        extension = dot + extension.lower()
        if stem and extension in self.extensions and folder:
            self.files.append(ImageFile(folder, name, place))
            self.folders[folder] += 1
            return
        path = f"{folder}/{name}" if folder else name
        if not stem:
            self.leave_out("without extension", path)
        elif extension not in self.extensions:
            self.leave_out(f"with extension {extension}", path)
        else:
            self.leave_out(LOOSE, path)

    def barren(self) -> list[str]:
        """Return the outermost folders without an image in or below them, sorted.

        A folder within a class folder, that is, one that has images, is none of them.
        """
        alive = {""}  # folders with an image in or below them
        for folder, images in self.folders.items():
            while images and folder not in alive:
                alive.add(folder)
                folder = os.path.dirname(folder)
        candidates = ((folder, os.path.dirname(folder)) for folder in self.folders)
        return sorted(
            folder
            for folder, parent in candidates
            if folder not in alive and parent in alive and not self.folders.get(parent)
        )


def scan(root: Path, extensions: frozenset[str] | None = None) -> Scan:
    """Find the images below a folder or in a tar, in the order in which timm would have them.

    Links to folders are followed, but for those that lead back to a folder they are in.

    Args:
        root: A folder, or an uncompressed tar, in which there may be tars.
        extensions: Extensions of images; those of `image_extensions` if None.

    Raises:
        OSError: If a folder or the tar cannot be read.
        tarfile.TarError: If the tar, or one in it, is damaged.
    """
    found = Scan(root, image_extensions() if extensions is None else extensions)
    if root.is_dir():
        _scan_folder(found, str(root), "")
    else:
        with tarfile.open(root, "r:") as tar:
            _scan_tar(found, tar, "", 0)
    _sort(found.files)
    return found


def _sort(files: list[ImageFile]) -> None:
    """Sort by the natural key of the path, and by the path where that leaves 1.png and 01.png."""
    files.sort()
    starts = {file.folder: natural_key(f"{file.folder}/") for file in files}
    files.sort(key=lambda file: starts[file.folder] + natural_key(file.name))


_DIGITS = re.compile("[0-9]+")


def natural_key(text: str) -> str:
    """Return a key that orders texts as timm does: numbers by their value, letters in lower case.

    A number becomes a character that is before all others, its length and its digits. So the key of
    a whole is that of its parts, where no number is cut.
    """
    return _DIGITS.sub(_number_key, text.lower())


def _number_key(found: re.Match[str]) -> str:
    digits = found[0].lstrip("0")
    return f"\0{chr(len(digits))}{digits}"


def _scan_folder(found: Scan, folder: str, relative: str) -> None:
    subfolders = []
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if is_hidden(name):
                found.leave_out(HIDDEN, f"{relative}/{name}".lstrip("/"))
            elif _is_folder(entry):
                subfolders.append(entry)
            elif entry.is_symlink() or entry.is_file():  # a link that leads nowhere is read later
                found.add(relative, name)
            else:
                found.leave_out(NO_FILE, f"{relative}/{name}".lstrip("/"))
    for entry in subfolders:
        path = f"{relative}/{entry.name}".lstrip("/")
        if entry.is_symlink() and _leads_back(entry.path, folder):
            found.leave_out("a link to a folder that it is in", path)
        else:
            found.folders[path] = 0
            _scan_folder(found, entry.path, path)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder of that name is hidden, or of the operating system."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # such as a link to itself
        return False


def _leads_back(link: str, folder: str) -> bool:
    target, here = os.path.realpath(link), os.path.realpath(folder)
    return here == target or here.startswith(os.path.join(target, ""))


def _scan_tar(found: Scan, tar: tarfile.TarFile, prefix: str, start: int) -> None:
    """Scan a tar whose names are below `prefix` and whose bytes begin at `start` of the file."""
    for member in tar:
        path = posixpath.normpath(posixpath.join(prefix, member.name.lstrip("/")))
        if path == ".":
            continue
        folder, name = posixpath.split(path)
        place = (start + member.offset_data, member.size)
        parts = path.split("/")
        hidden = [depth for depth, part in enumerate(parts) if part != ".." and is_hidden(part)]
        visible = parts[: hidden[0]] if hidden else parts if member.isdir() else parts[:-1]
        if visible:
            found.folders.setdefault("/".join(visible), 0)
        if hidden:
            found.leave_out(HIDDEN, path)
        elif member.isdir():
            continue
        elif not member.isreg() or member.issparse():
            found.leave_out(NO_FILE, path)
        elif name.lower().endswith(".tar"):
            inner = path.removesuffix(name[-4:])
            found.folders.setdefault(inner, 0)
            with tarfile.open(fileobj=tar.extractfile(member), mode="r:") as child:
                _scan_tar(found, child, inner, place[0])
        else:
            found.add(folder, name, place)
