"""What the kernels need of a GPU, found by compiling them on a machine without one.

Both passes run on the meta device, where launches are recorded and nothing is computed. Each
kernel is then compiled for a target with its arguments' types: `emax kernels check` prints
registers, spills, shared memory and loads, as ptxas and the assembly say.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..weights import EMAXWeights
from .backward import backward
from .forward import forward
from .program import Launch, recorded_launches

__all__ = ["TARGETS", "CompiledKernel", "check", "compile_kernel", "launches_of"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
}


class CompiledKernel(NamedTuple):
    """What a compiler says of a kernel; None where it does not say it."""

    registers: int | None
    """Registers of a thread."""
    spilled: int | None
    """Bytes of a thread that are spilled to memory."""
    shared: int
    """Bytes of shared memory of a program."""
    loads: int
    """Loads from global memory, as they stand in the code."""
    wide_loads: int
    """Those of 16 bytes or more."""


def launches_of(
    weights: EMAXWeights, shape: tuple[int, int, int, int], dtype: torch.dtype, channels_last: bool
) -> tuple[list[Launch], list[Launch]]:
    """Record the launches of a forward and a backward pass over x of this shape in training."""
    config = weights.config
    meta = [None if t is None else t.detach().to("meta") for t in weights[1:]]
    weights = EMAXWeights(config, *meta)  # type: ignore[arg-type]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, device="meta", dtype=dtype, memory_format=layout)
    noise = None
    if weights.controller_weight is not None:
        noise = torch.empty(shape[0], len(config.candidates), device="meta")
    with recorded_launches() as first:
        _, saved = forward(x, weights, noise, True)
    with recorded_launches() as second:
        backward(torch.empty_like(x), x, weights, saved[0])
    return first, second


def check(
    weights: EMAXWeights, shape: tuple[int, int, int, int], target: str, kernels: Sequence[str] = ()
) -> dict[str, CompiledKernel]:
    """Compile the kernels of both passes over x of this shape, in bfloat16 and channels_last.

    Args:
        weights: The constants and tensors of the layer.
        shape: The shape of x, [b, c, h, w].
        target: A name in `TARGETS`.
        kernels: Names of kernels; by default all.

    Returns:
        What each kernel needs, by its name; a kernel with several variants has a name for each.
    """
    results: dict[str, CompiledKernel] = {}
    seen = set()
    for launch in chain(*launches_of(weights, shape, torch.bfloat16, True)):
        name = launch.kernel.__name__
        key = (name, tuple(launch.constants.items()), tuple(a is None for a in launch.arguments))
        if key in seen or (kernels and name not in kernels):
            continue
        seen.add(key)
        variant = sum(known[0] == name for known in seen)
        full = name if variant == 1 else f"{name} {variant}"
        results[full] = compile_kernel(launch, TARGETS[target])
    return results


def compile_kernel(launch: Launch, target: GPUTarget) -> CompiledKernel:
    """Compile the kernel of a launch as Triton would at its first run on such a GPU."""
    kernel = launch.kernel
    values: dict[str, Any] = dict(zip(kernel.arg_names, launch.arguments, strict=False))
    values |= launch.constants
    fixed = {parameter.name: parameter.do_not_specialize for parameter in kernel.params}
    constants = {
        name: value
        for name, value in values.items()
        # Triton takes a number that is 1, such as a stride, for a constant.
        if value is None or name in launch.constants or (_is_one(value) and not fixed[name])
    }
    signature = {
        name: "constexpr" if name in constants else _type_of(values[name])
        for name in kernel.arg_names
    }
    aligned = [
        name
        for name in kernel.arg_names
        if name not in constants
        and (isinstance(values[name], Tensor) or (_is_aligned(values[name]) and not fixed[name]))
    ]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options={"num_warps": launch.warps})
    return _described(compiled, target)


def _type_of(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_one(value: Any) -> bool:
    return isinstance(value, int) and value == 1


def _is_aligned(value: Any) -> bool:
    return isinstance(value, int) and value % 16 == 0


def _described(compiled: Any, target: GPUTarget) -> CompiledKernel:
    shared = compiled.metadata.shared
    if target.backend == "hip":
        code = compiled.asm["amdgcn"]
        loads = re.findall(r"global_load_(\w+)|buffer_load_(\w+)", code)
        wide = [pair for pair in loads if "x4" in "".join(pair)]
        registers = re.search(r"\.vgpr_count:\s+(\d+)", code)
        spilled = re.search(r"\.vgpr_spill_count:\s+(\d+)", code)
        return CompiledKernel(
            int(registers[1]) if registers else None,
            4 * int(spilled[1]) if spilled else None,
            shared,
            len(loads),
            len(wide),
        )
    code = compiled.asm["ptx"]
    loads = re.findall(r"ld\.global[\w.:]*", code)
    wide = [load for load in loads if ".v4." in load or ".v8." in load]
    # Loads ahead go to shared memory.
    ahead = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]+\], \[[^]]+\], (\w+)", code)
    wide += [size for size in ahead if int(size, 0) >= 16]
    registers, spilled = _ptxas(code)
    return CompiledKernel(registers, spilled, shared, len(loads) + len(ahead), len(wide))


def _ptxas(code: str) -> tuple[int, int]:
    """Let ptxas, which comes with Triton, count registers and spilled bytes."""
    architecture = re.search(r"\.target (sm_\w+)", code)
    assert architecture
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        command = [str(_PTXAS), "-v", f"--gpu-name={architecture[1]}", file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    assert registers
    assert spilled
    return int(registers[1]), int(spilled[1])
