"""`emax benchmark modules`: time and memory of attention layers, compared in the same run."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .compared_layers import LAYERS, LAYERS_BY_DIMS
from .gpu import Kernels, kernels, peak_bytes
from .methods import (
    Tensors,
    autocast,
    available,
    compiled,
    computed,
    differ_in_groups,
    split_method,
    works,
)
from .timing import Measured, conditions, interleaved

__all__ = [
    "GPU_SHAPES",
    "IN_CPP",
    "LAYERS",
    "LAYERS_BY_DIMS",
    "METHODS",
    "PASSES",
    "SAVED",
    "SHAPES",
    "Costs",
    "has_factor",
    "measure_modules",
    "measure_shape",
    "methods_of",
    "random_features",
    "saved_bytes",
]


# Batch, channels, height and width of ResNet-50's four stages at 224 x 224.
SHAPES = [(8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7)]
GPU_SHAPES = [(128, *shape[1:]) for shape in SHAPES]
# Sequences of a text CNN, and the last three stages of a video ResNet at 16 x 112 x 112.
SHAPES_BY_DIMS = {
    1: [(16, 128, 512), (16, 256, 256), (16, 512, 128)],
    2: SHAPES,
    3: [(2, 128, 8, 28, 28), (2, 256, 4, 14, 14), (2, 512, 2, 7, 7)],
}
COMPILED = ("EMAX", "SE", "CBAM", "CoordAttn")
IN_CPP = ("EMAX", "EMA")
# The methods to measure: every layer in PyTorch, and some of them compiled or in another backend.
MODES = {
    "": tuple(LAYERS),
    ", compiled": COMPILED,
    ", C++": IN_CPP,
    ", Triton": ("EMAX", "EMA"),
    ", Triton, compiled": ("EMAX",),
}
METHODS = [f"{name}{mode}" for name in LAYERS for mode, names in MODES.items() if name in names]
# On a GPU the naive formulas are far too slow, and compiling the portable backend takes minutes.
GPU_METHODS = [
    *("copy", "SE", "CBAM", "CoordAttn", "EMA", "EMA, Triton", "EMAX", "EMAX, Triton"),
]
GPU_ROUNDS = 7
PASSES = ("forward", "forward + backward")
SAVED = "saved activations"


def methods_of(dims: int) -> list[str]:
    """Return the names of the methods that can be measured on inputs with so many axes."""
    return METHODS if dims == 2 else [*LAYERS_BY_DIMS[dims], "EMAX, compiled", "SE, compiled"]


class Costs(NamedTuple):
    """What methods cost on one input; the keys are methods, those of `times` and `gpu` passes."""

    times: dict[str, dict[str, Measured]]
    """Wall time per call, in seconds."""
    saved: dict[str, int]
    """Bytes that are kept for the backward pass."""
    gpu: dict[str, dict[str, Kernels]]
    """What the GPU does in a call; empty without a GPU."""
    peak: dict[str, int]
    """Bytes that both passes allocate at most; empty without a GPU."""


def measure_modules(
    shapes: Sequence[tuple[int, ...]] | None,
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    methods: Sequence[str] | None = None,
    amp: torch.dtype | None = None,
    dims: int = 2,
) -> dict[str, Any]:
    """Time every method on every shape: forward in eval mode, and both passes in training mode.

    Args:
        shapes: Sizes [b, c, ...] of the inputs; None for those of ResNet-50, or of
            `SHAPES_BY_DIMS`.
        rounds: How often each time is measured.
        device: The device of the inputs and the layers.
        dtype: Their dtype.
        memory_format: The memory format of the inputs.
        methods: The methods, of `METHODS`; None for the usual ones that are available.
        amp: The dtype of the inputs in mixed precision, or None.
        dims: The number of axes of the inputs beside batch and channels.

    Returns:
        `times[passes][method][shape]`, seconds as in `Measured`, and `saved[method][shape]`, bytes
        kept for the backward pass relative to those of x. From a GPU also
        `gpu[passes][method][shape]` as in `Kernels`, and `peak[method][shape]`, bytes.

    Raises:
        BackendError: If a backend is requested that cannot serve.
    """
    gpu = device.type == "cuda"
    if shapes is None:
        shapes = GPU_SHAPES if gpu and dims == 2 else SHAPES_BY_DIMS[dims]
    if methods is None:
        usual = list(LAYERS_BY_DIMS[dims]) if dims != 2 else GPU_METHODS if gpu else METHODS
        methods = available(usual, device, amp or dtype)
        if gpu:
            methods = _working(methods, shapes, Tensors(device, dtype, memory_format, amp))
    found: dict[str, Any] = {"times": {passes: {} for passes in PASSES}, "saved": {}}
    if gpu:
        found |= {"gpu": {passes: {} for passes in PASSES}, "peak": {}}
    for shape in shapes:
        x = random_features(shape, device, amp or dtype, memory_format)
        costs = measure_shape(methods, x, rounds, dtype=dtype, amp=amp, gpu=gpu)
        for name in methods:
            size = x.numel() * x.element_size()
            found["saved"].setdefault(name, []).append(costs.saved[name] / size)
            for passes in PASSES:
                found["times"][passes].setdefault(name, []).append(costs.times[passes][name])
                if gpu:
                    found["gpu"][passes].setdefault(name, []).append(costs.gpu[passes][name])
            if gpu:
                found["peak"].setdefault(name, []).append(costs.peak[name])
    return {
        **conditions(device, dtype, memory_format, rounds, amp),
        "shapes": [list(shape) for shape in shapes],
        **found,
    }


def _working(
    methods: Sequence[str], shapes: Sequence[tuple[int, ...]], tensors: Tensors
) -> list[str]:
    """Select the methods that compute both passes on every shape."""
    device, dtype, layout, amp = tensors

    def both(name: str, shape: Sequence[int]) -> None:
        layer = _layer(name, shape, None).to(device, dtype)
        x = random_features(shape, device, amp or dtype, layout)
        computed(name, _both(layer, x, amp))()
        torch.cuda.synchronize(device)

    return [
        name for name in methods if all(works(name, partial(both, name, shape)) for shape in shapes)
    ]


def random_features(
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """Draw features [b, c, ...] from the standard normal distribution."""
    return torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)


def measure_shape(
    methods: Sequence[str],
    x: Tensor,
    rounds: int,
    factor: int | None = None,
    dtype: torch.dtype | None = None,
    amp: torch.dtype | None = None,
    gpu: bool = False,
) -> Costs:
    """Time methods on one input, and count the bytes that they keep for the backward pass.

    Args:
        methods: The methods, of `METHODS`.
        x: The input, [b, c, ...].
        rounds: How often each time is measured.
        factor: The factor of the layers that have one; None for their default.
        dtype: The dtype of the layers; None for that of x.
        amp: The dtype of mixed precision, or None.
        gpu: Whether to measure kernels and peak memory too, which needs x on a GPU.
    """
    torch.compiler.reset()
    layers = {
        name: _layer(name, x.shape, factor).to(x.device, dtype or x.dtype) for name in methods
    }
    costs = Costs({}, {}, {}, {})
    for name, layer in layers.items():
        call = computed(name, partial(saved_bytes, layer.train(), x, amp))
        costs.saved[name] = call()
    for passes, make in zip(PASSES, (_forward, _both), strict=True):
        calls = {name: computed(name, make(layer, x, amp)) for name, layer in layers.items()}
        costs.times[passes] = interleaved(calls, rounds, x.device)
        if gpu:
            costs.gpu[passes] = kernels(calls, min(rounds, GPU_ROUNDS), x.device)
            costs.peak.update({name: peak_bytes(call, x.device) for name, call in calls.items()})
    return costs


def has_factor(method: str) -> bool:
    """Tell whether a method has a `factor`, the upper bound of its number of channel groups."""
    return split_method(method)[0] in ("naive EMAX", "EMAX", "EMA")


def _layer(method: str, shape: Sequence[int], factor: int | None) -> nn.Module:
    options = {} if factor is None or not has_factor(method) else {"factor": factor}
    layer = LAYERS_BY_DIMS[len(shape) - 2][split_method(method)[0]](shape[1], **options)
    differ_in_groups(layer)
    return compiled(layer, method, fullgraph=True)


def _forward(layer: nn.Module, x: Tensor, amp: torch.dtype | None) -> Callable[[], Any]:
    @torch.no_grad()
    def call() -> Tensor:
        with autocast(x.device, amp):
            return layer(x)

    layer.eval()
    return call


def _both(layer: nn.Module, x: Tensor, amp: torch.dtype | None) -> Callable[[], Any]:
    x = x.detach().requires_grad_()
    gradient = torch.ones_like(x)
    inputs = [x, *layer.parameters()]

    def call() -> Any:
        with autocast(x.device, amp):
            out = layer(x)
        return torch.autograd.grad(out, inputs, gradient, allow_unused=True)

    layer.train()
    return call


def saved_bytes(layer: nn.Module, x: Tensor, amp: torch.dtype | None = None) -> int:
    """Count the bytes kept for the backward pass, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = x.detach().requires_grad_()
    with (
        autocast(x.device, amp),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        out = layer(x)
    del out
    return sum(sizes.values())
