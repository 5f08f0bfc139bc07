"""`emax plan`: its figures against those worked out by hand, its text, what it refuses."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from tiers import mostly_slow

import emax_cli
from emax_timm.benchmark import measure
from emax_timm.training import TrainConfig, UsageError
from emax_timm.training.config import learning_rate
from emax_timm.training.plan import Plan, make_plan, plan, report
from emax_timm.training.speeds import SETTING, TRAINING, measured_speed

# torchvision's and the paper's ResNet-18: its batch norms have 4,800 channels in 20 layers.
PARAMETERS = 11_689_512
BUFFERS = 2 * 4_800 + 20


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return TrainConfig(model="resnet18", batch_size=32, epochs=90, lr=0.1)


@pytest.fixture(scope="module")
def made(config: TrainConfig) -> Plan:
    return make_plan(config, gpus=8, images_per_second=5000.0)


def varied(config: TrainConfig, gpus: int = 1, images: int = 10_000, **options: Any) -> Plan:
    """A plan on images of 32 pixels, which are quick."""
    return make_plan(dataclasses.replace(config, img_size=32, **options), gpus, images)


def test_plan_counts_the_model_as_the_table_does(made: Plan) -> None:
    row = measure("resnet18")
    assert (made.parameters, made.num_classes) == (PARAMETERS, 1000)
    assert made.macs == row.macs == 1_814_073_344
    assert made.activation_bytes == row.activation_bytes
    assert made.batch_bytes == 32 * row.activation_bytes
    assert made.input_size == row.input_size


def test_plan_of_imagenet_by_hand(made: Plan) -> None:
    # 1,281,167 = 5004 * 256 + 143
    assert (made.global_batch, made.steps_per_epoch, made.epochs) == (256, 5004, 90)
    assert made.images_per_epoch == 5004 * 256
    assert made.images == 115_292_160
    assert made.hours == pytest.approx(115_292_160 / 5000 / 3600)
    assert made.weight_bytes == 4 * (PARAMETERS + BUFFERS)
    assert made.gradient_bytes == 2 * 4 * PARAMETERS
    assert made.optimizer_bytes == 4 * PARAMETERS
    assert made.average_bytes == 0
    assert made.fixed_bytes == 16 * PARAMETERS + 4 * BUFFERS


@pytest.mark.parametrize(
    ("opt", "states"), mostly_slow([("sgd", 1), ("adamw", 2), ("lamb", 2), ("rmsprop", 2)], 0, 1)
)
def test_plan_knows_what_the_optimizer_keeps(config: TrainConfig, opt: str, states: int) -> None:
    assert varied(config, opt=opt).optimizer_bytes == states * 4 * PARAMETERS


def test_plan_counts_the_average_and_one_gradient_on_one_gpu(config: TrainConfig) -> None:
    one = varied(config, model_ema=True)
    assert one.average_bytes == one.weight_bytes
    assert one.gradient_bytes == 4 * PARAMETERS


def test_plan_of_accumulation_and_of_images_held_out(config: TrainConfig) -> None:
    # 10,000 - 1,000 = 140 * 64 + 40 images; 140 = 46 * 3 + 2 forward passes
    one = varied(config, 2, val_fraction=0.1, grad_accum_steps=3)
    assert one.images_per_epoch == 140 * 64
    assert (one.steps_per_epoch, one.global_batch) == (47, 192)


@pytest.mark.slow
def test_plan_adds_the_epochs_that_the_schedule_adds(config: TrainConfig) -> None:
    assert varied(config, cooldown_epochs=10).epochs == 100
    assert varied(config, warmup_prefix=True, warmup_epochs=5).epochs == 95


@pytest.mark.slow
def test_plan_takes_size_and_classes_from_the_options(config: TrainConfig) -> None:
    one = varied(config, num_classes=10)
    assert (one.input_size, one.num_classes) == ((3, 32, 32), 10)
    assert one.parameters == PARAMETERS - 990 * 513
    assert one.hours is None


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({"lr": 0.3}, 0.3),
        ({}, 0.1 * 1024 / 256),
        ({"opt": "lamb"}, 0.1 * 2),
        ({"opt": "adamw", "lr_base": 0.001}, 0.001 * 2),
        ({"opt": "adamw", "lr_base_scale": "linear"}, 0.1 * 4),
        ({"grad_accum_steps": 4, "lr_base_scale": "sqrt"}, 0.1 * 4),
        ({"lr_base_size": 512}, 0.1 * 2),
    ],
)
def test_plan_scales_the_learning_rate(options: dict[str, Any], rate: float) -> None:
    assert learning_rate(TrainConfig(batch_size=128, **options), 8) == pytest.approx(rate)


@pytest.mark.slow
def test_plan_leaves_no_model_and_reads_no_weights(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = []
    monkeypatch.setattr(torch.nn.Module, "load_state_dict", lambda *_: allocated.append(1))
    varied(config, model="resnet18_emax", pretrained=True)
    assert not allocated


def test_plan_prints_the_figures(made: Plan) -> None:
    lines = {line.split("  ")[0].strip(): line for line in report(made).splitlines()}
    rows = dict(zip(("steps", "global batch", "hours"), ("450,360", "256", "6.4"), strict=True))
    assert {name: lines[name].split()[len(name.split())] for name in rows} == rows
    assert "8 GPUs x 32 images x 1" in lines["global batch"]
    assert "12.7 TB" in lines["data"]
    assert "estimate" in lines["data"]
    assert lines["images/s"].split()[1:] == ["5,000", "as", "given"]
    assert "To measure" not in report(made)
    assert "To measure the speed" in report(dataclasses.replace(made, hours=None))


@pytest.mark.slow
def test_plan_takes_the_speed_that_was_measured_and_names_the_card(config: TrainConfig) -> None:
    one = dataclasses.replace(config, model="resnet50_emax", img_size=112)
    made = make_plan(one, gpus=2)
    # Four times the speed at 224 pixels, of each of two cards.
    speed, card = TRAINING["resnet50_emax"]
    assert made.images_per_second == pytest.approx(2 * 4 * speed)
    assert made.images_per_second is not None
    assert made.hours == pytest.approx(made.images / made.images_per_second / 3600)
    text = report(made)
    assert f"measured on one {card}, times 2" in text
    assert SETTING in text
    assert "To measure the speed" in text
    assert make_plan(one, 2, images_per_second=100.0).card is None
    other = dataclasses.replace(one, model_kwargs={"attn_kwargs": {"factor": 8}})
    assert make_plan(other, gpus=2).hours is None


def test_speeds_are_of_models_that_there_are() -> None:
    assert set(TRAINING) <= set(timm.list_models())
    assert all(speed.images > 0 for speed in TRAINING.values())
    images, card = TRAINING["resnet50_emax"]
    assert measured_speed("resnet50_emax", 112, 112) == (4 * images, card)
    assert measured_speed("resnet18", 224, 224) is None


@pytest.mark.slow
def test_plan_program_lets_flags_win(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["quickstart", "--gpus", "2", "-b", "32", "--train-images", "4000"]
    assert emax_cli.main(["plan", *arguments]) == 0
    out = capsys.readouterr().out
    # The quickstart holds a tenth out: 3,600 = 56 * 64 + 16
    assert "2 GPUs x 32 images x 1" in out
    assert " 3,584  " in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quickstart"], "--gpus"),
        (["--gpus", "1"], "CONFIG"),
        (["quickstart", "--gpus", "0"], "--gpus must be at least 1, not 0"),
        (["quickstart", "--gpus", "two"], "invalid int value"),
        (["quickstart", "--gpus", "1", "--train-images", "0"], "--train-images must be at least 1"),
        (["quickstart", "--gpus", "1", "--train-images", "63"], "make no batch"),
        (["quickstart", "--gpus", "1", "--images-per-second", "-1"], "must be positive, not -1.0"),
        (["quickstart", "--gpus", "1", "--images-per-second", "nan"], "must be positive, not nan"),
        (["quikstart", "--gpus", "1"], "the nearest recipe is quickstart"),
        (["quickstart", "--gpus", "1", "--epoch", "3"], "the nearest valid one is --epochs"),
        (["quickstart", "--gpus", "1", "--model", "resnet18_emx"], "nearest is resnet18_emax"),
        (["quickstart", "--gpus", "1", "--opt", "lam"], "unknown optimizer lam"),
        (["quickstart", "--gpus", "1", "--model", "hf-hub:timm/resnet18"], "registered model"),
    ],
)
def test_plan_refuses_wrong_input(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan(arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith("emax plan: error: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_plan_refuses_images_too_small_for_the_model(config: TrainConfig) -> None:
    with pytest.raises(UsageError, match="3 x 1 x 1"):
        make_plan(dataclasses.replace(config, model="vgg11", img_size=1), 1)


def test_plan_names_the_file_of_a_wrong_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("epoch: 3\n")
    assert plan([str(path), "--gpus", "1"]) == 2
    assert f"{path}: unknown key epoch; the nearest valid one is epochs" in capsys.readouterr().err
