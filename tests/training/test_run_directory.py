"""What a run leaves in its folder, and that timm reads it."""

import csv
import importlib
import json
import math
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from interpreters import Interpreter
from safetensors import safe_open
from tiers import mostly_slow
from timm.data import resolve_model_data_config
from torch import nn
from training_testing import SMALL_MODEL, TRAIN, VALIDATE, files_in, state_of

import emax_timm
from emax_timm.files import replace_file
from emax_timm.training import TrainConfig, UsageError, train
from emax_timm.training.build import build_trainer
from emax_timm.training.checkpoint import (
    Checkpoint,
    checkpoints,
    load_checkpoint,
    load_weights,
    read_weights,
    save_best,
    save_checkpoint,
)
from emax_timm.training.commands import validate_with
from emax_timm.training.config import from_mapping, read_yaml
from emax_timm.training.distributed import DistributedContext
from emax_timm.training.journal import RunLog, read_rows
from emax_timm.training.trainer import Trainer

CPU = DistributedContext(torch.device("cpu"))
FILES = {
    *("config.yaml", "config.json", "log.csv", "log.jsonl", "layers.jsonl", "summary.json"),
    *("model.safetensors", "SHA256SUMS", "last.safetensors", "curves.png", ".lock"),
}

RunOf = Callable[..., Trainer]


@pytest.fixture
def run_of(images: Path, tmp_path: Path) -> RunOf:
    """Trains for an epoch, into `tmp_path/run`."""

    def run_of(**options: Any) -> Trainer:
        settings: dict[str, Any] = {
            **{"data_dir": str(images), "output": str(tmp_path), "experiment": "run"},
            **{"model": "resnet10t_emax", "model_kwargs": {"channels": [8, 8, 8, 8]}},
            **{"img_size": 32, "batch_size": 8, "workers": 0, "epochs": 1, "warmup_epochs": 0},
            **{"lr": 0.05, **options},
        }
        trainer = build_trainer(TrainConfig(**settings), CPU)
        assert not trainer.folder.exists()
        trainer.run()
        return trainer

    return run_of


def test_run_directory_holds_its_files_and_nothing_else(run_of: RunOf) -> None:
    checkpoint = {"model.safetensors", "averaged.safetensors", "state.pt", "SHA256SUMS"}
    names = [f"epoch-000{epoch}-step-000000{4 * epoch}" for epoch in (3, 4)]
    expected = {f"checkpoints/{name}/{file}" for name in names for file in checkpoint}
    folder = run_of(epochs=4, model_ema=True, checkpoint_hist=2).folder
    assert files_in(folder) == FILES | expected


def test_run_directory_has_the_resolved_config(run_of: RunOf, images: Path) -> None:
    trainer = run_of(lr=None, batch_size=16)
    path = trainer.folder / "config.yaml"
    config = from_mapping(TrainConfig, read_yaml(path), str(path))
    assert config == trainer.config
    assert (config.data, config.data_dir) == (None, str(images))
    assert (config.input_size, config.num_classes) == ([3, 32, 32], 2)
    assert config.lr == pytest.approx(0.1 * 16 / 256)
    # Those of timm's resnet10t.
    assert (config.crop_pct, config.interpolation) == (0.875, "bicubic")


def test_run_directory_has_the_same_rows_in_both_logs(run_of: RunOf) -> None:
    folder = run_of(epochs=3, val_interval=2).folder
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    with (folder / "log.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    columns = ["epoch", "step", "lr", "train_loss", "broken", "val_loss", "val_top1", "val_top5"]
    columns += ["seconds", "images_per_second", "data_wait"]
    assert [list(row) for row in (*rows, *table)] == [columns] * 6
    assert [row["val_top1"] is None for row in rows] == [True, False, False]
    for row, line in zip(rows, table, strict=True):
        values = [None if line[column] == "" else float(line[column]) for column in columns]
        assert values == [row[column] for column in columns]


def test_log_of_a_resumed_run_has_the_rows_before_it(tmp_path: Path) -> None:
    rows = [{"epoch": epoch, "loss": epoch / 2} for epoch in range(3)]
    values = {"gamma": math.nan, "group_counts": [1], "histogram": [1]}
    layers = [{"epoch": epoch, "layer": values} for epoch in range(3)]

    def open_log(epochs: int) -> RunLog:
        past = rows[:epochs], layers[:epochs]
        return RunLog(tmp_path, ["epoch", "loss"], *past, track=lambda *_: None)

    log = open_log(0)
    for row, layer in zip(rows, layers, strict=True):
        log.write(row, layer)
    names = ("log.csv", "log.jsonl", "layers.jsonl")
    whole = [(tmp_path / name).read_bytes() for name in names]
    assert b"NaN" not in whole[2]
    for name in names:
        with (tmp_path / name).open("a") as file:
            file.write('{"epoch": 3, "lo')  # killed while it wrote
    assert read_rows(tmp_path / "log.jsonl") == rows
    log = open_log(2)
    with (tmp_path / "log.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [["epoch", "loss"], ["0", "0.0"], ["1", "0.5"]]
    log.write(rows[2], layers[2])
    assert whole == [(tmp_path / name).read_bytes() for name in names]


def test_run_directory_has_a_summary(run_of: RunOf) -> None:
    trainer = run_of(epochs=2, test_split="validation")
    summary = json.loads((trainer.folder / "summary.json").read_text())
    assert summary["model"] == "resnet10t_emax"
    assert summary["parameters"] == sum(p.numel() for p in trainer.model.parameters())
    assert summary["epochs"] == 2
    assert summary["best_epoch"] in (1, 2)
    assert summary["seconds"] > 0
    # The test split is the validation split here.
    assert summary["test"] == summary["validation"]
    assert summary["test"].keys() == {"loss", "top1", "top5"}


@pytest.mark.slow
def test_run_ends_with_its_summary_line(run_of: RunOf, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = run_of(epochs=2, test_split="validation")
    *lines, line = capsys.readouterr().out.splitlines()  # the first say what is in the splits
    assert [text.split()[1] for text in lines if text.startswith("epoch ")] == ["1/2", "2/2"]
    assert line.startswith(str(trainer.folder / "model.safetensors"))
    assert "  validation (epoch " in line
    assert "  test top1: " in line


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_run_directory_follows_the_umask(run_of: RunOf, umask: int) -> None:
    before = os.umask(umask)
    try:
        folder = run_of().folder
        assert os.umask(umask) == umask  # reading it must not have changed it
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    folders = {path.name for path in folder.rglob("*") if path.is_dir()}
    assert len(folders) == 2
    for name, mode in modes.items():
        assert mode == (0o777 if name in folders else 0o666) & ~umask, name


def test_checkpoint_is_plain_data(run_of: RunOf) -> None:
    trainer = run_of(model_ema=True)
    state = state_of(trainer.folder)
    assert (state["epoch"], state["step"]) == (1, 4)
    with safe_open(trainer.folder / "last.safetensors", "pt") as file:
        assert set(file.keys()) == set(trainer.model.state_dict())
        assert file.metadata() == {"format": "pt"}


def test_sha256sum_confirms_what_a_run_leaves(run_of: RunOf) -> None:
    folder = run_of(model_ema=True, epochs=2).folder
    for sums in folder.rglob("SHA256SUMS"):
        command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
        done = subprocess.run(command, cwd=sums.parent, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        listed = {line.split(": ")[0] for line in done.stdout.splitlines()}
        decides = {"model.safetensors", "averaged.safetensors", "state.pt", "config.json"}
        assert listed == decides & {path.name for path in sums.parent.iterdir()}


MODELS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "averaged": {"model_ema": True, "model_ema_decay": 0.5},
    "one channel": {"img_size": None, "input_size": [1, 32, 32], "mean": [0.3], "std": [0.4]},
    "max pooling": {"gp": "max"},
    "dropout": {"drop": 0.5, "drop_path": 0.5},
    "attention": {
        "model_kwargs": {
            "channels": [8, 8, 8, 8],
            "attn_stages": [1, 3],
            "attn_kwargs": {"factor": 4, "global_gate": False},
        }
    },
    "plain": {"model": "resnet10t"},
    "tag": {"model": "resnet18.a1_in1k", "model_kwargs": {}},
    "batch norm": {"model": "mobilenetv3_small_050", "model_kwargs": {}, "bn_eps": 0.1},
}


@pytest.mark.parametrize("name", mostly_slow(MODELS, 0, 5))
def test_run_directory_is_a_timm_model(run_of: RunOf, name: str) -> None:
    trainer = run_of(**MODELS[name])
    trained: nn.Module = trainer.model if trainer.averaged is None else trainer.averaged.module
    config = trainer.config
    model: Any = timm.create_model(f"local-dir:{trainer.folder}", pretrained=True)
    assert type(model) is type(trained)
    assert config.input_size is not None
    images = torch.randn(4, *config.input_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(images), trained.eval()(images))
    found = resolve_model_data_config(model)
    for key in ("input_size", "mean", "std", "interpolation", "crop_pct"):
        value = found[key]
        assert (list(value) if isinstance(value, tuple) else value) == getattr(config, key), key
    assert model.num_classes == 2
    description = json.loads((trainer.folder / "config.json").read_text())
    assert description["label_names"] == ["cat", "dog"]
    features = timm.create_model(f"local-dir:{trainer.folder}", pretrained=True, features_only=True)
    assert len(features(images)) > 1


# What timm registers for these models, for other inputs, classes and weights than a run's.
REGISTERED = {
    "test size": {"model": "resnet10t_emax"},
    "test size of a baseline": {"model": "resnet10t"},
    "convnext": {"model": "test_convnext_emax", "model_kwargs": {}},
    "weights of the package": {"model": "test_resnet_emax.fashion_mnist", "model_kwargs": {}},
    "stride": {"model": "test_resnet_emax", "model_kwargs": {"output_stride": 8}},
    "one channel": {"input_size": [1, 48, 32], "img_size": None, "mean": [0.3], "std": [0.4]},
    "preprocessing": {"crop_pct": 0.7, "crop_mode": "squash", "interpolation": "lanczos"},
}


@pytest.mark.parametrize("name", mostly_slow(REGISTERED, 0))
def test_config_of_a_run_has_its_own_values_and_none_of_the_registered_weights(
    run_of: RunOf, name: str
) -> None:
    trainer = run_of(**REGISTERED[name])
    model: Any = timm.create_model(f"local-dir:{trainer.folder}", pretrained=True).eval()
    cfg, config = dict(model.pretrained_cfg), trainer.config
    for about_where in ("file", "source"):
        cfg.pop(about_where, None)
    assert config.input_size is not None
    with torch.no_grad():
        maps = model.forward_features(torch.zeros(1, *config.input_size))
    names = dict(model.named_modules())
    assert tuple(names[cfg.pop("first_conv")].weight.shape[1:2]) == (config.input_size[0],)
    assert names[cfg.pop("classifier")].out_features == 2
    assert tuple(cfg.pop("pool_size")) == tuple(maps.shape[-2:])
    expected = {
        **{key: getattr(config, key) for key in ("mean", "std", "interpolation", "crop_pct")},
        **{"input_size": config.input_size, "num_classes": 2, "label_names": ["cat", "dog"]},
        **{"crop_mode": trainer.data_config["crop_mode"], "fixed_input_size": False},
        **{"custom_load": False, "architecture": config.model.partition(".")[0]},
    }
    assert {k: list(v) if isinstance(v, tuple) else v for k, v in cfg.items()} == expected
    # Nothing else is recommended for testing, and the sizes are those of the run.
    assert resolve_model_data_config(model, use_test_size=True) == resolve_model_data_config(model)


@pytest.mark.slow
def test_run_directory_is_read_by_transformers(run_of: RunOf) -> None:
    transformers = importlib.import_module("transformers")
    folder = str(run_of().folder)
    classifier = transformers.AutoModelForImageClassification.from_pretrained(folder)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(classifier(images).logits, model(images))
    assert list(classifier.config.id2label.values()) == ["cat", "dog"]


@pytest.mark.parametrize("name", mostly_slow(MODELS, 0, len(MODELS) - 1))
def test_validation_of_a_run_gives_its_metrics(run_of: RunOf, name: str) -> None:
    folder = run_of(**MODELS[name]).folder
    expected = json.loads((folder / "summary.json").read_text())["validation"]
    metrics = validate_with({"checkpoint": str(folder / "model.safetensors")}, CPU)
    assert metrics._asdict() == expected


@pytest.mark.slow
def test_run_of_a_config_that_was_saved_is_the_same_run(
    run_of: RunOf, programs: Interpreter, tmp_path: Path
) -> None:
    first = run_of().folder
    arguments = ["-c", first / "config.yaml", "--experiment", "again"]
    result = programs.run(TRAIN, *arguments, cwd=tmp_path)
    assert result.status == 0, result.stderr
    name = "model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes()


def saved_config(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "config.yaml").read_text())


@pytest.mark.parametrize(
    ("key", "value", "flag", "found"),
    mostly_slow(
        [
            ("data_dir", "/nowhere", "{images}", {"data_dir": "{images}"}),
            ("data_dir", "/nowhere", "--data-dir {images}", {"data_dir": "{images}"}),
            ("data", "/nowhere", "--data-dir {images}", {"data_dir": "{images}"}),
            ("input_size", [3, 48, 48], "--img-size 32", {"input_size": [3, 32, 32]}),
            ("img_size", 48, "--input-size 3 32 32", {"input_size": [3, 32, 32]}),
            ("lr", 0.5, "--lr 0.01", {"lr": 0.01}),
        ],
        *(2, 3),
    ),
)
def test_flag_wins_over_the_file_in_what_is_done(
    images: Path, tmp_path: Path, key: str, value: Any, flag: str, found: dict[str, Any]
) -> None:
    (tmp_path / "my.yaml").write_text(f"{key}: {value}\n")
    data = [] if "data" in key else [str(images)]
    size = [] if "size" in key else ["--img-size", "32"]
    arguments = [*data, *SMALL_MODEL, *size, "-b", "8", "-j", "0", "--epochs", "1"]
    arguments += ["-c", str(tmp_path / "my.yaml"), *flag.format(images=images).split()]
    assert train([*arguments, "--output", str(tmp_path), "--experiment", "run"]) == 0
    config = saved_config(tmp_path / "run")
    for name, expected in found.items():
        wanted = expected.format(images=images) if isinstance(expected, str) else expected
        assert config[name] == wanted


@pytest.mark.slow
def test_folder_given_beside_the_sample_is_not_passed_over(
    programs: Interpreter, images: Path, tmp_path: Path
) -> None:
    # The sample's splits are not in the folder: whether the folder wins or the two are refused
    # together, there is nothing to train on or to validate.
    options = ["-c", "quickstart", "--epochs", "1", "--val-fraction", "0.98", "--test-split", ""]
    result = programs.run(TRAIN, images, *options, cwd=tmp_path)
    assert result.status == 2
    assert not any(tmp_path.iterdir())
    result = programs.run(TRAIN, *options, "-b", "8", "--output", tmp_path, cwd=tmp_path)
    assert result.status == 0, result.stderr
    weights = tmp_path / "quickstart" / "model.safetensors"
    result = programs.run(VALIDATE, images, "--checkpoint", weights, cwd=tmp_path)
    assert result.status == 2


def test_replace_file_keeps_the_old_file_if_the_writer_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail_halfway(temporary: Path) -> None:
        assert temporary.parent == tmp_path  # else the rename would be a copy
        assert temporary != path
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(path, fail_halfway)
    assert files_in(tmp_path) == {"file"}
    assert path.read_text() == "old"


def test_replace_file_keeps_the_old_file_if_the_writer_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FileNotFoundError):
        replace_file(path, lambda _: None)
    assert files_in(tmp_path) == {"file"}
    assert path.read_text() == "old"


def test_replace_file_replaces_only_when_complete(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        seen.append(path.read_text())

    replace_file(path, write)
    assert (seen, path.read_text()) == (["old"], "new")
    assert files_in(tmp_path) == {"file"}
    (tmp_path / "file.partial").write_text("left by a run that was killed")
    replace_file(path, write)
    assert files_in(tmp_path) == {"file"}


def test_weights_survive_any_memory_format(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    save_best(model, tmp_path)
    other = nn.Conv2d(3, 4, 3)
    load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(other.weight, model.weight)


@pytest.mark.parametrize(
    ("other", "hint"),
    [
        (nn.Linear(3, 2, bias=False), "it has bias, which the model lacks"),
        (nn.Sequential(nn.Linear(3, 2)), "it lacks 0.bias and 1 more keys"),
        (nn.Linear(4, 2), r"weight is \[2, 3\], in the model \[2, 4\]"),
    ],
)
def test_load_weights_names_what_does_not_fit(tmp_path: Path, other: nn.Module, hint: str) -> None:
    save_best(nn.Linear(3, 2), tmp_path)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    with pytest.raises(UsageError, match=hint):
        load_weights(other, tmp_path / "model.safetensors")
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_checkpoint_is_read_back(tmp_path: Path) -> None:
    saved = checkpoint_at(2)
    save_checkpoint(tmp_path, saved, keep=3)
    found = load_checkpoint(tmp_path, CPU)
    assert torch.equal(found.model["w"], saved.model["w"])
    assert (found.averaged, found.state) == (None, saved.state)
    with pytest.raises(UsageError, match="other has no checkpoint"):
        load_checkpoint(tmp_path / "other", CPU)


def test_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, checkpoint_at(step), keep=2)
        assert load_checkpoint(tmp_path, CPU).state["step"] == step
        assert (tmp_path / "last.safetensors").resolve().parent == checkpoints(tmp_path)[0]
    kept = [path.name for path in checkpoints(tmp_path)]
    assert kept == ["epoch-0000-step-00000005", "epoch-0000-step-00000004"]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_newest_checkpoint_is_that_of_the_last_place_or_the_last_written(tmp_path: Path) -> None:
    # The fourth epoch continues on twice the ranks, with half the steps.
    for epoch, step in ((3, 300), (3, 170), (9_999, 500), (10_000, 500)):
        save_checkpoint(tmp_path, checkpoint_at(step, epoch), keep=1)
        (path,) = checkpoints(tmp_path)
        assert path.name == f"epoch-{epoch:04}-step-{step:08}"
        assert load_checkpoint(tmp_path, CPU).state["step"] == step


def test_damaged_checkpoint_does_not_crowd_out_a_new_one(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint_at(1), keep=2)
    save_checkpoint(tmp_path, checkpoint_at(3), keep=2)
    (checkpoints(tmp_path)[0] / "state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, checkpoint_at(2), keep=2)  # it went on from step 1
    assert [int(path.name[-8:]) for path in checkpoints(tmp_path)] == [2, 1]


def test_checkpoint_of_the_same_step_is_written_if_the_one_there_is_damaged(tmp_path: Path) -> None:
    for spoil in (lambda path: None, lambda path: path.write_bytes(b"")):
        save_checkpoint(tmp_path, checkpoint_at(1), keep=1)
        spoil(checkpoints(tmp_path)[0] / "state.pt")
        save_checkpoint(tmp_path, checkpoint_at(1), keep=1)
        assert load_checkpoint(tmp_path, CPU).state["step"] == 1


def checkpoint_at(step: int, epoch: int = 0) -> Checkpoint:
    state = {"epoch": epoch, "step": step, "best": (1.0, 2.0, 3.0), "none": None}
    return Checkpoint({"w": torch.full((2,), float(step))}, None, state)


def test_best_weights_have_a_sum_at_every_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [nn.Linear(3, 2) for _ in range(3)]
    save_best(models[0], tmp_path)
    best, seen = tmp_path / "model.safetensors", []
    replace = Path.replace

    def spy(self: Path, target: Path) -> Path:
        for moment in ("before", "after"):
            result = replace(self, target) if moment == "after" else target
            tensors = read_weights(best)  # refused if its sum is not there
            seen.append(torch.equal(tensors["weight"], models[1].weight))
        return result

    monkeypatch.setattr(Path, "replace", spy)
    save_best(models[1], tmp_path)
    assert seen == [False, False, False, True, True, True]
    best.write_bytes(b"0" + best.read_bytes()[1:])
    with pytest.raises(UsageError, match="is damaged: its sha256"):
        read_weights(best)


def test_package_of_the_tests_is_the_checkout() -> None:
    # Else these tests would pass or fail for another copy.
    from interpreters import ROOT

    assert Path(emax_timm.__file__).parents[1] == ROOT
