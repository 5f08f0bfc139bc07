"""Data sets, the decoding of their images, the sampling of batches, and loaders."""

from .datasets import SAMPLES, class_names, hold_out, open_split, same_classes
from .inputs import data_config_of, image_mode
from .loaders import (
    corrupt_images,
    evaluation_loader,
    grouped,
    sample_names,
    start_epoch,
    training_loader,
)

__all__ = [
    "SAMPLES",
    "class_names",
    "corrupt_images",
    "data_config_of",
    "evaluation_loader",
    "grouped",
    "hold_out",
    "image_mode",
    "open_split",
    "same_classes",
    "sample_names",
    "start_epoch",
    "training_loader",
]
