r"""Train models with several seeds, and print a table of their test accuracies.

    python -m emax_timm.compare.accuracy fashion_mnist/test_resnet_emax \
        --models test_resnet_emax test_resnet --seeds 0 1 2 --output runs

A run that has ended is not repeated, and one that was interrupted is resumed. What follows
`--options` is passed to train.py.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["accuracy", "table"]

_TRAIN = "import sys; from emax_cli import run; sys.exit(run('train', None, 'train.py'))"


def accuracy(argv: Sequence[str] | None = None) -> int:
    """Train the models, print the table, and return the exit status."""
    arguments = _parser().parse_args(argv)
    results = {}
    for seed in arguments.seeds:  # outermost, so that a stop treats all models alike
        for model in arguments.models:
            folder = Path(arguments.output) / f"{model}-seed{seed}"
            if not (folder / "summary.json").exists():
                options = ["-c", arguments.config, "--model", model, "--seed", str(seed)]
                options += ["--output", arguments.output, "--experiment", folder.name]
                options += ["--resume", "auto", *arguments.options]
                status = subprocess.run([sys.executable, "-c", _TRAIN, *options]).returncode
                if status:
                    return status
            results[model, seed] = json.loads((folder / "summary.json").read_text())
    print(table(results))
    return 0


def table(results: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Format the results as Markdown, a row for each model.

    Args:
        results: The summary.json of each run, by model and seed.
    """
    rows = [
        "| model | parameters (M) | seeds | test top-1 (%) | of each seed | minutes a run |",
        "| --- | ---: | --- | ---: | --- | ---: |",
    ]
    for model in dict.fromkeys(model for model, _ in results):
        runs = {seed: summary for (name, seed), summary in results.items() if name == model}
        top1 = [summary["test"]["top1"] for summary in runs.values()]
        deviation = f" ± {statistics.stdev(top1):.2f}" if len(top1) > 1 else ""
        minutes = statistics.median(summary["seconds"] for summary in runs.values()) / 60
        parameters = next(iter(runs.values()))["parameters"] / 1e6
        rows.append(
            f"| {model} | {parameters:.3f} | {', '.join(map(str, runs))} "
            f"| {statistics.mean(top1):.2f}{deviation} "
            f"| {', '.join(f'{value:.2f}' for value in top1)} | {minutes:.1f} |"
        )
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m emax_timm.compare.accuracy",
        description="Train models with several seeds, and print the table of their accuracies.",
    )
    parser.add_argument("config", help="YAML file or name of a recipe, with a test_split")
    parser.add_argument("--models", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--output", default="runs", metavar="DIR")
    parser.add_argument("--options", nargs=argparse.REMAINDER, default=[], help="of train.py")
    return parser


if __name__ == "__main__":
    sys.exit(accuracy())
