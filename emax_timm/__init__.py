"""EMAX attention in timm backbones; importing this package registers the models with timm."""

from .attention import EMAX, EMAXMaps, set_grouping
from .models import ResNetEMAX

__all__ = ["EMAX", "EMAXMaps", "ResNetEMAX", "set_grouping"]
__version__ = "0.1.0"
