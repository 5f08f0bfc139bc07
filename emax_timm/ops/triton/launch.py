"""How a kernel is launched."""

from typing import Any

import torch
from torch.library import wrap_triton

__all__ = ["launch"]


def launch(
    kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], warps: int
) -> None:
    """Launch a kernel, or record the launch while torch.compile traces."""
    run = wrap_triton(kernel) if torch.compiler.is_compiling() else kernel
    run[grid](*arguments, **constants, num_warps=warps)
