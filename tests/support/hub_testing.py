"""What the tests of weights share: processes that know the local hub alone."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from hub_server import Hub
from torch import Tensor

EMAX = "import sys; from emax_timm.cli import main; sys.exit(main(sys.argv[1:]))"
REPO = "me/test_resnet_emax.cats"


class Published(NamedTuple):
    """A run, the hub that has its release, and the home of who published it."""

    run: Path
    hub: Hub
    home: Path
    stdout: str


def in_new_process(
    source: str, home: Path, *arguments: str | Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python where the hub's client has its cache in `home` and no other hub."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", source, *map(str, arguments)],
        env={**clean, "HF_HOME": str(home), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
    )


def emax(
    *command: str | Path, hub: Hub, home: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the emax command against a hub."""
    return in_new_process(EMAX, home, *command, **{**hub.environment(home), **environment})


def as_bytes(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file."""
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole, metadata={"format": "pt"})
