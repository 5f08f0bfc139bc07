"""The training loop, on models and images so small that an epoch takes a fraction of a second."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from tiers import mostly_slow
from torch import Tensor, nn
from training_testing import MakeTrainer, rows_without_seconds, same_tensors, state_of

from emax_timm import EMAX
from emax_timm.training import train
from emax_timm.training.distributed import DistributedContext
from emax_timm.training.evaluate import Metrics, evaluate
from emax_timm.training.grouping import grouping_schedule
from emax_timm.training.guard import BadStepError
from emax_timm.training.trainer import Trainer

CPU = DistributedContext(torch.device("cpu"))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def batch(size: int, seed: int = 0, classes: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return images, torch.randint(classes, (size,), generator=generator)


@pytest.mark.parametrize(
    ("progress", "warmup", "temperature"),
    [
        (0, 0, 1.0),
        (0.05, 0, 0.975),
        (0.125, 0.5, 0.9375),
        (0.2, 1, 0.9),
        (0.6, 1, 0.7),
        (1, 1, 0.5),
    ],
)
def test_grouping_schedule_rises_and_cools(
    progress: float, warmup: float, temperature: float
) -> None:
    schedule = grouping_schedule(progress, [0.05, 0.2], [1.0, 0.5])
    assert schedule == pytest.approx((warmup, temperature), abs=1e-12)


def test_grouping_schedule_may_be_a_step() -> None:
    assert grouping_schedule(0.29, [0.3, 0.3], [2, 2]) == (0, 2)
    assert grouping_schedule(0.3, [0.3, 0.3], [2, 2]) == (1, 2)
    assert grouping_schedule(0.0, [0.0, 0.0], [1, 0.5]) == (1, 1)
    assert grouping_schedule(1.0, [1.0, 1.0], [1, 0.5]) == (1, 0.5)


@pytest.mark.slow
def test_grouping_is_set_on_the_model_and_the_averaged_one(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(
        model_ema=True,
        epochs=5,
        grouping_warmup=[0.2, 0.6],
        grouping_temperature=[2.0, 1.0],
    )
    assert trainer.averaged is not None
    assert (trainer.epochs, trainer.steps_per_epoch) == (5, 4)
    schedules = {}
    for step in range(20):
        trainer.train_step([batch(8)])
        layers = [layer for layer in trainer.model.modules() if isinstance(layer, EMAX)]
        assert len(layers) == 4
        states = {(layer.warmup.item(), layer.temperature.item()) for layer in layers}
        assert len(states) == 1
        schedules[step] = states.pop()
        averaged = [layer for layer in trainer.averaged.modules() if isinstance(layer, EMAX)]
        # The average is for the next step: it is what a validation after this one sees.
        expected = grouping_schedule((step + 1) / 20, [0.2, 0.6], [2.0, 1.0])
        for layer in averaged:
            state = (layer.warmup.item(), layer.temperature.item())
            assert state == pytest.approx(expected, abs=1e-6)
    for step, warmup, temperature in ((0, 0, 2), (4, 0, 1.8), (8, 0.5, 1.6), (12, 1, 1.4)):
        assert schedules[step] == pytest.approx((warmup, temperature), abs=1e-6)
    assert schedules[19] == pytest.approx((1, 1.05))


def test_grouping_is_saved_with_the_weights(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(epochs=1, grouping_temperature=[0.8, 0.8], grouping_warmup=[0, 0])
    trainer.run()
    saved = safetensors.torch.load_file(trainer.folder / "model.safetensors")
    found = {
        name.rsplit(".", 1)[1]: v.item()
        for name, v in saved.items()
        if v.ndim == 0 and "se." in name
    }
    assert found["warmup"] == 1
    assert found["temperature"] == pytest.approx(0.8)


# A model without batch norm, where images do not see each other; timm's "sgd" has Nesterov's
# momentum, its "momentum" is plain.
NORM_FREE: dict[str, Any] = {"model": "test_convnext", "model_kwargs": {}, "momentum": 0.0}
NORM_FREE["opt"] = "momentum"


def test_train_step_is_one_step_down_the_gradient(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(**NORM_FREE, weight_decay=0.0, smoothing=0.0, lr=0.1, sched="none")
    before, twin = parameters(trainer.model), copy.deepcopy(trainer.model).train()
    images, labels = batch(16)
    loss = F.cross_entropy(twin(images), labels)
    loss.backward()
    trainer.network.train()
    assert trainer.train_step([(images, labels)]) == pytest.approx(loss.item(), rel=1e-5)
    for name, value in twin.named_parameters():
        assert value.grad is not None
        expected = before[name] - 0.1 * value.grad
        torch.testing.assert_close(trainer.model.get_parameter(name).data, expected)
    assert trainer.step == 1


@pytest.mark.parametrize("opt", ["momentum", "adamw"])
def test_accumulated_gradients_are_those_of_one_batch(trainer_for: MakeTrainer, opt: str) -> None:
    images, labels = batch(16)
    whole = trainer_for("whole", **{**NORM_FREE, "opt": opt})
    parts = trainer_for("parts", **{**NORM_FREE, "opt": opt})
    assert same_tensors(weights(whole.model), weights(parts.model))
    start = parameters(whole.model)
    gradients = []
    for trainer, batches in (
        (whole, [(images, labels)]),
        (parts, list(zip(images.split(8), labels.split(8), strict=True))),
    ):
        seen = {}

        def record(_: Any, seen: dict = seen, trainer: Trainer = trainer) -> None:
            for name, value in trainer.model.named_parameters():
                seen[name] = value.grad.clone()

        trainer.update.clip = record  # type: ignore[method-assign]
        trainer.network.train()
        gradients.append((trainer.train_step(batches), seen))
    (loss, first), (summed, second) = gradients
    assert loss == pytest.approx(summed, rel=1e-6)
    assert first
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-4, atol=1e-6)
    assert not same_tensors(start, parameters(whole.model))
    if opt == "momentum":  # Adam's first step is the sign of the gradient, rounding and all
        for name, value in parameters(whole.model).items():
            torch.testing.assert_close(value, parameters(parts.model)[name], rtol=1e-4, atol=1e-6)


def test_train_epoch_accumulates_what_is_left_at_its_end(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(batch_size=4, grad_accum_steps=3)
    assert trainer.steps_per_epoch == 3
    sizes = []
    step = trainer.train_step

    def record(batches: list) -> float:
        sizes.append([len(labels) for _, labels in batches])
        return step(batches)

    trainer.train_step = record  # type: ignore[method-assign]
    loss = trainer.train_epoch()
    assert sizes == [[4, 4, 4], [4, 4, 4], [4, 4]]
    assert trainer.step == 3
    assert math.isfinite(loss)


def test_gradients_are_clipped(trainer_for: MakeTrainer) -> None:
    options = {**NORM_FREE, "weight_decay": 0.0, "lr": 1.0, "sched": "none"}
    for clip, bound in ((None, math.inf), (0.01, 0.01)):
        trainer = trainer_for(clip_grad=clip, **options)
        before = parameters(trainer.model)
        trainer.train_step([batch(8)])
        moved = [value - before[name] for name, value in trainer.model.named_parameters()]
        length = torch.cat([value.flatten() for value in moved]).norm().item()
        assert length <= bound * 1.001
        assert length > 0.009


def test_averaged_weights_are_the_moving_average(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(model_ema=True, model_ema_decay=0.75)
    assert trainer.averaged is not None
    expected: dict[str, Tensor] = {}
    for seed in range(4):
        trainer.train_step([batch(8, seed)])
        for name, value in parameters(trainer.model).items():
            # As in timm, the average begins with the first step's result.
            expected[name] = 0.75 * expected.get(name, value.double()) + 0.25 * value.double()
    for name, value in trainer.averaged.module.named_parameters():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


class Failing(nn.Module):
    """A loss that is not finite when it is computed for the n-th time."""

    def __init__(self, loss: nn.Module, at: int, value: float) -> None:
        super().__init__()
        self.loss, self.calls, self.at, self.value = loss, 0, at, value

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return self.loss(logits, labels) * (self.value if self.calls == self.at else 1.0)


@pytest.mark.parametrize("value", mostly_slow([math.nan, math.inf, -math.inf], 0, 1))
@pytest.mark.parametrize("opt", mostly_slow(["sgd", "adamw"], 1))
def test_train_step_stops_before_a_step_that_is_not_finite(
    trainer_for: MakeTrainer, opt: str, value: float
) -> None:
    trainer = trainer_for(opt=opt, model_ema=True)
    assert trainer.averaged is not None
    trainer.criterion = Failing(trainer.criterion, 4, value)
    trainer.train_step([batch(8)])
    before = parameters(trainer.model)
    averaged, state = weights(trainer.averaged), copy.deepcopy(trainer.optimizer.state_dict())
    # The third part of an accumulated step spoils the whole of it.
    with pytest.raises(BadStepError, match="not finite at step 2 of epoch 1"):
        trainer.train_step([batch(8), batch(8), batch(8)])
    assert trainer.step == 1
    assert same_tensors(before, parameters(trainer.model))
    assert same_tensors(averaged, weights(trainer.averaged))
    assert same_tensors(state, trainer.optimizer.state_dict())


def test_train_of_a_loss_that_is_not_finite_ends_with_status_1(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = f"{images} --model resnet10t --img-size 32 -b 8 -j 0 --warmup-epochs 0 --lr 1e30".split()
    assert train([*argv, "--epochs", "2", "--output", str(tmp_path), "--experiment", "run"]) == 1
    assert "not finite" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_run_that_fails_later_keeps_the_epochs_before(trainer_for: MakeTrainer) -> None:
    whole = trainer_for("whole", epochs=2)
    whole.run()
    failing = trainer_for("failing", epochs=2)
    failing.criterion = Failing(failing.criterion, 6, math.nan)
    with pytest.raises(BadStepError, match="step 6 of epoch 2"):
        failing.run()
    rows = [rows_without_seconds(t.folder / "log.jsonl") for t in (whole, failing)]
    assert rows[1] == rows[0][:1]
    assert state_of(failing.folder)["epoch"] == 1
    assert not (failing.folder / "summary.json").exists()
    assert train(["--resume", str(failing.folder)]) == 0
    for name in ("model.safetensors", "last.safetensors"):
        files = [safetensors.torch.load_file(t.folder / name) for t in (whole, failing)]
        assert same_tensors(*files), name


def run_with_metrics(trainer: Trainer, metrics: list[Metrics]) -> list[dict[str, Tensor]]:
    """Run with validations that give these metrics; returns the weights after each epoch."""
    after = []

    def validate() -> Metrics:
        after.append(weights(trainer.model))
        return metrics[len(after) - 1]

    trainer.validate = validate  # type: ignore[method-assign]
    trainer.run()
    return after


NAN = math.nan


@pytest.mark.parametrize(
    ("eval_metric", "values", "best"),
    mostly_slow(
        [
            ("top1", [NAN, 70.0, NAN, 60.0], 2),
            ("top1", [70.0, 70.0, math.inf, 60.0], 1),
            ("top1", [10.0, 20.0, 30.0, 25.0], 3),
            ("top5", [10.0, 30.0, 20.0, 25.0], 2),
            ("loss", [NAN, 2.0, 1.0, 3.0], 3),
            ("loss", [0.5, -math.inf, 1.0, NAN], 1),
        ],
        4,
    ),
)
def test_best_is_by_the_chosen_metric_and_never_nan(
    trainer_for: MakeTrainer, eval_metric: str, values: list[float], best: int
) -> None:
    # The other metrics would choose another epoch.
    metrics = [Metrics(9.0 - i, 1.0 + i, 1.0 + i) for i in range(4)]
    if eval_metric == "loss":
        metrics = [Metrics(1.0, 9.0 - i, 9.0 - i) for i in range(4)]
    given = [m._replace(**{eval_metric: value}) for m, value in zip(metrics, values, strict=True)]
    trainer = trainer_for(epochs=4, eval_metric=eval_metric)
    after = run_with_metrics(trainer, given)
    saved = safetensors.torch.load_file(trainer.folder / "model.safetensors")
    assert same_tensors(saved, after[best - 1])
    summary = json.loads((trainer.folder / "summary.json").read_text())
    assert summary["best_epoch"] == best
    assert summary["validation"][eval_metric] == values[best - 1]


@pytest.mark.slow
def test_run_whose_metrics_are_all_nan_has_no_best(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(test_split="validation")
    run_with_metrics(trainer, [Metrics(NAN, NAN, NAN)] * 2)
    assert not (trainer.folder / "model.safetensors").exists()
    assert (trainer.folder / "last.safetensors").exists()
    assert json.loads((trainer.folder / "summary.json").read_text())["validation"] is None


def test_run_tests_the_best_weights_once_at_the_end(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(epochs=3, test_split="validation", lr=0.3)
    after = run_with_metrics(trainer, [Metrics(1, top1, 1) for top1 in (1, 3, 2)])
    twin = copy.deepcopy(trainer.model)
    twin.load_state_dict(after[1])
    expected = evaluate(twin, trainer.test_loader, CPU)
    summary = json.loads((trainer.folder / "summary.json").read_text())
    assert summary["test"] == expected._asdict()
    twin.load_state_dict(after[2])
    assert evaluate(twin, trainer.test_loader, CPU) != expected


@pytest.mark.parametrize("model_ema", [True, False])
def test_validate_is_of_what_is_published(trainer_for: MakeTrainer, model_ema: bool) -> None:
    trainer = trainer_for(epochs=1, model_ema=model_ema, model_ema_decay=0.5)
    trainer.run()
    published = trainer.model if trainer.averaged is None else trainer.averaged.module
    other = safetensors.torch.load_file(trainer.folder / "last.safetensors")
    saved = safetensors.torch.load_file(trainer.folder / "model.safetensors")
    assert same_tensors(saved, weights(published))
    assert same_tensors(other, weights(trainer.model))
    assert same_tensors(saved, other) != model_ema
    row = rows_without_seconds(trainer.folder / "log.jsonl")[0]
    expected = evaluate(published, trainer.val_loader, CPU)
    assert (row["val_loss"], row["val_top1"], row["val_top5"]) == tuple(expected)


@pytest.mark.slow
def test_run_without_validation_publishes_its_last_weights(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(val_split="")
    trainer.run()
    files = [
        safetensors.torch.load_file(trainer.folder / name)
        for name in ("model.safetensors", "last.safetensors")
    ]
    assert same_tensors(*files)
    rows = rows_without_seconds(trainer.folder / "log.jsonl")
    assert [row["val_top1"] for row in rows] == [None, None]


@pytest.mark.slow
def test_run_validates_every_few_epochs_and_after_the_last(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(epochs=5, val_interval=2)
    trainer.run()
    rows = rows_without_seconds(trainer.folder / "log.jsonl")
    assert [row["val_loss"] is not None for row in rows] == [False, True, False, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("no_prefetcher", [False, True])
def test_mixup_ends_at_its_epoch(trainer_for: MakeTrainer, no_prefetcher: bool) -> None:
    trainer = trainer_for(
        **{"epochs": 3, "mixup": 1.0, "cutmix": 1.0, "mixup_mode": "elem", "smoothing": 0.2},
        **{"mixup_off_epoch": 2, "no_prefetcher": no_prefetcher},
    )
    mixed: dict[int, list[float]] = {0: [], 1: [], 2: []}
    loss = trainer.criterion

    def record(logits: Tensor, labels: Tensor) -> Tensor:
        mixed[trainer.epoch] += labels.max(dim=1).values.tolist()
        return loss(logits, labels)

    trainer.criterion = record  # type: ignore[assignment]
    trainer.run()
    # A label that is smoothed over two classes, and not mixed, holds 0.9 and 0.1.
    assert {round(value, 6) for value in mixed[2]} == {0.9}
    for epoch in (0, 1):
        assert min(mixed[epoch]) < 0.8


@pytest.mark.slow
def test_learning_rate_follows_the_schedule(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(epochs=3, lr=0.1, warmup_epochs=1, warmup_lr=0.01)
    trainer.run()
    rows = rows_without_seconds(trainer.folder / "log.jsonl")
    cosine = [0.1 * (1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in (1, 2)]
    assert [row["lr"] for row in rows] == pytest.approx([0.01, *cosine])
    assert [row["step"] for row in rows] == [4, 8, 12]
    assert [row["epoch"] for row in rows] == [0, 1, 2]


def test_learning_rate_may_follow_the_steps(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(epochs=2, lr=0.1, warmup_epochs=1, warmup_lr=0.02, sched_on_updates=True)
    rates = []
    for _ in range(8):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.train_step([batch(8)])
    cosine = [0.1 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(4, 8)]
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, *cosine])
