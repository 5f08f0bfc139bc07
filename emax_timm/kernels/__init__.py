"""EMAX's passes over feature maps in C++, for whoever has built them.

`emax kernels build` compiles the sources beside this file once per version of torch and kind of
CPU. From then on the attention uses them on CPUs for float32 and bfloat16 inputs; without them, or
with EMAX_KERNELS=off, it computes the same in PyTorch. EMAX_KERNELS=require makes the lack of them
an error.
"""

import argparse
import contextlib
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from ..attention.layer import Layer

__all__ = [
    "KernelError",
    "backward",
    "build",
    "exporting",
    "forward",
    "kernels",
    "library_path",
    "load",
    "serve",
    "using",
]

_logger = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
MODES = ("auto", "off", "require")
DTYPES = (torch.float32, torch.bfloat16)
# ATen's vectors are as wide as these flags say, and the compiler must be told as well.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


class KernelError(RuntimeError):
    """The kernels cannot be had; the message is one line that says why."""


def library_path() -> Path:
    """Where the kernels for this source, this torch and this CPU are once they are built."""
    root = os.environ.get("EMAX_KERNELS_DIR") or Path.home() / ".cache" / "emax_timm"
    code = b"".join(path.read_bytes() for path in [*SOURCES, *HEADERS])
    digest = hashlib.sha256(code).hexdigest()[:12]
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "_")
    return Path(root) / f"emax_cpu-torch{torch.__version__}-{capability}-{digest}.so"


def build() -> Path:
    """Compile the kernels and put them in place in one step.

    Raises:
        KernelError: If there is no compiler, or it fails.
    """
    from torch.utils import cpp_extension

    capability = torch.backends.cpu.get_cpu_capability()
    path = library_path()
    flags = ["-O3", "-fopenmp", "-fno-math-errno", f"-DCPU_CAPABILITY={capability}"]
    flags += [f"-DCPU_CAPABILITY_{capability}", *FLAGS.get(capability, [])]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        try:
            cpp_extension.load(
                "emax_cpu",
                [str(path) for path in SOURCES],
                extra_cflags=flags,
                extra_ldflags=["-fopenmp"],
                build_directory=folder,
                is_python_module=False,
            )
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reasons = [line for line in lines if "error:" in line or "not found" in line] or lines
            raise KernelError(f"the kernels cannot be built: {' '.join(reasons[:1])}") from None
        os.replace(Path(folder) / "emax_cpu.so", path)
    return path


def kernels(argv: Sequence[str] | None = None, prog: str = "emax kernels") -> int:
    """Build the kernels as the command line says; returns the exit status."""
    parser = argparse.ArgumentParser(prog, description="EMAX in C++ for CPUs.", allow_abbrev=False)
    parser.add_argument("action", choices=["build"], help="build: compile it for this machine")
    parser.parse_args(argv)
    try:
        print(f"built {build()}; EMAX uses it from now on (EMAX_KERNELS=off does not)")
    except (OSError, KernelError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# torch.compile calls this while it traces, rather than tracing what opens files.
@torch.compiler.assume_constant_result
def load() -> bool:
    """Load the kernels if they are built and wanted; whether they are there.

    Raises:
        KernelError: With EMAX_KERNELS=require, if they are not, or if its value is another one.
    """
    global _loaded
    if _loaded is None:
        _loaded = _load()
    return _loaded


_loaded: bool | None = None


@contextlib.contextmanager
def using(wanted: bool) -> Iterator[None]:
    """Compute with the kernels or without them, in this process.

    What torch.compile has compiled stays what it was when it was compiled.

    Raises:
        KernelError: If they are wanted but not there.
    """
    global _loaded
    there = load()
    if wanted and not there:
        raise KernelError("the kernels are not there; run `emax kernels build`")
    _loaded = wanted
    try:
        yield
    finally:
        _loaded = there


def _load() -> bool:
    mode = os.environ.get("EMAX_KERNELS", "auto")
    if mode not in MODES:
        raise KernelError(f"EMAX_KERNELS must be one of {', '.join(MODES)}, not {mode}")
    if mode == "off":
        return False
    path = library_path()
    problem = "they are not built for this version and this CPU; run `emax kernels build`"
    if path.is_file():
        try:
            torch.ops.load_library(path)
        except OSError as error:
            problem = f"{path} cannot be loaded ({error}); run `emax kernels build`"
            _logger.warning("EMAX runs without its kernels: %s", " ".join(problem.split()))
        else:
            _register_fakes()
            return True
    if mode == "require":
        raise KernelError(f"EMAX_KERNELS is {mode}, but {problem}")
    return False


def exporting() -> bool:
    """Whether torch.export traces, which writes plain operations down.

    torch 2.6 does not tell, and its compiler knows too little of autograd nodes: there this is true
    of torch.compile as well.
    """
    is_exporting = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return is_exporting()


def serve(x: Tensor) -> bool:
    """Whether the kernels compute on this tensor; autograd does not see into them."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and not torch.is_grad_enabled()
        and not exporting()
        # What counts operations on tensors without data cannot see into the kernels either.
        and not isinstance(x, FakeTensor)
        and not is_batchedtensor(x)  # torch.vmap has no rule for them
        and load()
    )


def forward(x: Tensor, layer: "Layer", noise: Tensor | None, keep: bool) -> list[Tensor]:
    """The output of a layer.

    With `keep` followed by what the backward pass needs: the fields of
    `attention.fine_maps.FineMaps`, and with a global gate the means of x * S, [b, F, d].
    """
    constants = (layer.groups, layer.batch_vote, layer.eps)
    return torch.ops.emax_timm.forward(x, *layer.parts(), noise, *constants, keep)


def backward(
    x: Tensor,
    grad: Tensor,
    layer: "Layer",
    fine: Sequence[Tensor],
    pooled: Tensor,
    noise: Tensor | None,
) -> list[Tensor]:
    """`attention.gradients.backward` of what `forward` has returned."""
    constants = (layer.groups, layer.batch_vote, layer.eps)
    kept = [*fine, pooled]
    return torch.ops.emax_timm.backward(x, grad, *layer.parts(), noise, kept, *constants)


def _register_fakes() -> None:
    """Tell torch.compile what shapes the operators return."""
    register = torch.library.register_fake

    @register("emax_timm::forward")
    def _(x: Tensor, *arguments: Any) -> list[Tensor]:
        global_gate, groups, keep = arguments[5], arguments[8], arguments[-1]
        b, c, h, w = x.shape
        vector, image = [b, groups, c // groups], [b, groups, h, w]
        shapes = [vector, image, image, vector, vector, vector] + [vector] * bool(global_gate)
        kept = (x.new_empty(shape, dtype=torch.float32) for shape in shapes if keep)
        return [torch.empty_like(x), *kept]

    @register("emax_timm::backward")
    def _(x: Tensor, grad: Tensor, grouping: object, *arguments: Any) -> list[Tensor]:
        weights = (tensor for part in arguments[:6] for tensor in part)
        grads = (torch.empty_like(tensor, dtype=torch.float32) for tensor in weights)
        return [torch.empty_like(x), *grads]
