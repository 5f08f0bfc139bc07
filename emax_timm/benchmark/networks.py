"""`emax benchmark models`: what attention costs in whole networks, against their baselines."""

import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ..training.config import UsageError, nearest
from .gpu import kernels, peak_bytes
from .methods import (
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
    "BASES",
    "GPU_METHODS",
    "INFERENCE",
    "METHODS",
    "NETWORKS",
    "PEAK",
    "STEP",
    "Setting",
    "check_networks",
    "inference",
    "make_network",
    "measure_models",
    "network_name",
    "random_images",
]

BASES = ["resnet50", "convnext_tiny"]
INFERENCE, STEP, PEAK = "inference", "training step", "peak memory"
# Methods by the suffix of a model's name. All but EMAX are built without the residual gate.
NETWORKS = {"baseline": "", "SE": "_se", "CBAM": "_cbam", "EMA": "_ema", "EMAX": "_emax"}
METHODS = [*NETWORKS, "EMAX, C++", "baseline, compiled", "SE, compiled", "EMAX, compiled"]
GPU_METHODS = [*NETWORKS, "EMA, Triton", "EMAX, Triton"]
CHOICES = list(
    dict.fromkeys(
        [
            *METHODS,
            *GPU_METHODS,
            *(f"{name}, {mode}" for mode in ("compiled", "CUDA graph") for name in GPU_METHODS),
        ]
    )
)
"""Every method that can be asked for."""
GPU_ROUNDS = 3
Kinds = Mapping[str, Callable[[nn.Module, Any], Callable[[], Any]]]
"""What is measured, and how a call of it is made from a network and the setting."""


class Setting(NamedTuple):
    """The inputs and the device that networks are measured with."""

    batch: int
    size: int
    """Height and width of the images in pixels."""
    device: torch.device
    dtype: torch.dtype
    memory_format: torch.memory_format
    amp: torch.dtype | None = None
    """The dtype of mixed precision, or None."""


def measure_models(
    bases: Sequence[str],
    setting: Setting,
    rounds: int,
    methods: Sequence[str] | None = None,
    training: bool = True,
    evaluation: bool = True,
) -> dict[str, Any]:
    """Time inference and a training step of each network, and measure the step's peak memory.

    The peak is that of a process that only trains or, on a GPU, that of its allocations. On a CPU
    it is not measured for compiled networks, because it would be the compiler's.

    Args:
        bases: Names of baselines that have variants with attention.
        setting: The inputs and the device.
        rounds: How often each time is measured.
        methods: The methods, of `CHOICES`; None for the usual ones that are available.
        training: Whether to measure a training step and its peak memory.
        evaluation: Whether to measure inference.

    Returns:
        `models[base][method]` with `inference` and `training step`, seconds as in `Measured`, and
        `peak memory`, bytes; None for what was not measured. On a GPU also what `_on_gpu` returns.

    Raises:
        BackendError: If a backend is requested that cannot serve.
        UsageError: If a network does not exist.
    """
    gpu = setting.device.type == "cuda"
    usual = methods is None
    if methods is None:
        methods = GPU_METHODS if gpu else METHODS
        methods = available(methods, setting.device, setting.amp or setting.dtype)
    check_networks(bases, methods)
    measure = _on_gpu if gpu else _on_cpu
    kinds = {STEP: _training_step} if training else {}
    kinds |= {INFERENCE: inference} if evaluation else {}
    models: dict[str, Any] = {}
    for base in bases:
        torch.compiler.reset()
        own = _working(base, setting, methods, kinds) if gpu and usual else methods
        models[base] = measure(base, setting, rounds, own, kinds)
    return {
        **conditions(setting.device, setting.dtype, setting.memory_format, rounds, setting.amp),
        "batch": setting.batch,
        "size": setting.size,
        "models": models,
    }


def _on_cpu(
    base: str, setting: Setting, rounds: int, methods: Sequence[str], kinds: Kinds
) -> dict[str, dict[str, Any]]:
    measurable = [method for method in methods if STEP in kinds and "compiled" not in method]
    peaks = {
        method: _peak_of_a_process(base, method, setting)
        for method in tqdm(measurable, f"{base}, {PEAK}", leave=False, disable=None)
    }
    networks = {method: make_network(base, method, setting) for method in methods}
    times: dict[str, dict[str, Measured]] = {}
    for what, make in kinds.items():
        calls = {
            method: computed(method, make(network, setting)) for method, network in networks.items()
        }
        times[what] = interleaved(calls, rounds, setting.device)
    return {
        method: {
            **{what: times[what][method] if what in kinds else None for what in (INFERENCE, STEP)},
            PEAK: peaks.get(method),
        }
        for method in methods
    }


def _on_gpu(
    base: str, setting: Setting, rounds: int, methods: Sequence[str], kinds: Kinds
) -> dict[str, dict[str, Any]]:
    """Measure the networks of one baseline on a GPU.

    Returns:
        For each method what `measure_models` says, its `network`, and by what is measured `first
        call`, the seconds of the call that compiles, `images per second`, and `kernels`.
    """
    calls: dict[str, dict[str, Callable[[], Any]]] = {what: {} for what in kinds}
    found: dict[str, dict[str, Any]] = {}
    for method in tqdm(methods, f"{base}, first calls", leave=False, disable=None):
        before = torch.cuda.memory_allocated(setting.device)
        network = make_network(base, method, setting)
        own: dict[str, Any] = {"network": network_name(base, method), "first call": {}}
        own |= dict.fromkeys([INFERENCE, STEP, PEAK])
        for what, make in kinds.items():
            call = calls[what][method] = computed(method, make(network, setting))
            own["first call"][what] = _first_calls(call, setting.device)
            if what == STEP:
                kept = torch.cuda.memory_allocated(setting.device) - before
                own[PEAK] = kept + peak_bytes(call, setting.device)
        found[method] = own | {"images per second": {}, "kernels": {}}
    for what, by_method in calls.items():
        times = interleaved(by_method, rounds, setting.device)
        costs = kernels(by_method, GPU_ROUNDS, setting.device)
        for method, own in found.items():
            own[what] = times[method]
            own["images per second"][what] = setting.batch / times[method].median
            own["kernels"][what] = costs[method]._replace(each={})  # of a network they are hundreds
    return found


def _working(base: str, setting: Setting, methods: Sequence[str], kinds: Kinds) -> list[str]:
    """Select the methods whose networks compute what is measured, on two images."""
    few = setting._replace(batch=2)

    def every(method: str) -> None:
        network = make_network(base, method, few)
        for make in kinds.values():
            computed(method, make(network, few))()
        torch.cuda.synchronize(setting.device)

    return [method for method in methods if works(method, partial(every, method))]


def _first_calls(call: Callable[[], Any], device: torch.device) -> float:
    """Call a function three times, and return the seconds of the first call."""
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    seconds = time.perf_counter() - begin
    call()
    call()  # CUDA graphs are recorded in the second call, and replayed from the third one on
    return seconds


def check_networks(bases: Sequence[str], methods: Sequence[str]) -> None:
    """Raise UsageError with the nearest name if one of the networks does not exist."""
    names = [network_name(base, method) for base in bases for method in methods]
    for name in names:
        if not timm.is_model(name):
            spelt = nearest(name, timm.list_models())
            raise UsageError(f"there is no model {name}; the nearest name is {spelt}")


def network_name(base: str, method: str) -> str:
    """Return the name of a method's variant of the baseline `base`: timm's own where it has one."""
    name, _ = split_method(method)
    if name == "SE" and base.startswith("resnet") and timm.is_model(f"se{base}"):
        return f"se{base}"
    return base + NETWORKS[name]


def make_network(base: str, method: str, setting: Setting) -> nn.Module:
    """Create a method's variant of the baseline `base`, in training mode."""
    name = network_name(base, method)
    ours = name.endswith(tuple(filter(None, NETWORKS.values())))
    gated = not ours or split_method(method)[0] == "EMAX"
    options: dict[str, Any] = {} if gated else {"attn_kwargs": {"gate_init": None}}
    network: Any = timm.create_model(name, **options)
    differ_in_groups(network)
    network = network.to(setting.device, setting.dtype, memory_format=setting.memory_format)
    return compiled(network, method)


def random_images(setting: Setting) -> Tensor:
    """Draw images [b, 3, h, w] from the standard normal distribution."""
    images = torch.randn(setting.batch, 3, setting.size, setting.size, dtype=setting.dtype)
    return images.to(setting.device, memory_format=setting.memory_format)


def inference(network: nn.Module, setting: Setting) -> Callable[[], Any]:
    """Return a function that runs the network on random images in eval mode."""
    images = random_images(setting)

    @torch.no_grad()
    def call() -> Tensor:
        with autocast(setting.device, setting.amp):
            return network.eval()(images)

    return call


def _training_step(network: nn.Module, setting: Setting) -> Callable[[], Any]:
    images = random_images(setting)
    labels = torch.arange(setting.batch, device=setting.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-6, momentum=0.9)

    def call() -> None:
        with autocast(setting.device, setting.amp):
            logits = network.train()(images)
        loss = F.cross_entropy(logits.float(), labels)
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
