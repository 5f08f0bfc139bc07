"""The files of a run.

    config.yaml          the resolved configuration
    model.safetensors    the weights with the best metric (averaged ones if averaging is on)
    config.json          timm's description of that model: the folder is a timm `local-dir:` model
    last.safetensors     the weights after the last epoch
    last.pt              what else a run needs to go on: optimizer, averaged weights, counters
    log.csv log.jsonl    a row per epoch
    summary.json         the result

Weights are safetensors; `last.pt` holds tensors and plain containers and is read with torch's
restricted unpickler. Every file is written under a temporary name and renamed when complete.
"""

import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from timm.models import PretrainedCfg
from timm.models._hub import save_config_for_hf
from torch import Tensor, nn

from ..files import replace_file
from .config import UsageError

__all__ = [
    "BEST",
    "CONFIG",
    "LAST",
    "LAST_STATE",
    "MODEL_CONFIG",
    "load_state",
    "load_weights",
    "read_weights",
    "save_model_config",
    "save_state",
    "save_weights",
]

CONFIG, MODEL_CONFIG = "config.yaml", "config.json"
BEST, LAST, LAST_STATE = "model.safetensors", "last.safetensors", "last.pt"


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the model's state dict as safetensors."""
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    replace_file(
        path, lambda file: safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UsageError: If the file is missing or no complete safetensors file.
    """
    if path.suffix != ".safetensors":
        raise UsageError(f"{path}: weights are read from .safetensors files only")
    if not path.is_file():
        raise UsageError(f"there is no checkpoint {path}")
    try:
        return safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UsageError(f"{path} is not a complete safetensors file: {error}") from None


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a file of `save_weights` into the model; every key must fit.

    Raises:
        UsageError: If the file cannot be read, or is of another architecture.
    """
    tensors = read_weights(path)
    _check_keys(model.state_dict(), tensors, path)
    model.load_state_dict(tensors)


def _check_keys(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    def problem() -> str | None:
        missing, added = sorted(expected.keys() - found), sorted(found.keys() - expected)
        if missing:
            more = f" and {len(missing) - 1} more keys" if len(missing) > 1 else ""
            return f"it lacks {missing[0]}{more}"
        if added:
            more = f" and {len(added) - 1} more keys" if len(added) > 1 else ""
            return f"it has {added[0]}{more}, which the model lacks"
        for name, value in expected.items():
            if value.shape != found[name].shape:
                return f"{name} is {list(found[name].shape)}, in the model {list(value.shape)}"
        return None

    if reason := problem():
        raise UsageError(
            f"{path} holds weights of another model: {reason}; "
            "give the --model and --model-kwargs that it was trained with"
        )


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write optimizer and loop state: tensors, numbers, strings and containers of them."""
    replace_file(path, lambda file: torch.save(state, file))


def load_state(path: Path, device: torch.device) -> dict[str, Any]:
    """Read a file of `save_state`; nothing but plain data can come out of it.

    Raises:
        UsageError: If the file is missing or damaged.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles of other kinds, which are refused
            state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise TypeError(f"it holds {type(state).__name__}")
        return state
    except FileNotFoundError:
        raise UsageError(f"there is no run to resume: {path} does not exist") from None
    except Exception as error:
        # torch's text advises to turn its restricted unpickler off.
        reason = "it is damaged, or holds more than plain data"
        reason = reason if isinstance(error, pickle.UnpicklingError) else str(error)
        raise UsageError(f"{path} is not a complete training state: {reason}") from None


def save_model_config(
    model: Any,
    path: Path,
    model_args: dict[str, Any],
    data_config: dict[str, Any],
    label_names: list[str] | None,
) -> None:
    """Write timm's config.json, by which `local-dir:` and the Hugging Face Hub know the model."""
    valid = PretrainedCfg.__dataclass_fields__
    model.pretrained_cfg.update({k: v for k, v in data_config.items() if k in valid})
    content = {"label_names": label_names} if label_names else None

    def write(file: Path) -> None:
        save_config_for_hf(model, str(file), content, model_args=model_args)
        config = json.loads(file.read_text())
        # It stands beside the arguments as well; transformers would pass it on twice.
        config.get("model_args", {}).pop("num_classes", None)
        file.write_text(json.dumps(config, indent=2))

    replace_file(path, write)
