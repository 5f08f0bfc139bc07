"""Steps that the device leaves out by itself, of which the host learns a step later.

This is how a GPU trains. The same loop does so on a CPU if it is asked to.
"""

import math
import signal
from typing import Any

import pytest
import torch
from timm.optim import list_optimizers
from torch import Tensor, nn
from training_testing import MakeTrainer, left_by, same_tensors

from emax_timm.training.guard import BadStepError
from emax_timm.training.resume import snapshot
from emax_timm.training.signals import Stopped
from emax_timm.training.trainer import Trainer

# A model with batch norm, dropout and averaged weights, and a schedule that changes in every step.
OPTIONS: dict[str, Any] = {
    **{"model_ema": True, "model_ema_decay": 0.9, "drop": 0.1, "clip_grad": 1.0},
    **{"sched_on_updates": True, "lr": 0.001, "nonfinite": "skip"},
}
# Of every way in which optimizers keep their state: in tensors, numbers, generators, groups.
KINDS = ["sgd", "adamw", "lamb", "muon", "lookahead_radam", "adafactor", "lion"]


def batch(seed: int, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(8, 3, 32, 32, generator=generator) * factor
    return images, torch.randint(2, (8,), generator=generator)


def late(trainer: Trainer) -> Trainer:
    """Let a trainer on the CPU learn of steps as on a GPU."""
    trainer.asynchronous = True
    return trainer


def make_steps(trainer: Trainer, factors: list[float], parts: int = 1) -> dict[str, Any]:
    """Make a step with each factor of the images; returns all state, but for times."""
    trainer.network.train()
    for number, factor in enumerate(factors):
        trainer.train_step([batch(parts * number + part, factor) for part in range(parts)])
    trainer.settle()
    saved = snapshot(trainer)
    del saved.state["seconds"], saved.state["timing"]
    return saved._asdict() if hasattr(saved, "_asdict") else vars(saved)


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for part, value in first.items():
        assert same_tensors(value, second[part]), part


@pytest.mark.parametrize("opt", KINDS)
def test_bad_steps_are_left_out_by_the_device_as_by_the_host(
    trainer_for: MakeTrainer, opt: str
) -> None:
    _compare(trainer_for, {"opt": opt})


@pytest.mark.slow
@pytest.mark.parametrize("opt", sorted(set(list_optimizers(exclude_filters=["bnb*", "fused*"]))))
def test_bad_steps_of_every_optimizer_are_left_out_alike(
    trainer_for: MakeTrainer, opt: str
) -> None:
    _compare(trainer_for, {"opt": opt})


def _compare(trainer_for: MakeTrainer, options: dict[str, Any], parts: int = 1) -> None:
    factors = [1.0, 1.0, math.nan, 1.0, math.inf, math.nan, 1.0, 1.0]
    options = {**OPTIONS, **options}
    expected = make_steps(trainer_for("waits", **options), factors, parts)
    found = make_steps(late(trainer_for("late", **options)), factors, parts)
    assert_same(found, expected)
    assert len(found["state"]["losses"]) == 5
    assert found["state"]["step"] == 8
