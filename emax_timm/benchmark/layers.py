"""`emax benchmark modules`: time and memory of attention layers, compared in the same run."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import ATTENTIONS, EMAX
from ..ops import explain, reference, use_backend
from ..tables import heading, row
from .bounds import Bound, verdict
from .timing import (
    Measured,
    conditions,
    described,
    interleaved,
    mean_ratio,
    milliseconds,
)

__all__ = [
    "IN_CPP",
    "METHODS",
    "PASSES",
    "SAVED",
    "SHAPES",
    "available",
    "computed",
    "cpp_serves",
    "differ_in_groups",
    "has_factor",
    "measure_modules",
    "measure_shape",
    "random_features",
    "report_modules",
    "saved_bytes",
]


class NaiveEMAX(EMAX):
    """EMAX by its reference formulas, the baseline for the backends."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.emax(x, self.parts())[0]


# Batch, channels, height and width of ResNet-50's four stages at 224 x 224.
SHAPES = [(8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7)]
LAYERS: dict[str, Callable[..., nn.Module]] = {
    "copy": lambda channels: Copy(),
    "naive EMAX": NaiveEMAX,
    "EMAX": ATTENTIONS["emax"],
    "EMA": ATTENTIONS["ema"],
    "SE": ATTENTIONS["se"],
    "ECA": ATTENTIONS["eca"],
    "CBAM": ATTENTIONS["cbam"],
    "CoordAttn": ATTENTIONS["coord"],
}
COMPILED = ("EMAX", "SE", "CBAM", "CoordAttn")
IN_CPP = ("EMAX", "EMA")
# The methods to measure: every layer in PyTorch, and some of them compiled or in C++ too.
METHODS = [
    f"{name}{mode}"
    for name in LAYERS
    for mode, names in (("", LAYERS), (", compiled", COMPILED), (", C++", IN_CPP))
    if name in names
]
PASSES = ("forward", "forward + backward")
SAVED = "saved activations"


class Copy(nn.Module):
    """One read and one write of x: a lower bound for the time of every layer."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


# A bound on `SAVED` is one on the bytes kept for the backward pass, relative to those of x.
BOUNDS = [
    Bound("forward", "EMAX, C++", "naive EMAX", 1 / 8),
    Bound("forward", "EMAX, C++", "SE", 1.5),
    Bound("forward", "EMAX, C++", "CBAM", 0.6),
    Bound("forward", "EMAX, C++", "CBAM, compiled", 1.0),
    Bound("forward + backward", "EMAX, C++", "naive EMAX", 1 / 6),
    Bound("forward + backward", "EMAX, C++", "SE", 1.6),
    Bound("forward + backward", "EMAX, C++", "CBAM", 0.6),
    Bound("forward + backward", "EMAX, C++", "CBAM, compiled", 1.0),
    Bound(SAVED, "EMAX, C++", "x", 1.2),
    Bound("forward", "EMAX, compiled", "naive EMAX", 1 / 4.5),
    Bound("forward", "EMAX, compiled", "SE", 2.8),
    Bound("forward", "EMAX, compiled", "CBAM", 1.2),
    Bound("forward + backward", "EMAX, compiled", "naive EMAX", 1 / 3),
    Bound("forward + backward", "EMAX, compiled", "CBAM", 0.9),
    Bound(SAVED, "EMAX, compiled", "x", 1.2),
    Bound("forward", "EMAX", "naive EMAX", 1 / 2),
]
# A bound holds for the geometric mean over the shapes; one shape may exceed it by this factor.
WORST_SHAPE = 1.5


def measure_modules(
    shapes: Sequence[tuple[int, ...]],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    methods: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Time every method on every shape: forward in eval mode, and both passes in training mode.

    Args:
        shapes: Sizes [b, c, h, w] of the inputs.
        rounds: How often each time is measured.
        device: The device of the inputs and the layers.
        dtype: Their dtype.
        memory_format: The memory format of the inputs.
        methods: The methods, of `METHODS`; None for all that are available.

    Returns:
        `times[passes][method][shape]`, seconds as in `Measured`, and `saved[method][shape]`, bytes
        kept for the backward pass relative to those of x.

    Raises:
        BackendError: If the C++ backend is requested, but is not built.
    """
    if methods is None:
        methods = available(METHODS, device, dtype)
    times: dict[str, dict[str, list[Measured]]] = {passes: {} for passes in PASSES}
    saved: dict[str, list[float]] = {}
    for shape in shapes:
        x = random_features(shape, device, dtype, memory_format)
        measured, kept = measure_shape(methods, x, rounds)
        for name in methods:
            saved.setdefault(name, []).append(kept[name] / (x.numel() * x.element_size()))
            for passes in PASSES:
                times[passes].setdefault(name, []).append(measured[passes][name])
    return {
        **conditions(device, dtype, memory_format, rounds),
        "shapes": [list(shape) for shape in shapes],
        "times": times,
        "saved": saved,
    }


def random_features(
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Draw a feature map [b, c, h, w] from the standard normal distribution."""
    return torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)


def measure_shape(
    methods: Sequence[str], x: Tensor, rounds: int, factor: int | None = None
) -> tuple[dict[str, dict[str, Measured]], dict[str, int]]:
    """Time methods on one input, and count the bytes that they keep for the backward pass.

    Args:
        methods: The methods, of `METHODS`.
        x: The input, [b, c, h, w].
        rounds: How often each time is measured.
        factor: The factor of the layers that have one; None for their default.

    Returns:
        `times[passes][method]`, seconds as in `Measured`, and the bytes by method.
    """
    torch.compiler.reset()
    layers = {name: _layer(name, x.shape[1], factor).to(x.device, x.dtype) for name in methods}
    saved = {
        name: computed(name, partial(saved_bytes, layer.train(), x))()
        for name, layer in layers.items()
    }
    times = {}
    for passes, make in zip(PASSES, (_forward, _both), strict=True):
        calls = {name: computed(name, make(layer, x)) for name, layer in layers.items()}
        times[passes] = interleaved(calls, rounds, x.device)
    return times, saved


def cpp_serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether the C++ backend serves tensors of this device and dtype in this process."""
    x = torch.empty(1, 1, 1, 1, device=device, dtype=dtype)
    return explain(x, EMAX(1, device=device).weights())["cpp"] is None


def available(methods: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Select the methods that can run here: those in C++ need the C++ backend."""
    served = cpp_serves(device, dtype)
    return [name for name in methods if served or "C++" not in name]


def has_factor(method: str) -> bool:
    """Tell whether a method has a `factor`, the upper bound of its number of channel groups."""
    return method.partition(", ")[0] in ("naive EMAX", "EMAX", "EMA")


def _layer(method: str, channels: int, factor: int | None) -> nn.Module:
    name, _, mode = method.partition(", ")
    options = {} if factor is None or not has_factor(method) else {"factor": factor}
    layer: Any = LAYERS[name](channels, **options)
    differ_in_groups(layer)
    if mode == "compiled":
        layer = torch.compile(layer, dynamic=False, fullgraph=True)
    return layer


def differ_in_groups(network: nn.Module) -> None:
    """Randomise the group controllers, so that samples choose different group counts."""
    for layer in network.modules():
        controller: Any = getattr(layer, "group_controller", None)
        if controller is not None:
            nn.init.normal_(controller.weight)
            nn.init.zeros_(controller.bias)


def computed(method: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Wrap a call to run with the backend that belongs to the method: C++ or portable."""
    backend = "cpp" if method.endswith("C++") else "portable"

    def run() -> Any:
        with use_backend(backend):
            return call()

    return run


def _forward(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Tensor:
        return layer(x)

    layer.eval()
    return call


def _both(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    x = x.detach().requires_grad_()
    gradient = torch.ones_like(x)
    inputs = [x, *layer.parameters()]

    def call() -> Any:
        return torch.autograd.grad(layer(x), inputs, gradient, allow_unused=True)

    layer.train()
    return call


def saved_bytes(layer: nn.Module, x: Tensor) -> int:
    """Count the bytes kept for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.detach().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    del out
    return sum(sizes.values())


def report_modules(found: dict[str, Any]) -> str:
    """Format the result of `measure_modules` as Markdown."""
    shapes = ["x".join(map(str, shape)) for shape in found["shapes"]]
    lines: list[str] = []
    for passes, times in found["times"].items():
        peers = [name for name in ("naive EMAX", "SE", "CBAM") if name in times]
        saved = [SAVED + " / x"] if passes == PASSES[1] else []
        head = [f"{passes}, ms", *shapes, *(f"/ {peer}" for peer in peers), *saved]
        lines += heading(head)
        for name, measured in times.items():
            cells = [name, *map(milliseconds, measured)]
            cells += [f"{mean_ratio(measured, times[peer]):.2f}" for peer in peers]
            # Some methods save nothing, and geometric_mean refuses zeros.
            cells += [f"{math.prod(found['saved'][name]) ** (1 / len(shapes)):.2f}" for _ in saved]
            lines.append(row(cells))
        lines.append("")
    held = [_verdict(bound, ratios) for bound in BOUNDS if (ratios := _ratios(bound, found))]
    if held:
        lines += [*heading(["bound", "at most", "mean", "worst shape", ""]), *held, ""]
    lines.append(
        f"Medians of {found['rounds']} interleaved rounds, quartiles in brackets; ratios and "
        f"{SAVED} are geometric means over the shapes. {found['dtype']}, "
        f"{found['memory_format']}; {described(found['machine'])}."
    )
    return "\n".join(lines)


def _ratios(bound: Bound, found: dict[str, Any]) -> list[float]:
    """Return the ratio that a bound limits, for each shape; empty if it was not measured."""
    if bound.what == SAVED:
        return found["saved"].get(bound.method, [])
    times = found["times"][bound.what]
    pairs = zip(times.get(bound.method, []), times.get(bound.over, []), strict=False)
    return [ours.median / theirs.median for ours, theirs in pairs]


def _verdict(bound: Bound, ratios: list[float]) -> str:
    mean, worst = geometric_mean(ratios), max(ratios)
    holds = mean <= bound.ratio and worst <= WORST_SHAPE * bound.ratio
    return verdict(str(bound), bound.ratio, [mean, worst], holds)
