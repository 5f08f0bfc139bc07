"""`emax data` on folders and tars: what it finds in their images, and its exit status."""

import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training_testing import image_folder, only_line

from emax_cli import main
from emax_timm.training.data.command import find_splits

Report = Callable[..., dict[str, Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "photos", counts=[4, 3])


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """Runs `emax data`, which must end with the status, and returns its report."""

    def report(path: Path, status: int = 0, *options: str) -> dict[str, Any]:
        argv = ["data", str(path), "-j", "0", "--format", "json", *options]
        assert main(argv) == status
        return json.loads(capsys.readouterr().out)

    return report


def test_images_in_order_are_reported_as_they_are(folder: Path, report: Report) -> None:
    found = report(folder)
    assert list(found["splits"]) == ["train", "validation"]
    train = found["splits"]["train"]
    assert train["source"] == str(folder / "train")
    assert train["classes"] == {"cat": 4, "dog": 4}
    assert (train["formats"], train["modes"]) == ({"PNG": 4, "JPEG": 4}, {"RGB": 8})
    assert train["sizes"] == [[36, 40]] * 3
    assert train["aspect_ratios"] == [0.9] * 3
    assert not any(train[name] for name in ("problems", "left_out", "unreadable", "misnamed"))
    assert found["duplicates across splits"] == []


def test_kinds_of_images_are_counted(tmp_path: Path, report: Report) -> None:
    image_folder(tmp_path, ["train"], counts=[1])
    pixels = np.arange(20 * 10, dtype=np.uint16).reshape(20, 10) * 300
    Image.fromarray(pixels).save(tmp_path / "train/cat/deep.png")
    first, second = Image.new("L", (50, 10)), Image.new("L", (50, 10), 200)
    first.save(tmp_path / "train/cat/moving.gif", save_all=True, append_images=[second])
    first.save(tmp_path / "train/dog/pages.tiff", save_all=True, append_images=[second])
    tags = Image.Exif()
    tags[0x0112] = 6
    Image.new("CMYK", (30, 60)).save(tmp_path / "train/dog/turned.jpg", exif=tags)
    Image.new("RGBA", (8, 8)).save(tmp_path / "train/dog/really.jpg", "webp", lossless=True)
    train = report(tmp_path)["splits"]["train"]
    assert train["modes"] == {"RGB": 2, "P": 1, "L": 1, "I;16": 1, "CMYK": 1, "RGBA": 1}
    assert train["formats"] == {"PNG": 3, "GIF": 1, "JPEG": 1, "TIFF": 1, "WEBP": 1}
    assert (train["animated"], train["rotated"]) == (2, 1)
    assert train["misnamed"] == ["dog/really.jpg"]
    assert train["sizes"] == [[8, 8], [50, 10], [30, 60]]
    assert train["aspect_ratios"] == [0.5, 0.9, 5.0]
    # The same pixels, in two formats and two classes.
    assert train["conflicts"] == [["cat/moving.gif", "dog/pages.tiff"]]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_corrupt_images_are_named_and_the_rest_is_reported(
    folder: Path, report: Report, workers: str
) -> None:
    path = folder / "train" / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:500])
    (folder / "train" / "dog" / "page.jpg").write_bytes(b"<html></html>")
    (folder / "train" / "dog" / "gone.png").symlink_to("nowhere")
    train = report(folder, 1, "-j", workers)["splits"]["train"]
    assert train["unreadable"] == {
        "cat/0.png": "image file is truncated",
        "dog/gone.png": "No such file or directory",
        "dog/page.jpg": "not an image of a known format",
    }
    assert sum(train["formats"].values()) == 7
    assert train["classes"] == {"cat": 4, "dog": 6}


def test_duplicates_are_those_of_pixels(tmp_path: Path, report: Report) -> None:
    image_folder(tmp_path, ["train", "val"], counts=[2, 0])
    source = Image.open(tmp_path / "train/cat/0.png")
    source.save(tmp_path / "train/cat/copy.bmp")
    source.save(tmp_path / "train/dog/labelled otherwise.webp", lossless=True)
    source.save(tmp_path / "val/cat/leak.tiff")
    source.rotate(180).save(tmp_path / "val/dog/other.png")
    source.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "val/dog/turned.png")
    found = report(tmp_path)
    group = ["cat/0.png", "cat/copy.bmp", "dog/labelled otherwise.webp"]
    assert found["splits"]["train"]["duplicates"] == [group]
    assert found["splits"]["train"]["conflicts"] == [group]
    assert found["splits"]["val"]["duplicates"] == []
    assert found["duplicates across splits"] == [{"train": group, "val": ["cat/leak.tiff"]}]


def test_splits_that_training_would_refuse_are_at_fault(folder: Path, report: Report) -> None:
    (folder / "validation" / "dog").rename(folder / "validation" / "wolf")
    (folder / "test").mkdir()
    shutil.copy(folder / "train/cat/0.png", folder / "test")
    found = report(folder, 1)["splits"]
    assert found["train"]["problems"] == []
    (problem,) = found["validation"]["problems"]
    assert "missing dog; only there wolf" in problem
    (problem,) = found["test"]["problems"]
    assert "no class folders" in problem
    shutil.rmtree(folder / "train" / "dog")
    assert "one class only, cat" in report(folder / "train", 1)["splits"]["train"]["problems"][0]


def test_a_tar_is_reported_like_a_folder(folder: Path, report: Report) -> None:
    for split in ("train", "validation"):
        with tarfile.open(folder.parent / f"{split}.tar", "w") as tar:
            tar.add(folder / split, ".")
    whole, alone = report(folder.parent)["splits"], report(folder.parent / "train.tar")["splits"]
    expected = report(folder)["splits"]
    assert list(whole) == ["train", "validation"]
    assert list(alone) == ["train"]
    for found in (whole["train"], alone["train"]):
        assert {**found, "source": ""} == {**expected["train"], "source": ""}


def test_table_has_a_column_for_each_split(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(12):
        (folder / "train" / "cat" / f"x{number:02}.png").write_bytes(b"")
    (folder / "train" / "cat" / "a.heic").write_bytes(b"")
    assert main(["data", str(folder), "-j", "0"]) == 1
    lines = capsys.readouterr().out.splitlines()
    rows = {line[:17].strip(): line[17:].split() for line in lines[:13]}
    assert rows[""] == ["train", "validation"]
    assert rows["images"] == ["20", "6"]
    assert rows["unreadable"] == ["12", "0"]
    assert "train: left out 1 with extension .heic, such as cat/a.heic" in lines
    named = [line for line in lines if line.startswith("train: unreadable: ")]
    assert named[0] == "train: unreadable: cat/x00.png: the file is empty"
    assert named[10:] == ["train: unreadable: 2 more; --format json has all"]


def test_contact_sheet_shows_the_images(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "validation")
    for path in (folder / "train").glob("*/*"):
        if path.name == "0.png":
            colour = (250, 0, 0) if path.parent.name == "cat" else (0, 250, 0)
            Image.new("RGB", (96, 96), colour).save(path)
        else:
            path.write_bytes(b"")
    sheet = tmp_path / "sheet.png"
    assert main(["data", str(folder), "-j", "0", "--contact-sheet", str(sheet)]) == 1
    with Image.open(sheet) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    counts = {(250, 0, 0): 96 * 96, (0, 250, 0): 96 * 96}
    assert {c: int((pixels == c).all(1).sum()) for c in counts} == counts
    # Six crosses, each of two lines.
    assert (pixels == (255, 0, 0)).all(1).sum() > 6 * 2 * 96
    assert [path.name for path in tmp_path.iterdir()].count("sheet.png.partial") == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ([], "no data"),
        (["/nowhere"], "/nowhere does not exist"),
        (["{folder}", "--splits", "tset"], "tset"),
        (["{folder}", "--contact-sheet", "sheet.jpg"], "sheet.jpg"),
        (["{folder}", "--contact-sheet", "/nowhere/sheet.png"], "/nowhere/sheet.png"),
        (["{folder}", "--format", "xml"], "xml"),
    ],
)
def test_a_mistake_is_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], hint: str
) -> None:
    assert main(["data", *(word.format(folder=folder) for word in arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert hint in only_line(shown.err)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train/cat/", "val/cat/", "notes/"], ["train", "val"]),
        (["training/cat/", "testing/cat/"], ["training", "testing"]),
        (["train/", "validation/"], ["train", "validation"]),  # without class folders: at fault
        (["cat/", "dog/"], ["data"]),
        (["train/", "bus/", "car/"], ["data"]),  # classes of vehicles
        (["train/.hidden/", "bus/"], ["data"]),
    ],
)
def test_splits_are_found_by_their_names(
    tmp_path: Path, names: list[str], expected: list[str]
) -> None:
    root = tmp_path / "data"
    for name in names:
        (root / name).mkdir(parents=True)
    assert list(find_splits(root)) == expected
