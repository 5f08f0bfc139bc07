"""config.json: timm's description of a run's model."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from timm.models._hub import save_config_for_hf

from ..models.registry import of_architecture
from .checkpoint import MODEL_CONFIG, read_checked, replace_summed
from .config import UsageError

__all__ = ["read_model_config", "save_model_config"]


def save_model_config(
    model: Any,
    path: Path,
    model_args: dict[str, Any],
    data_config: dict[str, Any],
    label_names: list[str] | None,
) -> None:
    """Write timm's config.json, from which `local-dir:` and the Hugging Face Hub build the model.

    Its pretrained config holds the data config and what is true of the architecture; nothing about
    the weights that training may have started from. The model's `pretrained_cfg` becomes the same,
    in place.
    """
    registered = dict(model.pretrained_cfg)
    own = {**of_architecture(registered), **data_config, "num_classes": model.num_classes}
    if own.get("pool_size"):
        own["pool_size"] = _map_size(model, own["input_size"])
    model.pretrained_cfg.clear()
    model.pretrained_cfg.update(own)
    content = {"label_names": label_names} if label_names else None
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, MODEL_CONFIG)
        save_config_for_hf(model, str(file), content, model_args=model_args)
        config = json.loads(file.read_text())
    # The config has it outside model_args as well; transformers would pass it twice.
    config.get("model_args", {}).pop("num_classes", None)
    replace_summed(path, json.dumps(config, indent=2).encode())


@torch.no_grad()
def _map_size(model: Any, input_size: tuple[int, int, int]) -> tuple[int, int]:
    """Return height and width of the last feature map, which depend on the model's arguments."""
    training = model.training
    weight = next(model.parameters())
    image = torch.zeros(1, *input_size, device=weight.device, dtype=weight.dtype)
    maps = model.eval().forward_features(image)  # [1, c, h, w]
    model.train(training)
    height, width = maps.shape[-2:]
    return height, width


def read_model_config(folder: Path, *needed: str) -> dict[str, Any]:
    """Read the config.json of a run; its sha256 is checked if `SHA256SUMS` beside it has one.

    Args:
        folder: The run directory.
        needed: Keys that it must have.

    Raises:
        UsageError: If it is missing, has another sha256 or does not describe a model.
    """
    path = folder / MODEL_CONFIG
    try:
        config = json.loads(read_checked(path))
    except ValueError as error:
        raise UsageError(f"{path} does not describe a model: {error}") from None
    if not isinstance(config, dict) or not {"architecture", *needed} <= config.keys():
        names = ", ".join(["architecture", *needed])
        raise UsageError(f"{path} does not describe a model: it must hold an object with {names}")
    for name in {"pretrained_cfg", "model_args"} & config.keys():
        if not isinstance(config[name], dict):
            raise UsageError(f"{path} does not describe a model: {name} must hold an object")
    return config
