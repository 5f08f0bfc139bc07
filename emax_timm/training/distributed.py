"""The distributed context: a run has a process per device with torchrun or Slurm, else one."""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3, distribute_bn
from timm.utils.distributed import is_distributed_env, world_info_from_env
from torch import nn
from torch.distributed.rendezvous import rendezvous

from .config import TrainConfig, UsageError

__all__ = [
    "DistributedContext",
    "RankError",
    "find_device",
    "open_distributed_context",
    "share_statistics",
]


class RankError(RuntimeError):
    """Another rank of the run does not respond."""

    exit_code = 1


@dataclass(frozen=True)
class DistributedContext:
    """The distributed context: this process's device and rank, and the number of ranks."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_primary(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def warn(self, message: str) -> None:
        """Print a warning on stderr, once for all ranks."""
        if self.is_primary:
            print(f"warning: {message}", file=sys.stderr, flush=True)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum values over all ranks, in place; returns them. A synchronisation point."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def max(self, values: torch.Tensor) -> torch.Tensor:
        """Take the maximum over all ranks, in place; returns it. A synchronisation point."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def broadcast(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite the tensors with those of rank 0. A synchronisation point."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)


def find_device(name: str = "") -> torch.device:
    """Return the device of a name, after checking that it can be computed on.

    Args:
        name: The device or its type; empty for cuda if there is one, else cpu.

    Raises:
        UsageError: If there is no such device here; the message names those that there are.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    found = ["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
    found += ["mps"] * torch.backends.mps.is_available()
    here = f"there {'is' if len(found) == 1 else 'are'} {', '.join(found)} here"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name}; {here}") from None
    if device.type == "meta":
        raise UsageError(f"tensors on the device meta hold no data, so it computes nothing; {here}")
    if device.type == "cuda":  # allocating on it would use memory of the first GPU on every rank
        if (device.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {name}: no such CUDA device is available; {here}")
        return device
    try:
        torch.zeros(1, device=device)
    except Exception:  # torch raises various errors for devices that it was built without
        raise UsageError(f"--device {name}: it cannot be used; {here}") from None
    return device


# Gloo raises plain RuntimeErrors. Most name its source file, but one for a timeout may not.
GLOO_ERRORS = ("gloo", "Application timeout caused pair closure")


@contextmanager
def open_distributed_context(
    device: str = "", timeout: float = 600.0
) -> Iterator[DistributedContext]:
    """Join the process group of the run, if it has several ranks; yields the distributed context.

    The environment variables of torchrun or Slurm describe the ranks. The process group is left at
    the end.

    Args:
        device: The device or its type; empty for cuda if there is one, else cpu.
        timeout: Seconds after which a rank that waits for the others gives up.

    Raises:
        UsageError: If the device is unknown or not available.
        RankError: If another rank has ended or hangs. (NCCL ends the process itself instead.)
    """
    kind = str(find_device(device))
    if not is_distributed_env():
        yield DistributedContext(torch.device(kind))
        return
    local_rank, rank, size = world_info_from_env()
    if kind == "cuda":
        kind = f"cuda:{local_rank}"
        torch.cuda.set_device(kind)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    limit = timedelta(seconds=timeout)
    shared, _, _ = next(rendezvous("env://", rank, size, timeout=limit))
    # torchrun keeps the store when it restarts the ranks, with the addresses of the dead ones.
    store = dist.PrefixStore(f"emax_timm/{attempt}", shared)
    backend = dist.get_default_backend_for_device(kind)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
    try:
        yield DistributedContext(torch.device(kind), rank, size)
    except RuntimeError as error:
        from_gloo = any(part in str(error) for part in GLOO_ERRORS)
        if not isinstance(error, dist.DistError) and not from_gloo:
            raise
        silent = ", ".join(map(str, _silent_ranks(store, rank, size))) or "unknown"
        raise RankError(f"rank {silent} has ended or hangs: {str(error).splitlines()[0]}") from None
    finally:
        dist.destroy_process_group()


def _silent_ranks(store: dist.Store, rank: int, size: int, wait: float = 5.0) -> list[int]:
    """Return the ranks that do not report within `wait` seconds that they timed out as well."""
    try:
        store.set(f"waited/{rank}", "")
        time.sleep(wait)
        return [number for number in range(size) if not store.check([f"waited/{number}"])]
    except RuntimeError:  # the process that held the store has ended
        return []


def share_statistics(
    context: DistributedContext, config: TrainConfig, model: nn.Module, averaged: ModelEmaV3 | None
) -> None:
    """Give all ranks the same batch norm statistics, as validation and checkpoints need."""
    if context.size == 1 or config.sync_bn or not config.dist_bn:
        return
    distribute_bn(model, context.size, config.dist_bn == "reduce")
    if averaged is not None:
        # As in a checkpoint within an epoch, the averaged statistics are those of rank 0.
        distribute_bn(averaged, context.size, reduce=False)
