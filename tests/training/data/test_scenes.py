"""Fashion scenes: one item each, a function of the seed, the epoch and the index."""

import numpy as np
import pytest
import torch

from emax_timm.errors import UsageError
from emax_timm.samples.scenes import load_sample
from emax_timm.training.config import TrainConfig
from emax_timm.training.data import class_names, hold_out, open_split
from emax_timm.training.data.sampling import Key, KeyedDataset
from emax_timm.training.data.scenes import LAYOUTS, NOISE, FashionScenes, open_scenes


@pytest.fixture(scope="module")
def test_scenes() -> FashionScenes:
    return open_scenes("sample_48", "", "test", False, False)


@pytest.fixture(scope="module")
def fresh() -> FashionScenes:
    return open_scenes("sample_48", "", "train", True, False)


def pixels(dataset: FashionScenes, index: int) -> np.ndarray:
    return np.asarray(dataset[index][0])


def test_scene_holds_its_item_whole_at_the_size_of_its_slice(test_scenes: FashionScenes) -> None:
    from PIL import Image

    items, labels = load_sample("test")
    for index in (0, 137, 999):
        image, label = test_scenes[index]
        assert (image.mode, image.size, label) == ("L", (48, 48), labels[index])
        side = int(test_scenes.sides[index])
        whole = np.asarray(Image.fromarray(items[index]).resize((side, side)))
        rows, columns = (np.flatnonzero(whole.any(axis)) for axis in (1, 0))
        whole = whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), whole.shape)
        same = ((windows == whole) | (whole == 0)).all((2, 3))
        assert same.sum() == 1


def test_slices_part_the_test_scenes_by_the_size_of_the_item(test_scenes: FashionScenes) -> None:
    slices = test_scenes.slices
    assert list(slices) == ["9 to 17 px", "18 to 27 px", "28 to 36 px"]
    assert sorted(np.concatenate(list(slices.values()))) == list(range(1000))
    assert test_scenes.sides[slices["18 to 27 px"]].min() == 18
    assert test_scenes.sides[slices["18 to 27 px"]].max() == 27
    assert LAYOUTS["96"][:3] == (96, 18, 72)


def test_scenes_have_clutter_on_noise(test_scenes: FashionScenes) -> None:
    bright = np.mean([(pixels(test_scenes, index) >= NOISE).mean() for index in range(200)])
    item = np.mean([(image > 0).mean() * (22 / 48) ** 2 for image in load_sample("test")[0]])
    assert bright > item + 0.05
    image = pixels(test_scenes, 5)
    assert len(np.unique(image[image < NOISE])) > NOISE / 2


def test_fixed_scenes_depend_on_the_index_alone(test_scenes: FashionScenes) -> None:
    first = pixels(test_scenes, 3)
    pixels(test_scenes, 4)
    again = open_scenes("sample_48", "", "test", False, False)
    assert np.array_equal(pixels(again, 3), first)


def test_training_scenes_are_keyed_by_seed_epoch_and_index(fresh: FashionScenes) -> None:
    def scene(seed: int, epoch: int, index: int) -> bytes:
        return np.asarray(KeyedDataset(fresh, seed)[Key(epoch, index)][0]).tobytes()

    keys = [(0, 0, 7), (1, 0, 7), (0, 1, 7), (0, 0, 8)]
    first = [scene(*key) for key in keys]
    assert len(set(first)) == 4
    assert [scene(*key) for key in reversed(keys)] == first[::-1]


def test_splits_share_no_item() -> None:
    sizes, found = {}, {}
    for split in ("train", "validation", "train+validation", "test"):
        dataset = open_scenes("sample_48", "", split, False, False)
        sizes[split] = len(dataset)
        found[split] = {item.tobytes() for item in dataset.pixels}
    assert sizes == {"train": 3600, "validation": 400, "train+validation": 4000, "test": 1000}
    assert not found["train"] & found["validation"]
    assert not found["train+validation"] & found["test"]
    assert found["train"] | found["validation"] == found["train+validation"]


@pytest.mark.parametrize("samples", [None, 500])
def test_held_out_scenes_are_fixed(samples: int | None) -> None:
    options = TrainConfig(dataset="scenes/sample_48")
    dataset = open_split(options, "train", "L", True, batch_size=8, num_samples=samples)
    names = class_names(dataset)
    assert names is not None
    assert len(names) == 10
    rest, held_out = hold_out(dataset, 0.1)
    torch.manual_seed(0)
    fixed = [np.asarray(held_out[3][0]).tobytes() for _ in range(2)]
    assert fixed[0] == fixed[1]
    fresh = [np.asarray(rest[3][0]).tobytes() for _ in range(2)]
    assert fresh[0] != fresh[1]


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("scenes/fashion_48", "train", "no scenes fashion_48; the nearest is fashion_mnist_48"),
        ("scenes/sample_48", "trian", "no split trian; the nearest of train, validation"),
        ("scenes/fashion_mnist_48", "train", "no data: give --data-dir"),
    ],
)
def test_unknown_scenes_are_refused(name: str, split: str, message: str) -> None:
    with pytest.raises(UsageError, match=message.replace("+", r"\+")):
        open_split(TrainConfig(dataset=name), split, "L", training=True, batch_size=8)
