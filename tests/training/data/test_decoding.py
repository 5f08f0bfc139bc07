"""Pixels of every kind of image file against Pillow's, and files that hold no image."""

import io
import pickle
import struct
import tarfile
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps
from tiers import mostly_slow
from timm.data import create_dataset, resolve_data_config
from torch.utils.data import DataLoader
from training_testing import image_folder

from emax_timm.training import TrainConfig
from emax_timm.training.data import (
    corrupt_images,
    evaluation_loader,
    open_split,
    start_epoch,
    training_loader,
)
from emax_timm.training.data.decoding import MAX_PIXELS, CorruptImageError, ImageFiles, open_image
from emax_timm.training.data.sampling import Key, KeyedDataset
from emax_timm.training.distributed import DistributedContext

CPU = DistributedContext(torch.device("cpu"))

# timm's own data set leaves files open.
pytestmark = pytest.mark.filterwarnings("error", "ignore::ResourceWarning")


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def smooth(height: int = 48, width: int = 40) -> Image.Image:
    """An image that JPEG changes little, and whose corners all differ."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows * 5, columns * 6, (rows + columns) * 2], axis=-1)  # [h, w, 3]
    return Image.fromarray(pixels.astype(np.uint8))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette(transparency: bytes | int | None = None) -> bytes:
    image = Image.fromarray(noise(20, 30, 3)).quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    return saved(image, "PNG", **options)


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG file written by hand; `rows` as the format packs them, each after its filter byte."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


def png16(values: np.ndarray, colour: int) -> bytes:
    """A PNG of 16-bit samples [h, w] or [h, w, channels]."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, colour, rows)


EVERY_VALUE = np.arange(65536, dtype=np.uint16).reshape(256, 256)
# Of the 256 levels of value / 257, the nearest.
SCALED = np.floor(EVERY_VALUE / 257 + 0.5).astype(np.uint8)

AS_PILLOW = {
    "RGB": saved(smooth(), "PNG"),
    "JPEG": saved(smooth(), "JPEG"),
    "CMYK": saved(Image.fromarray(noise(20, 30, 4), "CMYK"), "JPEG", quality=95),
    "palette": palette(),
    "palette, transparency of an index": palette(3),
    "palette, transparency as bytes": palette(bytes(range(0, 256, 16))),
    "L": saved(Image.fromarray(noise(20, 30)), "PNG"),
    "LA": saved(Image.fromarray(noise(20, 30, 2), "LA"), "PNG"),
    "RGBA": saved(Image.fromarray(noise(20, 30, 4), "RGBA"), "PNG"),
    "RGBA WebP": saved(Image.fromarray(noise(20, 30, 4), "RGBA"), "WEBP", lossless=True),
    "1 bit": saved(Image.fromarray(noise(20, 30)).convert("1"), "PNG"),
    "float TIFF": saved(Image.fromarray(noise(20, 30).astype(np.float32)), "TIFF"),
    "16-bit colour": png16(noise(20, 30, 3) * np.uint16(257), 2),
}


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("kind", AS_PILLOW)
def test_open_image_gives_the_pixels_of_pillow(kind: str, mode: str) -> None:
    found = open_image(AS_PILLOW[kind], mode)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(AS_PILLOW[kind])).convert(mode)
    assert (found.mode, found.size) == (mode, expected.size)
    assert np.array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("kind", ["palette, transparency as bytes", "LA", "RGBA"])
def test_open_image_drops_transparency(kind: str) -> None:
    # The colours under the alpha, which composition over any background would change.
    whole = Image.open(io.BytesIO(AS_PILLOW[kind])).convert("RGBA")
    assert np.asarray(whole)[..., 3].min() < 255
    found = np.asarray(open_image(AS_PILLOW[kind], "RGB"))
    assert np.array_equal(found, np.asarray(whole)[..., :3])


@pytest.mark.parametrize("order", ["<", ">"], ids=["little", "big"])
def test_open_image_scales_16_bit_grey(order: str) -> None:
    tiff = saved(Image.fromarray(EVERY_VALUE), "TIFF")
    if order == ">":
        image = Image.frombytes("I;16B", (256, 256), EVERY_VALUE.astype(">u2").tobytes())
        tiff = saved(image, "TIFF")
        assert Image.open(io.BytesIO(tiff)).mode == "I;16B"
    for data in (tiff, png16(EVERY_VALUE, 0)):
        assert np.array_equal(np.asarray(open_image(data, "L")), SCALED)
        assert np.array_equal(np.asarray(open_image(data, "RGB")), np.stack([SCALED] * 3, -1))
        assert np.array_equal(np.asarray(open_image(data, "I")), EVERY_VALUE)


def test_open_image_scales_integers_of_16_bits() -> None:
    pgm = b"P5 256 256 65535\n" + EVERY_VALUE.astype(">u2").tobytes()
    assert Image.open(io.BytesIO(pgm)).mode == "I"
    assert np.array_equal(np.asarray(open_image(pgm, "L")), SCALED)


def test_open_image_has_16_bit_colour_within_a_level() -> None:
    data = png16(np.stack([EVERY_VALUE, EVERY_VALUE.T, EVERY_VALUE[::-1]], -1), 2)
    found = np.asarray(open_image(data, "RGB")).astype(int)
    expected = np.stack([SCALED, SCALED.T, SCALED[::-1]], -1)
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_open_image_heeds_exif_if_asked(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = saved(smooth(), kind, exif=exif, **lossless)
    image = Image.open(io.BytesIO(data))
    image.load()
    turned = open_image(data, "RGB", exif=True)
    assert turned.size == ((40, 48) if orientation < 5 else (48, 40))
    assert np.array_equal(np.asarray(turned), np.asarray(ImageOps.exif_transpose(image)))
    assert np.array_equal(np.asarray(open_image(data, "RGB")), np.asarray(image))


@pytest.mark.parametrize("tags", [b"Exif\0\0nonsense", b"", b"Exif\0\0MM\0*\0\0\0\x08\0\xff"])
def test_open_image_keeps_an_image_with_broken_exif(tags: bytes) -> None:
    data = saved(smooth(), "JPEG", exif=tags)
    expected = np.asarray(open_image(saved(smooth(), "JPEG"), "RGB"))
    assert np.array_equal(np.asarray(open_image(data, "RGB", exif=True)), expected)


HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
BOMB = png(60000, 60000, 1, 0, bytes(60000))
# Of noise, which does not fit into a decoder's first buffer.
WHOLE = {kind: saved(Image.fromarray(noise(90, 80, 3)), kind) for kind in ("JPEG", "PNG", "WEBP")}
CORRUPT = {
    "zero bytes": (b"", "empty"),
    "HTML": (HTML, "not an image"),
    "garbage": (noise(500).tobytes(), "not an image"),
    "bomb": (BOMB, "exceeds limit"),
    "bad PNG chunk": (WHOLE["PNG"][:40] + b"\0" * 500 + WHOLE["PNG"][540:], r"\w"),
    **{
        f"{kind} cut at {share}": (data[: int(len(data) * share)], r"\w")
        for kind, data in WHOLE.items()
        for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.99)
    },
}


@pytest.mark.parametrize("tolerant", [False, True])
@pytest.mark.parametrize("kind", CORRUPT)
def test_open_image_refuses_a_corrupt_file(
    monkeypatch: pytest.MonkeyPatch, kind: str, tolerant: bool
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    data, reason = CORRUPT[kind]
    for exif in (False, True):
        with pytest.raises(CorruptImageError, match=reason) as found:
            open_image(data, "RGB", exif)
        assert len(str(found.value).splitlines()) == 1
        assert "0x" not in str(found.value)
    assert tolerant == ImageFile.LOAD_TRUNCATED_IMAGES


def test_open_image_has_a_limit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Image.MAX_IMAGE_PIXELS is not None
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(CorruptImageError, match="60000 x 60000 pixels"):
        open_image(BOMB, "RGB")


def test_open_image_reads_a_large_image_in_silence() -> None:
    # Above Pillow's limit for a warning, under that for an error.
    size = 10_000
    data = png(size, size, 1, 0, bytes((size // 8 + 1) * size))
    assert open_image(data, "L").size == (size, size)


def test_open_image_takes_files_and_closes_them(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(WHOLE["PNG"])
    with path.open("rb") as file:
        images = [open_image(source, "RGB") for source in (path, str(path), file, WHOLE["PNG"])]
        assert file.closed
    assert len({image.tobytes() for image in images}) == 1
    with pytest.raises(CorruptImageError, match="No such file"):
        open_image(tmp_path / "absent.png", "RGB")


@pytest.fixture
def spoilt(tmp_path: Path) -> Path:
    """A folder of 32 training and 10 validation images, of which one each is corrupt."""
    folder = image_folder(tmp_path / "data")
    (folder / "train" / "cat" / "3.jpg").write_bytes(HTML)
    (folder / "validation" / "dog" / "2.png").write_bytes(WHOLE["PNG"][:9000])
    return folder


def open_files(folder: Path, split: str, **options: Any) -> Any:
    config = TrainConfig(data_dir=str(folder), **options)
    return open_split(config, split, "RGB", training=split == "train", batch_size=8)


def data_config() -> dict[str, Any]:
    return resolve_data_config({"input_size": (3, 32, 32), "crop_pct": 1.0})


@pytest.mark.parametrize("split", ["train", "validation"])
def test_image_files_are_timms_data_set_where_nothing_is_wrong(images: Path, split: str) -> None:
    found = open_files(images, split)
    expected: Any = create_dataset("", root=str(images), split=split)
    assert isinstance(found, ImageFiles)
    assert len(found) == len(expected)
    for absolute in (False, True):
        assert found.filenames(absolute=absolute) == expected.filenames(absolute=absolute)
        assert found.filename(3, absolute=absolute) == expected.filename(3, absolute=absolute)
    for index in range(len(expected)):
        (image, label), (other, wanted) = found[index], expected[index]
        assert label == wanted
        assert np.array_equal(np.asarray(image), np.asarray(other))


def test_image_files_of_any_kind_have_the_right_pixels_and_label(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {"turned": saved(smooth(), "JPEG", exif=exif), "grey": png16(EVERY_VALUE, 0)}
    files |= AS_PILLOW
    for number, (name, data) in enumerate(files.items()):
        folder = tmp_path / "validation" / f"{number:02d}"
        folder.mkdir(parents=True)
        (folder / f"{name}.png").write_bytes(data)  # Pillow looks at the content
    for option in (False, True):
        dataset = open_files(tmp_path, "validation", exif_orientation=option)
        for index, data in enumerate(files.values()):
            image, label = dataset[index]
            assert label == index
            assert np.array_equal(np.asarray(image), np.asarray(open_image(data, "RGB", option)))
        assert dataset[0][0].size == ((48, 40) if option else (40, 48))


@pytest.mark.parametrize("kind", ["zero bytes", "HTML", "bomb", "JPEG cut at 0.5", "missing"])
def test_image_files_name_the_corrupt_file(images: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "validation" / "cat"
    folder.mkdir(parents=True)
    path = folder / "a  b.jpg"
    path.write_bytes(CORRUPT.get(kind, (HTML, ""))[0])
    dataset = open_files(tmp_path, "validation")
    if kind == "missing":
        path.unlink()
    with pytest.raises(CorruptImageError) as found:
        dataset[0]
    assert str(found.value).startswith(f"corrupt image {path}: ")
    assert str(pickle.loads(pickle.dumps(found.value))) == str(found.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_does_not_replace_a_corrupt_image(spoilt: Path, workers: int) -> None:
    config = TrainConfig(data_dir=str(spoilt), workers=workers)
    dataset = open_files(spoilt, "validation")
    with pytest.raises(CorruptImageError) as found:
        list(evaluation_loader(config, dataset, data_config(), 4, CPU))
    path = spoilt / "validation" / "dog" / "2.png"
    assert str(found.value).startswith(f"corrupt image {path}: ")
    assert len(str(found.value).splitlines()) == 1  # without a worker's traceback


def test_image_files_reads_a_tar(spoilt: Path) -> None:
    with tarfile.open(spoilt / "validation.tar", "w") as tar:
        tar.add(spoilt / "validation", "validation")
    dataset = open_files(spoilt / "validation.tar", "validation")
    assert dataset[5][1] == 1
    with pytest.raises(CorruptImageError, match=r"\.tar/validation/dog/2\.png: "):
        dataset[7]


class NamelessReader(list):
    """Of bytes in memory, as timm's reader of Hugging Face data."""

    def filename(self, index: int, basename: bool, absolute: bool) -> None:
        return None


def test_image_files_reads_images_without_a_name() -> None:
    files = [(io.BytesIO(WHOLE["PNG"]), None), (io.BytesIO(HTML), 3)]
    dataset = ImageFiles(NamelessReader(files), "RGB")
    assert dataset[0][1] == -1
    with pytest.raises(CorruptImageError, match="corrupt image sample 1: not an image"):
        dataset[1]
    with pytest.raises(IndexError):
        dataset[2]


def batches_and_counts(
    folder: Path, workers: int, epoch: int = 0, **options: Any
) -> tuple[list[torch.Tensor], list[int]]:
    config = TrainConfig(batch_size=8, workers=workers, **options)
    loader = training_loader(config, open_files(folder, "train"), data_config(), 2, CPU)
    start_epoch(loader, epoch)
    batches, counts = [], []
    for number, (images, labels) in enumerate(loader):
        batches += [images, labels]
        counts.append(corrupt_images(loader, [number]))
    return batches, counts


@pytest.mark.parametrize(
    "options",
    mostly_slow([{}, {"mixup": 0.5, "cutmix": 1.0, "aa": "rand-m9"}, {"no_prefetcher": True}], 1),
    ids=["plain", "mixup", "no prefetcher"],
)
def test_training_replaces_a_corrupt_image_whatever_the_workers(
    spoilt: Path, capfd: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    found = [batches_and_counts(spoilt, workers, **options) for workers in (0, 1, 2)]
    batches, counts = found[0]
    assert sum(counts) == 1
    assert [len(batch) for batch in batches] == [8] * 8
    for others, their_counts in found[1:]:
        assert their_counts == counts
        assert all(map(torch.equal, batches, others))
    path = spoilt / "train" / "cat" / "3.jpg"
    line = f"skipped corrupt image {path}: not an image of a known format\n"
    assert capfd.readouterr().err == 3 * line


@pytest.mark.parametrize("method", mostly_slow(["fork", "forkserver", "spawn"], 0))
def test_training_counts_corrupt_images_however_workers_start(spoilt: Path, method: str) -> None:
    dataset = KeyedDataset(open_files(spoilt, "train"), seed=0)
    keys = [Key(5, index) for index in range(32)]
    assert dataset.count_corrupt(keys) == 0
    loader = DataLoader(
        dataset,
        batch_sampler=[keys[:16], keys[16:]],  # type: ignore[arg-type]
        num_workers=2,
        multiprocessing_context=method,
        collate_fn=len,
    )
    assert list(loader) == [16, 16]
    assert dataset.count_corrupt(keys) == 1


class Some(torch.utils.data.Dataset):
    """Indices, of which some cannot be had."""

    def __init__(self, length: int, corrupt: Callable[[int], bool]) -> None:
        self.length, self.is_corrupt = length, corrupt

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        if self.is_corrupt(index):
            raise CorruptImageError(f"corrupt image {index}")
        return index


def test_keyed_dataset_replaces_by_images_from_everywhere() -> None:
    dataset = KeyedDataset(Some(100, lambda index: index < 50), seed=1)
    found = [dataset[Key(epoch, 3)] for epoch in range(400)]
    assert set(found) == set(range(50, 100))
    assert found == [KeyedDataset(dataset.dataset, 1)[Key(epoch, 3)] for epoch in range(400)]
    # Of an earlier epoch, and images that only stood in: not of this batch.
    assert dataset.count_corrupt([Key(399, 3), Key(399, 70)]) == 1
    assert dataset.count_corrupt([Key(400, 3)]) == 0


def test_keyed_dataset_names_a_corrupt_image_once(capsys: pytest.CaptureFixture[str]) -> None:
    dataset = KeyedDataset(Some(9, lambda index: index == 4), seed=1)
    for epoch in range(5):
        dataset.__getitems__([Key(epoch, index) for index in range(9)])
    assert capsys.readouterr().err == "skipped corrupt image 4\n"


@pytest.mark.timeout(30)
def test_keyed_dataset_gives_up_where_nothing_can_be_read() -> None:
    with pytest.raises(CorruptImageError):
        KeyedDataset(Some(9, lambda index: True), seed=1)[Key(0, 4)]
