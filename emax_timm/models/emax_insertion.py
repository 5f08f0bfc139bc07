"""Attention in a model: a function that inserts it, and a model of timm that has it by name."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import timm
from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    resolve_pretrained_cfg,
)
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet
from torch import nn

from ..attention import create_attention
from .download import locate
from .placement import place_after_stages, place_in_blocks
from .registry import build_model, register, without_weights
from .video import VIDEO_STAGES, is_video

__all__ = ["insert_attention"]


def insert_attention(
    model: Any,
    attention: str = "emax",
    stages: Sequence[int] | None = None,
    where: str = "stage",
    attn_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Insert attention into a model of timm or torchvision, in place, without changing its outputs.

    Every attention sits behind a residual gate that starts closed, so the outputs of a pretrained
    model stay the same to the bit until it is trained. The names of its parameters stay as well.
    For a timm model, `timm.models.save_for_hf` writes a folder from which
    `timm.create_model("local-dir:...")` rebuilds the result, and
    `timm.create_model("with_attention", base_model=...)` creates it by name.

    Args:
        model: A timm model whose stages give one tensor of feature maps [b, c, h, w] or
            [b, h, w, c], or of tokens [b, n, c] on a grid, with or without prefix tokens; created
            without `features_only`. Or a `VideoResNet` or `S3D` of torchvision, whose stages give
            [b, c, t, h, w] and get the attention in three dimensions, which only EMAX has.
        attention: Name of the attention, as in `create_attention`.
        stages: Indices of the stages that get attention, counted from 0 for the first after the
            stem, in the order of the feature maps that `features_only` gives; None is all of them.
            In models of equal blocks, such as vision transformers, three blocks are a stage, and
            the last block ends none: stage 0 of ViT-B ends after blocks.2, stage 2 after blocks.8.
        where: "stage" inserts it after each stage; "block" into the residual branch of every block
            of the stages, in families whose blocks have a slot for it: ResNet, SKNet, Res2Net,
            RegNet, EfficientNet, MobileNet, ConvNeXt.
        attn_kwargs: Keyword arguments of the attention, which JSON can represent.

    Returns:
        The same model.

    Raises:
        TypeError: If the attention does not know a keyword in `attn_kwargs`.
        ValueError: If a value is out of its range, or the model has no place for attention.
    """
    if where not in ("stage", "block"):
        raise ValueError(f'where must be "stage" or "block", not {where!r}')
    _check_has_none(model)
    build = _builder(model, attention, attn_kwargs or {})
    build(32)  # refuses a wrong name or keyword before the model is touched
    if where == "block":
        place_in_blocks(model, build, stages)
    else:
        place_after_stages(model, build, stages)
    if not is_video(model):
        _describe(
            model,
            attention=attention,
            stages=None if stages is None else list(stages),
            where=where,
            attn_kwargs=dict(attn_kwargs or {}),
        )
    return model


def _builder(
    model: Any, attention: str, attn_kwargs: Mapping[str, Any]
) -> Callable[[int], nn.Module]:
    """Return a function that makes the attention for a number of channels, its gate closed."""
    parameter = next(model.parameters())
    return partial(
        create_attention,
        attention,
        **{"gate_init": 0.0, **attn_kwargs},
        device=parameter.device,
        dtype=parameter.dtype,
        dims=3 if is_video(model) else 2,
    )


def _check_has_none(model: Any) -> None:
    """Check that a model is a known one, not wrapped for its features, and without attention."""
    if not isinstance(getattr(model, "pretrained_cfg", None), dict) and not is_video(model):
        videos = " and ".join(kind.__name__ for kind in VIDEO_STAGES)
        raise ValueError(
            f"{type(model).__name__} was not made by timm.create_model; of torchvision's models, "
            f"those whose stages give [b, c, t, h, w] are served: {videos}"
        )
    if isinstance(model, FeatureDictNet | FeatureGetterNet | FeatureHookNet):
        raise ValueError(
            "insert attention before wrapping a model for its features: "
            'timm.create_model("with_attention", base_model=..., features_only=True) does both'
        )
    if any(name.endswith("residual_gate") for name, _ in model.named_parameters()):
        raise ValueError(f"{type(model).__name__} has attention already")


def _describe(model: Any, **arguments: Any) -> None:
    """Make the pretrained config and the arguments of the model those of `with_attention`."""
    cfg = model.pretrained_cfg
    base = cfg["architecture"]
    model.pretrained_cfg = {**cfg, "architecture": "with_attention"}
    model.default_cfg = model.pretrained_cfg
    model._model_args = {**getattr(model, "_model_args", {}), "base_model": base, **arguments}


default_cfgs = generate_default_cfgs({"with_attention": {}})


@register
def with_attention(
    pretrained: bool = False,
    base_model: str = "resnet18",
    attention: str = "emax",
    stages: Sequence[int] | None = None,
    where: str = "stage",
    attn_kwargs: Mapping[str, Any] | None = None,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Create the timm model `base_model` with inserted attention; `kwargs` are its arguments.

    With `pretrained=True` it starts from the weights of `base_model`, with closed residual gates.
    """
    # A folder, a file or a hub repository has the weights of the model as a whole; without one, the
    # weights are those of `base_model`.
    overlay = dict(pretrained_cfg_overlay or {})
    own = resolve_pretrained_cfg("with_attention", pretrained_cfg, overlay)
    given = own.has_weights or overlay.get("state_dict") is not None
    base_weights = pretrained and not given
    base_cfg = None
    if not own.has_weights:
        base_cfg = _cfg_of_base(base_model)
        pretrained_cfg = without_weights(base_cfg, architecture="with_attention").to_dict()
    feature_cfg: dict[str, Any] = {"out_indices": ()}

    def build(**model_kwargs: Any) -> nn.Module:
        model: Any = timm.create_model(
            base_model,
            pretrained=base_weights,
            pretrained_cfg_overlay=_file_of_base(base_cfg, cache_dir) if base_weights else {},
            cache_dir=cache_dir,
            **model_kwargs,
        )
        # timm reads these after this function, which is the first to know them.
        getter = hasattr(model, "forward_intermediates")
        feature_cfg.setdefault("feature_cls", "getter" if getter else "hook")
        if "out_indices" not in kwargs:
            feature_cfg["out_indices"] = tuple(range(len(model.feature_info)))
        return insert_attention(model, attention, stages, where, attn_kwargs)

    return build_model(
        build,
        "with_attention",
        pretrained and not base_weights,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        feature_cfg=feature_cfg,
        cache_dir=cache_dir,
        **kwargs,
    )


def _cfg_of_base(name: str) -> PretrainedCfg:
    cfg = get_pretrained_cfg(name)
    if cfg is None:
        close = difflib.get_close_matches(name, timm.list_models(), n=1, cutoff=0)
        raise ValueError(f"unknown base_model {name!r}; the nearest is {close[0]}")
    return cfg


def _file_of_base(cfg: PretrainedCfg | None, cache_dir: Any) -> dict[str, str]:
    """Return the overlay that makes timm read a safetensors file; timm would also take a pickle."""
    if cfg is None or cfg.hf_hub_filename:
        return {}
    located = locate(cfg, cache_dir)
    return {"file": str(located.path)} if located else {}
