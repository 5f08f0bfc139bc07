"""Splits of data sets, the embedded sample, and the loaders over them."""

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_dataset, resolve_data_config
from torch.utils.data import IterableDataset
from training_testing import image_folder

from emax_timm.samples import make_fashion_mnist
from emax_timm.training import TrainConfig, UsageError
from emax_timm.training.data import (
    SAMPLES,
    class_names,
    evaluation_loader,
    hold_out,
    open_split,
    same_classes,
    start_epoch,
    training_loader,
)
from emax_timm.training.data.datasets import DEBIAN_FASHION_MNIST
from emax_timm.training.distributed import DistributedContext
from emax_timm.training.splits import open_splits

SAMPLE = SAMPLES / "fashion_mnist"
CPU = DistributedContext(torch.device("cpu"))


def open_train(root: Path | str, **options: Any) -> Any:
    config = TrainConfig(data_dir=str(root), **options)
    samples, seed = config.train_num_samples, config.seed
    return open_split(config, config.train_split, "RGB", True, 8, num_samples=samples, seed=seed)


def open_sample(split: str, mode: str = "L") -> Any:
    config = TrainConfig(dataset="sample/fashion_mnist")
    return open_split(config, split, mode, training=False, batch_size=8)


def data_config(**options: Any) -> dict[str, Any]:
    return resolve_data_config({"input_size": (3, 32, 32), "crop_pct": 1.0, **options})


def test_open_split_reads_images_and_labels(images: Path) -> None:
    dataset = open_train(images)
    assert len(dataset) == 32
    assert class_names(dataset) == ["cat", "dog"]
    assert Counter(label for _, label in dataset) == {0: 16, 1: 16}
    image, _ = dataset[0]
    assert (image.mode, image.size) == ("RGB", (36, 40))


@pytest.mark.parametrize("name", ["validation", "val"])
def test_open_split_knows_timms_names_of_a_split(tmp_path: Path, name: str) -> None:
    folder = image_folder(tmp_path, ["train", name])
    config = TrainConfig(data_dir=str(folder))
    assert len(open_split(config, "validation", "RGB", False, 8)) == 5 * 2


def test_open_split_reads_a_class_map(images: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("dog\ncat\nemu\n")
    dataset = open_train(images, class_map=str(tmp_path / "classes.txt"))
    assert class_names(dataset) == ["dog", "cat", "emu"]
    assert Counter(label for _, label in dataset) == {0: 16, 1: 16}
    assert dataset.filename(0).startswith("cat")
    assert dataset[0][1] == 1


def test_open_split_refuses_a_training_split_that_is_not_there(images: Path) -> None:
    # Else timm reads the folder above it: every image of every split, with the same classes.
    config = TrainConfig(data_dir=str(images))
    with pytest.raises(UsageError, match="holiday"):
        open_split(config, "holiday", "RGB", training=True, batch_size=8)


def test_class_names_of_wrapped_data_sets(images: Path) -> None:
    from timm.data import AugMixDataset

    part, _ = hold_out(open_train(images), 0.5)
    assert class_names(AugMixDataset(part, num_splits=2)) == ["cat", "dog"]
    assert class_names([1, 2]) is None


@pytest.mark.parametrize("found", [["a"], ["b", "a"], ["a", "b", "c"], ["a", "B"]])
def test_same_classes_refuses_others(found: list[str]) -> None:
    same_classes(["a", "b"], ["a", "b"], "test")
    same_classes(None, found, "test")
    same_classes(found, None, "test")
    with pytest.raises(UsageError, match="'test'"):
        same_classes(["a", "b"], found, "test")


def test_hold_out_is_disjoint_complete_and_always_the_same(images: Path) -> None:
    dataset = open_train(images)
    torch.manual_seed(1)
    rest, held_out = hold_out(dataset, 0.25)
    torch.manual_seed(2)
    again = hold_out(open_train(images, seed=7), 0.25)
    assert (len(rest), len(held_out)) == (24, 8)
    assert sorted([*rest.indices, *held_out.indices]) == list(range(32))
    assert [rest.indices, held_out.indices] == [part.indices for part in again]
    # A draw, not the end of the list: that would be a single class.
    assert {held_out[index][1] for index in range(8)} == {0, 1}
    for part in (rest, held_out):
        for index in (0, 3):
            assert part[index][1] == dataset[part.indices[index]][1]


def test_num_samples_takes_the_same_images_of_all_classes_in_every_run(images: Path) -> None:
    whole, part = open_train(images), open_train(images, train_num_samples=8)
    assert len(part) == 8
    assert (
        part.indices
        == open_train(images, train_num_samples=8, seed=7).indices
        == sorted(part.indices)
    )
    assert [part[i][1] for i in range(8)] == [whole[i][1] for i in part.indices]
    assert {part[i][1] for i in range(8)} == {0, 1}
    assert len(open_train(images, train_num_samples=32)) == 32
    with pytest.raises(UsageError, match="split 'train' has 32 images, fewer than the 33 asked"):
        open_train(images, train_num_samples=33)


def test_val_fraction_is_of_the_images_that_train_num_samples_takes(images: Path) -> None:
    config = TrainConfig(data_dir=str(images), train_num_samples=16, val_fraction=0.25)
    splits, _ = open_splits(config)
    assert (len(splits["train"]), len(splits["validation"])) == (12, 4)
    taken = open_train(images, train_num_samples=16).indices
    assert sorted([*splits["train"].indices, *splits["validation"].indices]) == taken
    # Each has a transform of its own.
    splits["train"].transform, splits["validation"].transform = str, repr
    assert (splits["train"].transform, splits["validation"].transform) == (str, repr)


def test_hold_out_leaves_the_global_generator_alone(images: Path) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    hold_out(open_train(images), 0.5)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("fraction", [0.01, 0.99, 1.0, 1e-9])
def test_hold_out_refuses_an_empty_part(images: Path, fraction: float) -> None:
    with pytest.raises(UsageError, match="--val-fraction"):
        hold_out(open_train(images), fraction)


def test_hold_out_refuses_a_stream() -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(())

    with pytest.raises(UsageError, match="stream"):
        hold_out(Stream(), 0.5)


@pytest.mark.parametrize("training_first", [True, False])
def test_loaders_of_held_out_data_keep_their_own_transforms(
    images: Path, training_first: bool
) -> None:
    config = TrainConfig(batch_size=4, workers=0, aa="rand-m9", scale=[0.1, 0.2])
    rest, held_out = hold_out(open_train(images), 0.25)

    def train() -> Any:
        return training_loader(config, rest, data_config(), 2, CPU)

    def evaluation() -> Any:
        return evaluation_loader(config, held_out, data_config(), 4, CPU)

    if training_first:
        train_loader, loader = train(), evaluation()
    else:
        loader, train_loader = evaluation(), train()
    names = {type(step).__name__ for step in held_out.transform.transforms}
    assert "RandAugment" in {type(step).__name__ for step in rest.transform.transforms}
    assert "CenterCrop" in names
    assert not any("Rand" in name for name in names)
    first, second = (torch.cat([batch for batch, _ in loader]) for _ in range(2))
    assert torch.equal(first, second)
    batches = []
    for epoch in (0, 1, 0):
        start_epoch(train_loader, epoch)
        batches.append(torch.cat([batch for batch, _ in train_loader]))
    assert not torch.equal(batches[0], batches[1])
    assert torch.equal(batches[0], batches[2])


def test_evaluation_loader_normalises_in_the_order_of_the_data(images: Path) -> None:
    config = TrainConfig(data_dir=str(images), workers=0)
    options = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear"}
    dataset = open_split(config, "validation", "RGB", False, 8)
    # 40 x 36 pixels: the shorter side to 32, then the middle.
    pixels = [dataset[index][0].resize((32, 35), Image.Resampling.BILINEAR) for index in range(10)]
    cropped = np.stack([np.asarray(image)[2:34] for image in pixels]) / 255  # [10, 32, 32, 3]
    expected = (cropped - options["mean"]) / options["std"]
    for no_prefetcher in (False, True):
        config.no_prefetcher = no_prefetcher
        loader = evaluation_loader(config, dataset, data_config(**options), 4, CPU)
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [4, 4, 2]
        assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 5 + [1] * 5
        found = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).numpy()
        # Half a grey level, over the least deviation, for the rounding after the resize.
        np.testing.assert_allclose(found, expected, atol=1.01 / 255 / 0.4)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_evaluation_loaders_of_all_ranks_share_the_images(images: Path, size: int) -> None:
    config = TrainConfig(data_dir=str(images), workers=0)
    seen = []
    for rank in range(size):
        dataset = open_split(config, "validation", "RGB", False, 8)
        context = DistributedContext(torch.device("cpu"), rank, size)
        loader = evaluation_loader(config, dataset, data_config(), 4, context)
        seen += [image.sum().item() for batch, _ in loader for image in batch]
    whole = evaluation_loader(
        config, open_split(config, "validation", "RGB", False, 8), data_config(), 4, CPU
    )
    assert sorted(seen) == sorted(image.sum().item() for batch, _ in whole for image in batch)
    assert len(seen) == 10


def test_training_loader_shuffles_and_drops_what_fills_no_batch(images: Path) -> None:
    config = TrainConfig(batch_size=5, workers=0, no_aug=True, seed=0)
    loader = training_loader(config, open_train(images), data_config(), 2, CPU)
    labels = [labels.tolist() for _, labels in loader]
    assert [len(batch) for batch in labels] == [5] * 6
    assert len({tuple(batch) for batch in labels}) > 2


def test_training_loader_mixes_labels_and_images(images: Path) -> None:
    config = TrainConfig(batch_size=4, workers=0, mixup=1.0, smoothing=0.0)
    loader = training_loader(config, open_train(images), data_config(), 3, CPU)
    _, labels = next(iter(loader))
    assert labels.shape == (4, 3)
    assert torch.allclose(labels.sum(1), torch.ones(4))
    assert labels[:, 2].eq(0).all()


def test_sample_is_small_and_says_its_licence() -> None:
    assert sum(path.stat().st_size for path in SAMPLE.iterdir()) <= 8 * 10**6
    text = (SAMPLE / "LICENSE").read_text()
    assert "MIT" in text
    assert "Zalando" in text


@pytest.mark.parametrize(("split", "per_class"), [("train", 400), ("test", 100)])
def test_sample_is_read_by_timm_itself(split: str, per_class: int) -> None:
    dataset: Any = create_dataset("", root=str(SAMPLE / f"{split}.tar"), input_img_mode="L")
    labels = [dataset.reader[index][1] for index in range(len(dataset))]
    assert Counter(labels) == dict.fromkeys(range(10), per_class)
    for index in range(0, len(dataset), per_class // 2):
        image, label = dataset[index]
        assert (image.mode, image.size) == ("L", (28, 28))
        # Fashion-MNIST's numbers; the folders in the tar carry them.
        name = dataset.filename(index, absolute=False)
        assert name.split("/")[-2] == f"{label}_{make_fashion_mnist.CLASSES[label]}"
    classes = "t-shirt trouser pullover dress coat sandal shirt sneaker bag ankle-boot"
    assert " ".join(make_fashion_mnist.CLASSES) == classes


def test_sample_parts_do_not_overlap() -> None:
    parts = []
    for split in ("train", "test"):
        with tarfile.open(SAMPLE / f"{split}.tar") as tar:
            parts.append([tar.extractfile(m).read() for m in tar.getmembers()])  # type: ignore[union-attr]
    train, test = map(set, parts)
    assert not train & test
    # Fashion-MNIST itself has no exact duplicates; a draw with replacement would make some.
    assert (len(train), len(test)) == (4000, 1000)


def test_sample_opens_by_its_name() -> None:
    dataset = open_sample("test.tar")
    assert len(dataset) == 1000
    names = class_names(dataset)
    assert names is not None
    assert [int(name.split("_")[0]) for name in names] == list(range(10))


@pytest.mark.parametrize(
    "name", ["fasion_mnist", "", "..", "../samples/fashion_mnist", "_pycache_"]
)
def test_sample_of_another_name_is_refused(name: str) -> None:
    config = TrainConfig(dataset=f"sample/{name}")
    with pytest.raises(UsageError, match="the nearest is fashion_mnist"):
        open_split(config, "test.tar", "L", False, 8)


def members(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as tar:
        found = {}
        for member in tar.getmembers():
            image = tar.extractfile(member)
            assert image is not None
            found[member.name] = np.asarray(Image.open(image)).tobytes()
        return found


def need_debian_package() -> None:
    if DEBIAN_FASHION_MNIST.is_dir():
        return
    if os.environ.get("CI"):
        pytest.fail("CI installs Debian's dataset-fashion-mnist, but its files are not there")
    pytest.skip("Debian's dataset-fashion-mnist is not installed")


@pytest.mark.slow
def test_sample_is_what_its_script_makes_of_the_debian_package(tmp_path: Path) -> None:
    need_debian_package()
    make_fashion_mnist.make(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"train.tar", "test.tar"}
    for name in ("train.tar", "test.tar"):
        # Pixels, not bytes: another zlib may pack the same image in other ways.
        made, embedded = members(tmp_path / name), members(SAMPLE / name)
        assert list(made) == list(embedded)
        assert made == embedded


@pytest.mark.slow
def test_debian_fashion_mnist_stands_in_for_the_download(tmp_path: Path) -> None:
    need_debian_package()
    config = TrainConfig(dataset="torch/fashion_mnist", data_dir=str(tmp_path))
    for split, count in (("train", 60_000), ("test", 10_000)):
        dataset = open_split(config, split, "L", training=split == "train", batch_size=8)
        assert len(dataset) == count
        assert class_names(dataset) is not None
        targets = torch.as_tensor(dataset.dataset.targets)
        assert Counter(targets.tolist()) == dict.fromkeys(range(10), count // 10)
    # The embedded sample is a part of it, under the same numbers.
    sample = open_sample("test.tar")
    for index in (0, 555, 999):
        name = Path(sample.filename(index)).stem
        pixels, label = dataset[int(name)]
        assert label == sample[index][1]
        assert np.array_equal(np.asarray(pixels), np.asarray(sample[index][0]))
    colour = open_split(config, "test", "RGB", training=False, batch_size=8)
    assert np.array_equal(np.asarray(colour[0][0]), np.asarray(dataset[0][0].convert("RGB")))
