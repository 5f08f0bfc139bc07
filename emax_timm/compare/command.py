"""`emax compare STUDY.yaml`: make the runs of a study, and report what attention brings."""

import itertools
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import lock_folder, write_text
from ..runner import command
from ..tables import text_around, write_between
from ..training.config import UsageError, from_mapping, option, parse_settings
from ..training.distributed import find_device
from ..training.signals import Stopped, catch_signals
from .cells import Run, check_data, check_data_dir, machine_options, train_config
from .costs import measure, read_costs
from .grouping import analyse, check_methods
from .grouping_plot import draw_grouping
from .grouping_report import read_groupings
from .plot import NEEDED, draw
from .report import report, summary
from .results import check_folder, declaration, declare, merge, read_results
from .study import Study, read_study
from .workers import StudyOptions, cores, has_result, open_workers, slots

__all__ = ["CompareConfig", "compare", "job_of", "make_runs"]

REPORT = "report.md"


@dataclass
class CompareConfig(StudyOptions):
    """Compare methods over backbones and seeds, as a study file says."""

    merge: list[str] = option(
        [],
        "make no runs; copy those of this study from the folders of studies on other machines",
        nargs="+",
        metavar="DIR",
    )
    report: bool = option(False, "make no runs; report those that there are")
    grouping: list[str] = option(
        [],
        "make no runs; find out what the dynamic grouping of these methods does in the runs that "
        "have ended",
        nargs="+",
        metavar="METHOD",
    )
    measure: bool = option(
        False,
        "make no runs; measure the speed of all methods in turns, when the machine does nothing "
        "else, for the report",
    )
    write: str | None = option(
        None,
        "put the primary comparison and the table of the methods into this Markdown file, between "
        "its lines <!-- compare STUDY: begin --> and <!-- compare STUDY: end -->",
        metavar="FILE",
    )


@command("emax compare")
def compare(argv: Sequence[str], prog: str) -> int:
    """Make the runs that are missing, write the report, and return the exit status."""
    settings = parse_settings(CompareConfig, argv, prog)
    config = from_mapping(CompareConfig, settings, "the command line")
    if config.study is None:
        raise UsageError("nothing to compare: give a study file")
    kinds = ("merge", "report", "grouping", "measure")
    if len(asked := [f"--{name}" for name in kinds if getattr(config, name)]) > 1:
        raise UsageError(f"{asked[0]} and {asked[1]} are two things; give one after the other")
    study = read_study(config.study)
    check_data_dir(study.cells, config.data_dir)
    if config.write is not None:
        text_around(Path(config.write), _mark(study))  # refuses a bad file before anything is made
    check_methods(study, config.grouping)
    folder = Path(config.output) / study.name
    check_folder(study, folder)
    with lock_folder(folder) as held:
        if not held:
            raise UsageError(f"another process is making the runs of {folder}")
        if config.merge:
            count = merge(study, folder, [Path(name) for name in config.merge])
            print(f"{count} results copied into {folder}")
        elif config.grouping:
            analyse(study, folder, config.grouping, config.device, config.data_dir)
        elif config.measure:
            measure(study, folder, config.device, config.data_dir)
        elif not config.report:
            try:
                make_runs(study, folder, config)
            except Stopped as stopped:
                print(f"{prog}: {stopped}; the same command continues", file=sys.stderr)
                return 128 + stopped.number
        if config.measure and not read_results(study, folder):
            return 0
        return _report(study, folder, shlex.join([*prog.split(), *argv]), config.write)


def make_runs(study: Study, folder: Path, config: CompareConfig) -> None:
    """Make the runs that have not ended yet.

    Raises:
        UsageError: If the study's file `tuned` lacks a method.
        FailedRunError: If a run fails.
        Stopped: If a signal asked for it; the runs have written checkpoints.
    """
    if missing := study.untuned():
        raise UsageError(
            f"{study.path}: {study.file.tuned} has no values for {', '.join(missing)}; run emax "
            "tune, or give them {} there"
        )
    device = find_device(config.device).type
    slots(config.jobs, device)
    check_data(study.cells, config.data_dir)
    left = [run for run in study.runs() if not has_result(folder / run.folder)]
    total, done = len(study.runs()), len(study.runs()) - len(left)
    if done:
        print(f"{done} of {total} runs have ended before", flush=True)
    groups, processes = together(left, config.jobs), 1
    if device == "cpu":
        groups, processes = [[run] for run in left], config.jobs
    with catch_signals() as stop, open_workers(processes, device, stop) as workers:
        declare(study, folder)
        while groups or workers.running:
            while groups and workers.free:
                workers.start(_jobs(groups.pop(0), folder, study, config, device))
            for path in workers.ended():
                done += 1
                print(f"{done}/{total} {path.relative_to(folder)}", flush=True)


def together(runs: Sequence[Run], most: int) -> list[list[Run]]:
    """Group the runs that a process makes side by side: those of a seed, or `most` if it is not 0.

    They have a backbone in common, too, so that their steps take about the same time.
    """
    groups = []
    for _, same in itertools.groupby(runs, lambda run: (run.cell.backbone, run.seed)):
        group = list(same)
        size = most or len(group)
        groups += [group[first : first + size] for first in range(0, len(group), size)]
    return groups


def _jobs(
    runs: Sequence[Run], folder: Path, study: Study, config: CompareConfig, device: str
) -> dict[Path, dict[str, Any]]:
    """Return the jobs of a process by their run directories."""
    jobs = {
        folder / run.folder: job_of(run, study.name, config.device, config.data_dir) for run in runs
    }
    for job in jobs.values() if device != "cpu" else ():
        if not job["config"]["workers"]:  # their data loaders share the cores
            job["config"]["workers"] = max(1, len(cores()) // len(jobs))
    return jobs


def job_of(run: Run, study: str, device: str, data_dir: str | None) -> dict[str, Any]:
    """Return what the process of a run needs to know, and what identifies its result."""
    here: dict[str, Any] = {"seed": run.seed, "checkpoint_hist": 1, "recovery_minutes": 5.0}
    here |= machine_options(device, data_dir)
    train_config(run.cell, **here)
    return {
        "study": study,
        "backbone": run.cell.backbone,
        "method": run.cell.method,
        "seed": run.seed,
        "hash": run.cell.hash,
        "init": run.cell.init,
        "experiment": run.cell.experiment,
        "config": {**run.cell.settings, **here},
    }


def _mark(study: Study) -> str:
    return f"compare {study.name}"


def _report(study: Study, folder: Path, made_by: str, page: str | None) -> int:
    results = read_results(study, folder)
    if not results:
        raise UsageError(f"no run of {folder} has ended, so there is nothing to report")
    primary = study.primary.backbone
    if page is not None and not any(key[0] == primary for key in results):
        raise UsageError(f"no run on {primary} has ended, so there is nothing to write into {page}")
    costs, backbones = read_costs(folder), dict.fromkeys(key[0] for key in results)
    groupings = {backbone: read_groupings(study, folder, backbone) for backbone in backbones}
    declared = declaration(folder, results)
    text = report(study, results, costs, groupings, made_by, declared)
    write_text(folder / REPORT, text)
    print(text)
    if page is not None:
        write_between(Path(page), _mark(study), summary(study, results, made_by, declared))
    try:
        for backbone in backbones:
            draw(study, results, costs, backbone, folder / f"{backbone}.svg")
            if found := groupings[backbone]:
                draw_grouping(study, backbone, found, folder / f"{backbone}-grouping.svg")
    except ImportError:
        print(f"there is no plot: {NEEDED}", file=sys.stderr)
    return 0
