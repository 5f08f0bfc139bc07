"""Whether both parts of a training split have images of every class, told from the labels alone."""

from typing import Any

from ...errors import UsageError
from .datasets import Subset

__all__ = ["unvalidated_classes"]


def unvalidated_classes(train: Subset, held_out: Subset, classes: list[str]) -> list[str]:
    """Return the classes that have no image in the held-out part.

    Args:
        train: What is trained on.
        held_out: The rest of the same data set.
        classes: The names of the classes in label order.

    Returns:
        Names of classes; none if the data set does not tell its labels without reading images.

    Raises:
        UsageError: If a class is left without an image to train on.
    """
    labels = _labels(train.dataset)
    if labels is None:
        return []
    trained = {int(labels[index]) for index in train.indices}
    validated = {int(labels[index]) for index in held_out.indices}
    if lost := [classes[label] for label in sorted(validated - trained)]:
        raise UsageError(
            f"--val-fraction holds out all images of {_some(lost)}, which leaves none to train on; "
            "lower it, or give a validation split of its own"
        )
    return [classes[label] for label in sorted(trained - validated)]


def _labels(dataset: Any) -> Any:
    """Return the label of each image; None where images would have to be read for them."""
    while (inner := getattr(dataset, "dataset", None)) is not None:
        dataset = inner  # of images that are converted
    reader = getattr(dataset, "reader", dataset)
    if (targets := getattr(reader, "targets", None)) is not None:
        return targets
    samples = getattr(reader, "samples", None)
    return None if samples is None else [target for _, target in samples]


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"class{'es' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"
