"""The folder of a study: the results of its runs, checked, and those of other folders merged in.

To report a study, or to merge it into another, it takes no more than the files result.json of its
runs, in BACKBONE/METHOD/seed-N, and what is made of their weights beside them.
"""

import json
from collections.abc import Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ..files import write_text
from ..training import checkpoint
from ..training.config import UsageError
from .cells import Run
from .provenance import now
from .run import JOB, RESULT
from .study import Study

__all__ = [
    "GROUPING",
    "Results",
    "check_folder",
    "declaration",
    "declare",
    "merge",
    "read_content",
    "read_json",
    "read_results",
    "write_json",
]

DECLARED = "declared.json"
GROUPING = "grouping.json"  # beside the result of a run: how its EMAX layers choose group counts

# The content of a run's result.json, by backbone, method and seed.
Results = dict[tuple[str, str, int], dict[str, Any]]

NUMBER = (int, float)
# What a report needs of a run's result.json.
CONTENT: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("backend", "emax_timm", "torch", "timm"), str),
    "commit": (str, type(None)),  # None outside a checkout
    **dict.fromkeys(("device", "machine", "date"), str),
    **dict.fromkeys(("parameters", "macs"), int),
    **dict.fromkeys(("seconds", "inference_images_per_second"), NUMBER),
    **dict.fromkeys(
        ("training_images_per_second", "training_top1", "memory_bytes"), (*NUMBER, type(None))
    ),
    "diverged": (str, type(None)),
    "test": dict,
    "slices": dict,
}


def check_folder(study: Study, folder: Path) -> None:
    """Check that a folder holds runs of this study alone.

    Raises:
        UsageError: If it holds runs that the study file does not ask for, runs with another
            configuration, or was started with another primary comparison or other seeds.
    """
    wanted = {study_run.folder: study_run for study_run in study.runs()}
    for path in [*sorted(folder.glob(f"*/*/*/{JOB}")), *sorted(folder.glob(f"*/*/*/{RESULT}"))]:
        trained = (path.with_name(name) for name in (RESULT, checkpoint.CHECKPOINTS))
        if not any(kept.exists() for kept in trained):
            continue  # it failed before its first step was kept, and is made anew
        name = path.parent.relative_to(folder)
        if name not in wanted:
            raise UsageError(
                f"{folder} holds another study's runs: {name} is none of {study.path}; "
                "choose another --output"
            )
        _check_hash(path, wanted[name], study)
    path = folder / DECLARED
    before = read_json(path) if path.exists() else {}
    for key, value in study.declared().items() if before else ():
        if before.get(key) != value:
            raise UsageError(
                f"{folder} was started with {key} {before.get(key)}, not {value}; what was "
                "declared before the first run stays: choose another name or --output"
            )


def declare(study: Study, folder: Path, date: str = "") -> None:
    """Note the primary comparison and the seeds in the folder, before its first run is started.

    Args:
        study, folder: The study and its folder, which keeps what it has.
        date: When they were declared (default: now).
    """
    if not (folder / DECLARED).exists():
        write_json(folder / DECLARED, {**study.declared(), "date": date or now()})


def declaration(folder: Path, results: Results) -> str:
    """Say when the primary comparison was declared, as the folder notes it."""
    path = folder / DECLARED
    date = read_json(path).get("date") if path.exists() else None
    if date is None:
        return "Declared in the study file"
    declared, before = _time(str(date), path), 0
    for content in results.values():
        begun = _time(content["date"], path) - timedelta(seconds=content["seconds"])
        before += begun < declared
    if not before:
        return "Declared before the first run"
    return f"Declared on {date[:10]}, when {before} of the runs had been made"


def _check_hash(path: Path, run: Run, study: Study) -> None:
    content = read_json(path)
    found, seed = content.get("hash"), content.get("seed")
    if found != run.cell.hash:
        raise UsageError(
            f"{path.parent} was made with another configuration ({found}) than {study.path} asks "
            f"for ({run.cell.hash}); choose another --output"
        )
    if seed != run.seed:
        raise UsageError(f"{path} is of seed {seed}, and its folder is of seed {run.seed}")


def write_json(path: Path, content: dict[str, Any], indent: int | None = 1) -> None:
    """Write a file as a whole; without an indent it is a single line."""
    write_text(path, json.dumps(content, indent=indent) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read an object from a file.

    Raises:
        UsageError: If the file cannot be read, or does not hold one.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UsageError(f"{path} must hold a JSON object")
    return content


def read_content(path: Path, needed: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Read an object from a file, and check the types of what is needed of it.

    Raises:
        UsageError: If something is missing or has another type.
    """
    content = read_json(path)
    for key, kind in needed.items():
        if key not in content or not isinstance(content[key], kind):
            found = repr(content[key]) if key in content else "nothing"
            raise UsageError(f"{path} is damaged: {key} cannot be {found[:80]}")
    return content


def _read_result(path: Path, study: Study) -> dict[str, Any]:
    content = read_content(path, CONTENT)
    slices = content["slices"].values()
    numbers = [
        content["test"].get(metric) for metric in {*study.file.metrics, study.primary.metric}
    ]
    numbers += [
        value.get(key) if isinstance(value, dict) else None
        for value in slices
        for key in ("images", "top1")
    ]
    if not all(isinstance(number, NUMBER) for number in numbers):
        raise UsageError(f"{path} is damaged: test or slices lack a number")
    _time(content["date"], path)
    return content


def _time(date: str, path: Path) -> datetime:
    try:
        time = datetime.fromisoformat(date)
    except ValueError:
        time = None
    if time is None or time.tzinfo is None:
        raise UsageError(f"{path} is damaged: date cannot be {date!r}")
    return time


def read_results(study: Study, folder: Path) -> Results:
    """Read the results of the runs that have ended, in the order of the study.

    Raises:
        UsageError: If one was made with another configuration, or is damaged.
    """
    results: Results = {}
    for run in study.runs():
        path = folder / run.folder / RESULT
        if path.exists():
            _check_hash(path, run, study)
            results[run.cell.backbone, run.cell.method, run.seed] = _read_result(path, study)
    return results


def merge(study: Study, folder: Path, others: list[Path]) -> int:
    """Copy the results of this study's runs from other folders, by their hash and seed.

    The other folders may be those of other studies that share a cell with this one.

    Returns:
        The number of results that were copied.

    Raises:
        UsageError: If a folder has none, or two folders have different results for a run.
    """
    wanted: dict[tuple[str, int], list[Run]] = {}  # cells of two backbones may be the same
    for run in study.runs():
        wanted.setdefault((run.cell.hash, run.seed), []).append(run)
    found: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for other in others:
        count = 0
        for path in sorted(other.glob(f"*/*/*/{RESULT}")):
            content = read_json(path)
            for run in wanted.get((content.get("hash", ""), content.get("seed", -1)), ()):
                count += 1
                content, target = _read_result(path, study), folder / run.folder / RESULT
                known = found.get(target)
                if target.exists():
                    known = target, _read_result(target, study)
                if known is not None and known[1]["test"] != content["test"]:
                    raise UsageError(f"{known[0]} and {path} are of the same run, and differ")
                found.setdefault(target, (path, content))
        if not count:
            raise UsageError(f"{other} holds no result of a run that {study.path} asks for")
    declare(study, folder, min((_declared_in(other, study) for other in others), default=""))
    missing = sum(not target.exists() for target in found)
    for target, (path, _) in found.items():
        for name in (GROUPING, RESULT):  # the result last: without it the run has not ended
            source, copy = path.with_name(name), target.with_name(name)
            if source.exists() and not copy.exists():
                write_text(copy, source.read_text(encoding="utf-8"))
    return missing


def _declared_in(other: Path, study: Study) -> str:
    """Return when a folder noted the same declaration as the study's; otherwise the time now."""
    path = other / DECLARED
    before = read_json(path) if path.exists() else {}
    same = all(before.get(key) == value for key, value in study.declared().items())
    return str(before.get("date") or now()) if same else now()
