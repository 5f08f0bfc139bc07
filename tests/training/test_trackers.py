"""What trackers are given, read back from what they wrote; nothing here uses the network."""

import importlib
import importlib.util
import json
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiers import mostly_slow
from training_testing import SMALL, MakeTrainer, left_by, only_line, same_tensors

from emax_timm.training import TrainConfig, train
from emax_timm.training.trackers import TRACKERS, open_trackers

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "wandb_home"))
    for name, value in (
        *(("WANDB_MODE", "offline"), ("WANDB_ERROR_REPORTING", "false"), ("WANDB_API_KEY", KEY)),
        *(("WANDB_SILENT", "true"), ("HF_HUB_OFFLINE", "1")),
    ):
        monkeypatch.setenv(name, value)


def expected_rows(folder: Path) -> list[dict[str, float]]:
    """What every tracker is to hold, by epoch, from the run's own files."""
    logs = [
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("log.jsonl", "layers.jsonl")
    ]
    rows = []
    for row, layers in zip(*logs, strict=True):
        row, layers = dict(row), dict(layers)
        assert row.pop("epoch") == layers.pop("epoch") == len(rows)
        del row["step"]
        for name, layer in layers.items():
            shares = [chosen / sum(layer["histogram"]) for chosen in layer["histogram"]]
            names = [f"{name}/groups_{count}" for count in layer["group_counts"]]
            row |= dict(zip(names, shares, strict=True))
            row |= {f"{name}/{k}": v for k, v in layer.items() if isinstance(v, float)}
        rows.append({name: value for name, value in row.items() if value is not None})
    return rows


def tensorboard_rows(folder: Path) -> dict[int, dict[str, float]]:
    events = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0}).Reload()
    rows: dict[int, dict[str, float]] = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            assert name not in rows.setdefault(event.step, {})
            rows[event.step][name] = event.value
    return rows


def wandb_records(file: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    wandb_internal_pb2: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")

    data, position, parts = file.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # a block's rest that holds no header is padding
            position += 32768 - position % 32768
            continue
        length, kind = (
            int.from_bytes(data[position + 4 : position + 6], "little"),
            data[position + 6],
        )
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def wandb_rows(file: Path) -> dict[int, dict[str, float]]:
    rows = {}
    for record in wandb_records(file):
        if record.HasField("history"):
            items = record.history.item
            row = {item.key or ".".join(item.nested_key): item.value_json for item in items}
            values = {key: json.loads(value) for key, value in row.items()}
            step = values.pop("_step", record.history.step.num)
            rows[step] = {key: v for key, v in values.items() if not key.startswith("_")}
    return rows


def test_tensorboard_holds_the_rows(trainer_for: MakeTrainer) -> None:
    trainer = trainer_for(epochs=3, val_interval=2, log_to=["tensorboard"])
    trainer.run()
    expected = expected_rows(trainer.folder)
    assert "val_loss" in expected[1].keys() - expected[0].keys()
    found = tensorboard_rows(trainer.folder)
    assert sorted(found) == [0, 1, 2]
    for epoch, row in enumerate(expected):
        assert found[epoch] == pytest.approx(row)


def test_tensorboard_forgets_what_a_resumed_run_repeats(tmp_path: Path) -> None:
    for first, factor in ((0, 1.0), (1, 10.0)):
        with open_trackers(["tensorboard"], tmp_path, {}, first) as log:
            for epoch in range(first, 3):
                log(epoch, {"loss": factor * epoch})
    found = tensorboard_rows(tmp_path)
    assert found == {0: {"loss": 0.0}, 1: {"loss": 10.0}, 2: {"loss": 20.0}}


@pytest.mark.slow
def test_wandb_holds_the_rows_and_one_id(
    trainer_for: MakeTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_for(epochs=2, log_to=["wandb"])
    trainer.run()
    capfd.readouterr()
    assert train(["--resume", str(trainer.folder), "--epochs", "3"]) == 0
    assert "failed" not in capfd.readouterr().err
    name = (trainer.folder / "run_id").read_text().strip()
    files = sorted(
        (trainer.folder / "wandb").glob("offline-run-*/*.wandb"),
        key=lambda file: file.stat().st_mtime,
    )
    assert [file.name for file in files] == [f"run-{name}.wandb"] * 2
    found = {**wandb_rows(files[0]), **wandb_rows(files[1])}
    expected = expected_rows(trainer.folder)
    assert found == dict(enumerate(expected))
    assert sorted(wandb_rows(files[1])) == [2]
    runs = [
        record.run for file in files for record in wandb_records(file) if record.HasField("run")
    ]
    assert {(run.run_id, run.project, run.display_name) for run in runs} == {
        (name, "emax-timm", "run")
    }
    config = {item.key: json.loads(item.value_json) for item in runs[-1].config.update}
    assert (config["lr"], config["model"]) == (0.05, "resnet10t_emax")


@pytest.mark.slow
def test_wandb_key_is_written_nowhere(
    trainer_for: MakeTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_for(epochs=1, log_to=["wandb"])
    trainer.run()
    found = capfd.readouterr()
    assert KEY not in found.out + found.err
    files = [path for path in trainer.folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        assert KEY.encode() not in path.read_bytes(), path


@pytest.mark.slow
def test_trackio_holds_the_rows(
    trainer_for: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("trackio.utils", "trackio.sqlite_storage"):  # read once, when imported
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    trainer = trainer_for(epochs=2, log_to=["trackio"])
    trainer.run()
    assert train(["--resume", str(trainer.folder), "--epochs", "3"]) == 0
    with sqlite3.connect(tmp_path / "trackio" / "emax-timm.db") as base:
        found = base.execute("SELECT run_id, run_name, step, metrics FROM metrics").fetchall()
    name = f"run-{(trainer.folder / 'run_id').read_text().strip()}"
    assert {row[1] for row in found} == {name}
    assert len({row[0] for row in found}) == 1
    assert {row[2]: json.loads(row[3]) for row in found} == dict(
        enumerate(expected_rows(trainer.folder))
    )


@pytest.mark.slow
def test_runs_side_by_side_are_logged_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a GPU, where the runs of a seed are threads of one process that take turns."""
    for module in ("trackio.utils", "trackio.sqlite_storage"):
        monkeypatch.setattr(f"{module}.TRACKIO_DIR", tmp_path / "trackio")
    folders = [tmp_path / "first", tmp_path / "second"]
    turns = [threading.Semaphore(1), threading.Semaphore(0)]

    def run(place: int) -> None:
        folders[place].mkdir()
        mine, other = turns[place], turns[1 - place]
        mine.acquire()
        with open_trackers(["wandb", "trackio"], folders[place], {}) as log:
            for epoch in range(2):
                other.release()
                mine.acquire()
                log(epoch, {"loss": 10.0 * place + epoch})
        other.release()

    threads = [threading.Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert "failed" not in capfd.readouterr().err
    expected = [{epoch: {"loss": 10.0 * place + epoch} for epoch in range(2)} for place in range(2)]
    for folder, rows in zip(folders, expected, strict=True):
        (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
        assert wandb_rows(file) == rows
    with sqlite3.connect(tmp_path / "trackio" / "emax-timm.db") as base:
        found = base.execute("SELECT run_name, step, metrics FROM metrics").fetchall()
    for folder, rows in zip(folders, expected, strict=True):
        name = f"{folder.name}-{(folder / 'run_id').read_text().strip()}"
        assert {step: json.loads(row) for run, step, row in found if run == name} == rows


def test_missing_package_is_refused_before_anything_is_written(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    output = tmp_path / "runs"
    assert train([str(images), *SMALL, "--output", str(output), "--log-to", "wandb"]) == 2
    assert only_line(capsys.readouterr().err) == (
        "train.py: error: --log-to wandb needs the package wandb: "
        "pip install wandb, or 'emax-timm[track]' for all of them"
    )
    assert not output.exists()


def test_unknown_tracker_is_refused_with_the_nearest(
    images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train([str(images), *SMALL, "--log-to", "tensorboard", "wandbb"]) == 2
    line = only_line(capsys.readouterr().err)
    assert line.endswith(
        "log_to has no choice wandbb; the nearest of tensorboard, trackio, wandb is wandb"
    )


def test_choices_are_the_trackers() -> None:
    field = TrainConfig.__dataclass_fields__["log_to"]
    assert set(field.metadata["choices"]) == set(TRACKERS)
    assert TrainConfig().log_to == []


@pytest.mark.parametrize("moment", mostly_slow(["open", "log", "close"], 1))
def test_tracker_that_fails_does_not_end_the_run(
    trainer_for: MakeTrainer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    moment: str,
) -> None:
    calls: list[str] = []

    def fail_at(found: str) -> None:
        calls.append(found)
        if found == moment:
            raise ConnectionError(f"no route with the key {KEY}")

    @contextmanager
    def failing(*_: Any) -> Iterator[Callable[..., None]]:
        fail_at("open")
        yield lambda *_: fail_at("log")
        fail_at("close")

    monkeypatch.setitem(TRACKERS, "wandb", failing)
    trainer = trainer_for(epochs=3, log_to=["wandb", "tensorboard"])
    trainer.run()
    assert (trainer.folder / "summary.json").exists()
    shown = capsys.readouterr().err
    assert KEY not in shown
    lines = [line for line in shown.splitlines() if "wandb" in line]
    assert lines == ["warning: wandb failed (ConnectionError); the run continues"]
    assert calls == (["open"] if moment == "open" else ["open", "log", "log", "log", "close"])
    assert sorted(tensorboard_rows(trainer.folder)) == [0, 1, 2]


def test_tracker_learns_that_the_run_was_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    @contextmanager
    def recording(*_: Any) -> Iterator[Callable[..., None]]:
        try:
            yield lambda *_: None
        except BaseException as error:
            seen.append(error)
            raise

    monkeypatch.setitem(TRACKERS, "wandb", recording)
    with pytest.raises(KeyboardInterrupt), open_trackers(["wandb"], tmp_path, {}):
        raise KeyboardInterrupt
    assert [type(error) for error in seen] == [KeyboardInterrupt]


@pytest.mark.slow
def test_trackers_do_not_change_the_run(trainer_for: MakeTrainer) -> None:
    states = []
    for name, log_to in (("plain", []), ("tracked", ["tensorboard", "wandb"])):
        trainer = trainer_for(name, log_to=log_to, mixup=0.5, drop=0.2, model_ema=True)
        trainer.run()
        states.append(left_by(trainer.folder))
    assert same_tensors(*states)
