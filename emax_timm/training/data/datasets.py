"""Open data sets with timm's readers, and check them before training."""

import gzip
import os
import shutil
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from timm.data import AugMixDataset, ImageDataset, create_dataset
from timm.data.dataset_factory import _search_split
from torch.utils.data import Dataset, IterableDataset

from ...errors import UsageError, nearest
from ..config.options import DataOptions
from .decoding import ConvertedImages, ImageFiles

__all__ = ["SAMPLES", "Subset", "class_names", "hold_out", "open_split", "same_classes"]

SAMPLES = Path(__file__).parents[2] / "samples"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Subset(Dataset):
    """A subset of a map-style data set; timm's loader sets its data set's transform through it."""

    def __init__(self, dataset: Any, indices: Sequence[int]) -> None:
        self.dataset = dataset
        self.indices = indices

    @property
    def transform(self) -> Any:
        return self.dataset.transform

    @transform.setter
    def transform(self, transform: Any) -> None:
        self.dataset.transform = transform

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


def open_split(
    options: DataOptions,
    split: str,
    input_img_mode: str,
    training: bool,
    batch_size: int,
    must_exist: bool = False,
    num_samples: int | None = None,
    seed: int = 0,
    repeats: float = 0.0,
) -> Any:
    """Open a split of the data set that the options name; no image is decoded yet.

    Args:
        options: The options that name the data set.
        split: The name of the split.
        input_img_mode: PIL mode of the images if the options do not set it.
        training: Whether the split is trained on.
        must_exist: Refuse a data folder without a folder for the split, as for training; otherwise
            such a folder is taken to be the split.
        batch_size, num_samples, seed, repeats: Arguments of timm's iterable data sets.

    Raises:
        UsageError: If the split does not exist, cannot be read or is empty.
    """
    kind, name, root = _source(options, split, must_exist or training)
    mode = options.input_img_mode or input_img_mode
    dataset = _create(
        name,
        root=str(root),
        split=split,
        is_training=training,
        class_map=options.class_map or None,
        download=options.dataset_download,
        batch_size=batch_size,
        num_samples=num_samples,
        seed=seed,
        repeats=repeats,
        input_img_mode=mode,
        input_key=options.input_key,
        target_key=options.target_key,
    )
    if isinstance(dataset, ImageDataset):
        return ImageFiles(dataset.reader, mode, options.exif_orientation)
    if kind == "torch":  # torchvision decodes images itself
        return ConvertedImages(dataset, mode)
    return dataset  # a stream, which also decodes images itself


def _create(name: str, **arguments: Any) -> Any:
    """Call timm's `create_dataset`, and refuse a split that cannot be read or is empty."""
    try:
        dataset: Any = create_dataset(name, **arguments)
        if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
            raise RuntimeError("it holds no images")
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        source = f"split {arguments['split']!r} of {name or arguments['root']}"
        raise UsageError(f"cannot read {source}: {text}") from None
    return dataset


def _source(options: DataOptions, split: str, must_exist: bool) -> tuple[str, str, str | Path]:
    """Return the type, the name and the root of the data set as timm takes them, after checks."""
    name, root = options.dataset, options.data_dir or options.data
    kind, _, rest = name.partition("/")
    if kind.lower() not in (kinds := ["", "torch", "hfds", "hfids", "tfds", "wds", "sample"]):
        raise UsageError(
            f"unknown type of data set {kind}; the nearest of {', '.join(kinds[1:])} "
            f"is {nearest(kind, kinds)}"
        )
    if kind == "sample":
        folder = _sample(rest)
        if root:
            raise UsageError(f"--dataset {name} has its own images; leave out it or {root}")
        name, root = "", folder
    elif kind == "torch" and rest.lower() == "fashion_mnist" and root:
        _unpack_debian_fashion_mnist(Path(root))
    if not root:
        raise UsageError("no data: give --data-dir DIR, or --dataset sample/fashion_mnist")
    if not name:
        _check_folder(Path(root), split, must_exist)
    if options.class_map.endswith(".pkl"):
        raise UsageError(f"{options.class_map}: a class map is a text file, one class per line")
    return kind, name, root


def _sample(name: str) -> Path:
    samples = sorted(folder.name for folder in SAMPLES.iterdir() if folder.is_dir())
    if name not in samples:
        raise UsageError(f"unknown sample {name}; the nearest is {nearest(name, samples)}")
    return SAMPLES / name


def _check_folder(root: Path, split: str, must_exist: bool) -> None:
    if not root.exists():
        raise UsageError(f"the data folder {root} does not exist")
    if not root.is_dir():
        return  # a tar file
    if not any(root.iterdir()):
        raise UsageError(f"the data folder {root} is empty; it needs a folder {split}/ of classes")
    # If the split has no folder, timm reads the root as the split. This is right for validate.py
    # on a folder of classes, but in training the folders of splits would be taken for classes.
    if must_exist and _search_split(str(root), split) == str(root):
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:5])
        raise UsageError(f"{root} has no folder {split}/ (it has {found}); name it with the flags")


def _unpack_debian_fashion_mnist(root: Path) -> None:
    # Debian's package dataset-fashion-mnist saves the download. It has the same images in archives
    # of its own, which do not match torchvision's checksums.
    raw = root / "FashionMNIST" / "raw"
    for archive in sorted(DEBIAN_FASHION_MNIST.glob("*-ubyte.gz")):
        target = raw / archive.stem
        if target.exists():
            continue
        raw.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")  # ranks may do this together
        with gzip.open(archive) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        partial.replace(target)


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of the classes in label order; None if the data set does not have them."""
    while isinstance(dataset, (Subset, AugMixDataset, ConvertedImages)):
        dataset = dataset.dataset
    reader = getattr(dataset, "reader", dataset)
    for attribute in ("class_to_idx", "class_name_to_idx"):
        mapping = getattr(reader, attribute, None)
        if isinstance(mapping, dict):
            return sorted(mapping, key=mapping.__getitem__)
    return None


def same_classes(expected: list[str] | None, found: list[str] | None, split: str) -> None:
    """Check that a split's labels mean the same classes as in training.

    Args:
        expected: Class names in training, in label order; None if unknown.
        found: Those of the split.
        split: The name of the split, for the message.

    Raises:
        UsageError: If both are known and differ.
    """
    if expected is None or found is None or expected == found:
        return
    missing = sorted(set(expected) - set(found))
    added = sorted(set(found) - set(expected))
    parts = [
        f"{label} {', '.join(names[:5])}"
        for label, names in (("missing", missing), ("only there", added))
        if names
    ]
    raise UsageError(
        f"the classes of split {split!r} differ from those in training "
        f"({'; '.join(parts) or 'in their order'}); give both the same folders, or --class-map FILE"
    )


def hold_out(dataset: Any, fraction: float) -> tuple[Subset, Subset]:
    """Split a data set into the rest and a held-out part, at random but the same in every run.

    Args:
        dataset: A map-style data set.
        fraction: The fraction of its images to hold out.

    Raises:
        UsageError: If the data set is a stream, or a part would be empty.
    """
    if isinstance(dataset, IterableDataset):
        raise UsageError("--val-fraction needs data that can be indexed, not a stream")
    size = round(len(dataset) * fraction)
    if not 0 < size < len(dataset):
        raise UsageError(f"--val-fraction {fraction} leaves a part of {len(dataset)} images empty")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    # Each part has a shallow copy, because their transforms differ.
    held_out, rest = sorted(order[:size]), sorted(order[size:])
    return Subset(copy(dataset), rest), Subset(copy(dataset), held_out)
