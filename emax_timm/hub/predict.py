"""The `emax predict` command."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.data import create_transform, resolve_data_config

from ..models.labels import class_namer
from ..runner import command
from ..training.config import AT_LEAST_1, UsageError, from_mapping, option, parse_settings
from ..training.config.checks import check_model
from ..training.data.decoding import CorruptImageError, open_image
from ..training.loading import DEFAULT_MODEL, create_model

__all__ = ["Prediction", "predict", "predictions"]


@dataclass
class PredictConfig:
    """Classify images."""

    images: list[str] = option([], "image files", positional=True, metavar="IMAGE")
    model: str = option(
        DEFAULT_MODEL,
        "name of a timm model with weights, local-dir:FOLDER (such as a run directory) or "
        "hf-hub:ORG/NAME; the default knows ten kinds of clothes, light on a dark ground",
        "-m",
    )
    top: int = option(3, "classes to name for each image", bounds=AT_LEAST_1)
    exif_orientation: bool = option(True, "turn images upright as their EXIF data say")


class Prediction(NamedTuple):
    """A predicted class: its name and its probability."""

    name: str
    probability: float


@command("emax predict")
def predict(argv: Sequence[str], prog: str) -> int:
    """Classify images, and return the exit status: 1 if an image is corrupt."""
    corrupt = 0
    settings = parse_settings(PredictConfig, argv, prog)
    config = from_mapping(PredictConfig, settings, "the command line")
    if not config.images:
        raise UsageError("nothing to classify: give image files")
    for path in map(Path, config.images):
        if not path.is_file():
            what = "is a folder; give the files in it" if path.is_dir() else "does not exist"
            raise UsageError(f"{path} {what}")
    check_model(config.model, {})
    model = create_model(config.model, pretrained=True).eval()
    if not model.num_classes:
        raise UsageError(f"model {config.model} has no classifier")
    for path, found in predictions(model, config.images, config.top, config.exif_orientation):
        if isinstance(found, CorruptImageError):
            corrupt += 1
            print(f"{prog}: error: corrupt image {path}: {found}", file=sys.stderr)
        else:
            print(f"{path}: {', '.join(f'{p.name} {p.probability:.3f}' for p in found)}")
    return 1 if corrupt else 0


@torch.inference_mode()
def predictions(
    model: Any, paths: Sequence[str | Path], top: int = 3, exif_orientation: bool = True
) -> Iterator[tuple[Path, list[Prediction] | CorruptImageError]]:
    """Yield the most probable classes of each image, or why it cannot be read.

    Args:
        model: A timm model with a classifier, in eval mode; its pretrained config says how images
            are preprocessed.
        paths: Image files.
        top: The largest number of classes for each image.
        exif_orientation: Whether to turn images upright as their EXIF data say.

    Yields:
        The path and its predictions, the most probable first; for a corrupt image the path and the
        `CorruptImageError`, which is not raised.
    """
    data_config = resolve_data_config(model=model)
    transform: Any = create_transform(**data_config)
    mode = "RGB" if data_config["input_size"][0] == 3 else "L"
    names = class_namer(model)
    for path in map(Path, paths):
        try:
            image = open_image(path, mode, exif_orientation)
        except CorruptImageError as error:
            yield path, error
            continue
        values = model(transform(image).unsqueeze(0)).softmax(dim=1)[0]  # [classes]
        best = values.topk(min(top, len(values)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        yield path, [Prediction(names(index), value) for index, value in pairs]
