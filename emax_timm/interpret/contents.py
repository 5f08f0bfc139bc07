"""The sections of a report: on the model, on a set of images, and on single images."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..attention import EMAX, EMAXMaps
from ..models.capture import Maps, attention_of, capture_attention
from ..models.gradcam import grad_cam
from .figures import (
    comparison_figure,
    figure_bytes,
    groups_figure,
    spatial_figure,
    weights_figure,
)
from .images import Source
from .report import Drawing, Section
from .selection import one_per_stage, prepare, shown, single
from .set_figures import choices_figure, gates_figure, training_figure

__all__ = ["Findings", "Seen", "image_section", "look", "model_sections"]


ALL = "all images"
MAX_BARS = 400  # in the figure of the group counts; with more, it does not show the classes


class Seen(NamedTuple):
    """An image as the model takes it, [c, h, w], with its attention maps and logits."""

    source: Source
    image: Tensor
    maps: dict[str, Maps]
    logits: Tensor


@dataclass
class Findings:
    """The results of a model on a set of images.

    Args:
        choices: The number of images that chose a group count, by EMAX layer, class and count.
        images: The number of images by class.
        seen: The images that get a section of their own.
    """

    choices: dict[str, dict[str, Counter[int]]] = field(default_factory=dict)
    images: Counter[str] = field(default_factory=Counter)
    seen: list[Seen] = field(default_factory=list)


@torch.no_grad()
def look(
    model: nn.Module,
    sources: Sequence[Source],
    chosen: Sequence[Source],
    open_source: Callable[[Source], Image.Image],
    batch_size: int,
) -> Findings:
    """Run the model, which is in eval mode, on all images, and keep the results of some.

    Args:
        model: A model with attention layers, in eval mode.
        sources: All images; the group counts that EMAX layers choose for them are counted.
        chosen: The images whose maps and logits are kept.
        open_source: Reads the file of an image.
        batch_size: Images per forward pass.

    Raises:
        RuntimeError: If an attention map is not finite.
    """
    found = Findings()
    for start in range(0, len(sources), batch_size):
        part = sources[start : start + batch_size]
        images = torch.stack([prepare(model, open_source(source)) for source in part])
        with capture_attention(model) as maps:
            logits = model(images)
        for index, source in enumerate(part):
            label = source.label or ALL
            found.images[label] += 1
            own = single(maps, index)
            if not all(map(_is_finite, own.values())):
                raise RuntimeError(f"its attention to {source.path} is not finite")
            for name, layer in own.items():
                if isinstance(layer, EMAXMaps):
                    classes = found.choices.setdefault(name, {})
                    classes.setdefault(label, Counter())[int(layer.group_count)] += 1
            if source in chosen:
                found.seen.append(Seen(source, images[index], own, logits[index]))
    return found


def _is_finite(maps: Maps) -> bool:
    return all(bool(value.isfinite().all()) for value in maps if value is not None)


def model_sections(
    model: nn.Module,
    found: Findings,
    statistics: Sequence[Mapping[str, Any]],
    file_format: str,
) -> list[Section]:
    """Make the sections on the model's layers, on their training, and on the set of images.

    Args:
        model: The model.
        found: Its results on the images.
        statistics: The layers' statistics of each epoch; if it is empty, there is no section on
            training.
        file_format: The format of the figures.
    """
    names = list(found.seen[0].maps)
    drawings = []
    if found.choices:
        text = "gamma, and the mean and the range of the residual gate, of each EMAX layer"
        drawings.append(Drawing("gates", text, figure_bytes(gates_figure(model), file_format)))
    sections = [Section("Attention layers", "", _layer_table(model, names), drawings)]
    if statistics:
        text = "the gates and the mean chosen group count of each EMAX layer over the training"
        figure = figure_bytes(training_figure(statistics), file_format)
        sections.append(Section("Training", "", (), [Drawing("training", text, figure)]))
    if found.choices:
        choices = {layer: dict(sorted(by.items())) for layer, by in found.choices.items()}
        text = "how often each group count is chosen, by layer and class"
        if len(choices) * len(found.images) > MAX_BARS:
            text = "how often each group count is chosen, by layer; the classes are in the table"
            choices = {layer: {ALL: sum(by.values(), Counter())} for layer, by in choices.items()}
        figure = figure_bytes(choices_figure(choices), file_format)
        about = "The number of images, and the group count that most of them choose in each layer."
        table = _choice_table(found)
        sections.append(
            Section("Group counts", about, table, [Drawing("group-counts", text, figure)])
        )
    return sections


def _layer_table(model: nn.Module, names: Sequence[str]) -> list[list[str]]:
    rows = [["layer", "attention", "group counts", "gamma", "mean |residual gate|"]]
    for name in names:
        layer = model.get_submodule(name)
        if isinstance(layer, EMAX):
            gamma = "-" if layer.gamma is None else f"{layer.gamma.item():.3f}"
            gate = f"{layer.residual_gate.abs().mean().item():.3f}"
            rows.append([name, "EMAX", ", ".join(map(str, layer.candidates)), gamma, gate])
        else:
            rows.append([name, type(layer).__name__, "-", "-", "-"])
    return rows


def _choice_table(found: Findings) -> list[list[str]]:
    rows = [["class", "images", *found.choices]]
    for label, images in sorted(found.images.items()):
        cells = []
        for classes in found.choices.values():
            ((count, chosen),) = classes[label].most_common(1)
            cells.append(f"{count} ({chosen / images:.0%})")
        rows.append([label, str(images), *cells])
    return rows


def image_section(
    number: int,
    model: nn.Module,
    seen: Seen,
    open_source: Callable[[Source], Image.Image],
    compared: Mapping[str, nn.Module],
    class_name: Callable[[int], str] | None,
    top: int,
    cams: bool,
    file_format: str,
) -> Section:
    """Make the section on one image.

    Args:
        number: The number of the image, from 1; the names of its files begin with it.
        model: The model, in eval mode.
        seen: The model's results on the image.
        open_source: Reads the file of an image.
        compared: Other models by name, shown beside this one.
        class_name: Maps the index of a class to its name; None for a model without a classifier.
        top: The number of predicted classes to list.
        cams: Whether to draw Grad-CAM too.
        file_format: The format of the figures.
    """
    source, maps = seen.source, seen.maps
    table: list[list[str]] = []
    heat = None
    if class_name is not None:
        table = _predictions(seen.logits, class_name, top)
        if cams:
            batch = seen.image.unsqueeze(0)
            heat = {stage: grad_cam(model, batch, stage)[0] for stage in one_per_stage([*maps])}
    figures = _figures(model, seen, heat)
    if compared:
        text = "the attention of several models in this image, a row for each"
        picture = shown(model, seen.image)
        figures["comparison"] = text, _comparison(picture, maps, source, open_source, compared)
    stem = f"{number:03d}-{re.sub(r'[^A-Za-z0-9_-]+', '_', source.path.stem)[:60]}"
    drawings = [
        Drawing(f"{stem}-{kind}", f"{source.name}: {text}", figure_bytes(figure, file_format))
        for kind, (text, figure) in figures.items()
    ]
    text = f"Of the class {source.label}." if source.label else ""
    return Section(source.name, text, table, drawings)


def _predictions(logits: Tensor, class_name: Callable[[int], str], top: int) -> list[list[str]]:
    best = logits.softmax(0).topk(min(top, len(logits)))
    table = [["prediction", "probability"]]
    for value, index in zip(*(part.tolist() for part in best), strict=True):
        table.append([class_name(index), f"{value:.3f}"])
    return table


def _figures(
    model: nn.Module, seen: Seen, heat: Mapping[str, Tensor] | None
) -> dict[str, tuple[str, Any]]:
    """Draw the figures of one model in one image: their titles and figures, by the kind of map.

    Args:
        model: The model.
        seen: Its results on the image.
        heat: Grad-CAM heatmaps [h, w] by the name of the stage.
    """
    maps, picture = seen.maps, shown(model, seen.image)
    figures = {}
    if any(found.spatial is not None for found in maps.values()):
        and_cam = "; below, Grad-CAM for the first prediction" if heat else ""
        text = f"spatial attention by stage: the mean, and the groups of most contrast{and_cam}"
        figures["spatial"] = text, spatial_figure(picture, maps, heat)
    if any(found.channel is not None for found in maps.values()):
        text = "channel and global weights by stage, in descending order"
        figures["weights"] = text, weights_figure(maps)
    counts = {
        name: layer.candidates for name, layer in model.named_modules() if isinstance(layer, EMAX)
    }
    if counts:
        figures["groups"] = "probability of each group count, by layer", groups_figure(maps, counts)
    return figures


def _comparison(
    picture: np.ndarray,
    maps: dict[str, Maps],
    source: Source,
    open_source: Callable[[Source], Image.Image],
    compared: Mapping[str, nn.Module],
) -> Any:
    pictures, rows = [picture], {"this model": maps}
    for name, model in compared.items():
        image = prepare(model, open_source(source))
        pictures.append(shown(model, image))
        rows[name] = single(attention_of(model, image.unsqueeze(0)), 0)
    return comparison_figure(pictures, rows)
