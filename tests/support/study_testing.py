"""A study that is small enough to be made in a test, and results as its runs would leave them."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from emax_timm.compare.cells import Cell, Run, train_config
from emax_timm.compare.command import job_of
from emax_timm.compare.results import declare
from emax_timm.compare.run import JOB, RESULT, make_runs
from emax_timm.compare.run import trainer_of as trainer_of_run
from emax_timm.compare.study import Study, read_study
from emax_timm.compare.workers import cores
from emax_timm.training.distributed import DistributedContext
from emax_timm.training.trainer import Trainer

__all__ = [
    "STUDY",
    "cell_of",
    "made",
    "made_together",
    "result_of",
    "study_on",
    "trainer_of",
    "write_jobs",
    "write_results_of",
    "write_study",
]

CPU = DistributedContext(torch.device("cpu"))

STUDY: dict[str, Any] = {
    "name": "small",
    "recipe": {
        "val_split": "",
        "test_split": "validation",
        "img_size": 32,
        "batch_size": 8,
        "epochs": 2,
        "warmup_epochs": 0,
        "opt": "adamw",
        "lr": 0.003,
    },
    "backbones": {
        "tiny": {"model": "resnet10t", "model_kwargs": {"channels": [8, 8, 8, 8]}},
    },
    "methods": {
        "none": {},
        "se": {"attention": "se"},
        "emax": {"attention": "emax"},
        "emax_finest": {"like": "emax", "attn_kwargs": {"group_counts": "finest"}, "seeds": 2},
    },
    "references": ["none", "se"],
    "primary": {"method": "emax", "against": ["none", "se"]},
    "seeds": [0, 1, 2, 3],
    "metrics": ["top1", "loss"],
}


def write_study(
    folder: Path,
    change: Callable[[dict[str, Any]], object] | None = None,
    name: str = "study.yaml",
    **recipe: Any,
) -> Path:
    """Write the study with further options of its recipe, and changed as `change` does in place."""
    content = copy.deepcopy(STUDY)
    content["recipe"].update(recipe)
    if change is not None:
        change(content)
    path = folder / name
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def result_of(study: Study, method: str, seed: int, top1: float, **more: Any) -> dict[str, Any]:
    """The result of a run with this accuracy, as the process of a run writes it."""
    cell = study.cell("tiny", method)
    assert cell is not None
    return {
        **{"study": study.name, "backbone": "tiny", "method": method, "seed": seed},
        **{"hash": cell.hash, "diverged": None, "training_top1": top1 + 1},
        "test": {"top1": top1, "top5": 99.0, "loss": 2 - top1 / 100},
        "slices": {"small": {"images": 10, "top1": top1 - 5}, "large": {"images": 5, "top1": 90.0}},
        **{"parameters": 1_234_567, "macs": 2_000_000, "seconds": 60.0, "memory_bytes": 10**9},
        **{"training_images_per_second": 100.0, "inference_images_per_second": 400.0},
        **{"commit": "abc", "emax_timm": "0", "torch": "2", "timm": "1", "device": "cpu"},
        **{"machine": "m", "backend": "portable", "date": f"2026-01-0{seed + 1}T00:00:00+00:00"},
        **more,
    }


def write_results_of(
    path: Path, folder: Path, top1: Mapping[tuple[str, int], float], **more: Any
) -> Study:
    """Write results by method and seed as if the runs of the study file had been made.

    There are neither weights nor logs, nor what the processes were told.
    """
    study = read_study(str(path))
    declare(study, folder / study.name, "2025-12-31T00:00:00+00:00")
    for (method, seed), value in top1.items():
        content = json.dumps(result_of(study, method, seed, value, **more))
        run = folder / study.name / "tiny" / method / f"seed-{seed}"
        run.mkdir(parents=True)
        (run / RESULT).write_text(content)
    return study


def study_on(images: Path, folder: Path, change: Any = None, **recipe: Any) -> Study:
    """The study on a folder of images, with further options of its recipe."""
    return read_study(str(write_study(folder, change, data_dir=str(images), **recipe)))


def cell_of(study: Study, method: str) -> Cell:
    """The cell of a method."""
    cell = study.cell("tiny", method)
    assert cell is not None
    return cell


def trainer_of(
    study: Study, method: str, seed: int, folder: Path, context: DistributedContext = CPU
) -> Trainer:
    """The trainer of a run that is not made."""
    cell = cell_of(study, method)
    config = train_config(cell, seed=seed, output=str(folder), experiment=method)
    return trainer_of_run(config, cell.experiment, context)


def made(study: Study, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """The result of a run that is made in this process."""
    return made_together(study, [(method, seed)], folder.parent, [folder.name])[0]


def made_together(
    study: Study, runs: list[tuple[str, int]], folder: Path, names: list[str], device: str = "cpu"
) -> list[dict[str, Any]]:
    """The results of runs, methods and seeds, that are made side by side in folders with names."""
    jobs = write_jobs(study, runs, folder, names, device)
    make_runs(jobs)
    return [json.loads((path / RESULT).read_text()) for path in jobs]


def write_jobs(
    study: Study, runs: list[tuple[str, int]], folder: Path, names: list[str], device: str = "cpu"
) -> dict[Path, dict[str, Any]]:
    """What a process has to make, by run directory, written there as for a process on a core."""
    jobs = {}
    for (method, seed), name in zip(runs, names, strict=True):
        job = job_of(Run(cell_of(study, method), seed), study.name, device, None)
        jobs[folder / name] = job
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / JOB).write_text(json.dumps({**job, "core": cores()[0]}))
    return jobs
