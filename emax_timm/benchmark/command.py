"""`emax benchmark`: the command line of the benchmarks."""

import argparse
import json
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import check_target, replace_file
from ..runner import FailedRunError, command
from ..tables import marks, text_around, write_between
from ..training.config import Parser, TrainConfig, UsageError
from ..training.distributed import open_distributed_context
from . import growth, layers, loop, networks, onnx, settings, startup, threads
from .arguments import (
    a_count,
    a_shape,
    a_shape_of_any_rank,
    add_amp,
    add_device,
    add_images,
    add_methods,
    add_networks,
    add_shapes,
    add_tensors,
    device_of,
    tensors_of,
)
from .layers_report import report_modules
from .methods import COMPILED, GRAPH, available, split_method
from .networks_report import report_models

__all__ = ["benchmark", "benchmark_parser", "mark_of"]

Result = tuple[dict[str, Any], str]
"""The measurements, as they are written to JSON, and the report on them in Markdown."""


@command("emax benchmark")
def benchmark(argv: Sequence[str], prog: str) -> int:
    """Run the benchmark that the command line asks for, and return the exit status."""
    options = benchmark_parser(prog).parse_args(argv)
    mark = mark_of(options)
    try:
        if options.write is not None:
            text_around(options.write, mark)  # refuses a bad file before measuring
        for path in (options.json, getattr(options, "plot", None)):
            if path is not None:
                check_target(path)
        start = time.monotonic()
        result = options.run(options)
        if result is None:
            return 0
        found, report = result
        print(report)
        if options.write is not None:
            words = shlex.join([*prog.split(), *argv])
            made = f"Made by `{words}` in {time.monotonic() - start:.0f} seconds"
            write_between(options.write, mark, f"{made}:\n\n{report}\n")
        if options.json is not None:
            text = json.dumps(found, indent=2) + "\n"
            replace_file(options.json, lambda temporary: temporary.write_text(text))
    except AssertionError as error:  # two backends, or a file and its model, disagree
        raise FailedRunError(str(error)) from error
    except (OSError, RuntimeError) as error:
        if hasattr(error, "exit_code"):
            raise
        # Errors that torch raises for a device or a shape.
        raise UsageError(str(error)) from error
    return 0


def mark_of(options: argparse.Namespace) -> str:
    """Return the name of the marks between which --write puts the tables."""
    dims = getattr(options, "dims", 2)
    return options.mark if dims == 2 else f"{options.mark} --dims {dims}"


def _modules(options: argparse.Namespace) -> Result:
    dims = options.dims
    for shape in options.shapes or []:
        if len(shape) != dims + 2:
            text = "x".join(map(str, shape))
            raise UsageError(f"--dims {dims} takes shapes of {dims + 2} sizes, not {text}")
    known = layers.methods_of(dims)
    for method in options.methods or []:
        if method not in known:
            raise UsageError(f"--dims {dims} measures {'; '.join(known)}, not {method}")
    if options.channels_last and dims != 2:
        raise UsageError(f"--channels-last is a memory format of images, not of --dims {dims}")
    device, dtype, layout, amp = tensors_of(options)
    found = layers.measure_modules(
        options.shapes, options.rounds, device, dtype, layout, options.methods, amp, dims
    )
    return found, report_modules(found)


def _models(options: argparse.Namespace) -> Result:
    setting = networks.Setting(options.batch_size, options.img_size, *tensors_of(options))
    found = networks.measure_models(
        options.models,
        setting,
        options.rounds,
        _compiled_too(options, setting),
        training=not options.no_training,
        evaluation=not options.no_inference,
    )
    return found, report_models(found)


def _compiled_too(options: argparse.Namespace, setting: networks.Setting) -> list[str] | None:
    """Return the methods to measure, with those that --compile and --cuda-graph add to them."""
    flags = {COMPILED: options.compile, GRAPH: options.cuda_graph}
    modes = [mode for mode, wanted in flags.items() if wanted]
    if not modes:
        return options.methods
    methods = options.methods
    if methods is None:
        gpu = setting.device.type == "cuda"
        usual = networks.GPU_METHODS if gpu else list(networks.NETWORKS)
        methods = available(usual, setting.device, setting.amp or setting.dtype)
    eager = [name for name in methods if not {COMPILED, GRAPH} & set(split_method(name)[1])]
    return list(dict.fromkeys([*methods, *(f"{name}, {mode}" for mode in modes for name in eager)]))


def _onnx(options: argparse.Namespace) -> Result:
    tensors = device_of(options), torch.float32, torch.contiguous_format
    setting = networks.Setting(options.batch_size, options.img_size, *tensors)
    found = onnx.measure_onnx(options.models, setting, options.rounds, options.methods)
    return found, onnx.report_onnx(found)


def _train(options: argparse.Namespace) -> Result | None:
    """Benchmark the training loop; the result is None on all ranks but the first."""
    data: dict[str, Any] = {"dataset": "sample/fashion_mnist", "train_split": "train.tar"}
    if options.data_dir is not None:
        data = {"data_dir": str(options.data_dir)}
    config = TrainConfig(
        **loop.RECIPE,
        **data,
        model=options.model,
        img_size=options.img_size,
        batch_size=options.batch_size,
        workers=options.workers,
        pin_mem=torch.cuda.is_available(),
        amp=options.amp,
        device=options.device,
        epochs=1 + options.rounds,
    )
    with open_distributed_context(options.device) as context:
        found = loop.compare(config, context)
    return (found, loop.report(found)) if context.is_primary else None


def _growth(options: argparse.Namespace) -> Result:
    if options.plot is not None:
        growth.check_drawing()
    base = growth.Point(*options.shape, factor=options.factor)
    found = growth.measure_growth(
        base, options.steps, options.rounds, *tensors_of(options)[:3], options.methods
    )
    report = growth.report_growth(found)
    if options.plot is not None:
        growth.draw_growth(found, options.plot)
        if options.write is not None:
            picture = Path(os.path.relpath(options.plot, options.write.parent)).as_posix()
            report = f"![Time and memory along each axis]({picture})\n\n{report}"
    return found, report


def _settings(options: argparse.Namespace) -> Result:
    device = device_of(options)
    shapes = options.shapes or layers.SHAPES
    found = settings.measure_settings(shapes, options.rounds, device, options.methods)
    return found, settings.report_settings(found)


def _startup(options: argparse.Namespace) -> Result:
    found = startup.measure_startup(options.models, options.rounds)
    return found, startup.report_startup(found)


def _threads(options: argparse.Namespace) -> Result:
    found = threads.measure_threads(options.steps, options.rounds)
    return found, threads.report_threads(found)


def benchmark_parser(prog: str) -> argparse.ArgumentParser:
    """Make the parser of `emax benchmark`."""
    parser = Parser(
        prog,
        allow_abbrev=False,
        description="Measure what the attention costs, against its peers in the same run.",
    )
    commands = parser.add_subparsers(title="what is measured", required=True, metavar="WHAT")
    _add_layer_benchmarks(commands)
    _add_network_benchmarks(commands)
    _add_training_benchmarks(commands)
    return parser


def _add_layer_benchmarks(commands: Any) -> None:
    one = _command(commands, _modules, "single layers", rounds=21)
    add_methods(one, layers.METHODS)
    add_tensors(one)
    add_amp(one)
    text = "axes beside batch and channels: 1 for sequences, 2 for images, 3 for videos"
    one.add_argument("--dims", type=int, choices=[1, 2, 3], default=2, help=text)
    others = "; for --dims 1 and 3 those of small text and video networks"
    add_shapes(one, a_shape_of_any_rank, "BxC[x...]", others)

    one = _command(commands, _growth, "how time and memory grow with the input", rounds=5)
    add_methods(one, layers.METHODS)
    add_tensors(one)
    text = "shape of the input whose channels, side and batch are halved and doubled"
    shape = (8, 256, 28, 28)
    one.add_argument("--shape", type=a_shape, default=shape, metavar="BxCxHxW", help=text)
    text = "upper bound of the number of channel groups, which is halved and doubled too"
    one.add_argument("--factor", type=a_count, default=32, metavar="N", help=text)
    text = "number of times that each is halved, and doubled"
    one.add_argument("--steps", type=a_count, default=2, metavar="N", help=text)
    text = "also draw the curves, as an SVG file"
    one.add_argument("--plot", type=Path, metavar="FILE", help=text)

    text = "single layers in other layouts, types and instructions"
    one = _command(commands, _settings, text, rounds=21)
    add_methods(one, layers.METHODS)
    add_device(one)
    add_shapes(one)


def _add_network_benchmarks(commands: Any) -> None:
    one = _command(commands, _models, "whole networks", rounds=7)
    add_methods(one, networks.CHOICES)
    text = "leave out the training step, which torch.compile takes minutes to compile"
    some = one.add_mutually_exclusive_group()
    some.add_argument("--no-training", action="store_true", help=text)
    some.add_argument("--no-inference", action="store_true", help="leave out the inference")
    text = "measure each under torch.compile too, with the seconds that it takes"
    one.add_argument("--compile", action="store_true", help=text)
    text = "measure each as CUDA graphs too, as torch.compile's mode reduce-overhead makes them"
    one.add_argument("--cuda-graph", action="store_true", help=text)
    add_tensors(one)
    add_amp(one)
    add_networks(one)
    add_images(one, batch=8, size=224)

    one = _command(commands, _onnx, "whole networks in ONNX Runtime", rounds=21)
    add_methods(one, onnx.METHODS)
    one.set_defaults(methods=onnx.METHODS)
    add_device(one)
    add_networks(one)
    add_images(one, batch=1, size=224)

    one = _command(commands, _startup, "import and creation in fresh processes", rounds=7)
    add_networks(one)


def _add_training_benchmarks(commands: Any) -> None:
    one = _command(commands, _train, "the training loop, against timm's", rounds=5)
    text = "name of a timm model"
    one.add_argument("--model", default="resnet10t_emax", metavar="NAME", help=text)
    add_device(one)
    add_images(one, batch=64, size=32)
    text = "processes that load images; 0 loads in the main process"
    one.add_argument("--workers", "-j", type=int, default=0, metavar="N", help=text)
    one.add_argument("--amp", action="store_true", help="train in bfloat16 mixed precision")
    text = "folder with train/, a folder of class folders; else the sample of Fashion-MNIST is used"
    one.add_argument("--data-dir", type=Path, metavar="DIR", help=text)

    one = _command(commands, _threads, "training beside a busy process, on the CPU", rounds=5)
    text = "training steps in each round"
    one.add_argument("--steps", type=a_count, default=10, metavar="N", help=text)


def _command(
    commands: Any, run: Callable[[argparse.Namespace], Result | None], text: str, rounds: int
) -> argparse.ArgumentParser:
    """Add the command that `run` is named after, with the options that all commands share."""
    name = run.__name__.removeprefix("_")
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"Measure {text}, in interleaved rounds.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    text = "number of interleaved rounds; in each of them every method is measured once"
    parser.add_argument("--rounds", type=a_count, default=rounds, metavar="N", help=text)
    text = "also write the measurements to FILE, as JSON"
    parser.add_argument("--json", type=Path, metavar="FILE", help=text)
    mark = f"benchmark {name}"
    begin, end = marks(mark)
    text = f"also put the tables between the lines {begin} and {end} of FILE"
    parser.add_argument("--write", type=Path, metavar="FILE", help=text)
    parser.set_defaults(run=run, mark=mark)
    return parser
