"""What a run says at its start, held against what then happens in it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiers import mostly_slow
from training_testing import MakeTrainer, image_folder

from emax_timm.training import TrainConfig, UsageError
from emax_timm.training.build import build_trainer
from emax_timm.training.distributed import DistributedContext
from emax_timm.training.notices import notices


class Model:
    feature_info = ({"reduction": 4}, {"reduction": 32})


def said(epochs: int = 300, steps: int = 80, size: int = 64, ranks: int = 1, **options: Any) -> str:
    config = TrainConfig(**{"lr": 0.1, "warmup_epochs": 0, "epochs": epochs, **options})
    model = Model()
    model.feature_info = list(Model.feature_info)  # type: ignore[assignment]
    lines = notices(config, ranks, model, (3, size, size), epochs, steps)
    return "\n".join(lines)


def test_nothing_is_said_of_timms_defaults_with_a_rate() -> None:
    assert said(warmup_epochs=5) == ""


@pytest.mark.parametrize("on_updates", mostly_slow([False, True], 1))
def test_warm_up_that_never_ends_is_said_with_the_highest_rate(
    trainer_for: MakeTrainer, capsys: pytest.CaptureFixture, on_updates: bool
) -> None:
    trainer = trainer_for(warmup_epochs=5, lr=0.5, sched_on_updates=on_updates)
    line = capsys.readouterr().err
    assert "warm-up takes 5 epochs and the run has 2" in line
    rates = []
    step = trainer.train_step
    trainer.train_step = lambda batches: (
        rates.append(trainer.optimizer.param_groups[0]["lr"]),
        step(batches),
    )[1]
    trainer.run()
    assert f"never exceeds {max(rates):.4g} of 0.5; --warmup-epochs 0 would fit" in line
    assert said(epochs=5, warmup_epochs=5).endswith("--warmup-epochs 1 would fit")


def test_warm_up_that_ends_is_not_said() -> None:
    assert said(epochs=6, warmup_epochs=5) == ""
    assert said(epochs=5, warmup_epochs=5, sched="none") == ""
    assert said(epochs=10, warmup_epochs=5, warmup_prefix=True) == ""


def test_derived_rate_is_said_with_what_it_is_made_of() -> None:
    line = said(lr=None, batch_size=64, grad_accum_steps=2, ranks=2)
    assert line.startswith("the learning rate is 0.1: --lr-base 0.1 times 256 / 256, ")
    line = said(lr=None, batch_size=64, opt="adamw")
    assert line.startswith("the learning rate is 0.05: --lr-base 0.1 times the square root of 64 /")
    assert line.endswith("This is far above what adamw is used with; try --lr 0.001")
    assert "far above" not in said(lr=None, opt="sgd")


def test_average_longer_than_the_run_is_said_with_one_that_fits(
    trainer_for: MakeTrainer, capsys: pytest.CaptureFixture
) -> None:
    """The fraction of the start in the average is that of a weight that is 1 at first, then 0."""
    line = said(epochs=4, steps=28, model_ema=True)
    assert "would still be 98% the start at the end" in line
    assert "spans about 5000 steps, the run has 112; --model-ema-decay 0.955 would fit" in line
    for decay, left in ((0.9998, 0.98), (0.955, 0.006)):
        trainer = trainer_for(f"run{decay}", model_ema=True, model_ema_decay=decay)
        weight, average = trainer.model.fc.weight, trainer.averaged.module.fc.weight
        for step in range(112):
            with torch.no_grad():
                weight.fill_(float(step == 0))
            trainer.averaged.follow(step + 1)
        assert average.mean().item() == pytest.approx(left, abs=0.01)


def test_average_that_fits_or_warms_up_is_not_said() -> None:
    assert said(model_ema=True, model_ema_decay=0.955, epochs=4, steps=28) == ""
    assert said(model_ema=True, epochs=300, steps=1251) == ""
    assert said(model_ema=True, model_ema_warmup=True, epochs=1) == ""
    assert "no --model-ema would fit" in said(model_ema=True, epochs=1, steps=5)


def test_rate_that_never_decays_is_said() -> None:
    line = said(sched="step", epochs=30)
    assert "--decay-epochs 90 is not within the run's 30 epochs; --decay-epochs 10 would" in line
    line = said(sched="multistep", epochs=30)
    assert line.endswith("--decay-milestones 10 20 would fit")
    assert said(sched="step", epochs=30, decay_epochs=10.0) == ""
    assert said(sched="multistep", epochs=91) == ""


def test_loss_that_is_not_used_and_images_below_the_stride_are_said() -> None:
    assert "the loss is cross entropy" in said(bce_loss=True, smoothing=0.0)
    assert said(bce_loss=True) == said(bce_loss=True, smoothing=0.0, mixup=0.1) == ""
    assert "31 x 31 pixels are smaller than the stride of resnet50_emax, 32" in said(size=31)
    assert said(size=32) == ""


def build(root: Path, tmp_path: Path, fraction: float, **options: Any) -> Any:
    config = TrainConfig(
        **{"data_dir": str(root), "output": str(tmp_path / "runs"), "experiment": "run"},
        **{"model": "test_resnet_emax", "img_size": 32, "batch_size": 2, "workers": 0},
        **{"val_fraction": fraction, "lr": 0.1, "warmup_epochs": 0, **options},
    )
    return build_trainer(config, DistributedContext(torch.device("cpu")))


def test_classes_that_a_fraction_leaves_out_are_said_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 images of 5 classes: 2 held out leave classes out, 8 take all images of some."""
    names = ["a", "b", "c", "d", "e"]
    root = image_folder(tmp_path / "data", splits=["train"], classes=names, counts=[2])
    trainer = build(root, tmp_path, 0.2)
    labels = {int(label) for _, label in trainer.val_loader.loader.dataset}
    missing = [name for place, name in enumerate(names) if place not in labels]
    assert f"no image of {len(missing)} of 5 classes ({', '.join(missing[:3])}" in (
        capsys.readouterr().err
    )
    monkeypatch.setattr("emax_timm.training.build._create_model", None)  # it is not got to
    with pytest.raises(UsageError, match="leaves no training image of class"):
        build(root, tmp_path, 0.8)


def test_sync_bn_on_cpu_ranks_is_refused(tmp_path: Path) -> None:
    config = TrainConfig(sync_bn=True, model="test_resnet_emax", data_dir=str(tmp_path / "absent"))
    with pytest.raises(UsageError, match="--sync-bn needs GPUs"):
        build_trainer(config, DistributedContext(torch.device("cpu"), size=2))
