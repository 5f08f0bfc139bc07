"""What is said of a split before training: its classes and images, and what was left out."""

from collections import Counter
from typing import Any

from .decoding import ImageFiles
from .labels import class_names, targets_of, unwrapped
from .readers import ImageReader

__all__ = ["inventory", "left_out", "overlap"]

# With more classes than this, the extremes alone are told.
FEW = 10


def inventory(dataset: Any) -> str:
    """Return one line on the classes and images of a split; no image is opened."""
    names, targets = class_names(dataset), targets_of(dataset)
    try:
        text = f"{len(dataset)} images"
    except TypeError:  # a stream of unknown length
        text = "images as they come"
    if names is None and targets is None:
        return text
    counts = Counter(targets or ())
    classes = len(names) if names is not None else len(counts)
    text += f" of {classes} classes"
    if targets is None:
        return text
    labels = [*(range(len(names)) if names is not None else sorted(counts))]
    named = [(names[label] if names is not None else str(label), counts[label]) for label in labels]
    if len(named) <= FEW:
        return f"{text}: {', '.join(f'{name} {count}' for name, count in named)}"
    least = min(named, key=lambda pair: pair[1])
    most = max(named, key=lambda pair: pair[1])
    return f"{text}: {least[1]} ({least[0]}) to {most[1]} ({most[0]}) of each"


def left_out(dataset: Any) -> list[str]:
    """Return a line for each reason for which files of a split's folder or tar are not read."""
    reader = reader_of(dataset)
    if reader is None:
        return []
    lines = [
        f"left out {left.number} {reason}, such as {left.example}"
        for reason, left in sorted(reader.left_out.items())
    ]
    if reader.unmapped:
        images, names = sum(reader.unmapped.values()), sorted(reader.unmapped)
        some = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        lines.append(f"left out {images} images in class folders not in the class map: {some}")
    counts = Counter(targets_of(dataset))
    empty = [name for name, label in reader.class_to_idx.items() if not counts[label]]
    if empty:
        some = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        lines.append(f"no images of {len(empty)} classes: {some}")
    return lines + reader.notes


def overlap(first: Any, second: Any) -> str | None:
    """Return the folder or tar that two splits both are; None if they differ."""
    readers = reader_of(first), reader_of(second)
    if None in readers:
        return None
    roots = {reader.root.resolve() for reader in readers if reader is not None}
    return str(*roots) if len(roots) == 1 else None


def reader_of(dataset: Any) -> ImageReader | None:
    """Return the reader of a split in a folder or tar; None if it is of another type."""
    dataset = unwrapped(dataset)
    reader = dataset.reader if isinstance(dataset, ImageFiles) else None
    return reader if isinstance(reader, ImageReader) else None
