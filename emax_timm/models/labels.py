"""The names of a model's classes."""

from collections.abc import Callable, Mapping
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset

__all__ = ["class_namer"]


def class_namer(model: Any) -> Callable[[int], str]:
    """A function from a class's index to its name.

    The names are those in the model's pretrained config, or ImageNet's where the number of classes
    is that of a subset of ImageNet that timm knows; otherwise a name is "class" and the index.
    """
    cfg = model.pretrained_cfg
    labels, described = cfg.get("label_names"), cfg.get("label_descriptions") or {}
    if labels and len(labels) != model.num_classes:  # those of other weights of the architecture
        labels = None
    if isinstance(labels, Mapping):
        labels = {int(index): label for index, label in labels.items()}
    elif labels:
        labels = dict(enumerate(labels))
    elif subset := infer_imagenet_subset(model):
        info = ImageNetInfo(subset)
        return lambda index: info.index_to_description(index).split(",")[0]
    else:
        labels = {}

    def name(index: int) -> str:
        label = str(labels.get(index, f"class {index}"))
        return described.get(label, label)

    return name
