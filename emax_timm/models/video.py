"""The video models of torchvision that attention can be inserted into: their stages and clips."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.video import S3D, VideoResNet

__all__ = ["VIDEO_STAGES", "is_video", "stages_of_video", "video_clip"]

VIDEO_STAGES: dict[type[nn.Module], Sequence[str]] = {
    VideoResNet: ("layer1", "layer2", "layer3", "layer4"),
    S3D: ("features.3", "features.6", "features.12", "features.15"),
}
"""The modules that end the stages, whose outputs are [b, c, t, h, w]."""

CLIP = (16, 224, 224)
"""Frames, height and width of the clip that the stages are probed with: S3D takes none smaller."""


def is_video(model: nn.Module) -> bool:
    """Return whether a model is one of the video models in the table, or derived from one."""
    return isinstance(model, tuple(VIDEO_STAGES))


def stages_of_video(model: nn.Module) -> list[str]:
    """Return the names of the modules that end the stages of a video model."""
    return list(next(names for kind, names in VIDEO_STAGES.items() if isinstance(model, kind)))


def video_clip(model: nn.Module) -> Tensor:
    """Make an empty clip [1, c, t, h, w] on the meta device, for a model's number of channels."""
    first: Any = next(module for module in model.modules() if isinstance(module, nn.Conv3d))
    shape = (1, first.in_channels, *CLIP)
    return torch.empty(shape, device="meta", dtype=first.weight.dtype)
