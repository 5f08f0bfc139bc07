"""Warm starts: the weights of a baseline as initial weights of a model with attention."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..attention import EMAX, GatedAttention

__all__ = ["warm_start"]


def warm_start(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Add the attention's parameters to the weights of a baseline, with closed residual gates.

    They are added only if all of them are absent: weights that have some of them are left as they
    are, and do not load. timm calls this function as its `pretrained_filter_fn`.

    Args:
        state_dict: The weights of the baseline, or of a model with attention.
        model: The model that the weights are for.

    Returns:
        The weights for the model.

    Raises:
        RuntimeError: If keys other than those of the classifier are missing or unknown. timm itself
            would accept that where the number of classes differs.
    """
    own = model.state_dict()
    attention = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, EMAX | GatedAttention)
        for key, value in module.state_dict().items()
    }
    if attention and not attention.keys() & state_dict.keys():
        closed = {
            key: torch.zeros_like(value) if key.endswith(".residual_gate") else value
            for key, value in attention.items()
        }
        state_dict = {**state_dict, **closed}
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in _names(classifier))
    # Weights from old versions of torch lack these keys, which load_state_dict accepts.
    lacking = {key for key in own.keys() - state_dict if not key.endswith("num_batches_tracked")}
    for keys, what in ((lacking, "lack"), (state_dict.keys() - own, "are for a model with")):
        if found := sorted(key for key in keys if not key.startswith(heads)):
            architecture = model.pretrained_cfg.get("architecture", "this model")
            more = f" and {len(found) - 1} more keys" if len(found) > 1 else ""
            raise RuntimeError(
                f"the weights do not fit {architecture}: they {what} {found[0]}{more}"
            )
    return state_dict


def _names(names: str | Iterable[str]) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names
