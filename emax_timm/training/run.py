"""The state of a training run."""

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .averaging import WeightAverage
from .conditional import OptimizerStep
from .config import TrainConfig
from .distributed import DistributedContext
from .evaluate import Metrics
from .grouping import GroupingSchedule
from .guard import Guard
from .progress import Timing
from .signals import Stop
from .statistics import LayerProbe
from .verdict import Verdict

__all__ = ["Run"]


@dataclass
class Run:
    """The parts of a training run, and its progress.

    `model` is the model itself, `network` the same model as the training step calls it (compiled,
    distributed), `averaged` the moving average of its weights.
    """

    config: TrainConfig
    context: DistributedContext
    folder: Path
    model: Any
    network: nn.Module
    averaged: WeightAverage | None
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler | None
    criterion: nn.Module
    train_loader: Any
    val_loader: Any
    test_loader: Any
    mixup: Any
    epochs: int
    steps_per_epoch: int
    data_config: dict[str, Any]
    classes: list[str] | None

    epoch: int = 0
    step: int = 0
    best: Metrics | None = None
    best_epoch: int | None = None
    seconds: float = 0.0
    # Losses of this epoch's steps, each the mean over ranks.
    losses: list[float] = field(default_factory=list)
    # Rows of the log and of the layers' statistics, one for each epoch.
    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)
    stop: Stop = field(default_factory=Stop)
    # The signal that the ranks have agreed on; a rank may have received another one since.
    stopping: int = 0
    # Whether the ranks have agreed on a checkpoint after this step.
    saving: bool = False
    # Mean loss over the ranks of the last step that the host knows of, and the step that it does
    # not know of yet; `late` steps are made on the device's word.
    loss: float = math.nan
    unsettled: Verdict | None = None
    late: bool = False
    scaler: torch.amp.GradScaler = field(init=False)
    guard: Guard = field(init=False)
    update: OptimizerStep = field(init=False)
    # Sets the grouping of the model and of the averaged one.
    groupings: list[GroupingSchedule] = field(init=False)
    statistics: LayerProbe = field(init=False)

    def __post_init__(self) -> None:
        half = bool(self.config.amp) and self.config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.context.device.type, enabled=half)
        self.guard = Guard(self.config, self.context, self.model, self.train_loader)
        self.update = OptimizerStep(self.config, self.model, self.optimizer, self.scaler)
        # Waiting for a GPU would let it run idle; a CPU is done when the host asks.
        self.asynchronous = self.context.device.type == "cuda"
        if self.asynchronous and (reason := self.update.needs_host()):
            self.asynchronous = False
            self.context.warn(f"the host waits for the device in every step, since {reason}")
        steps, averaged = self.epochs * self.steps_per_epoch, self.averaged
        models = [self.model] if averaged is None else [self.model, averaged.module]
        self.groupings = [GroupingSchedule(model, steps, self.config) for model in models]
        self.statistics = LayerProbe(self.config, self.context, self.val_loader)
        self.saved_at = time.monotonic()
        self.has_buckets = not isinstance(self.network, DistributedDataParallel)

    @property
    def published(self) -> nn.Module:
        """The model whose weights are validated and saved as the best."""
        return self.model if self.averaged is None else self.averaged.module
