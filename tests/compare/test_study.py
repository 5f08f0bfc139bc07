"""Study files: what is refused before anything is trained, the order of the runs, their hash."""

import dataclasses
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from interpreters import ROOT
from study_testing import cell_of, write_study
from tiers import mostly_slow
from training_testing import only_line

from emax_timm.compare.cells import train_config
from emax_timm.compare.command import CompareConfig, compare
from emax_timm.compare.lite0 import MODEL
from emax_timm.compare.study import StudyFile, read_study
from emax_timm.compare.tune import Prune, TuneConfig, TuneOptions
from emax_timm.training.checkpoint import serialized
from emax_timm.training.config import find_config, from_mapping, parse_settings

Change = Callable[[dict[str, Any]], object]

BAD: dict[str, tuple[Change, str]] = {
    "key": (
        lambda s: s.update(metric=["top1"]),
        "unknown key metric; the nearest valid one is metrics",
    ),
    "key of timm": (
        lambda s: s.update(seed=42),
        "unknown key seed; the nearest valid one is seeds",
    ),
    "experiment": (
        lambda s: s["methods"]["se"].update(experiment="wide_controller"),
        "the experiment of method se needs attention: emax",
    ),
    "unknown experiment": (
        lambda s: s["methods"]["emax"].update(experiment="wide"),
        "experiment has no choice wide; the nearest of wide_controller",
    ),
    "metric": (lambda s: s.update(metrics=["top2"]), "metrics has no choice top2"),
    "attention": (
        lambda s: s["methods"].update(new={"attention": "sse"}),
        "attention has no choice sse; the nearest of emax, ema, cbam, se",
    ),
    "keyword": (
        lambda s: s["methods"]["se"].update(attn_kwargs={"factr": 8}),
        "tiny with se: model with_attention: ",
    ),
    "option": (lambda s: s["recipe"].update(epoch=1), "unknown key epoch; the nearest"),
    "option of a method": (
        lambda s: s["methods"]["se"].update(recipe={"lr": "fast"}),
        "tiny with se: lr must be a number, not 'fast'",
    ),
    "own option": (lambda s: s["recipe"].update(seed=3), "seed is no key of a recipe here"),
    "backbone": (
        lambda s: s["backbones"]["tiny"].update(model="resnet10"),
        "unknown model resnet10; the nearest is resnet10t",
    ),
    "like": (lambda s: s["methods"]["se"].update(like="see"), "unknown method see; the nearest"),
    "circle": (lambda s: s["methods"]["emax"].update(like="emax_finest"), "is like itself"),
    "reference": (lambda s: s.update(references=["sse"]), "unknown reference sse"),
    "no primary": (lambda s: s.update(primary={}), "no primary comparison is declared"),
    "primary": (
        lambda s: s["primary"].update(against=["nothing"]),
        "unknown method nothing; the nearest of none, se, emax, emax_finest is none",
    ),
    "primary metric": (lambda s: s["primary"].update(metric="speed"), "no choice speed"),
    "itself": (lambda s: s["primary"].update(against=["emax"]), "compares emax with itself"),
    "twice": (lambda s: s["primary"].update(against=["se", "se"]), "with a method twice"),
    "no test split": (lambda s: s["recipe"].pop("test_split"), "has no test_split"),
    "same": (lambda s: s["methods"].update(ema={"attention": "se"}), "se and ema are the same"),
    "init": (
        lambda s: s["methods"]["emax"].update(init={"conv3x3.bais": 0.0}),
        "no parameter's name ends with conv3x3.bais",
    ),
    "experiment without a choice": (
        lambda s: s["methods"]["emax_finest"].update(experiment="wide_controller"),
        "no EMAX layer of the model chooses its group count",
    ),
    "seeds": (lambda s: s.update(seeds=[1, 1]), "seeds has a value twice: 1, 1"),
    "references twice": (lambda s: s.update(references=["se", "se"]), "has a value twice: se, se"),
    "no metrics": (lambda s: s.update(metrics=[]), "metrics must name at least one"),
    "no seeds": (lambda s: s.update(seeds=[]), "seeds must name at least one"),
    "name": (lambda s: s.update(name="../x"), "'../x' is no name; a study, a backbone and a"),
    "method outside": (lambda s: s["methods"].update({"..": {}}), "'..' is no name"),
    "method with a slash": (lambda s: s["methods"].update({"a/b": {}}), "'a/b' is no name"),
    "method that breaks a table": (lambda s: s["methods"].update({"a|b": {}}), "'a|b' is no name"),
    "method that YAML reads as false": (
        lambda s: s["methods"].update({False: {}}),
        "False is no name; a study, a backbone and a method have names of letters",
    ),
    "backbone that is a number": (lambda s: s["backbones"].update({18: {}}), "18 is no name"),
    "backbone without a model": (
        lambda s: s["backbones"].update(more={}),
        "backbone more names no model",
    ),
    "like a list": (lambda s: s["methods"]["se"].update(like=["emax"]), "unknown method ['emax']"),
    "space of a variant": (
        lambda s: s["methods"]["emax_finest"].update(space={"lr": [1, 2]}),
        "method emax_finest has a space, but takes the values of emax",
    ),
    "no stages": (lambda s: s["methods"]["se"].update(stages=[]), "stages must be different ones"),
    "keyword arguments without a model": (
        lambda s: s["methods"]["se"].update(model_kwargs={"a": 1}),
        "method se has model_kwargs, but no model of its own",
    ),
    "constant": (
        lambda s: s["methods"]["emax"].update(init={"conv3x3.bias": "zero"}),
        "init: conv3x3.bias must be a number, not 'zero'",
    ),
    "tuned": (lambda s: s.update(tuned="no.yaml"), "emax tune "),
    "kwargs without attention": (
        lambda s: s["methods"]["none"].update(stages=[1]),
        "has attn_kwargs or stages, but no attention",
    ),
    "test images choose the epoch": (
        lambda s: s["recipe"].pop("val_split"),
        "selected on validation, which has the images of the test split validation; choose",
    ),
    "test images under another name": (
        lambda s: s["recipe"].update(val_split="eval"),
        "selected on eval, which has the images of the test split validation; choose",
    ),
    "test images of torchvision": (
        lambda s: s["recipe"].update(
            dataset="torch/cifar10", data_dir="x", val_split="val", test_split="test"
        ),
        "selected on val, which has the images of the test split test; choose",
    ),
}


@pytest.mark.parametrize("case", mostly_slow(BAD, 0, 1, 2, 4, 6, 12, 13, 14, 19))
def test_bad_study_is_one_line_before_anything_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = BAD[case]
    path = write_study(tmp_path, change)
    assert compare([str(path), "--output", str(tmp_path / "runs")]) == 2
    assert message in only_line(capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_key_that_occurs_twice_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    path.write_text(path.read_text() + "seeds: [5]\n")
    assert compare([str(path), "--output", str(tmp_path / "runs")]) == 2
    assert "is not valid YAML: the key seeds occurs twice" in only_line(capsys.readouterr().err)


def test_primary_comparison_is_made_first_and_methods_take_turns(tmp_path: Path) -> None:
    runs = read_study(str(write_study(tmp_path))).runs()
    made = [(run.cell.method, run.seed) for run in runs]
    primary = [(method, seed) for seed in range(4) for method in ("none", "se", "emax")]
    assert made == [*primary, ("emax_finest", 0), ("emax_finest", 1)]


def test_variant_takes_over_the_keys_and_the_tuned_values_of_its_method(tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text(
        yaml.safe_dump(
            {
                "tiny/emax": {"lr": 0.007, "attn_kwargs.factor": 8, "stages": [2]},
                "other/emax": {"lr": 1.0},
            }
        )
    )
    change: Change = lambda s: (  # noqa: E731
        s.update(tuned="tuned.yaml"),
        s["methods"]["emax_finest"].update(recipe={"weight_decay": 0.5}),
    )
    study = read_study(str(write_study(tmp_path, change)))
    found = {cell.method: train_config(cell) for cell in study.cells}
    assert found["none"].lr == 0.003
    for method in ("emax", "emax_finest"):
        kwargs = found[method].model_kwargs
        assert found[method].lr == 0.007
        assert kwargs["attn_kwargs"]["factor"] == 8
        assert kwargs["stages"] == [2]
    assert found["emax_finest"].model_kwargs["attn_kwargs"]["group_counts"] == "finest"
    assert found["emax_finest"].weight_decay == 0.5
    assert "group_counts" not in found["emax"].model_kwargs["attn_kwargs"]


def test_keys_of_a_variant_win_over_the_tuned_values_of_its_method(tmp_path: Path) -> None:
    values = {"lr": 0.007, "attn_kwargs.factor": 16, "stages": [2, 3]}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump({"tiny/emax": values}))
    change: Change = lambda s: (  # noqa: E731
        s.update(tuned="tuned.yaml"),
        s["methods"].update(
            factor_8={"like": "emax", "attn_kwargs": {"factor": 8}},
            last={"like": "factor_8", "stages": [3], "recipe": {"lr": 0.1}},
        ),
    )
    study = read_study(str(write_study(tmp_path, change)))
    found = {cell.method: train_config(cell) for cell in study.cells}
    factors = {
        name: found[name].model_kwargs["attn_kwargs"].get("factor")
        for name in found
        if name not in ("none", "se")
    }
    assert factors == {"emax": 16, "emax_finest": 16, "factor_8": 8, "last": 8}
    assert [found[name].model_kwargs["stages"] for name in ("emax", "factor_8", "last")] == [
        [2, 3],
        [2, 3],
        [3],
    ]
    assert [found[name].lr for name in ("emax", "factor_8", "last")] == [0.007, 0.007, 0.1]
    assert study.values("tiny", "last") == {}
    assert study.untuned() == ["tiny/none", "tiny/se"]


def hashes(folder: Path, change: Change | None = None, **recipe: Any) -> dict[str, str]:
    """The hash of each method's configuration in the small study with a change."""
    study = read_study(str(write_study(folder, change, **recipe)))
    return {cell.method: cell.hash for cell in study.cells}


def test_keys_of_a_method_win_over_its_tuned_values(tmp_path: Path) -> None:
    (tmp_path / "tuned.yaml").write_text("tiny/emax: {lr: 0.1, attn_kwargs.factor: 16, opt: sgd}\n")

    def change(study: dict[str, Any]) -> None:
        study["tuned"] = "tuned.yaml"
        study["methods"]["emax"] |= {"recipe": {"lr": 0.001}, "attn_kwargs": {"factor": 8}}

    study = read_study(str(write_study(tmp_path, change)))
    cell = cell_of(study, "emax")
    assert study.values("tiny", "emax") == {"opt": "sgd"}
    assert (cell.settings["lr"], cell.settings["opt"]) == (0.001, "sgd")
    assert cell.settings["model_kwargs"]["attn_kwargs"]["factor"] == 8


def test_hash_is_of_what_is_computed_and_not_of_the_machine(tmp_path: Path) -> None:
    first = hashes(tmp_path, data_dir="here/images")
    assert len(set(first.values())) == 4
    assert not set(hashes(tmp_path, data_dir="here/photos").values()) & set(first.values())
    # A default that is spelt out is no other configuration.
    machine: dict[str, Any] = {"data_dir": "elsewhere/images", "workers": 3, "log_interval": 7}
    rename: Change = lambda s: s.update(name="other", seeds=[7])  # noqa: E731
    assert hashes(tmp_path, rename, smoothing=0.1, **machine) == first
    other = hashes(tmp_path, lr=0.004, data_dir="here/images")
    assert not set(other.values()) & set(first.values())


@pytest.mark.slow
def test_hash_of_a_method_follows_its_own_keys(tmp_path: Path) -> None:
    def choosing(study: dict[str, Any]) -> None:  # which the experiment needs
        study["methods"]["emax_finest"]["attn_kwargs"] = {"group_counts": [1, 2]}

    first = hashes(tmp_path, choosing)

    def differing(change: Change) -> set[str]:
        changed = hashes(tmp_path, lambda study: (choosing(study), change(study)))
        return {method for method in first if changed[method] != first[method]}

    assert differing(lambda s: s["methods"]["se"].update(attn_kwargs={"rd_ratio": 0.25})) == {"se"}
    for key, value in {"init": {"conv3x3.bias": 0.0}, "experiment": "wide_controller"}.items():
        found = differing(lambda s, k=key, v=value: s["methods"]["emax"].update({k: v}))
        assert found == {"emax", "emax_finest"}


FILES = sorted((ROOT / "configs" / "studies").glob("*.yaml"))
STUDIES = [path for path in FILES if not path.stem.endswith("_tuned")]  # what emax tune has chosen


@pytest.mark.slow
@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_study_that_comes_with_the_package_is_valid(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = yaml.safe_load(path.read_text())["recipe"]
    if weights := recipe.get("pretrained_path"):  # stands in for what is downloaded
        Path(weights).parent.mkdir()
        Path(weights).write_bytes(serialized(timm.create_model(MODEL).state_dict()))
    study = read_study(f"studies/{path.stem}")
    assert study.name == path.stem
    assert study.path == path


PAGE = (ROOT / "docs" / "compare.md").read_text(encoding="utf-8")


def test_page_has_a_row_for_every_key_of_a_study_file() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)
    assert set(rows) == {field.name for field in dataclasses.fields(StudyFile)}


def test_commands_of_the_page_are_understood() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    kinds = {"compare": CompareConfig, "tune": TuneConfig}
    commands = [words[1:] for words in lines if words[0] == "emax"]
    assert len(commands) == 6
    for name, *arguments in commands:
        settings = parse_settings(kinds[name], arguments, name)
        assert find_config(settings["study"]).parent.name == "studies"
    assert [words[:3] for words in lines if words[0] != "emax"] == [
        ["python", "-m", "emax_timm.compare.lite0"]
    ]


def test_search_of_the_page_is_read() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    options = from_mapping(TuneOptions, yaml.safe_load(block)["tune"], "the page")
    study = read_study("studies/scenes48_convnext")  # which the command below it names
    assert options == from_mapping(TuneOptions, study.file.tune, "the study")
    (rule,) = re.findall(r"`prune: (\{.*?\})`", PAGE.replace("\n", " "))
    assert from_mapping(Prune, yaml.safe_load(rule), "the page").rule == "median"
