"""`emax backends` and `emax kernels`: the backends that compute the attention on this machine."""

import importlib.util
import os
import re
from collections.abc import Sequence

import torch

from .attention import EMAX
from .ops import explain
from .ops.cpp.library import build
from .runner import command
from .training.config import Parser, UsageError

__all__ = ["backends", "kernels"]


@command("emax backends")
def backends(argv: Sequence[str], prog: str) -> int:
    """Print for each backend whether it serves here, or why not, and return the exit status."""
    parser = Parser(
        prog,
        description="What computes the attention on this machine, the first that serves preferred. "
        "EMAX_BACKEND=NAME asks for one, and makes it an error where that cannot serve.",
        allow_abbrev=False,
    )
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    text = "device of the tensors"
    parser.add_argument("--device", choices=devices, default=devices[-1], help=text)
    types, text = ["float32", "bfloat16", "float16"], "dtype of the tensors"
    parser.add_argument("--dtype", choices=types, default="float32", help=text)
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    x = torch.zeros(1, 64, 8, 8, device=options.device, dtype=dtype)
    layer = EMAX(64, device=options.device)
    for name, reason in explain(x, layer.weights()).items():
        verdict = "serves here" if reason is None else f"does not serve: {reason}"
        print(f"{name:<10} {verdict} ({options.device}, {options.dtype})")
    return 0


@command("emax kernels")
def kernels(argv: Sequence[str], prog: str) -> int:
    """Build the C++ backend, or compile the Triton kernels for GPUs; returns the exit status."""
    parser = Parser(
        prog,
        description="The kernels behind the backends: cpp in C++ for CPUs, triton for GPUs.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "action",
        choices=["build", "check"],
        help="build: compile the C++ kernels for this machine; check: compile the Triton kernels, "
        "here and without a GPU, and print what they need of one",
    )
    parser.add_argument(
        "--target", default="sm_90", help="check: the GPU, %(default)s by default, or all"
    )
    parser.add_argument(
        "--shape", default="256x56", help="check: channels x image size, %(default)s by default"
    )
    parser.add_argument("--kernel", action="append", default=[], help="check: this kernel alone")
    options = parser.parse_args(argv)
    if options.action == "check":
        return _check(options.target, options.shape, options.kernel)
    from .training.progress import working  # it loads all of training, which the rest needs not

    try:
        with working("building the kernels"):
            library = build()
        print(f"built {library}; EMAX uses it from now on (EMAX_BACKEND=portable does not)")
    except OSError as error:
        raise UsageError(str(error)) from error
    return 0


def _check(target: str, shape: str, names: Sequence[str]) -> int:
    """Print what the Triton kernels need of a GPU; 1 if one of them spills registers."""
    if importlib.util.find_spec("triton") is None:
        raise UsageError("Triton is not installed: pip install triton (on Linux torch brings it)")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("TRITON_INTERPRET=1 leaves nothing to compile: unset it")
    from .ops.triton.compile_check import TARGETS, check

    if target not in (*TARGETS, "all"):
        raise UsageError(f"unknown target {target}: it must be one of {', '.join(TARGETS)}, all")
    match = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,3})", shape)
    if match is None:
        raise UsageError(f"--shape must be channels x size, like 256x56, not {shape}")
    channels, size = int(match[1]), int(match[2])
    layer = EMAX(channels, device="meta")
    spills = 0
    for name in TARGETS if target == "all" else [target]:
        print(f"{name}, {channels} channels, {size} x {size}, bfloat16, channels_last")
        print(f"{'kernel':<24}{'registers':>10}{'spilled':>9}{'shared':>8}{'loads':>7}{'wide':>6}")
        results = check(layer.weights(), (128, channels, size, size), name, names)
        if not results:
            raise UsageError(f"there is no kernel {', '.join(names)}")
        for kernel, needs in results.items():
            registers, spilled, shared, loads, wide = needs
            print(f"{kernel:<24}{registers:>10}{spilled:>9}{shared:>8}{loads:>7}{wide:>6}")
            spills += bool(spilled)
    return 1 if spills else 0
