"""Accuracy over seeds: the table, and runs that are not repeated."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from interpreters import ENVIRONMENT

from emax_timm.compare.accuracy import table


def test_table_has_means_and_deviations() -> None:
    top1 = {"a": [90.0, 91.5, 92.25], "b": [80.0]}
    results = {
        (model, seed): {"test": {"top1": value}, "seconds": 60.0 * seed, "parameters": 1_234_567}
        for model, values in top1.items()
        for seed, value in enumerate(values)
    }
    rows = table(results).splitlines()[2:]
    mean, deviation = np.mean(top1["a"]), np.std(top1["a"], ddof=1)
    assert rows == [
        f"| a | 1.235 | 0, 1, 2 | {mean:.2f} ± {deviation:.2f} | 90.00, 91.50, 92.25 | 1.0 |",
        "| b | 1.235 | 0 | 80.00 | 80.00 | 0.0 |",
    ]


@pytest.mark.slow
def test_runs_of_every_model_and_seed_are_made_once(images: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("img_size: 32\nbatch_size: 8\nworkers: 0\nepochs: 1\nwarmup_epochs: 0\n")
    options = f"--models test_resnet_emax test_resnet --seeds 0 1 --output {tmp_path / 'runs'}"
    options += f" --options --data-dir {images} --test-split validation"
    command = [sys.executable, "-m", "emax_timm.compare.accuracy", str(recipe), *options.split()]
    outputs, times = [], []
    for _ in range(2):
        done = subprocess.run(
            command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.splitlines()[-2:])
        summaries = sorted((tmp_path / "runs").glob("*/summary.json"))
        times.append([path.stat().st_mtime_ns for path in summaries])
    assert outputs[0] == outputs[1]
    assert times[0] == times[1]
    for row, model in zip(outputs[0], ("test_resnet_emax", "test_resnet"), strict=True):
        top1 = [
            json.loads((tmp_path / "runs" / f"{model}-seed{seed}" / "summary.json").read_text())[
                "test"
            ]["top1"]
            for seed in (0, 1)
        ]
        assert row.startswith(f"| {model} |")
        assert f"| {top1[0]:.2f}, {top1[1]:.2f} |" in row
