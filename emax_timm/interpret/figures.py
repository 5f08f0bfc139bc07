"""Figures of what a model attends to in an image.

The functions that draw one return a `matplotlib.figure.Figure`, which `figure_bytes` turns into a
PNG or SVG file; matplotlib is imported only then.
Dimension letters: c channels, h w height and width, F finest group count, K candidate counts.
"""

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from PIL import Image
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..attention import EMAXMaps
from ..models.capture import Maps, attention_of
from .overlays import draw_attention, draw_cam
from .selection import (
    contrasting_groups,
    group_count,
    last_with_places,
    one_per_stage,
    prepare,
    shown,
    single,
)

__all__ = [
    "NEEDED",
    "comparison_figure",
    "figure_bytes",
    "groups_figure",
    "new_figure",
    "spatial_figure",
    "visualize_attention",
    "weights_figure",
]

NEEDED = "figures need the package matplotlib: pip install 'emax-timm[viz]'"


def new_figure(width: float, height: float) -> Any:
    """Create an empty figure; `width` and `height` are in inches.

    Raises:
        ImportError: If matplotlib is missing.
    """
    try:
        # pyplot is avoided, because it keeps global state and may look for a display.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(NEEDED) from error
    return Figure(figsize=(width, height), layout="constrained")


def figure_bytes(figure: Any, file_format: str = "png") -> bytes:
    """Return a figure as a file, "png" or "svg"; the same figure gives the same bytes."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "emax_timm"}):
        metadata = {"Date": None} if file_format == "svg" else None
        figure.savefig(buffer, format=file_format, dpi=110, metadata=metadata)
    return buffer.getvalue()


def visualize_attention(
    model: nn.Module, image: Image.Image | Tensor, layer: str | None = None
) -> Any:
    """Draw the spatial, channel and global attention of a layer in an image.

    The three panels are those of EMAX's source: the spatial attention (the mean over the groups) as
    a heatmap over the image, and the channel and the global attention weights as bars. A panel says
    so if the layer lacks that part. The model runs in eval mode, and is left as it was.

    Args:
        model: A model with EMAX, EMA, CBAM, SE or ECA layers; see `capture_attention`.
        image: A PIL image, which is preprocessed as the config of a timm model says, or a tensor
            [c, h, w] or [1, c, h, w] that the model takes.
        layer: The name of a layer, as in `capture_attention`; None for the last one with a spatial
            map of at least 4 x 4.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If the model has no such layer or no attention layer, or for several images.
    """
    figure = new_figure(11, 3.6)
    x = prepare(model, image) if isinstance(image, Image.Image) else image
    x = x.unsqueeze(0) if x.dim() == 3 else x
    if len(x) != 1:
        raise ValueError(f"visualize_attention draws one image, not {len(x)}")
    maps = single(attention_of(model, x), 0)
    if layer is None:
        layer = last_with_places(maps)
    if layer not in maps:
        raise ValueError(f"there is no attention layer {layer!r}; there are {', '.join(maps)}")
    _draw_parts(figure, shown(model, x[0]), maps[layer])
    figure.suptitle(layer or type(unwrap_model(model)).__name__)
    return figure


def _draw_parts(figure: Any, picture: np.ndarray, found: Maps) -> None:
    """Draw the spatial, channel and global attention of one layer, a panel for each."""
    panels = figure.subplots(1, 3)
    if found.spatial is None:
        panels[0].imshow(picture)
        panels[0].set_title("no spatial attention")
    else:
        draw_attention(panels[0], picture, found.spatial, figure)
        panels[0].set_title("spatial attention, mean of the groups")
    panels[0].set_axis_off()
    global_ = found.global_ if isinstance(found, EMAXMaps) else None
    for axis, title, values in (
        (panels[1], "channel attention", found.channel),
        (panels[2], "global attention", global_),
    ):
        if values is None:
            axis.set_axis_off()
            axis.set_title(f"no {title}")
            continue
        axis.bar(range(len(values)), values.numpy(), width=1)
        axis.set(title=title, xlabel="channel", ylabel="weight", ylim=(0, 1))


def spatial_figure(
    picture: np.ndarray,
    maps: Mapping[str, Maps],
    cams: Mapping[str, Tensor] | None = None,
    groups: int = 2,
) -> Any:
    """Draw the spatial attention of the last layer of each stage over the image.

    The first row shows the mean over the groups. The next rows show single groups: of the groups
    that the layer chose to form, those with the greatest contrast. Grad-CAM is the last row.

    Args:
        picture: The image, [h, w, 3] in 0 to 1.
        maps: The maps of one image, from `single`.
        cams: Grad-CAM heatmaps [h, w] by the name of the stage.
        groups: The largest number of single groups to draw.
    """
    stages = {
        stage: cast(Tensor, maps[name].spatial)
        for stage, name in one_per_stage([*maps]).items()
        if maps[name].spatial is not None
    }
    chosen = {
        stage: contrasting_groups(spatial, group_count(maps[one_per_stage([*maps])[stage]]), groups)
        for stage, spatial in stages.items()
    }
    rows = 1 + max((len(found) for found in chosen.values() if len(found) > 1), default=0)
    height = rows + bool(cams)
    figure = new_figure(2.0 * (1 + len(stages)), 2.05 * height + 0.3)
    grid = figure.subplots(height, 1 + len(stages), squeeze=False)
    for axis in grid.flat:
        axis.set_axis_off()
    grid[0, 0].imshow(picture)
    grid[0, 0].set_title("input", fontsize="medium")
    for column, (stage, spatial) in enumerate(stages.items(), start=1):
        draw_attention(grid[0, column], picture, spatial, figure)
        side = "x".join(map(str, spatial.shape[1:]))
        grid[0, column].set_title(f"{stage} ({side})\nmean", fontsize="medium")
        for row, group in enumerate(chosen[stage][: rows - 1], start=1):
            draw_attention(grid[row, column], picture, spatial[group : group + 1], figure)
            grid[row, column].set_title(f"group {group + 1}", fontsize="medium")
        if cams and stage in cams:
            draw_cam(grid[-1, column], picture, cams[stage])
            grid[-1, column].set_title("Grad-CAM", fontsize="medium")
    return figure


def weights_figure(maps: Mapping[str, Maps]) -> Any:
    """Draw the channel and global weights of each stage's last layer, in descending order."""
    layers = one_per_stage([*maps])
    parts: dict[str, Callable[[Maps], Tensor | None]] = {"channel": lambda found: found.channel}
    if any(isinstance(maps[name], EMAXMaps) for name in layers.values()):
        parts["global"] = lambda found: found.global_ if isinstance(found, EMAXMaps) else None
    figure = new_figure(2.5 * len(layers), 2.2 * len(parts))
    grid = figure.subplots(len(parts), len(layers), squeeze=False, sharey=True)
    for row, (title, part) in zip(grid, parts.items(), strict=True):
        for axis, (stage, name) in zip(row, layers.items(), strict=True):
            values = part(maps[name])
            if values is not None:
                sorted_bars(axis, values)
            axis.set(title=f"{stage}: {title}", ylim=(0, 1))
        row[0].set_ylabel("weight")
    for axis in grid[-1]:
        axis.set_xlabel("channels, sorted")
    return figure


def sorted_bars(axis: Any, values: Tensor) -> None:
    """Draw weights [c] as bars in descending order."""
    axis.bar(range(len(values)), values.sort(descending=True).values.numpy(), width=1)


def groups_figure(maps: Mapping[str, Maps], counts: Mapping[str, Sequence[int]]) -> Any:
    """Draw the probabilities of the group counts, a row for each EMAX layer.

    Args:
        maps: The maps of one image, from `single`.
        counts: The candidate group counts of each EMAX layer, ascending.
    """
    every = sorted({count for layer in counts.values() for count in layer})
    table = np.full((len(counts), len(every)), np.nan)
    for row, (name, candidates) in enumerate(counts.items()):
        found = maps[name]
        assert isinstance(found, EMAXMaps)
        for count, probability in zip(candidates, found.group_probs.tolist(), strict=True):
            table[row, every.index(count)] = probability
    figure = new_figure(1.8 + 0.75 * max(4, len(every)), 0.9 + 0.36 * len(counts))
    axis = figure.subplots()
    axis.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(table):
        if not np.isnan(value):
            color = "white" if value > 0.6 else "black"
            weight = "bold" if value == np.nanmax(table[row]) else "normal"
            text = f"{value:.2f}"
            axis.text(column, row, text, ha="center", va="center", color=color, fontweight=weight)
    axis.set_xticks(range(len(every)), map(str, every))
    axis.set_yticks(range(len(counts)), list(counts))
    axis.set_xlabel("group count")
    axis.set_title("probability of each group count", fontsize="medium")
    return figure


def comparison_figure(
    pictures: Sequence[np.ndarray], models: Mapping[str, Mapping[str, Maps]]
) -> Any:
    """Draw what several models attend to in the same image, a row for each model.

    Each cell is a stage. It shows the spatial attention (the mean over the groups) over the image
    or, for an attention without one, such as SE, the channel weights in descending order.

    Args:
        pictures: The image as each model takes it, [h, w, 3] in 0 to 1.
        models: The maps of the image by the name of the model.
    """
    stages = [one_per_stage([*maps]) for maps in models.values()]
    columns = 1 + max(map(len, stages))
    figure = new_figure(2.0 * columns, 2.15 * len(models) + 0.2)
    grid = figure.subplots(len(models), columns, squeeze=False)
    rows = zip(grid, pictures, models.items(), stages, strict=True)
    for cells, picture, (name, maps), layers in rows:
        for axis in cells:
            axis.set_axis_off()
        cells[0].imshow(picture)
        cells[0].set_title("\n".join(textwrap.wrap(name[-60:], 20)), fontsize="small")
        for axis, (stage, layer) in zip(cells[1:], layers.items(), strict=False):
            found = maps[layer]
            axis.set_title(stage, fontsize="small")
            if found.spatial is not None:
                draw_attention(axis, picture, found.spatial, figure)
            elif found.channel is not None:
                axis.set_axis_on()
                sorted_bars(axis, found.channel)
                axis.set(ylim=(0, 1), xticks=[])
                axis.set_title(f"{stage}: channels", fontsize="small")
    return figure
