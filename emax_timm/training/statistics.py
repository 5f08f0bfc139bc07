"""Statistics of a model's EMAX layers on a batch of images.

Hooks catch the input of each layer, and the layer's attention maps are computed again from it.
The layers store nothing for this.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..attention import EMAX
from .config import TrainConfig
from .distributed import DistributedContext
from .evaluate import autocast

__all__ = ["LayerProbe", "first_images", "layer_statistics", "scalars"]

# A gate's value is saturated if it is below the first or above the second of these.
SATURATION = (0.05, 0.95)


class LayerProbe:
    """Measures the EMAX layers of a run on the same validation images after every epoch.

    Args:
        config: The configuration of the run.
        context: The distributed context of the run.
        loader: The loader of validation images, whose first ones are used; None measures nothing.
    """

    def __init__(self, config: TrainConfig, context: DistributedContext, loader: Any) -> None:
        self.config, self.context, self.loader = config, context, loader
        self._images: Tensor | None = None

    def measure(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return `layer_statistics` of the model; empty without images or EMAX layers."""
        if self.loader is None or not any(isinstance(m, EMAX) for m in model.modules()):
            return {}
        if self._images is None:
            images = first_images(self.loader).to(self.context.device)
            if self.config.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            self._images = images
        with autocast(self.context, bool(self.config.amp), self.config.amp_dtype):
            return layer_statistics(model, self._images)


def first_images(loader: Any, count: int = 32) -> Tensor:
    """Return the first images [b, c, h, w] of the loader's first batch, at most `count`."""
    with torch.random.fork_rng(devices=[]):  # iterating over a loader draws a seed
        images, _ = next(iter(loader))
    return images[:count].clone()


@torch.no_grad()
def layer_statistics(model: nn.Module, images: Tensor) -> dict[str, dict[str, Any]]:
    """Measure every EMAX layer of the model on a batch.

    The model runs once, in eval mode; its mode, buffers and the random state are left as they were.

    Args:
        model: A model that is not scripted; EMAX layers are found at any depth.
        images: [b, c, h, w].

    Returns:
        A dict of statistics for each layer, by its qualified name (of the last call, if the model
        calls a layer several times):

        group_counts: The K candidate group counts, ascending.
        histogram: The number of images for which each candidate is the most probable, [K];
            it depends neither on the warm-up nor on a batch vote.
        gamma: The weight of the channel attention.
        residual_gate: Mean of |alpha| over the channels.
        spatial_saturation, channel_saturation, global_saturation: Fraction of the values of S
            [b, F, h, w], w_c [b, c] and w_g [b, c] that are below 0.05 or above 0.95.

        A layer without a channel gate or a global gate has no entries for that gate.
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
    """Flatten the statistics to `layer/name: number`; histograms become shares of the images."""
    result = {}
    for layer, values in layers.items():
        images = sum(values["histogram"])
        for count, chosen in zip(values["group_counts"], values["histogram"], strict=True):
            result[f"{layer}/groups_{count}"] = chosen / images
        result |= {f"{layer}/{k}": v for k, v in values.items() if not isinstance(v, list)}
    return result
