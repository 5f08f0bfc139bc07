"""What `emax export` refuses: one line on stderr that says what to do, nothing written."""

import json
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from export_testing import SIZE, OtherInGraphs, files_in
from torch import nn

from emax_timm.hub import export, export_model
from emax_timm.training import UsageError

Refused = Callable[..., str]


class Canary:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.path), "w")


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> Refused:
    """Runs an export that must be refused and returns its one line."""
    monkeypatch.chdir(tmp_path)

    def refused(command: str) -> str:
        before = files_in(tmp_path)
        status = export(command.split())
        captured = capsys.readouterr()
        assert (status, captured.out) == (2, "")
        (line,) = captured.err.splitlines()
        assert line.startswith("emax export: error: ")
        assert files_in(tmp_path) == before
        return line

    return refused


MISTAKES = {
    "nothing": ("", ["MODEL", "--output"]),
    "no output": ("resnet18_emax", ["--output"]),
    "flag": ("resnet18_emax --ouput a.onnx", ["--ouput", "--output"]),
    "model": ("resnet18_emx --output a.onnx", ["resnet18_emx", "resnet18_emax"]),
    "folder of a model": ("local-dir:nowhere --output a.pt2", ["nowhere"]),
    "format": ("resnet18 --output a.onnx --format onx", ["onx", "onnx"]),
    "suffix": ("resnet18 --output a.pt", ["a.pt", ".onnx or .pt2"]),
    "suffix of the other format": ("resnet18 --output a.pt2 --format onnx", ["a.pt2", "onnx"]),
    "output folder": ("resnet18 --output nowhere/a.onnx", ["no folder nowhere"]),
    "output is a folder": ("resnet18 --output folder.onnx", ["folder.onnx is a folder"]),
    "output exists": ("resnet18 --output there.onnx", ["there.onnx", "--overwrite"]),
    "output below a file": ("resnet18 --output there.onnx/a.onnx", ["no folder there.onnx"]),
    "long name": (f"resnet18 --output {'a' * 300}.pt2", ["aaa", "too long"]),
    "checkpoint": ("resnet18 --output a.pt2 --checkpoint no.safetensors", ["no.safetensors"]),
    "checkpoint of another model": (
        "resnet18 --output a.pt2 --checkpoint other.safetensors",
        ["other.safetensors", "another model"],
    ),
    "corrupt checkpoint": (
        "resnet18 --output a.pt2 --checkpoint broken.safetensors",
        ["broken.safetensors", "not a complete"],
    ),
    "pickle": ("resnet18 --output a.pt2 --checkpoint w.pth", ["w.pth", ".safetensors"]),
    "pickle in a folder": ("local-dir:pickled --output a.pt2", ["model.safetensors"]),
    "unpublished weights": ("resnet50t --pretrained --output a.pt2", ["resnet50t"]),
    "classes": ("resnet18 --output a.pt2 --num-classes -1", ["num_classes", "-1"]),
    "size": ("resnet18 --output a.pt2 --img-size 0", ["img_size", "at least 1"]),
    "number": ("resnet18 --output a.pt2 --img-size big", ["--img-size", "big"]),
    "model keyword": (
        "resnet18_emax --output a.pt2 --model-kwargs atn_stages=[1]",
        ["atn_stages", "attn_stages"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_export_refuses_a_mistake(refused: Refused, tmp_path: Path, name: str) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "there.onnx").write_text("precious")
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 9)
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Canary(canary)))
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "config.json").write_text(json.dumps({"architecture": "resnet18"}))
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    mistake, hints = MISTAKES[name]
    line = refused(mistake)
    for hint in hints:
        assert hint in line
    assert not canary.exists()


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_export_without_a_package_names_the_extra(
    refused: Refused, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    line = refused("resnet10t --output a.onnx")
    assert f"the package {package}: pip install 'emax-timm[export]'" in line


def test_pt2_needs_no_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    assert export_model(OtherInGraphs(1.0).eval(), tmp_path / "a.pt2", input_size=SIZE).checks


@pytest.mark.slow
def test_model_with_fixed_sizes_inside_is_named_with_the_way_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["vit_tiny_patch16_224", "--model-kwargs", "depth=1", "--output"]
    path = tmp_path / "vit.pt2"
    assert export([*arguments, str(path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 x 3 x 224 x 224" in line
    assert "--fixed-size" in line
    assert files_in(tmp_path) == {}
    assert export([*arguments, str(path), "--fixed-size"]) == 0
    assert export([*arguments, str(path), "--overwrite", "--img-size", "100"]) == 1
    assert "does not take images of 2 x 3 x 100 x 100" in capsys.readouterr().err


def test_onnx_of_more_than_two_gigabytes_is_refused(tmp_path: Path) -> None:
    model = nn.Module()
    # All elements are one number: no memory is used.
    model.weight = nn.Parameter(torch.zeros(1).expand(3, 200_000_000))
    with pytest.raises(UsageError, match=r"2 GB, and the weights are 2.4 GB; export to a .pt2"):
        export_model(model.eval(), tmp_path / "a.onnx", input_size=SIZE)
    assert files_in(tmp_path) == {}


def test_model_in_training_mode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval"):
        export_model(OtherInGraphs(1.0), tmp_path / "a.pt2", input_size=SIZE)
