"""ResNet with EMAX after the last norm of each block, where timm puts a block's attention.

Everything but the attention is timm's ResNet: parameter names, options, initialisation.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from ..attention import EMAX

__all__ = ["ResNetEMAX"]


class ResNetEMAX(ResNet):
    """timm's ResNet with EMAX attention in the blocks of some of its stages.

    Args:
        block: As in timm's ResNet.
        layers: As in timm's ResNet.
        attn_stages: Indices of the stages that have attention, from 0.
        attn_kwargs: Keyword arguments of `emax_timm.attention.EMAX` (JSON-able).
        kwargs: As in timm's ResNet.

    Raises:
        TypeError: For an unknown keyword, here or in `attn_kwargs`.
        ValueError: For a stage that does not exist, or a bad value in `attn_kwargs`.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        layers: Sequence[int],
        attn_stages: Sequence[int] = (0, 1, 2, 3),
        attn_kwargs: Mapping[str, Any] | None = None,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(block, tuple(layers), **kwargs, **dd)  # pyright: ignore[reportArgumentType]
        unknown = sorted(set(attn_stages) - set(range(len(layers))))
        if unknown:
            raise ValueError(
                f"attn_stages must be stages of this model, 0 to {len(layers) - 1}, not {unknown}"
            )
        # After ResNet's own initialisation, which would re-initialise EMAX's convolutions; and so
        # that a seed gives the backbone the same weights as its plain twin.
        for stage in attn_stages:
            info: dict[str, Any] = self.feature_info[stage + 1]  # the first is the stem's
            for residual_block in self.get_submodule(info["module"]).children():
                residual_block.se = EMAX(info["num_chs"], **(attn_kwargs or {}), **dd)


def _create_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    return build_model_with_cfg(ResNetEMAX, variant, pretrained, **kwargs)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.95,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "conv1",
        "classifier": "fc",
        "license": "apache-2.0",
        **kwargs,
    }


# None has weights yet: `pretrained=True` raises.
default_cfgs = generate_default_cfgs(
    {
        "resnet10t_emax": _cfg(first_conv="conv1.0"),
        "resnet14t_emax": _cfg(first_conv="conv1.0"),
        "resnet18_emax": _cfg(),
        "resnet26_emax": _cfg(),
        "resnet34_emax": _cfg(),
        "resnet50_emax": _cfg(),
        "resnet50d_emax": _cfg(first_conv="conv1.0"),
        "resnet101_emax": _cfg(),
        "resnet152_emax": _cfg(),
    }
)

_TIERED_STEM = {"stem_width": 32, "stem_type": "deep_tiered", "avg_down": True}
_DEEP_STEM = {"stem_width": 32, "stem_type": "deep", "avg_down": True}


@register_model
def resnet10t_emax(pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    """ResNet-10-T (tiered stem, average pooling in the shortcuts) with EMAX."""
    model_args = dict(block=BasicBlock, layers=(1, 1, 1, 1), **_TIERED_STEM)
    return _create_resnet("resnet10t_emax", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet14t_emax(pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    """ResNet-14-T (tiered stem, average pooling in the shortcuts) with EMAX."""
    model_args = dict(block=Bottleneck, layers=(1, 1, 1, 1), **_TIERED_STEM)
    return _create_resnet("resnet14t_emax", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet18_emax(pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    """ResNet-18 with EMAX."""
    model_args = {"block": BasicBlock, "layers": (2, 2, 2, 2)}
    return _create_resnet("resnet18_emax", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet26_emax(pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    """ResNet-26 with EMAX."""
    model_args = {"block": Bottleneck, "layers": (2, 2, 2, 2)}
    return _create_resnet("resnet26_emax", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet34_emax(pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    """ResNet-34 with EMAX."""
    model_args = {"block": BasicBlock, "layers": (3, 4, 6, 3)}
    return _create_resnet("resnet34_emax", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_emax(pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    """ResNet-50 with EMAX."""
    model_args = {"block": Bottleneck, "layers": (3, 4, 6, 3)}
    return _create_resnet("resnet50_emax", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50d_emax(pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    """ResNet-50-D (deep stem, average pooling in the shortcuts) with EMAX."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), **_DEEP_STEM)
    return _create_resnet("resnet50d_emax", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_emax(pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    """ResNet-101 with EMAX."""
    model_args = {"block": Bottleneck, "layers": (3, 4, 23, 3)}
    return _create_resnet("resnet101_emax", pretrained, **dict(model_args, **kwargs))


@register_model
def resnet152_emax(pretrained: bool = False, **kwargs: Any) -> ResNetEMAX:
    """ResNet-152 with EMAX."""
    model_args = {"block": Bottleneck, "layers": (3, 8, 36, 3)}
    return _create_resnet("resnet152_emax", pretrained, **dict(model_args, **kwargs))
