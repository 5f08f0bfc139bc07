"""The folder of a study: the results of its runs, checked, and those of other folders merged in.

To report a study, or to merge it into another, it takes no more than the files result.json of its
runs, in BACKBONE/METHOD/seed-N, and what is made of their weights beside them.
"""

import json
from pathlib import Path
from typing import Any

from ..files import replace_file
from ..training.config import UsageError
from .cells import Run
from .run import JOB, RESULT
from .study import Study

__all__ = [
    "GROUPING",
    "Results",
    "check_folder",
    "merge",
    "read_json",
    "read_results",
    "write_json",
]

DECLARED = "declared.json"
GROUPING = "grouping.json"  # beside the result of a run: how its EMAX layers choose group counts

# The content of a run's result.json, by backbone, method and seed.
Results = dict[tuple[str, str, int], dict[str, Any]]


def check_folder(study: Study, folder: Path) -> None:
    """Check that a folder holds runs of this study alone; note the primary comparison in it.

    Raises:
        UsageError: If it holds runs that the study file does not ask for, runs with another
            configuration, or was started with another primary comparison or other seeds.
    """
    wanted = {study_run.folder: study_run for study_run in study.runs()}
    for path in [*sorted(folder.glob(f"*/*/*/{JOB}")), *sorted(folder.glob(f"*/*/*/{RESULT}"))]:
        name = path.parent.relative_to(folder)
        if name not in wanted:
            raise UsageError(
                f"{folder} holds another study's runs: {name} is none of {study.path}; "
                "choose another --output"
            )
        _check_hash(path, wanted[name], study)
    declared, path = study.declared(), folder / DECLARED
    if path.exists():
        before = read_json(path)
        if before != declared:
            key = next(key for key in declared if before.get(key) != declared[key])
            raise UsageError(
                f"{folder} was started with {key} {before.get(key)}, not {declared[key]}; what was "
                "declared before the first run stays: choose another name or --output"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, declared)


def _check_hash(path: Path, run: Run, study: Study) -> None:
    found = read_json(path).get("hash")
    if found != run.cell.hash:
        raise UsageError(
            f"{path.parent} was made with another configuration ({found}) than {study.path} asks "
            f"for ({run.cell.hash}); choose another --output"
        )


def write_json(path: Path, content: dict[str, Any], indent: int | None = 1) -> None:
    """Write a file as a whole; without an indent it is a single line."""
    text = json.dumps(content, indent=indent) + "\n"
    replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))


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


def read_results(study: Study, folder: Path) -> Results:
    """Read the results of the runs that have ended, in the order of the study.

    Raises:
        UsageError: If one was made with another configuration.
    """
    results: Results = {}
    for run in study.runs():
        path = folder / run.folder / RESULT
        if path.exists():
            _check_hash(path, run, study)
            results[run.cell.backbone, run.cell.method, run.seed] = read_json(path)
    return results


def merge(study: Study, folder: Path, others: list[Path]) -> int:
    """Copy the results of this study's runs from other folders, by their hash and seed.

    The other folders may be those of other studies that share a cell with this one.

    Returns:
        The number of results that were copied.

    Raises:
        UsageError: If a folder has none, or two folders have different results for a run.
    """
    wanted = {(run.cell.hash, run.seed): run for run in study.runs()}
    found: dict[Path, tuple[Path, dict[str, Any]]] = {}
    for other in others:
        count = 0
        for path in sorted(other.glob(f"*/*/*/{RESULT}")):
            content = read_json(path)
            if (run := wanted.get((content.get("hash", ""), content.get("seed", -1)))) is None:
                continue
            count += 1
            target = folder / run.folder / RESULT
            known = (target, read_json(target)) if target.exists() else found.get(target)
            if known is not None and known[1]["test"] != content["test"]:
                raise UsageError(f"{known[0]} and {path} are of the same run, and differ")
            found.setdefault(target, (path, content))
        if not count:
            raise UsageError(f"{other} holds no result of a run that {study.path} asks for")
    missing = sum(not target.exists() for target in found)
    for target, (path, _) in found.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        for name in (GROUPING, RESULT):  # the result last: without it the run has not ended
            source, copy = path.with_name(name), target.with_name(name)
            if source.exists() and not copy.exists():
                content = source.read_bytes()
                replace_file(copy, lambda file, c=content: file.write_bytes(c))
    return missing
