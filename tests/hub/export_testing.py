"""What the tests of export share. Without the packages of the extra they are skipped, but in CI."""

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

if os.environ.get("CI"):
    import onnx
    import onnxruntime
    import onnxscript
else:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    onnxscript = pytest.importorskip("onnxscript")

__all__ = ["SIZE", "OtherInGraphs", "files_in", "onnx", "onnxruntime", "onnxscript"]

SIZE = (3, 64, 64)


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


class OtherInGraphs(nn.Module):
    """Computes something else once it is exported, `factor` times as much."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 4, 1)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x).mean((2, 3))
        return y * self.factor if torch.compiler.is_compiling() else y
