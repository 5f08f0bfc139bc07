"""A plan: the sizes of a layer and its input, how memory is laid out, and compiled kernels.

A launch through Triton's own entry looks at every argument again, and most of these kernels run
for a shorter time than that takes. A plan does so the first time alone. That is safe because all
that a kernel is compiled for follows from the plan's key: the sizes, the dtype, the device, which
parts the layer has, and that every tensor of it is in float32 and aligned to 16 bytes.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..weights import EMAXWeights
from . import config
from .config import power_of_two, share_out, tiles_for

__all__ = [
    "KernelError",
    "Launch",
    "Plan",
    "Sizes",
    "conv3x3_strides",
    "new_buffer",
    "on_device_of",
    "padded",
    "pieces",
    "plan_for",
    "recorded_launches",
    "size_problem",
    "split",
]


class KernelError(Exception):
    """A kernel could not be compiled; its argument is the compiler's error, or the machine's."""


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    """The kernel."""
    grid: tuple[int, ...]
    """The numbers of programs."""
    constants: dict[str, Any]
    """The values that it is compiled for, in order; they follow the arguments."""
    warps: int
    """The warps of a program."""
    arguments: tuple[Any, ...] = ()
    """The tensors and numbers that it takes, in order."""


_recorded: list[Launch] | None = None


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

    def gradients(self) -> dict[str, int]:
        """Return the sizes of what the backward pass writes of the gradients of the parameters."""
        c, d = self.d * self.groups, self.d
        sizes = {"totals": self.terms, "shared": (10 * d + 4) * d + 1}
        for name, r in self.hidden.items():
            sizes |= {f"{name}_reduce_weight": r * c, f"{name}_expand_weight": c * r}
        return {**sizes, "controller_weight": self.candidates * c * self.controlled}


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
        self._compiled: dict[str, tuple[Any, tuple[Any, ...], tuple[Any, ...]]] = {}

    def share_out(self, size: tuple[int, int, int]) -> tuple[tuple[int, int], dict[str, int]]:
        """Return the grid of a kernel that shares out the pixels of a sample, and its tiles."""
        tile = self.tiles.pixels(size, self.pixels)
        programs = self.b * self.tiles.blocks
        grid = (programs, share_out(self.pixels, tile, programs))
        return grid, {**self.constants, "P": tile, "STAGES": size[2]}

    def walk(self, size: tuple[int, int, int], weights: EMAXWeights) -> dict[str, int]:
        """Return what a kernel that walks along rows is compiled for."""
        rows = self.tiles.rows(size, self.h, self.w)
        return {**self.constants, **rows, **conv3x3_strides(weights)}

    def launch(self, site: str, arguments: tuple[Any, ...], how: Callable[[], Launch]) -> None:
        """Launch a kernel.

        Args:
            site: A name for this launch.
            arguments: The tensors and numbers that the kernel takes, in order.
            how: Returns the launch but for the arguments; the plan determines it.
        """
        known = self._compiled.get(site)
        if known is not None:
            run, before, constants = known
            # No hooks: this is `compiled[grid](...)` without the look at the stream's metadata.
            run(*before[:3], _stream(), *before[3:], None, None, None, *arguments, *constants)
            return
        launch = how()
        kernel, grid, constants, warps, _ = launch
        if _recorded is not None:
            _recorded.append(launch._replace(arguments=arguments))
            return
        try:
            compiled = kernel[grid](*arguments, **constants, num_warps=warps)
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError) or "Triton Error [" in str(error):
                raise  # it was compiled, and the GPU failed
            raise KernelError(error) from error
        if self._keep and compiled is not None:
            rest = tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
            before = (*grid, *(1,) * (3 - len(grid)), compiled.function, compiled.packed_metadata)
            self._compiled[site] = compiled.run, before, rest


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the GPU of x the current one, to which Triton launches."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _stream() -> int:
    return torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())


def size_problem(shape: Sequence[int]) -> str | None:
    """Say why kernels cannot count the elements of x [b, c, h, w], which they do in 32 bits."""
    b, c, h, w = shape
    # Of a sample, of pooled rows and columns, and of the terms, whose columns are fewer than 23 c.
    if c * h * w >= 2**31 or b * c * max(23, h + w) >= 2**31:
        return f"it counts elements in 32 bits, which are too few for {list(shape)}"
    return None


def plan_for(x: Tensor, weights: EMAXWeights, *others: Tensor | None) -> tuple[EMAXWeights, Plan]:
    """Return the weights in float32, and the plan for x [b, c, h, w].

    `others` are the tensors, besides x and the weights, that kernels are given.
    """
    weights = _float_and_contiguous(weights)
    if not x.is_cuda:
        return weights, Plan(x.shape, weights, False)
    tensors = (x, *weights[1:], *others)
    there = []
    for tensor in tensors:
        there.append(tensor is not None)
        if tensor is not None and tensor.data_ptr() % 16:
            return weights, Plan(x.shape, weights, False)
    layout = (
        x.is_contiguous(memory_format=torch.channels_last),
        weights.conv3x3_weight.is_contiguous(),
    )
    groups, candidates, vote, _ = weights.config
    key = (
        x.shape, x.dtype, x.get_device(), layout, groups, tuple(candidates), vote, tuple(there),
        _hidden(weights),
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


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches in a `with` block, and run no kernel: for tensors on the meta device."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def conv3x3_strides(weights: EMAXWeights) -> dict[str, int]:
    """Return the strides of an input channel and of a kernel offset in the weight of conv3x3.

    In memory it is [d, d, 3, 3] or, channels_last, [d, 3, 3, d].
    """
    weight = weights.conv3x3_weight
    if weight.is_contiguous():
        return {"INPUT": 9, "TAP": 1}
    return {"INPUT": 1, "TAP": weight.shape[1]}


def pieces(like: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Return flat float32 tensors of these sizes, aligned, in one piece of memory."""
    return split(new_buffer(like, sizes), sizes)


def new_buffer(like: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return memory for flat float32 tensors of these sizes, on the device of `like`."""
    return like.new_empty(sum(padded(size) for size in sizes), dtype=torch.float32)


def split(buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Take a buffer apart into flat tensors, each with its padding."""
    return list(buffer.split([padded(size) for size in sizes]))


def padded(size: int) -> int:
    """Round up so that what follows is aligned to 128 bytes."""
    return -(-size // 32) * 32
