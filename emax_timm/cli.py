"""The `emax` command."""

import sys
from collections.abc import Callable, Sequence

from .backends import backends, kernels
from .benchmark.command import benchmark
from .benchmark.model_table import list_models
from .hub.export import export
from .hub.predict import predict
from .hub.publish import publish
from .hub.weights_command import weights
from .interpret.command import visualize
from .ops import BackendError
from .training import train, validate
from .training.config import nearest
from .training.curves import curves
from .training.plan import plan

COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "train": (train, "train an image classifier"),
    "validate": (validate, "validate one"),
    "curves": (curves, "draw the curves of a training run"),
    "plan": (plan, "work out what a training run will need"),
    "list": (list_models, "list the models, with their size and cost"),
    "benchmark": (benchmark, "measure what the attention costs"),
    "backends": (backends, "say what computes the attention here, or why not"),
    "kernels": (kernels, "build the attention's kernels for CPUs"),
    "export": (export, "export one with torch.export or to ONNX"),
    "predict": (predict, "classify images"),
    "visualize": (visualize, "draw what a model attends to in images"),
    "publish": (publish, "publish the weights of a run on the Hugging Face Hub"),
    "weights": (weights, "verify published weights, or pin them"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `emax COMMAND ...`; returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        try:
            return COMMANDS[name][0](rest, prog=f"emax {name}")
        except BackendError as error:
            print(f"emax {name}: error: {error}", file=sys.stderr)
            return 2
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
