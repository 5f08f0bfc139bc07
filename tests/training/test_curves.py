"""The picture of a run's curves: a PNG that shows the data."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from no_curves import draw_curves
from PIL import Image
from tiers import mostly_slow
from training_testing import MakeTrainer, files_in, only_line

from emax_cli import main
from emax_timm.training import curves


@pytest.fixture(autouse=True)
def _drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let runs draw their curves, which they do not in other tests."""
    monkeypatch.setattr(curves, "draw_curves", draw_curves)


def write_log(folder: Path, gates: list[float] | None = None, **columns: list[Any]) -> Path:
    """A run's log of three epochs; `columns` replace those of an ordinary run."""
    values: dict[str, list[Any]] = {
        **{"lr": [0.1, 0.05, 0.0], "train_loss": [2.0, 1.5, 1.2], "val_loss": [2.1, None, 1.4]},
        **{"val_top1": [10.0, None, 30.0], "val_top5": [40.0, None, 80.0], **columns},
    }
    folder.mkdir(exist_ok=True)
    rows = [{"epoch": n, **{k: v[n] for k, v in values.items()}} for n in range(3)]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if gates is not None:
        rows = [{"epoch": n, "layer1.0.se": {"residual_gate": gates[n]}} for n in range(3)]
        (folder / "layers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pixels(folder: Path) -> np.ndarray:
    with Image.open(draw_curves(folder)) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.mark.slow
def test_curves_show_the_data(tmp_path: Path) -> None:
    first = pixels(write_log(tmp_path, [0.1, 0.2, 0.3]))
    assert len(np.unique(first.reshape(-1, 3), axis=0)) > 10
    # A panel in each quarter.
    rows, columns = np.array(first.shape[:2]) // 2
    for part in (first[:rows], first[rows:]):
        assert part[:, :columns].std() > 5
        assert part[:, columns:].std() > 5
    assert np.array_equal(pixels(tmp_path), first)


@pytest.mark.parametrize(
    "other",
    mostly_slow(
        [
            {"train_loss": [2.0, 1.8, 1.2]},
            {"val_loss": [2.1, None, 1.3]},
            {"val_top1": [10.0, None, 20.0]},
            {"val_top5": [50.0, None, 80.0]},
            {"lr": [0.1, 0.02, 0.0]},
            {"gates": [0.1, 0.1, 0.3]},
        ],
    ),
    ids=lambda other: next(iter(other)),
)
def test_curves_of_other_data_are_others(tmp_path: Path, other: dict[str, Any]) -> None:
    first = pixels(write_log(tmp_path, [0.1, 0.2, 0.3]))
    found = pixels(write_log(tmp_path, **{"gates": [0.1, 0.2, 0.3], **other}))
    assert not np.array_equal(found, first)


def test_curve_is_where_its_numbers_are(tmp_path: Path) -> None:
    # The one curve of the learning rate's panel, in matplotlib's first colour: it falls.
    picture = pixels(write_log(tmp_path, [0.1, 0.2, 0.3], lr=[3.0, 2.0, 1.0]))
    height, width = picture.shape[:2]
    panel = picture[height // 2 :, : width // 2]
    rows, columns = np.nonzero((abs(panel - (31, 119, 180)) < 12).all(axis=2))
    assert len(rows) > 100
    assert np.corrcoef(rows, columns)[0, 1] > 0.999


@pytest.mark.parametrize(
    "columns", [{}, {name: [None] * 3 for name in ("val_loss", "val_top1", "val_top5")}]
)
def test_curves_do_without_what_is_not_there(tmp_path: Path, columns: dict[str, Any]) -> None:
    assert pixels(write_log(tmp_path, **columns)).std() > 5
    assert files_in(tmp_path) == {"log.jsonl", "curves.png"}


@pytest.mark.slow
def test_many_layers_fit(tmp_path: Path) -> None:
    write_log(tmp_path)
    rows = [
        {"epoch": n, **{f"layer{i}": {"residual_gate": i + n} for i in range(50)}} for n in range(3)
    ]
    (tmp_path / "layers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert pixels(tmp_path).std() > 5


@pytest.mark.slow
def test_command_draws_the_curves_of_a_run(
    trainer_for: MakeTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = trainer_for(epochs=2)
    trainer.run()
    path = trainer.folder / "curves.png"
    drawn = path.read_bytes()
    path.unlink()
    capsys.readouterr()
    assert main(["curves", str(trainer.folder)]) == 0
    assert only_line(capsys.readouterr().out) == str(path)
    assert path.read_bytes() == drawn


def test_command_refuses_what_is_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curves", str(tmp_path)]) == 2
    line = only_line(capsys.readouterr().err)
    assert line == f"emax curves: error: there are no epochs in {tmp_path / 'log.jsonl'}"
    (tmp_path / "log.jsonl").write_text("no log\n")
    assert main(["curves", str(tmp_path)]) == 2
    assert only_line(capsys.readouterr().err).startswith("emax curves: error: ")
    assert files_in(tmp_path) == {"log.jsonl"}


def test_run_without_matplotlib_says_how_to_get_the_curves(
    trainer_for: MakeTrainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trainer = trainer_for(epochs=1)
    trainer.run()
    found = capsys.readouterr()
    assert found.err.splitlines()[-1] == (
        "curves.png needs the package matplotlib: pip install 'emax-timm[viz]', "
        f"then emax curves {trainer.folder}"
    )
    assert found.out.splitlines()[-1].startswith(str(trainer.folder / "model.safetensors"))
    assert (trainer.folder / "summary.json").exists()
    assert not (trainer.folder / "curves.png").exists()
    assert main(["curves", str(trainer.folder)]) == 2
    assert "emax-timm[viz]" in only_line(capsys.readouterr().err)
