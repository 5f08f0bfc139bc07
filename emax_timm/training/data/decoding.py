"""Images as files: the pixels that timm would train on, and a clear error where there are none.

An image that cannot be read is never replaced in silence, as timm's data set would do: evaluation
ends with the error, training counts it (`sampling.KeyedDataset`).
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from torch.utils.data import Dataset

__all__ = ["BrokenImageError", "ConvertedImages", "ImageFiles", "open_image"]

# Twice Pillow's own limit for a warning, where Pillow refuses too unless it was told otherwise.
MAX_PIXELS = 2 * (1024**3 // 4 // 3)

# What undoes the EXIF orientations that are not upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BrokenImageError(Exception):
    """An image cannot be read, or too many cannot; the message is one line."""

    exit_code = 1

    def __init__(self, text: str) -> None:
        # A loader raises a worker's error again with the traceback, which ends with it, as text.
        last = text.rstrip().rpartition("\n")[2]
        super().__init__(last.removeprefix(f"{__name__}.{type(self).__name__}: "))


def open_image(source: bytes | str | Path | BinaryIO, mode: str, exif: bool = False) -> Image.Image:
    """Decode an image wholly, and convert it as timm does, 16 bits apart.

    Transparency is dropped, not composited. 16-bit grey is scaled to 8 bits, value / 257 rounded,
    where Pillow would clip it; 32-bit integers count as 16 bits, for so Pillow reads some formats.
    16-bit colour comes from Pillow with the high bytes alone, at most one level off.

    Args:
        source: The file's bytes, its path, or the open file, which is closed.
        mode: PIL mode of the result; I and F keep the values of wide images.
        exif: Turn the image upright as its EXIF orientation says.

    Raises:
        BrokenImageError: With the reason, whatever stands in the way: a file that cannot be read,
            is truncated or no image, or more than `MAX_PIXELS` pixels.
    """
    try:
        return _decode(_read(source), mode, exif)
    except Exception as error:  # Pillow's decoders raise anything
        raise BrokenImageError(_reason(error)) from error


def _read(source: bytes | str | Path | BinaryIO) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, Path)):
        return Path(source).read_bytes()
    with source:
        return source.read()


def _decode(data: bytes, mode: str, exif: bool) -> Image.Image:
    if not data:
        raise BrokenImageError("the file is empty")
    with _strictly(), Image.open(BytesIO(data)) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise BrokenImageError(f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded")
        image.load()
        upright = _upright(image) if exif else image
        wide = upright.mode.startswith("I") and mode not in ("I", "F")
        return (_eight_bits(upright) if wide else upright).convert(mode)


@contextmanager
def _strictly() -> Iterator[None]:
    """No warnings, for what is wrong is an error, and no truncated images, whoever allowed them.

    Both are of the process, so this is for one thread at a time, as loaders' workers are.
    """
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also writes the tags anew, which fails for odd ones.
    try:
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # tags that cannot be read say nothing about the pixels
        return image
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text has an address, not the name
        return "not an image of a known format"
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    known = isinstance(error, (OSError, BrokenImageError)) and text
    return text if known else f"{type(error).__name__}: {text}".removesuffix(": ")


class ImageFiles(Dataset):
    """The images of a reader of timm's, like timm's `ImageDataset`, but strict.

    Args:
        reader: Gives (open file, target) by index, and file names.
        mode: PIL mode of the images.
        exif: Whether EXIF orientations are heeded.
    """

    def __init__(self, reader: Any, mode: str, exif: bool = False) -> None:
        self.reader, self.mode, self.exif = reader, mode, exif
        self.transform: Any = None
        self.target_transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """The image, transformed, and its label, -1 where there is none.

        Raises:
            BrokenImageError: With the name of the file and the reason.
            IndexError: Beyond the last image.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            source, target = self.reader[index]
            image: Any = open_image(source, self.mode, self.exif)
        except Exception as error:  # also the reader's own, such as a file that has vanished
            text = f"broken image {self._name(index)}: {_reason(error)}"
            raise BrokenImageError(text) from error
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """The file of an image, relative to the split's folder unless `absolute`."""
        return self.reader.filename(index, basename, absolute)

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """The files of all images."""
        return self.reader.filenames(basename, absolute)

    def _name(self, index: int) -> str:
        try:
            name = self.filename(index, absolute=True)
        except Exception:  # a reader that keeps the name with the image
            name = None
        return name.replace("\n", " ") if name else f"sample {index}"


class ConvertedImages(Dataset):
    """A data set of torchvision's with its images in the mode that the model takes.

    Args:
        dataset: Gives (PIL image, label); its own transform is left unset.
        mode: PIL mode of the images.
    """

    def __init__(self, dataset: Any, mode: str) -> None:
        self.dataset, self.mode = dataset, mode
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, target = self.dataset[index]
        image = image.convert(self.mode)
        return (image if self.transform is None else self.transform(image)), target
