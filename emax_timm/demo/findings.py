"""What the page shows of an image, as plain functions: classes, attention, Grad-CAM, group counts.

One image at a time is decoded, run and drawn in a process, whichever thread asks: the settings of
the decoder and of matplotlib belong to the process, and the captured attention to the model.
"""

import io
import textwrap
import threading
import warnings
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import resolve_data_config
from torch import Tensor

from ..attention import EMAX, EMAXMaps
from ..interpret import selection
from ..interpret.figures import figure_bytes, new_figure
from ..interpret.overlays import draw_attention, draw_cam
from ..interpret.selection import one_per_stage, prepare, shown, single
from ..models.capture import Maps, capture_attention
from ..models.gradcam import grad_cam
from ..models.labels import class_namer
from ..training.config import UsageError
from ..training.data.decoding import CorruptImageError, open_image

__all__ = [
    "DemoModel",
    "Findings",
    "UnfitImageError",
    "attention_picture",
    "cam_picture",
    "count_table",
    "examine",
    "group_count",
    "study_model",
]

TOP = 5
MIN_SIDE = 8  # pixels; of less there is nothing to see
# Models resize the shorter side to their size, so a narrow image becomes a huge one.
MAX_ASPECT = 20
_one_at_a_time = threading.RLock()


class UnfitImageError(Exception):
    """An image cannot be examined; the message, in whole sentences, is for whoever gave it."""


@dataclass(frozen=True)
class DemoModel:
    """A classifier, and what is known of it before it sees an image.

    Args:
        name: Its name on the page.
        model: The timm model, in eval mode.
        stages: The stages that can be shown, each with its last layer that has spatial attention,
            or None where there is no such layer.
        methods: The names of the attention layers' classes, such as EMAX; empty without attention.
        cam: Whether Grad-CAM can be drawn, for which the stages must give feature maps.
    """

    name: str
    model: Any
    stages: dict[str, str | None]
    methods: list[str]
    cam: bool


@dataclass
class Findings:
    """This is what a model finds in one image.

    Args:
        picture: The image as the model sees it, [h, w, 3] in 0 to 1.
        image: The same, as the model takes it, [c, h, w].
        classes: The probabilities of the likeliest classes by name, in descending order.
        maps: The attention maps of each layer, without the batch dimension.
        notices: What was changed or left out when the file was read, in whole sentences.
        cams: The Grad-CAM heatmaps [h, w] that have been drawn so far, by stage.
    """

    picture: np.ndarray
    image: Tensor
    classes: dict[str, float]
    maps: dict[str, Maps]
    notices: list[str]
    cams: dict[str, Tensor]


def study_model(name: str, model: Any) -> DemoModel:
    """Find out what can be shown of a classifier, by running it once.

    Args:
        name: The name of the model, for the page and for errors.
        model: A timm model in eval mode.

    Raises:
        UsageError: If it has no classifier, or does not run on images of its input size.
    """
    if not model.num_classes:
        raise UsageError(f"model {name} has no classifier")
    size = resolve_data_config(model=model)["input_size"]
    image = torch.zeros(size)
    try:
        maps = _run(model, image)[1]
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"model {name} does not run on an image of {size}: {reason}") from None
    stages: dict[str, str | None] = {}
    stages |= one_per_stage([name for name in maps if maps[name].spatial is not None])
    if not stages:
        infos = getattr(model, "feature_info", None) or ()
        stages = dict.fromkeys(one_per_stage([*maps]) or [info["module"] for info in infos])
    methods = sorted({type(model.get_submodule(layer)).__name__ for layer in maps})
    return DemoModel(name, model, stages, methods, _has_cam(model, image, [*stages]))


def examine(subject: DemoModel, path: str) -> Findings:
    """Classify an image, and keep what the model attends to in it.

    Args:
        subject: The model.
        path: The image file.

    Raises:
        UnfitImageError: If the file is no image, is corrupt, or has unfit sides.
    """
    with _one_at_a_time:
        try:
            opened = open_image(path, "RGB", exif=True)
        except CorruptImageError as error:
            raise UnfitImageError(f"This file cannot be read as an image: {error}.") from None
        _check_sides(*opened.size)
        image = prepare(subject.model, opened)
        logits, maps = _run(subject.model, image)
        if not logits.isfinite().all():
            raise UnfitImageError("The model's output for this image is not finite.")
        return Findings(
            picture=shown(subject.model, image),
            image=image,
            classes=_likeliest(subject.model, logits),
            maps=maps,
            notices=_notices(path),
            cams={},
        )


def group_count(subject: DemoModel, findings: Findings, stage: str) -> int:
    """Return how many groups a stage formed for the image: with EMAX, as many as it chose."""
    layer = subject.stages.get(stage)
    return 1 if layer is None else selection.group_count(findings.maps[layer])


def attention_picture(
    subject: DemoModel, findings: Findings, stage: str, group: int = 0
) -> Image.Image | None:
    """Draw the spatial attention of a stage over the image; None if the stage has none.

    Args:
        subject: The model.
        findings: What it finds in the image.
        stage: One of the model's stages.
        group: The number of a group, from 1; 0 for the mean of all.
    """
    layer = subject.stages[stage]
    if layer is None:
        return None
    found = findings.maps[layer]
    spatial = cast(Tensor, found.spatial)  # [F, h', w']
    if group > 0:
        size = len(spatial) // selection.group_count(found)
        spatial = spatial[(group - 1) * size : group * size]
    with _one_at_a_time:
        figure, axis = _panel(f"attention of {stage}, {' x '.join(map(str, spatial.shape[1:]))}")
        draw_attention(axis, findings.picture, spatial, figure)
        return Image.open(io.BytesIO(figure_bytes(figure)))


def cam_picture(subject: DemoModel, findings: Findings, stage: str) -> Image.Image | None:
    """Draw Grad-CAM of a stage, for the likeliest class, over the image; None if there is none."""
    if not subject.cam:
        return None
    with _one_at_a_time:
        if stage not in findings.cams:
            findings.cams[stage] = grad_cam(subject.model, findings.image.unsqueeze(0), stage)[0]
        figure, axis = _panel(f"Grad-CAM of {stage}, {next(iter(findings.classes))}")
        draw_cam(axis, findings.picture, findings.cams[stage])
        return Image.open(io.BytesIO(figure_bytes(figure)))


def count_table(subject: DemoModel, findings: Findings) -> list[list[str]]:
    """List the group count that each EMAX layer chose: a header, and a row for each layer."""
    rows = [["layer", "choices", "chosen", "probability"]]
    for name, found in findings.maps.items():
        if isinstance(found, EMAXMaps):
            layer = cast(EMAX, subject.model.get_submodule(name))
            counts, chosen = list(layer.candidates), int(found.group_count)
            probability = float(found.group_probs[counts.index(chosen)])
            rows.append([name, ", ".join(map(str, counts)), str(chosen), f"{probability:.2f}"])
    return rows


@torch.no_grad()
def _run(model: Any, image: Tensor) -> tuple[Tensor, dict[str, Maps]]:
    """Return the logits [classes] of an image [c, h, w], and its attention maps."""
    try:
        with capture_attention(model) as maps:
            logits = model(image.unsqueeze(0))
    except ValueError:  # no layer has attention
        return model(image.unsqueeze(0))[0], {}
    return logits[0], single(maps, 0)


def _has_cam(model: Any, image: Tensor, stages: list[str]) -> bool:
    try:
        grad_cam(model, image.unsqueeze(0), stages[-1])
    except Exception:  # grad-cam may raise anything for what is no feature map
        return False
    return True


def _likeliest(model: Any, logits: Tensor) -> dict[str, float]:
    names, found = class_namer(model), {}
    best = logits.float().softmax(0).topk(min(TOP, len(logits)))
    for index, value in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        name = names(index)
        # ImageNet has two classes of some names, such as crane.
        found[f"{name} ({index})" if name in found else name] = value
    return found


def _check_sides(width: int, height: int) -> None:
    if min(width, height) < MIN_SIDE:
        raise UnfitImageError(
            f"This image has {width} x {height} pixels, in which there is nothing to see. "
            f"Both sides must have at least {MIN_SIDE} pixels."
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnfitImageError(
            f"This image has {width} x {height} pixels, and one side is more than {MAX_ASPECT} "
            "times as long as the other. Crop it to what should be classified."
        )


def _notices(path: str) -> list[str]:
    """Say what `open_image` has changed or left out of an image."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(path) as image:
            found = []
            if image.mode == "CMYK":
                found.append("This image is in CMYK, the colours of print; it was turned into RGB.")
            if image.mode.startswith("I"):
                found.append("The 16-bit values of this image were scaled to 8 bits.")
            if image.has_transparency_data:
                found.append("The transparency of this image was left out.")
            if getattr(image, "is_animated", False):
                found.append("This file has several frames; only the first was looked at.")
            return found


def _panel(title: str) -> tuple[Any, Any]:
    """Return a new figure of one panel, and its axes."""
    figure = new_figure(3.4, 3.8)
    axis = figure.subplots()
    axis.set_axis_off()
    axis.set_title(textwrap.shorten(title, 40, placeholder=" …"), fontsize="medium")
    return figure, axis
