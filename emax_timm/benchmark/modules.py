"""`emax benchmark modules`: time and memory of attention layers, in one run against each other."""

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..attention import ATTENTIONS
from ..attention.reference import NaiveEMAX
from ..files import replace_file
from .timing import Measured, interleaved, machine, mean_ratio

__all__ = ["Bound", "benchmark", "measure_modules", "report_modules", "saved_bytes"]

# Batch, channels, height and width: ResNet-50's four stages at 224 x 224.
SHAPES = [(8, 256, 56, 56), (8, 512, 28, 28), (8, 1024, 14, 14), (8, 2048, 7, 7)]
LAYERS: dict[str, Callable[[int], nn.Module]] = {
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
PASSES = ("forward", "forward + backward")


class Copy(nn.Module):
    """A read and a write of x: what no layer can undercut."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Bound(NamedTuple):
    """A promise: the time of a system over that of another is at most `ratio`."""

    passes: str
    system: str
    over: str
    ratio: float


BOUNDS = [
    Bound("forward", "EMAX", "naive EMAX", 1 / 2),
    Bound("forward", "EMAX, compiled", "naive EMAX", 1 / 4.5),
    Bound("forward", "EMAX, compiled", "SE", 2.8),
    Bound("forward", "EMAX, compiled", "CBAM", 1.2),
    Bound("forward + backward", "EMAX, compiled", "naive EMAX", 1 / 3),
    Bound("forward + backward", "EMAX, compiled", "CBAM", 0.9),
]
# How much worse than its bound, which holds for the mean of the shapes, a single shape may be.
WORST_SHAPE = 1.5


def measure_modules(
    shapes: Sequence[tuple[int, ...]],
    rounds: int,
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    systems: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Time every layer on every shape, forward in eval mode and both passes in training mode.

    Returns:
        `times[passes][system][shape]`, seconds as in `Measured`, and `saved[system][shape]`, bytes
        kept for the backward pass over those of x.
    """
    times: dict[str, dict[str, list[Measured]]] = {passes: {} for passes in PASSES}
    saved: dict[str, list[float]] = {}
    for shape in shapes:
        torch.compiler.reset()
        layers = _layers(shape[1], device, dtype, systems)
        x = torch.randn(shape, device=device, dtype=dtype).to(memory_format=memory_format)
        for name, layer in layers.items():
            kept = saved_bytes(layer.train(), x)
            saved.setdefault(name, []).append(kept / (x.numel() * x.element_size()))
        for passes, make in zip(PASSES, (_forward, _both), strict=True):
            calls = {name: make(layer, x) for name, layer in layers.items()}
            for name, measured in interleaved(calls, rounds, device).items():
                times[passes].setdefault(name, []).append(measured)
    return {
        "machine": machine(device),
        "dtype": str(dtype).removeprefix("torch."),
        "memory_format": str(memory_format).removeprefix("torch."),
        "rounds": rounds,
        "shapes": [list(shape) for shape in shapes],
        "times": times,
        "saved": saved,
    }


def _layers(
    channels: int, device: torch.device, dtype: torch.dtype, systems: Sequence[str] | None
) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    for name, make in LAYERS.items():
        layers[name] = make(channels).to(device, dtype)
        if name in COMPILED:
            compiled: Any = torch.compile(layers[name], dynamic=False, fullgraph=True)
            layers[f"{name}, compiled"] = compiled
    return {name: layer for name, layer in layers.items() if systems is None or name in systems}


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
    """What a forward pass keeps for the backward pass, without parameters and buffers."""
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
    """What `measure_modules` has found, as Markdown."""
    shapes = ["x".join(map(str, shape)) for shape in found["shapes"]]
    lines: list[str] = []
    for passes, times in found["times"].items():
        peers = [name for name in ("naive EMAX", "SE", "CBAM") if name in times]
        head = [f"{passes}, ms", *shapes, *(f"/ {peer}" for peer in peers)]
        if passes == PASSES[1]:
            head.append("saved / x")
        lines += ["", _row(head), _row(["---", *["---:"] * (len(head) - 1)])]
        for name, measured in times.items():
            cells = [name, *(_milliseconds(one) for one in measured)]
            cells += [f"{mean_ratio(measured, times[peer]):.2f}" for peer in peers]
            if passes == PASSES[1]:
                cells.append(f"{math.prod(found['saved'][name]) ** (1 / len(shapes)):.2f}")
            lines.append(_row(cells))
    held = [line for bound in BOUNDS for line in _verdict(bound, found)]
    if held:
        lines += ["", _row(["bound", "at most", "mean", "worst shape", ""])]
        lines += [_row(["---", "---:", "---:", "---:", "---"]), *held]
    where = ", ".join(f"{key} {value}" for key, value in found["machine"].items())
    return "\n".join(
        [
            *lines[1:],
            "",
            f"Medians of {found['rounds']} interleaved rounds, quartiles in brackets; ratios and "
            f"saved activations are geometric means over the shapes. {found['dtype']}, "
            f"{found['memory_format']}; {where}.",
        ]
    )


def _verdict(bound: Bound, found: dict[str, Any]) -> list[str]:
    times = found["times"][bound.passes]
    if bound.system not in times or bound.over not in times:
        return []
    ours, theirs = times[bound.system], times[bound.over]
    mean = mean_ratio(ours, theirs)
    worst = max(a.median / b.median for a, b in zip(ours, theirs, strict=True))
    holds = mean <= bound.ratio and worst <= WORST_SHAPE * bound.ratio
    name = f"{bound.passes}: {bound.system} / {bound.over}"
    verdict = "holds" if holds else "missed"
    return [_row([name, f"{bound.ratio:.2f}", f"{mean:.2f}", f"{worst:.2f}", verdict])]


def _milliseconds(measured: Measured) -> str:
    median, low, high = (f"{1000 * value:.3g}" for value in measured)
    return f"{median} ({low}-{high})"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def benchmark(argv: Sequence[str] | None = None, prog: str = "emax benchmark") -> int:
    """Run the benchmark that the command line asks for; returns the exit status."""
    options = _parser(prog).parse_args(argv)
    try:
        device = torch.device(options.device)
        torch.empty(1, device=device)
        found = measure_modules(
            options.shapes or SHAPES,
            options.rounds,
            device,
            getattr(torch, options.dtype),
            torch.channels_last if options.channels_last else torch.contiguous_format,
            options.systems,
        )
        print(report_modules(found))
        if options.json is not None:
            text = json.dumps(found, indent=2) + "\n"
            replace_file(options.json, lambda temporary: temporary.write_text(text))
    except (OSError, RuntimeError, AssertionError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split("x"))
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError
    return shape


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog,
        description="Measure time and memory of attention layers against each other.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("what", choices=["modules"], help="modules: single layers")
    names = [*LAYERS, *(f"{name}, compiled" for name in COMPILED)]
    parser.add_argument(
        "--systems", nargs="+", choices=names, metavar="NAME", help=f"of {'; '.join(names)}"
    )
    parser.add_argument(
        "--shapes", nargs="+", type=_shape, metavar="BxCxHxW", help="of the input; ResNet-50's"
    )
    parser.add_argument("--rounds", type=_count, default=21, metavar="N", help="interleaved")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--channels-last", action="store_true", help="instead of contiguous")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count
