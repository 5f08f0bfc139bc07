"""From a YAML file and flags to a configuration."""

import dataclasses
import errno
import os
from pathlib import Path
from typing import Any

import pytest
from interpreters import ROOT
from training_testing import flags

from emax_timm.training import TrainConfig, UsageError, ValidateConfig
from emax_timm.training.config import (
    find_config,
    from_mapping,
    nearest,
    parse_settings,
    read_yaml,
    to_yaml,
)
from emax_timm.training.config.checks import check_config

RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))


def parse(*argv: str | Path, kind: type = TrainConfig) -> Any:
    return from_mapping(kind, parse_settings(kind, flags(argv), "train.py"), "the command line")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return tmp_path / "recipe.yaml"


def test_config_of_nothing_is_the_defaults() -> None:
    assert parse() == TrainConfig()
    assert parse(kind=ValidateConfig) == ValidateConfig()


def test_config_file_sets_what_it_names(recipe: Path) -> None:
    recipe.write_text("lr: 0.5\nmodel: resnet18\nmodel_kwargs: {zero_init_last: false}\n")
    expected = TrainConfig(lr=0.5, model="resnet18", model_kwargs={"zero_init_last": False})
    assert parse("-c", recipe) == expected


def test_config_flags_win_over_the_file(recipe: Path) -> None:
    recipe.write_text("lr: 0.5\nepochs: 7\namp: true\nscale: [0.5, 0.6]\nmodel_kwargs: {a: 1}\n")
    config = parse(
        *("-c", recipe, "--lr", "0.25", "--no-amp", "--scale", "0.1", "0.2"),
        *("--model-kwargs", "b=2"),
    )
    assert (config.lr, config.epochs, config.amp) == (0.25, 7, False)
    assert config.scale == [0.1, 0.2]
    assert config.model_kwargs == {"b": 2}


def test_config_flags_win_even_where_they_give_the_default(recipe: Path) -> None:
    recipe.write_text("epochs: 7\nval_split: foo\naa: rand-m9\n")
    config = parse("--epochs", "300", "--val-split", "", "-c", recipe)
    assert (config.epochs, config.val_split, config.aa) == (300, "", "rand-m9")


def test_config_keys_may_have_dashes_or_underscores(recipe: Path) -> None:
    recipe.write_text("weight-decay: 0.1\nbatch_size: 4\nmodel-ema: true\n")
    config = parse("-c", recipe)
    assert (config.weight_decay, config.batch_size, config.model_ema) == (0.1, 4, True)


@pytest.mark.parametrize("text", ["1e-3", "0.001", "'1e-3'", "1.0e-3"])
def test_config_numbers_may_be_written_as_yaml_does_not_read_them(recipe: Path, text: str) -> None:
    recipe.write_text(f"lr: {text}\nmean: [{text}, 1]\n")
    config = parse("-c", recipe)
    assert config.lr == 1e-3
    assert config.mean == [1e-3, 1.0]
    assert [type(value) for value in config.mean] == [float, float]


def test_config_key_value_flags_are_literals_else_strings() -> None:
    config = parse("--model-kwargs", "a=[1,2]", "b=True", "c=avg", "d={'factor': 8}", "e=x=y", "f=")
    expected = {"a": [1, 2], "b": True, "c": "avg", "d": {"factor": 8}, "e": "x=y", "f": ""}
    assert config.model_kwargs == expected


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("epochs", "1e1"), ("epochs", "2.0"), ("epochs", "true"), ("epochs", ""), ("lr", "fast")),
        *(("amp", "1"), ("amp", "'yes'"), ("model", "18"), ("model", ""), ("scale", "0.5")),
        *(("scale", "[a, b]"), ("decay_milestones", "[1.5]"), ("model_kwargs", "[1]")),
        *(("lr", "true"), ("mean", "[true]"), ("experiment", "2024-01-01"), ("seed", "1.5")),
        ("lr", "9" * 400),
    ],
)
def test_config_refuses_a_value_of_another_type(recipe: Path, key: str, value: str) -> None:
    recipe.write_text(f"{key}: {value}\n")
    with pytest.raises(UsageError, match=f"recipe.yaml: {key} must be "):
        parse("-c", recipe)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("input_size", [1, 32]), ("scale", [0.5]), ("ratio", []), ("grouping_warmup", [0.1])),
        *(("grouping_temperature", [1.0]), ("cutmix_minmax", [0.5]), ("scale", [0.1, 0.2, 0.3])),
    ],
)
def test_config_refuses_a_list_of_another_length(recipe: Path, key: str, value: Any) -> None:
    recipe.write_text(f"{key}: {value}\n")
    with pytest.raises(UsageError, match=key):
        check_config(parse("-c", recipe))


@pytest.mark.parametrize(
    ("argv", "valid"),
    [
        (["--modle", "x"], "--model"),
        (["--lr-bsae=1"], "--lr-base"),
        (["--model_kwargs", "a=1"], "--model-kwargs"),
        (["--sched", "cosin"], "cosine"),
        (["--remode", "pixl"], "pixel"),
        (["--eval-metric", "los"], "loss"),
    ],
)
def test_config_names_the_nearest_flag_and_choice(argv: list[str], valid: str) -> None:
    with pytest.raises(UsageError, match=rf"nearest .*is {valid}$"):
        parse(*argv)


@pytest.mark.parametrize(("key", "valid"), [("modle", "model"), ("weight-decy", "weight_decay")])
def test_config_names_the_nearest_key_and_the_file(recipe: Path, key: str, valid: str) -> None:
    recipe.write_text(f"epochs: 3\n{key}: x\n")
    with pytest.raises(UsageError, match=rf"recipe.yaml: unknown key .*is {valid}$"):
        parse("-c", recipe)


@pytest.mark.parametrize("argv", [["--epochs", "many"], ["--epochs"], ["--input-size", "3", "32"]])
def test_config_refuses_a_malformed_flag(argv: list[str]) -> None:
    with pytest.raises(UsageError, match=argv[0]):
        parse(*argv)


def test_config_refuses_a_second_folder() -> None:
    with pytest.raises(UsageError, match="one argument too many: more; --help says"):
        parse("photos", "more")


def test_config_refuses_abbreviated_flags() -> None:
    # An abbreviation would change its meaning when an option is added.
    with pytest.raises(UsageError, match="unknown flag --epoch; the nearest valid one is --epochs"):
        parse("--epoch", "3")


@pytest.mark.parametrize(
    "text", ["", "- a\n", "text", "a: [1", "a: b: c", "!!python/object/apply:os.system [x]", "\t"]
)
def test_config_refuses_a_file_that_is_no_mapping(recipe: Path, text: str) -> None:
    recipe.write_text(text)
    with pytest.raises(UsageError, match=r"recipe\.yaml") as caught:
        parse("-c", recipe)
    assert "\n" not in str(caught.value)


def test_config_refuses_a_file_that_is_no_text(recipe: Path) -> None:
    recipe.write_bytes(b"\xff\xfe\x00model: a")
    with pytest.raises(UsageError, match="not valid YAML"):
        parse("-c", recipe)


def test_config_refuses_a_file_that_cannot_be_read(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(recipe))

    recipe.write_text("epochs: 1\n")
    # As root, which tests may run as, every file can be read.
    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UsageError, match=r"^cannot read .*recipe\.yaml: Permission denied$"):
        parse("-c", recipe)


@pytest.mark.parametrize(("name", "problem"), [(".", "not a file"), ("a" * 300, "name too long")])
def test_find_config_refuses_a_path_that_is_no_file(name: str, problem: str) -> None:
    with pytest.raises(UsageError, match=rf"config file {name}.* {problem}$"):
        find_config(name)


def test_find_config_takes_a_path_before_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config("quickstart") == ROOT / "configs" / "quickstart.yaml"
    Path("quickstart").write_text("epochs: 1\n")
    assert find_config("quickstart") == Path("quickstart")


@pytest.mark.parametrize("name", ["quikstart", "configs/quikstart.yaml", "quickstart.yml"])
def test_find_config_names_the_nearest_recipe(name: str) -> None:
    with pytest.raises(UsageError, match="nearest recipe is") as caught:
        find_config(name)
    if "start" in name:
        assert str(caught.value).endswith("quickstart")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_and_studies_are_found_by_their_names(path: Path) -> None:
    name = str(path.relative_to(ROOT / "configs").with_suffix(""))
    assert find_config(name) == path


def test_recipes_exist() -> None:
    assert {"quickstart", "fashion_mnist"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        ValidateConfig(),
        TrainConfig(
            lr=1e-7,
            weight_decay=1e20,
            mean=[1 / 3, 1e-9],
            input_size=[1, 8, 8],
            aa="no",
            gp="1e3",
            val_split="",
            experiment="Größe: #1 - 'x'",
            model_kwargs={"attn_kwargs": {"factor": 8}, "attn_stages": [], "flag": None},
            opt_kwargs={"foreach": True, "name": "on"},
            model_ema=True,
        ),
    ],
    ids=["train", "validate", "odd values"],
)
def test_to_yaml_is_read_back_as_it_was(config: Any, recipe: Path) -> None:
    recipe.write_text(to_yaml(config), encoding="utf-8")
    assert from_mapping(type(config), read_yaml(recipe), "the file") == config
    settings = {
        name: getattr(config, name) for name in (f.name for f in dataclasses.fields(config))
    }
    assert read_yaml(recipe) == settings


def test_options_do_not_share_their_containers() -> None:
    TrainConfig().scale.append(1.0)
    TrainConfig().model_kwargs["a"] = 1
    assert TrainConfig().scale == [0.08, 1.0]
    assert TrainConfig().model_kwargs == {}


def test_nearest_names_something_for_any_name() -> None:
    assert nearest("cosin", ["step", "cosine"]) == "cosine"
    assert nearest("", ["step"]) == "step"
    assert nearest("ß" * 1000, ["step"]) == "step"
