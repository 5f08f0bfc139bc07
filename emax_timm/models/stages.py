"""The stages of a model: which modules end them, and in which layout their features come."""

import copy
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models import gemma4_vit, get_model_input_config, hiera, naflexvit
from torch import Tensor, nn

from .append import append
from .tokens import (
    ChannelsLastAttention,
    TokenAttention,
    UnrolledAttention,
    has_grid,
    patches_of,
    run_on_grid,
)
from .video import is_video, stages_of_video, video_clip

__all__ = ["Stage", "check_keeps_tokens", "chosen_stages", "probe_stages", "stage_names"]

STEM = re.compile(r"$|(conv_)?stem|act1$|bn1$")
BLOCK = re.compile(r"(.*\.)?blocks\.(\d+)")

PACKED = (naflexvit.NaFlexVit, gemma4_vit.Gemma4VitEncoder, gemma4_vit.Gemma4VitClassifier)

DROPOUTS = (PatchDropout, PatchDropoutWithIndices)

EVERY = 3
"""Blocks per stage of a model that has blocks of one width and no stages."""

Adapt = Callable[[nn.Module], nn.Module]
"""A function that makes attention for feature maps into attention for the layout of a stage."""


class Stage(NamedTuple):
    """The end of a stage."""

    name: str
    """The name of the module that ends it."""
    channels: int
    """The number of its output channels."""
    adapt: Adapt
    """Makes attention for feature maps into attention for the output of the module."""


def stage_names(model: nn.Module) -> list[str]:
    """Return the names of the modules that end the stages of a model, without the stem.

    Those of torchvision's video models are in a table, those of timm's models in `feature_info`. In
    models of equal blocks, such as vision transformers, a stage is three blocks, and the last block
    ends none.

    Raises:
        ValueError: If timm's `feature_info` of the model does not name them.
    """
    if is_video(model):
        return stages_of_video(model)
    info: Any = getattr(model, "feature_info", None)
    modules = dict(model.named_modules())
    names = [str(entry["module"]) for entry in info or ()]
    if names and STEM.match(names[0]):
        names = names[1:]
    # Twins has a wrong name for its lists of blocks; a list ends with its last block.
    names = [name if name in modules else re.sub("^block", "blocks", name) for name in names]
    lists = {k: len(v) for k, v in modules.items() if isinstance(v, nn.ModuleList)}
    names = [f"{name}.{lists[name] - 1}" if name in lists else name for name in names]
    if not names or any(name not in modules for name in names):
        raise ValueError(
            f"{type(model).__name__} does not say which modules are its stages (feature_info)"
        )
    widths = {(entry["num_chs"], str(entry["reduction"])) for entry in info}
    if len(widths) == 1 and all(map(BLOCK.fullmatch, names)):
        # Not after the last block: of what changes there, a class token would see nothing.
        return names[EVERY - 1 : -1 : EVERY] or names[:1]
    return names


def chosen_stages(model: nn.Module, stages: Sequence[int] | None) -> list[int]:
    """Return the sorted indices of the stages that get attention, from 0; None is all of them.

    Raises:
        ValueError: If a stage does not exist.
    """
    count = len(stage_names(model))
    if stages is None:
        return list(range(count))
    if unknown := sorted(set(stages) - set(range(count))):
        raise ValueError(f"stages of this model are 0 to {count - 1}, not {unknown}")
    return sorted(set(stages))


def probe_stages(model: Any, chosen: Sequence[int]) -> list[Stage]:
    """Find out the layouts of stages, by a run of a copy of the model on the meta device.

    Such a run computes nothing, and some models keep tensors from one call to the next.

    Args:
        model: A timm model, or a video model of torchvision.
        chosen: Indices of stages, from 0.

    Raises:
        ValueError: If the output of a stage is not one tensor of features on a grid.
    """
    names = stage_names(model)
    tensors = [*model.parameters(), *model.buffers()]
    memo: dict[int, Any] = {id(tensor): tensor.to("meta") for tensor in tensors}
    shadow = copy.deepcopy(model, memo).eval()
    seen: dict[str, list[Any]] = {name: [] for name in names}
    for name in names:
        shadow.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: seen[name].append((args, output))
        )
    if is_video(model):
        run, images = type(shadow).forward, video_clip(model)
    else:
        size = get_model_input_config(model)["input_size"]
        run = type(shadow).forward_features
        images = torch.empty(1, *size, device="meta", dtype=tensors[0].dtype)
    with torch.no_grad():
        run(shadow, images)
    stages = []
    for index in chosen:
        name = names[index]
        if len(seen[name]) != 1:
            raise ValueError(f"{name} of {type(model).__name__} is not a stage that is run once")
        args, output = seen[name][0]
        if not isinstance(output, Tensor) or not any(isinstance(t, Tensor) for t in args):
            raise ValueError(f"{name} of {type(model).__name__} does not map one tensor to one")
        if is_video(model):
            stages.append(Stage(name, output.shape[1], lambda attention: attention))
            continue
        info = model.feature_info[index - len(names)]  # equal ones if a stage is three blocks
        adapt = _layout(model, name, info, output.shape, images)
        stages.append(Stage(name, info["num_chs"], adapt))
    _check_run(shadow, stages, run, images)
    return stages


def check_keeps_tokens(model: Any) -> None:
    """Check that a model never drops nor packs its tokens.

    Raises:
        ValueError: If it can.
    """
    name = type(model).__name__
    if isinstance(model, PACKED):
        raise ValueError(f"{name} also takes packed patches, which are on no grid")
    drops = [m.prob for m in model.modules() if isinstance(m, DROPOUTS)]
    if any(drops) or getattr(model, "patch_drop_rate", 0) > 0:
        raise ValueError(
            f"{name} drops patches in training (patch_drop_rate), and the rest is on no grid"
        )


def _layout(
    model: Any, name: str, info: Mapping[str, Any], shape: Sequence[int], image: Tensor
) -> Adapt:
    """Return what adapts attention to the output of a stage, by its shape for one image."""
    width = info["num_chs"]
    channels_last = getattr(model, "output_fmt", "") == "NHWC"
    if len(shape) == 4 and shape[1] == width and not channels_last:
        return lambda attention: attention
    if len(shape) == 4 and shape[3] == width:
        return ChannelsLastAttention
    if isinstance(model, hiera.Hiera) and len(shape) == 3:
        return _unrolled(model, int(name.rpartition(".")[2]))
    prefix = stride = 0
    if len(shape) == 3 and shape[2] == width:
        grid = patches_of(model, image)
        stride = 1 if has_grid(model) else int(info["reduction"])
        prefix = shape[1] - math.prod(-(-size // stride) for size in grid)
        if prefix in (0, getattr(model, "num_prefix_tokens", 0)):
            return lambda attention: TokenAttention(attention, prefix, stride)
    raise ValueError(
        f"{name} of {type(model).__name__} gives {list(shape)} for an image of "
        f"{list(image.shape[2:])}, which are neither feature maps nor tokens on a grid"
    )


def _unrolled(model: hiera.Hiera, block: int) -> Adapt:
    schedule, size = model.reroll.schedule[block]
    if len(size) != 2:
        raise ValueError(f"{type(model).__name__} has a grid of {len(size)} dimensions, not 2")
    unroll = hiera.Unroll(size, (1, 1), schedule)  # pyright: ignore[reportArgumentType]
    return lambda attention: UnrolledAttention(attention, model.reroll, unroll, block)


def _check_run(
    shadow: Any, stages: Sequence[Stage], run: Callable[..., Any], images: Tensor
) -> None:
    """Check that every attention would be run.

    A stage with a loop of its own over its modules may not run a module that is added at its end.
    """
    runs: list[nn.Module] = []
    for stage in stages:
        probe = nn.Identity()
        probe.register_forward_hook(lambda module, *_: runs.append(module))
        append(shadow.get_submodule(stage.name), stage.adapt(probe))
    with torch.no_grad():
        run_on_grid(run, shadow, images)
    if len(runs) != len(stages) or len(set(runs)) != len(stages):
        raise ValueError(
            f"the stages of {type(shadow).__name__} run their modules by code of their own"
        )
