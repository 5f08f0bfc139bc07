"""ResNet, ResNeXt and Wide ResNet with attention after the last norm of each block.

That is where timm puts a block's attention. Everything else is timm's ResNet: parameter names,
options, initialisation.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..attention import create_attention
from .placement import place_in_blocks
from .registry import family_cfgs, register_family

__all__ = ["AttentionResNet"]


class AttentionResNet(ResNet):
    """timm's ResNet with attention in the blocks of some of its stages.

    Args:
        attn_layer: A key of `emax_timm.attention.ATTENTIONS`.
        attn_stages: Indices of the stages that have attention, from 0; None is all of them.
        attn_kwargs: Keyword arguments of the attention (JSON-able). Each sits behind a residual
            gate; `gate_init` is where that starts, 1 unless given.
        args, kwargs: As in timm's ResNet.

    Raises:
        TypeError: For an unknown keyword, here or in `attn_kwargs`.
        ValueError: For a stage that does not exist, or a bad value in `attn_kwargs`.
    """

    def __init__(
        self,
        *args: Any,
        attn_layer: str = "emax",
        attn_stages: Sequence[int] | None = None,
        attn_kwargs: Mapping[str, Any] | None = None,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(*args, **kwargs, **dd)
        # After ResNet's own initialisation, which would re-initialise the attention's; and so that
        # a seed gives the backbone the same weights as its plain twin.
        attention = {"gate_init": 1.0, **(attn_kwargs or {})}
        place_in_blocks(self, partial(create_attention, attn_layer, **attention, **dd), attn_stages)


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
}
COMPARED = ("resnet18", "resnet50")

default_cfgs = family_cfgs(tuple(BACKBONES), COMPARED)
register_family(__name__, AttentionResNet, BACKBONES, COMPARED)
