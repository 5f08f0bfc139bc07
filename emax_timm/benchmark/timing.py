"""Interleaved timing of functions, for machines that run other processes as well."""

import contextlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import geometric_mean, median, quantiles
from typing import Any, NamedTuple, TypeVar

import timm
import torch

from ..version import __version__

__all__ = [
    "Measured",
    "conditions",
    "described",
    "digits",
    "interleaved",
    "machine",
    "mean_ratio",
    "measured",
    "milliseconds",
]


class Measured(NamedTuple):
    """Seconds per call: median and quartiles."""

    median: float
    low: float
    """Lower quartile."""
    high: float
    """Upper quartile."""


Name = TypeVar("Name")


def interleaved(
    calls: Mapping[Name, Callable[[], Any]],
    rounds: int,
    device: torch.device,
    seconds: float = 0.01,
) -> dict[Name, Measured]:
    """Time functions in turn, so that a slow period of the machine affects all of them.

    The measurement of a function that takes less than ten times `seconds` begins with a call that
    is not timed: it fetches the memory that the allocator has given back to the method since, which
    can cost as much as a call.

    Args:
        calls: Functions by name. Each is called twice before it is timed, which compiles it.
        rounds: How often each is measured.
        device: The device that the functions use. Calls of a measurement on a GPU follow each
            other without waiting, so that the time per call is the host's or the GPU's, whichever
            is longer.
        seconds: Shortest measurement; a faster function is called several times in it.

    Returns:
        Seconds per call by name.
    """
    repeats, warm_up = {}, set()
    for name, call in calls.items():
        call()
        call()
        duration = max(_duration(call, 1, device), 1e-9)
        repeats[name] = max(1, round(seconds / duration))
        if duration < 10 * seconds:
            warm_up.add(name)
    found: dict[Name, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        # The order rotates, so that each function is the first and the last one in some rounds.
        order = list(calls)[number % len(calls) :] + list(calls)[: number % len(calls)]
        for name in order:
            if name in warm_up:
                calls[name]()
            found[name].append(_duration(calls[name], repeats[name], device))
    return {name: measured(times) for name, times in found.items()}


def _duration(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Measure the seconds per call, from an idle device until it is idle again."""
    _synchronise(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    _synchronise(device)
    return (time.perf_counter() - begin) / repeats


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(times: Sequence[float]) -> Measured:
    """Return the median and the quartiles of measurements."""
    if len(times) == 1:
        return Measured(times[0], times[0], times[0])
    low, _, high = quantiles(times, n=4, method="inclusive")
    return Measured(median(times), low, high)


def mean_ratio(ours: Sequence[Measured], theirs: Sequence[Measured]) -> float:
    """Return the geometric mean of the ratios of medians."""
    return geometric_mean(a.median / b.median for a, b in zip(ours, theirs, strict=True))


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the device, its threads, and the versions of the packages."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else _cpu_name(),
        **(_gpu_versions() if gpu else {"instructions": torch.backends.cpu.get_cpu_capability()}),
        "threads": torch.get_num_threads(),
        "emax_timm": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def _gpu_versions() -> dict[str, Any]:
    versions = {"cuda": torch.version.cuda}
    with contextlib.suppress(ImportError):
        import triton

        versions["triton"] = triton.__version__
    return versions


def conditions(
    device: torch.device,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
    rounds: int,
    amp: torch.dtype | None = None,
) -> dict[str, Any]:
    """Describe the machine, the tensors, and the number of rounds."""
    words = str(dtype).removeprefix("torch.")
    if amp is not None:
        words += f" with autocast to {str(amp).removeprefix('torch.')}"
    return {
        "machine": machine(device),
        "dtype": words,
        "memory_format": str(memory_format).removeprefix("torch."),
        "rounds": rounds,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def described(facts: dict[str, Any]) -> str:
    """Format the result of `machine` as prose."""
    return ", ".join(f"{key} {value}" for key, value in facts.items())


def milliseconds(times: Measured) -> str:
    """Format times in milliseconds: the median, with the quartiles in brackets."""
    median, low, high = (digits(1000 * value) for value in times)
    return f"{median} ({low}-{high})"


def digits(value: float) -> str:
    """Format a number with three significant digits, or as an integer from 1000 on."""
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"
