"""`emax backends` and `emax kernels`: what computes the attention on this machine."""

import argparse
import sys
from collections.abc import Sequence

import torch

from .attention import EMAX
from .ops import explain
from .ops.cpp.library import BuildError, build

__all__ = ["backends", "kernels"]


def backends(argv: Sequence[str] | None = None, prog: str = "emax backends") -> int:
    """Print for each backend whether it serves here, or why not; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog,
        description="What computes the attention on this machine, the first that serves preferred. "
        "EMAX_BACKEND=NAME asks for one, and makes it an error where that cannot serve.",
        allow_abbrev=False,
    )
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    parser.add_argument("--device", choices=devices, default=devices[-1])
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    options = parser.parse_args(argv)
    dtype = getattr(torch, options.dtype)
    x = torch.zeros(1, 64, 8, 8, device=options.device, dtype=dtype)
    layer = EMAX(64, device=options.device)
    for name, reason in explain(x, layer.weights()).items():
        verdict = "serves here" if reason is None else f"does not serve: {reason}"
        print(f"{name:<10} {verdict} ({options.device}, {options.dtype})")
    return 0


def kernels(argv: Sequence[str] | None = None, prog: str = "emax kernels") -> int:
    """Build the C++ backend as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(prog, description="EMAX in C++ for CPUs.", allow_abbrev=False)
    parser.add_argument("action", choices=["build"], help="build: compile it for this machine")
    parser.parse_args(argv)
    try:
        print(f"built {build()}; EMAX uses it from now on (EMAX_BACKEND=portable does not)")
    except (OSError, BuildError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
