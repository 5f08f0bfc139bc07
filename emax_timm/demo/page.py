"""The page, in Gradio. It lays out what `findings.py` finds, and keeps a session's last image."""

import html
import importlib
import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
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
    group_count,
)

# Not an import statement, because types are checked where the extra is not installed.
gr: Any = importlib.import_module("gradio")

__all__ = ["LAUNCH", "make_page", "write_examples"]

MAX_MEGABYTES = 20  # of a file
HOUR = 3600  # seconds after which an image and what was found in it are deleted
NO_IMAGE = "No image yet."
MAX_NAMED = 20  # classes that are named on the page
ABOUT_MAPS = (
    "Attention is the weight that a place is multiplied with; its colours span the range below the "
    "map. It shows what a layer does with its features. Which pixels speak for the class is what "
    "Grad-CAM shows, in colours from 0 to 1."
)
SCRIPT, STYLE = (Path(__file__).with_name(f"page.{kind}") for kind in ("js", "css"))
# What browsers can show of what Pillow can read.
SHOWN = (".png", ".jpg", ".jpeg", ".jfif", ".gif", ".webp", ".bmp", ".avif")


# Events wait for each other, not in threads for the model; of several of one kind the last counts.
PRIVATE = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
LAST = {"trigger_mode": "always_last"}
# How the page is served, whatever its address: nothing is sent to anybody else, or shown of others.
LAUNCH = {
    "share": False,
    "max_file_size": f"{MAX_MEGABYTES}mb",
    "state_session_capacity": 100,
    "footer_links": [],
    "run_history": False,
    "enable_monitoring": False,
    "mcp_server": False,
    "ssr_mode": False,
    "pwa": False,
    "css_paths": STYLE,
    "js": SCRIPT.read_text(encoding="utf-8").replace("MAX_MEGABYTES", str(MAX_MEGABYTES)),
}


def make_page(subject: DemoModel, examples: Sequence[Path]) -> Any:
    """Make the page of a model, a `gradio.Blocks`.

    Args:
        subject: The model.
        examples: Image files to choose from; their names are shown.
    """
    title = f"{subject.name}: demo"
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(600, HOUR)) as page:
        state = gr.State(time_to_live=HOUR)
        gr.Markdown(_introduction(subject))
        with gr.Row():
            with gr.Column(min_width=320):
                image = gr.Image(label="Image", sources=["upload", "clipboard"], height=280)
                gr.HTML('<p id="refused" role="alert"></p>', padding=False)
                message = gr.HTML(_message(NO_IMAGE), padding=False)
                classes = gr.Label(label="Likeliest classes")
                names = [path.stem for path in examples]
                files = [[str(path)] for path in examples]
                chosen = gr.Examples(files, image, label="Examples", example_labels=names)
            with gr.Column(min_width=320):
                first = next(iter(subject.stages), None)
                stage = gr.Radio(list(subject.stages), value=first, label="Stage")
                group = gr.Slider(0, 1, 0, step=1, label="Group", interactive=False, buttons=[])
                with gr.Row():
                    attention, cam = map(_output_image, ("Attention", "Grad-CAM"))
                gr.Markdown(_about(subject))
                counts = gr.Markdown(elem_classes="counts")

        pictures = [attention, cam]
        whole = {
            "inputs": [image, stage],
            "outputs": [state, image, message, classes, counts, group, *pictures],
            # Gradio would decode the image itself, with another message for what it cannot read.
            "preprocess": False,
            **PRIVATE,
        }
        show = partial(_show, subject)
        image.input(show, **whole, **LAST)
        chosen.load_input_event.then(show, **whole)
        stage.input(
            partial(_show_stage, subject), [state, stage], [group, *pictures], **PRIVATE, **LAST
        )
        group.input(partial(_pictures, subject), [state, stage, group], pictures, **PRIVATE, **LAST)
    return page


def _show(subject: DemoModel, file: dict[str, Any] | None, stage: str | None) -> list[Any]:
    """Answer an image, or that there is none any more, with what `make_page` calls `whole`."""
    found, text, preview, classes, counts = None, NO_IMAGE, gr.skip(), None, ""
    try:
        if file is not None:
            found = examine(subject, file["path"])
            name, probability = next(iter(found.classes.items()))
            text = " ".join([f"Most likely: {name} ({probability:.0%}).", *found.notices])
            classes, counts = found.classes, _table(count_table(subject, found))
            if not file["path"].lower().endswith(SHOWN):
                preview = Image.fromarray((found.picture * 255).astype(np.uint8))
    except UnfitImageError as error:
        text, preview = str(error), None
    shown = _show_stage(subject, found, stage)
    return [found, preview, _message(text), classes, counts, *shown]


def _show_stage(subject: DemoModel, found: Findings | None, stage: str | None) -> list[Any]:
    """Answer the choice of a stage with its groups, and the pictures of their mean."""
    count = group_count(subject, found, stage) if found and stage else 1
    label = f"Group of {count}; 0 is their mean" if count > 1 else "Group"
    groups = gr.Slider(0, count, 0, label=label, interactive=count > 1)
    return [groups, *_pictures(subject, found, stage, 0)]


def _pictures(
    subject: DemoModel, found: Findings | None, stage: str | None, group: int
) -> list[Any]:
    """Answer the choice of a group with its attention, and Grad-CAM of the stage."""
    if found is None or stage is None:
        return [gr.Image(None), gr.Image(None)]
    attention = attention_picture(subject, found, stage, group)
    text = f"Attention of {stage} over the image"
    cam = cam_picture(subject, found, stage)
    cam_text = f"Grad-CAM of {stage} for {next(iter(found.classes))} over the image"
    return [gr.Image(attention, alt_text=text), gr.Image(cam, alt_text=cam_text)]


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
    title = html.escape(subject.name).replace(".", ".<wbr>")
    return (
        f"# {title}\n\nGive an image, to see its class and what the model attends to. The model "
        f"sees {height} x {width} pixels of it, and knows {text}. Files may have up to "
        f"{MAX_MEGABYTES} MB."
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


def _output_image(label: str) -> Any:
    # The label would cover a corner of the picture, which has a title of its own.
    options: dict[str, Any] = {"show_label": False, "buttons": [], "format": "png"}
    options |= {"min_width": 240, "elem_classes": "demo-picture"}
    return gr.Image(label=label, interactive=False, **options)
