"""MobileNetV2 with attention after the depthwise convolution of each block.

That is where timm has the squeeze-and-excite of the families that share these blocks. EMA's paper
(arXiv 2305.13563) does not say where its ImageNet network, a MobileNetV2 of timm's, has the
attention; with EMA in this place it has the 3.55 M parameters that its authors report
(https://github.com/YOLOonMe/EMA-attention-module, against 3.50 M without).
Everything else is timm's MobileNetV2: parameter names, options, initialisation.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.models._efficientnet_builder import (
    decode_arch_def,
    resolve_act_layer,
    resolve_bn_args,
)
from timm.models.efficientnet import EfficientNet
from torch import nn

from ..attention import create_attention
from .placement import place_in_blocks
from .registry import family_cfgs, register_family

__all__ = ["AttentionMobileNetV2"]

# arXiv 1801.04381, table 2: repeats, kernel, stride, expansion, channels.
BLOCKS = [
    ["ds_r1_k3_s1_c16"],
    ["ir_r2_k3_s2_e6_c24"],
    ["ir_r3_k3_s2_e6_c32"],
    ["ir_r4_k3_s2_e6_c64"],
    ["ir_r3_k3_s1_e6_c96"],
    ["ir_r3_k3_s2_e6_c160"],
    ["ir_r1_k3_s1_e6_c320"],
]


class AttentionMobileNetV2(EfficientNet):
    """timm's MobileNetV2 with attention in the blocks of some of its stages.

    Its stages are the five that `features_only` gives, so the third, for one, is all at stride 8.

    Args:
        attn_layer, attn_stages, attn_kwargs: As in `emax_resnet.AttentionResNet`.
        kwargs: As in timm's `mobilenetv2_100`, an EfficientNet.

    Raises:
        TypeError: For an unknown keyword, here or in `attn_kwargs`.
        ValueError: For a stage that does not exist, or a bad value in `attn_kwargs`.
    """

    def __init__(
        self,
        attn_layer: str = "emax",
        attn_stages: Sequence[int] | None = None,
        attn_kwargs: Mapping[str, Any] | None = None,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        norm_layer = kwargs.pop("norm_layer", None)
        norm_layer = norm_layer or partial(nn.BatchNorm2d, **resolve_bn_args(kwargs))
        act_layer = resolve_act_layer(kwargs, "relu6")
        super().__init__(
            decode_arch_def(BLOCKS), norm_layer=norm_layer, act_layer=act_layer, **kwargs, **dd
        )
        attention = {"gate_init": 1.0, **(attn_kwargs or {})}
        place_in_blocks(self, partial(create_attention, attn_layer, **attention, **dd), attn_stages)


BACKBONES: dict[str, dict[str, Any]] = {"mobilenetv2_100": {}}

default_cfgs = family_cfgs(tuple(BACKBONES), compared=())
register_family(
    __name__,
    AttentionMobileNetV2,
    BACKBONES,
    compared=(),
    feature_cfg={"flatten_sequential": True},
)
