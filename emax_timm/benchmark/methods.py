"""The methods that benchmarks compare: a layer, and how it is computed, as in "EMAX, C++"."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..attention import EMAX
from ..ops import explain, use_backend

__all__ = [
    "COMPILED",
    "CPP",
    "GRAPH",
    "TRITON",
    "Tensors",
    "autocast",
    "available",
    "backend_serves",
    "compiled",
    "computed",
    "differ_in_groups",
    "split_method",
    "works",
]

CPP, TRITON, COMPILED, GRAPH = "C++", "Triton", "compiled", "CUDA graph"
BACKENDS = {CPP: "cpp", TRITON: "triton"}
"""The backends that methods ask for by name; all others are measured with the portable one."""


class Tensors(NamedTuple):
    """The device, dtype and layout of the inputs."""

    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    amp: torch.dtype | None = None
    """The dtype of mixed precision: weights stay in `dtype`, a layer's input has this one."""


def split_method(method: str) -> tuple[str, list[str]]:
    """Split the name of a method into that of its layer and the modes in which it is computed."""
    name, *modes = method.split(", ")
    return name, modes


def backend_serves(mode: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether the backend of a mode serves tensors of this device and dtype here."""
    if mode == TRITON and device.type != "cuda":
        return False  # Triton's interpreter may serve on CPUs, but its speed says nothing
    x = torch.empty(8, 64, 8, 8, device=device, dtype=dtype)
    reasons = explain(x, EMAX(64, device=device).weights())
    return reasons.get(BACKENDS[mode], "there is no such backend") is None


def available(methods: Sequence[str], device: torch.device, dtype: torch.dtype) -> list[str]:
    """Select the methods whose backends can serve here."""
    served = {mode: backend_serves(mode, device, dtype) for mode in BACKENDS}
    return [
        name for name in methods if all(served.get(mode, True) for mode in split_method(name)[1])
    ]


def works(method: str, call: Callable[[], Any]) -> bool:
    """Tell whether a call of a method succeeds; if not, say on stderr why it is left out."""
    try:
        call()
    except Exception as error:  # compilers of kernels may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"{method} is left out: {reason}", file=sys.stderr)
        return False
    return True


def computed(method: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """Wrap a call to run with the backend that belongs to the method, by default the portable."""
    _, modes = split_method(method)
    backend = next((BACKENDS[mode] for mode in modes if mode in BACKENDS), "portable")
    graph = GRAPH in modes

    def run() -> Any:
        if graph:  # what the call before has returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        with use_backend(backend):
            return call()

    return run


def compiled(module: nn.Module, method: str, **options: Any) -> Any:
    """Compile a module if the name of the method says so; further options are torch.compile's."""
    _, modes = split_method(method)
    if GRAPH in modes:
        return torch.compile(module, dynamic=False, mode="reduce-overhead", **options)
    if COMPILED in modes:
        return torch.compile(module, dynamic=False, **options)
    return module


@contextlib.contextmanager
def autocast(device: torch.device, amp: torch.dtype | None) -> Iterator[None]:
    """Run a `with` block in mixed precision, if `amp` is a dtype."""
    with torch.autocast(device.type, dtype=amp, enabled=amp is not None):
        yield


def differ_in_groups(network: nn.Module) -> None:
    """Randomise the group controllers, so that samples choose different group counts."""
    for layer in network.modules():
        controller: Any = getattr(layer, "group_controller", None)
        if controller is not None:
            nn.init.normal_(controller.weight)
            nn.init.zeros_(controller.bias)
