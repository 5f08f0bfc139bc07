"""A plan of a pass: the sizes of a layer and its input, and how memory is laid out.

A plan keeps the program of its pass. That is safe because all that a kernel is compiled for follows
from the plan's key: the sizes, the dtype, the device, which parts the layer has, and that every
tensor of it is in float32 and aligned to 16 bytes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..weights import EMAXWeights
from . import config
from .config import power_of_two, share_out, tiles_for
from .program import Launch, Program, launch_all

__all__ = [
    "Plan",
    "Sizes",
    "conv3x3_strides",
    "new_buffer",
    "padded",
    "plan_for",
    "size_problem",
    "split",
]


class Sizes:
    """The sizes of x [b, c, h, w] and of the layer; those of x may be symbols of torch.compile."""

    def __init__(self, shape: Sequence[int], weights: EMAXWeights) -> None:
        self.b, self.c, self.h, self.w = b, c, h, w = shape
        config = weights.config
        self.groups = config.groups
        self.d = weights.gn_weight.shape[0]
        self.candidates = len(config.candidates)
        self.mixes = weights.warmup is not None and config.candidates != [config.groups]
        self.controlled = self.mixes and weights.controller_weight is not None
        channel, global_ = _hidden(weights)
        self.hidden: dict[str, int] = {"channel": channel, "global": global_}
        self.pixels = h * w
        self.maps = b * h * w * config.groups  # elements of a map
        self.strips = b * (h + w) * c  # elements of pooled rows and columns
        # The columns of the terms; see kernels/parameter_gradients.py.
        self.terms = 17 * self.d * config.groups + self.candidates + sum(self.hidden.values())

    def saved(self) -> list[int]:
        """Return the sizes of the tensors of `forward.Saved`."""
        vector = self.b * self.c
        channel, global_ = self.hidden["channel"], self.hidden["global"]
        return [
            2 * self.maps,
            4 * vector,
            vector,
            self.b * self.groups,
            self.b * self.controlled,
            self.b * self.candidates * self.controlled,
            self.b * channel,
            vector * (channel > 0),
            vector * (global_ > 0),
            self.b * global_,
            vector * (global_ > 0),
        ]

    def gradients(self) -> list[int]:
        """Return the sizes of the tensors of `gradients.Gradients`."""
        c, d = self.d * self.groups, self.d
        channel, global_ = self.hidden["channel"] * c, self.hidden["global"] * c
        shared = (10 * d + 4) * d + 1
        controller = self.candidates * c * self.controlled
        return [self.terms, shared, channel, channel, global_, global_, controller]


class Plan(Sizes):
    """The sizes, the tiles that follow from them, and the kernels that were compiled for them."""

    def __init__(self, shape: Sequence[int], weights: EMAXWeights, keep: bool) -> None:
        super().__init__(shape, weights)
        self.tiles = tiles = tiles_for(self.c, self.groups, self.h, self.w)
        K, digits = self.candidates, enumerate(weights.config.candidates)
        # The candidate group counts as kernels are compiled for them; see `candidate_counts`.
        self.counts = {
            "COUNTS": sum(count << 7 * k for k, count in digits), "K": K, "KP": power_of_two(K)
        }  # fmt: skip
        # What kernels that work on tiles of x are compiled for.
        self.constants = {
            "C": self.c, "F": self.groups, "d": self.d, "D": tiles.D, "G": tiles.G
        }  # fmt: skip
        self.large = self.pixels >= config.LARGE
        self.grid = (self.b * tiles.blocks,)
        self._keep = keep
        self._program: Program | None = None
        self._totals: dict[Any, int] = {}

    def share_out(self, size: tuple[int, int, int]) -> tuple[tuple[int, int], dict[str, int]]:
        """Return the grid of a kernel that shares out the pixels of a sample, and its tiles."""
        tile = self.tiles.pixels(size, self.pixels)
        programs = self.b * self.tiles.blocks
        grid = (programs, share_out(self.pixels, tile, programs))
        return grid, {**self.constants, "P": tile, "STAGES": size[2]}

    def shared_out(
        self, kernel: Any, arguments: tuple[Any, ...], size: tuple[int, int, int], **constants: bool
    ) -> Launch:
        """Return the launch of a kernel that shares out the pixels of a sample."""
        grid, tiles = self.share_out(size)
        return Launch(kernel, arguments, grid, {**tiles, **constants}, size[1])

    def walk(self, size: tuple[int, int, int], weights: EMAXWeights) -> dict[str, int]:
        """Return what a kernel that walks along rows is compiled for."""
        rows = self.tiles.rows(size, self.h, self.w)
        return {**self.constants, **rows, **conv3x3_strides(weights)}

    def new_buffer(self, like: Tensor, sizes: Callable[["Plan"], list[int]]) -> Tensor:
        """Return memory for tensors of the sizes that `sizes` gives for this plan."""
        total = self._totals.get(sizes)
        if total is None:
            total = self._totals[sizes] = _total(sizes(self))
        return like.new_empty(total, dtype=torch.float32)

    def run(
        self, tensors: Sequence[Tensor | None], launches: Callable[[], Iterable[Launch]]
    ) -> None:
        """Launch the kernels of a pass.

        Args:
            tensors: All that kernels read or write. Their arguments are these tensors and pieces
                of them, and numbers and None, which are the same for each pass of this plan.
            launches: Returns the launches. It is called the first time alone.

        Raises:
            KernelError: If a kernel cannot be compiled.
        """
        if self._program is None:
            self._program = launch_all(tensors, launches(), self._keep)
        else:
            self._program.run(tensors)


def size_problem(shape: Sequence[int]) -> str | None:
    """Say why kernels cannot count the elements of x [b, c, h, w], which they do in 32 bits."""
    b, c, h, w = shape
    # Of a sample, of pooled rows and columns, and of the terms, whose columns are fewer than 23 c.
    if c * h * w >= 2**31 or b * c * max(23, h + w) >= 2**31:
        return f"it counts elements in 32 bits, which are too few for {list(shape)}"
    return None


def plan_for(
    name: str, x: Tensor, weights: EMAXWeights, *others: Tensor | None
) -> tuple[EMAXWeights, Plan]:
    """Return the weights in float32, and the plan of a pass over x [b, c, h, w].

    `others` are the tensors, besides x and the weights, that the pass is given.
    """
    weights = _float_and_contiguous(weights)
    there, pointers = [], 0
    for tensor in (x, *weights[1:], *others):
        there.append(tensor is not None)
        if tensor is not None:
            pointers |= tensor.data_ptr()
    if pointers % 16 or x.is_meta:
        return weights, Plan(x.shape, weights, False)
    layout = (
        x.is_contiguous(memory_format=torch.channels_last),
        weights.conv3x3_weight.is_contiguous(),
    )
    groups, candidates, vote, eps = weights.config
    key = (
        name, x.shape, x.dtype, x.get_device(), layout, groups, tuple(candidates), vote, eps,
        tuple(there), _hidden(weights),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[key] = Plan(x.shape, weights, True)
    return weights, plan


_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 4096


def _hidden(weights: EMAXWeights) -> tuple[int, int]:
    """Return the hidden units of the channel gate and of the global gate, 0 without the gate."""
    reduce = (weights.channel_reduce_weight, weights.global_reduce_weight)
    return tuple([0 if weight is None else weight.shape[0] for weight in reduce])  # type: ignore[return-value]


def _float_and_contiguous(weights: EMAXWeights) -> EMAXWeights:
    """Convert the weights if need be; that of conv3x3 may be channels_last."""
    conv3x3 = weights.conv3x3_weight
    fits = conv3x3.is_contiguous() or conv3x3.is_contiguous(memory_format=torch.channels_last)
    for tensor in weights[1:]:
        if tensor is None or tensor is conv3x3:
            continue
        if tensor.dtype != torch.float32 or not tensor.is_contiguous():
            fits = False
            break
    if fits and conv3x3.dtype == torch.float32:
        return weights
    config, *tensors = weights
    return EMAXWeights(config, *[None if t is None else _converted(t) for t in tensors])  # type: ignore[arg-type]


def _converted(tensor: Tensor) -> Tensor:
    # With kernels of 1 x 1 both layouts have the same order in memory. The layout is that of the
    # tensor itself, by which its gradient is read: a conversion may give it another.
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.float()
    return tensor.float().contiguous()


def conv3x3_strides(weights: EMAXWeights) -> dict[str, int]:
    """Return the strides of an input channel and of a kernel offset in the weight of conv3x3.

    In memory it is [d, d, 3, 3] or, channels_last, [d, 3, 3, d].
    """
    weight = weights.conv3x3_weight
    if weight.is_contiguous():
        return {"INPUT": 9, "TAP": 1}
    return {"INPUT": 1, "TAP": weight.shape[1]}


def new_buffer(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return memory for flat float32 tensors of these sizes, on the device of `like`."""
    return like.new_empty(_total(sizes), dtype=torch.float32)


def split(buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Take a buffer apart into flat tensors, each with its padding."""
    return list(buffer.split([padded(size) for size in sizes]))


def _total(sizes: Sequence[int]) -> int:
    return sum(padded(size) for size in sizes)


def padded(size: int) -> int:
    """Round up so that what follows is aligned to 128 bytes."""
    return -(-size // 32) * 32
