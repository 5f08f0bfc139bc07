"""`emax backends` and `emax kernels`: the backends that compute the attention on this machine."""

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
    """Build the C++ backend for this machine, and return the exit status."""
    parser = Parser(prog, description="EMAX in C++ for CPUs.", allow_abbrev=False)
    parser.add_argument("action", choices=["build"], help="build: compile it for this machine")
    parser.parse_args(argv)
    try:
        print(f"built {build()}; EMAX uses it from now on (EMAX_BACKEND=portable does not)")
    except OSError as error:
        raise UsageError(str(error)) from error
    return 0
