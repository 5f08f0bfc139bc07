"""Models for the programs: timm's, whose weights come from safetensors files or not at all."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from timm.models import PretrainedCfg, get_pretrained_cfg

from ..models.download import locate
from ..models.hub_errors import hub_problem
from ..models.weights_index import WEIGHTS
from . import checkpoint
from .config import UsageError
from .config.checks import check_model

__all__ = ["DEFAULT_MODEL", "create_model", "load_model"]

# What commands take that are not told of a model: its weights come with the package.
DEFAULT_MODEL = "test_resnet_emax.fashion_mnist"


def create_model(
    name: str,
    pretrained: bool = False,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """timm's `create_model`, from safetensors files alone: timm itself would take a pickle as well.

    Args:
        name: Of a model, a repository (`hf-hub:ORG/NAME`) or a folder (`local-dir:PATH`).
        pretrained: Whether to load its weights.
        pretrained_cfg_overlay: Where from, if not from where they are published.
        arguments: Of the model.

    Raises:
        UsageError: Whatever stands in the way of the model or its weights.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    try:
        if pretrained and not overlay:
            overlay = _safetensors_of(name)
        return timm.create_model(
            name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments
        )
    except (HfHubHTTPError, EntryNotFoundError) as error:  # in timm's request for the config
        reason = hub_problem(error)
    except (AttributeError, KeyError, TypeError) as error:
        if ":" not in name:
            raise UsageError(f"model {name}: {str(error) or type(error).__name__}") from None
        reason = f"its config.json does not describe a model ({error!r})"
    except Exception as error:  # whatever the model makes of its arguments and weights
        reason = str(error) or type(error).__name__
    raise UsageError(f"model {name}: {reason}")


def load_model(
    name: str,
    pretrained: bool,
    weights: str | None = None,
    num_classes: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The model that a command line names, with the weights that it names.

    Args:
        name: As in `create_model`.
        pretrained: Whether to load its published weights, without others.
        weights: A .safetensors file.
        num_classes: None for the model's.
        model_kwargs: Further arguments of the model.

    Raises:
        UsageError: Whatever stands in the way; if it can be, before anything is fetched.
    """
    arguments = dict(model_kwargs or {})
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    check_model(name, arguments)
    path = Path(weights) if weights else None
    if path is not None:
        checkpoint.read_weights(path)
    model = create_model(name, pretrained and path is None, **arguments)
    if path is not None:
        checkpoint.load_weights(model, path)
    return model


def _safetensors_of(name: str) -> dict[str, Any]:
    """What to lay over the config of a model for its weights to be read from safetensors."""
    scheme, separator, rest = name.partition(":")
    if separator and scheme == "local-dir":
        cfg = PretrainedCfg(source=scheme, file=str(Path(rest)))
    elif separator:
        return {"hf_hub_filename": WEIGHTS}
    else:
        cfg = get_pretrained_cfg(name)
        if cfg is None or not cfg.hf_hub_id or cfg.hf_hub_filename:
            return {}
    located = locate(cfg)
    return {"file": str(located.path), "source": None} if located else {}
