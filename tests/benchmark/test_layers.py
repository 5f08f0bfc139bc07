"""`emax benchmark modules` measures what it says; its figures are not tested."""

import json
from pathlib import Path

import pytest

from emax_timm.benchmark.command import benchmark
from emax_timm.benchmark.layers import LAYERS
from emax_timm.benchmark.timing import Measured, mean_ratio
from emax_timm.ops.cpp import library


def test_all_layers_are_measured_on_all_shapes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "modules.json"
    shapes = ["1x8x4x4", "2x16x3x5"]
    options = ["--systems", *LAYERS, "--shapes", *shapes, "--rounds", "2", "--json", str(file)]
    assert benchmark(["modules", *options]) == 0
    found = json.loads(file.read_text())
    for times in found["times"].values():
        assert list(times) == list(LAYERS)
        for measured in times.values():
            assert len(measured) == 2
            assert all(0 < low <= median <= high for median, low, high in measured)
    assert all(ratio >= 1 for name in ("EMAX", "SE") for ratio in found["saved"][name])
    printed = capsys.readouterr().out
    bound = next(
        line for line in printed.splitlines() if line.startswith("| forward: EMAX / naive")
    )
    ours, naive = (
        [Measured(*one) for one in found["times"]["forward"][name]]
        for name in ("EMAX", "naive EMAX")
    )
    assert f"| 0.50 | {mean_ratio(ours, naive):.2f} |" in bound
    assert bound.endswith(("| holds |", "| missed |"))


@pytest.mark.parametrize(
    "options", [["--shapes", "8x8"], ["--systems", "SENet"], ["--rounds", "0"], ["--dtype", "int8"]]
)
def test_mistakes_are_refused(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["modules", *options]) == 2
    assert options[-1] in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["modules", "--device", "cuda:99"]) == 2
    assert capsys.readouterr().err.startswith("emax benchmark: error: ")


def test_kernels_that_are_not_built_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMAX_KERNELS_DIR", str(tmp_path))
    monkeypatch.setattr(library, "_problem", library._NOT_TRIED)
    options = ["--systems", "EMAX, C++", "--shapes", "1x8x4x4", "--rounds", "1"]
    assert benchmark(["modules", *options]) == 2
    assert "run `emax kernels build`" in capsys.readouterr().err


@pytest.mark.parametrize(("dims", "shape"), [(1, "2x8x5"), (3, "1x8x2x3x3")])
def test_sequences_and_videos_are_measured(dims: int, shape: str, tmp_path: Path) -> None:
    file, page = tmp_path / "modules.json", tmp_path / "page.md"
    mark = f"benchmark modules --dims {dims}"
    page.write_text(f"<!-- {mark}: begin -->\n<!-- {mark}: end -->\n")
    words = ["--dims", str(dims), "--shapes", shape, "--rounds", "1"]
    assert benchmark(["modules", *words, "--json", str(file), "--write", str(page)]) == 0
    found = json.loads(file.read_text())
    for times in found["times"].values():
        assert list(times) == ["copy", "naive EMAX", "EMAX", "SE"]
    assert "| EMAX | " in page.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--dims", "4"], "invalid choice: 4"),
        (["--dims", "1", "--shapes", "1x8x4x4"], "--dims 1 takes shapes of 3 sizes, not 1x8x4x4"),
        (["--dims", "3", "--methods", "CBAM"], "--dims 3 measures copy; naive EMAX; EMAX; SE"),
        (["--dims", "3", "--methods", "EMAX, C++"], "EMAX, C++"),
        (["--dims", "1", "--channels-last"], "a memory format of images"),
    ],
    ids=str,
)
def test_what_sequences_and_videos_lack_is_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark(["modules", "--rounds", "1", *options]) == 2
    assert message in capsys.readouterr().err
