"""`python -m emax_timm.benchmark.compiled_kernels`: what torch.compile makes of an EMAX layer.

Prints the loops over memory that Inductor schedules for the forward and for the backward pass with
the bytes each has to move, and how long the kernels that hold them take. `docs/kernels.md` explains
the list.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import ATTENTIONS
from ..ops import use_backend
from ..runner import command
from ..tables import heading, row
from ..training.config import AT_LEAST_0, AT_LEAST_1, from_mapping, option, parse_settings
from ..training.distributed import find_device
from .layers import SHAPES
from .methods import differ_in_groups

__all__ = ["Loop", "compiled_kernels", "kernel_times", "scheduled_loops"]

LEAST = 0.2
"""The report sums up the loops that move fewer bytes than this fraction of those of x."""


class Loop(NamedTuple):
    """A loop that Inductor has scheduled, or a library call."""

    computes: str
    """The names of the operations it performs."""
    reads: float
    """Bytes read, relative to those of x; a buffer counts once, however often it is read."""
    writes: float
    """Bytes written, relative to those of x."""


def scheduled_loops(layer: nn.Module, x: Tensor) -> dict[str, list[Loop]]:
    """Compile a layer anew and list the loops that Inductor schedules.

    Args:
        layer: The layer to compile.
        x: Its input, [b, c, h, w].

    Returns:
        The loops of the `forward` pass in evaluation, and of the passes `forward, training` and
        `backward`.
    """
    from torch._inductor import config
    from torch._inductor.virtualized import V

    size = x.numel() * x.element_size()
    found: dict[str, list[Loop]] = {}

    def note(nodes: list[Any]) -> list[Any]:
        kind = "backward" if V.graph.is_backward else "forward, training"
        name = "forward" if V.graph.is_inference else kind
        found[name] = [loop for node in nodes for loop in _loops(node, size)]
        return nodes

    with config.patch(force_disable_caches=True, _post_fusion_custom_pass=note):
        with torch.no_grad():
            _compiled(layer.eval())(x)
        out = _compiled(layer.train())(x.detach().requires_grad_())
        out.backward(torch.ones_like(out))
    return found


def _compiled(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    torch.compiler.reset()
    return torch.compile(layer, dynamic=False, fullgraph=True)


def _loops(node: Any, size: int) -> Iterator[Loop]:
    reads = sum(node.get_read_write_buffer_accesses(True, False).values())
    writes = sum(node.get_read_write_buffer_accesses(False, True).values())
    names = {
        str(origin.target).removeprefix("aten.").removesuffix(".default")
        for part in node.get_nodes()
        if part.node is not None
        for origin in part.node.get_origins()
    }
    if reads + writes:
        yield Loop(" ".join(sorted(names)), reads / size, writes / size)


def kernel_times(layer: nn.Module, x: Tensor, rounds: int) -> dict[str, list[tuple[str, float]]]:
    """Time the kernels and library calls of a compiled layer with torch's profiler.

    Args:
        layer: The layer to compile.
        x: Its input, [b, c, h, w].
        rounds: How many calls are averaged.

    Returns:
        Names and seconds per call of the layer, longest first, for `forward` in evaluation and
        `forward + backward` in training.
    """
    from torch._inductor import config

    activities = [torch.profiler.ProfilerActivity.CPU]
    if x.is_cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    found = {}
    with config.patch({"cpp.enable_kernel_profile": True}):
        for name in ("forward", "forward + backward"):
            training = name != "forward"
            compiled = _compiled(layer.train(training))
            x = x.detach().requires_grad_(training)

            def call(compiled: Any = compiled, x: Tensor = x, training: bool = training) -> None:
                with torch.set_grad_enabled(training):
                    out = compiled(x)
                if training:
                    out.backward(torch.ones_like(out))

            call()
            call()
            with torch.profiler.profile(activities=activities) as profile:
                for _ in range(rounds):
                    call()
            times = [
                (event.key, (event.self_device_time_total or event.self_cpu_time_total) / 1e6)
                for event in profile.key_averages()
            ]
            found[name] = sorted(
                ((key, seconds / rounds) for key, seconds in times if _is_kernel(key)),
                key=lambda entry: -entry[1],
            )
    return found


def _is_kernel(key: str) -> bool:
    return "_fused_" in key or key in ("aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm")


@dataclass
class CompiledKernelsConfig:
    """Print the loops that torch.compile makes of an EMAX layer, and how long its kernels take."""

    shape: list[int] = option(
        list(SHAPES[1]),
        "batch, channels, height and width of the input",
        nargs=4,
        bounds=AT_LEAST_1,
        metavar="N",
    )
    channels_last: bool = option(False, "take the input in channels_last memory format")
    device: str = option("cpu", "device to compile for: cpu, cuda, …")
    rounds: int = option(
        10, "calls that the times are averaged over; 0 for no times", bounds=AT_LEAST_0
    )


@command("python -m emax_timm.benchmark.compiled_kernels")
def compiled_kernels(argv: Sequence[str], prog: str) -> int:
    """Print the loops and the kernel times of EMAX for one shape, and return the exit status."""
    settings = parse_settings(CompiledKernelsConfig, argv, prog)
    config = from_mapping(CompiledKernelsConfig, settings, "the command line")
    device = find_device(config.device)
    torch.manual_seed(0)
    layer = ATTENTIONS["emax"](config.shape[1]).to(device)
    differ_in_groups(layer)
    x = torch.randn(*config.shape, device=device)
    if config.channels_last:
        x = x.to(memory_format=torch.channels_last)
    with use_backend("portable"):
        for name, loops in scheduled_loops(layer, x).items():
            print("\n".join(_report(name, loops)))
        if config.rounds:
            for name, times in kernel_times(layer, x, config.rounds).items():
                lines = [row([key, f"{1000 * seconds:.3f}"]) for key, seconds in times]
                print("\n".join([*heading([f"{name}, kernel", "ms"]), *lines, ""]))
    return 0


def _report(name: str, loops: list[Loop]) -> list[str]:
    large = [loop for loop in loops if loop.reads + loop.writes >= LEAST]
    small = [loop for loop in loops if loop.reads + loop.writes < LEAST]
    rest = Loop(f"{len(small)} smaller ones", *(_sums(small)))
    total = Loop("all", *_sums(loops))
    lines = heading([f"{name}, bytes over x", "read", "written"])
    for loop in (*large, rest, total):
        lines.append(row([loop.computes, f"{loop.reads:.2f}", f"{loop.writes:.2f}"]))
    return [*lines, ""]


def _sums(loops: list[Loop]) -> tuple[float, float]:
    return sum(loop.reads for loop in loops), sum(loop.writes for loop in loops)


if __name__ == "__main__":
    sys.exit(compiled_kernels())
