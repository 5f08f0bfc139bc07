"""Training and validation: timm's ImageNet pipeline, plus a schedule for EMAX's grouping."""

from .commands import train, validate
from .config import TrainConfig, UsageError, ValidateConfig

__all__ = ["TrainConfig", "UsageError", "ValidateConfig", "train", "validate"]
