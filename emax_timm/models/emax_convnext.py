"""ConvNeXt and ConvNeXt V2 with attention between the MLP and the layer scale of each block.

Parameter names, options and initialisation are those of timm's ConvNeXt.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from timm.models.convnext import ConvNeXt, checkpoint_filter_fn

from .placement import BlockAttention
from .registry import family_cfgs, register_family

__all__ = ["AttentionConvNeXt"]


class AttentionConvNeXt(BlockAttention, ConvNeXt):
    """timm's ConvNeXt with attention in the blocks of some of its stages: see `BlockAttention`."""


def _v1(depths: Sequence[int], width: int, **kwargs: Any) -> dict[str, Any]:
    return {"depths": tuple(depths), "dims": tuple(width << i for i in range(4)), **kwargs}


_v2 = partial(_v1, use_grn=True, ls_init_value=None)

BACKBONES: dict[str, dict[str, Any]] = {
    "convnext_atto": _v1((2, 2, 6, 2), 40, conv_mlp=True),
    "convnext_femto": _v1((2, 2, 6, 2), 48, conv_mlp=True),
    "convnext_pico": _v1((2, 2, 6, 2), 64, conv_mlp=True),
    "convnext_nano": _v1((2, 2, 8, 2), 80, conv_mlp=True),
    "convnext_tiny": _v1((3, 3, 9, 3), 96),
    "convnext_small": _v1((3, 3, 27, 3), 96),
    "convnext_base": _v1((3, 3, 27, 3), 128),
    "convnextv2_atto": _v2((2, 2, 6, 2), 40, conv_mlp=True),
    "convnextv2_nano": _v2((2, 2, 8, 2), 80, conv_mlp=True),
    "convnextv2_tiny": _v2((3, 3, 9, 3), 96),
    "test_convnext": {
        "depths": (1, 2, 4, 2),
        "dims": (24, 32, 48, 64),
        "norm_eps": 1e-5,
        "act_layer": "gelu_tanh",
    },
}
COMPARED = ("convnext_atto", "convnext_tiny")

default_cfgs = family_cfgs(tuple(BACKBONES), COMPARED)
register_family(
    __name__,
    AttentionConvNeXt,
    BACKBONES,
    COMPARED,
    pretrained_filter_fn=checkpoint_filter_fn,
    feature_cfg={"out_indices": (0, 1, 2, 3), "flatten_sequential": True},
)
