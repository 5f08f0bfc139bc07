"""Fixtures of the tests of training."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from training_testing import MakeTrainer

from emax_timm.training import TrainConfig
from emax_timm.training.build import build_trainer
from emax_timm.training.distributed import DistributedContext
from emax_timm.training.trainer import Trainer


@pytest.fixture
def trainer_for(images: Path, tmp_path: Path) -> MakeTrainer:
    """Builds trainers; `name` is the run directory in `tmp_path`."""

    def trainer_for(name: str = "run", **options: Any) -> Trainer:
        settings: dict[str, Any] = {
            **{"data_dir": str(images), "output": str(tmp_path), "experiment": name},
            **{"model": "resnet10t_emax", "model_kwargs": {"channels": [8, 8, 8, 8]}},
            **{"img_size": 32, "batch_size": 8, "workers": 0, "epochs": 2, "warmup_epochs": 0},
            **{"lr": 0.05, "opt": "sgd"},
            **options,
        }
        return build_trainer(TrainConfig(**settings), DistributedContext(torch.device("cpu")))

    return trainer_for


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Models this small are slower on more threads, and the machine has other work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
