"""What a call costs on a GPU: the time of its kernels with a cold cache, launches and memory.

Wall time, which `timing.interleaved` measures, includes the time in which the GPU waits for the
host to launch kernels. The time of the kernels alone is here, from torch's profiler. As in
`triton.testing.do_bench` a buffer larger than the L2 cache is written before each call, so that a
call finds nothing in the cache of what the call before has left there.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple, TypeVar

import torch

from .timing import Measured, measured

__all__ = ["Event", "Kernels", "Span", "flushing", "kernels", "peak_bytes", "spans"]

LEAST_BUFFER = 256 * 2**20

Name = TypeVar("Name")


class Kernels(NamedTuple):
    """The kernels of a call.

    Args:
        seconds: The sum of their durations, as median and quartiles over calls. Where the profiler
            sees no kernels it is the time between two events around the call, which includes gaps.
        launches: Number of kernels; None where the profiler sees none.
        copies: Number of copies and fills by the driver, which are no kernels.
        each: The median duration of each kernel, copy and fill in seconds, in their order; the
            second of a name has a 2 behind it, and so on.
    """

    seconds: Measured
    launches: int | None
    copies: int | None
    each: dict[str, float]


class Event(NamedTuple):
    """Something that the GPU did: a kernel, a copy or a fill."""

    name: str
    start: float
    """Microseconds."""
    duration: float
    """Microseconds."""


class Span(NamedTuple):
    """The events of one call, summed up."""

    seconds: float
    launches: int
    copies: int
    each: dict[str, float]
    """The seconds of each event by its name, as in `Kernels`."""


def flushing(device: torch.device) -> Callable[[], object]:
    """Return a function that overwrites the L2 cache of a GPU by a kernel of a name of its own."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    size = max(LEAST_BUFFER, 2 * cache)
    buffer = torch.zeros(size // 4, dtype=torch.int32, device=device)
    return lambda: torch.bitwise_not(buffer, out=buffer)


def kernels(
    calls: Mapping[Name, Callable[[], Any]], rounds: int, device: torch.device
) -> dict[Name, Kernels]:
    """Measure the kernels of functions in turn, with the L2 cache flushed before each call.

    Args:
        calls: Functions by name, which have been called before.
        rounds: How often each is measured.
        device: The GPU that they use, on its current stream.
    """
    flush = flushing(device)
    names = list(calls)
    order = [name for n in range(rounds) for name in _rotated(names, n)]
    _profiled([flush], device)  # the first profile of a process sets the profiler up
    marks = [event.name for event in _profiled([flush], device)]
    events = _profiled([step for name in order for step in (flush, calls[name])], device)
    found = spans(events, marks[0]) if marks else []
    if len(found) != len(order) or not any(span.launches for span in found):
        return _by_events(calls, order, flush, device)
    by_name = {name: [s for n, s in zip(order, found, strict=True) if n == name] for name in names}
    return {
        name: Kernels(
            measured([span.seconds for span in own]),
            round(median(span.launches for span in own)),
            round(median(span.copies for span in own)),
            {
                event: median(span.each[event] for span in own if event in span.each)
                for event in own[0].each
            },
        )
        for name, own in by_name.items()
    }


def spans(events: Iterable[Event], mark: str) -> list[Span]:
    """Sum up the events between each flush of the cache, the kernel named `mark`, and the next."""
    found: list[list[Event]] = []
    for event in sorted(events, key=lambda event: event.start):
        if event.name == mark:
            found.append([])
        elif found:
            found[-1].append(event)
    return [_span(own) for own in found]


def _span(events: Sequence[Event]) -> Span:
    copies = sum(event.name.startswith(("Memcpy", "Memset")) for event in events)
    each: dict[str, float] = {}
    seen: Counter[str] = Counter()
    for event in events:
        seen[event.name] += 1
        number = f" {seen[event.name]}" if seen[event.name] > 1 else ""
        each[event.name + number] = event.duration / 1e6
    return Span(sum(each.values()), len(events) - copies, copies, each)


def _profiled(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[Event]:
    """Return what the GPU does in these calls; each is over before the next one begins."""
    with (
        torch.cuda.device(device),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled,
    ):
        for call in calls:
            call()
            torch.cuda.synchronize(device)
    return [
        Event(event.name, event.time_range.start, event.time_range.elapsed_us())
        for event in profiled.events() or []
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and not event.name.endswith((" Sync", "Wait Event", "Synchronize"))
    ]


def _by_events(
    calls: Mapping[Name, Callable[[], Any]],
    order: Sequence[Name],
    flush: Callable[[], object],
    device: torch.device,
) -> dict[Name, Kernels]:
    """Time the calls by CUDA events, where the profiler may not look at the GPU."""
    times: dict[Name, list[float]] = {name: [] for name in calls}
    with torch.cuda.device(device):
        for name in order:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush()
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1000)
    return {name: Kernels(measured(seconds), None, None, {}) for name, seconds in times.items()}


def _rotated(names: list[Name], number: int) -> list[Name]:
    place = number % len(names)
    return names[place:] + names[:place]


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Return by how many bytes a call raises the allocated memory of a GPU at most."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = call()
    torch.cuda.synchronize(device)
    del out
    return torch.cuda.max_memory_allocated(device) - before
