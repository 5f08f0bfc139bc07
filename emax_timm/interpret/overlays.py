"""Heatmaps over an image, drawn into the axes of a figure."""

from typing import Any

import numpy as np
from torch import Tensor

from ..models.capture import heatmap

__all__ = ["draw_attention", "draw_cam"]

HEAT = {"cmap": "inferno", "alpha": 0.55}


def draw_attention(axis: Any, picture: np.ndarray, spatial: Tensor, figure: Any) -> None:
    """Draw the mean of maps [n, h', w'] over an image [h, w, 3], and a bar with its range."""
    mean = spatial.mean(0)
    low, high = mean.min().item(), mean.max().item()
    # The heatmap is clamped so that rounding in the interpolation does not look like contrast.
    heat = heatmap(spatial.unsqueeze(0), picture.shape[:2])[0].clamp(low, high)
    axis.imshow(picture)
    drawn = axis.imshow(heat.numpy(), **HEAT, vmin=low, vmax=max(high, low + 1e-6))
    bar = figure.colorbar(drawn, ax=axis, location="bottom", shrink=0.9, pad=0.02, aspect=16)
    ticks = {f"{value:.3f}": value for value in (low, high)}  # one tick if both labels are equal
    bar.set_ticks(list(ticks.values()), labels=list(ticks))
    bar.ax.tick_params(labelsize="x-small")
    # The labels stay within the bar, so that they do not touch those of the neighbouring panels.
    for label, side in zip(bar.ax.get_xticklabels(), ("left", "right"), strict=False):
        label.set_horizontalalignment(side)


def draw_cam(axis: Any, picture: np.ndarray, cam: Tensor) -> None:
    """Draw a Grad-CAM heatmap [h, w] of 0 to 1 over an image [h, w, 3]."""
    axis.imshow(picture)
    axis.imshow(cam.numpy(), **HEAT, vmin=0, vmax=1)
