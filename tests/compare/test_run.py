"""One run of a study: paired with the others of its seed, and the same as train.py alone."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreters import ENVIRONMENT
from study_testing import made, study_on, trainer_of, write_jobs, write_study
from tiers import mostly_slow
from training_testing import SMALL_MODEL, only_line, rows_without_seconds

from emax_timm.compare.outcome import _unaugmented, outcomes, slices_of
from emax_timm.compare.run import PARENT, RESULT, start_from
from emax_timm.compare.study import read_study
from emax_timm.training import train

BACKBONES = {
    "resnet": {"model": "resnet10t", "model_kwargs": {"channels": [8, 8, 8, 8]}},
    "convnext": {"model": "test_convnext"},
    "efficientnet": {"model": "test_efficientnet"},
}


@pytest.mark.parametrize("backbone", mostly_slow(BACKBONES, 0))
def test_runs_of_a_seed_have_the_same_backbone_and_the_same_batches(
    backbone: str, images: Path, tmp_path: Path
) -> None:
    def change(study: dict[str, Any]) -> None:
        study["backbones"]["tiny"] = BACKBONES[backbone]
        study["methods"]["ema"] = {"attention": "ema"}

    study = study_on(images, tmp_path, change)
    trainers = {m: trainer_of(study, m, 1, tmp_path) for m in ("none", "se", "ema", "emax")}
    plain = trainers["none"].model.state_dict()
    batches = list(trainers["none"].train_loader)
    for method in ("se", "ema", "emax"):
        state = trainers[method].model.state_dict()
        assert plain.keys() < state.keys()
        assert all(torch.equal(plain[key], state[key]) for key in plain)
        for (x, y), (other_x, other_y) in zip(batches, trainers[method].train_loader, strict=True):
            assert torch.equal(x, other_x)
            assert torch.equal(y, other_y)
    other_seed = trainer_of(study, "none", 2, tmp_path).model.state_dict()
    assert not all(torch.equal(plain[key], other_seed[key]) for key in plain)


def test_run_is_bitwise_that_of_train_py(images: Path, tmp_path: Path) -> None:
    study = study_on(images, tmp_path)
    result = made(study, "emax", 3, tmp_path / "seed-3")
    settings = {
        "model": "with_attention",
        "base_model": "resnet10t",
        "attention": "emax",
        "where": "block",
    }
    kwargs = [f"{key}='{settings[key]}'" for key in ("base_model", "attention", "where")]
    kwargs += ["attn_kwargs={'gate_init': 1.0}", SMALL_MODEL[-1]]
    options = "-b 8 -j 0 --epochs 2 --warmup-epochs 0 --opt adamw --lr 0.003 --img-size 32"
    options += f" --seed 3 --no-amp --device cpu --output {tmp_path} --experiment alone"
    splits = ["--val-split", "", "--test-split", "validation"]
    command = [str(images), "--model", "with_attention", *options.split(), *splits]
    assert train([*command, "--model-kwargs", *kwargs]) == 0
    alone = json.loads((tmp_path / "alone" / "summary.json").read_text())
    assert result["test"] == alone["test"]
    assert result["parameters"] == alone["parameters"]
    weights = [tmp_path / name / "model.safetensors" for name in ("alone", "seed-3")]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}) == 1
    logs = [rows_without_seconds(tmp_path / name / "log.jsonl") for name in ("alone", "seed-3")]
    assert logs[0] == logs[1]
    assert not (tmp_path / "seed-3" / "checkpoints").exists()


def test_run_ends_with_the_process_that_has_started_it(images: Path, tmp_path: Path) -> None:
    """Also if that one was killed while this one was still importing torch."""
    jobs = write_jobs(study_on(images, tmp_path), [("none", 0)], tmp_path, ["run"])
    command = [sys.executable, "-m", "emax_timm.compare.run", *map(str, jobs)]
    environment = {**ENVIRONMENT, PARENT: str(os.getpid() + 1)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "the process that has started this one has ended" in only_line(done.stderr)
    assert not list(tmp_path.rglob(RESULT))


@pytest.mark.parametrize(("option", "count"), [("val_fraction", 24), ("train_num_samples", 16)])
def test_training_accuracy_is_of_the_images_trained_on(
    option: str, count: int, images: Path, tmp_path: Path
) -> None:
    value = {"val_fraction": 0.25, "train_num_samples": 16}[option]
    trainer = trainer_of(study_on(images, tmp_path, **{option: value}), "none", 0, tmp_path)
    loader = _unaugmented(trainer.config, trainer.data_config, 1000, trainer.context)
    trained: Any = trainer.train_loader.dataset.dataset
    assert sorted(loader.dataset.dataset.indices) == sorted(trained.indices)
    assert len(loader.dataset) == count


def test_run_that_diverges_is_a_result_with_its_name(images: Path, tmp_path: Path) -> None:
    study = study_on(images, tmp_path, lr=1e30, opt="sgd")
    result = made(study, "none", 0, tmp_path / "seed-0")
    assert "the loss or a gradient is not finite at " in result["diverged"]
    assert 0 <= result["test"]["top1"] <= 100
    assert result["epochs"] < 2
    assert result["processor_seconds"] > 0


def test_parameters_start_from_constants(images: Path, tmp_path: Path) -> None:
    trainer = trainer_of(study_on(images, tmp_path), "emax", 0, tmp_path)
    start_from(trainer, {"conv3x3.bias": 0.5, "global_attn.3.bias": -1.0})
    values = dict(trainer.model.named_parameters())
    found = {value: [n for n, p in values.items() if (p == value).all()] for value in (0.5, -1.0)}
    assert len(found[0.5]) == len(found[-1.0]) == 4
    assert all(name.endswith(".conv3x3.bias") for name in found[0.5])
    with pytest.raises(Exception, match="name ends with x"):
        start_from(trainer, {"x.bias": 0.0})


@pytest.mark.slow
def test_accuracy_by_slice_adds_up(tmp_path: Path) -> None:
    def change(study: dict[str, Any]) -> None:
        study["recipe"].pop("img_size")

    study = read_study(
        str(
            write_study(
                tmp_path,
                change,
                dataset="scenes/sample_48",
                input_size=[1, 48, 48],
                mean=[0.25],
                std=[0.3],
                no_aug=True,
                test_split="test",
                validation_batch_size=500,
            )
        )
    )
    trainer = trainer_of(study, "none", 0, tmp_path)
    slices = slices_of(trainer.test_loader.dataset)
    metrics, right = outcomes(trainer, trainer.test_loader)
    assert metrics["top1"] == pytest.approx(100 * right.double().mean().item())
    hits = [right[torch.from_numpy(indices)].sum().item() for indices in slices.values()]
    assert sum(hits) == right.sum().item()
    # Each image's outcome is in its own place.
    model = trainer.model.eval()
    images, labels = next(iter(trainer.test_loader))
    with torch.inference_mode():
        assert torch.equal(model(images).argmax(1) == labels, right[:500])
