"""The library of C++ operators: built once per version of torch and kind of CPU, loaded on demand.

`emax kernels build` compiles the sources beside this file. From then on the backend `cpp` serves.
"""

import hashlib
import logging
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..weights import EMAXWeights

__all__ = ["BuildError", "build", "library_path", "problem"]

_logger = logging.getLogger(__name__)

SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
HEADERS = sorted(Path(__file__).parent.glob("*.h"))
# These flags give the width of ATen's vectors; the compiler needs its own flags for the same.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma", "-mf16c"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c"],
}


class BuildError(RuntimeError):
    """The C++ library cannot be built; the message is one line that says why."""

    exit_code = 2


def library_path() -> Path:
    """Return the path that the library for this source, this torch and this CPU is built to."""
    root = os.environ.get("EMAX_KERNELS_DIR") or Path.home() / ".cache" / "emax_timm"
    code = b"".join(path.read_bytes() for path in [*SOURCES, *HEADERS])
    digest = hashlib.sha256(code).hexdigest()[:12]
    capability = torch.backends.cpu.get_cpu_capability().replace(" ", "_")
    return Path(root) / f"emax_cpu-torch{torch.__version__}-{capability}-{digest}.so"


def build() -> Path:
    """Compile the library and move it to `library_path()` in one atomic step.

    Raises:
        BuildError: If there is no compiler, or if it fails.
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
            raise BuildError(f"the kernels cannot be built: {' '.join(reasons[:1])}") from None
        os.replace(Path(folder) / "emax_cpu.so", path)
    return path


# torch.compile calls this while it traces, instead of tracing the opening of files.
@torch.compiler.assume_constant_result
def problem() -> str | None:
    """Load the library unless it was tried before; return None if it is loaded, else the reason."""
    global _problem
    if _problem is _NOT_TRIED:
        _problem = _load()
    return _problem


_NOT_TRIED = "it has not been tried yet"
_problem: str | None = _NOT_TRIED


def _load() -> str | None:
    path = library_path()
    if not path.is_file():
        return "it is not built for this version of torch and this CPU: run `emax kernels build`"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        reason = " ".join(str(error).split())
        reason = f"{path} cannot be loaded ({reason}): run `emax kernels build`"
        _logger.warning("EMAX runs without its C++ backend: %s", reason)
        return reason
    _register_fakes()
    return None


def _register_fakes() -> None:
    """Register with torch.compile the shapes that the operators return."""
    register = torch.library.register_fake

    @register("emax_timm::forward")
    def _(x: Tensor, fields: list[Tensor | None], noise: object, *arguments: Any) -> list[Tensor]:
        groups, keep = arguments[0], arguments[-1]
        has_global_gate = EMAXWeights(None, *fields).global_reduce_weight is not None  # type: ignore[arg-type]
        b, c, h, w = x.shape
        vector, image = [b, groups, c // groups], [b, groups, h, w]
        shapes = [vector, image, image, vector, vector, vector] + [vector] * has_global_gate
        kept = (x.new_empty(shape, dtype=torch.float32) for shape in shapes if keep)
        return [torch.empty_like(x), *kept]

    @register("emax_timm::backward")
    def _(x: Tensor, grad: Tensor, fields: list[Tensor | None], *arguments: Any) -> list[Tensor]:
        # Warm-up and temperature, the last two, have no gradient.
        weights = (tensor for tensor in fields[:-2] if tensor is not None)
        grads = (torch.empty_like(tensor, dtype=torch.float32) for tensor in weights)
        return [torch.empty_like(x), *grads]
