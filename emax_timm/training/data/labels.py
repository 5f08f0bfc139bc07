"""The classes of data sets, and checks that their labels are those that a model is trained on."""

from typing import Any

import numpy as np
from timm.data import AugMixDataset
from torch.utils.data import IterableDataset

from ...errors import UsageError
from .decoding import ConvertedImages, OneLineError
from .readers import LAYOUT
from .subset import Subset

__all__ = [
    "LabelError",
    "check_labels",
    "class_names",
    "same_classes",
    "several_classes",
    "targets_of",
]


class LabelError(OneLineError):
    """A label is none of the model's classes; the message is one line."""

    exit_code = 2


def class_names(dataset: Any) -> list[str] | None:
    """Return the names of the classes in label order; None if the data set does not have them."""
    dataset = unwrapped(dataset)
    reader = getattr(dataset, "reader", dataset)
    for attribute in ("class_to_idx", "class_name_to_idx"):
        mapping = getattr(reader, attribute, None)
        if isinstance(mapping, dict) and mapping:  # it is empty where labels are mere numbers
            return sorted(mapping, key=mapping.__getitem__)
    return None


def unwrapped(dataset: Any) -> Any:
    """Return the data set itself, without the package's and timm's wrappers."""
    while isinstance(dataset, (Subset, AugMixDataset, ConvertedImages)):
        dataset = dataset.dataset
    return dataset


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


def several_classes(names: list[str] | None, place: str) -> None:
    """Refuse data of one class; `place` is where they are.

    Raises:
        UsageError: If there is one class only.
    """
    if names is not None and len(names) == 1:
        raise UsageError(f"{place} has one class only, {names[0]}; {LAYOUT}")


def targets_of(dataset: Any) -> list[Any] | None:
    """Return the labels of all images without opening one; None where that cannot be done.

    Raises:
        UsageError: If the class map lacks a label.
    """
    if isinstance(dataset, IterableDataset):
        return None
    if isinstance(dataset, Subset):
        targets = targets_of(dataset.dataset)
        return None if targets is None else [targets[index] for index in dataset.indices]
    inner = unwrapped(dataset)
    reader = getattr(inner, "reader", inner)
    targets = getattr(reader, "targets", None)
    # timm's reader of Hugging Face data sets needs a while, and named classes have good labels.
    if targets is None and hasattr(reader, "iter_targets") and class_names(dataset) is None:
        targets = list(reader.iter_targets())
    try:
        array = np.asarray(targets)
    except ValueError:  # lists of several lengths
        return None
    return array.tolist() if array.ndim == 1 else None


def check_labels(dataset: Any, num_classes: int, split: str) -> None:
    """Refuse labels that are none of 0, ..., num_classes - 1.

    Where the labels cannot be known before the images are read, each is checked when it is read: it
    then raises a `LabelError`.

    Args:
        dataset: The data set of the split; its `target_transform` may be set.
        num_classes: Number of classes of the model.
        split: The name of the split, for the message.

    Raises:
        UsageError: If a label is none of the model's classes.
    """
    check = _LabelCheck(num_classes, split)
    targets = targets_of(dataset)
    if targets is None:
        unwrapped(dataset).target_transform = check
        return
    try:
        for label in dict.fromkeys(targets):
            check(label)
    except LabelError as error:
        raise UsageError(str(error)) from None


class _LabelCheck:
    """A transform of labels that refuses those beyond the classes, and returns the others."""

    def __init__(self, num_classes: int, split: str) -> None:
        self.num_classes, self.split = num_classes, split

    def __call__(self, label: Any) -> Any:
        try:
            valid = 0 <= label < self.num_classes and int(label) == label
        except (TypeError, ValueError):  # text, or several labels
            valid = False
        if not valid:
            raise LabelError(
                f"split {self.split!r} has the label {label}, but there are {self.num_classes} "
                f"classes, with labels 0 to {self.num_classes - 1}; --num-classes sets their number"
            )
        return label
