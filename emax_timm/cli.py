"""The `emax` command."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .benchmark.model_table import list_models
from .benchmark.plan import plan
from .hub.export import export
from .models import weights as model_weights
from .training import train, validate
from .training.config import nearest
from .training.curves import curves


def weights(argv: Sequence[str] | None = None, prog: str = "emax weights") -> int:
    """Run `emax weights pin`; returns the exit status."""
    parser = argparse.ArgumentParser(prog=prog, description="The index of the package's weights.")
    commands = parser.add_subparsers(dest="command", required=True)
    pin = commands.add_parser(
        "pin",
        help="fill in what the index does not know",
        description="Ask the Hugging Face Hub for the commit and the sha256 of every file of "
        "weights for which the index has null. What is pinned stays.",
    )
    pin.add_argument(
        "--index",
        type=Path,
        default=model_weights.INDEX_FILE,
        metavar="FILE",
        help="an index file; the package's own unless given",
    )
    arguments = parser.parse_args(argv)
    try:
        problems = model_weights.pin(arguments.index)
    except (OSError, ValueError) as error:
        print(f"{prog} pin: error: {error}", file=sys.stderr)
        return 2
    for problem in problems:
        print(f"{prog} pin: {problem}", file=sys.stderr)
    entries = model_weights.read_index(arguments.index)
    pinned = sum(entry.sha256 is not None for entry in entries)
    print(f"{pinned} of {len(entries)} files are pinned in {arguments.index}")
    return 1 if problems else 0


COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "train": (train, "train an image classifier"),
    "validate": (validate, "validate one"),
    "curves": (curves, "draw the curves of a training run"),
    "plan": (plan, "work out what a training run will need"),
    "list": (list_models, "list the models, with their size and cost"),
    "export": (export, "export one with torch.export or to ONNX"),
    "weights": (weights, "pin the published weights"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `emax COMMAND ...`; returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name][0](rest, prog=f"emax {name}")
    lines = [f"  emax {command:<10} {text}" for command, (_, text) in COMMANDS.items()]
    usage = "\n".join(["usage: emax COMMAND --help", *lines])
    if name in ("-h", "--help"):
        print(usage)
        return 0
    print(
        f"emax: error: unknown command {name}; the nearest is {nearest(name, COMMANDS)}",
        file=sys.stderr,
    )
    return 2
