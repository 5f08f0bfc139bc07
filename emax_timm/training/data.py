"""Data sets by timm's readers, checked before training, and timm's loaders over them."""

import gzip
import os
import shutil
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any

import torch
from timm.data import (
    AugMixDataset,
    FastCollateMixup,
    ImageDataset,
    create_dataset,
    create_loader,
    resolve_data_config,
)
from timm.data.dataset_factory import _search_split
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .config import UsageError, nearest
from .distributed import World
from .images import ConvertedImages, ImageFiles
from .options import DataOptions, InputOptions, TrainConfig
from .sampling import KeyedBatches, KeyedDataset, KeyedErasing
from .signals import ignore_signals

__all__ = [
    "Subset",
    "broken_images",
    "class_names",
    "data_config_of",
    "evaluation_loader",
    "hold_out",
    "image_mode",
    "input_channels",
    "open_split",
    "same_classes",
    "sample_names",
    "start_epoch",
    "training_loader",
]

SAMPLES = Path(__file__).parents[1] / "samples"
DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


class Subset(Dataset):
    """Some samples of a map-style data set; timm's loader sets `transform` through it."""

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
        options: Which data set.
        split: Its split.
        input_img_mode: PIL mode of the images if the options do not say.
        training: Whether it is trained on.
        must_exist: Refuse a folder without one for the split, as for training; else the folder is
            taken to be the split.
        batch_size, num_samples, seed, repeats: Of iterable data sets.

    Raises:
        UsageError: If it is not there or is empty.
    """
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
        _check_folder(Path(root), split, must_exist or training)
    if options.class_map.endswith(".pkl"):
        raise UsageError(f"{options.class_map}: a class map is a text file, one class per line")
    arguments: dict[str, Any] = {
        "root": str(root),
        "split": split,
        "is_training": training,
        "class_map": options.class_map or None,
        "download": options.dataset_download,
        "batch_size": batch_size,
        "num_samples": num_samples,
        "seed": seed,
        "repeats": repeats,
        "input_img_mode": options.input_img_mode or input_img_mode,
        "input_key": options.input_key,
        "target_key": options.target_key,
    }
    try:
        dataset: Any = create_dataset(name, **arguments)
        if not isinstance(dataset, IterableDataset) and len(dataset) == 0:
            raise RuntimeError("it holds no images")
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"cannot read split {split!r} of {name or root}: {text}") from None
    if isinstance(dataset, ImageDataset):
        return ImageFiles(dataset.reader, arguments["input_img_mode"], options.exif_orientation)
    if kind == "torch":  # decodes images in its own way
        return ConvertedImages(dataset, arguments["input_img_mode"])
    return dataset  # a stream, which does so too


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
    # Without the split's own folder timm reads the root as if it were the split: right for
    # validate.py on a folder of classes, but in training its splits would be taken for classes.
    if must_exist and _search_split(str(root), split) == str(root):
        found = ", ".join(sorted(entry.name for entry in root.iterdir())[:5])
        raise UsageError(f"{root} has no folder {split}/ (it has {found}); name it with the flags")


def _unpack_debian_fashion_mnist(root: Path) -> None:
    # Debian's package dataset-fashion-mnist spares the download: the same images, compressed
    # anew, so that torchvision's checksums of the archives do not fit them.
    raw = root / "FashionMNIST" / "raw"
    for archive in sorted(DEBIAN_FASHION_MNIST.glob("*-ubyte.gz")):
        target = raw / archive.stem
        if target.exists():
            continue
        raw.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}")  # ranks may do this at once
        with gzip.open(archive) as source, partial.open("wb") as sink:
            shutil.copyfileobj(source, sink)
        partial.replace(target)


def class_names(dataset: Any) -> list[str] | None:
    """The classes in label order, None where the data set does not tell."""
    while isinstance(dataset, (Subset, AugMixDataset, ConvertedImages)):
        dataset = dataset.dataset
    reader = getattr(dataset, "reader", dataset)
    for attribute in ("class_to_idx", "class_name_to_idx"):
        mapping = getattr(reader, attribute, None)
        if isinstance(mapping, dict):
            return sorted(mapping, key=mapping.__getitem__)
    return None


def same_classes(expected: list[str] | None, found: list[str] | None, split: str) -> None:
    """Refuse a split whose labels would mean other classes than in training.

    Raises:
        UsageError: If both tell their classes and these differ.
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
    """Split a data set at random into the larger and the smaller part, always the same way.

    Raises:
        UsageError: If the data set cannot be split, or a part would be empty.
    """
    if isinstance(dataset, IterableDataset):
        raise UsageError("--val-fraction needs data that can be indexed, not a stream")
    size = round(len(dataset) * fraction)
    if not 0 < size < len(dataset):
        raise UsageError(f"--val-fraction {fraction} leaves a part of {len(dataset)} images empty")
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    # A shallow copy each, for the parts have different transforms.
    held_out, rest = sorted(order[:size]), sorted(order[size:])
    return Subset(copy(dataset), rest), Subset(copy(dataset), held_out)


def training_loader(
    config: TrainConfig, dataset: Any, data_config: dict[str, Any], num_classes: int, world: World
) -> Any:
    """Timm's augmenting loader; mixup happens in it unless the prefetcher is off.

    Its randomness is keyed (`sampling.py`), unless the data are a stream.
    """
    stream = isinstance(dataset, IterableDataset)
    if config.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=config.aug_splits)
    collate = None
    if mixup_options(config) and not config.no_prefetcher:
        collate = FastCollateMixup(**mixup_options(config), num_classes=num_classes)
    interpolation = data_config["interpolation"] if config.no_aug else config.train_interpolation
    arguments: dict[str, Any] = {
        "input_size": data_config["input_size"],
        "batch_size": config.batch_size,
        "is_training": True,
        "no_aug": config.no_aug,
        "re_prob": config.reprob,
        "re_mode": config.remode,
        "re_count": config.recount,
        "re_split": config.resplit,
        "train_crop_mode": config.train_crop_mode,
        "scale": tuple(config.scale),
        "ratio": tuple(config.ratio),
        "hflip": config.hflip,
        "vflip": config.vflip,
        "color_jitter": config.color_jitter,
        "color_jitter_prob": config.color_jitter_prob,
        "grayscale_prob": config.grayscale_prob or 0.0,
        "gaussian_blur_prob": config.gaussian_blur_prob or 0.0,
        "auto_augment": config.aa,
        "num_aug_splits": config.aug_splits,
        "interpolation": interpolation,
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": config.workers,
        "distributed": stream and world.size > 1,
        "collate_fn": collate,
        "pin_memory": config.pin_mem,
        "device": world.device,
        "use_prefetcher": not config.no_prefetcher,
        # Workers that outlive an epoch would go on with its random state: an epoch's augmentation
        # would depend on where the run was started.
        "persistent_workers": False,
    }
    try:
        loader = create_loader(dataset, **arguments)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"cannot augment as asked (--aa {config.aa}): {text}") from None
    return loader if stream else _keyed(loader, config, world)


def _keyed(loader: Any, config: TrainConfig, world: World) -> Any:
    """The loader with its order and its random numbers a function of the place in the run."""
    inner: Any = loader if config.no_prefetcher else loader.loader
    repeats = max(1, int(config.aug_repeats))
    keyed = DataLoader(
        KeyedDataset(inner.dataset, config.seed),
        batch_sampler=KeyedBatches(
            len(inner.dataset), config.batch_size, config.seed, world.rank, world.size, repeats
        ),
        collate_fn=inner.collate_fn,
        num_workers=inner.num_workers,
        pin_memory=inner.pin_memory,
        worker_init_fn=ignore_signals,
    )
    if config.no_prefetcher:
        return keyed
    loader.loader = keyed
    if loader.random_erasing is not None:
        loader.random_erasing = KeyedErasing(loader.random_erasing, config.seed, world.rank)
    return loader


def start_epoch(loader: Any, epoch: int, batch: int = 0) -> None:
    """Let the next iteration over a training loader begin at a batch of an epoch.

    A stream can only begin at the epoch's start.
    """
    if isinstance(loader.batch_sampler, KeyedBatches):
        loader.batch_sampler.start(epoch, batch)
        if isinstance(erasing := getattr(loader, "random_erasing", None), KeyedErasing):
            erasing.start(epoch, batch)
    elif hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)


def sample_names(loader: Any, batch: int) -> list[str]:
    """Files (or indices, where there are none) of a batch of the epoch that a loader is in."""
    if not isinstance(loader.batch_sampler, KeyedBatches):
        return []
    return [_name(loader.dataset.dataset, key.image) for key in loader.batch_sampler.batch(batch)]


def broken_images(loader: Any, batches: Iterable[int]) -> int:
    """Broken images in batches, already loaded, of the epoch that a training loader is in."""
    sampler = loader.batch_sampler
    if not isinstance(sampler, KeyedBatches):
        return 0
    return sum(loader.dataset.count_broken(sampler.batch(number)) for number in batches)


def _name(dataset: Any, index: int) -> str:
    while isinstance(dataset, (Subset, AugMixDataset, ConvertedImages)):
        if isinstance(dataset, Subset):
            index = dataset.indices[index]
        dataset = dataset.dataset
    return dataset.filename(index) if hasattr(dataset, "filename") else f"sample {index}"


def input_channels(options: InputOptions) -> int:
    """Channels of the model's input."""
    return options.input_size[0] if options.input_size else options.in_chans or 3


def image_mode(options: InputOptions) -> str:
    """PIL mode of images for the model."""
    return "RGB" if input_channels(options) == 3 else "L"


def data_config_of(options: InputOptions, model: Any) -> dict[str, Any]:
    """Size and normalisation of the model's input, and how images are resized to it.

    Raises:
        UsageError: If mean or std do not fit the number of channels.
    """
    channels = input_channels(options)
    for name in ("mean", "std"):
        values = getattr(options, name)
        if values is not None and len(values) not in (1, channels):
            raise UsageError(f"{name} has {len(values)} values for {channels} channels")
    return resolve_data_config(vars(options), model=model)


def evaluation_loader(
    options: DataOptions, dataset: Any, data_config: dict[str, Any], batch_size: int, world: World
) -> Any:
    """Timm's loader over this rank's share of the images, each counted once."""
    if world.size > 1 and not isinstance(dataset, IterableDataset):
        # timm's distributed sampler would repeat images to even the shares out.
        dataset = Subset(dataset, range(world.rank, len(dataset), world.size))
    return create_loader(
        dataset,  # type: ignore[arg-type]
        input_size=data_config["input_size"],
        batch_size=batch_size,
        is_training=False,
        interpolation=data_config["interpolation"],
        mean=data_config["mean"],
        std=data_config["std"],
        crop_pct=data_config["crop_pct"],
        crop_mode=data_config["crop_mode"],
        num_workers=options.workers,
        pin_memory=options.pin_mem,
        device=world.device,
        use_prefetcher=not options.no_prefetcher,
        persistent_workers=False,
    )


def mixup_options(config: TrainConfig) -> dict[str, Any]:
    """Arguments of timm's Mixup, but for the number of classes; empty where it is off."""
    if config.mixup <= 0 and config.cutmix <= 0 and config.cutmix_minmax is None:
        return {}
    return {
        "mixup_alpha": config.mixup,
        "cutmix_alpha": config.cutmix,
        "cutmix_minmax": config.cutmix_minmax,
        "prob": config.mixup_prob,
        "switch_prob": config.mixup_switch_prob,
        "mode": config.mixup_mode,
        "label_smoothing": config.smoothing,
    }
