"""Open every image of a split, and gather sizes, modes, duplicates and corrupt files."""

import hashlib
import statistics
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import PurePath
from typing import NamedTuple

from PIL import ExifTags, Image
from torch.utils.data import DataLoader, Dataset

from ..signals import ignore_signals
from .decoding import CorruptImageError, open_image
from .readers import ImageReader

__all__ = ["Inspection", "SplitReport", "duplicates_across", "inspect", "inspections"]


class Inspection(NamedTuple):
    """This is what an image file holds.

    Attributes:
        error: Why it cannot be read; "" if it can. The other fields are then empty.
        format, mode: As Pillow names them; the mode is that of the file, before any conversion.
        width, height: In pixels.
        frames: The number of frames, of which the first is read.
        rotated: Whether an EXIF orientation says that the image is not upright.
        digest: A hash of its size and of its pixels in RGB, as a model gets them.
    """

    error: str = ""
    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    frames: int = 1
    rotated: bool = False
    digest: bytes = b""


def inspect(data: bytes) -> Inspection:
    """Decode an image file completely and describe it; a corrupt one is described by its error."""
    try:
        pixels = open_image(data, "RGB")
    except CorruptImageError as error:
        return Inspection(error=str(error))
    digest = hashlib.blake2b(pixels.tobytes(), digest_size=16, salt=b"%dx%d" % pixels.size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(BytesIO(data)) as image:
            return Inspection(
                format="JPEG" if image.format == "MPO" else image.format or "",
                mode=image.mode,
                width=pixels.width,
                height=pixels.height,
                frames=_frames(image),
                rotated=_is_rotated(image),
                digest=digest.digest(),
            )


def _frames(image: Image.Image) -> int:
    try:
        return getattr(image, "n_frames", 1)
    except Exception:  # frames behind the first may be damaged
        return 1


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    except Exception:  # malformed tags
        return False


class _Inspected(Dataset):
    """The images of a reader as `Inspection`s."""

    def __init__(self, reader: ImageReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> Inspection:
        try:
            source, _ = self.reader[index]
            with source:
                data = source.read()
        except OSError as error:
            return Inspection(error=error.strerror or str(error))
        return inspect(data)


def inspections(reader: ImageReader, workers: int) -> Iterator[Inspection]:
    """Yield what each image of a reader holds, in order, with so many processes that open them."""
    loader = DataLoader(
        _Inspected(reader),
        batch_size=16,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=ignore_signals,
    )
    for batch in loader:
        yield from batch


@dataclass
class SplitReport:
    """This is what a split holds.

    Attributes:
        source: Its folder or tar.
        problems: What keeps it from being trained on, or makes it differ from the first split.
        left_out: What is there and not read, and what may be a mistake.
        classes: Number of images by class.
        unreadable: Why images cannot be read, by file.
        formats, modes: Number of images by Pillow's names of them.
        sizes: Width and height of the smallest, the median and the largest image, by area.
        aspect_ratios: Width over height: the least, the median and the greatest.
        misnamed: Files whose extension is that of another format.
        animated, rotated: Number of images with several frames, and with an EXIF orientation.
        duplicates: Groups of files with the same pixels.
        conflicts: Those of these groups whose files are in several classes.
    """

    source: str
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    classes: dict[str, int] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    formats: dict[str, int] = field(default_factory=dict)
    modes: dict[str, int] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    aspect_ratios: list[float] = field(default_factory=list)
    misnamed: list[str] = field(default_factory=list)
    animated: int = 0
    rotated: int = 0
    duplicates: list[list[str]] = field(default_factory=list)
    conflicts: list[list[str]] = field(default_factory=list)

    def gather(self, reader: ImageReader, found: Iterable[Inspection]) -> dict[bytes, list[str]]:
        """Fill in what the inspections of the reader's images say.

        Returns:
            The files by the digest of their pixels.
        """
        files: defaultdict[bytes, list[int]] = defaultdict(list)
        sizes: list[tuple[int, int]] = []
        formats, modes = Counter[str](), Counter[str]()
        registered = Image.registered_extensions()
        for index, image in enumerate(found):
            path = reader.filename(index)
            if image.error:
                self.unreadable[path] = image.error
                continue
            formats[image.format] += 1
            modes[image.mode] += 1
            sizes.append((image.width, image.height))
            named = registered.get(PurePath(path).suffix.lower(), image.format)
            if {named, image.format} not in ({image.format}, {"MPO", "JPEG"}):
                self.misnamed.append(path)
            self.animated += image.frames > 1
            self.rotated += image.rotated
            files[image.digest].append(index)
        self.formats, self.modes = dict(formats.most_common()), dict(modes.most_common())
        if sizes:
            sizes.sort(key=lambda size: size[0] * size[1])
            self.sizes = [sizes[0], sizes[len(sizes) // 2], sizes[-1]]
            ratios = [width / height for width, height in sizes]
            self.aspect_ratios = [min(ratios), statistics.median(ratios), max(ratios)]
        names = {digest: [*map(reader.filename, found)] for digest, found in files.items()}
        for digest, group in files.items():
            if len(group) > 1:
                self.duplicates.append(names[digest])
                if len({reader.targets[index] for index in group}) > 1:
                    self.conflicts.append(names[digest])
        return names


def duplicates_across(
    files: dict[str, dict[bytes, list[str]]],
) -> list[dict[str, list[str]]]:
    """Return the files with the same pixels in several splits, as groups of files by split.

    Args:
        files: For each split its files by the digest of their pixels.
    """
    digests = Counter(digest for found in files.values() for digest in found)
    return [
        {split: found[digest] for split, found in files.items() if digest in found}
        for digest, splits in digests.items()
        if splits > 1
    ]
