"""Backbones: importing this package registers them with timm."""

from .emax_resnet import ResNetEMAX

__all__ = ["ResNetEMAX"]
