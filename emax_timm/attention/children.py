"""Checks that a backend may compute without calling the children of a layer, and the fallback.

A backend reads the weights of the children of EMAX and EMA and computes what they would compute.
That is right only as long as a call of the child would give the same. A child that was quantised,
pruned, parametrised, wrapped or replaced, or that has hooks, must be called: then the layer
computes by the formulas in `ops/reference.py` and calls its children.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import EMAXMaps, bias_of
from ..ops.dispatch import (
    check_input,
    check_mask,
    draw_noise,
    outside_autocast,
    report_fallback,
)
from ..ops.reference import Parts, emax

__all__ = [
    "CONVOLUTIONS",
    "SqueezeExcite",
    "by_children",
    "changed_child",
    "refuse_scripting",
    "without_exports",
]


CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
"""The classes of convolutions by the number of their spatial axes."""
POOLS: dict[int, Any] = {
    1: nn.AdaptiveAvgPool1d,
    2: nn.AdaptiveAvgPool2d,
    3: nn.AdaptiveAvgPool3d,
}
_CONVOLUTIONS = tuple(CONVOLUTIONS.values())


class SqueezeExcite(nn.Sequential):
    """A squeeze-and-excite gate (arXiv 1709.01507) that is returned and not applied.

    It maps [b, c, h, w] to a gate [b, c, 1, 1] in (0, 1).

    Args:
        channels: Number of input channels c.
        hidden: Number of hidden units r.
        dims: Number of spatial axes of the input: 1, 2 or 3.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
    """

    def __init__(self, channels: int, hidden: int, dims: int = 2, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        convolution = CONVOLUTIONS[dims]
        super().__init__(
            POOLS[dims](1),
            convolution(channels, hidden, kernel_size=1, **dd),
            nn.ReLU(),
            convolution(hidden, channels, kernel_size=1, **dd),
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
            if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
                layer.reset_parameters()


# The classes of children by the number of spatial axes of a layer, and by their names.
_KINDS = {
    dims: {
        "conv1x1": convolution,
        "conv3x3": convolution,
        "gn": nn.GroupNorm,
        "group_controller": nn.Linear,
        "channel_gate": SqueezeExcite,
        "global_attn": SqueezeExcite,
    }
    for dims, convolution in CONVOLUTIONS.items()
}
_GATE = {
    dims: {
        "0": POOLS[dims],
        "1": convolution,
        "2": nn.ReLU,
        "3": convolution,
        "4": nn.Sigmoid,
    }
    for dims, convolution in CONVOLUTIONS.items()
}


def changed_child(attention: Any) -> str | None:
    """Name the first child of an EMAX or EMA layer that must be called, and say why.

    Hooks that are registered for all modules at once, as by profilers, do not count.

    Returns:
        The name of the child and how it differs, or None if a backend may compute the layer.
    """
    kinds, gate = _KINDS[attention.dims], _GATE[attention.dims]
    for name, child in attention._modules.items():
        if child is None:
            continue
        if not _is_untouched(child, kinds.get(name)):
            return f"{name} {_change(child, kinds.get(name))}"
        if type(child) is SqueezeExcite:
            if len(child._modules) != len(gate):
                return f"{name} has other layers"
            for key, layer in child._modules.items():
                if not _is_untouched(layer, gate.get(key)):
                    return f"{name}.{key} {_change(layer, gate.get(key))}"
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
    if kind in _CONVOLUTIONS:
        return _is_usual_convolution(own)
    if kind is nn.Linear:
        return own["_parameters"].get("bias", child) is not None
    return kind is not nn.GroupNorm or (own["affine"] and own["num_groups"] == own["num_channels"])


def _is_usual_convolution(own: dict[str, Any]) -> bool:
    sides = own["kernel_size"]
    ones = (1,) * len(sides)
    return (
        own["padding"] == (sides[0] // 2,) * len(sides)
        and own["stride"] == ones
        and own["dilation"] == ones
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


def by_children(
    x: Tensor, layer: Any, change: str, mask: Tensor | None = None
) -> tuple[Tensor, EMAXMaps]:
    """Compute the output and the attention maps of a layer by calls of its children.

    Args:
        x: The input, [b, c, ...].
        layer: An EMAX or EMA layer.
        change: The reason that `changed_child` gives for it.
        mask: Where sequences have tokens, [b, l], or None. Each is computed by itself.

    Returns:
        The output, which has the shape, dtype and memory format of x, and the maps.

    Raises:
        BackendError: If a backend was requested that does not call children.
        ValueError: If x or the mask does not have its shape, or the batch votes on sequences with
            a mask.
    """
    report_fallback(change)
    check_input(x, layer.channels, layer.dims)
    check_mask(x, mask)
    return _by_children(x, layer.parts(), layer.training, mask)


@outside_autocast
def _by_children(
    x: Tensor, parts: Parts, training: bool, mask: Tensor | None
) -> tuple[Tensor, EMAXMaps]:
    noise = draw_noise(x, parts.config.candidates, training)
    # A child takes inputs in the dtype of its parameters; a quantised one, without any, in float32.
    children = [part for part in parts if isinstance(part, nn.Module)]
    own = [p.dtype for part in children for p in part.parameters() if p.is_floating_point()]
    dtype = own[0] if own else torch.float32
    compute = emax if mask is None else partial(_sequence_by_sequence, mask=mask)
    out, maps = compute(x.to(dtype), parts, noise if noise is None else noise.to(dtype))
    return out.to(x.dtype, memory_format=_layout(x)), maps


def _sequence_by_sequence(
    x: Tensor, parts: Parts, noise: Tensor | None, mask: Tensor
) -> tuple[Tensor, EMAXMaps]:
    """Compute each sequence from its tokens alone, because the children know no mask."""
    if parts.config.batch_vote:
        raise ValueError("with a mask, batch_vote needs the children that the layer was made with")
    outputs, found = [], []
    for number, tokens in enumerate(mask):
        place, sample = tokens.nonzero().squeeze(1), x[number : number + 1]
        used = len(place)
        # One without tokens has the maps of zeros, as in a backend, and no spatial one.
        alone = sample[:, :, place] if used else x.new_zeros(1, x.shape[1], 1)
        out, maps = emax(alone, parts, noise if noise is None else noise[number : number + 1])
        outputs.append(sample.index_copy(2, place, out[:, :, :used]))
        empty = out.new_zeros(1, parts.config.groups, len(tokens))
        spatial = empty.index_copy(2, place, maps.spatial[:, :, :used])
        found.append(maps._replace(spatial=spatial))
    return torch.cat(outputs), EMAXMaps(*map(torch.cat, zip(*found, strict=True)))


def _layout(x: Tensor) -> torch.memory_format:
    """Return the memory format of x, contiguous unless the channels come last."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    last = layouts.get(x.ndim, torch.contiguous_format)
    return (
        torch.contiguous_format
        if x.is_contiguous() or not x.is_contiguous(memory_format=last)
        else last
    )


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
