"""Data sets, the decoding of their images, the sampling of batches, and loaders."""

from .datasets import SAMPLES, hold_out, open_split
from .inputs import data_config_of, image_mode
from .labels import check_labels, class_names, same_classes, several_classes, targets_of
from .loaders import (
    corrupt_images,
    evaluation_loader,
    grouped,
    ignoring_signals,
    sample_names,
    start_epoch,
    training_loader,
)
from .report import inventory, left_out, overlap

__all__ = [
    "SAMPLES",
    "check_labels",
    "class_names",
    "corrupt_images",
    "data_config_of",
    "evaluation_loader",
    "grouped",
    "hold_out",
    "ignoring_signals",
    "image_mode",
    "inventory",
    "left_out",
    "open_split",
    "overlap",
    "same_classes",
    "sample_names",
    "several_classes",
    "start_epoch",
    "targets_of",
    "training_loader",
]
