"""What the dynamic grouping does in a study's networks: choices, forced counts, gradients."""

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from study_testing import STUDY, made, study_on, trainer_of, write_results_of, write_study
from tiers import mostly_slow
from training_testing import only_line

from emax_timm import EMAX
from emax_timm.compare.command import compare
from emax_timm.compare.gradients import GRADIENTS, choosing_layers, record_gradients
from emax_timm.compare.grouping import force_counts
from emax_timm.compare.outcome import outcomes, slices_of
from emax_timm.compare.results import GROUPING, RESULT
from emax_timm.compare.study import read_study
from emax_timm.training.checkpoint import serialized
from emax_timm.training.journal import read_rows
from emax_timm.training.trainer import Trainer

SCENES: dict[str, Any] = {
    **{"dataset": "scenes/sample_48", "input_size": [1, 48, 48], "mean": [0.25], "std": [0.3]},
    **{"no_aug": True, "test_split": "test", "validation_batch_size": 250},
}


def two_methods(study: dict[str, Any]) -> None:
    study["methods"] = {"none": {}, "emax": {"attention": "emax"}}
    study["references"] = study["primary"]["against"] = ["none"]


def on_scenes(study: dict[str, Any]) -> None:
    two_methods(study)
    study["recipe"].pop("img_size")


def open_up(model: torch.nn.Module) -> None:
    """Give values to what starts at 0: a norm that ends a block lets nothing pass."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter)


def undecided(trainer: Trainer) -> None:
    """Give the model weights with which images choose and are classed differently."""
    open_up(trainer.model)
    images = next(iter(trainer.test_loader))[0]
    for layer in choosing_layers(trainer.model).values():
        controller: Any = layer.group_controller

        def centre(controller: Any, inputs: tuple[torch.Tensor]) -> None:
            logits = inputs[0] @ controller.weight.T
            controller.bias.data.copy_(-logits.mean(0))

        torch.nn.init.normal_(controller.weight, std=100.0)
        handle = controller.register_forward_pre_hook(centre)
        with torch.no_grad():
            trainer.model.eval()(images)
        handle.remove()
    with torch.no_grad():
        trainer.model.get_classifier().bias -= trainer.model(images).mean(0)


@pytest.mark.parametrize("scenes", mostly_slow([False, True], 0))
def test_choices_are_counted_and_accuracy_is_that_of_networks_with_one_count(
    scenes: bool, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a few images, or on all scenes of the sample, which have slices."""
    change = on_scenes if scenes else two_methods
    path = write_study(tmp_path, change, **(SCENES if scenes else {"data_dir": str(images)}))
    study = write_results_of(path, tmp_path / "runs", {("none", 0): 50.0, ("emax", 0): 51.0})
    folder = tmp_path / "runs" / "small" / "tiny" / "emax" / "seed-0"
    trainer = trainer_of(study, "emax", 0, tmp_path)
    undecided(trainer)
    state = trainer.model.state_dict()
    (folder / "model.safetensors").write_bytes(serialized(state))
    options = ["--output", str(tmp_path / "runs"), "--device", "cpu", "--grouping", "emax"]
    assert compare([str(path), *options]) == 0
    printed = capsys.readouterr().out
    found = json.loads((folder / GROUPING).read_text())

    # The choices: from the logits that the controllers give.
    layers = choosing_layers(trainer.model)
    logits: Any = {name: [] for name in layers}
    handles = [
        layer.group_controller.register_forward_hook(  # type: ignore[union-attr]
            lambda _, inputs, output, name=name: logits[name].append(output)
        )
        for name, layer in layers.items()
    ]
    top1, labels = outcomes(trainer, trainer.test_loader)[0]["top1"], []
    for handle in handles:
        handle.remove()
    dataset = trainer.test_loader.dataset
    labels = torch.tensor([dataset[i][1] for i in range(len(dataset))])
    near = len(labels) // 300  # rounding may decide between two counts that are as good
    assert found["top1"]["as trained"] == pytest.approx(top1, abs=100 * near / len(labels))
    assert found["layers"].keys() == layers.keys()
    for name, layer in found["layers"].items():
        assert layer["group_counts"] == [1, 2, 4, 8]
        chosen = torch.cat(logits[name]).argmax(1)
        counts = torch.bincount(chosen, minlength=4)
        assert (counts > 0).sum() > 1
        assert (counts - torch.tensor(layer["chosen"])).abs().max() <= near
        by_class = torch.tensor(list(layer["by_class"].values()))
        assert by_class.sum(1).tolist() == torch.bincount(labels).tolist()
        assert by_class.sum(0).tolist() == layer["chosen"]
        first = torch.bincount(chosen[labels == 0], minlength=4)
        assert (first - by_class[0]).abs().max() <= near
        parts = slices_of(dataset)
        assert layer["by_slice"].keys() == parts.keys()
        assert bool(parts) == scenes
        for part, indices in parts.items():
            own = torch.bincount(chosen[torch.from_numpy(indices)], minlength=4)
            assert (own - torch.tensor(layer["by_slice"][part])).abs().max() <= near

    # The accuracy: of networks that have one candidate alone.
    for count in (1, 8) if scenes else (8,):
        config = trainer.config
        kwargs = {**config.model_kwargs, "attn_kwargs": {"group_counts": [count]}}
        shape = {"num_classes": config.num_classes, "in_chans": config.in_chans}
        model = timm.create_model(config.model, **shape, **kwargs)
        model.load_state_dict({k: v for k, v in state.items() if "group_controller" not in k})
        trainer.model = model
        expected = outcomes(trainer, trainer.test_loader)[0]["top1"]
        wanted = pytest.approx(expected, abs=100 * near / len(labels))
        assert found["top1"][str(count)] == wanted
    assert not scenes or len(set(found["top1"].values())) > 2

    # The report has it, and another call leaves it.
    assert "### Dynamic grouping of emax, over 1 seeds" in printed
    assert f"| as trained | {found['top1']['as trained']:.2f} |  |" in printed
    assert f"| all layers, {'trouser' if scenes else 'cat'} |" in printed
    plot = (tmp_path / "runs" / "small" / "tiny-grouping.svg").read_text()
    assert ">emax: chosen group counts</text>" in plot
    before = (folder / GROUPING).stat().st_mtime_ns
    if scenes:
        assert compare([str(path), *options]) == 0
        assert (folder / GROUPING).stat().st_mtime_ns == before


def test_layer_without_the_forced_count_gets_the_next_below() -> None:
    torch.manual_seed(0)
    layers = {"few": 4, "many": 16}
    model = torch.nn.ModuleDict({name: EMAX(c) for name, c in layers.items()})
    force_counts(model, {"few": 8, "many": 8})
    for name, count in (("few", 4), ("many", 8)):
        x = torch.randn(3, layers[name], 5, 5)
        layer: Any = model[name].eval()
        assert layer.attention(x).group_count.tolist() == [count] * 3


def test_forced_network_computes_what_one_with_that_count_alone_computes() -> None:
    def network(**attention: Any) -> Any:
        settings = {**STUDY["backbones"]["tiny"]["model_kwargs"], "base_model": "resnet10t"}
        attention["gate_init"] = 1.0
        return timm.create_model(
            "with_attention", where="block", attn_kwargs=attention, num_classes=3, **settings
        ).eval()

    torch.manual_seed(0)
    model, x, found = network(), torch.randn(4, 3, 32, 32), []
    open_up(model)
    for count in (1, 4):
        force_counts(model, dict.fromkeys(choosing_layers(model), count))
        alone = network(group_counts=[count])
        state = {k: v for k, v in model.state_dict().items() if "group_controller" not in k}
        alone.load_state_dict(state)
        with torch.no_grad():
            found.append(model(x))
            torch.testing.assert_close(found[-1], alone(x), rtol=1e-4, atol=1e-4)
    assert (found[0] - found[1]).abs().max() > 0.01 * found[0].abs().max()


def test_grouping_of_what_is_not_there_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, two_methods)
    command = [str(path), "--output", str(tmp_path / "runs"), "--device", "cpu", "--grouping"]
    assert compare([*command, "emx"]) == 2
    assert "unknown method emx; the nearest of" in only_line(capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()
    write_results_of(path, tmp_path / "runs", {("emax", 0): 51.0})
    assert compare([*command, "emax"]) == 2
    assert "has no model.safetensors" in only_line(capsys.readouterr().err)


def test_gradients_are_those_that_the_optimizer_gets(images: Path, tmp_path: Path) -> None:
    study = study_on(images, tmp_path)
    trainer = trainer_of(study, "emax", 0, tmp_path)
    row = {"step": 0, "network": 0.0, "layers": {}}
    lines = [json.dumps({**row, "step": step}) + "\n" for step in (0, 1)]
    (tmp_path / GRADIENTS).write_text("".join(lines))
    trainer.step = 1  # of a run that is continued: the row of step 1 is of before
    norms, check = [], trainer.update.check

    def noted() -> Any:
        norms.append(check()[0].item())  # type: ignore[union-attr]
        return check()

    trainer.update.check = noted  # type: ignore[method-assign]
    layers = choosing_layers(trainer.model)
    seen: dict[str, float] = dict.fromkeys(layers, 0.0)
    for name, layer in layers.items():
        for parameter in layer.group_controller.parameters():  # type: ignore[union-attr]
            parameter.register_hook(
                lambda grad, name=name: seen.update({name: seen[name] + grad.square().sum().item()})
            )
    open_up(trainer.model)
    record_gradients(trainer, tmp_path)
    trainer.network.train()
    trainer.step = 3  # after the warm-up
    trainer.train_step([next(iter(trainer.train_loader))])
    rows = read_rows(tmp_path / GRADIENTS)
    assert [found["step"] for found in rows] == [0, 3]
    assert rows[1]["network"] == pytest.approx(norms[0])
    for name, own in rows[1]["layers"].items():
        assert own["controller"] == pytest.approx(seen[name] ** 0.5)
        assert 0 < own["controller"] < own["other"] < norms[0]


@pytest.mark.slow
def test_gradients_of_a_run_are_in_its_report(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = study_on(images, tmp_path)
    for seed in (0, 1):
        made(study, "emax", seed, tmp_path / "runs" / "small" / "tiny" / "emax" / f"seed-{seed}")
    options = ["--output", str(tmp_path / "runs"), "--device", "cpu", "--grouping", "emax"]
    assert compare([str(study.path), *options]) == 0
    assert "| norm of the gradient | controller, quarter 1 |" in capsys.readouterr().out
    folder = tmp_path / "runs" / "small" / "tiny"
    for path in folder.rglob("*"):  # what is committed
        if path.is_file() and path.name not in (RESULT, GROUPING):
            path.unlink()
    text = (tmp_path / "runs" / "small" / "report.md").read_text()
    assert compare([str(study.path), *options[:4], "--report"]) == 0
    again = (tmp_path / "runs" / "small" / "report.md").read_text()
    assert again.split("\n")[3:] == text.split("\n")[3:]
    assert STUDY["name"] == read_study(str(study.path)).name
