"""The `emax` command: a table of commands, each imported when it runs.

This module is not in the package `emax_timm`, because importing anything of that package registers
its models with timm and so loads torch, which takes seconds. Here that happens only once a command
is known, so that `emax --help` and a misspelt command answer at once.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

__all__ = ["COMMANDS", "main", "run"]

# For each command the function that runs it, as module:function, and a line of help.
COMMANDS = {
    "train": ("emax_timm.training:train", "train an image classifier"),
    "validate": ("emax_timm.training:validate", "validate an image classifier"),
    "data": (
        "emax_timm.training.data.command:data",
        "open every image of a data set, and say what is in it",
    ),
    "curves": ("emax_timm.training.curves:curves", "draw the curves of a training run"),
    "plan": ("emax_timm.training.plan:plan", "work out what a training run will need"),
    "list": ("emax_timm.benchmark:list_models", "list the models, with their size and cost"),
    "benchmark": ("emax_timm.benchmark.command:benchmark", "measure what the attention costs"),
    "compare": ("emax_timm.compare.command:compare", "compare methods over backbones and seeds"),
    "tune": ("emax_timm.compare.tune:tune", "choose the options of a study's methods"),
    "backends": ("emax_timm.backends:backends", "say what computes the attention here, or why not"),
    "kernels": ("emax_timm.backends:kernels", "build the attention's kernels for CPUs"),
    "export": ("emax_timm.hub:export", "export a model with torch.export or to ONNX"),
    "predict": ("emax_timm.hub:predict", "classify images"),
    "visualize": (
        "emax_timm.interpret.command:visualize",
        "draw what a model attends to in images",
    ),
    "demo": ("emax_timm.demo:demo", "serve a page to try a model on"),
    "publish": ("emax_timm.hub:publish", "publish the weights of a run on the Hugging Face Hub"),
    "weights": ("emax_timm.hub.weights_command:weights", "verify published weights, or pin them"),
}

# The variables of OpenMP and its implementations that say how long waiting threads spin.
WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `emax COMMAND ...`, and return the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return run(name, rest, f"emax {name}")
    if name in ("-h", "--help"):
        print("usage: emax COMMAND --help")
        for command, (_, text) in COMMANDS.items():
            print(f"  emax {command:<10} {text}")
        return 0
    (nearest,) = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.0)
    print(f"emax: error: unknown command {name}; the nearest is {nearest}", file=sys.stderr)
    return 2


def run(name: str, argv: Sequence[str] | None, prog: str) -> int:
    """Run a command, which prints its own errors, and return the exit status.

    Args:
        name: The name of the command, a key of `COMMANDS`.
        argv: The arguments of the command; None for those of sys.argv.
        prog: The name of the command in its help and its errors.
    """
    # OpenMP reads this when torch is loaded. Benchmarks measure torch with its own default.
    if name != "benchmark" and not any(variable in os.environ for variable in WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"  # docs/training.md, "Threads", says why
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(module), function)(argv, prog=prog)


if __name__ == "__main__":
    sys.exit(main())
