"""Grad-CAM (arXiv 1610.02391) of a model's layers, by the package grad-cam."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from .tokens import feature_layer

__all__ = ["GRAD_CAM_NEEDED", "grad_cam"]

GRAD_CAM_NEEDED = "Grad-CAM needs the package grad-cam: pip install 'emax-timm[viz]'"


def grad_cam(
    model: nn.Module, images: Tensor, layer: str, classes: Sequence[int] | Tensor | None = None
) -> Tensor:
    """Where a layer's features speak for a class.

    The model, its gradients and its mode stay as they are: a copy of it is run, in eval mode.

    Args:
        model: A classifier; of a wrapped one the model inside.
        images: [b, c, h, w].
        layer: Name of a module that gives a feature map, such as "layer4", or of tokens on a grid
            that go through inserted attention, such as "blocks.8".
        classes: Of each image; None for the likeliest.

    Returns:
        [b, h, w] in [0, 1], each image on its own scale, all 0 where nothing speaks for the class.

    Raises:
        ImportError: If grad-cam is missing.
        ValueError: If the model has no such layer.
    """
    try:
        from pytorch_grad_cam import GradCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    except ImportError as error:
        raise ImportError(GRAD_CAM_NEEDED) from error
    targets: Any = None
    if classes is not None:
        targets = [ClassifierOutputTarget(int(index)) for index in classes]
    with torch.inference_mode(False), torch.enable_grad():
        copied = copy.deepcopy(unwrap_model(model)).requires_grad_()
        try:
            target = feature_layer(copied.get_submodule(layer))
        except AttributeError:
            raise ValueError(f"{type(copied).__name__} has no layer {layer}") from None
        with GradCAM(copied, [target]) as cam:
            return torch.from_numpy(cam(images.clone(), targets))
