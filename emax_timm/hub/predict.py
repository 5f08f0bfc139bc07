"""The `emax predict` command."""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..files import check_target, replace_file, writing_to
from ..models.labels import class_namer
from ..runner import command
from ..training.config import (
    AT_LEAST_0,
    AT_LEAST_1,
    UsageError,
    from_mapping,
    option,
    parse_settings,
)
from ..training.data.decoding import CorruptImageError, open_image
from ..training.data.image_files import find_image_files
from ..training.distributed import open_distributed_context
from ..training.loading import DEFAULT_MODEL, load_model
from ..training.progress import Progress, working
from ..training.signals import ignore_signals
from .prediction_formats import FORMATS, Prediction

__all__ = ["Prediction", "predict", "predictions"]


@dataclass
class PredictConfig:
    """Classify images."""

    images: list[str] = option(
        [],
        "image files, and folders of them with all folders below",
        positional=True,
        metavar="PATH",
    )
    model: str = option(
        DEFAULT_MODEL,
        "name of a timm model with weights, run directory or checkpoint in one, or "
        "hf-hub:ORG/NAME; the default knows ten kinds of clothes, light on a dark ground",
        "-m",
    )
    top: int = option(3, "classes to name for each image", bounds=AT_LEAST_1)
    format: str = option(
        "table", "table, or csv or jsonl for other programs", choices=tuple(FORMATS)
    )
    embed: str | None = option(
        None, "also write the features of the images to this .npz file", metavar="FILE"
    )
    batch_size: int = option(32, "images per forward pass", "-b", bounds=AT_LEAST_1)
    workers: int = option(
        0, "processes that load images; 0 loads in the main process", "-j", bounds=AT_LEAST_0
    )
    device: str = option(
        "", "device to compute on: cpu, cuda, … (default: cuda if there is one, else cpu)"
    )
    exif_orientation: bool = option(True, "turn images upright as their EXIF data say")


class Outputs(NamedTuple):
    """This is what a model computes of an image."""

    logits: Tensor
    """[classes]; empty for a model without a classifier."""
    features: Tensor | None
    """[c], the input of the classifier; None unless asked for."""


@command("emax predict")
def predict(argv: Sequence[str], prog: str) -> int:
    """Classify images, and return the exit status: 1 if an image is corrupt."""
    settings = parse_settings(PredictConfig, argv, prog)
    config = from_mapping(PredictConfig, settings, "the command line")
    if not config.images:
        raise UsageError("nothing to classify: give image files, or folders of them")
    if config.embed:
        _check_embed(Path(config.embed))
    files = find_image_files(config.images)
    with open_distributed_context(config.device) as context:
        with working(f"loading {config.model}"):
            model = load_model(config.model, pretrained=True).eval().to(context.device)
        if not model.num_classes and not config.embed:
            raise UsageError(f"model {config.model} has no classifier; --embed writes its features")
        found = _outputs(model, files, config)
        # On a terminal, the table itself shows the progress.
        shown = not (model.num_classes and sys.stdout.isatty())
        with Progress("predicting", len(files), 0, enabled=shown, unit="image") as progress:
            corrupt, embedded = _print(model, files, found, config, progress, prog)
    if config.embed:
        path = Path(config.embed)
        with writing_to(path):
            replace_file(path, lambda file: _save(file, embedded, model))
        print(f"{path}: the features of {len(embedded)} images", file=sys.stderr)
    return 1 if corrupt else 0


def _print(
    model: Any,
    files: Sequence[Path],
    found: Iterator[tuple[Path, Outputs | CorruptImageError]],
    config: PredictConfig,
    progress: Progress,
    prog: str,
) -> tuple[int, dict[Path, Tensor]]:
    """Print the predictions; return the number of corrupt images, and the features if asked."""
    namer, corrupt, embedded = class_namer(model), 0, {}
    names = [namer(index) for index in range(model.num_classes)]
    write = FORMATS[config.format](files, names, config.top) if names else None
    for path, values in found:
        if isinstance(values, CorruptImageError):
            corrupt += 1
            progress.print(f"{prog}: error: corrupt image {path}: {values}")
        else:
            if write is not None:
                write(path, _best(values.logits, namer, config.top))
            if values.features is not None:
                embedded[path] = values.features
        progress.step()
    return corrupt, embedded


def predictions(
    model: Any,
    paths: Sequence[str | Path],
    top: int = 3,
    exif_orientation: bool = True,
    batch_size: int = 32,
    workers: int = 0,
) -> Iterator[tuple[Path, list[Prediction] | CorruptImageError]]:
    """Yield the most probable classes of each image, or why it cannot be read.

    Args:
        model: A timm model with a classifier, in eval mode; its pretrained config says how images
            are preprocessed.
        paths: Image files.
        top: The largest number of classes for each image.
        exif_orientation: Whether to turn images upright as their EXIF data say.
        batch_size: Images per forward pass.
        workers: Processes that load images; 0 loads in this one.

    Yields:
        The path and its predictions, the most probable first; for a corrupt image the path and the
        `CorruptImageError`, which is not raised.
    """
    options = PredictConfig(
        top=top, exif_orientation=exif_orientation, batch_size=batch_size, workers=workers
    )
    namer = class_namer(model)
    for path, values in _outputs(model, [Path(path) for path in paths], options):
        known = isinstance(values, CorruptImageError)
        yield path, values if known else _best(values.logits, namer, top)


def _best(logits: Tensor, namer: Callable[[int], str], top: int) -> list[Prediction]:
    best = logits.softmax(dim=0).topk(min(top, len(logits)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Prediction(namer(index), value) for index, value in pairs]


def _outputs(
    model: Any, paths: Sequence[Path], options: PredictConfig
) -> Iterator[tuple[Path, Outputs | CorruptImageError]]:
    """Return an iterator over the images' outputs, in order, or why an image cannot be read."""
    loader = DataLoader(
        _Images(model, paths, options.exif_orientation),
        options.batch_size,
        num_workers=min(options.workers, len(paths)),
        collate_fn=_collate,
        worker_init_fn=ignore_signals,
    )
    return _computed(model, loader, paths, bool(options.embed))


def _computed(
    model: Any, loader: DataLoader, paths: Sequence[Path], with_features: bool
) -> Iterator[tuple[Path, Outputs | CorruptImageError]]:
    rest = iter(paths)
    for images, errors in loader:
        computed = iter(() if images is None else _forward(model, images, with_features))
        for error in errors:
            yield next(rest), next(computed) if error is None else error


def _collate(
    items: Sequence[Tensor | CorruptImageError],
) -> tuple[Tensor | None, list[CorruptImageError | None]]:
    """Stack the images, and list for each item its error, or None for an image."""
    images = [item for item in items if isinstance(item, Tensor)]
    errors = [None if isinstance(item, Tensor) else item for item in items]
    return torch.stack(images) if images else None, errors


@torch.inference_mode()
def _forward(model: Any, images: Tensor, with_features: bool) -> list[Outputs]:
    images = images.to(next(model.parameters()).device)
    if not with_features:
        return [Outputs(logits, None) for logits in model(images).float().cpu()]
    maps = model.forward_features(images)
    features = model.forward_head(maps, pre_logits=True).flatten(1).float().cpu()  # [b, c]
    logits = model.forward_head(maps).float().cpu()  # [b, classes]
    return [Outputs(*pair) for pair in zip(logits, features, strict=True)]


# The PIL mode of images for a number of channels.
_MODES = {1: "L", 3: "RGB"}


class _Images(Dataset):
    """Images as a model takes them, [c, h, w]; for a corrupt one the error, which is not raised."""

    def __init__(self, model: Any, paths: Sequence[Path], exif: bool) -> None:
        data_config = resolve_data_config(model=model)
        channels = data_config["input_size"][0]
        if channels not in _MODES:
            raise UsageError(f"the model takes images of {channels} channels; 1 or 3 can be read")
        self.transform: Any = create_transform(**data_config)
        self.mode = _MODES[channels]
        self.paths, self.exif = paths, exif

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor | CorruptImageError:
        try:
            return self.transform(open_image(self.paths[index], self.mode, self.exif))
        except CorruptImageError as error:
            return error


def _check_embed(path: Path) -> None:
    if path.suffix != ".npz":
        raise UsageError(f"--embed writes a .npz file, not {path}")
    check_target(path)


def _save(file: Path, embedded: dict[Path, Tensor], model: Any) -> None:
    """Write features, float32 [n, c], and paths, text [n], as `numpy.load` reads them."""
    rows = [values.numpy() for values in embedded.values()]
    features = np.stack(rows) if rows else np.zeros((0, model.num_features), np.float32)
    with file.open("wb") as stream:  # numpy would add a suffix to a name
        np.savez(stream, features=features, paths=np.array([str(p) for p in embedded], np.str_))
