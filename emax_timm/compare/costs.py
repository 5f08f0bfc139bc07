"""What each method of a study costs: its networks measured in turns on one machine.

The runs' own images per second depend on what else their machines did. `emax compare --measure`
makes steps of all cells in turns, at a time when the machine is quiet, and the report prefers them.
"""

import contextlib
import io
import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tables import heading, row
from ..training.config import UsageError
from ..training.distributed import open_distributed_context
from ..training.progress import Progress
from ..training.trainer import Trainer
from .cells import Cell, machine_options, train_config
from .outcome import seconds_of, seconds_of_pass
from .provenance import environment
from .results import Results, read_content, write_json
from .run import trainer_of
from .study import Study
from .workers import cores

__all__ = ["COSTS", "Speed", "cost_table", "measure", "read_costs", "speeds"]

COSTS = "costs.json"
ROUNDS = 11  # after one that is not counted


class Speed(NamedTuple):
    """Images per second."""

    training: float | None
    inference: float


def measure(study: Study, folder: Path, device: str, data_dir: str | None) -> None:
    """Measure a training step and inference of every cell in turns, and write `COSTS`.

    A step is that of the trainer, on a batch that has been loaded; on a CPU it has one thread on
    one core, as the runs have.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    with open_distributed_context(device) as context, _one_core(context.device.type):
        timed: list[tuple[Cell, Trainer, Any, Tensor]] = []
        for cell in study.cells:
            here = machine_options(device, data_dir)
            config = train_config(cell, seed=cell.seeds[0], output=str(folder), **here)
            with contextlib.redirect_stdout(io.StringIO()):  # what each one's data are
                trainer = trainer_of(config, cell.experiment, context)
            if (loader := trainer.test_loader or trainer.val_loader) is None:
                raise UsageError(f"{cell.folder} has no test split, so no images to measure with")
            timed.append((cell, trainer, next(iter(trainer.train_loader)), next(iter(loader))[0]))
            seconds[cell.hash] = {"training": [], "inference": []}
        with Progress("measuring", (1 + ROUNDS) * len(timed), 0, True) as progress:
            for number in range(1 + ROUNDS):
                for cell, trainer, batch, images in timed:
                    found = _step(trainer, batch), seconds_of_pass(trainer, images)
                    progress.step()
                    if number:
                        for key, value in zip(("training", "inference"), found, strict=True):
                            seconds[cell.hash][key].append(value)
        content = {**environment(context), "load": load, "rounds": ROUNDS, "cells": {}}
        for cell, _, batch, images in timed:
            content["cells"][cell.hash] = {
                "cell": cell.folder.as_posix(),
                **{"batch": len(batch[1]), "inference_batch": len(images)},
                **{f"{key}_seconds": values for key, values in seconds[cell.hash].items()},
            }
    write_json(folder / COSTS, content)


def _step(trainer: Trainer, batch: Any) -> float:
    # The same step each time: the schedules know none beyond their end, and nothing diverges.
    trainer.step = 0
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    trainer.network.train()
    return seconds_of(lambda: trainer.train_step([batch]), trainer.context.device)


@contextlib.contextmanager
def _one_core(device: str) -> Iterator[None]:
    """On CPUs, use one thread on the last of the cores within the context."""
    if device != "cpu":
        yield
        return
    threads, allowed = torch.get_num_threads(), cores()
    pinned = hasattr(os, "sched_setaffinity")
    torch.set_num_threads(1)
    try:
        if pinned:
            os.sched_setaffinity(0, allowed[-1:])
        yield
    finally:
        if pinned:
            os.sched_setaffinity(0, allowed)
        torch.set_num_threads(threads)


def read_costs(folder: Path) -> dict[str, Any]:
    """Read what `measure` has written; empty if it has not been called.

    Raises:
        UsageError: If the file is damaged.
    """
    path = folder / COSTS
    needed = {"cells": dict, "device": str, "machine": str, "date": str}
    return read_content(path, {**needed, "load": (int, float, type(None))}) if path.exists() else {}


def speeds(
    study: Study, results: Results, costs: dict[str, Any], backbone: str
) -> tuple[dict[str, Speed], str]:
    """Return the speed of each method that has runs, and where the speeds come from.

    They are the measured ones if all of these methods have been measured, and else the medians of
    what their runs noted: one source for all, because the two do not compare.
    """
    present = [c for c in study.cells if any(k[:2] == (backbone, c.method) for k in results)]
    present = [cell for cell in present if cell.backbone == backbone]
    measured = costs.get("cells", {})
    if all(cell.hash in measured for cell in present):
        found = {}
        for cell in present:
            own = measured[cell.hash]
            step = statistics.median(own["training_seconds"])
            image = statistics.median(own["inference_seconds"])
            found[cell.method] = Speed(own["batch"] / step, own["inference_batch"] / image)
        load = "" if costs["load"] is None else f", load {costs['load']:.1f} beforehand"
        return found, (
            "Images/s: medians of the networks measured in turns, without loading data, on "
            f"{costs['device']} ({costs['machine']}{load}) on {costs['date'][:10]}."
        )
    found = {}
    for cell in present:
        runs = [c for key, c in results.items() if key[:2] == (backbone, cell.method)]
        steps = [c["training_images_per_second"] for c in runs]
        steps = [value for value in steps if value is not None]
        images = statistics.median(c["inference_images_per_second"] for c in runs)
        found[cell.method] = Speed(statistics.median(steps) if steps else None, images)
    return found, (
        "Images/s: medians of what the runs noted while their machines may have done other work; "
        "`emax compare --measure` measures all methods in turns."
    )


def cost_table(study: Study, results: Results, costs: dict[str, Any], backbone: str) -> list[str]:
    """Return the table of what each method costs, in Markdown."""
    here = {key[1:]: content for key, content in results.items() if key[0] == backbone}
    names = ["parameters (M)", "MACs (M)", "images/s, training", "images/s, inference"]
    names += ["peak memory (MB)", "minutes a run", "training top-1 (%)"]
    medians = {"memory_bytes": 1e6, "seconds": 60.0, "training_top1": 1.0}
    notes = ["Memory: on a GPU what is allocated there, otherwise the process with torch and data."]
    if len({(content["device"], content["machine"]) for content in here.values()}) > 1:
        names.remove("minutes a run")
        del medians["seconds"]
        notes.append("The runs were made on several machines, so their times do not compare.")
    lines = heading(["method", *names])
    found, source = speeds(study, results, costs, backbone)
    for method, speed in found.items():
        runs = [content for (name, _), content in here.items() if name == method]
        cells = [f"{runs[0]['parameters'] / 1e6:.3f}", f"{runs[0]['macs'] / 1e6:.1f}"]
        cells += ["" if value is None else f"{value:.1f}" for value in speed]
        for key, scale in medians.items():
            values = [content[key] / scale for content in runs if content[key] is not None]
            cells.append(f"{statistics.median(values):.1f}" if values else "")
        lines.append(row([method, *cells]))
    return [*lines, "", " ".join([source, *notes])]
