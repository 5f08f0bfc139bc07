"""Capture of the attention maps of a model while it runs."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..attention import EMA, EMAX, EMAXMaps

__all__ = ["GateMaps", "Maps", "attention_of", "capture_attention", "heatmap"]


class GateMaps(NamedTuple):
    """The attention maps of EMA, CBAM, SE or ECA, in float32 (float64 for float64 inputs).

    The fields have the same meaning as in `EMAXMaps`; those that a layer lacks are None.
    """

    spatial: Tensor | None = None
    """Spatial attention in (0, 1): EMA's [b, F, h, w], CBAM's [b, 1, h, w]."""
    channel: Tensor | None = None
    """Channel attention of CBAM, SE and ECA in (0, 1), [b, c]."""


Maps = EMAXMaps | GateMaps


@contextlib.contextmanager
def capture_attention(model: nn.Module) -> Iterator[dict[str, Maps]]:
    """Capture the attention maps of every forward pass inside the context.

        with emax_timm.capture_attention(model) as maps:
            model(images)
        maps["layer4.0.se"].spatial  # [b, F, h, w]

    The dictionary is filled as the model runs, under the names of the layers in `named_modules`.
    It holds the maps of the last pass (for a layer that runs several times in it, of the last run),
    without gradients and on the CPU, and keeps them after the context. The context changes neither
    the model's outputs and state nor the random state, and leaves nothing on the model. In training
    mode the maps are those of the group counts that the pass chooses.

    Args:
        model: A model with EMAX, EMA, CBAM, SE or ECA layers anywhere in it, `features_only` or
            not, and also one that torch.compile or DistributedDataParallel wraps. Names are then
            those in the wrapped model, which runs uncompiled in the context.

    Yields:
        The maps by the name of the layer: `EMAXMaps` for EMAX, and for the others a `GateMaps`, a
        tuple with the fields `spatial` and `channel`, None where the layer has no such gate.

    Raises:
        ValueError: If the model has no such layer, as scripted and exported models have none.
    """
    inner: nn.Module = unwrap_model(model)
    maps: dict[str, Maps] = {}
    with contextlib.ExitStack() as stack:
        handles = [
            handle
            for name, layer in inner.named_modules()
            for handle in _watch(layer, name.replace("_orig_mod.", ""), maps)
        ]
        for handle in handles:
            stack.callback(handle.remove)
        if not handles:
            raise ValueError(f"{type(inner).__name__} has no EMAX, EMA, CBAM, SE or ECA layer")
        if any(map(_is_compiled, model.modules())):
            # Compiled code does not run hooks that it was not compiled with.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield maps


@torch.no_grad()
def attention_of(model: nn.Module, images: Tensor) -> dict[str, Maps]:
    """Run a model on images [b, c, h, w] in eval mode, and return its attention maps.

    The maps are those of `capture_attention`; the modes of all modules are left as they were.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        with capture_attention(model) as maps:
            model.eval()(images)
    finally:
        for module, training in modes:
            module.training = training
    return maps


def _watch(layer: nn.Module, name: str, maps: dict[str, Maps]) -> list[RemovableHandle]:
    """Register hooks that store a layer's maps under its name; none for other modules."""
    if isinstance(layer, EMAX | EMA):

        def before(layer: Any, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            maps[name] = _attention(layer, *inputs, **keywords)

        return [layer.register_forward_pre_hook(before, with_kwargs=True)]
    gates: dict[str, Any] = {}
    if isinstance(layer, CbamModule):
        gates = {"channel": layer.channel.gate, "spatial": layer.spatial.gate}
    elif isinstance(layer, SEModule | EcaModule):
        gates = {"channel": layer.gate}
    return [
        gate.register_forward_hook(_gate_hook(name, field, maps)) for field, gate in gates.items()
    ]


def _gate_hook(name: str, field: str, maps: dict[str, Maps]) -> Callable[..., None]:
    """Make a hook that stores the weights that a timm layer multiplies its input with."""

    def after(gate: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        value = _kept(output)
        value = value if field == "spatial" else value.reshape(len(value), -1)
        maps[name] = maps.get(name, GateMaps())._replace(**{field: value})

    return after


@torch.no_grad()
def _attention(layer: EMAX | EMA, x: Tensor, *mask: Any, **keywords: Any) -> Maps:
    if isinstance(layer, EMA):
        return GateMaps(spatial=_kept(layer.attention(x)))
    # In training the noise is drawn here; the random state is restored, so that the forward pass
    # draws the same noise.
    devices = [] if x.device.type == "cpu" else [x.device]
    with torch.random.fork_rng(devices, enabled=layer.training, device_type=x.device.type):
        return EMAXMaps(*map(_kept, layer.attention(x, *mask, **keywords)))


def _kept(value: Tensor) -> Tensor:
    value = value.detach().to("cpu", copy=True)
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def heatmap(spatial: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize spatial attention, averaged over its groups, to the size of the image.

    Args:
        spatial: The spatial attention, [n, F, h', w'].
        size: Height h and width w of the image.

    Returns:
        [n, h, w], by bilinear interpolation with `align_corners=False`.
    """
    mean = spatial.mean(1, keepdim=True)
    return F.interpolate(mean, size, mode="bilinear", align_corners=False).squeeze(1)
