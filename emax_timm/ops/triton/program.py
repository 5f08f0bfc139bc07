"""The launches of a pass, and its program: what launches them again with pointers alone.

A pass launches the same kernels each time, and describing these launches takes longer than most of
the kernels run. So a program has what was launched the first time, with the place of each argument
in the tensors of the pass.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["KernelError", "Launch", "Program", "launch_all", "on_device_of", "recorded_launches"]


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


class Program(NamedTuple):
    """The launches of a pass, ready to be launched again with other tensors."""

    places: list[tuple[int, int]]
    """Where arguments are: in which tensor of the pass, and after how many bytes."""
    fixed: list[Any]
    """The arguments and constants that are no tensors."""
    launches: list[tuple[Any, tuple[Any, ...], tuple[Any, ...], Any]]
    """The function that launches a kernel, what it takes before the stream and after it, and what
    picks the arguments and constants from the pointers to the places and the fixed ones."""

    def run(self, tensors: Sequence[Tensor | None]) -> None:
        """Launch the kernels of a pass over these tensors, which are like those of the first."""
        pointers = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        values = [pointers[which] + offset for which, offset in self.places]
        values += self.fixed
        stream = _stream()
        for run, before, after, pick in self.launches:
            run(*before, stream, *after, *pick(values))


def launch_all(
    tensors: Sequence[Tensor | None], launches: Iterable[Launch], keep: bool
) -> Program | None:
    """Launch the kernels of a pass for the first time.

    Args:
        tensors: All that kernels read or write.
        launches: The launches, whose arguments are these tensors and pieces of them, and numbers
            and None.
        keep: Whether all but the tensors is the same for each pass to come.

    Returns:
        With `keep` the program of the pass, if it can be told.

    Raises:
        KernelError: If a kernel cannot be compiled.
    """
    if _recorded is not None:
        _recorded.extend(launches)
        return None
    launched = [(launch, _compile_and_launch(launch)) for launch in launches]
    return _program_of(tensors, launched) if keep else None


def _program_of(
    tensors: Sequence[Tensor | None], launched: list[tuple[Launch, Any]]
) -> Program | None:
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
    return Program(list(places), fixed, program)


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


@contextlib.contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Record launches in a `with` block, and run no kernel: for tensors on the meta device."""
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


_recorded: list[Launch] | None = None
