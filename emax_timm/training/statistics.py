"""What the EMAX layers of a model do with a batch of images.

Measured by looking on: the input of each layer is caught on its way through the model and the
layer's maps are computed again from it. No layer stores anything for this.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import EMAX
from .config import TrainConfig
from .distributed import World
from .evaluate import autocast

__all__ = ["LayerProbe", "first_images", "layer_statistics", "scalars"]

# A gate is saturated below the first and above the second value.
SATURATION = (0.05, 0.95)


class LayerProbe:
    """Measures a run's EMAX layers on the same images in every epoch, those that come first.

    Args:
        config: Of the run.
        world: Where it is.
        loader: That of its validation images; None measures nothing.
    """

    def __init__(self, config: TrainConfig, world: World, loader: Any) -> None:
        self.config, self.world, self.loader = config, world, loader
        self._images: Tensor | None = None

    def measure(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """`layer_statistics` of the model; empty without images or EMAX layers."""
        if self.loader is None or not any(isinstance(m, EMAX) for m in model.modules()):
            return {}
        if self._images is None:
            images = first_images(self.loader).to(self.world.device)
            if self.config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            self._images = images
        with autocast(self.world, bool(self.config.amp), self.config.amp_dtype):
            return layer_statistics(model, self._images)


def first_images(loader: Any, count: int = 32) -> Tensor:
    """At most `count` images [b, c, h, w] of the loader's first batch."""
    with torch.random.fork_rng(devices=[]):  # the loader draws a seed
        images, _ = next(iter(loader))
    return images[:count].clone()


@torch.no_grad()
def layer_statistics(model: nn.Module, images: Tensor) -> dict[str, dict[str, Any]]:
    """Measure every EMAX layer of the model on a batch.

    The model runs once, in eval mode; modes, buffers and the random state are left as they were.

    Args:
        model: Not scripted; EMAX layers are found wherever they are.
        images: [b, c, h, w].

    Returns:
        By the qualified name of the layer (of its last run, if it has several):

        group_counts: The K candidates, ascending.
        histogram: The number of images whose most probable candidate each one is, [K]; neither
            the warm-up nor a batch vote changes it.
        gamma: The weight of the channel attention.
        residual_gate: Mean of |alpha| over the channels.
        spatial_saturation, channel_saturation, global_saturation: Fraction of the values of S
            [b, F, h, w], w_c [b, c] and w_g [b, c] that are below 0.05 or above 0.95.

        A layer without a channel gate or a global gate has no value for what it lacks.
    """
    found: dict[str, dict[str, Any]] = {}
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, EMAX):

            def measure(layer: EMAX, inputs: tuple[Tensor], name: str = name) -> None:
                found[name] = _measure(layer, inputs[0])

            hooks.append(module.register_forward_pre_hook(measure))  # type: ignore[arg-type]
    if not hooks:
        return found
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(images)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    return found


def _measure(layer: EMAX, x: Tensor) -> dict[str, Any]:
    maps = layer.attention(x)
    candidates = torch.tensor(layer.candidates, device=maps.group_count.device)
    chosen = maps.group_count.unsqueeze(1) == candidates  # [b, K]
    result: dict[str, Any] = {
        "group_counts": layer.candidates,
        "histogram": chosen.sum(0).tolist(),
        "residual_gate": layer.residual_gate.abs().mean().item(),
        "spatial_saturation": _saturation(maps.spatial),
    }
    if layer.gamma is not None:
        result["gamma"] = layer.gamma.item()
        result["channel_saturation"] = _saturation(maps.channel)
    if layer.global_attn is not None:
        result["global_saturation"] = _saturation(maps.global_)
    return result


def _saturation(gate: Tensor) -> float:
    low, high = SATURATION
    return ((gate < low) | (gate > high)).double().mean().item()


def scalars(layers: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The statistics as numbers by `layer/name`; the histogram as a share per candidate."""
    result = {}
    for layer, values in layers.items():
        images = sum(values["histogram"])
        for count, chosen in zip(values["group_counts"], values["histogram"], strict=True):
            result[f"{layer}/groups_{count}"] = chosen / images
        result |= {f"{layer}/{k}": v for k, v in values.items() if not isinstance(v, list)}
    return result
