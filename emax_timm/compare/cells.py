"""The runs of a study: what `train.py` would be told for each, and the hash that identifies it.

A cell is a backbone with a method; it has a run for each seed.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.data.dataset_factory import _EVAL_SYNONYM, _TORCH_BASIC_DS, _TRAIN_SYNONYM

from ..attention import ATTENTIONS
from ..files import sha256_of
from ..training.config import (
    AT_LEAST_1,
    TrainConfig,
    UsageError,
    from_mapping,
    layered,
    model_arguments,
    option,
)
from ..training.config.checks import check_config
from ..training.config.options import DataOptions
from ..training.sources import weights_file
from ..training.splits import open_splits
from .experiments import EXPERIMENTS, parameters_ending

__all__ = [
    "Backbone",
    "Cell",
    "Method",
    "Run",
    "check_data",
    "check_data_dir",
    "machine_options",
    "make_cell",
    "own_options",
    "split_of_test_images",
    "train_config",
]

# Options of train.py that the study sets itself.
RESERVED = ("experiment", "model", "model_kwargs", "output", "resume", "seed")
# Options that do not change what is computed; the hash of a cell leaves them out.
MACHINE = (
    *(
        "data",
        "data_dir",
        "dataset_download",
        "device",
        "dist_timeout",
        "experiment",
        "log_interval",
    ),
    *("log_to", "output", "pin_mem", "pretrained_path", "recovery_interval", "recovery_minutes"),
    *("resume", "seed", "workers", "checkpoint_hist"),
)


@dataclass
class Backbone:
    """A backbone of a study."""

    model: str = option("", "name of a timm model without the attention")
    model_kwargs: dict[str, Any] = option({}, "its keyword arguments")
    where: str = option("block", "where attention is inserted", choices=("block", "stage"))
    recipe: dict[str, Any] = option({}, "options of train.py for this backbone")


@dataclass
class Method:
    """A method of a study: an attention, nothing (the baseline), or another model."""

    like: str = option("", "the method that this one is a variant of; it takes over its keys")
    attention: str | None = option(None, "name of the attention", choices=tuple(ATTENTIONS))
    attn_kwargs: dict[str, Any] = option({}, "keyword arguments of the attention")
    stages: list[int] | None = option(None, "stages that get attention, from 0 (default: all)")
    init: dict[str, float] = option(
        {}, "constants to start parameters from, by the ends of their names"
    )
    experiment: str | None = option(
        None, "a change of the model that the package does not offer", choices=tuple(EXPERIMENTS)
    )
    model: str = option("", "another timm model instead of the backbone; its runs are not paired")
    model_kwargs: dict[str, Any] = option({}, "the keyword arguments of that model")
    recipe: dict[str, Any] = option({}, "options of train.py for this method")
    seeds: int | None = option(
        None,
        "the number of the study's seeds to use, from the first (default: all)",
        bounds=AT_LEAST_1,
    )
    space: dict[str, Any] = option({}, "what emax tune searches for this method alone")


class Cell(NamedTuple):
    """A backbone with a method: the options of train.py, but for the seed and the folders."""

    backbone: str
    method: str
    settings: dict[str, Any]
    init: dict[str, float]
    experiment: str | None
    seeds: tuple[int, ...]
    paired: bool
    hash: str
    """Of all that determines what its runs compute, but for the seed."""

    @property
    def folder(self) -> Path:
        return Path(self.backbone, self.method)


class Run(NamedTuple):
    """A run of a study."""

    cell: Cell
    seed: int

    @property
    def folder(self) -> Path:
        return self.cell.folder / f"seed-{self.seed}"

    def __str__(self) -> str:
        return str(self.folder)


def machine_options(device: str, data_dir: str | None) -> dict[str, Any]:
    """Return the options of train.py that say where a run is made; what is empty is left out."""
    given = {"device": device, "data_dir": data_dir}
    return {name: value for name, value in given.items() if value}


def train_config(cell: Cell, **settings: Any) -> TrainConfig:
    """Return the configuration of a run of a cell, with further options of train.py."""
    return from_mapping(TrainConfig, layered(cell.settings, settings), str(cell.folder))


def check_data_dir(cells: Iterable[Cell], data_dir: str | None) -> None:
    """Check that a folder of images in place of the study's has its name, which the hash knows.

    Raises:
        UsageError: If it has another.
    """
    for cell in cells if data_dir else ():
        config = train_config(cell)
        name, given = _data_folder(config), Path(data_dir or "").resolve().name
        if not config.dataset and name != given:
            study = f"are in a folder {name}" if name else "have no data_dir"
            raise UsageError(
                f"--data-dir {data_dir}: the data of the study file {study}, and results on "
                "different data must not mix; name the folder there"
            )


def check_data(cells: Iterable[Cell], data_dir: str | None) -> None:
    """Open the data of all cells, so that what is wrong with them is known before the first run.

    Raises:
        UsageError: If a split does not exist, or does not fit the others.
    """
    options = {field.name for field in dataclasses.fields(DataOptions)}
    options |= {"train_split", "val_split", "test_split", "val_fraction", "num_classes"}
    options |= {"train_num_samples", "val_num_samples", "in_chans", "img_size", "input_size"}
    opened = set()
    for cell in cells:
        config = train_config(cell, **machine_options("", data_dir))
        content = {name: getattr(config, name) for name in sorted(options)}
        if (key := json.dumps(content)) not in opened:
            opened.add(key)
            try:
                open_splits(config)
            except UsageError as error:
                raise UsageError(f"{cell.folder}: {error}") from None


def _data_folder(config: TrainConfig) -> str:
    return Path(config.data or config.data_dir or "").name


def own_options(
    recipe: Mapping[str, Any], attn_kwargs: Mapping[str, Any], stages: bool
) -> set[str]:
    """Return the options that a method sets itself, as a search space names them."""
    own = {str(key).replace("-", "_") for key in recipe}
    return own | {f"attn_kwargs.{key}" for key in attn_kwargs} | ({"stages"} if stages else set())


def apply_values(
    backbone: Backbone, method: Method, values: Mapping[str, Any], source: str
) -> tuple[Method, dict[str, Any]]:
    """Put tuned values in their places: those of the attention, and options of train.py.

    Args:
        backbone, method: What they are for.
        values: By the name of an option of train.py, `stages`, or `attn_kwargs.NAME`.
        source: Where they come from, for the errors.

    Returns:
        The method with the values of its attention, and the options of train.py.
    """
    options, changes = {}, {}
    for key, value in values.items():
        group, _, name = str(key).rpartition(".")
        if group == "attn_kwargs":
            changes["attn_kwargs"] = {
                **method.attn_kwargs,
                **changes.get("attn_kwargs", {}),
                name: value,
            }
        elif key == "stages":
            changes["stages"] = value
        else:
            options[key] = value
    if changes and method.attention is None:
        raise UsageError(f"{source}: {', '.join(changes)} need an attention, and there is none")
    return dataclasses.replace(method, **changes), options


def make_cell(
    recipe: Mapping[str, Any],
    seeds: Sequence[int],
    backbone: tuple[str, Backbone],
    method: tuple[str, Method],
    values: Mapping[str, Any],
    last: Mapping[str, Any],
    path: Path,
) -> Cell:
    """Make a cell, and check its configuration.

    Args:
        recipe: The options of train.py of the whole study.
        seeds: The seeds of the study.
        backbone, method: Their names and what they are.
        values: Tuned values, as in `apply_values`.
        last: Options of train.py that override all others.
        path: The path of the study file, for the errors.

    Raises:
        UsageError: If train.py would refuse the configuration.
    """
    source = f"{path}: {backbone[0]} with {method[0]}"
    kind, options = apply_values(backbone[1], method[1], values, source)
    settings: dict[str, Any] = {"amp": False, "workers": 0}
    for layer in (recipe, backbone[1].recipe, options, kind.recipe, last):
        given = {str(key).replace("-", "_"): value for key, value in layer.items()}
        if reserved := sorted(given.keys() & set(RESERVED)):
            raise UsageError(f"{source}: {reserved[0]} is no key of a recipe here")
        settings = layered(settings, given)
    settings |= _model(backbone[1], kind, settings)
    config = from_mapping(TrainConfig, settings, source)
    try:
        check_config(config)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    if kind.init or kind.experiment:
        _check_changes(config, kind, source)
    seeds = tuple(seeds if kind.seeds is None else seeds[: kind.seeds])
    digest = _hash(config, kind)
    more = (kind.init, kind.experiment, seeds, not kind.model, digest)
    return Cell(backbone[0], method[0], settings, *more)


def split_of_test_images(config: TrainConfig, test_split: str) -> str:
    """Return the split with the images of the test split that a run is trained or selected on.

    Args:
        config: What train.py would be told.
        test_split: The test split, which may be another than that of `config`.

    Returns:
        Its name, or "" if there is none.
    """
    kind, _, name = config.dataset.lower().partition("/")
    # Of these timm takes every split that is not of training for that of testing.
    two_splits = kind == "torch" and name in (*_TORCH_BASIC_DS, "qmnist")

    def images(split: str) -> str:
        if split in _TRAIN_SYNONYM:
            return "train"
        return "validation" if two_splits or split in _EVAL_SYNONYM else split

    tested = {images(split) for split in test_split.split("+")}
    read = [config.train_split, "" if config.val_fraction else config.val_split]
    parts = [part for split in read for part in split.split("+") if part]
    return next((part for part in parts if images(part) in tested), "")


def _check_changes(config: TrainConfig, method: Method, source: str) -> None:
    """Refuse constants and an experiment that do not fit the model."""
    with torch.device("meta"):
        model = timm.create_model(config.model, **model_arguments(config, config.num_classes))
        try:
            if method.experiment:
                EXPERIMENTS[method.experiment](model)
            for end, value in method.init.items():
                parameters_ending(model, str(end))
                if type(value) not in (int, float) or not math.isfinite(value):
                    raise UsageError(f"init: {end} must be a number, not {value!r}")
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None


def _model(backbone: Backbone, method: Method, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the options of train.py that name the model."""
    if method.model:
        return {"model": method.model, "model_kwargs": method.model_kwargs}
    if method.attention is None:
        return {"model": backbone.model, "model_kwargs": backbone.model_kwargs}
    # Trained from scratch the attention starts open; behind pretrained weights, closed.
    warm = settings.get("pretrained") or settings.get("pretrained_path")
    attention = {**({} if warm else {"gate_init": 1.0}), **method.attn_kwargs}
    inserted = {
        "base_model": backbone.model,
        "attention": method.attention,
        "where": backbone.where,
        "attn_kwargs": attention,
    }
    if method.stages is not None:
        inserted["stages"] = method.stages
    return {"model": "with_attention", "model_kwargs": {**backbone.model_kwargs, **inserted}}


def _hash(config: TrainConfig, method: Method) -> str:
    content: dict[str, Any] = dataclasses.asdict(config)
    content = {key: value for key, value in content.items() if key not in MACHINE}
    content["init"] = method.init
    if method.experiment:
        content["experiment"] = method.experiment
    if not config.dataset:  # a folder; the same data may have another place on another machine
        content["folder"] = _data_folder(config)
    if config.pretrained_path:
        content["weights"] = sha256_of(Path(config.pretrained_path))
    if config.initial_checkpoint:
        content["initial_checkpoint"] = sha256_of(weights_file(config.initial_checkpoint))
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
