"""`emax tune`: trials that are equal in number, resumable, and end in a recipe for train.py."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from interpreters import ENVIRONMENT
from study_testing import write_study
from training_testing import only_line

from emax_timm.compare.run import RESULT
from emax_timm.compare.search import Search, listed, load_optuna
from emax_timm.compare.study import read_study
from emax_timm.compare.tune import TuneOptions, _searches, tune
from emax_timm.training import TrainConfig
from emax_timm.training.config import from_mapping, parse_settings
from emax_timm.training.journal import LOG

MISSING = importlib.util.find_spec("optuna") is None
needs_optuna = pytest.mark.skipif(MISSING, reason="needs emax-timm[tune]")


def tuned(study: dict[str, Any]) -> None:
    study["methods"] = {
        "none": {},
        "emax": {
            "attention": "emax",
            "space": {"attn_kwargs.factor": [4, 8], "stages": [[0], [1, 2]]},
        },
        "variant": {"like": "emax", "attn_kwargs": {"group_counts": "finest"}},
    }
    study["references"] = study["primary"]["against"] = ["none"]
    study["tune"] = {
        "trials": 5,
        "space": {"lr": {"low": 0.0005, "high": 0.01, "log": True}},
        "prune": {"rule": "median", "trials": 2, "epochs": 1},
        "recipe": {"val_fraction": 0.25, "epochs": 3},
    }


Change = Callable[[dict[str, Any]], object]
BAD: dict[str, tuple[Change, str]] = {
    "key": (lambda s: s["tune"].update(trial=3), "unknown key trial; the nearest"),
    "trials": (lambda s: s["tune"].pop("trials"), "trials must be at least 1, not 0"),
    "space": (lambda s: s["tune"].pop("space"), "tune.space is empty"),
    "option": (lambda s: s["tune"]["space"].update(lrr=[1]), "unknown key lrr; the nearest"),
    "range": (
        lambda s: s["tune"]["space"].update(lr={"low": 1}),
        "lr must be a list of different values, or",
    ),
    "values": (lambda s: s["tune"]["space"].update(opt=["adam", "adim"]), "unknown optimizer adim"),
    "argument": (
        lambda s: s["methods"]["emax"]["space"].update({"attn_kwargs.factor": [0, 8]}),
        "factor must be a positive integer",
    ),
    "value in the middle": (
        lambda s: s["tune"]["space"].update(weight_decay=[0.1, -1.0, 0.2]),
        "weight_decay must be at least 0",
    ),
    "set already": (
        lambda s: s["methods"]["none"].update(recipe={"lr": 0.1}),
        "none sets lr, so it has no space",
    ),
    "set under another spelling": (
        lambda s: (
            s["methods"]["none"].update(recipe={"weight-decay": 0.1}),
            s["tune"]["space"].update(weight_decay=[0.1, 0.2]),
        ),
        "none sets weight_decay, so it has no space",
    ),
    "argument that is set already": (
        lambda s: s["methods"]["emax"].update(attn_kwargs={"factor": 8}),
        "emax sets attn_kwargs.factor, so it has no space",
    ),
    "set for the trials": (
        lambda s: s["tune"]["recipe"].update(lr=0.005),
        "tune.recipe sets lr, so it has no space",
    ),
    "test split": (
        lambda s: (
            s["tune"]["recipe"].pop("val_fraction"),
            s["tune"]["recipe"].update(val_split="validation"),
        ),
        "the trials read validation, which has the images of the test split validation;",
    ),
    "data": (
        lambda s: s["tune"]["space"].update(train_split=["train", "validation"]),
        "train_split is no option of a method, but of the data",
    ),
    "value twice": (
        lambda s: s["tune"]["space"].update(lr=[0.1, 0.1]),
        "a list of different values",
    ),
    "infinite": (
        lambda s: s["tune"]["space"].update(lr={"low": 0.1, "high": float("inf")}),
        "lr must be a list of different values, or a range",
    ),
    "log": (
        lambda s: s["tune"]["space"].update(lr={"low": 0.1, "high": 1.0, "log": "no"}),
        "lr must be a list of different values, or a range",
    ),
    "number": (lambda s: s["tune"]["space"].update({1: [1, 2]}), "unknown key 1; the nearest"),
    "no attention": (
        lambda s: s["tune"]["space"].update({"attn_kwargs.factor": [8]}),
        "attn_kwargs need an attention",
    ),
    "grid": (lambda s: s["tune"].update(sampler="grid"), "the grid of none has 2 points"),
    "no validation": (
        lambda s: s["tune"]["recipe"].pop("val_fraction"),
        "have no validation split",
    ),
}


@needs_optuna
@pytest.mark.parametrize("case", BAD)
def test_bad_search_is_one_line_before_anything_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(study: dict[str, Any]) -> None:
        tuned(study)
        BAD[case][0](study)

    path = write_study(tmp_path, change)
    assert tune([str(path), "--output", str(tmp_path / "runs")]) == 2
    assert BAD[case][1] in only_line(capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_listed_values_are_found_again_as_optuna_stores_them() -> None:
    values = ["", "none", None, 0.1, 8, [0], [1, 2]]
    stored = ["", "none", None, 0.1, 8, "[0]", "[1, 2]"]
    assert [listed(values, chosen) for chosen in stored] == values


@pytest.mark.skipif(not MISSING, reason="optuna is installed")
def test_missing_optuna_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, tuned)
    assert tune([str(path), "--output", str(tmp_path / "runs")]) == 2
    assert "pip install 'emax-timm[tune]'" in only_line(capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def start(path: Path, folder: Path) -> subprocess.Popen:
    main = "import sys; from emax_cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", main, "tune", str(path), "--output", str(folder)]
    return subprocess.Popen([*command, "--device", "cpu"], env=ENVIRONMENT, stdout=subprocess.PIPE)


@needs_optuna
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_search_continues_and_its_winner_is_a_recipe(images: Path, tmp_path: Path) -> None:
    optuna = load_optuna()

    path = write_study(tmp_path, tuned, data_dir=str(images))
    process = start(path, tmp_path / "runs")
    assert process.stdout is not None
    process.stdout.readline()  # the first trial has ended
    process.terminate()
    assert process.wait(200) == 143
    assert start(path, tmp_path / "runs").wait(900) == 0
    folder = tmp_path / "runs" / "small" / "tune"
    values = yaml.safe_load((folder / "tuned.yaml").read_text())
    assert values.keys() == {"tiny/none", "tiny/emax"}
    for name in ("none", "emax"):
        found = optuna.load_study(
            study_name=f"tiny/{name}", storage=f"sqlite:///{folder / 'trials.db'}"
        )
        assert [trial.state.is_finished() for trial in found.trials] == [True] * 5
        rates = {trial.params["lr"] for trial in found.trials}
        assert len(rates) == 5
        assert found.best_trial.params["lr"] == values[f"tiny/{name}"]["lr"]
        best = max(trial.value for trial in found.trials if trial.state.name == "COMPLETE")
        assert found.best_value == best
        settings = parse_settings(
            TrainConfig, ["-c", str(folder / f"tiny-{name}.yaml")], "train.py"
        )
        assert settings["lr"] == found.best_trial.params["lr"]
        assert settings["epochs"] == 2  # of the study, not of the trials
    chosen = values["tiny/emax"]
    assert chosen["stages"] in ([0], [1, 2])
    assert (folder / "importance.png").stat().st_size > 3000
    # The study uses the values, for the variants too.
    (tmp_path / "tuned.yaml").write_text((folder / "tuned.yaml").read_text())

    def use(study: dict[str, Any]) -> None:
        tuned(study)
        study["tuned"] = "tuned.yaml"

    path = write_study(tmp_path, use, "second.yaml", data_dir=str(images))
    study = read_study(str(path))
    variant = study.cell("tiny", "variant")
    assert variant is not None
    assert variant.settings["lr"] == chosen["lr"]
    assert variant.settings["model_kwargs"]["attn_kwargs"]["factor"] == chosen["attn_kwargs.factor"]
    # A method that the values lack is searched alone, and its values join the others.
    assert start(path, tmp_path / "runs").wait(900) == 2

    def extend(study: dict[str, Any]) -> None:
        use(study)
        study["name"] = "more"
        study["methods"]["se"] = {"attention": "se"}

    more = write_study(tmp_path, extend, "more.yaml", data_dir=str(images))
    assert start(more, tmp_path / "runs").wait(900) == 0
    tuned_more = tmp_path / "runs" / "more" / "tune"
    joined = yaml.safe_load((tuned_more / "tuned.yaml").read_text())
    assert joined.keys() == {*values, "tiny/se"}
    assert {key: joined[key] for key in values} == values
    assert [path.name for path in (tuned_more / "tiny").iterdir()] == ["se"]
    # A folder keeps the trials of one search.
    other = write_study(
        tmp_path, lambda s: (tuned(s), s["tune"].update(trials=9)), data_dir=str(images)
    )
    assert tune([str(other), "--output", str(tmp_path / "runs")]) == 2


class Trials:
    """Trials that log what they are told to, in place of processes."""

    def __init__(self) -> None:
        self.running: dict[Path, dict[str, Any]] = {}
        self.asked: set[Path] = set()

    def start(self, jobs: dict[Path, dict[str, Any]]) -> None:
        self.running = jobs

    def end(self, folder: Path) -> None:
        self.asked.add(folder)

    def make(self, search: Search, *metrics: float, diverged: str | None = None) -> str:
        """Make a trial with these metrics of its epochs; returns its rate, and how it ended."""
        search.start(self, "cpu", None)  # type: ignore[arg-type]
        ((folder, job),) = self.running.items()
        folder.mkdir(parents=True)
        for metric in metrics:
            with (folder / LOG).open("a") as log:
                log.write(json.dumps({"val_top1": metric}) + "\n")
            search.watch(self)  # type: ignore[arg-type]
        if folder not in self.asked:
            (folder / RESULT).write_text(json.dumps({"diverged": diverged}))
        number = search.trial.number
        search.finish()
        return f"{job['config']['lr']} {search.study.trials[number].state.name}"


@needs_optuna
def test_trials_are_the_grid_and_bad_ones_are_stopped_by_the_rule(tmp_path: Path) -> None:
    rates = [0.001, 0.002, 0.004, 0.008, 0.016]

    def grid(study: dict[str, Any]) -> None:
        tuned(study)
        study["tune"].update(sampler="grid", space={"lr": rates})
        del study["methods"]["emax"]["space"]

    study = read_study(str(write_study(tmp_path, grid)))
    options = from_mapping(TuneOptions, study.file.tune, "tune")
    search = _searches(study, options, tmp_path / "tune")[0]
    storage, trials = f"sqlite:///{tmp_path / 'trials.db'}", Trials()
    search.open(storage, {"rule": "median", "trials": 2, "epochs": 1})
    ended = [
        trials.make(search, 40.0, 50.0),
        trials.make(search, 42.0, 60.0),
        trials.make(search, 10.0, 10.0),  # below the median 41 of the two before
        trials.make(search, 50.0, diverged="the loss is not finite"),
    ]
    search.open(storage, {"rule": "median", "trials": 2, "epochs": 1})  # it is continued
    ended.append(trials.make(search, 41.5, 55.0))
    states = ["COMPLETE", "COMPLETE", "PRUNED", "FAIL", "COMPLETE"]
    assert ended == [f"{rate} {state}" for rate, state in zip(rates, states, strict=True)]
    assert not search.left()
    assert search.best().params == {"lr": 0.002}


@needs_optuna
def test_folder_that_is_no_url_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, tuned)
    assert tune([str(path), "--output", str(tmp_path / "what?")]) == 2
    assert "has a ?, and Optuna could not open it" in only_line(capsys.readouterr().err)
    assert not (tmp_path / "what?").exists()


@needs_optuna
def test_nothing_is_searched_where_all_values_are_known(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tuned.yaml").write_text(
        yaml.safe_dump({"tiny/none": {"lr": 0.1}, "tiny/emax": {"lr": 0.1}})
    )
    path = write_study(tmp_path, lambda s: (tuned(s), s.update(tuned="tuned.yaml")))
    assert tune([str(path), "--output", str(tmp_path / "runs")]) == 2
    assert "tuned.yaml has values for every method" in only_line(capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()
