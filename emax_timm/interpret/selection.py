"""What is drawn: images as a model takes them, and the maps of one image, stage or group.

Dimension letters: c channels, h w height and width, F finest group count.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.utils import unwrap_model
from torch import Tensor, nn

from ..attention import EMAXMaps
from ..models.capture import Maps

__all__ = [
    "contrasting_groups",
    "group_count",
    "last_with_places",
    "one_per_stage",
    "prepare",
    "shown",
    "single",
]


def prepare(model: nn.Module, image: Image.Image) -> Tensor:
    """Preprocess a PIL image for a model, as the config of a timm model says: [c, h, w]."""
    config = resolve_data_config(model=cast(Any, unwrap_model(model)))
    mode = "RGB" if config["input_size"][0] == 3 else "L"
    return cast(Any, create_transform(**config))(image.convert(mode))


def shown(model: nn.Module, x: Tensor) -> np.ndarray:
    """Turn a model's input [c, h, w] into a displayable image: [h, w, 3] in 0 to 1.

    The normalisation in the model's config is undone; without one, the values are rescaled.
    """
    cfg = getattr(unwrap_model(model), "pretrained_cfg", None) or {}
    x = x.detach().float().cpu()
    mean, std = (torch.tensor(cfg.get(key, ())).view(-1, 1, 1) for key in ("mean", "std"))
    if len(x) == len(mean) == len(std):
        x = (x * std + mean).clamp(0, 1)
    else:
        x = x - x.min()
        x = x / x.max().clamp_min(1e-12)
    if len(x) != 3:
        x = x.mean(0, keepdim=True).expand(3, -1, -1)
    return x.permute(1, 2, 0).numpy()


def single(maps: Mapping[str, Maps], index: int) -> dict[str, Maps]:
    """Select the maps of one image of a batch, without the batch dimension."""
    return {
        name: type(found)(*(None if value is None else value[index] for value in found))  # type: ignore[arg-type]
        for name, found in maps.items()
    }


def one_per_stage(names: Sequence[str]) -> dict[str, str]:
    """Map the name of each stage to its last layer, such as `layer4` to `layer4.1.se`."""
    found = {}
    for name in names:
        match = re.match(r"\D*\d+", name)
        found[match[0] if match else name] = name
    return found


def contrasting_groups(spatial: Tensor, count: int, limit: int) -> list[int]:
    """Return the ascending indices of the coarse groups' maps with the greatest contrast.

    Args:
        spatial: The spatial attention, [F, h, w].
        count: The number of coarse groups; all fine groups in a coarse one have the same map, so
            that its first fine group stands for it.
        limit: The largest number of indices to return.
    """
    first = range(0, len(spatial), len(spatial) // count)
    contrast = [float(spatial[group].std(correction=0)) for group in first]
    order = sorted(range(count), key=lambda i: contrast[i], reverse=True)
    return sorted(first[i] for i in order[:limit])


def last_with_places(maps: Mapping[str, Maps]) -> str:
    """Return the last layer with a spatial map of at least 4 x 4, else the last layer."""
    spatial = {name: found.spatial for name, found in maps.items()}
    large = [n for n, value in spatial.items() if value is not None and min(value.shape[1:]) >= 4]
    return (large or [*maps])[-1]


def group_count(found: Maps) -> int:
    """Return how many groups a layer forms: EMAX's chosen count, else its number of maps."""
    if isinstance(found, EMAXMaps):
        return int(found.group_count)
    return 1 if found.spatial is None else len(found.spatial)
