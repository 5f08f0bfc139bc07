"""`emax benchmark growth` fits what it measures; its figures are not tested."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from emax_timm.benchmark.command import benchmark
from emax_timm.benchmark.growth import exponent
from emax_timm.tables import marks

SMALL = ["growth", "--shape", "2x16x4x6", "--factor", "4", "--steps", "1", "--rounds", "1"]


def test_exponents_are_those_of_numpy() -> None:
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx((2, 0))
    sizes, costs = np.array([1.0, 2, 4, 8, 16]), np.array([1.0, 1.5, 5, 9, 20])
    (slope, _), covariance = np.polyfit(np.log(sizes), np.log(costs), 1, cov=True)
    fitted = exponent(sizes.tolist(), costs.tolist())
    assert fitted == pytest.approx((slope, math.sqrt(covariance[0, 0])))


@pytest.mark.slow
def test_every_axis_is_measured_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plot = tmp_path / "growth.json", tmp_path / "pictures" / "growth.svg"
    plot.parent.mkdir()
    page = tmp_path / "page.md"
    page.write_text("{}\n{}\n".format(*marks("benchmark growth")))
    options = ["--methods", "EMAX", "SE", "--json", str(file), "--plot", str(plot)]
    options += ["--write", str(page)]
    assert benchmark([*SMALL, *options]) == 0
    axes = json.loads(file.read_text())["axes"]
    assert {axis: series["sizes"] for axis, series in axes.items()} == {
        "channels": [8, 16, 32],
        "side": [2, 4, 8],
        "batch": [1, 2, 4],
        "factor": [2, 4, 8],
    }
    assert all(set(axis["costs"]) == set(axes["side"]["costs"]) for axis in axes.values())
    for what, costs in axes["factor"]["costs"].items():
        assert list(costs) == ["EMAX"], what
    # What SE keeps grows as x with the batch.
    kept = axes["batch"]["costs"]["saved activations"]["SE"]
    assert kept[1] / kept[0] == kept[2] / kept[1] == 2
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| SE |"))
    assert row.endswith("| - |")
    assert "](pictures/growth.svg)\n" in page.read_text()
    text = plot.read_text()
    assert text.count("SE: ") == 3 * 3
    assert text.count("EMAX: ") == 3 * 4


def test_a_layer_that_keeps_nothing_has_no_exponent(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark([*SMALL, "--methods", "copy"]) == 0
    assert "| copy | - | - | - |\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shape", "2x16x4x7"], "width 7 cannot be halved"),
        (["--factor", "16"], "channels do not have"),
    ],
)
def test_bases_without_a_series_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark([*SMALL, *options]) == 2
    assert message in capsys.readouterr().err


def test_a_plot_without_matplotlib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot = tmp_path / "growth.svg"
    assert benchmark([*SMALL, "--plot", str(plot)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'emax-timm[viz]'" in error
    assert error.count("\n") == 1
    assert not plot.exists()
