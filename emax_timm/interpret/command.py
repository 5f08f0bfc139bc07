"""The `emax visualize` command."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data import resolve_data_config

from ..files import check_target, remove, write_folder, writing_to
from ..models.capture import capture_attention
from ..models.gradcam import GRAD_CAM_NEEDED
from ..models.labels import class_namer
from ..runner import command
from ..training.config import AT_LEAST_1, UsageError, from_mapping, option, parse_settings
from ..training.data.decoding import CorruptImageError, open_image
from ..training.journal import LAYERS, read_rows
from ..training.loading import DEFAULT_MODEL, load_model
from ..training.progress import working
from ..training.sources import find_source, run_folder
from .contents import image_section, look, model_sections
from .figures import NEEDED
from .images import Source, find_images, spread
from .report import MEDIA_TYPES, Section, page

__all__ = ["VisualizeConfig", "visualize"]

REPORT = "report.html"


@dataclass
class VisualizeConfig:
    """Draw what a model attends to in images: figures, and a report to open in a browser."""

    model: str | None = option(
        None,
        "name of a timm model, run directory or checkpoint in one, or hf-hub:ORG/NAME (default: "
        f"with --checkpoint that of its run, else {DEFAULT_MODEL})",
        "-m",
    )
    images: list[str] = option(
        [], "image files, and folders of them; folders in a folder are classes", metavar="PATH"
    )
    output: str | None = option(None, "folder to make", metavar="DIR")
    checkpoint: str | None = option(
        None, "weights: a .safetensors file, or a run directory", metavar="FILE"
    )
    pretrained: bool = option(True, "published weights, without --checkpoint")
    num_classes: int | None = option(
        None, "number of classes (default: the model's)", bounds=AT_LEAST_1
    )
    model_kwargs: dict[str, Any] = option({}, "keyword arguments of the model")
    compare: list[str] = option(
        [], "models, with their weights, to show beside it", metavar="MODEL"
    )
    grad_cam: bool = option(True, "draw Grad-CAM beside the attention")
    max_images: int = option(
        12, "images to draw, as many of each class; all are counted", bounds=AT_LEAST_1
    )
    top: int = option(3, "classes to name for each image", bounds=AT_LEAST_1)
    batch_size: int = option(32, "images to run at a time", "-b", bounds=AT_LEAST_1)
    format: str = option("png", "format of the figures", choices=tuple(MEDIA_TYPES))
    exif_orientation: bool = option(True, "turn images upright as their EXIF data say")
    overwrite: bool = option(False, "replace an earlier report")


@command("emax visualize")
def visualize(argv: Sequence[str], prog: str) -> int:
    """Write the report that the command line asks for, and return the exit status."""
    settings = parse_settings(VisualizeConfig, argv, prog)
    config = from_mapping(VisualizeConfig, settings, "the command line")
    sources = find_images(config.images)
    output = _check_output(config)
    _check_packages(config)
    name = find_source(config.model or config.checkpoint or DEFAULT_MODEL).model
    with working(f"loading {name}") as progress:
        model = _load(config, name)
        compared = {other: _load_compared(other) for other in config.compare}
        files = make_report(config, name, model, compared, sources, progress.stage)
    with writing_to(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        _put(output, files)
    print(output / REPORT)
    return 0


def make_report(
    config: VisualizeConfig,
    name: str,
    model: Any,
    compared: dict[str, Any],
    sources: Sequence[Source],
    stage: Callable[[str], object] = lambda _: None,
) -> dict[str, bytes]:
    """Return the files of the report by name.

    Args:
        config: The options.
        name: The name of the model.
        model: The model, in eval mode.
        compared: Other models by name, in eval mode.
        sources: The images.
        stage: Called with what is being done, at the beginning of each stage.

    Raises:
        UsageError: If an image is corrupt or a model does not take it, or for attention that is not
            finite.
    """
    try:
        sections, drawn = _sections(config, name, model, compared, sources, stage)
    except RuntimeError as error:  # from a model that does not take an image, or from `look`
        raise UsageError(f"model {name}: {str(error).strip().splitlines()[0]}") from None
    files = {
        f"{drawing.name}.{config.format}": drawing.content
        for section in sections
        for drawing in section.drawings
    }
    text = _summary(config, name, model, len(sources), drawn)
    html = page(f"What {name} attends to", text, sections, config.format)
    return {REPORT: html.encode(), **files}


def _sections(
    config: VisualizeConfig,
    name: str,
    model: Any,
    compared: dict[str, Any],
    sources: Sequence[Source],
    stage: Callable[[str], object],
) -> tuple[list[Section], int]:
    """Return the sections of the report, and the number of images that are drawn."""
    opened = 0

    def open_source(source: Source) -> Image.Image:
        nonlocal opened
        opened += 1
        if opened <= len(sources):
            stage(f"looking at image {opened} of {len(sources)}")
        try:
            return open_image(source.path, "RGB", config.exif_orientation)
        except CorruptImageError as error:
            raise UsageError(f"corrupt image {source.path}: {error}") from None

    chosen = spread(sources, config.max_images)
    found = look(model, sources, chosen, open_source, config.batch_size)
    stage("drawing the layers")
    sections = model_sections(model, found, _statistics_of_layers(config, name), config.format)
    namer = class_namer(model) if model.num_classes else None
    for number, seen in enumerate(found.seen, start=1):
        stage(f"drawing image {number} of {len(found.seen)}")
        sections.append(
            image_section(
                number,
                model,
                seen,
                open_source,
                compared,
                namer,
                config.top,
                config.grad_cam,
                config.format,
            )
        )
    return sections, len(found.seen)


def _summary(config: VisualizeConfig, name: str, model: Any, images: int, drawn: int) -> str:
    parameters = sum(parameter.numel() for parameter in model.parameters())
    size = " x ".join(map(str, resolve_data_config(model=model)["input_size"]))
    weights = f"from {config.checkpoint}" if config.checkpoint else "initial ones"
    if config.pretrained and not config.checkpoint:
        weights = "published ones" if not name.startswith("local-dir:") else "those of the run"
    drawing = "all of them drawn" if drawn == images else f"{drawn} of them drawn"
    return (
        f"{type(model).__name__} of {parameters / 1e6:.2f} million parameters on images of {size}; "
        f"weights: {weights}. {images} image{'s' * (images > 1)}, {drawing}. Attention is the "
        "weight, between 0 and 1, that a place or a channel is multiplied with; the bar below a "
        "heatmap tells its range."
    )


def _check_output(config: VisualizeConfig) -> Path:
    if config.output is None:
        raise UsageError("nowhere to write to: give --output DIR")
    output = Path(config.output)
    if output.exists():
        if not output.is_dir():
            raise UsageError(f"{output} is not a folder")
        if any(output.iterdir()) and not (config.overwrite and (output / REPORT).is_file()):
            hint = "--overwrite replaces it" if (output / REPORT).is_file() else "give another one"
            raise UsageError(f"{output} is not empty; {hint}")
    check_target(output, folder=True)
    return output


def _put(output: Path, files: dict[str, bytes]) -> None:
    """Write the folder; an earlier report is removed once the new one is complete on disk."""
    if not (output / REPORT).exists():
        return write_folder(output, files)
    fresh = output.with_name(f"{output.name}.new")
    write_folder(fresh, files)
    remove(output)
    fresh.rename(output)


def _check_packages(config: VisualizeConfig) -> None:
    needed = {"matplotlib": NEEDED}
    if config.grad_cam:
        needed["pytorch_grad_cam"] = f"{GRAD_CAM_NEEDED}, or --no-grad-cam"
    for package, message in needed.items():
        try:
            importlib.import_module(package)
        except ImportError:
            raise UsageError(message) from None


def _load(config: VisualizeConfig, name: str) -> Any:
    model = load_model(
        name, config.pretrained, config.checkpoint, config.num_classes, config.model_kwargs
    ).eval()
    _check_attention(name, model)
    return model


def _load_compared(name: str) -> Any:
    model = load_model(name, pretrained=True).eval()
    _check_attention(name, model)
    return model


def _check_attention(name: str, model: Any) -> None:
    try:
        with capture_attention(model):
            pass
    except ValueError:
        raise UsageError(f"model {name} has no EMAX, EMA, CBAM, SE or ECA layer") from None


def _statistics_of_layers(config: VisualizeConfig, name: str) -> list[dict[str, Any]]:
    """Read the layers' statistics of the run that the weights are from: a row for each epoch.

    The list is empty if the weights are not from a run directory or it has no such file.
    """
    named = config.checkpoint or name
    folder = run_folder(named) if config.checkpoint else find_source(named).folder
    if folder is None:
        return []
    try:
        return read_rows(folder / LAYERS)
    except (OSError, ValueError):
        return []
