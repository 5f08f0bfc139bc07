"""Steps that the device leaves out by itself, of which the host learns a step later.

This is how a GPU trains. The same loop does so on a CPU if it is asked to.
"""

import copy
import math
import signal
from typing import Any

import pytest
import torch
from tiers import mostly_slow
from timm.optim import create_optimizer_v2, list_optimizers
from torch import Tensor, nn
from training_testing import MakeTrainer, left_by, same_tensors, state_of

from emax_timm.training import TrainConfig
from emax_timm.training.conditional import OptimizerStep, Refusal
from emax_timm.training.data.decoding import CorruptImageError
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
    return state_of_trainer(trainer)


def state_of_trainer(trainer: Trainer) -> dict[str, Any]:
    """A copy of all that a checkpoint would hold, but for times."""
    trainer.settle()
    saved = copy.deepcopy(snapshot(trainer))
    del saved.state["seconds"], saved.state["timing"]
    return {"model": saved.model, "averaged": saved.averaged, "state": saved.state}


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    for part, value in first.items():
        assert same_tensors(value, second[part]), part


@pytest.mark.parametrize("opt", mostly_slow(KINDS, 1))
def test_bad_steps_are_left_out_by_the_device_as_by_the_host(
    trainer_for: MakeTrainer, opt: str
) -> None:
    _compare(trainer_for, {"opt": opt})


@pytest.mark.slow
@pytest.mark.parametrize(
    "opt", sorted(set(list_optimizers(exclude_filters=["bnb*", "fused*", "adahessian", "kron*"])))
)
def test_bad_steps_of_every_optimizer_are_left_out_alike(
    trainer_for: MakeTrainer, opt: str
) -> None:
    _compare(trainer_for, {"opt": opt})


@pytest.mark.parametrize(
    "options",
    mostly_slow(
        [
            {"opt": "sgd", "opt_kwargs": {"fused": True}},
            {"opt": "adamw", "opt_kwargs": {"fused": True}},
            {"opt": "adamw", "clip_mode": "agc", "clip_grad": 0.01},
            {"opt": "lamb", "amp": True, "amp_dtype": "bfloat16"},
            {"opt": "lamb", "amp": True, "amp_dtype": "float16"},
            {"opt": "adamw", "amp": True, "amp_dtype": "float16", "opt_kwargs": {"fused": True}},
            {"opt": "lamb", "grad_accum_steps": 3, "epochs": 8},
            {"opt": "lamb", "clip_grad": None, "model_ema": False, "grouping_warmup": [0.3, 0.3]},
        ]
    ),
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_bad_steps_are_left_out_alike_with(
    trainer_for: MakeTrainer, options: dict[str, Any]
) -> None:
    _compare(trainer_for, options)


@pytest.mark.parametrize("opt", mostly_slow(["kron", "lamb"], 1))
def test_generators_of_an_optimizer_are_brought_back(
    opt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Kron draws random numbers on the host; it is too slow for the trainer's model.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    _compare_small((4, 9, 10, 20), opt=opt, lr=1e-3)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_momentum_does_not_begin_with_a_step_that_is_left_out(momentum: float) -> None:
    """The fused kernel is left out, too, on the memory for it, to which nothing was written."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills memory with NaN before it is written to
    try:
        _compare_small((0, 1, 5), opt="momentum", lr=1e-2, momentum=momentum, fused=True)
    finally:
        torch.use_deterministic_algorithms(deterministic)


def _compare_small(bad: tuple[int, ...], **options: Any) -> None:
    """Compare steps that the device leaves out with those that the host does, in a small model."""

    def train(device_decides: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        optimizer = create_optimizer_v2(model, **options)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        update = OptimizerStep(TrainConfig(), model, optimizer, scaler)
        for step in range(25):
            torch.manual_seed(step)
            loss = model(torch.randn(4, 5)).square().mean()
            (loss * (math.nan if step in bad else 1)).backward()
            norm, overflow = update.check()
            if device_decides and step - 1 in bad:
                update.revert()
            refused: Any = step in bad
            if device_decides and step:
                refused = Refusal(torch.tensor(refused))
            update.make(norm, overflow, refused)
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict()}

    assert_same(train(device_decides=True), train(device_decides=False))


@pytest.mark.slow
def test_what_an_optimizer_keeps_on_the_host_is_brought_back(trainer_for: MakeTrainer) -> None:
    # As if the parameters alone were on the device.
    _compare(trainer_for, {"opt": "adamw"}, device=torch.device("meta"))


@pytest.mark.slow
def test_steps_that_the_scaler_leaves_out_are_so_alike(trainer_for: MakeTrainer) -> None:
    options = {**OPTIONS, "opt": "adamw", "amp": True, "amp_dtype": "float16"}
    trainers = [trainer_for("waits", **options), late(trainer_for("late", **options))]
    states = []
    for trainer in trainers:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=2)
        trainer.update.scaler = trainer.scaler
        states.append(make_steps(trainer, [1.0] * 8))
    assert_same(*states)
    steps = {int(values["step"]) for values in states[0]["state"]["optimizer"]["state"].values()}
    assert 0 < max(steps) < 8
    assert len(states[0]["state"]["losses"]) == 8


def _compare(
    trainer_for: MakeTrainer, options: dict[str, Any], device: torch.device | None = None
) -> None:
    options = {**OPTIONS, **options}
    factors = [1.0, 1.0, math.nan, 1.0, math.inf, math.nan, 1.0, 1.0]
    parts = options.get("grad_accum_steps", 1)
    expected = make_steps(trainer_for("waits", **options), factors, parts)
    trainer = late(trainer_for("late", **options))
    trainer.update.device = device or trainer.update.device
    found = make_steps(trainer, factors, parts)
    assert_same(found, expected)
    assert len(found["state"]["losses"]) == 5
    assert found["state"]["step"] == 8


@pytest.mark.parametrize("bad", mostly_slow([1, 2, 7], 1))
@pytest.mark.parametrize(
    "options", mostly_slow([{"opt": "lamb"}, {"opt": "sgd", "opt_kwargs": {"fused": True}}], 0)
)
def test_run_that_stops_at_a_bad_step_is_where_the_step_before_left_it(
    trainer_for: MakeTrainer, capsys: pytest.CaptureFixture[str], options: dict[str, Any], bad: int
) -> None:
    options = {**OPTIONS, **options, "nonfinite": "stop"}
    expected = make_steps(trainer_for("waits", **options), [1.0] * bad)
    trainer = late(trainer_for("late", **options))
    factors = [1.0] * 8
    factors[bad] = math.nan
    with pytest.raises(BadStepError, match="not finite at step"):
        make_steps(trainer, factors)
    assert_same(state_of_trainer(trainer), expected)
    # The samples are those of the bad step, not of the one that found it.
    lines = capsys.readouterr().err.splitlines()
    first = next(line for line in lines if not line.startswith("warning: "))
    assert first.startswith(f"samples at step {bad + 1} of epoch 1 on rank 0: ")


@pytest.mark.slow
@pytest.mark.parametrize("policy", mostly_slow(["warn", "skip"], 1))
def test_spikes_are_met_alike(
    trainer_for: MakeTrainer, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    options = {**OPTIONS, "opt": "lamb", "loss_spike": 20.0, "on_spike": policy, "epochs": 9}
    states, texts = [], []
    for trainer in (trainer_for("waits", **options), late(trainer_for("late", **options))):
        trainer.criterion = Spiking(trainer.criterion, trainer)
        states.append(make_steps(trainer, [1.0] * 15))
        texts.append(capsys.readouterr().err)
    assert_same(*states)
    assert texts[0] == texts[1]
    assert texts[0].count("the loss is a spike at step 13 of epoch 1") == 1
    assert len(states[0]["state"]["losses"]) == (15 if policy == "warn" else 14)


class Spiking(nn.Module):
    """A loss that is a spike in the 13th step."""

    def __init__(self, loss: nn.Module, trainer: Trainer) -> None:
        super().__init__()
        self.loss, self.step = loss, lambda: trainer.step

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.loss(logits, labels) * (10_000 if self.step() == 12 else 1)


WHOLE: dict[str, Any] = {
    **{"epochs": 3, "mixup": 0.4, "cutmix": 1.0, "drop": 0.1, "drop_path": 0.2, "reprob": 0.5},
    **{"model_ema": True, "model_ema_decay": 0.9, "opt": "lamb", "lr": 0.001},
    **{"sched_on_updates": True, "recovery_interval": 3, "clip_grad": 1.0},
}


@pytest.mark.slow
def test_late_run_is_to_the_bit_as_one_that_waits(trainer_for: MakeTrainer) -> None:
    waits, other = trainer_for("waits", **WHOLE), late(trainer_for("late", **WHOLE))
    waits.run()
    other.run()
    assert same_tensors(left_by(waits.folder), left_by(other.folder))


@pytest.mark.parametrize("step", mostly_slow([1, 3, 6], 1))
def test_late_run_stops_after_the_next_step_and_resumes_to_the_bit(
    trainer_for: MakeTrainer, step: int
) -> None:
    whole = trainer_for("whole", **WHOLE)
    whole.run()
    stopped = late(trainer_for("stopped", **WHOLE))
    train_step = stopped.train_step

    def train_step_and_signal(batches: list[Any]) -> float:
        stopped.stop.number = signal.SIGTERM * (stopped.step >= step)
        return train_step(batches)

    stopped.train_step = train_step_and_signal  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.run()
    # The last step of an epoch is waited for.
    made = step + 1 if (step + 1) % 4 == 0 else step + 2
    assert state_of(stopped.folder)["step"] == made
    resumed = late(trainer_for("stopped", **WHOLE, resume=str(stopped.folder)))
    resumed.run()
    assert same_tensors(left_by(whole.folder), left_by(stopped.folder))


@pytest.mark.slow
def test_late_run_that_meets_a_bad_step_saves_the_one_before(trainer_for: MakeTrainer) -> None:
    whole = trainer_for("whole", **WHOLE)
    whole.run()
    failing = late(trainer_for("failing", **WHOLE))
    loss = failing._loss
    failing._loss = lambda *batch: loss(*batch) * (math.nan if failing.step == 5 else 1)  # type: ignore
    with pytest.raises(BadStepError, match="not finite at step 6 of epoch 2"):
        failing.run()
    state = state_of(failing.folder)
    assert (state["epoch"], state["step"], len(state["losses"])) == (1, 5, 1)
    late(trainer_for("failing", **WHOLE, resume=str(failing.folder))).run()
    assert same_tensors(left_by(whole.folder), left_by(failing.folder))


def test_late_run_stops_at_too_many_corrupt_images(
    trainer_for: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = late(trainer_for(**OPTIONS, max_broken_fraction=0.1))  # of 32 images
    monkeypatch.setattr("emax_timm.training.trainer.corrupt_images", lambda *_: 1)
    with pytest.raises(CorruptImageError, match="4 of 32 training images are corrupt by step 4"):
        make_steps(trainer, [1.0] * 8)
    assert (trainer.step, trainer.guard.corrupt, len(trainer.losses)) == (3, 3, 3)


@pytest.mark.slow
def test_late_run_saves_by_the_clock_what_is_known(
    trainer_for: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = late(trainer_for(**WHOLE | {"recovery_interval": 0, "recovery_minutes": 1e-9}))
    saved = []

    def save_checkpoint(*_: Any) -> None:
        assert trainer.unsettled is None
        saved.append(trainer.step)

    monkeypatch.setattr("emax_timm.training.trainer.checkpoint.save_checkpoint", save_checkpoint)
    trainer.run()
    assert saved == [1, 3, 4, 6, 8, 10, 12]


def test_optimizers_that_may_keep_their_state_anywhere_make_the_host_wait(
    trainer_for: MakeTrainer,
) -> None:
    class Foreign(torch.optim.SGD):
        pass

    trainer = trainer_for()
    assert trainer.update.needs_host() == ""
    trainer.update.optimizer = Foreign(trainer.model.parameters())
    assert trainer.update.needs_host() == "Foreign may keep its state anywhere"
