"""The processes of a run: one without torchrun, else one per device."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from timm.utils.distributed import init_distributed_device_so

from .config import UsageError

__all__ = ["World", "open_world"]


@dataclass(frozen=True)
class World:
    """This process among those of the run."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_primary(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def warn(self, message: str) -> None:
        """Say on stderr, once for all ranks, what the user is to know."""
        if self.is_primary:
            print(f"warning: {message}", file=sys.stderr, flush=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place. A synchronisation point."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Greatest over all ranks, in place. A synchronisation point."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors with those of rank 0. A synchronisation point."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


@contextmanager
def open_world(device: str = "") -> Iterator[World]:
    """Join the other processes (torchrun's or Slurm's variables tell of them) and leave at the end.

    Args:
        device: Its type; empty for cuda if there is one, else cpu.

    Raises:
        UsageError: If the device is not there.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("nothing is computed on it")
    except RuntimeError:
        raise UsageError(f"unknown device {device}; try cpu or cuda") from None
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"--device {device}: no CUDA device is available; try --device cpu")
    try:
        place: Any = init_distributed_device_so(device)
        yield World(torch.device(place["device"]), place["global_rank"], place["world_size"])
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
