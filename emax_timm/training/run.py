"""The state of a run."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .config import TrainConfig
from .distributed import World
from .evaluate import Metrics
from .guard import Guard
from .progress import Timing
from .signals import Stop
from .statistics import LayerProbe

__all__ = ["Run"]


@dataclass
class Run:
    """What a run consists of, and how far it has come.

    `model` is the bare model, `network` the same in what the training step calls (compiled,
    distributed), `averaged` its moving average.
    """

    config: TrainConfig
    world: World
    folder: Path
    model: Any
    network: nn.Module
    averaged: ModelEmaV3 | None
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
    # Of the steps of this epoch, the mean over ranks.
    losses: list[float] = field(default_factory=list)
    # Of the log, an epoch each.
    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    timing: Timing = field(default_factory=Timing)
    stop: Stop = field(default_factory=Stop)
    # The signal that the ranks have agreed on; another may have come to one of them since.
    stopping: int = 0
    scaler: torch.amp.GradScaler = field(init=False)
    guard: Guard = field(init=False)
    statistics: LayerProbe = field(init=False)

    def __post_init__(self) -> None:
        half = bool(self.config.amp) and self.config.amp_dtype == "float16"
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=half)
        self.guard = Guard(self.config, self.world, self.model, self.train_loader)
        self.statistics = LayerProbe(self.config, self.world, self.val_loader)
        self.saved_at = time.monotonic()
        self.has_buckets = not isinstance(self.network, DistributedDataParallel)

    @property
    def published(self) -> nn.Module:
        """The model whose weights are validated and saved as the best."""
        return self.model if self.averaged is None else self.averaged.module
