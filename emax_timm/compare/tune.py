"""`emax tune STUDY.yaml`: choose the options of every method of a study on held-out training data.

Every method gets the same number of trials; those whose values the study's file `tuned` has were
searched before, and get none. A trial is a run of train.py with values from the search space; its
value is the best metric of its validation split, and the test set is never read. Optuna keeps the
trials in a SQLite file, so that a search that was stopped continues.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import lock_folder, write_text
from ..runner import FailedRunError, command
from ..training.config import AT_LEAST_1, UsageError, from_mapping, option, parse_settings
from ..training.distributed import find_device
from ..training.signals import Stopped, catch_signals
from .cells import (
    Cell,
    check_data,
    check_data_dir,
    make_cell,
    own_options,
    split_of_test_images,
    train_config,
)
from .search import Search, candidates, load_optuna
from .study import METRICS, Study, read_study
from .trials import write_results
from .workers import StudyOptions, open_workers, slots

__all__ = ["TuneConfig", "TuneOptions", "tune"]

# Options that say what is learned, and are the same for all trials.
DATA = {"data", "data_dir", "dataset", "train_split", "val_split", "test_split", "val_fraction"}


@dataclass
class TuneConfig(StudyOptions):
    """Choose the options of a study's methods, as the study file says."""


@dataclass
class Prune:
    """When a trial is stopped early."""

    rule: str = option(
        "none",
        "median: if its best metric so far is worse than the median of the method's earlier trials "
        "after as many epochs",
        choices=("none", "median"),
    )
    trials: int = option(3, "trials of a method of which none is stopped", bounds=AT_LEAST_1)
    epochs: int = option(1, "epochs that every trial has", bounds=AT_LEAST_1)


@dataclass
class TuneOptions:
    """The key `tune` of a study file."""

    trials: int = option(0, "trials of each method", bounds=AT_LEAST_1)
    seed: int = option(0, "seed of the trials' runs and of the sampler", bounds=(0, 2**32 - 1))
    sampler: str = option("tpe", "how values are chosen", choices=("tpe", "random", "grid"))
    metric: str = option("top1", "validation metric that is optimised", choices=METRICS)
    space: dict[str, Any] = option({}, "by option: a list, or low, high and log")
    prune: dict[str, Any] = option({}, "when a trial is stopped early")
    recipe: dict[str, Any] = option({}, "options of train.py for the trials")


@command("emax tune")
def tune(argv: Sequence[str], prog: str) -> int:
    """Make the trials that are missing, write what they chose, and return the exit status."""
    settings = parse_settings(TuneConfig, argv, prog)
    config = from_mapping(TuneConfig, settings, "the command line")
    if config.study is None:
        raise UsageError("nothing to tune: give a study file")
    study = read_study(config.study)
    options = from_mapping(TuneOptions, study.file.tune, f"{study.path}: tune")
    prune = from_mapping(Prune, options.prune, f"{study.path}: tune.prune")
    load_optuna()
    folder = Path(config.output) / study.name / "tune"
    if odd := set("?{}") & set(str(folder)):  # SQLAlchemy and Optuna give them a meaning in URLs
        raise UsageError(f"{folder} has a {odd.pop()}, and Optuna could not open it as a database")
    searches = _searches(study, options, folder)
    check_data_dir(study.cells, config.data_dir)
    device = find_device(config.device).type
    slots(config.jobs, device)
    check_data([search.cell_with({}) for search in searches], config.data_dir)
    _declare(study, searches, options, folder)
    with lock_folder(folder) as held:
        if not held:
            raise UsageError(f"another process is making the trials of {folder}")
        for search in searches:
            search.open(f"sqlite:///{folder / 'trials.db'}", asdict(prune))
        try:
            _make_trials(searches, config, device)
        except Stopped as stopped:
            print(f"{prog}: {stopped}; the same command continues", file=sys.stderr)
            return 128 + stopped.number
        print(write_results(study, searches, folder))
    if without := [str(search.cell) for search in searches if search.best() is None]:
        raise FailedRunError(f"all trials of {', '.join(without)} diverged, so nothing was chosen")
    return 0


def _searches(study: Study, options: TuneOptions, folder: Path) -> list[Search]:
    """Return a search for each cell that is to have one, the primary ones first.

    Variants of another method and those whose values the study already has need none.
    """
    source = f"{study.path}: tune"
    searches = []
    for cell in dict.fromkeys(run.cell.folder for run in study.runs()):
        backbone, name = cell.parts
        method = study.methods[name]
        known = cell.as_posix() in study.tuned
        if known or (study.file.methods[name] or {}).get("like"):
            continue
        space = {**options.space, **method.space}
        if not space:
            raise UsageError(f"{source}.space is empty: give an option of train.py and its values")
        for key, values in space.items():
            candidates(values, f"{source}: {key}")

        def cell_with(
            values: dict[str, Any], tuning: bool = True, of: Any = (backbone, name)
        ) -> Cell:
            last = {**options.recipe, "test_split": ""} if tuning else {}
            pair = ((of[0], study.backbones[of[0]]), (of[1], study.methods[of[1]]))
            return make_cell(study.file.recipe, study.file.seeds, *pair, values, last, study.path)

        asked = {str(key).replace("-", "_") for key in space}
        own = own_options(method.recipe, method.attn_kwargs, method.stages is not None)
        for setting, of in ((own, name), (own_options(options.recipe, {}, False), "tune.recipe")):
            if both := sorted(asked & setting):
                raise UsageError(f"{source}: {of} sets {both[0]}, so it has no space")
        if both := sorted(asked & DATA):
            raise UsageError(f"{source}.space: {both[0]} is no option of a method, but of the data")
        listed = {key: candidates(values, source) for key, values in space.items()}
        first = {key: values[0] for key, values in listed.items()}
        for changed in ({key: value} for key, values in listed.items() for value in values):
            trial = train_config(cell_with({**first, **changed}))  # every value is a valid option
            if not trial.val_split and not trial.val_fraction:
                raise UsageError(
                    f"{source}: the trials have no validation split: "
                    "give val_split or val_fraction in tune.recipe"
                )
            tested = train_config(cell_with(changed, tuning=False)).test_split
            if split := split_of_test_images(trial, tested):
                raise UsageError(
                    f"{source}: the trials read {split}, which has the images of the test split "
                    f"{tested}; choose another val_split, or val_fraction"
                )
        if options.sampler == "grid":
            size = math.prod(map(len, listed.values()))
            if any(isinstance(values, dict) for values in space.values()) or size != options.trials:
                raise UsageError(
                    f"{source}: the grid of {name} has {size} points, and there are "
                    f"{options.trials} trials; choose as many, lists only, or sampler: tpe"
                )
        searches.append(Search(cell, space, cell_with, options, folder))
    if not searches:
        raise UsageError(
            f"{study.path}: {study.file.tuned} has values for every method, so there is nothing to "
            "search; to search again, leave out the key tuned"
        )
    return searches


def _declare(study: Study, searches: list[Search], options: TuneOptions, folder: Path) -> None:
    """Note what is searched; refuse a folder in which something else was.

    Raises:
        UsageError: If the folder's trials have another search space, recipe or rule.
    """
    declared = {
        "tune": asdict(options),
        "cells": {str(s.cell): [s.cell_with({}).hash, s.space] for s in searches},
    }
    text, path = json.dumps(declared, indent=1) + "\n", folder / "declared.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != json.loads(text):
        raise UsageError(
            f"{folder} holds trials of another search than that of {study.path}; "
            "choose another name or --output"
        )
    write_text(path, text)


def _make_trials(searches: list[Search], config: TuneConfig, device: str) -> None:
    """Make all trials, of each method one after the other, and of the methods side by side."""
    with catch_signals() as stop, open_workers(config.jobs, device, stop) as workers:
        while any(search.left() for search in searches) or workers.running:
            for search in sorted(searches, key=lambda s: s.done):  # in turns
                if workers.free and search.folder is None and search.left():
                    search.start(workers, config.device, config.data_dir)
            for search in searches:
                search.watch(workers)
            for path in workers.ended():
                next(search for search in searches if search.folder == path).finish()
