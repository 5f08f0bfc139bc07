"""Study files: which methods are compared, on which backbones, and how each run is configured.

A cell is a backbone with a method; it has a run for each seed. All runs of a study share one
recipe, so that for a seed they have the same order of the data and, where the method is an
attention inserted into the backbone, the same initial weights of the backbone.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..training.config import UsageError, find_config, from_mapping, nearest, option, read_yaml
from .cells import (
    Backbone,
    Cell,
    Method,
    Run,
    make_cell,
    own_options,
    split_of_test_images,
    train_config,
)

__all__ = ["METRICS", "Primary", "Study", "StudyFile", "read_study"]

METRICS = ("top1", "top5", "loss")


@dataclass
class Primary:
    """The primary comparison, declared before the first run."""

    method: str = option("", "the method of interest")
    against: list[str] = option([], "the methods that it is compared with")
    backbone: str = option("", "on which backbone (default: the first)")
    metric: str = option("top1", "in which metric", choices=METRICS)


@dataclass
class StudyFile:
    """The keys of a study file."""

    name: str = option("", "name of the study and of its folder")
    recipe: dict[str, Any] = option({}, "options of train.py for all runs")
    backbones: dict[str, Any] = option({}, "the backbones by name")
    methods: dict[str, Any] = option({}, "the methods by name")
    references: list[str] = option([], "the methods to which differences are shown")
    primary: dict[str, Any] = option({}, "the primary comparison")
    seeds: list[int] = option([], "the seeds", bounds=(0, 2**32 - 1))
    metrics: list[str] = option(["top1"], "what is shown", choices=METRICS)
    tuned: str = option("", "file with the values that emax tune chose, beside the study file")
    tune: dict[str, Any] = option({}, "what emax tune does")


@dataclass(frozen=True)
class Study:
    """A study that has been checked."""

    path: Path
    file: StudyFile
    backbones: dict[str, Backbone]
    methods: dict[str, Method]
    primary: Primary
    tuned: dict[str, dict[str, Any]]
    """The values that `emax tune` has chosen, by backbone/method."""
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        return self.file.name

    def cell(self, backbone: str, method: str) -> Cell | None:
        """Return the cell of a backbone and a method, if there is one."""
        found = (c for c in self.cells if (c.backbone, c.method) == (backbone, method))
        return next(found, None)

    def values(self, backbone: str, method: str) -> dict[str, Any]:
        """Return the tuned values that a method uses, without those that it sets itself."""
        return _values(self.file, self.tuned, backbone, method)

    def untuned(self) -> list[str]:
        """Return the cells, as backbone/method, that have no values in the file `tuned`."""
        if not self.file.tuned:
            return []
        roots = [f"{cell.backbone}/{_root(self.file, cell.method)}" for cell in self.cells]
        return [root for root in dict.fromkeys(roots) if root not in self.tuned]

    def runs(self) -> list[Run]:
        """Return all runs in the order in which they are made.

        The primary comparison comes first. The methods take turns within a seed, so that a study
        that is cut short has treated them alike.
        """
        primary = {self.primary.method, *self.primary.against}

        def place(cell: Cell) -> int:
            return int(cell.method not in primary or cell.backbone != self.primary.backbone)

        runs = [Run(cell, seed) for seed in self.file.seeds for cell in self.cells]
        runs = [run for run in runs if run.seed in run.cell.seeds]
        return sorted(runs, key=lambda run: place(run.cell))  # stable

    def declared(self) -> dict[str, Any]:
        """Return what must not change once there are runs."""
        return {"primary": dataclasses.asdict(self.primary), "seeds": list(self.file.seeds)}


def read_study(name: str) -> Study:
    """Read a study file, and check every run that it asks for; nothing is trained.

    Args:
        name: A path, or the name of a study that comes with the package (studies/NAME).

    Raises:
        UsageError: If the file is invalid: an unknown key, method, metric or model, or a value that
            train.py would refuse.
    """
    path = find_config(name)
    file = from_mapping(StudyFile, read_yaml(path), str(path))
    for key in ("backbones", "methods", "seeds", "metrics"):
        if not getattr(file, key):
            raise UsageError(f"{path}: {key} must name at least one")
    for name in (file.name, *file.backbones, *file.methods):
        _check_name(name, path)
    for key in ("seeds", "references", "metrics"):
        if len(set(values := getattr(file, key))) != len(values):
            raise UsageError(f"{path}: {key} has a value twice: {', '.join(map(str, values))}")
    backbones = {
        key: from_mapping(Backbone, _mapping(value, f"{path}: backbones.{key}"), f"{path}: {key}")
        for key, value in file.backbones.items()
    }
    for key, backbone in backbones.items():
        if not backbone.model:
            raise UsageError(f"{path}: backbone {key} names no model")
    methods = {key: _method(file.methods, key, path) for key in file.methods}
    for method in file.references:
        _known("reference", method, methods, path)
    primary = _primary(file, backbones, methods, path)
    tuned = _tuned(path, file.tuned)
    cells = tuple(
        _cell(file, (name, backbone), (key, method), tuned, path)
        for name, backbone in backbones.items()
        for key, method in methods.items()
    )
    known: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        same = known.setdefault((cell.backbone, cell.hash), cell)
        if same is not cell:
            raise UsageError(f"{path}: the methods {same.method} and {cell.method} are the same")
    return Study(path, file, backbones, methods, primary, tuned, cells)


def _check_name(name: Any, path: Path) -> None:
    """Refuse a name that is no name of a folder, or would break a table."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.+ -]{0,99}", name):
        raise UsageError(
            f"{path}: {name!r} is no name; a study, a backbone and a method have names of letters, "
            "digits and _.+- (in quotes, if YAML reads them as something else, as it does no and 8)"
        )


def _mapping(value: Any, source: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UsageError(f"{source} must hold key: value lines, not {value!r}")
    return value or {}


def _known(what: str, name: Any, valid: Mapping[str, Any], path: Path) -> None:
    if not isinstance(name, str) or name not in valid:
        raise UsageError(
            f"{path}: unknown {what} {name}; the nearest of {', '.join(valid)} "
            f"is {nearest(str(name), valid)}"
        )


def _method(methods: dict[str, Any], name: str, path: Path) -> Method:
    """Return a method with the keys of those that it is like."""
    settings, seen = dict(_mapping(methods[name], f"{path}: methods.{name}")), {name}
    if settings.get("like") and "space" in settings:
        raise UsageError(
            f"{path}: method {name} has a space, but takes the values of {settings['like']}"
        )
    while parent := settings.get("like"):
        _known("method", parent, methods, path)
        if parent in seen:
            raise UsageError(f"{path}: method {name} is like itself")
        seen.add(parent)
        own = {key: value for key, value in settings.items() if key != "like"}
        settings = dict(_mapping(methods[parent], f"{path}: methods.{parent}"))
        for key, value in own.items():
            both = isinstance(value, dict) and isinstance(settings.get(key), dict)
            settings[key] = {**settings[key], **value} if both else value
    method = from_mapping(Method, settings, f"{path}: method {name}")
    if method.model and method.attention:
        raise UsageError(f"{path}: method {name} has an attention and a model of its own")
    if method.attention is None and (method.attn_kwargs or method.stages is not None):
        raise UsageError(f"{path}: method {name} has attn_kwargs or stages, but no attention")
    if method.model_kwargs and not method.model:
        raise UsageError(f"{path}: method {name} has model_kwargs, but no model of its own")
    if method.stages is not None and (
        not method.stages or len(set(method.stages)) != len(method.stages)
    ):
        raise UsageError(
            f"{path}: method {name}: stages must be different ones, not {method.stages}"
        )
    if method.experiment and method.attention != "emax":
        raise UsageError(f"{path}: the experiment of method {name} needs attention: emax")
    return method


def _root(file: StudyFile, name: str) -> str:
    """Return the method whose tuned values a method uses: the one that it is a variant of."""
    while parent := (file.methods[name] or {}).get("like"):
        name = parent
    return name


def _values(
    file: StudyFile, tuned: Mapping[str, dict[str, Any]], backbone: str, method: str
) -> dict[str, Any]:
    """Return the tuned values of a method, without those that it, or what it is like, sets."""
    values = dict(tuned.get(f"{backbone}/{_root(file, method)}", {}))
    name: str | None = method
    while name:
        own = file.methods[name] or {}
        recipe, attn_kwargs = own.get("recipe") or {}, own.get("attn_kwargs") or {}
        keys = own_options(recipe, attn_kwargs, "stages" in own)
        values = {k: value for k, value in values.items() if k.replace("-", "_") not in keys}
        name = own.get("like")
    return values


def _primary(
    file: StudyFile, backbones: dict[str, Backbone], methods: dict[str, Method], path: Path
) -> Primary:
    settings = {"backbone": next(iter(backbones)), **_mapping(file.primary, f"{path}: primary")}
    primary = from_mapping(Primary, settings, f"{path}: primary")
    if not primary.method or not primary.against:
        raise UsageError(
            f"{path}: no primary comparison is declared: "
            "give primary: {method: NAME, against: [NAME, ...]}"
        )
    for method in (primary.method, *primary.against):
        _known("method", method, methods, path)
    _known("backbone", primary.backbone, backbones, path)
    if len(set(primary.against)) != len(primary.against):
        raise UsageError(f"{path}: primary compares with a method twice")
    if primary.method in primary.against:
        raise UsageError(f"{path}: primary compares {primary.method} with itself")
    return primary


def _tuned(path: Path, name: str) -> dict[str, dict[str, Any]]:
    """Read what `emax tune` chose: by backbone/method, the values of its options."""
    if not name:
        return {}
    file = path.parent / name
    if not file.is_file():
        raise UsageError(f"{path}: there is no file {file}; emax tune {path} makes it")
    tuned = read_yaml(file)  # it may hold the values of other studies' methods too
    return {
        str(cell): {str(key): v for key, v in _mapping(values, f"{file}: {cell}").items()}
        for cell, values in tuned.items()
    }


def _cell(
    file: StudyFile,
    backbone: tuple[str, Backbone],
    method: tuple[str, Method],
    tuned: dict[str, dict[str, Any]],
    path: Path,
) -> Cell:
    values = _values(file, tuned, backbone[0], method[0])
    cell = make_cell(file.recipe, file.seeds, backbone, method, values, {}, path)
    config = train_config(cell)
    if not config.test_split:
        raise UsageError(f"{path}: {cell.folder} has no test_split, so nothing can be compared")
    if split := split_of_test_images(config, config.test_split):
        raise UsageError(
            f"{path}: {cell.folder} is trained or selected on {split}, which has the images of the "
            f"test split {config.test_split}; choose another, val_split: '' or val_fraction"
        )
    return cell
