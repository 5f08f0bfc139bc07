"""Folders and tars as people have them: what is read, what is left out, and what is refused."""

import io
import os
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiers import mostly_slow
from timm.data.readers.reader_image_folder import find_images_and_targets
from timm.data.readers.reader_image_in_tar import ReaderImageInTar

from emax_timm.training import TrainConfig, UsageError
from emax_timm.training.data import class_names, inventory, left_out, open_split
from emax_timm.training.data.decoding import ImageFiles, open_image
from emax_timm.training.data.readers import ImageReader, read_class_map
from emax_timm.training.data.scan import HIDDEN, LOOSE, image_extensions, natural_key, scan


def image(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 10, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def png(seed: int = 0) -> bytes:
    data = io.BytesIO()
    image(seed).save(data, "png")
    return data.getvalue()


def touch(root: Path, *paths: str) -> Path:
    """Make empty files: what is in them is not looked at. A path that ends in / is a folder."""
    for path in paths:
        if path.endswith("/"):
            (root / path).mkdir(parents=True, exist_ok=True)
        else:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(b"")
    return root


def tar_of(path: Path, *names: str, content: bytes = b"") -> Path:
    with tarfile.open(path, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            if name.endswith("/"):
                member.type = tarfile.DIRTYPE
            member.size = 0 if member.isdir() else len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


CLASSES = ("cat/1.png", "cat/2.png", "dog/1.png")


def split_of(root: Path, split: str = "train", **options: object) -> ImageFiles:
    config = TrainConfig(data_dir=str(root), **options)  # type: ignore[arg-type]
    return open_split(config, split, "RGB", training=True, batch_size=8)


# What can be written without another package. XBM is of one bit, PFM of floats.
MODES = {".xbm": "1", ".msp": "1", ".pfm": "F", ".blp": "P"}


def writable() -> list[str]:
    kinds = Image.registered_extensions()
    return sorted(name for name in image_extensions() if kinds[name] in Image.SAVE)


# Icons for macOS are of a fixed size, and slow to write.
@pytest.mark.parametrize("extension", [name for name in writable() if name != ".icns"])
def test_every_format_that_pillow_writes_and_decodes_is_read(
    tmp_path: Path, extension: str
) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    name = extension.upper() if extension == ".jpe" else extension
    # Sizes that icons have.
    picture = image().resize((32, 32)).convert(MODES.get(extension, "RGB"))
    for path in (f"cat/a{name}", "dog/b.png"):
        picture.save(tmp_path / path) if path.startswith("cat") else image().save(tmp_path / path)
    reader = ImageReader(tmp_path)
    assert [file.path for file in reader.files] == [f"cat/a{name}", "dog/b.png"]
    decoded = open_image(reader[0][0], "RGB")
    assert decoded.size == (32, 32)


def test_formats_that_pillow_does_not_decode_are_left_out_and_named(tmp_path: Path) -> None:
    touch(tmp_path, *CLASSES, "cat/a.eps", "cat/b.mpg", "dog/c.heic", "dog/README", "dog/d.h5")
    reader = ImageReader(tmp_path)
    assert len(reader) == 3
    reasons = [f"with extension .{e}" for e in ("eps", "h5", "heic", "mpg")]
    assert sorted(reader.left_out) == [*reasons, "without extension"]
    lines = left_out(ImageFiles(reader, "RGB"))
    assert "left out 1 with extension .heic, such as dog/c.heic" in lines


def test_timms_own_list_of_extensions_is_left_alone(tmp_path: Path) -> None:
    from timm.data import add_img_extensions, del_img_extensions, get_img_extensions

    before = get_img_extensions()
    ImageReader(touch(tmp_path, *CLASSES, "dog/b.webp", "dog/c.raw"))
    assert get_img_extensions() == before
    add_img_extensions(".raw")
    try:
        assert len(ImageReader(tmp_path)) == 5
    finally:
        del_img_extensions(".raw")


NAMES = ["n2/10.jpg", "n2/9.JPG", "n10/a1.png", "n10/A02.png", "n10/b.jpeg", "x/y/z/1.png"]
NAMES += ["n2.5/1.png", "N3/1.jpg", "x-1/3.png", "x/y.z/2.png", "é/ü2.png"]


def test_labels_and_order_are_timms(tmp_path: Path) -> None:
    touch(tmp_path, *NAMES)
    expected, class_to_idx = find_images_and_targets(str(tmp_path))
    reader = ImageReader(tmp_path)
    assert reader.class_to_idx == class_to_idx
    found = [(reader.filename(index, absolute=True), reader.targets[index]) for index in range(11)]
    assert found == expected


def test_labels_and_order_of_a_tar_are_timms(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "train.tar", *NAMES, content=png())
    theirs, ours = ReaderImageInTar(str(path)), ImageReader(path)
    assert ours.class_to_idx == theirs.class_name_to_idx
    assert ours.targets == list(theirs.targets)
    assert ours.filenames() == theirs.filenames()


def test_numbers_with_zeros_and_capitals_are_in_the_same_order_everywhere(tmp_path: Path) -> None:
    names = ["a/01.png", "a/1.png", "a/001.png", "A/1.png", "a/B.png", "a/b.png"]
    touch(tmp_path, *names)
    assert [file.path for file in scan(tmp_path).files] == sorted(
        names, key=lambda path: (natural_key(path), path)
    )
    assert list(ImageReader(tmp_path).class_to_idx) == ["A", "a"]


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    hidden = ["._1.png", ".DS_Store", ".ipynb_checkpoints/1.png", "cat/._1.png", "cat/Thumbs.db"]
    hidden += ["__MACOSX/cat/1.png", "cat/@eaDir/1.png", "cat/desktop.ini", "cat/.hidden/x/1.png"]
    reader = ImageReader(touch(tmp_path, *CLASSES, *hidden))
    assert reader.class_to_idx == {"cat": 0, "dog": 1}
    assert reader.filenames() == list(CLASSES)
    assert set(reader.left_out) == {HIDDEN}
    assert reader.left_out[HIDDEN].number == len(hidden)


def test_hidden_members_of_a_tar_are_skipped(tmp_path: Path) -> None:
    hidden = ["./._cat", "cat/._1.png", "__MACOSX/cat/1.png", ".ipynb_checkpoints/1.png"]
    names = [f"./{name}" for name in CLASSES]
    reader = ImageReader(tar_of(tmp_path / "a.tar", *names, *hidden))
    assert reader.filenames() == list(CLASSES)
    assert reader.left_out[HIDDEN].number == len(hidden)


def test_tar_within_a_tar_is_a_class(tmp_path: Path) -> None:
    for name in ("n1", "n2"):
        tar_of(tmp_path / f"{name}.tar", "1.png", "2.webp", content=png(int(name[1])))
    with tarfile.open(tmp_path / "train.tar", "w") as tar:
        for name in ("n1", "n2"):
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    reader = ImageReader(tmp_path / "train.tar")
    assert reader.class_to_idx == {"n1": 0, "n2": 1}
    assert reader.filenames() == ["n1/1.png", "n1/2.webp", "n2/1.png", "n2/2.webp"]
    for index in range(4):
        source, target = reader[index]
        assert open_image(source, "RGB").tobytes() == image(1 + target).tobytes()


def test_images_beside_class_folders_are_left_out_and_said(tmp_path: Path) -> None:
    dataset = split_of(touch(tmp_path, *(f"train/{name}" for name in CLASSES), "train/stray.png"))
    assert class_names(dataset) == ["cat", "dog"]
    assert left_out(dataset) == [f"left out 1 {LOOSE}, such as stray.png"]
    assert inventory(dataset) == "3 images of 2 classes: cat 2, dog 1"


def test_inventory_of_many_classes_tells_the_extremes(tmp_path: Path) -> None:
    names = [f"c{label}/{number}.png" for label in range(12) for number in range(label + 1)]
    reader = ImageReader(touch(tmp_path, *names))
    text = inventory(ImageFiles(reader, "RGB"))
    assert text == "78 images of 12 classes: 1 (c0) to 12 (c11) of each"


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, *(f"data/{name}" for name in CLASSES), "elsewhere/1.png")
    (tmp_path / "data" / "emu").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "dog" / "self").symlink_to("self")
    (tmp_path / "data" / "dog" / "gone.png").symlink_to("nowhere.png")
    reader = ImageReader(tmp_path / "data")
    # A link that leads nowhere is read, and then named, as a corrupt image.
    assert reader.filenames() == [*CLASSES, "dog/gone.png", "emu/1.png"]
    assert reader.left_out["a link to a folder that it is in"].number == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_image_to_wait_for(tmp_path: Path) -> None:
    touch(tmp_path, *CLASSES)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    reader = ImageReader(tmp_path)
    assert (len(reader), reader.left_out["no regular file"].example) == (3, "cat/pipe.png")


def test_folders_that_are_read_otherwise_than_meant_are_said(tmp_path: Path) -> None:
    reader = ImageReader(touch(tmp_path, *CLASSES, "cat/night/1.png", "pets/dog/1.png"))
    assert reader.class_to_idx == {"cat": 0, "dog": 1, "night": 2}
    assert reader.notes == [
        "class dog is gathered from 2 folders: dog, pets/dog",
        "folders within class folders are classes of their own: cat/night",
    ]


REFUSED = {
    "no class folders": (["1.png", "2.png"], ["2 images", "1.png", "no class folders"]),
    "nothing": (["cat/", "dog/"], ["no images"]),
    "other files": (["cat/1.heic", "dog/1.txt"], ["no images", ".heic", ".txt"]),
    "hidden files alone": (["cat/._1.png", "dog/.DS_Store"], ["no images", "hidden"]),
    "an empty class": ([*CLASSES, "emu/"], ["without images", "emu"]),
    "a class of hidden files": ([*CLASSES, "emu/._1.png"], ["without images", "emu"]),
    "a class of another format": ([*CLASSES, "emu/1.heic"], ["without images", "emu", ".heic"]),
    "an empty class below": (["pets/cat/1.png", "pets/dog/"], ["without images", "pets/dog"]),
    "splits in the split": (
        ["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png"],
        ["folders of splits", "train, val", "--data-dir"],
    ),
    "shards": (["0.cls", "0.json"], ["--dataset wds/"]),
}


@pytest.mark.parametrize("kind", ["folder", "tar"])
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_split_is_refused(tmp_path: Path, case: str, kind: str) -> None:
    names, hints = REFUSED[case]
    if kind == "folder":
        path = touch(tmp_path / "data", *names)
    else:
        path = tar_of(tmp_path / "data.tar", *names)
    with pytest.raises(UsageError) as refused:
        ImageReader(path)
    for hint in [str(path), *hints]:
        assert hint in str(refused.value)


def test_an_empty_folder_in_a_class_is_no_class(tmp_path: Path) -> None:
    reader = ImageReader(touch(tmp_path, *CLASSES, "cat/sorted out/"))
    assert reader.class_to_idx == {"cat": 0, "dog": 1}


@pytest.mark.parametrize("name", ["data.zip", "data.tar.gz", "data.tar", "train.png"])
def test_a_file_that_is_no_plain_tar_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("cat/1.png"))
    with pytest.raises(UsageError, match=f"{name}.* uncompressed"):
        ImageReader(path)


def test_a_folder_that_cannot_be_read_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, *CLASSES)
    real = os.scandir

    def scandir(path: str) -> object:  # the tests may run as root, who may read everything
        if path.endswith("dog"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match="dog: Permission denied"):
        ImageReader(tmp_path)


def test_class_map_names_what_it_misses(tmp_path: Path) -> None:
    touch(tmp_path, *(f"train/{name}" for name in CLASSES), "train/emu/1.png", "train/gnu/")
    (tmp_path / "classes.txt").write_text("dog\r\nemu\r\nfox\r\n\r\n", encoding="utf-8-sig")
    for path in (str(tmp_path / "classes.txt"), "classes.txt"):  # as timm, beside the data too
        dataset = split_of(tmp_path, class_map=path)
        assert class_names(dataset) == ["dog", "emu", "fox"]
        assert Counter(dataset.reader.targets) == {0: 1, 1: 1}
        assert left_out(dataset) == [
            "left out 2 images in class folders not in the class map: cat",
            "no images of 1 classes: fox",
        ]


@pytest.mark.parametrize("kind", mostly_slow(["folder", "tar"], 0, 1))
def test_class_map_that_matches_nothing_is_named(tmp_path: Path, kind: str) -> None:
    path = tar_of(tmp_path / "a.tar", *CLASSES) if kind == "tar" else touch(tmp_path, *CLASSES)
    with pytest.raises(UsageError) as refused:
        ImageReader(path, {"emu": 0, "gnu": 1}, "classes.txt")
    for hint in ("classes.txt", "none of the 2 class folders", "cat, dog", "emu, gnu"):
        assert hint in str(refused.value)


CLASS_MAPS = {
    "twice": ("cat\ndog\ncat\n", "has cat in lines 1 and 3"),
    "blank": ("cat\n\ndog\n", "line 2 of .* is empty"),
    "empty": ("\n\n", "is empty"),
}


@pytest.mark.parametrize("case", CLASS_MAPS)
def test_class_map_that_is_ambiguous_is_refused(tmp_path: Path, case: str) -> None:
    text, reason = CLASS_MAPS[case]
    path = tmp_path / "classes.txt"
    path.write_text(text)
    with pytest.raises(UsageError, match=reason):
        read_class_map(path)


def test_class_map_of_bytes_or_a_missing_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00c")
    for name in ("bytes.txt", "missing.txt", "classes.csv"):
        with pytest.raises(UsageError, match=name):
            read_class_map(tmp_path / name)
