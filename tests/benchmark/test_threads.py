"""`emax benchmark threads` measures what it says; its figures are not tested."""

import io
import json
from pathlib import Path

import pytest

from emax_timm.benchmark import threads
from emax_timm.benchmark.command import benchmark


@pytest.mark.slow
def test_policies_are_measured_with_and_without_a_busy_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "threads.json"
    assert benchmark(["threads", "--steps", "1", "--rounds", "1", "--json", str(file)]) == 0
    times = json.loads(file.read_text())["times"]
    assert list(times) == list(threads.POLICIES)
    for by_other in times.values():
        assert list(by_other) == list(threads.OTHERS)
        assert all(seconds[0] > 0 for seconds in by_other.values())
    assert "| threads sleep (`OMP_WAIT_POLICY=passive`) | " in capsys.readouterr().out


def test_a_turn_is_as_many_steps_as_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("1\n2\n"))
    threads.serve()
    ready, *seconds = capsys.readouterr().out.splitlines()
    assert ready == ""
    assert len(seconds) == 2
    assert all(float(value) > 0 for value in seconds)


def test_ratios_are_of_the_medians() -> None:
    times = dict(zip(threads.OTHERS, ([0.2, 0.1, 0.3], [0.5, 0.4, 0.6]), strict=True))
    found = {
        **{"machine": {}, "cores": 2, "steps": 5, "rounds": 3, "load": [None, 1.25]},
        "times": dict.fromkeys(threads.POLICIES, times),
    }
    report = threads.report_threads(found)
    assert report.count("| 200 (100-300) | 500 (400-600) | 2.50 |\n") == len(threads.POLICIES)
    assert "their load before and after unknown and 1.2." in report
