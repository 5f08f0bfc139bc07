"""Runs are reproducible, and a run that stopped continues as if it had not."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import mostly_slow
from torch import Tensor
from training_testing import (
    MakeTrainer,
    left_by,
    newest_checkpoint,
    rows_without_seconds,
    same_tensors,
    state_of,
    sum_up,
)

from emax_timm.training import train
from emax_timm.training.evaluate import Metrics
from emax_timm.training.signals import Stopped
from emax_timm.training.trainer import Trainer

# Every source of randomness that a run can have.
RANDOM: dict[str, Any] = {
    **{"mixup": 0.4, "cutmix": 1.0, "reprob": 0.5, "aa": "rand-m9-mstd0.5", "drop_path": 0.2},
    **{"drop": 0.1, "model_ema": True, "model_ema_decay": 0.9, "smoothing": 0.1},
}


@pytest.mark.slow
def test_run_is_reproducible(trainer_for: MakeTrainer) -> None:
    states = []
    for name, seed in (("first", 3), ("second", 3), ("third", 4)):
        torch.manual_seed(len(states))  # what the process did before must not matter
        trainer = trainer_for(name, seed=seed, **RANDOM)
        trainer.run()
        states.append(left_by(trainer.folder))
    assert same_tensors(states[0], states[1])
    for part in ("model.safetensors", "averaged.safetensors", "log"):
        assert not same_tensors(states[0][part], states[2][part])


@pytest.mark.slow
def test_epochs_and_seeds_differ_in_the_images_they_see(trainer_for: MakeTrainer) -> None:
    seen: dict[tuple[int, int], set[float]] = {}
    for seed in (0, 1):
        trainer = trainer_for(f"seed{seed}", epochs=2, seed=seed)
        loss = trainer._loss

        def record(
            images: Tensor,
            labels: Tensor,
            trainer: Trainer = trainer,
            loss: Callable = loss,
            seed: int = seed,
        ) -> Tensor:
            key = (seed, trainer.epoch)
            seen[key] = seen.get(key, set()) | set(images.sum((1, 2, 3)).tolist())
            return loss(images, labels)

        trainer._loss = record  # type: ignore[method-assign]
        trainer.run()
    # All crops differ.
    assert sum(map(len, seen.values())) == len(set.union(*seen.values())) == 4 * 32


class StopError(Exception):
    pass


VARIANTS: dict[str, dict[str, Any]] = {
    "randomness": RANDOM,
    "per step": {**RANDOM, "opt": "adamw", "lr": 1e-3, "sched_on_updates": True},
    "sparse": {"val_interval": 2, "grad_accum_steps": 3, "model_ema": True, "test_split": "val"},
    "float16": {"amp": True, "amp_dtype": "float16", "clip_grad": 1.0},
    "noise": {"lr_noise": [0.2, 0.9], "mixup": 0.5, "mixup_off_epoch": 2, "model_ema_warmup": True},
    "worker": {**RANDOM, "workers": 1},
    # So slow that the accuracy stays what it is: the third epoch is the first with a lower rate.
    "plateau": {
        **{"sched": "plateau", "patience_epochs": 1, "lr": 1e-5, "warmup_epochs": 0},
        **{"lr_noise": [0.4, 1.0]},
    },
}


@pytest.mark.filterwarnings("ignore:PlateauLRScheduler is deprecated")
@pytest.mark.parametrize(
    "variant",
    mostly_slow(VARIANTS, 0),
)
def test_resumed_run_equals_one_that_never_stopped(trainer_for: MakeTrainer, variant: str) -> None:
    options = {"epochs": 4, "warmup_epochs": 1, "warmup_lr": 0.01, **VARIANTS[variant]}
    whole = trainer_for("whole", **options)
    whole.run()
    stopped = trainer_for("stopped", **options)
    save, epochs = stopped.save, []

    def save_and_stop(metrics: Metrics | None) -> None:
        save(metrics)
        epochs.append(stopped.epoch)
        if len(epochs) == 2:
            raise StopError

    stopped.save = save_and_stop  # type: ignore[method-assign]
    with pytest.raises(StopError):
        stopped.run()
    torch.manual_seed(99)
    assert train(["--resume", str(stopped.folder)]) == 0
    expected, found = left_by(whole.folder), left_by(stopped.folder)
    for part, value in expected.items():
        assert same_tensors(value, found[part]), part
    summaries = [json.loads((t.folder / "summary.json").read_text()) for t in (whole, stopped)]
    assert {**summaries[0], "seconds": 0} == {**summaries[1], "seconds": 0}


@pytest.mark.slow
def test_resumed_run_repeats_an_epoch_that_was_logged_but_not_saved(
    trainer_for: MakeTrainer,
) -> None:
    whole = trainer_for("whole", epochs=3, **RANDOM)
    whole.run()
    stopped = trainer_for("stopped", epochs=3, **RANDOM)
    save = stopped.save

    def stop(metrics: Metrics | None) -> None:
        if stopped.epoch == 2:
            raise StopError
        save(metrics)

    stopped.save = stop  # type: ignore[method-assign]
    with pytest.raises(StopError):
        stopped.run()
    assert len(rows_without_seconds(stopped.folder / "log.jsonl")) == 2
    assert train(["--resume", str(stopped.folder)]) == 0
    assert same_tensors(left_by(whole.folder), left_by(stopped.folder))


def test_resume_in_the_middle_of_an_epoch_counts_the_time_before(trainer_for: MakeTrainer) -> None:
    stopped = trainer_for(epochs=1)
    step = stopped.train_step

    def step_and_stop(batches: list[Any]) -> float:
        stopped.stop.number = signal.SIGTERM * (stopped.step == 2)
        return step(batches)

    stopped.train_step = step_and_stop  # type: ignore[method-assign]
    with pytest.raises(Stopped):
        stopped.run()
    assert stopped.timing.images == 3 * 8
    state = state_of(stopped.folder)
    assert state["timing"] == asdict(stopped.timing)
    state["timing"]["compute"] += 1000
    newest = newest_checkpoint(stopped.folder)
    torch.save(state, newest / "state.pt")
    sum_up(newest)
    assert train(["--resume", str(stopped.folder)]) == 0
    row = json.loads((stopped.folder / "log.jsonl").read_text())
    assert 1000 < row["seconds"] < 1100
    assert row["images_per_second"] == pytest.approx(4 * 8 / 1000, abs=0.05)  # to a decimal
    assert row["data_wait"] < 0.1
    assert json.loads((stopped.folder / "summary.json").read_text())["seconds"] > 1000


@pytest.mark.slow
def test_resume_of_a_finished_run_changes_nothing(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(epochs=1)
    trainer.run()
    before = left_by(trainer.folder)
    assert train(["--resume", str(trainer.folder)]) == 0
    assert same_tensors(before, left_by(trainer.folder))


def test_resume_with_more_epochs_follows_their_schedule(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(epochs=1, lr=0.05)
    trainer.run()
    assert train(["--resume", str(trainer.folder), "--epochs", "2"]) == 0
    rows = rows_without_seconds(trainer.folder / "log.jsonl")
    assert [row["lr"] for row in rows] == pytest.approx([0.05, 0.025])


def test_options_of_the_optimizer_may_change_and_the_optimizer_may_not(
    trainer_for: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_for(epochs=1, sched="none", warmup_epochs=0)
    trainer.run()
    resume = ["--resume", str(trainer.folder), "--epochs", "2"]
    changed = ["--weight-decay", "0.25", "--momentum", "0.5", "--lr", "0.125"]
    assert train([*resume, *changed]) == 0
    groups = state_of(trainer.folder)["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    assert {(group["momentum"], group["lr"]) for group in groups} == {(0.5, 0.125)}
    before = left_by(trainer.folder)
    capsys.readouterr()
    assert train([*resume, "--epochs", "3", "--opt", "lamb"]) == 2
    assert "was trained with --opt sgd, whose state lamb cannot take" in capsys.readouterr().err
    assert train([*resume, "--epochs", "3", "--lr-base", "0.5", "--lr-base-size", "8"]) == 0
    assert state_of(trainer.folder)["optimizer"]["param_groups"][0]["lr"] == 0.5
    assert left_by(trainer.folder) != before


def test_workers_of_validation_ignore_signals(trainer_for: MakeTrainer) -> None:
    """Slurm signals them too, and torch would end the run when they die."""
    trainer = trainer_for(workers=1, validation_batch_size=1)
    batches = iter(trainer.val_loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGTERM)
    time.sleep(0.5)
    assert len(list(batches)) == 9


def test_resume_takes_the_folder_of_data_that_it_is_given(
    trainer_for: MakeTrainer, images: Path, tmp_path: Path
) -> None:
    trainer = trainer_for(epochs=1)
    trainer.run()
    moved = tmp_path / "moved"
    moved.symlink_to(images)
    assert train([str(moved), "--resume", str(trainer.folder), "--epochs", "2"]) == 0
    assert f"data_dir: {moved}\n" in (trainer.folder / "config.yaml").read_text()
