"""`emax benchmark`: the measurements of this package, from the command line."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..files import replace_file
from ..training.config import UsageError
from . import models, modules
from .tables import marks, text_around, write_between

__all__ = ["benchmark", "benchmark_parser"]


def benchmark(argv: Sequence[str] | None = None, prog: str = "emax benchmark") -> int:
    """Run the benchmark that the command line asks for; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    options = benchmark_parser(prog).parse_args(argv)
    try:
        torch.empty(1, device=options.device)
        if options.write is not None:
            text_around(options.write, options.mark)  # refused before anything is measured
        found, report = options.run(options)
        print(report)
        if options.write is not None:
            command = shlex.join([*prog.split(), *argv])
            write_between(options.write, options.mark, f"Made by `{command}`:\n\n{report}\n")
        if options.json is not None:
            text = json.dumps(found, indent=2) + "\n"
            replace_file(options.json, lambda temporary: temporary.write_text(text))
    except (OSError, RuntimeError, AssertionError, UsageError) as error:
        print(f"{prog}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _modules(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    found = modules.measure_modules(
        options.shapes,
        options.rounds,
        torch.device(options.device),
        getattr(torch, options.dtype),
        _memory_format(options),
        options.systems,
    )
    return found, modules.report_modules(found)


def _models(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    setting = models.Setting(
        options.batch_size,
        options.img_size,
        torch.device(options.device),
        getattr(torch, options.dtype),
        _memory_format(options),
    )
    found = models.measure_models(options.models, setting, options.rounds, options.systems)
    return found, models.report_models(found)


def _memory_format(options: argparse.Namespace) -> torch.memory_format:
    return torch.channels_last if options.channels_last else torch.contiguous_format


def benchmark_parser(prog: str) -> argparse.ArgumentParser:
    """Of the command line of `emax benchmark`."""
    parser = argparse.ArgumentParser(
        prog, description="Measure what the attention costs, against its peers in the same run."
    )
    commands = parser.add_subparsers(title="what is measured", required=True, metavar="WHAT")
    one = _command(commands, "modules", "single layers", modules.SYSTEMS, rounds=21)
    one.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        default=modules.SHAPES,
        metavar="BxCxHxW",
        help="of the input; ResNet-50's",
    )
    one.set_defaults(run=_modules)
    one = _command(commands, "models", "whole networks", models.SYSTEMS, rounds=7)
    one.add_argument(
        "--models", nargs="+", default=models.BASES, metavar="NAME", help="plain twins' names"
    )
    one.add_argument("--batch-size", "-b", type=_count, default=8, metavar="N", help="of images")
    one.add_argument("--img-size", type=_count, default=224, metavar="N", help="side in pixels")
    one.set_defaults(run=_models)
    return parser


def _command(
    commands: Any, name: str, text: str, systems: Sequence[str], rounds: int
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"Measure {text}, in turns.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    names = f"of {'; '.join(systems)}; all that can be had"
    parser.add_argument("--systems", nargs="+", choices=systems, metavar="NAME", help=names)
    parser.add_argument("--rounds", type=_count, default=rounds, metavar="N", help="of turns")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float64"])
    parser.add_argument("--channels-last", action="store_true", help="instead of contiguous")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    mark = f"benchmark {name}"
    begin, end = marks(mark)
    text = f"also put the tables between the lines {begin} and {end} of FILE"
    parser.add_argument("--write", type=Path, metavar="FILE", help=text)
    parser.set_defaults(mark=mark)
    return parser


def _shape(text: str) -> tuple[int, ...]:
    shape = tuple(int(size) for size in text.split("x"))
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError
    return shape


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise ValueError
    return count
