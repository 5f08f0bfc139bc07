"""Open data sets with timm's readers, and check them before training."""

import gzip
import os
import shutil
from copy import copy
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageDataset, create_dataset
from timm.data.dataset_factory import _search_split
from torch.utils.data import IterableDataset

from ...errors import UsageError, nearest
from ..config.options import DataOptions
from .decoding import ConvertedImages, ImageFiles
from .readers import LAYOUT, ImageReader, read_class_map
from .scan import image_extensions
from .scenes import FashionScenes, open_scenes
from .streams import check_stream
from .subset import Subset

__all__ = ["SAMPLES", "hold_out", "open_folder", "open_split"]

SAMPLES = Path(__file__).parents[2] / "samples"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


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
        num_samples: The length of a stream; of other data, take so many images, which are chosen at
            random but are the same in every run.
        batch_size, seed, repeats: Arguments of timm's iterable data sets.

    Raises:
        UsageError: If the split does not exist, cannot be read, is empty, or has fewer images than
            `num_samples`.
    """
    mode = options.input_img_mode or input_img_mode
    stream = {
        "batch_size": batch_size,
        "num_samples": num_samples,
        "seed": seed,
        "repeats": repeats,
    }
    dataset = _open(options, split, mode, training, must_exist or training, stream)
    if num_samples is None or isinstance(dataset, IterableDataset) or num_samples == len(dataset):
        return dataset
    if num_samples > len(dataset):
        raise UsageError(
            f"split {split!r} has {len(dataset):,} images, fewer than the {num_samples:,} asked for"
        )
    return Subset(dataset, sorted(_order(len(dataset))[:num_samples]))


def _open(
    options: DataOptions,
    split: str,
    mode: str,
    training: bool,
    must_exist: bool,
    stream: dict[str, Any],
) -> Any:
    kind, name, root = _source(options, split, must_exist)
    if kind == "scenes":
        scenes = open_scenes(name, root, split, training, options.dataset_download)
        return ConvertedImages(scenes, mode)
    if not name:
        path = Path(_search_split(str(root), split)) if Path(root).is_dir() else Path(root)
        reader = open_folder(path, options.class_map, options.input_key)
        return ImageFiles(reader, mode, options.exif_orientation)
    dataset = _create(
        name,
        root=str(root),
        split=split,
        is_training=training,
        class_map=_class_map(options.class_map, Path(root)),
        download=options.dataset_download,
        input_img_mode=mode,
        input_key=options.input_key or (_wds_keys() if kind == "wds" else None),
        target_key=options.target_key,
        **stream,
    )
    if isinstance(dataset, ImageDataset):
        return ImageFiles(dataset.reader, mode, options.exif_orientation)
    if kind == "torch":  # torchvision decodes images itself
        return ConvertedImages(dataset, mode)
    if kind == "wds":
        check_stream(dataset, split)
    return dataset  # a stream, which also decodes images itself


def open_folder(path: Path, class_map: str = "", input_key: str | None = None) -> ImageReader:
    """Return the reader of a split in a folder or tar.

    Args:
        path: The folder or the tar.
        class_map: The file of class names; "" for the names of the folders in natural order.
        input_key: Extensions of images with ";" between them, as in timm; None for all.

    Raises:
        UsageError: If the split or the class map cannot be read, or is none.
    """
    labels = _class_map(class_map, path, path.parent)
    extensions = frozenset(input_key.lower().split(";")) if input_key else None
    return ImageReader(path, labels, class_map, extensions)


def _class_map(name: str, *folders: Path) -> dict[str, int] | None:
    """Read the class map of that name, which may be in one of the folders; None for no name."""
    if not name:
        return None
    paths = [Path(name), *(folder / name for folder in folders)]
    return read_class_map(next((path for path in paths if path.is_file()), paths[0]))


def _wds_keys() -> str:
    """Return the extensions of images in shards, as timm takes them; the usual ones are first."""
    first = ["jpg", "png", "webp"]
    return ";".join([*first, *sorted({name[1:] for name in image_extensions()} - {*first})])


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
    kind = kind.lower()
    if kind not in (kinds := ["", "torch", "hfds", "hfids", "tfds", "wds", "sample", "scenes"]):
        raise UsageError(
            f"unknown type of data set {kind}; the nearest of {', '.join(kinds[1:])} "
            f"is {nearest(kind, kinds)}"
        )
    if kind == "sample":
        folder = _sample(rest)
        if root:
            raise UsageError(f"--dataset {name} has its own images; leave out it or {root}")
        name, root = "", folder
    elif kind == "scenes" and not rest.startswith("fashion_mnist"):
        _check_keys(options, kind)
        return kind, rest, ""
    elif root and (kind == "scenes" or (kind, rest.lower()) == ("torch", "fashion_mnist")):
        _unpack_debian_fashion_mnist(Path(root))
    if not root:
        raise UsageError("no data: give --data-dir DIR, or --dataset sample/fashion_mnist")
    if not name:
        _check_folder(Path(root), split, must_exist)
    if kind == "scenes":
        name = rest
    _check_keys(options, kind)
    return kind, name, root


def _check_keys(options: DataOptions, kind: str) -> None:
    """Refuse options that the type of the data set has no use for."""
    if options.target_key and kind in ("", "sample", "scenes", "torch"):
        raise UsageError("--target-key is for hfds, hfids, wds and tfds data")
    if options.input_key and kind in ("scenes", "torch"):
        raise UsageError(f"--input-key is not for {kind} data")
    if options.class_map and kind in ("scenes", "torch", "wds"):
        raise UsageError(f"--class-map names class folders; the labels of {kind} data are numbers")


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
        raise UsageError(f"the data folder {root} is empty; {LAYOUT}")
    # If the split has no folder, timm reads the root as the split. This is right for validate.py
    # on a folder of classes, but in training the folders of splits would be taken for classes.
    if must_exist and _search_split(str(root), split) == str(root):
        names = sorted(entry.name for entry in root.iterdir())
        found = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise UsageError(
            f"{root} has no folder {split}/ (it has {found}); {LAYOUT}; the flags name other splits"
        )


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
    whole, indices = dataset, range(len(dataset))
    if isinstance(dataset, Subset):  # of --train-num-samples
        whole, indices = dataset.dataset, dataset.indices
    order = [indices[place] for place in _order(len(indices))]
    # Each part has a shallow copy, because their transforms differ.
    held_out, rest = sorted(order[:size]), sorted(order[size:])
    return Subset(copy(whole), rest), Subset(_fixed(copy(whole)), held_out)


def _order(length: int) -> list[int]:
    """Return a random order of indices, the same in every run."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(0)).tolist()


def _fixed(dataset: Any) -> Any:
    """Make the scenes of a data set that composes them the same at every access."""
    if isinstance(scenes := getattr(dataset, "dataset", None), FashionScenes):
        dataset.dataset = scenes.fixed()
    return dataset
