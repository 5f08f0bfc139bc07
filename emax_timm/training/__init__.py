"""Training and validation: timm's ImageNet pipeline with EMAX's grouping course."""

from .config import UsageError
from .options import TrainConfig, ValidateConfig
from .programs import train, validate

__all__ = ["TrainConfig", "UsageError", "ValidateConfig", "train", "validate"]
