"""A picture of a few images of every class and split, to see at a glance what a data set is."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont, ImageOps

from .decoding import CorruptImageError, open_image
from .readers import ImageReader

__all__ = ["contact_sheet"]

# In pixels, but for the numbers of classes and of images of each.
CELL, GAP, NAMES, LINE = 96, 4, 140, 24
CLASSES, IMAGES = 20, 8


def contact_sheet(readers: dict[str, ImageReader]) -> Image.Image:
    """Draw a row of images for each class of each split, spread evenly over its images.

    An image that cannot be read is a crossed box. Of many classes some are shown, spread evenly.

    Args:
        readers: The readers of the splits, by name.
    """
    rows: list[tuple[str, ImageReader | None, Sequence[int]]] = []
    for split, reader in readers.items():
        by_class: defaultdict[str, list[int]] = defaultdict(list)
        names = {label: name for name, label in reader.class_to_idx.items()}
        for index, target in enumerate(reader.targets):
            by_class[names[target]].append(index)
        shown = _spread([*by_class], CLASSES)
        rest = len(by_class) - len(shown)
        title = f"{split}: {len(reader)} images of {len(by_class)} classes"
        rows.append((f"{title}, {rest} of them not shown" if rest else title, None, ()))
        rows += [(name, reader, _spread(by_class[name], IMAGES)) for name in shown]
    height = GAP + sum(LINE if reader is None else CELL + GAP for _, reader, _ in rows)
    sheet = Image.new("RGB", (NAMES + IMAGES * (CELL + GAP) + GAP, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default()
    top = GAP
    for text, reader, indices in rows:
        _write(draw, (GAP, top + 4), text if reader is None else text[:22], font)
        if reader is None:
            top += LINE
            continue
        for column, index in enumerate(indices):
            sheet.paste(_cell(reader, index), (NAMES + column * (CELL + GAP), top))
        top += CELL + GAP
    return sheet


def _spread(items: Sequence[Any], limit: int) -> list[Any]:
    """Return at most `limit` of the items, spread evenly."""
    count = min(limit, len(items))
    return [items[place * len(items) // count] for place in range(count)]


def _cell(reader: ImageReader, index: int) -> Image.Image:
    try:
        source, _ = reader[index]
        image = open_image(source, "RGB")
        return ImageOps.pad(image, (CELL, CELL), color="lightgrey")
    except (CorruptImageError, OSError, ValueError):
        cell = Image.new("RGB", (CELL, CELL), "lightgrey")
        draw = ImageDraw.Draw(cell)
        draw.line((0, 0, CELL, CELL), "red", 3)
        draw.line((0, CELL, CELL, 0), "red", 3)
        return cell


def _write(draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, font: Any) -> None:
    try:
        draw.text(place, text, "black", font)
    except UnicodeEncodeError:  # Pillow without FreeType has letters of Latin-1 alone
        draw.text(place, text.encode("ascii", "replace").decode(), "black", font)
