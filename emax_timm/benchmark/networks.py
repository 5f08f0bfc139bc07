"""`emax benchmark models`: what attention costs in whole networks, against their baselines."""

import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..tables import heading, row
from ..training.config import UsageError, nearest
from .bounds import Bound, verdict
from .layers import available, computed, differ_in_groups
from .timing import Measured, described, interleaved, machine, milliseconds

__all__ = [
    "BASES",
    "METHODS",
    "NETWORKS",
    "Setting",
    "check_networks",
    "inference",
    "make_network",
    "measure_models",
    "random_images",
    "report_models",
]

BASES = ["resnet50", "convnext_tiny"]
INFERENCE, STEP, PEAK = "inference", "training step", "peak memory"
UNITS = {INFERENCE: "ms", STEP: "ms", PEAK: "MB"}
# Methods by the suffix of a model's name. All but EMAX are built without the residual gate.
NETWORKS = {"baseline": "", "SE": "_se", "CBAM": "_cbam", "EMA": "_ema", "EMAX": "_emax"}
METHODS = [*NETWORKS, "EMAX, C++", "baseline, compiled", "SE, compiled", "EMAX, compiled"]


class Setting(NamedTuple):
    """The inputs and the device that networks are measured with."""

    batch: int
    size: int
    """Height and width of the images in pixels."""
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format


# Each bound must hold for every network.
BOUNDS = [
    Bound(INFERENCE, "EMAX, C++", "baseline", 1.1),
    Bound(INFERENCE, "EMAX, compiled", "baseline, compiled", 1.2),
    Bound(STEP, "EMAX, C++", "SE", 1.15),
    Bound(PEAK, "EMAX, C++", "SE", 1.05),
]


def measure_models(
    bases: Sequence[str],
    setting: Setting,
    rounds: int,
    methods: Sequence[str] | None = None,
    training: bool = True,
) -> dict[str, Any]:
    """Time inference and a training step of each network, and measure the step's peak memory.

    The peak is that of a process that only trains or, on a GPU, that of its allocations. It is not
    measured for compiled networks, because it would be the compiler's.

    Args:
        bases: Names of baselines that have variants with attention.
        setting: The inputs and the device.
        rounds: How often each time is measured.
        methods: The methods, of `METHODS`; None for all that are available.
        training: Whether to measure a training step and its peak memory too.

    Returns:
        `models[base][method]` with `inference` and `training step`, seconds as in `Measured`, and
        `peak memory`, bytes; None for what was not measured.

    Raises:
        BackendError: If the C++ backend is requested, but is not built.
        UsageError: If a network does not exist.
    """
    if methods is None:
        methods = available(METHODS, setting.device, setting.dtype)
    check_networks(bases, methods)
    return {
        "machine": machine(setting.device),
        "batch": setting.batch,
        "size": setting.size,
        "dtype": str(setting.dtype).removeprefix("torch."),
        "memory_format": str(setting.memory_format).removeprefix("torch."),
        "rounds": rounds,
        "models": {
            base: _measure_variants(base, setting, rounds, methods, training) for base in bases
        },
    }


def _measure_variants(
    base: str, setting: Setting, rounds: int, methods: Sequence[str], training: bool
) -> dict[str, Any]:
    """Measure the variants of one baseline, as `measure_models` does those of all."""
    torch.compiler.reset()
    measurable = [method for method in methods if training and "compiled" not in method]
    peaks = {
        method: _peak_of_a_process(base, method, setting)
        for method in tqdm(measurable, f"{base}, {PEAK}", leave=False, disable=None)
    }
    networks = {method: make_network(base, method, setting) for method in methods}
    times: dict[str, dict[str, Measured]] = {}
    for what, make in ((INFERENCE, inference), (STEP, _training_step))[: 1 + training]:
        calls = {
            method: computed(method, make(network, setting)) for method, network in networks.items()
        }
        times[what] = interleaved(calls, rounds, setting.device)
    return {
        method: {
            INFERENCE: times[INFERENCE][method],
            STEP: times[STEP][method] if training else None,
            PEAK: peaks.get(method),
        }
        for method in methods
    }


def check_networks(bases: Sequence[str], methods: Sequence[str]) -> None:
    """Raise UsageError with the nearest name if one of the networks does not exist."""
    names = [base + NETWORKS[method.partition(", ")[0]] for base in bases for method in methods]
    for name in names:
        if not timm.is_model(name):
            spelt = nearest(name, timm.list_models())
            raise UsageError(f"there is no model {name}; the nearest name is {spelt}")


def make_network(base: str, method: str, setting: Setting) -> nn.Module:
    """Create a method's variant of the baseline `base`, in training mode."""
    name, _, mode = method.partition(", ")
    compared = name not in ("baseline", "EMAX")
    options: dict[str, Any] = {"attn_kwargs": {"gate_init": None}} if compared else {}
    network: Any = timm.create_model(base + NETWORKS[name], **options)
    differ_in_groups(network)
    network = network.to(setting.device, setting.dtype, memory_format=setting.memory_format)
    if mode == "compiled":
        network = torch.compile(network, dynamic=False)
    return network


def random_images(setting: Setting) -> Tensor:
    """Draw images [b, 3, h, w] from the standard normal distribution."""
    images = torch.randn(setting.batch, 3, setting.size, setting.size, dtype=setting.dtype)
    return images.to(setting.device, memory_format=setting.memory_format)


def inference(network: nn.Module, setting: Setting) -> Callable[[], Any]:
    """Return a function that runs the network on random images in eval mode."""
    images = random_images(setting)

    @torch.no_grad()
    def call() -> Tensor:
        return network.eval()(images)

    return call


def _training_step(network: nn.Module, setting: Setting) -> Callable[[], Any]:
    images = random_images(setting)
    labels = torch.arange(setting.batch, device=setting.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)

    def call() -> None:
        loss = F.cross_entropy(network.train()(images).float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return call


def _peak_of_a_process(base: str, method: str, setting: Setting) -> int:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (base, method, setting))


def _peak(base: str, method: str, setting: Setting) -> int:
    """Return the peak memory of this process in bytes, after three training steps."""
    network = make_network(base, method, setting)
    step = computed(method, _training_step(network, setting))
    for _ in range(3):
        step()
    if setting.device.type == "cuda":
        return torch.cuda.max_memory_allocated(setting.device)
    # /proc is preferred, because getrusage's peak starts at that of the parent process.
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    try:
        import resource
    except ImportError:
        raise RuntimeError("this system does not tell the peak memory of a process") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def report_models(found: dict[str, Any]) -> str:
    """Format the result of `measure_models` as Markdown."""
    lines: list[str] = []
    for base, methods in found["models"].items():
        peers = [peer for peer in ("baseline", "SE", "baseline, compiled") if peer in methods]
        head = [base]
        measured = [
            what
            for what in (INFERENCE, STEP, PEAK)
            if any(figures[what] is not None for figures in methods.values())
        ]
        for what in measured:
            head += [f"{what}, {UNITS[what]}", *(f"/ {peer}" for peer in peers)]
        lines += heading(head)
        for method, figures in methods.items():
            cells = [method]
            for what in measured:
                cells.append(_cell(figures[what]))
                ratios = (_ratio(figures[what], methods[peer][what]) for peer in peers)
                cells += ["-" if math.isnan(ratio) else f"{ratio:.2f}" for ratio in ratios]
            lines.append(row(cells))
        lines.append("")
    held = [
        verdict(str(bound), bound.ratio, ratios, max(ratios) <= bound.ratio)
        for bound in BOUNDS
        if (ratios := _ratios(bound, found["models"]))
    ]
    if held:
        lines += [*heading(["bound", "at most", *found["models"], ""]), *held, ""]
    lines.append(
        f"Batch {found['batch']}, {found['size']} x {found['size']}. Medians of {found['rounds']} "
        f"interleaved rounds, quartiles in brackets. {found['dtype']}, {found['memory_format']}; "
        f"{described(found['machine'])}."
    )
    return "\n".join(lines)


def _ratios(bound: Bound, models: dict[str, Any]) -> list[float]:
    """Return the ratio that a bound limits, by network; empty if one was not measured."""
    pairs = [(methods.get(bound.method), methods.get(bound.over)) for methods in models.values()]
    ratios = [
        _ratio(ours[bound.what], theirs[bound.what]) for ours, theirs in pairs if ours and theirs
    ]
    if len(ratios) < len(models) or any(math.isnan(ratio) for ratio in ratios):
        return []
    return ratios


def _ratio(ours: Any, theirs: Any) -> float:
    if ours is None or theirs is None:
        return math.nan
    if isinstance(ours, int):
        return ours / theirs
    return Measured(*ours).median / Measured(*theirs).median


def _cell(figure: Any) -> str:
    if figure is None:
        return "-"
    return f"{figure / 1e6:.0f}" if isinstance(figure, int) else milliseconds(Measured(*figure))
