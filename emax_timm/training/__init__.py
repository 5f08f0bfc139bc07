"""Training and validation: timm's ImageNet pipeline, plus a schedule for EMAX's grouping."""

from .config import TrainConfig, UsageError, ValidateConfig
from .programs import train, validate

__all__ = ["TrainConfig", "UsageError", "ValidateConfig", "train", "validate"]
