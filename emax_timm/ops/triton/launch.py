"""How a kernel is launched, or recorded instead."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.library import wrap_triton

__all__ = ["Launch", "launch", "recorded_launches"]


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int


_recorded: list[Launch] | None = None


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    arguments: tuple[Any, ...],
    constants: dict[str, Any],
    warps: int,
) -> None:
    """Launch a kernel; while torch.compile traces, the launch becomes a part of its graph."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, grid, arguments, constants, warps))
        return
    run = wrap_triton(kernel) if torch.compiler.is_compiling() else kernel
    run[grid](*arguments, **constants, num_warps=warps)


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches in a `with` block, and run no kernel: for tensors on the meta device."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None
