"""A run is a model, by whatever name it is given."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from run_commands import COMMANDS, command
from tiers import mostly_slow
from training_testing import files_in, newest_checkpoint, only_line, sum_up

from emax_cli import main
from emax_timm.training import UsageError
from emax_timm.training.loading import load_model
from emax_timm.training.sources import find_source, run_folder, weights_file

Names = Callable[[Path], "str | Path"]

# What a user may type for a run, and the weights that it means.
BEST: dict[str, Names] = {
    "folder": lambda run: run,
    "timm's name": lambda run: f"local-dir:{run}",
    "best weights": lambda run: run / "model.safetensors",
}
NEWEST: dict[str, Names] = {
    "last weights": lambda run: run / "last.safetensors",
    "checkpoint": newest_checkpoint,
    "weights of a checkpoint": lambda run: newest_checkpoint(run) / "model.safetensors",
}


def logits(model: torch.nn.Module) -> torch.Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


@pytest.mark.parametrize("name", [*BEST, *NEWEST])
def test_run_is_the_model_that_its_name_means(name: str, trained: Path) -> None:
    model = load_model(str({**BEST, **NEWEST}[name](trained)), pretrained=True)
    expected = timm.create_model(f"local-dir:{trained}", pretrained=True)
    if name in NEWEST:
        file = newest_checkpoint(trained) / "model.safetensors"
        timm.models.load_checkpoint(expected, str(file))
    assert torch.equal(logits(model), logits(expected))
    assert model.pretrained_cfg["label_names"] == ["cat", "dog"]


def test_names_are_relative_to_where_the_user_is(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(newest_checkpoint(trained))
    assert find_source("model.safetensors").folder == trained
    monkeypatch.chdir(trained)
    assert find_source(".").model == "local-dir:."
    assert find_source("last.safetensors").folder == Path()
    monkeypatch.chdir(trained.parent)
    assert find_source("run").model == "local-dir:run"
    assert run_folder("run/checkpoints/../config.yaml") == Path("run/checkpoints/..")


def test_model_of_timm_goes_before_a_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "resnet18").mkdir()
    (tmp_path / "resnet18" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_source("resnet18").folder is None
    assert find_source("./resnet18").folder == Path("resnet18")
    for name in ("resnet18.a1_in1k", "hf-hub:me/run", "test_resnet_emax.fashion_mnist"):
        assert find_source(name) == (name, None, None)


WRONG = [
    ("resnet18_emx", "unknown model resnet18_emx; the nearest is resnet18_emax"),
    ("RUNS/rum", "there is no file or folder RUNS/rum; the nearest run is RUNS/run"),
    ("local-dir:RUNS/rum", "there is no file or folder RUNS/rum; the nearest run is RUNS/run"),
    ("RUNS", "RUNS is no run directory: it has no config.json; the nearest run is RUNS/run"),
    ("RUNS/run/log.csv", "log.csv: weights are read from .safetensors files only"),
    ("RUNS/lone.safetensors", "no config.json beside RUNS/lone.safetensors: name the model with"),
]


@pytest.mark.parametrize(("name", "message"), WRONG)
def test_wrong_name_says_what_would_be_right(name: str, message: str, run: Path) -> None:
    runs = str(run.parent)
    (run.parent / "lone.safetensors").write_bytes(b"")
    with pytest.raises(UsageError) as error:
        find_source(name.replace("RUNS", runs))
    assert message.replace("RUNS", runs) in str(error.value)


def test_run_without_best_weights_names_its_checkpoint(run: Path) -> None:
    (run / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="its newest checkpoint is") as error:
        load_model(str(run), pretrained=True)
    assert str(newest_checkpoint(run)) in str(error.value)
    with pytest.raises(UsageError, match="there is no file or folder"):
        weights_file(str(run / "nothing"))


@pytest.mark.parametrize("name", mostly_slow(COMMANDS, 0, 1, 2))
def test_command_takes_the_folder_of_a_run(name: str, run: Path, images: Path) -> None:
    assert main(command(name, run, images, run.parent)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predict", "validate", "export", "visualize", "train from"])
@pytest.mark.parametrize("how", [*BEST, *NEWEST])
def test_command_takes_every_name_of_a_run(
    name: str, how: str, run: Path, images: Path, tmp_path: Path
) -> None:
    named = {**BEST, **NEWEST}[how](run)
    assert main(command(name, named, images, tmp_path)) == 0


def test_validation_of_a_run_by_its_folder_gives_its_figures(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((trained / "summary.json").read_text())["validation"]
    assert main(["validate", "--model", str(trained), "-j", "0"]) == 0
    line = f"top1: {summary['top1']:.3f} top5: {summary['top5']:.3f}"
    assert capsys.readouterr().out.splitlines() == [line]


def test_run_is_not_resumed_from_an_older_checkpoint(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    oldest = min((run / "checkpoints").glob("epoch-*"))
    assert oldest != newest_checkpoint(run)
    assert main(["train", "--resume", str(oldest)]) == 2
    assert "continues from its newest checkpoint" in only_line(capsys.readouterr().err)


def test_model_to_train_is_not_a_file_of_weights(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--model", str(trained / "last.safetensors")]) == 2
    assert "--initial-checkpoint" in only_line(capsys.readouterr().err)


# One value of a config.json changed: each of them changes what the model computes or says.
CHANGES = {
    "mean": ('"mean": [\n      0.', '"mean": [\n      1.'),
    "label": ('"cat"', '"cow"'),
    "architecture": ('"test_resnet_emax"', '"test_resnet_ema"'),
    "model_args": ('"in_chans"', '"drop_rate": 0.5, "in_chans"'),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    "name",
    mostly_slow(["predict", "validate", "export", "visualize", "publish", "verify"], 0, 1, 4),
)
def test_changed_config_is_refused_like_damaged_weights(
    name: str, change: str, run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "config.json"
    old, new = CHANGES[change]
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    before = files_in(run.parent) - {"run/.lock"}
    assert main(command(name, run, images, run.parent)) == 2
    out, err = capsys.readouterr()
    assert f"{path} is damaged: its sha256 is not the one in" in only_line(err)
    assert out == ""
    assert files_in(run.parent) - {"run/.lock"} == before


def test_changed_config_is_refused_by_timm_too(run: Path) -> None:
    path = run / "config.json"
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    for pretrained in (True, False):
        with pytest.raises(RuntimeError, match=r"config\.json is damaged: its sha256"):
            timm.create_model(f"local-dir:{run}", pretrained=pretrained)


def test_config_that_was_edited_on_purpose_loads_as_the_message_says(run: Path) -> None:
    path, sums = run / "config.json", run / "SHA256SUMS"
    path.write_text(path.read_text().replace('"cat"', '"cow"'))
    with pytest.raises(UsageError, match=r"remove the line of config\.json from SHA256SUMS"):
        load_model(str(run), pretrained=True)
    lines = sums.read_text().splitlines(keepends=True)
    sums.write_text("".join(line for line in lines if "config.json" not in line))
    # So are the sums of runs that were made before config.json had one.
    assert load_model(str(run), pretrained=True).pretrained_cfg["label_names"] == ["cow", "dog"]
    sums.unlink()  # as in a folder that timm has written
    assert load_model(str(run), pretrained=True).pretrained_cfg["label_names"] == ["cow", "dog"]
    sum_up(run)
    assert load_model(str(run), pretrained=True).pretrained_cfg["label_names"] == ["cow", "dog"]


def test_copy_of_a_run_is_the_same_model(trained: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(trained, tmp_path / "elsewhere" / "copy")
    model = load_model(str(copy), pretrained=True)
    assert torch.equal(logits(model), logits(load_model(str(trained), pretrained=True)))
