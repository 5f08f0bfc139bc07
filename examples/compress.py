"""A smaller network: int8 by onnxruntime, and pruning, with the accuracy that each of them costs.

    python examples/compress.py
    python examples/compress.py --model local-dir:runs/quickstart

The model is exported to ONNX, quantised to int8 with ranges from 256 training images (static
quantisation: weights and activations), and tested on the packaged test images beside the model in
PyTorch. Then a copy of it is pruned: of the weights of all convolutions and linear layers together,
those of smallest magnitude become 0 (unstructured pruning, without training after it).
"""

import argparse
import contextlib
import copy
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.nn.utils import prune

import emax_timm  # noqa: F401  (registers the models with timm)
from emax_timm.hub import export
from emax_timm.samples.scenes import SAMPLE

SPARSITIES = (0.3, 0.5, 0.7)


def load_images(split: str, data_config: dict[str, Any], count: int) -> tuple[Tensor, Tensor]:
    """Load images preprocessed for the model, [n, c, h, w], and their labels [n]."""
    mode = "L" if data_config["input_size"][0] == 1 else "RGB"
    transform: Any = create_transform(**data_config, is_training=False)
    dataset: Any = create_dataset("", root=str(SAMPLE), split=f"{split}.tar", input_img_mode=mode)
    # The files are sorted by class, so a stride takes equally many of each.
    chosen = range(0, len(dataset), max(1, len(dataset) // count))
    images, labels = zip(*(dataset[index] for index in chosen), strict=True)
    return torch.stack([transform(image) for image in images]), torch.tensor(labels)


def accuracy(predict: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> float:
    """Measure the accuracy of a function from images [n, c, h, w] to logits [n, classes]."""
    logits = torch.cat([predict(part) for part in images.split(50)])
    return (logits.argmax(dim=1) == labels).double().mean().item()


def quantise(source: Path, target: Path, calibration: Tensor) -> None:
    """Quantise an ONNX file to int8, with the ranges of activations on these images."""
    from onnxruntime.quantization import CalibrationDataReader, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Batches(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(calibration.split(16))

        def get_next(self) -> dict[str, np.ndarray] | None:  # pyright: ignore[reportIncompatibleMethodOverride]
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch.numpy()}

    prepared, before = source.with_name("prepared.onnx"), Path.cwd()
    os.chdir(source.parent)  # onnxruntime leaves files where it is called
    try:
        # timm's test_resnet has pools beside its convolutions, whose sizes are merged on demand.
        quant_pre_process(str(source), str(prepared), auto_merge=True)
        quantize_static(str(prepared), str(target), Batches())
    finally:
        os.chdir(before)


def onnx_model(file: Path) -> Callable[[Tensor], Tensor]:
    """Open an ONNX file as a function from images to logits, on the CPU."""
    from onnxruntime import InferenceSession

    session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def pruned(model: nn.Module, sparsity: float) -> nn.Module:
    """Copy a model, with this fraction of its convolutions' and linear layers' weights at 0."""
    model = copy.deepcopy(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    weights = [(layer, "weight") for layer in layers]
    prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=sparsity)
    for layer in layers:
        prune.remove(layer, "weight")  # the zeros stay; the mask and its hook go
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description="Quantisation and pruning.")
    parser.add_argument("--model", default="test_resnet_emax", help="model with weights")
    parser.add_argument("--limit", type=int, default=1000, help="use about this many test images")
    arguments = parser.parse_args()

    model: Any = timm.create_model(arguments.model, pretrained=True).eval()
    data_config = resolve_data_config(model=model)
    calibration, _ = load_images("train", data_config, 256)
    images, labels = load_images("test", data_config, arguments.limit)
    print(f"{arguments.model}: test accuracy on {len(labels)} images, chance 0.100")
    print("model            accuracy   file, kB")

    def row(name: str, predict: Callable[[Tensor], Tensor], file: Path | None = None) -> None:
        size = f"{file.stat().st_size / 1000:9.1f}" if file else ""
        print(f"{name:15}  {accuracy(predict, images, labels):8.3f}  {size}".rstrip(), flush=True)

    with torch.inference_mode():
        row("float32", model)
        with tempfile.TemporaryDirectory() as folder:
            float32, int8 = (Path(folder, f"{name}.onnx") for name in ("float32", "int8"))
            with contextlib.redirect_stdout(io.StringIO()):  # the check of the file has a table
                status = export([arguments.model, "--pretrained", "--output", str(float32)])
            if status:
                raise SystemExit(status)
            row("float32, ONNX", onnx_model(float32), float32)
            quantise(float32, int8, calibration)
            row("int8, ONNX", onnx_model(int8), int8)
        for sparsity in SPARSITIES:
            row(f"pruned {sparsity:.0%}", pruned(model, sparsity))


if __name__ == "__main__":
    main()
