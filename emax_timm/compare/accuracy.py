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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..runner import command
from ..training.config import UsageError, from_mapping, option, parse_settings

__all__ = ["accuracy", "table"]

_TRAIN = "import sys; from emax_cli import run; sys.exit(run('train', None, 'train.py'))"


@dataclass
class AccuracyConfig:
    """Train models with several seeds, and print the table of their accuracies."""

    recipe: str | None = option(
        None,
        "YAML file or name of a recipe, with a test_split",
        positional=True,
        metavar="CONFIG",
    )
    models: list[str] = option([], "names of the models to train", metavar="NAME")
    seeds: list[int] = option([0, 1, 2], "seeds to train each model with", bounds=(0, 2**32 - 1))
    output: str = option("runs", "folder for run directories", metavar="DIR")
    options: list[str] = option(
        [],
        "further options of train.py; all that follows belongs to them",
        nargs=argparse.REMAINDER,
    )


@command("python -m emax_timm.compare.accuracy")
def accuracy(argv: Sequence[str], prog: str) -> int:
    """Train the models, print the table, and return the exit status."""
    settings = parse_settings(AccuracyConfig, argv, prog)
    config = from_mapping(AccuracyConfig, settings, "the command line")
    if config.recipe is None or not config.models:
        raise UsageError("nothing to train: give CONFIG --models NAME ...")
    results = {}
    for seed in config.seeds:  # outermost, so that a stop treats all models alike
        for model in config.models:
            folder = Path(config.output) / f"{model}-seed{seed}"
            if not (folder / "summary.json").exists():
                options = ["-c", config.recipe, "--model", model, "--seed", str(seed)]
                options += ["--output", config.output, "--experiment", folder.name]
                options += ["--resume", "auto", *config.options]
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


if __name__ == "__main__":
    sys.exit(accuracy())
