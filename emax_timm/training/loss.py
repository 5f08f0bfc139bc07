"""The loss that training minimises."""

import torch
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
)
from torch import nn

from .config import TrainConfig, mixup_options

__all__ = ["training_loss"]


def training_loss(config: TrainConfig) -> nn.Module:
    """Return the loss of training: timm's, as its script chooses it by the options."""
    if config.jsd_loss:
        return JsdCrossEntropy(num_splits=config.aug_splits, smoothing=config.smoothing)
    mixed = bool(mixup_options(config))
    if config.bce_loss and (mixed or config.smoothing):
        weight = config.bce_pos_weight
        return BinaryCrossEntropy(
            smoothing=0.0 if mixed else config.smoothing,  # mixup smooths its targets itself
            target_threshold=config.bce_target_thresh,
            sum_classes=config.bce_sum,
            pos_weight=None if weight is None else torch.tensor(weight),
        )
    if mixed:
        return SoftTargetCrossEntropy()
    if config.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=config.smoothing)
    return nn.CrossEntropyLoss()
