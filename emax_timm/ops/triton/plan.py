"""A plan: the sizes of a layer and its input, how memory is laid out, and the launches of a pass.

A pass launches the same kernels each time, and describing these launches takes longer than most of
the kernels run. So a plan keeps what was launched the first time, with the place of each argument
in the tensors of the pass, and launches it again with pointers alone. That is safe because all that
a kernel is compiled for follows from the plan's key: the sizes, the dtype, the device, which parts
the layer has, and that every tensor of it is in float32 and aligned to 16 bytes.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
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
    arguments: tuple[Any, ...]
    """The tensors and numbers that it takes, in order."""
    grid: tuple[int, ...]
    """The numbers of programs."""
    constants: dict[str, Any]
    """The values that it is compiled for, in order; they follow the arguments."""
    warps: int
    """The warps of a program."""


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
        self._program: _Program | None = None
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
        if _recorded is not None:
            _recorded.extend(launches())
        elif self._program is not None:
            self._program.run(tensors)
        else:
            launched = [(launch, _compile_and_launch(launch)) for launch in launches()]
            if self._keep:
                self._program = _program_of(tensors, launched)


class _Program(NamedTuple):
    """The launches of a pass, ready to be launched again with other tensors."""

    places: list[tuple[int, int]]
    """Where arguments are: in which tensor of the pass, and after how many bytes."""
    fixed: list[Any]
    """The arguments and constants that are no tensors."""
    launches: list[tuple[Any, tuple[Any, ...], tuple[Any, ...], Any]]
    """The function that launches a kernel, what it takes before the stream and after it, and what
    picks the arguments and constants from the pointers to the places and the fixed ones."""

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        values = [pointers[which] + offset for which, offset in self.places]
        values += self.fixed
        stream = _stream()
        for run, before, after, pick in self.launches:
            run(*before, stream, *after, *pick(values))


def _program_of(
    tensors: Sequence[Tensor | None], launched: list[tuple[Launch, Any]]
) -> _Program | None:
    """Return the program of what was launched, or None where it cannot be told.

    That is so under Triton's interpreter, and where two tensors of the pass share memory (as when
    x is its own gradient): the next time they may not.
    """
    spans = sorted(
        (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, which)
        for which, tensor in enumerate(tensors)
        if tensor is not None and tensor.numel()
    )
    shared = any(before[1] > after[0] for before, after in pairwise(spans))
    if shared or any(compiled is None for _, compiled in launched):
        return None
    starts = [start for start, _, _ in spans]
    places: dict[tuple[int, int], int] = {}
    fixed: list[Any] = []
    program = []
    for launch, compiled in launched:
        names = launch.kernel.arg_names[len(launch.arguments) :]
        picked = []
        for argument in (*launch.arguments, *[launch.constants[name] for name in names]):
            if isinstance(argument, Tensor) and argument.numel():
                pointer = argument.data_ptr()
                start, end, which = spans[bisect_right(starts, pointer) - 1]
                assert start <= pointer < end, "a kernel gets what is not in the pass's tensors"
                picked.append(places.setdefault((which, pointer - start), len(places)))
            else:
                fixed.insert(0, 0 if isinstance(argument, Tensor) else argument)
                picked.append(-len(fixed))
        grid = (*launch.grid, *(1,) * (3 - len(launch.grid)))
        # Without hooks: they are for profilers of Triton alone.
        after = (compiled.function, compiled.packed_metadata, None, None, None)
        program.append((compiled.run, grid, after, itemgetter(*picked)))
    return _Program(list(places), fixed, program)


def _compile_and_launch(launch: Launch) -> Any:
    """Launch a kernel through Triton's own entry, and return what it compiled.

    Raises:
        KernelError: If it cannot be compiled.
    """
    kernel, arguments, grid, constants, warps = launch
    try:
        return kernel[grid](*arguments, **constants, num_warps=warps)
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError) or "Triton Error [" in str(error):
            raise  # it was compiled, and the GPU failed
        raise KernelError(error) from error


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
    if pointers % 16 or _recorded is not None:
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
