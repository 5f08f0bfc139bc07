"""Registration with timm: the entry points and pretrained configs of the model families."""

import dataclasses
import logging
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import timm
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    get_pretrained_cfg,
    register_model,
    resolve_pretrained_cfg,
)
from torch import nn

from ..attention import ATTENTIONS
from .download import Located, check_folder_config, locate
from .warm_start import warm_start
from .weights_index import INDEX, WeightsEntry

__all__ = [
    "build_model",
    "entry_point",
    "family_cfgs",
    "of_architecture",
    "pool_size_at",
    "register",
    "register_family",
]

_logger = logging.getLogger(__name__)

EntryPoint = TypeVar("EntryPoint", bound=Callable[..., nn.Module])


def register(function: EntryPoint) -> EntryPoint:
    """Register an entry point with timm, unless timm or another package has a model of its name."""
    name = function.__name__
    if timm.is_model(name):
        owner = timm.model_entrypoint(name).__module__
        if owner != function.__module__:
            _logger.error("%s is a model of %s: emax_timm's is not registered", name, owner)
            return function
    register_model(function)
    return function


def attentions_by_name(backbone: str, compared: Sequence[str]) -> dict[str, str]:
    """Map the registered names of a backbone to the attention that each of them has."""
    attentions = ATTENTIONS if backbone in compared else ("emax",)
    return {f"{backbone}_{attention}": attention for attention in attentions}


def family_cfgs(backbones: Sequence[str], compared: Sequence[str]) -> dict[str, Any]:
    """Make the pretrained configs of a family from those of its baselines and the weights index.

    A baseline is timm's model without the attention. The first tag of a model is its default: its
    own trained weights if there are any, else a warm start from the weights of the baseline.

    Args:
        backbones: The names of the baselines in timm.
        compared: The baselines that are registered with every attention, and not with EMAX alone.

    Returns:
        The configs by model name, as timm's modules hold them in `default_cfgs`.
    """
    cfgs: dict[str, PretrainedCfg] = {}
    for backbone in backbones:
        for name in attentions_by_name(backbone, compared):
            tagged = {}
            for entry in INDEX:
                if entry.model == name:
                    tagged[f"{name}.{entry.tag}"] = _own_cfg(entry, backbone)
            for entry in INDEX:
                baseline = get_pretrained_cfg(f"{entry.model}.{entry.tag}")
                if entry.model == backbone and baseline is not None:
                    tagged[f"{name}.{entry.tag}_warm"] = dataclasses.replace(
                        baseline,
                        architecture=name,
                        url="",
                        hf_hub_id=entry.repo,
                        hf_hub_filename=entry.file,
                        license=entry.license,
                    )
            baseline = get_pretrained_cfg(backbone) or PretrainedCfg()
            cfgs |= tagged or {name: without_weights(baseline, architecture=name)}
    return generate_default_cfgs(cfgs)  # pyright: ignore[reportArgumentType]


def _own_cfg(entry: WeightsEntry, backbone: str) -> PretrainedCfg:
    """Make the pretrained config of weights that were trained with this package."""
    baseline = get_pretrained_cfg(backbone) or PretrainedCfg()
    kept: dict[str, Any] = of_architecture(baseline.to_dict())
    shipped = entry.repo is None
    own: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in (entry.cfg or {}).items()
    }
    size = own.get("input_size", baseline.input_size)
    kept |= {"architecture": entry.model, "pool_size": pool_size_at(baseline.to_dict(), size)}
    return PretrainedCfg(
        **kept,
        file=str(entry.path) if shipped else None,
        hf_hub_id=entry.repo,
        hf_hub_filename=None if shipped else entry.file,
        license=entry.license,
        **own,
    )


# What a pretrained config says of the architecture. All else is about its weights: where they are,
# how they were trained, for which input and which classes, and what is recommended with them.
_ARCHITECTURE = (
    *("architecture", "fixed_input_size", "min_input_size", "pool_size", "first_conv"),
    "classifier",
)


def of_architecture(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Select what is true of an architecture with any weights from a pretrained config."""
    return {name: cfg[name] for name in _ARCHITECTURE if name in cfg}


def pool_size_at(cfg: Mapping[str, Any], input_size: Sequence[int]) -> tuple[int, ...] | None:
    """Compute height and width of the last feature map for another input size than the config's."""
    if not cfg.get("pool_size"):
        return None
    sizes = zip(cfg["pool_size"], cfg["input_size"][1:], input_size[1:], strict=True)
    return tuple(_pooled(size, pool, given) for pool, given, size in sizes)


def _pooled(size: int, pool: int, given: int) -> int:
    """Compute the side of the map of an image, where one of side `given` has a map of `pool`."""
    stride = 2 ** round(math.log2(given / pool))
    if -(-given // stride) == pool:  # 176 pixels at stride 32 give 6, rounded up
        return -(-size // stride)
    return -(-size * pool // given)


def without_weights(cfg: PretrainedCfg, architecture: str) -> PretrainedCfg:
    """Copy a config for another architecture, without its weights."""
    return dataclasses.replace(
        cfg,
        architecture=architecture,
        tag=None,
        url="",
        file=None,
        hf_hub_id=None,
        hf_hub_filename=None,
        license=None,
    )


def register_family(
    module: str,
    model_class: type[nn.Module],
    backbones: Mapping[str, Mapping[str, Any]],
    compared: Sequence[str],
    **build_options: Any,
) -> None:
    """Register `<backbone>_<attention>` models in `module`, which holds their `default_cfgs`.

    Args:
        module: The name of the module that the entry points belong to.
        model_class: The class of the models; it takes the backbone's arguments and `attn_layer`.
        backbones: The arguments of each backbone, by its name in timm.
        compared: The backbones that are registered with every attention, and not with EMAX alone.
        build_options: Further arguments of `build_model`.
    """
    for backbone, arguments in backbones.items():
        for name, attention in attentions_by_name(backbone, compared).items():
            function = entry_point(
                name, model_class, {**arguments, "attn_layer": attention}, build_options
            )
            function.__module__ = module
            function.__doc__ = f"timm's {backbone} with the attention {attention!r} in its blocks."
            setattr(sys.modules[module], name, register(function))


def entry_point(
    name: str,
    model_class: type[nn.Module],
    arguments: Mapping[str, Any],
    build_options: Mapping[str, Any],
) -> Callable[..., nn.Module]:
    """Make an entry point that timm can register: `name(pretrained=False, **kwargs)`."""

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model(
            model_class, name, pretrained, **{**build_options, **arguments, **kwargs}
        )

    create.__name__ = create.__qualname__ = name
    create.__annotations__["return"] = model_class
    return create


def build_model(
    model_class: Callable[..., nn.Module],
    variant: str,
    pretrained: bool,
    pretrained_cfg: Any = None,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    pretrained_filter_fn: Callable[..., Any] | None = None,
    cache_dir: Any = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model as timm's `build_model_with_cfg` does, and verify its weights.

    Weights of the baseline give a warm start. The arguments are those of timm's function.

    Raises:
        RuntimeError: If the weights cannot be obtained, are not those of the index, or do not fit.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    if isinstance(pretrained_cfg, dict) and pretrained_cfg.get("source") == "local-dir":
        check_folder_config(Path(pretrained_cfg["file"]))
    if overlay.keys() & {"hf_hub_id", "url"}:
        # timm prefers a config's file, so the weights in this package would hide those asked for.
        overlay.setdefault("file", None)
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay) if pretrained else None
    located = None if cfg is None else locate(cfg, cache_dir)
    if located is not None:
        # timm loads the file, so that it adapts the stem and the head.
        overlay |= {"file": str(located.path), "source": None, "state_dict": None}

    def filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
        if pretrained_filter_fn is not None:
            state_dict = pretrained_filter_fn(state_dict, model)
        return warm_start(state_dict, model)

    model: Any = build_model_with_cfg(
        model_class,
        variant,
        pretrained,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        pretrained_filter_fn=filter_fn,
        cache_dir=cache_dir,
        **kwargs,
    )
    if cfg is not None and located is not None:
        # A path on this machine is not a property of the model.
        model.pretrained_cfg.pop("file", None)
        if cfg.source:
            model.pretrained_cfg["source"] = cfg.source
        _logger.log(*_origin(f"{variant}.{cfg.tag}" if cfg.tag else variant, located))
    return model


def _origin(name: str, located: Located) -> tuple[int, str]:
    """Make the log line, with its level, that says where the weights of a model come from."""
    checked = "verified" if located.verified else "unverified: no sha256 of them is pinned"
    if located.entry is None or located.entry.cfg is not None:
        return logging.INFO, f"{name}: the weights of {located.source}; {checked}"
    return logging.WARNING, (
        f"{name}: the weights of {located.source} with its attention closed (residual_gate 0), so "
        f"it computes what the baseline computes until it is trained; {checked}"
    )
