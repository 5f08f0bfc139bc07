"""The splits of a training run: opened, checked against each other, and described."""

import sys
from typing import Any

from .config import TrainConfig, UsageError
from .data import (
    check_labels,
    class_names,
    hold_out,
    image_mode,
    inventory,
    left_out,
    open_split,
    overlap,
    same_classes,
    several_classes,
    targets_of,
)

__all__ = ["open_splits", "print_splits", "unvalidated"]


def open_splits(config: TrainConfig) -> tuple[dict[str, Any], int]:
    """Open the splits of a training run, and check that they fit each other and the model.

    Returns:
        The data sets by name (train, and validation and test if there are any), and the number of
        classes.

    Raises:
        UsageError: If a split cannot be read, is no data set, or does not fit the others.
    """

    def split(name: str, training: bool, samples: int | None) -> Any:
        return open_split(
            config,
            name,
            input_img_mode=image_mode(config),
            training=training,
            must_exist=True,
            batch_size=config.batch_size,
            num_samples=samples,
            seed=config.seed,
            repeats=config.epoch_repeats if training else 0.0,
        )

    splits = {"train": split(config.train_split, True, config.train_num_samples)}
    if config.val_fraction:
        splits["train"], splits["validation"] = hold_out(splits["train"], config.val_fraction)
    elif config.val_split:
        splits["validation"] = split(config.val_split, False, config.val_num_samples)
    if config.test_split:
        splits["test"] = split(config.test_split, False, None)
    num_classes = _num_classes(config, splits["train"])
    for name, dataset in splits.items():
        same_classes(class_names(splits["train"]), class_names(dataset), name)
        check_labels(dataset, num_classes, name)
    _check_training(config, splits)
    return splits, num_classes


def print_splits(splits: dict[str, Any]) -> None:
    """Print what each split has, and to stderr what was left out of it."""
    for name, dataset in splits.items():
        print(f"{name}: {inventory(dataset)}", flush=True)
        for line in left_out(dataset):
            print(f"warning: {name}: {line}", file=sys.stderr, flush=True)


def unvalidated(config: TrainConfig, splits: dict[str, Any]) -> str:
    """Return a sentence on the classes of which --val-fraction holds out no image; "" if none."""
    names, targets = class_names(splits["train"]), targets_of(splits["train"])
    if not config.val_fraction or names is None or targets is None:
        return ""
    missing = sorted(set(targets) - set(targets_of(splits["validation"]) or ()))
    if not missing:
        return ""
    shown = ", ".join(names[label] for label in missing[:3]) + (", …" if len(missing) > 3 else "")
    return (
        f"--val-fraction holds out no image of {len(missing)} of {len(names)} classes ({shown}); a "
        "larger one, or a validation split of its own, has all of them"
    )


def _check_training(config: TrainConfig, splits: dict[str, Any]) -> None:
    """Refuse to train on what is validated on, and on too few classes."""
    train = splits["train"]
    names, targets = class_names(train), targets_of(train)
    for name, dataset in splits.items():
        chosen = {"validation": config.val_split, "test": config.test_split}.get(name, "")
        place = None if name == "validation" and config.val_fraction else overlap(train, dataset)
        # Naming the training split twice is a choice; anything else is likely to be a mistake.
        if place and chosen not in ("", config.train_split):
            raise UsageError(
                f"splits {config.train_split!r} and {chosen!r} are the same images ({place}); "
                "hold a part of them out with --val-fraction, or give --val-split ''"
            )
    several_classes(names, f"split {config.train_split!r}")
    if targets is None:
        return
    present = set(targets)
    if len(present) < 2:
        raise UsageError(f"all {len(targets)} training images are of one class; training needs two")
    if config.val_fraction and names is not None:
        lost = sorted(set(targets_of(splits["validation"]) or ()) - present)
        if lost:
            raise UsageError(
                f"--val-fraction {config.val_fraction} leaves no training image of class "
                f"{', '.join(names[label] for label in lost[:5])}; lower it"
            )


def _num_classes(config: TrainConfig, train: Any) -> int:
    """Return the number of classes that was asked for, or else that of the training data."""
    names = class_names(train)
    known = len(names) if names is not None else None
    if config.num_classes is not None:
        if known is not None and known > config.num_classes:
            raise UsageError(f"the data has {known} classes, more than --num-classes allows")
        return config.num_classes
    if known is not None:
        return known
    targets = targets_of(train)
    if targets is None:
        raise UsageError(
            "the number of classes is not known before the images are read; give --num-classes"
        )
    # If none is a number, the check of the labels says so.
    return max((label for label in targets if isinstance(label, int)), default=1) + 1
