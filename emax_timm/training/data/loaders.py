"""timm's loaders for training and evaluation, and what is known of the batches they have loaded."""

import functools
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from timm.data import AugMixDataset, FastCollateMixup, create_loader
from torch.utils.data import DataLoader, IterableDataset

from ...errors import UsageError
from ..config import DataOptions, TrainConfig, mixup_options
from ..distributed import DistributedContext
from ..signals import ignore_signals
from .decoding import ConvertedImages
from .sampling import KeyedBatches, KeyedDataset, KeyedErasing
from .subset import Subset

__all__ = [
    "corrupt_images",
    "evaluation_loader",
    "grouped",
    "ignoring_signals",
    "sample_names",
    "start_epoch",
    "training_loader",
]


def training_loader(
    config: TrainConfig,
    dataset: Any,
    data_config: dict[str, Any],
    num_classes: int,
    context: DistributedContext,
) -> Any:
    """Create timm's augmenting loader; it also applies mixup unless the prefetcher is off.

    Its order and its random numbers depend on the place in the run alone (`sampling.py`), unless
    the data set is a stream.

    Raises:
        UsageError: If timm refuses the augmentation options.
    """
    stream = isinstance(dataset, IterableDataset)
    if config.aug_splits > 1:
        dataset = AugMixDataset(dataset, num_splits=config.aug_splits)
    collate = None
    if mixup_options(config) and not config.no_prefetcher:
        collate = FastCollateMixup(**mixup_options(config), num_classes=num_classes)
    interpolation = data_config["interpolation"] if config.no_aug else config.train_interpolation
    arguments: dict[str, Any] = {
        **_augmentation(config),
        "input_size": data_config["input_size"],
        "batch_size": config.batch_size,
        "is_training": True,
        "interpolation": interpolation,
        "mean": data_config["mean"],
        "std": data_config["std"],
        "num_workers": config.workers,
        "distributed": stream and context.size > 1,
        "collate_fn": collate,
        "pin_memory": config.pin_mem,
        "device": context.device,
        "use_prefetcher": not config.no_prefetcher,
        # Persistent workers would keep their random state from epoch to epoch, so that the
        # augmentation of an epoch would depend on the epoch in which the process started.
        "persistent_workers": False,
    }
    try:
        loader = create_loader(dataset, **arguments)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        text = " ".join(str(error).split())
        raise UsageError(f"cannot augment as asked (--aa {config.aa}): {text}") from None
    return ignoring_signals(loader) if stream else _keyed(loader, config, context)


def _augmentation(config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of timm's loader that say how images are augmented."""
    return {
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
    }


def _keyed(loader: Any, config: TrainConfig, context: DistributedContext) -> Any:
    """Make the loader's order and its random numbers depend on the place in the run alone."""
    inner: Any = loader if config.no_prefetcher else loader.loader
    repeats = max(1, int(config.aug_repeats))
    keyed = DataLoader(
        KeyedDataset(inner.dataset, config.seed),
        batch_sampler=KeyedBatches(
            len(inner.dataset), config.batch_size, config.seed, context.rank, context.size, repeats
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
        loader.random_erasing = KeyedErasing(loader.random_erasing, config.seed, context.rank)
    return loader


def ignoring_signals(loader: Any) -> Any:
    """Let the run alone handle signals, not the workers of its timm loader; returns that."""
    inner = getattr(loader, "loader", loader)  # the prefetcher wraps torch's
    inner.worker_init_fn = functools.partial(_start_worker, inner.worker_init_fn)
    return loader


def _start_worker(start: Callable[[int], object] | None, worker: int) -> None:
    ignore_signals(worker)
    if start is not None:
        start(worker)


def start_epoch(loader: Any, epoch: int, batch: int = 0) -> None:
    """Make the next iteration over a training loader begin at batch `batch` of epoch `epoch`.

    A stream always begins at the start of the epoch.
    """
    if isinstance(loader.batch_sampler, KeyedBatches):
        loader.batch_sampler.start(epoch, batch)
        if isinstance(erasing := getattr(loader, "random_erasing", None), KeyedErasing):
            erasing.start(epoch, batch)
    elif hasattr(loader.dataset, "set_epoch"):
        loader.dataset.set_epoch(epoch)


def grouped(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Yield lists of `size` batches; the last list has those that are left."""
    iterator = iter(batches)
    while group := list(islice(iterator, size)):
        yield group


def sample_names(loader: Any, batch: int) -> list[str]:
    """Return the files of a batch of the loader's current epoch; indices if there are no files.

    The samples of a stream are unknown: the list is then empty.
    """
    if not isinstance(loader.batch_sampler, KeyedBatches):
        return []
    return [_name(loader.dataset.dataset, key.image) for key in loader.batch_sampler.batch(batch)]


def corrupt_images(loader: Any, batches: Iterable[int]) -> int:
    """Count the corrupt images in batches of the current epoch that have been loaded.

    The corrupt images of a stream are not counted.
    """
    sampler = loader.batch_sampler
    if not isinstance(sampler, KeyedBatches) or not loader.dataset.any_corrupt.value:
        return 0
    return sum(loader.dataset.count_corrupt(sampler.batch(number)) for number in batches)


def _name(dataset: Any, index: int) -> str:
    while isinstance(dataset, (Subset, AugMixDataset, ConvertedImages)):
        if isinstance(dataset, Subset):
            index = dataset.indices[index]
        dataset = dataset.dataset
    return dataset.filename(index) if hasattr(dataset, "filename") else f"sample {index}"


def evaluation_loader(
    options: DataOptions,
    dataset: Any,
    data_config: dict[str, Any],
    batch_size: int,
    context: DistributedContext,
) -> Any:
    """Create timm's loader over this rank's share of the images; no image is repeated."""
    if context.size > 1 and not isinstance(dataset, IterableDataset):
        # timm's distributed sampler would repeat images to make the shares equal.
        dataset = Subset(dataset, range(context.rank, len(dataset), context.size))
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
        device=context.device,
        use_prefetcher=not options.no_prefetcher,
        persistent_workers=False,
    )
