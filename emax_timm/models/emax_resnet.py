"""ResNet, ResNeXt and Wide ResNet with attention after the last norm of each block.

That is where timm puts the attention of a block. Parameter names, options and initialisation are
those of timm's ResNet.
"""

from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from .placement import BlockAttention
from .registry import family_cfgs, register_family

__all__ = ["AttentionResNet"]


class AttentionResNet(BlockAttention, ResNet):
    """timm's ResNet with attention in the blocks of some of its stages: see `BlockAttention`."""


_TIERED_STEM = {"stem_width": 32, "stem_type": "deep_tiered", "avg_down": True}
_DEEP_STEM = {"stem_width": 32, "stem_type": "deep", "avg_down": True}

BACKBONES: dict[str, dict[str, Any]] = {
    "resnet10t": {"block": BasicBlock, "layers": (1, 1, 1, 1), **_TIERED_STEM},
    "resnet14t": {"block": Bottleneck, "layers": (1, 1, 1, 1), **_TIERED_STEM},
    "resnet18": {"block": BasicBlock, "layers": (2, 2, 2, 2)},
    "resnet26": {"block": Bottleneck, "layers": (2, 2, 2, 2)},
    "resnet34": {"block": BasicBlock, "layers": (3, 4, 6, 3)},
    "resnet50": {"block": Bottleneck, "layers": (3, 4, 6, 3)},
    "resnet50d": {"block": Bottleneck, "layers": (3, 4, 6, 3), **_DEEP_STEM},
    "resnet101": {"block": Bottleneck, "layers": (3, 4, 23, 3)},
    "resnet152": {"block": Bottleneck, "layers": (3, 8, 36, 3)},
    "resnext50_32x4d": {
        "block": Bottleneck,
        "layers": (3, 4, 6, 3),
        "cardinality": 32,
        "base_width": 4,
    },
    "wide_resnet50_2": {"block": Bottleneck, "layers": (3, 4, 6, 3), "base_width": 128},
    "test_resnet": {
        "block": [BasicBlock, BasicBlock, Bottleneck, BasicBlock],
        "layers": (1, 1, 1, 1),
        "channels": (32, 48, 48, 96),
        "stem_width": 16,
        "stem_type": "deep",
        "avg_down": True,
    },
}
COMPARED = ("resnet18", "resnet50")

default_cfgs = family_cfgs(tuple(BACKBONES), COMPARED)
register_family(__name__, AttentionResNet, BACKBONES, COMPARED)
