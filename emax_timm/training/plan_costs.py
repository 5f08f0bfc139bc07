"""What follows from a configuration without data: the optimizer's states, the model's costs."""

import dataclasses
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, optimizer_kwargs
from torch import nn

from ..models.cost import estimated_cost
from .config import TrainConfig, UsageError, model_arguments
from .config.trial import create_scheduler
from .data import data_config_of

__all__ = ["model_costs", "optimizer_and_epochs"]


def optimizer_and_epochs(config: TrainConfig, steps: int) -> tuple[float, int]:
    """Return the number of values that the optimizer keeps per parameter, and the epochs.

    An optimizer creates its states in its first step, so one small convolution makes a step.
    """
    layer = nn.Conv2d(64, 64, 3, bias=False)
    # Layer decay depends on a layer's depth in its model, which this layer does not have.
    alone = dataclasses.replace(config, layer_decay=None)
    try:
        optimizer = create_optimizer_v2(layer, **optimizer_kwargs(alone), **config.opt_kwargs)
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
    except Exception as error:  # optimizers may raise anything
        raise UsageError(f"optimizer {config.opt}: {str(error) or type(error).__name__}") from None
    kept = sum(
        value.numel()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0  # not the count of steps
    )
    _, epochs = create_scheduler(config, optimizer, steps)
    return kept / layer.weight.numel(), epochs


def model_costs(config: TrainConfig) -> tuple[Any, dict[str, Any]]:
    """Return the model on the meta device, and the fields of `Plan` that depend on it alone."""
    # The data set would give the number of classes, but it is not read.
    classes = config.num_classes or timm.get_pretrained_cfg_value(config.model, "num_classes")
    arguments = model_arguments(config, classes or 1000)
    with torch.device("meta"):
        model: Any = timm.create_model(config.model, **arguments)
    size = data_config_of(config, model)["input_size"]
    try:
        macs, kept = estimated_cost(model, size)
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        shape = " x ".join(map(str, size))
        raise UsageError(f"model {config.model} on images of {shape}: {reason}") from None
    costs = {
        "num_classes": arguments["num_classes"],
        "input_size": tuple(size),
        "macs": macs,
        "activation_bytes": round(kept),
    }
    return model, costs
