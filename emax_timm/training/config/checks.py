"""Checks of a configuration that need no data: options out of range, unknown names of models."""

import inspect
import json
import re
from pathlib import Path
from typing import Any

import timm
import torch
from timm.optim import list_optimizers
from torch import nn

from ...attention import ATTENTIONS
from .. import checkpoint
from ..sources import find_source, weights_file
from ..trackers import check_packages
from . import UsageError, nearest
from .arguments import model_arguments
from .combinations import check_combinations
from .train_options import TrainConfig
from .trial import try_training

__all__ = ["check_config", "check_model"]


def check_config(config: TrainConfig, ranks: int = 1) -> None:
    """Check all that can be checked without opening the data.

    Args:
        config: The configuration.
        ranks: The number of processes that train.

    Raises:
        UsageError: If something is invalid; the message says what is wrong and what would be right.
    """
    check_packages(config.log_to)
    names = [str(name) for name in list_optimizers()]
    if config.opt.lower().removeprefix("lookahead_") not in names:
        raise UsageError(
            f"unknown optimizer {config.opt}; the nearest is {nearest(config.opt, names)}"
        )
    start, end = config.grouping_warmup
    if not 0 <= start <= end <= 1:
        raise UsageError(f"grouping_warmup must ascend within [0, 1], not {start} {end}")
    if not all(0 < value < float("inf") for value in config.grouping_temperature):
        raise UsageError(
            f"grouping_temperature must be positive and finite, not {config.grouping_temperature}"
        )
    check_combinations(config)
    if Path(config.experiment).name != config.experiment or config.experiment == "..":
        raise UsageError(f"--experiment is the name of one folder, not {config.experiment}")
    if len(config.experiment.encode()) > 255:
        raise UsageError(f"--experiment is too long for a folder's name: {config.experiment}")
    for path in (config.pretrained_path, config.initial_checkpoint):
        if path:
            checkpoint.read_weights(weights_file(path))
    model = check_model(config.model, model_arguments(config, config.num_classes))
    if model is not None:
        try_training(config, model, ranks)


# Arguments of timm.create_model that choose the weights and do not define the model.
RESERVED = {
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
}


def check_model(name: str, arguments: dict[str, Any]) -> Any:
    """Build the model on the meta device, so that a wrong name or argument is refused early.

    Args:
        name: The name of a timm model; what is not one, such as `hf-hub:ORG/NAME` or a run, is not
            looked into.
        arguments: Keyword arguments of timm.create_model.

    Returns:
        The model; None if it was not looked up.

    Raises:
        UsageError: If the name or an argument is invalid; the message gives the nearest valid name.
    """
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise UsageError(f"model_kwargs must be plain values: {error}") from None
    if reserved := sorted(RESERVED & arguments.keys()):
        raise UsageError(f"model_kwargs cannot hold {reserved[0]}: there is an option for that")
    if ":" in find_source(name).model:  # hf-hub: and local-dir: models are defined by a config
        return None
    try:
        with torch.device("meta"):
            return timm.create_model(name, **arguments)
    except TypeError as error:
        raise UsageError(f"model {name}: {_explain(error, name)}") from None
    except Exception as error:  # a model may raise anything for wrong arguments
        raise UsageError(f"model {name}: {str(error) or type(error).__name__}") from None


def _explain(error: TypeError, name: str) -> str:
    """Return the message of a TypeError; for an unknown keyword, it gives the nearest valid one."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found:
        return str(error)
    owner, keyword = found.groups()
    # The class of the model may have passed the keyword on to a base class.
    model_class: Any = inspect.signature(timm.model_entrypoint(name)).return_annotation
    named = {base.__name__ for base in getattr(model_class, "__mro__", ())}
    attentions = {attention.__name__: attention for attention in ATTENTIONS.values()}
    if owner not in named:
        model_class = attentions.get(owner) or getattr(timm.models, owner, nn.Module)
    functions = [cls.__init__ for cls in inspect.getmro(model_class)]
    if owner not in attentions:
        functions.append(timm.model_entrypoint(name))
    keywords = {
        parameter.name
        for function in functions
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    } - {"self", "device", "dtype", "channels"}
    if not keywords:
        return f"unknown keyword {keyword}"
    return f"unknown keyword {keyword}; the nearest valid one is {nearest(keyword, keywords)}"
