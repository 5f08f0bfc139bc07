"""Training and validation: timm's ImageNet pipeline with EMAX's grouping course."""

from .config import TrainConfig, UsageError, ValidateConfig
from .programs import train, validate

__all__ = ["TrainConfig", "UsageError", "ValidateConfig", "train", "validate"]
