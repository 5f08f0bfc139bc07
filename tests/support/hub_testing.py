"""What the tests of weights share: processes that know the local hub alone.

pytest's first process loads this, by way of conftest.py, and has no need of torch.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from hub_server import Hub
from interpreters import ENVIRONMENT, Interpreter

if TYPE_CHECKING:
    from torch import Tensor

EMAX = "import sys; from emax_cli import main; sys.exit(main(sys.argv[1:]))"
REPO = "me/test_resnet_emax.cats"


class Published(NamedTuple):
    """A run, the hub that has its release, and the home of who published it."""

    run: Path
    hub: Hub
    home: Path
    stdout: str


@functools.cache
def _interpreter() -> Interpreter:
    """One without the hub's client, which reads its environment when it is imported."""
    # timm imports wandb where it is installed, which takes as long as all of timm.
    optional = [name for name in ("wandb",) if importlib.util.find_spec(name)]
    interpreter = Interpreter("torch", "torchvision", "safetensors.torch", *optional)
    atexit.register(interpreter.close)
    return interpreter


def in_new_process(
    source: str, home: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python where the hub's client has its cache in `home` and no other hub."""
    clean = {name: value for name, value in ENVIRONMENT.items() if not name.startswith("HUGGING")}
    result = _interpreter().run(
        *("-c", source, *arguments),
        cwd=Path.cwd(),
        environment={**clean, "HF_HOME": str(home), **environment},
    )
    return subprocess.CompletedProcess(source, result.status, result.stdout, result.stderr)


def emax(
    *command: str | Path, hub: Hub, home: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the emax command against a hub."""
    return in_new_process(EMAX, home, *command, **{**hub.environment(home), **environment})


def as_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file."""
    import safetensors.torch

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole, metadata={"format": "pt"})
