"""Checks that a backend may compute without calling the children of a layer, and the fallback.

A backend reads the weights of the children of EMAX and EMA and computes what they would compute.
That is right only as long as a call of the child would give the same. A child that was quantised,
pruned, parametrised, wrapped or replaced, or that has hooks, must be called: then the layer
computes by the formulas in `ops/reference.py` and calls its children.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops import EMAXMaps, bias_of
from ..ops.dispatch import check_input, draw_noise, outside_autocast, report_fallback
from ..ops.reference import Parts, emax

__all__ = ["SqueezeExcite", "by_children", "changed_child", "refuse_scripting", "without_exports"]


class SqueezeExcite(nn.Sequential):
    """A squeeze-and-excite gate (arXiv 1709.01507) that is returned and not applied.

    It maps [b, c, h, w] to a gate [b, c, 1, 1] in (0, 1).

    Args:
        channels: Number of input channels c.
        hidden: Number of hidden units r.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, channels: int, hidden: int, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, hidden, kernel_size=1, **dd),
            nn.ReLU(),
            nn.Conv2d(hidden, channels, kernel_size=1, **dd),
            nn.Sigmoid(),
        )

    def weights(self) -> list[Tensor | None]:
        """Return weight and bias of the reducing, then of the expanding convolution."""
        # By name, because `self[1]` would search the list in every forward pass.
        reduce, expand = getattr(self, "1"), getattr(self, "3")
        return [
            reduce.weight,
            bias_of(reduce.weight, reduce.bias),
            expand.weight,
            bias_of(expand.weight, expand.bias),
        ]

    def reset_parameters(self) -> None:
        """Initialise the convolutions by torch's defaults."""
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                layer.reset_parameters()


_KINDS = {
    "conv1x1": nn.Conv2d,
    "conv3x3": nn.Conv2d,
    "gn": nn.GroupNorm,
    "group_controller": nn.Linear,
    "channel_gate": SqueezeExcite,
    "global_attn": SqueezeExcite,
}
_GATE = {
    "0": nn.AdaptiveAvgPool2d,
    "1": nn.Conv2d,
    "2": nn.ReLU,
    "3": nn.Conv2d,
    "4": nn.Sigmoid,
}


def changed_child(attention: nn.Module) -> str | None:
    """Name the first child of an EMAX or EMA layer that must be called, and say why.

    Hooks that are registered for all modules at once, as by profilers, do not count.

    Returns:
        The name of the child and how it differs, or None if a backend may compute the layer.
    """
    for name, child in attention._modules.items():
        if child is None:
            continue
        if not _is_untouched(child, _KINDS.get(name)):
            return f"{name} {_change(child, _KINDS.get(name))}"
        if type(child) is SqueezeExcite:
            if len(child._modules) != len(_GATE):
                return f"{name} has other layers"
            for key, layer in child._modules.items():
                if not _is_untouched(layer, _GATE.get(key)):
                    return f"{name}.{key} {_change(layer, _GATE.get(key))}"
    return None


def _is_untouched(child: Any, kind: type[nn.Module] | None) -> bool:
    """Say whether a call of the child would do what its class does, with the usual arguments.

    Every forward pass asks this 16 times, so it reads the dictionary of the instance, which takes a
    third of the time that attributes of `nn.Module` take.
    """
    if type(child) is not kind:
        return False
    own = child.__dict__
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return False
    if own["_backward_hooks"] or own["_backward_pre_hooks"] or "forward" in own:
        return False
    if kind is nn.Conv2d:
        return _is_usual_convolution(own)
    if kind is nn.Linear:
        return own["_parameters"].get("bias", child) is not None
    return kind is not nn.GroupNorm or (own["affine"] and own["num_groups"] == own["num_channels"])


def _is_usual_convolution(own: dict[str, Any]) -> bool:
    side = own["kernel_size"][0]
    return (
        own["padding"] == (side // 2, side // 2)
        and own["stride"] == (1, 1)
        and own["dilation"] == (1, 1)
        and own["groups"] == 1
        and own["padding_mode"] == "zeros"
        and own["_parameters"].get("bias", own) is not None
    )


def _change(child: Any, kind: type[nn.Module] | None) -> str:
    """Say for the log how a child that is not untouched differs."""
    if type(child) is not kind:
        return f"is a {type(child).__name__}"
    if "forward" in child.__dict__:
        return "has another forward"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(child, name) for name in hooks):
        return "has hooks"
    return f"is another {type(child).__name__} than EMAX's"


def by_children(x: Tensor, layer: Any, change: str) -> tuple[Tensor, EMAXMaps]:
    """Compute the output and the attention maps of a layer by calls of its children.

    Args:
        x: The input, [b, c, h, w].
        layer: An EMAX or EMA layer.
        change: The reason that `changed_child` gives for it.

    Returns:
        The output, which has the shape, dtype and memory format of x, and the maps.

    Raises:
        BackendError: If a backend was requested that does not call children.
        ValueError: If x does not have the shape [b, c, h, w].
    """
    report_fallback(change)
    check_input(x, layer.channels)
    return _by_children(x, layer.parts(), layer.training)


@outside_autocast
def _by_children(x: Tensor, parts: Parts, training: bool) -> tuple[Tensor, EMAXMaps]:
    noise = draw_noise(x, parts.config.candidates, training)
    # A child takes inputs in the dtype of its parameters; a quantised one, without any, in float32.
    children = [part for part in parts if isinstance(part, nn.Module)]
    own = [p.dtype for part in children for p in part.parameters() if p.is_floating_point()]
    dtype = own[0] if own else torch.float32
    out, maps = emax(x.to(dtype), parts, noise if noise is None else noise.to(dtype))
    layout = torch.channels_last if _is_channels_last(x) else torch.contiguous_format
    return out.to(x.dtype, memory_format=layout), maps


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def refuse_scripting(attention: nn.Module) -> nn.Module:
    """Return the layer itself for `torch.jit.script`, unless its children must be called.

    Raises:
        RuntimeError: If they must be called, which a scripted layer does not do.
    """
    change = changed_child(attention)
    if change is not None:
        kind = type(attention).__name__
        raise RuntimeError(f"{kind} cannot be scripted: its {change}; torch.jit.trace can do it")
    return attention


def without_exports(attention: nn.Module, names: list[str]) -> list[str]:
    """Return the names of a layer's attributes that torch.jit.trace may look at.

    Tracing compiles the methods that are marked for TorchScript, and these would read the weights
    of children that must be called.
    """
    return names if changed_child(attention) is None else [n for n in names if n != "attention"]
