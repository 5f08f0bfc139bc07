"""The models: backbones with attention, which an import of this package registers with timm."""

from .emax_convnext import AttentionConvNeXt
from .emax_insertion import insert_attention
from .emax_mobilenet import AttentionMobileNetV2
from .emax_resnet import AttentionResNet

__all__ = ["AttentionConvNeXt", "AttentionMobileNetV2", "AttentionResNet", "insert_attention"]
