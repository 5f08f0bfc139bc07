"""`emax benchmark startup` measures what it says; its figures are not tested."""

import json
from pathlib import Path

import pytest

from emax_timm.benchmark import startup
from emax_timm.benchmark.command import benchmark


@pytest.mark.slow
def test_imports_and_creations_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "startup.json"
    options = ["--models", "test_resnet", "--rounds", "1", "--json", str(file)]
    assert benchmark(["startup", *options]) == 0
    found = json.loads(file.read_text())
    assert list(found["imports"]) == ["timm", "emax_timm"]
    assert list(found["creations"]) == ["test_resnet", "test_resnet_emax"]
    theirs, ours = (found["creations"][name][0] for name in found["creations"])
    assert 0 < theirs < found["imports"]["timm"][0]
    line = f"| create test_resnet_emax / create test_resnet | 1.50 | {ours / theirs:.2f} |"
    assert line in capsys.readouterr().out


def test_bounds_are_judged() -> None:
    found = {
        "machine": {},
        "rounds": 1,
        "imports": {"timm": [2.0] * 3, "emax_timm": [2.4] * 3},
        "creations": {"resnet50": [0.2] * 3, "resnet50_emax": [0.3] * 3},
    }
    lines = startup.report_startup(found).splitlines()
    verdicts = [line for line in lines if line.endswith(("| holds |", "| missed |"))]
    assert verdicts == [
        "| import emax_timm - import timm, seconds | 0.30 | 0.40 | missed |",
        "| create resnet50_emax / create resnet50 | 1.50 | 1.50 | holds |",
    ]


def test_a_network_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["startup", "--models", "resnet19"]) == 2
    assert "no model resnet19" in capsys.readouterr().err
