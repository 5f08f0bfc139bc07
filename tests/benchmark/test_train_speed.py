"""The comparison of our training loop with timm's does what it says; its figures are not tested."""

import json
from pathlib import Path

import pytest
from training_testing import image_folder, run_program

from emax_timm.benchmark import train_speed


def test_both_loops_train_on_as_much(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")  # 32 for training
    options = ["--data-dir", images, "-b", "8", "--epochs", "2", "--model", "test_resnet"]
    module = ["-m", "emax_timm.benchmark.train_speed"]
    result = run_program(*module, *options, "--json", "speed.json", cwd=tmp_path)
    assert result.status == 0, result.stderr
    found = json.loads((tmp_path / "speed.json").read_text())
    assert list(found["loops"]) == list(train_speed.NAMES)
    for row in found["loops"].values():
        assert (row["steps"], row["images"]) == (2 * 4, 2 * 32)
        parts = row["data_wait_per_step"], row["compute_per_step"]
        assert 0 < min(parts) < sum(parts) < 2 * row["seconds_per_step"]
    assert len(found["ratios"]) == len(found["cpu_ratios"]) == 2
    lines = result.stdout.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == list(train_speed.NAMES)
    assert len({len(line) for line in lines[:4]}) == 1
    low, high = sorted(found["ratios"])
    assert f"{(low + high) / 2:.3f} ({low:.3f} to {high:.3f})" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"images", "speed.json"}


def test_mistakes_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_speed.train_speed(["--model", "resnet_emax"]) == 2
    assert "resnet_emax" in capsys.readouterr().err
    assert train_speed.train_speed(["--data-dir", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
