"""How large the gradients of the grouping's controllers are over a run.

They are read where the optimizer is about to use them, so that the run computes what it would
compute without.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import EMAX
from ..files import write_text
from ..training.conditional import base_optimizer
from ..training.journal import read_rows
from ..training.trainer import Trainer

__all__ = ["GRADIENTS", "choosing_layers", "record_gradients"]

GRADIENTS = "gradients.jsonl"
ROWS = 100  # of a run, about


def choosing_layers(model: nn.Module) -> dict[str, EMAX]:
    """Return the EMAX layers that choose among several group counts, by their names."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, EMAX) and layer.group_controller is not None
    }


def record_gradients(trainer: Trainer, folder: Path) -> None:
    """Write a row of norms into `GRADIENTS` at about `ROWS` steps of a run with EMAX layers.

    A row has the step, the L2 norm of the gradient of the whole `network`, and for each of the
    `layers` that choose a group count that of its `controller` and that of its `other` parameters.
    Rows of steps that an interrupted run makes again are dropped.

    Args:
        trainer: The trainer, before its next step.
        folder: The run directory.
    """
    layers = choosing_layers(trainer.model)
    if not layers:
        return
    path = folder / GRADIENTS
    rows = [row for row in read_rows(path) if row["step"] < trainer.step]
    write_text(path, "".join(map(_line, rows)))
    every = max(1, trainer.epochs * trainer.steps_per_epoch // ROWS)

    def before_step(*_: Any) -> None:
        if trainer.step % every:
            return
        row = {
            "step": trainer.step,
            "network": _norm(trainer.model),
            "layers": {name: _norms(layer) for name, layer in layers.items()},
        }
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(row))

    base_optimizer(trainer.optimizer).register_step_pre_hook(before_step)


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row) + "\n"


def _norms(layer: EMAX) -> dict[str, float]:
    controller: Any = layer.group_controller
    own = set(controller.parameters())
    other = [parameter for parameter in layer.parameters() if parameter not in own]
    return {"controller": _norm(controller), "other": _norm_of(other)}


def _norm(module: nn.Module) -> float:
    return _norm_of(list(module.parameters()))


def _norm_of(parameters: Sequence[Tensor]) -> float:
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients).item() if gradients else 0.0
