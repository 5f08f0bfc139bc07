"""Export of a model to ONNX or torch.export's .pt2, and comparison of the file with the model.

EMAX's choice of a group count is an argmax: where two counts are nearly tied, the rounding of
another runtime can change the choice, and with it the output. Initial weights choose the same count
for every input. With trained weights a comparison may fail for this reason alone; its error names
the input, so that `EMAX.attention` can show how close the tie was.
"""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from .. import files
from ..errors import UsageError
from ..files import replace_file
from .export_check import (
    Check,
    ExportError,
    Shape,
    first_line,
    outputs_of,
    random_images,
    times,
    verify,
)
from .onnx_shapes import take_sizes_from_tensors

__all__ = ["FORMATS", "ExportReport", "check_export", "export_model"]

FORMATS = {".onnx": "onnx", ".pt2": "torch"}
# The opset that torch's ONNX translations are written for; it converts from it to later ones.
OPSET = 18
# A protocol buffer holds at most 2 GiB, and the graph needs some of it.
LARGEST_ONNX = 2**31 - 2**24
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
AXES = {0: "batch", 2: "height", 3: "width"}


@dataclass(frozen=True)
class ExportReport:
    """The file that was written, the inputs it takes, and how far it is from the model."""

    path: Path
    format: str
    ranges: dict[str, tuple[int, int | None]]
    """Least and greatest batch, height and width; None where there is no bound."""
    checks: tuple[Check, ...]

    def __str__(self) -> str:
        kind = f"ONNX, opset {OPSET}" if self.format == "onnx" else "torch.export"
        inputs = ", ".join(_bounds(name, *bounds) for name, bounds in self.ranges.items())
        return "\n".join(
            [
                f"{self.path}: {kind}, {self.path.stat().st_size / 1e6:.1f} MB; {inputs}",
                f"{'input':<20} max difference",
                *map(str, self.checks),
            ]
        )


def export_model(
    model: nn.Module,
    path: Path,
    format: str | None = None,
    *,
    input_size: tuple[int, int, int] | None = None,
    fixed_size: bool = False,
    fixed_batch: bool = False,
    overwrite: bool = False,
    stage: Callable[[str], object] = lambda _: None,
) -> ExportReport:
    """Write `model` to `path`, compare the file with the model, and only then put it in place.

    The ONNX model has one input, `images`, and the outputs `output` or `features_0`, … The .pt2
    file is read with `torch.export.load`; it runs without this package.

    Args:
        model: A model that maps images [b, c, h, w] to a tensor or a list of tensors; on the CPU,
            in float32 and in eval mode.
        path: File to write, in a folder that exists.
        format: "onnx" or "torch"; None for the one that the suffix implies.
        input_size: Channels, height and width to trace with; None for those of the model's config.
        fixed_size: Accept that height and width only. Otherwise the file accepts those in the
            report's ranges, which come from the trace; an input whose last stage has 1 x 1 pixels
            gives a different trace.
        fixed_batch: Accept a batch of 1 only.
        overwrite: Replace an existing file.
        stage: Called with what is being done, at the beginning of each stage.

    Raises:
        ValueError: If the model is not as described.
        UsageError: If the path is refused, or a package is missing.
        ExportError: If the model cannot be exported, or the file does not compute what it does.
    """
    file_format = check_export(path, format, overwrite)
    _check_model(model, file_format)
    if input_size is None:
        config: Any = model.pretrained_cfg
        input_size = tuple(config["input_size"])
    batch = 1 if fixed_batch else 2
    example = random_images((batch, *input_size), seed=0)
    count = _count_outputs(model, example)
    fixed = {0: fixed_batch, 2: fixed_size, 3: fixed_size}
    axes = {axis: name for axis, name in AXES.items() if not fixed[axis]}
    stage(f"tracing {type(model).__name__}")
    program = _trace(model, example, axes)
    ranges = _ranges(program)
    shapes = _shapes(example, ranges)
    checks: tuple[Check, ...] = ()

    def write(file: Path) -> None:
        nonlocal checks
        stage(f"writing {path}")
        _save(program, example, axes, count, file, file_format)
        stage(f"comparing {path} with the model")
        checks = verify(file, model, file_format, shapes)

    try:
        replace_file(path, write)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror or error}") from None
    return ExportReport(path, file_format, ranges, checks)


def _check_model(model: nn.Module, file_format: str) -> None:
    """Check the device, the mode and the size of a model that is to be exported."""
    tensors = [*model.parameters(), *model.buffers()]
    if model.training or any(tensor.device.type != "cpu" for tensor in tensors):
        raise ValueError("the model must be on the CPU and in eval mode: model.cpu().eval()")
    weight = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if file_format == "onnx" and weight > LARGEST_ONNX:
        raise UsageError(
            f"one ONNX file holds no more than 2 GB, and the weights are {weight / 1e9:.1f} GB; "
            "export to a .pt2 file"
        )


def _count_outputs(model: nn.Module, example: torch.Tensor) -> int:
    """Run the model on images, which shows whether it takes them, and count its outputs."""
    try:
        with torch.no_grad():
            return len(outputs_of(model(example)))
    except Exception as error:  # whatever the model raises
        raise ExportError(
            f"the model does not take images of {times(example.shape)}: {first_line(error)}"
        ) from error


def check_export(path: Path, format: str | None, overwrite: bool) -> str:
    """Check that a file can be written to `path` with the installed packages; return its format.

    Raises:
        UsageError: If it cannot.
    """
    by_suffix = FORMATS.get(path.suffix)
    if format not in (None, *FORMATS.values()):
        raise UsageError(f"format must be one of {', '.join(FORMATS.values())}, not {format}")
    if format is None and by_suffix is None:
        suffixes = " or ".join(FORMATS)
        raise UsageError(f"the suffix of {path} names no format; it must be {suffixes}")
    if format and by_suffix and format != by_suffix:
        raise UsageError(f"{path} is not a name for the format {format}")
    try:
        if not path.parent.is_dir():
            raise UsageError(f"there is no folder {path.parent}")
        if path.is_dir():
            raise UsageError(f"{path} is a folder")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists already; --overwrite replaces it")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from None
    files.check_target(path)
    for package in ONNX_PACKAGES if (format or by_suffix) == "onnx" else ():
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UsageError(
                f"export to ONNX needs the package {package}: pip install 'emax-timm[export]' "
                f"({error})"
            ) from None
    return format or str(by_suffix)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the log messages and warnings of the exporters; errors are raised all the same."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", *ONNX_PACKAGES)]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _trace(model: nn.Module, example: torch.Tensor, axes: dict[int, str]) -> ExportedProgram:
    """Trace the model's graph; `axes` are those whose size may differ from the example's."""
    dynamic = dict.fromkeys(axes, torch.export.Dim.DYNAMIC)
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(model, (example,), dynamic_shapes=(dynamic,), strict=False)
    except Exception as error:  # torch's own errors and whatever the model raises
        hint = "; --fixed-size and --fixed-batch ask for less" if axes else ""
        raise ExportError(
            f"torch.export cannot trace the model on images of {times(example.shape)} with "
            f"dynamic {', '.join(axes.values()) or 'nothing'}: {first_line(error)}{hint}"
        ) from error


def _ranges(program: ExportedProgram) -> dict[str, tuple[int, int | None]]:
    """Return the least and greatest batch, height and width that a traced graph takes."""
    (name,) = program.graph_signature.user_inputs
    shape: Any = next(node.meta["val"].shape for node in program.graph.nodes if node.name == name)
    bounds = {str(symbol): bound for symbol, bound in program.range_constraints.items()}
    ranges: dict[str, tuple[int, int | None]] = {}
    for axis, label in AXES.items():
        if isinstance(shape[axis], int):
            ranges[label] = (shape[axis], shape[axis])
            continue
        bound: Any = bounds[str(shape[axis])]
        least, most = int(bound.lower), int(bound.upper) if bound.upper.is_Integer else None
        # torch.export gives 2 where the trace implies no bound, because it specialises sizes of 0
        # and 1; the graph takes 1 all the same (`verify` runs a batch of 1).
        ranges[label] = (1 if least <= 2 else least, most)
    return ranges


def _shapes(example: torch.Tensor, ranges: dict[str, tuple[int, int | None]]) -> list[Shape]:
    """Choose the inputs to compare on: of the example's size, another aspect ratio, odd sides."""
    _, channels, height, width = example.shape

    def within(name: str, value: int, odd: bool = False) -> int:
        least, most = ranges[name]
        value = max(least, value if most is None else min(value, most))
        return value - 1 if odd and value % 2 == 0 and value > least else value

    sizes = [
        (1, height, width),
        (2, within("height", height * 3 // 4), within("width", width * 5 // 4)),
        (3, within("height", height + 13, odd=True), within("width", width + 5, odd=True)),
    ]
    return [(within("batch", b), channels, h, w) for b, h, w in sizes]


def _save(
    program: ExportedProgram,
    example: torch.Tensor,
    axes: dict[int, str],
    count: int,
    file: Path,
    format: str,
) -> None:
    names = ["output"] if count == 1 else [f"features_{number}" for number in range(count)]
    try:
        with _quiet():
            if format == "torch":
                with file.open("wb") as stream:  # a path would have to end in .pt2
                    torch.export.save(program, stream)
                return
            onnx_program: Any = torch.onnx.export(
                program,
                (example,),
                dynamo=True,
                dynamic_shapes=(axes,) if axes else None,
                input_names=["images"],
                output_names=names,
                opset_version=OPSET,
                verbose=False,
            )
            model = onnx_program.model_proto
            take_sizes_from_tensors(model)
            file.write_bytes(model.SerializeToString())
    except OSError:
        raise
    except Exception as error:
        raise ExportError(
            f"the model cannot be written as {format}: {first_line(error)}"
        ) from error


def _bounds(name: str, least: int, most: int | None) -> str:
    if least == most:
        return f"{name} {least}"
    return f"{name} from {least}" + ("" if most is None else f" to {most}")
