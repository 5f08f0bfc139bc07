"""Decode images to the pixels that timm would train on, with a clear error for corrupt images.

A corrupt image is never replaced silently, as timm's data set would do: evaluation raises the
error, and training reports, counts and replaces the image (`sampling.KeyedDataset`).
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

__all__ = ["ConvertedImages", "CorruptImageError", "ImageFiles", "OneLineError", "open_image"]

# Twice the size at which Pillow warns; beyond it Pillow raises an error too, by default.
MAX_PIXELS = 2 * (1024**3 // 4 // 3)

# The operation that turns an image upright, by EXIF orientation; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class OneLineError(Exception):
    """An error that may arise in a loader's worker; the message is one line."""

    def __init__(self, text: str) -> None:
        # A loader re-raises a worker's error with its traceback as text; the message is at its end.
        last = text.rstrip().rpartition("\n")[2]
        kind = type(self)
        super().__init__(last.removeprefix(f"{kind.__module__}.{kind.__name__}: "))


class CorruptImageError(OneLineError):
    """An image is corrupt, or too many images are; the message is one line."""

    exit_code = 1


def open_image(source: bytes | str | Path | BinaryIO, mode: str, exif: bool = False) -> Image.Image:
    """Decode an image completely, and convert it as timm does, except for 16-bit images.

    Transparency is dropped, not composited. 16-bit grey is scaled to 8 bits as round(value / 257),
    where Pillow would clip it; 32-bit integers are treated as 16-bit values, because Pillow reads
    some 16-bit formats as such. Of 16-bit colour Pillow keeps the high bytes, which is at most one
    level off.

    Args:
        source: The file's bytes, its path, or the open file, which is closed.
        mode: PIL mode of the result; I and F keep the values of 16-bit and 32-bit images.
        exif: Rotate and flip the image as its EXIF orientation says.

    Raises:
        CorruptImageError: If the file cannot be read, is truncated or no image, or has more than
            `MAX_PIXELS` pixels; the message gives the reason.
    """
    try:
        return _decode(_read(source), mode, exif)
    except Exception as error:  # Pillow's decoders may raise anything
        raise CorruptImageError(_reason(error)) from error


def _read(source: bytes | str | Path | BinaryIO) -> bytes:
    if isinstance(source, bytes):
        return source
    if isinstance(source, (str, Path)):
        return Path(source).read_bytes()
    with source:
        return source.read()


def _decode(data: bytes, mode: str, exif: bool) -> Image.Image:
    if not data:
        raise CorruptImageError("the file is empty")
    with _strictly(), Image.open(BytesIO(data)) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise CorruptImageError(f"{width} x {height} pixels; at most {MAX_PIXELS} are decoded")
        image.load()
        upright = _upright(image) if exif else image
        wide = upright.mode.startswith("I") and mode not in ("I", "F")
        return (_eight_bits(upright) if wide else upright).convert(mode)


@contextmanager
def _strictly() -> Iterator[None]:
    """Silence Pillow's warnings, and refuse truncated images even where the process allows them.

    Both settings are global to the process, so only one thread at a time may use this, as in the
    workers of a loader.
    """
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _upright(image: Image.Image) -> Image.Image:
    # Not ImageOps.exif_transpose: it also rewrites the tags, which fails for malformed ones.
    try:
        method = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # malformed tags do not make the image corrupt
        return image
    return image if method is None else image.transpose(method)


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64).clip(0, 65535)
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text has a memory address, no name
        return "not an image of a known format"
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    known = isinstance(error, (OSError, CorruptImageError)) and text
    return text if known else f"{type(error).__name__}: {text}".removesuffix(": ")


class ImageFiles(Dataset):
    """The images of a timm reader, like timm's `ImageDataset`, but with an error for corrupt ones.

    Args:
        reader: A timm reader, which gives (open file, target) by index, and file names.
        mode: PIL mode of the images.
        exif: Whether to apply EXIF orientations.
    """

    def __init__(self, reader: Any, mode: str, exif: bool = False) -> None:
        self.reader, self.mode, self.exif = reader, mode, exif
        self.transform: Any = None
        self.target_transform: Any = None

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        """Return the transformed image and its label, which is -1 if there is none.

        Raises:
            CorruptImageError: If the image is corrupt; the message gives its file and the reason.
            IndexError: If there is no image of that index.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        try:
            source, target = self.reader[index]
            image: Any = open_image(source, self.mode, self.exif)
        except Exception as error:  # also the reader's own, such as for a deleted file
            text = f"corrupt image {self._name(index)}: {_reason(error)}"
            raise CorruptImageError(text) from error
        if self.transform is not None:
            image = self.transform(image)
        if target is None:
            target = -1
        elif self.target_transform is not None:
            target = self.target_transform(target)
        return image, target

    def filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        """Return the file of an image, relative to the split's folder unless `absolute`."""
        return self.reader.filename(index, basename, absolute)

    def filenames(self, basename: bool = False, absolute: bool = False) -> list[str]:
        """Return the files of all images."""
        return self.reader.filenames(basename, absolute)

    def _name(self, index: int) -> str:
        try:
            name = self.filename(index, absolute=True)
        except Exception:  # some readers keep the name with the image
            name = None
        return name.replace("\n", " ") if name else f"sample {index}"


class ConvertedImages(Dataset):
    """A torchvision data set with its images converted to the mode that the model takes.

    Args:
        dataset: Gives (PIL image, label); its own transform must not be set.
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
