"""The page, in Gradio. It lays out what `findings.py` finds, and keeps a session's last image."""

import html
import importlib
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data import resolve_data_config

from ..models.labels import class_namer
from ..training.data import SAMPLES
from .findings import (
    DemoModel,
    Findings,
    UnfitImageError,
    attention_picture,
    cam_picture,
    count_table,
    examine,
    group_names,
)

__all__ = ["MAX_FILE", "make_page", "write_examples"]

MAX_FILE = "20mb"
HOUR = 3600  # seconds after which an image and what was found in it are deleted
MAX_NAMED = 20  # classes that are named on the page
ABOUT_MAPS = (
    "Attention is the weight that a place is multiplied with; its colours span the range below the "
    "map. It shows what a layer does with its features. Which pixels speak for the class is what "
    "Grad-CAM shows, in colours from 0 to 1."
)
CSS = ".gradio-container .message p {margin: 0.25rem 0} .gradio-container td {overflow-wrap: anywhere}"


def make_page(subject: DemoModel, examples: Sequence[Path]) -> Any:
    """Make the page of a model, a `gradio.Blocks`.

    Args:
        subject: The model.
        examples: Image files to choose from.
    """
    # Not an import statement, because types are checked where the extra is not installed.
    gr: Any = importlib.import_module("gradio")
    first = next(iter(subject.stages), None)
    # One event at a time, so that nobody waits in a thread for the model.
    options = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}

    with gr.Blocks(
        title=f"{subject.name}: demo", analytics_enabled=False, delete_cache=(600, HOUR)
    ) as page:
        state = gr.State(time_to_live=HOUR)
        gr.Markdown(_introduction(subject))
        with gr.Row():
            with gr.Column(min_width=320):
                image = gr.Image(label="Image", sources=["upload", "clipboard"], height=280)
                message = gr.HTML(_message("No image yet."), elem_classes="message")
                gr.Examples([[str(path)] for path in examples], image, label="Examples")
                classes = gr.Label(label="Likeliest classes", num_top_classes=5)
            with gr.Column(min_width=320):
                stage = gr.Radio(list(subject.stages), value=first, label="Stage")
                group = gr.Dropdown([], label="Groups", interactive=True)
                with gr.Row():
                    attention = _output_image(gr, "Attention")
                    cam = _output_image(gr, "Grad-CAM")
                gr.Markdown(_about(subject))
                counts = gr.Markdown()

        def pictures(found: Findings | None, stage: str, group: int) -> list[Any]:
            if found is None or not subject.stages:
                return [gr.Image(None), gr.Image(None)]
            name = next(iter(found.classes))
            return [
                gr.Image(
                    attention_picture(subject, found, stage, group),
                    alt_text=f"Attention of {stage} over the image",
                ),
                gr.Image(
                    cam_picture(subject, found, stage),
                    label=f"Grad-CAM for {name}",
                    alt_text=f"Grad-CAM of {stage} for {name} over the image",
                ),
            ]

        def groups(found: Findings | None, stage: str) -> Any:
            if found is None or not subject.stages:
                return gr.Dropdown([], value=None)
            names = group_names(subject, found, stage)
            return gr.Dropdown([(name, place) for place, name in enumerate(names)], value=0)

        def show(file: dict[str, Any] | None, stage: str) -> list[Any]:
            found, text = None, "No image yet."
            if file is not None:
                try:
                    found = examine(subject, file["path"])
                    text = " ".join(found.notices)
                except UnfitImageError as error:
                    text = str(error)
            return [
                found,
                _message(text),
                found and found.classes,
                groups(found, stage),
                *pictures(found, stage, 0),
                _table(count_table(subject, found)) if found else "",
            ]

        def choose_stage(found: Findings | None, stage: str) -> list[Any]:
            return [groups(found, stage), *pictures(found, stage, 0)]

        outputs = [state, message, classes, group, attention, cam, counts]
        # Gradio would decode the image itself, with another message for what it cannot read.
        image.change(show, [image, stage], outputs, preprocess=False, **options)
        stage.input(choose_stage, [state, stage], [group, attention, cam], **options)
        group.input(pictures, [state, stage, group], [attention, cam], **options)
    return page


def write_examples(folder: Path) -> list[Path]:
    """Write an image of each class of the packaged sample's test split into a folder."""
    found: dict[str, Path] = {}
    with tarfile.open(SAMPLES / "fashion_mnist" / "test.tar") as archive:
        for member in archive:
            label = Path(member.name).parent.name.partition("_")[2]
            source = archive.extractfile(member) if member.isfile() else None
            if source is not None and label not in found:
                found[label] = folder / f"{label}.png"
                found[label].write_bytes(source.read())
    return list(found.values())


def _introduction(subject: DemoModel) -> str:
    height, width = resolve_data_config(model=subject.model)["input_size"][1:]
    name, count = class_namer(subject.model), subject.model.num_classes
    text = f"{count:,} classes"
    if count <= MAX_NAMED:
        text += ": " + ", ".join(html.escape(name(index)) for index in range(count))
    return (
        f"# {html.escape(subject.name)}\n\nGive an image, to see its class and what the model "
        f"attends to. The model sees {height} x {width} pixels of it, and knows {text}. Files may "
        f"have up to {MAX_FILE[:-2]} MB."
    )


def _about(subject: DemoModel) -> str:
    if any(subject.stages.values()):
        return ABOUT_MAPS
    has = f"has {' and '.join(subject.methods)}, which attends to channels and not to places"
    if not subject.methods:
        has = "has no EMAX, EMA, CBAM, SE or ECA layer"
    rest = "Grad-CAM shows which pixels speak for the class, in colours from 0 to 1."
    if not subject.cam:
        rest = "Nor are there feature maps, which Grad-CAM needs."
    return f"This model {has}, so there is no map of its attention. {rest}"


def _message(text: str) -> str:
    """Return what is said of an image; screen readers say it when it changes."""
    return f'<p role="status">{html.escape(text)}</p>'


def _table(rows: list[list[str]]) -> str:
    """Return rows, of which the first is the header, in Markdown; nothing without other rows."""
    if len(rows) < 2:
        return ""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    return "\n".join(["The groups that each EMAX layer chose for this image:", "", *lines])


def _output_image(gr: Any, label: str) -> Any:
    return gr.Image(
        label=label, interactive=False, format="png", buttons=["fullscreen"], min_width=150
    )
