"""The files of `emax export` in onnxruntime's quantisation tools."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from export_testing import onnxruntime
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

import emax_timm
from emax_timm.hub.export import export

SAMPLES = Path(emax_timm.__file__).parent / "samples" / "fashion_mnist"


def sample_images(model: nn.Module, archive: str, count: int) -> tuple[Tensor, list[str]]:
    """Images of the packaged sample, as the model takes them, and the names of their classes."""
    config = resolve_model_data_config(model)
    transform: Any = create_transform(**config, is_training=False)
    mode = "L" if config["input_size"][0] == 1 else "RGB"
    images, classes = [], []
    with tarfile.open(SAMPLES / archive) as tar:
        members = [member for member in tar.getmembers() if member.isfile()]
        for member in members[:: len(members) // count][:count]:
            file = tar.extractfile(member)
            assert file is not None
            image = Image.open(io.BytesIO(file.read())).convert(mode)
            images.append(transform(image))
            classes.append(Path(member.name).parent.name)
    return torch.stack(images), classes


class Calibration:
    """Batches of images by the input's name, as onnxruntime reads them."""

    def __init__(self, images: Tensor) -> None:
        self._batches: Iterator[Tensor] = iter(images.split(16))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self._batches, None)
        return None if batch is None else {"images": batch.numpy()}


@pytest.mark.parametrize("name", ["test_resnet_emax", "test_convnext_emax"])
@pytest.mark.slow
def test_static_int8_classifies_as_float32_does(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    monkeypatch.chdir(tmp_path)  # onnxruntime leaves files where it is called
    model = timm.create_model(name, pretrained=True).eval()
    files = [tmp_path / f"{kind}.onnx" for kind in ("float", "prepared", "int8")]
    assert export([name, "--pretrained", "--output", str(files[0])]) == 0
    # The pools beside test_resnet's convolutions have sizes that the tool does not know to be
    # theirs: it needs telling, with attention or without.
    quant_pre_process(str(files[0]), str(files[1]), auto_merge=name == "test_resnet_emax")
    calibration, _ = sample_images(model, "train.tar", 64)
    quantize_static(str(files[1]), str(files[2]), Calibration(calibration))  # pyright: ignore[reportArgumentType]

    images, _ = sample_images(model, "test.tar", 100)
    with torch.no_grad():
        expected = model(images)
    session = onnxruntime.InferenceSession(files[2], providers=["CPUExecutionProvider"])
    outputs = [session.run(None, {"images": batch.numpy()})[0] for batch in images.split(25)]
    actual = torch.from_numpy(np.concatenate(outputs))
    assert not torch.equal(actual, expected)
    assert (actual.argmax(1) == expected.argmax(1)).float().mean() >= 0.9
    assert torch.corrcoef(torch.stack([actual.flatten(), expected.flatten()]))[0, 1] > 0.98


@pytest.mark.slow
def test_every_network_that_is_exported_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With strides and paddings whose sizes a tool derives in another form than torch does."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    monkeypatch.chdir(tmp_path)
    file = tmp_path / "model.onnx"
    options = ["--model-kwargs", "layers=(1,1,1,1)", "channels=(8,16,16,32)"]
    assert export(["resnet18_emax", *options, "--img-size", "64", "--output", str(file)]) == 0
    quant_pre_process(str(file), str(tmp_path / "prepared.onnx"))
