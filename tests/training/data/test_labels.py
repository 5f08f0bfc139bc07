"""Labels that are none of the model's classes, and numbers of classes that nobody has given."""

import io
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiers import mostly_slow
from torch.utils.data import DataLoader, IterableDataset
from training_testing import SMALL, image_folder, only_line

from emax_timm.training import TrainConfig, UsageError, train, validate
from emax_timm.training.data import check_labels, hold_out, inventory, open_split, targets_of
from emax_timm.training.data.decoding import ConvertedImages, ImageFiles
from emax_timm.training.data.labels import LabelError
from emax_timm.training.splits import open_splits

Train = Callable[..., str]


class Table(torch.utils.data.Dataset):
    """Images of any labels, as torchvision's data sets have them."""

    def __init__(self, labels: Sequence[Any], known: bool = True) -> None:
        self.labels, self.target_transform = labels, None
        if known:
            self.targets = torch.tensor(labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        label = self.labels[index]
        return Image.new("RGB", (8, 8)), self.target_transform(
            label
        ) if self.target_transform else label


class Column:
    """A reader of labels in a column, as timm's of Hugging Face data sets."""

    def __init__(self, labels: Sequence[Any], names: Sequence[str] = ()) -> None:
        self.labels = labels
        self.class_to_idx = {name: index for index, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = io.BytesIO()
        Image.new("RGB", (8, 8)).save(image, "png")
        return io.BytesIO(image.getvalue()), self.labels[index]

    def iter_targets(self) -> Iterator[Any]:
        return iter(self.labels)


@pytest.mark.parametrize("labels", [[0, 1, 2], [0, -1]])
def test_known_labels_are_checked_before_an_image_is_read(labels: list[int]) -> None:
    check_labels(ConvertedImages(Table([0, 1]), "RGB"), 2, "train")
    for dataset in (ConvertedImages(Table(labels), "RGB"), ImageFiles(Column(labels), "RGB")):
        with pytest.raises(UsageError, match=f"'train' has the label {labels[-1]}, .* 2 classes"):
            check_labels(dataset, 2, "train")


@pytest.mark.parametrize("labels", [["cat", "dog"], [[0], [0, 1]], [0.5, 1.0], [0, None]])
def test_labels_that_are_no_numbers_of_classes_are_refused(labels: list[Any]) -> None:
    dataset = ImageFiles(Column(labels), "RGB")

    def read() -> None:
        check_labels(dataset, 2, "train")
        for index in range(2):
            dataset[index]

    with pytest.raises((LabelError, UsageError), match="has the label"):
        read()


@pytest.mark.parametrize("workers", mostly_slow([0, 1], 0))
def test_labels_that_are_not_known_before_are_checked_when_they_are_read(workers: int) -> None:
    dataset = ConvertedImages(Table([0, 1, 2], known=False), "RGB")
    check_labels(dataset, 2, "validation")
    dataset.transform = np.array
    loader = DataLoader(dataset, batch_size=1, num_workers=workers)
    with pytest.raises(LabelError) as refused:
        list(loader)
    message = "split 'validation' has the label 2, but there are 2 classes"
    assert only_line(str(refused.value)).startswith(message)


def test_labels_of_a_class_with_a_name_are_not_counted(tmp_path: Path) -> None:
    # Reading the column of a large data set takes a while.
    assert targets_of(ImageFiles(Column([0, -1], ["cat", "dog"]), "RGB")) is None
    assert targets_of(ImageFiles(Column([0, 3]), "RGB")) == [0, 3]
    assert inventory(ImageFiles(Column([0, 3]), "RGB")) == "2 images of 2 classes: 0 1, 3 1"


def splits_of(monkeypatch: pytest.MonkeyPatch, dataset: Any, **options: Any) -> int:
    monkeypatch.setattr("emax_timm.training.splits.open_split", lambda *_, **__: dataset)
    return open_splits(TrainConfig(val_split="", **options))[1]


def test_number_of_classes_is_counted_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    # The 1000 classes of the model's published weights are no answer.
    assert splits_of(monkeypatch, ImageFiles(Column([0, 4]), "RGB")) == 5
    assert splits_of(monkeypatch, ImageFiles(Column([0, 1], ["a", "b", "c"]), "RGB")) == 3
    assert splits_of(monkeypatch, Stream(), num_classes=7) == 7
    with pytest.raises(UsageError, match="give --num-classes"):
        splits_of(monkeypatch, Stream())
    with pytest.raises(UsageError, match="has the label cat"):
        splits_of(monkeypatch, ImageFiles(Column(["cat", "dog", 1]), "RGB"))


def test_training_on_one_class_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="all 3 training images are of one class"):
        splits_of(monkeypatch, ImageFiles(Column([1, 1, 1]), "RGB"))
    with pytest.raises(UsageError, match="'train' has one class only, cat; images lie in SPLIT/"):
        splits_of(monkeypatch, ImageFiles(Column([0, 0], ["cat"]), "RGB"))


def test_holding_out_all_images_of_a_class_is_refused(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, ["train"], ["cat", "dog", "emu"], [2])
    dataset = open_split(TrainConfig(data_dir=str(folder)), "train", "RGB", True, 8)
    lost = []
    for count in range(1, 5):
        rest, held_out = hold_out(dataset, count / 6)
        left = {dataset.reader.targets[index] for index in rest.indices}
        config = TrainConfig(data_dir=str(folder), val_fraction=count / 6)
        if len(left) == 3:
            splits, _ = open_splits(config)
            assert splits["validation"].indices == held_out.indices
        elif len(left) == 2:
            (label,) = {0, 1, 2} - left
            lost.append(("cat", "dog", "emu")[label])
            with pytest.raises(UsageError, match=f"no training image of class {lost[-1]}; lower"):
                open_splits(config)
    assert lost


def shard(path: Path, labels: Sequence[Any], suffix: str = "png") -> None:
    with tarfile.open(path, "w") as tar:
        for index in range(16):
            image = io.BytesIO()
            Image.new("RGB", (32, 32), (index * 9, 90, 10)).save(image, "bmp")
            label = str(labels[index % len(labels)]).encode()
            for name, content in ((suffix, image.getvalue()), ("cls", label)):
                member = tarfile.TarInfo(f"{index:03}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Train:
    """Trains on shards of the labels, which must be refused, and returns the last line."""

    def refused(*options: str, **shards: Sequence[Any]) -> str:
        for name, labels in shards.items():
            shard(tmp_path / f"{name}.tar", labels)
        splits = "--train-split train.tar --val-split val.tar --train-num-samples 16"
        data = ["--dataset", "wds/shards", "--data-dir", str(tmp_path), *splits.split()]
        output = ["--val-num-samples", "16", "--output", str(tmp_path / "out"), "--epochs", "1"]
        assert train([*SMALL, *data, *output, *options]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return refused


def test_shards_without_a_number_of_classes_are_refused(refused: Train, tmp_path: Path) -> None:
    assert "give --num-classes" in refused(train=[0, 1], val=[0, 1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("labels", "split", "workers"),
    mostly_slow([(5, "train", "1"), (-1, "train", "0"), (2, "val", "0"), (2, "val", "1")], 1),
)
def test_label_of_a_shard_beyond_the_classes_is_one_line(
    refused: Train, labels: int, split: str, workers: str
) -> None:
    shards = {"train": [0, 1], "val": [0, 1], split: [0, labels]}
    line = refused("--num-classes", "2", "-j", workers, **shards)
    name = "validation" if split == "val" else split
    assert line.startswith(f"train.py: error: split '{name}' has the label {labels}, but")


@pytest.mark.parametrize("split", mostly_slow(["train", "val"], 0))
def test_shards_without_a_sample_that_can_be_read_are_refused(
    refused: Train, tmp_path: Path, split: str
) -> None:
    # timm's reader drops each of them: the run ended well without a step.
    shards = {"train": [0, 1], "val": [0, 1], split: ["cat", "dog"]}
    line = refused("--num-classes", "2", **shards)
    assert f"the first shard of split '{split}.tar' ({split}.tar) cannot be read" in line
    assert not (tmp_path / "out").exists()


def test_a_shard_that_is_not_there_is_refused(refused: Train, tmp_path: Path) -> None:
    assert "split 'train.tar' (train.tar) cannot be read" in refused("--num-classes", "2", val=[0])
    assert not (tmp_path / "out").exists()


def test_shards_of_every_format_are_read(tmp_path: Path) -> None:
    shard(tmp_path / "train.tar", [0, 1], "bmp")
    config = TrainConfig(dataset="wds/shards", data_dir=str(tmp_path))
    dataset = open_split(config, "train.tar", "RGB", False, 8, num_samples=16)
    assert [label for _, label in dataset] == [0, 1] * 8


@pytest.mark.parametrize(
    "options",
    [
        ["--dataset", "torch/mnist", "--class-map", "c.txt"],
        ["--dataset", "wds/x", "--class-map", "c.txt"],
        ["--dataset", "torch/mnist", "--target-key", "label"],
        ["--dataset", "torch/mnist", "--input-key", "image"],
        ["--target-key", "label"],
    ],
)
def test_options_that_a_type_of_data_has_no_use_for_are_refused(
    options: list[str], images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([str(images), *SMALL, *options]) == 2
    assert options[-2] in only_line(capsys.readouterr().err)


def test_one_tar_or_folder_as_two_splits_is_refused(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with tarfile.open(tmp_path / "data.tar", "w") as tar:
        tar.add(images / "train", ".")
    (tmp_path / "linked").mkdir()
    for split in ("train", "validation"):
        (tmp_path / "linked" / split).symlink_to(images / "train")
    for data in ("data.tar", "linked"):
        assert train([str(tmp_path / data), *SMALL, "--output", str(tmp_path / "out")]) == 2
        assert "are the same images" in only_line(capsys.readouterr().err)
    config = TrainConfig(data_dir=str(tmp_path / "data.tar"), val_fraction=0.5)
    assert [len(part) for part in open_splits(config)[0].values()] == [16, 16]
    both = TrainConfig(data_dir=str(images), val_split="train")  # which is a choice
    assert [len(part) for part in open_splits(both)[0].values()] == [32, 32]


def test_validation_says_what_it_leaves_out_and_refuses_one_class(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    folder = Path(shutil.copytree(images / "validation", tmp_path / "data"))
    (folder / "cat" / "phone.heic").write_bytes(b"")
    argv = [str(folder), "--model", "test_resnet_emax", "--pretrained", "-j", "0", "-b", "8"]
    assert validate(argv) == 0
    shown = capsys.readouterr()
    assert shown.err == "warning: left out 1 with extension .heic, such as cat/phone.heic\n"
    assert only_line(shown.out).startswith("top1: ")
    shutil.rmtree(folder / "dog")
    assert validate(argv) == 2
    assert "has one class only, cat" in only_line(capsys.readouterr().err)
