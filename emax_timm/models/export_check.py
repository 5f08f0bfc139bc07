"""Comparison of an exported file with the model that it was made from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "TOLERANCE",
    "Check",
    "ExportError",
    "Shape",
    "first_line",
    "outputs_of",
    "random_images",
    "times",
    "verify",
]

# The largest absolute difference that is allowed, relative to max(1, the largest output).
TOLERANCE = 1e-4

Shape = tuple[int, int, int, int]
Run = Callable[[Tensor], list[Tensor]]


class ExportError(Exception):
    """The model could not be exported, or the file does not compute what the model does."""

    exit_code = 1


@dataclass(frozen=True)
class Check:
    """The result of a comparison on one input."""

    shape: Shape
    difference: float
    """Largest absolute difference over max(1, the largest output)."""

    def __str__(self) -> str:
        return f"{times(self.shape):<20} {self.difference:.1e}"


def verify(
    path: Path, model: nn.Module, format: str, shapes: Sequence[Shape], tolerance: float = TOLERANCE
) -> tuple[Check, ...]:
    """Compare an exported file with the model on a random input of each shape.

    Args:
        path: The exported file.
        model: The model that it was made from, on the CPU and in eval mode.
        format: "onnx" or "torch".
        shapes: The shapes [b, c, h, w] of the inputs.
        tolerance: Largest absolute difference allowed, relative to max(1, the largest output).

    Raises:
        ExportError: If the file cannot be read or run, or differs from the model; the message
            names the input.
    """
    try:
        run = _open_onnx(path) if format == "onnx" else _open_program(path)
    except Exception as error:  # onnxruntime's and torch's errors have no common class
        raise ExportError(f"the exported file cannot be read: {first_line(error)}") from error
    checks = []
    for number, shape in enumerate(shapes, 1):
        images = random_images(shape, seed=number)
        name = f"input {number}, {times(shape)}"
        with torch.no_grad():
            expected = outputs_of(model(images))
            try:
                actual = run(images)
            except Exception as error:
                message = f"the exported file fails on {name}: {first_line(error)}"
                raise ExportError(message) from error
        if [tensor.shape for tensor in actual] != [tensor.shape for tensor in expected]:
            raise ExportError(f"the exported file's outputs have other shapes on {name}")
        if not all(tensor.isfinite().all() for tensor in expected):
            raise ExportError(f"the model's own output is not finite on {name}")
        difference = max(
            ((a - e).abs().max() / e.abs().max().clamp(min=1)).item()
            for a, e in zip(actual, expected, strict=True)
        )
        if not difference <= tolerance:  # true for NaN too
            raise ExportError(
                f"the exported file is {difference:.1e} away from the model on {name} "
                f"(at most {tolerance:.0e} is allowed)"
            )
        checks.append(Check(shape, difference))
    return tuple(checks)


def _open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    session = onnxruntime.InferenceSession(
        path, sess_options=options, providers=["CPUExecutionProvider"]
    )
    (entry,) = session.get_inputs()

    def run(images: Tensor) -> list[Tensor]:
        arrays: Any = session.run(None, {entry.name: images.numpy()})
        return [torch.from_numpy(array) for array in arrays]

    return run


def _open_program(path: Path) -> Run:
    with path.open("rb") as stream:
        program = torch.export.load(stream).module()
    return lambda images: outputs_of(program(images))


def outputs_of(result: Any) -> list[Tensor]:
    """Return the tensors that a model returns, one or several, as a list."""
    return [result] if isinstance(result, Tensor) else list(result)


def random_images(shape: Sequence[int], seed: int) -> Tensor:
    """Draw images from the standard normal distribution, without using the global generator."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed))


def times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message; exporters append pages to it."""
    line = next(iter(str(error).strip().splitlines()), "")
    return line.removesuffix(".") or type(error).__name__
