"""MobileNetV2 with attention after the depthwise convolution of each block.

That is where timm has the squeeze-and-excite layer in the families that share these blocks. The
paper on EMA (arXiv 2305.13563) does not say where its ImageNet network, timm's MobileNetV2, has the
attention. With EMA in this place it has the 3.55 M parameters that the authors report
(https://github.com/YOLOonMe/EMA-attention-module, against 3.50 M without). Parameter names, options
and initialisation are those of timm's MobileNetV2.
"""

from functools import partial
from typing import Any

from timm.models._efficientnet_builder import (
    decode_arch_def,
    resolve_act_layer,
    resolve_bn_args,
)
from timm.models.efficientnet import EfficientNet
from torch import nn

from .placement import BlockAttention
from .registry import family_cfgs, register_family

__all__ = ["AttentionMobileNetV2"]

# Repeats, kernel size, stride, expansion and channels, from table 2 of arXiv 1801.04381.
BLOCKS = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s2_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]


class MobileNetV2(EfficientNet):
    """The class of timm's `mobilenetv2_100`, which timm builds by a function instead."""

    def __init__(self, **kwargs: Any) -> None:
        norm_layer = kwargs.pop("norm_layer", None)
        norm_layer = norm_layer or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs))
        act_layer = resolve_act_layer(kwargs, "relu6")
        super().__init__(
            decode_arch_def(BLOCKS), norm_layer=norm_layer, act_layer=act_layer, **kwargs
        )


class AttentionMobileNetV2(BlockAttention, MobileNetV2):
    """MobileNetV2 with attention in the blocks of some of its stages: see `BlockAttention`.

    The stages are the five that `features_only` gives; all blocks at stride 16 are one of them.
    """


BACKBONES: dict[str, dict[str, Any]] = {"mobilenetv2_100": {}}

default_cfgs = family_cfgs(tuple(BACKBONES), compared=())
register_family(
    __name__,
    AttentionMobileNetV2,
    BACKBONES,
    compared=(),
    feature_cfg={"flatten_sequential": True},
)
