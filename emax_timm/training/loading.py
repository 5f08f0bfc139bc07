"""Create timm models for the commands, with weights from safetensors files only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from timm.models import PretrainedCfg, get_pretrained_cfg

from ..models.download import check_folder_config, locate
from ..models.hub_errors import hub_problem
from ..models.weights_index import WEIGHTS
from . import checkpoint
from .config import UsageError
from .config.checks import check_model
from .sources import find_source, weights_file

__all__ = ["DEFAULT_MODEL", "create_model", "load_model"]

# The default model of commands; its weights come with the package.
DEFAULT_MODEL = "test_resnet_emax.fashion_mnist"


def create_model(
    name: str,
    pretrained: bool = False,
    pretrained_cfg_overlay: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Call timm's `create_model`, but load weights from safetensors files only, never from pickles.

    Args:
        name: Name of a model, a repository (`hf-hub:ORG/NAME`) or a folder (`local-dir:PATH`).
        pretrained: Whether to load the model's weights.
        pretrained_cfg_overlay: Where to load them from, if not from where they are published.
        arguments: Keyword arguments of the model.

    Raises:
        UsageError: If the model or its weights cannot be created, found or read.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    try:
        if name.startswith("local-dir:"):
            check_folder_config(Path(name.removeprefix("local-dir:")))
        if pretrained and not overlay:
            overlay = _safetensors_of(name)
        return timm.create_model(
            name, pretrained=pretrained, pretrained_cfg_overlay=overlay, **arguments
        )
    except (HfHubHTTPError, EntryNotFoundError) as error:  # while timm fetches the config
        reason = hub_problem(error)
    except (AttributeError, KeyError, TypeError) as error:
        if ":" not in name:
            raise UsageError(f"model {name}: {str(error) or type(error).__name__}") from None
        reason = f"its config.json does not describe a model ({error!r})"
    except Exception as error:  # models may raise anything
        reason = str(error) or type(error).__name__
    raise UsageError(f"model {name}: {reason}")


def load_model(
    name: str | None,
    pretrained: bool,
    weights: str | None = None,
    num_classes: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Create the model that a command line names, with the weights that it names.

    Args:
        name: The name of a model, a run directory or a checkpoint, as in `find_source`; None for
            the model of the run that the weights are of.
        pretrained: Whether to load the model's own weights; weights that are named take precedence.
        weights: Path of a .safetensors file, or of a folder that has one.
        num_classes: Number of classes; None for the model's own.
        model_kwargs: Further keyword arguments of the model.

    Raises:
        UsageError: If the model or its weights are invalid; where possible, before anything is
            downloaded.
    """
    arguments = dict(model_kwargs or {})
    if num_classes is not None:
        arguments["num_classes"] = num_classes
    source = find_source(str(weights if name is None else name))
    path = weights_file(weights) if weights else source.weights
    check_model(source.model, arguments)
    if path is not None:
        checkpoint.read_weights(path)
    elif source.folder is not None and pretrained:
        weights_file(str(source.folder))
    model = create_model(source.model, pretrained and path is None, **arguments)
    if path is not None:
        checkpoint.load_weights(model, path)
    return model


def _safetensors_of(name: str) -> dict[str, Any]:
    """Return the `pretrained_cfg_overlay` that makes timm read a model's safetensors file."""
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
