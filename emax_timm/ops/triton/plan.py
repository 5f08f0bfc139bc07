"""A plan: the sizes of a layer and its input, and the kernels that were compiled for them.

A launch through Triton's own entry looks at every argument again, which takes longer than most of
these kernels run. A plan does so the first time alone. That is safe because everything that a
kernel is compiled for follows from the plan's key: the sizes, the dtype and the device, and that
all tensors are aligned to 16 bytes.
"""

import contextlib
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import wrap_triton

from ..weights import EMAXWeights, in_dtype
from . import config
from .config import tiles_for

__all__ = ["Launch", "Plan", "plan_for", "recorded_launches"]


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int


_recorded: list[Launch] | None = None


class Plan:
    """The sizes of x [b, c, h, w] and of the layer, and its compiled kernels."""

    def __init__(self, b: int, c: int, h: int, w: int, groups: int, keep: bool) -> None:
        self.b, self.c, self.h, self.w, self.groups = b, c, h, w, groups
        self.pixels = h * w
        self.tiles = tiles_for(c, groups, h, w)
        self.d = self.tiles.d
        # What every kernel that works on tiles of x is compiled for, and those that walk on rows.
        self.constants = {
            "C": c, "F": groups, "d": self.d, "D": self.tiles.D, "G": self.tiles.G
        }  # fmt: skip
        self.rows = {"R": self.tiles.R, "WB": self.tiles.WB, "N": self.tiles.N}
        self.samples_grid = (b * self.tiles.blocks,)
        self._keep = keep
        self._compiled: dict[str, tuple[Any, tuple[Any, ...]]] = {}

    def shared_out(self, size: tuple[int, int]) -> tuple[tuple[int, int], int]:
        """Return the grid of a kernel that shares out the pixels of a sample, and its tile."""
        tile = self.tiles.pixels(size, self.pixels)
        programs = self.b * self.tiles.blocks
        return (programs, config.share_out(self.pixels, tile, programs)), tile

    def launch(
        self,
        site: str,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: dict[str, Any],
        warps: int,
    ) -> None:
        """Launch a kernel.

        While torch.compile traces, the launch becomes a part of its graph.

        Args:
            site: A name for this launch, which with the plan determines the constants.
            kernel: The kernel.
            grid: The numbers of programs.
            arguments: The tensors and numbers that it takes, in order.
            constants: The values that it is compiled for; in order they follow the arguments.
            warps: The warps of a program.
        """
        known = self._compiled.get(site)
        if known is not None:
            compiled, rest = known
            compiled[grid + (1,) * (3 - len(grid))](*arguments, *rest)
            return
        if _recorded is not None:
            _recorded.append(Launch(kernel, grid, arguments, constants, warps))
            return
        run = wrap_triton(kernel) if torch.compiler.is_compiling() else kernel
        compiled = run[grid](*arguments, **constants, num_warps=warps)
        if self._keep and compiled is not None:
            rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            self._compiled[site] = compiled, rest


def plan_for(x: Tensor, weights: EMAXWeights, *others: Tensor | None) -> tuple[EMAXWeights, Plan]:
    """Return the weights in float32, and the plan for x [b, c, h, w].

    `others` are the tensors, besides x and the weights, that kernels are given.
    """
    groups = weights.config.groups
    for tensor in weights[1:]:
        if tensor is not None and (tensor.dtype != torch.float32 or not tensor.is_contiguous()):
            weights = _float_and_contiguous(weights)
            break
    if x.device.type != "cuda" or torch.compiler.is_compiling():
        return weights, Plan(*x.shape, groups, False)
    tensors = (x, *weights[1:], *others)
    for tensor in tensors:
        if tensor is not None and tensor.data_ptr() % 16:
            return weights, Plan(*x.shape, groups, False)
    reduce, global_reduce = weights.channel_reduce_weight, weights.global_reduce_weight
    return weights, _plan(
        x.shape,
        groups,
        tuple(weights.config.candidates),
        weights.config.batch_vote,
        x.dtype,
        x.device.index,
        x.is_contiguous(memory_format=torch.channels_last),
        weights.conv3x3_weight.is_contiguous(),
        None if reduce is None else reduce.shape[0],
        None if global_reduce is None else global_reduce.shape[0],
        tuple([tensor is not None for tensor in tensors]),
    )


def _float_and_contiguous(weights: EMAXWeights) -> EMAXWeights:
    """Convert the weights; that of conv3x3 may be channels_last, as in a model that is."""
    weights = in_dtype(weights, torch.float32)
    conv3x3 = weights.conv3x3_weight
    if not conv3x3.is_contiguous(memory_format=torch.channels_last):
        conv3x3 = conv3x3.contiguous()
    tensors = [None if t is None else t.contiguous() for t in weights[1:]]
    return EMAXWeights(weights.config, *tensors)._replace(conv3x3_weight=conv3x3)  # type: ignore[arg-type]


@lru_cache(maxsize=4096)
def _plan(shape: torch.Size, groups: int, *_: Any) -> Plan:
    return Plan(*shape, groups, True)


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches in a `with` block, and run no kernel: for tensors on the meta device."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


