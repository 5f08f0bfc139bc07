"""`emax compare`: the report on hand-made results, merging, refusals, and all of it at once."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreters import ENVIRONMENT
from study_testing import result_of, write_results_of, write_study
from tiers import mostly_slow
from training_testing import only_line

from emax_timm.compare.command import compare
from emax_timm.compare.costs import COSTS, cost_table
from emax_timm.compare.results import RESULT
from emax_timm.compare.run import JOB, PROCESSOR
from emax_timm.compare.statistics import unpaired
from emax_timm.compare.study import read_study
from emax_timm.compare.workers import Process, Workers, cores
from emax_timm.runner import FailedRunError
from emax_timm.training.signals import Stop

# Differences of emax to none: 1, 2, 3, 2; to se: 1, 1, 1, 2.
TOP1 = {
    **{("none", seed): value for seed, value in enumerate((50.0, 51.0, 52.0, 53.0))},
    **{("se", seed): value for seed, value in enumerate((50.0, 52.0, 54.0, 53.0))},
    **{("emax", seed): value for seed, value in enumerate((51.0, 53.0, 55.0, 55.0))},
    ("emax_finest", 0): 52.0,
    ("emax_finest", 1): 52.5,
}


def reported(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert compare([str(path), "--output", str(folder), "--report"]) == 0
    return capsys.readouterr().out


def test_report_has_the_declared_comparison_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "runs", TOP1)
    text = reported(path, tmp_path / "runs", capsys)
    assert (tmp_path / "runs" / "small" / "report.md").read_text() == text.rstrip("\n") + "\n"
    lines = text.splitlines()
    primary = lines.index("## Primary comparison")
    assert primary < lines.index("## tiny")
    assert lines[primary + 2].startswith(
        "Declared before the first run: top-1 (%) of emax against none and against se, on tiny, "
        "over 4 seeds"
    )
    # By hand: means 2 and 1.25, deviations 0.816 and 0.5, t(3) 3.182; p 0.0163 and 0.0154, of
    # which the smaller one counts twice, and the other not less than it.
    assert "| none | 4 | +2.00 | +0.70 to +3.30 | 0.031 |" in lines
    assert "| se | 4 | +1.25 | +0.45 to +2.05 | 0.031 |" in lines
    assert "not complete" not in text
    # The table of methods: a correction over the three methods of a column.
    (row,) = [line for line in lines if line.startswith("| emax | 4 |") and " ± 1.91 |" in line]
    assert row.startswith("| emax | 4 | 53.50 ± 1.91 | +2.00 ± 1.30 (")
    (row,) = [line for line in lines if line.startswith("| emax_finest | 2 | 52.25")]
    assert "| +1.75 ± 3.18 (" in row  # over the two seeds that both have
    assert "| emax | 1.235 | 2.0 | 100.0 | 400.0 | 1000.0 | 1.0 | 55.0 |" in lines
    assert "| emax | 48.50 ± 1.91 (+2.00 ± 1.30) | 90.00 ± 0.00 (+0.00 ± 0.00) |" in lines
    plot = (tmp_path / "runs" / "small" / "tiny.svg").read_text()
    assert all(f">{method}</text>" in plot for method in ("none", "se", "emax", "emax_finest"))


def test_plot_has_the_range_of_the_methods_that_are_paired(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_another(study: dict[str, Any]) -> None:
        study["methods"]["other"] = {"model": "test_vit"}

    path = write_study(tmp_path, with_another)
    apart = {("other", 0): 10.0, ("other", 1): 12.0}
    write_results_of(path, tmp_path / "runs", TOP1 | apart)
    reported(path, tmp_path / "runs", capsys)
    plot = (tmp_path / "runs" / "small" / "tiny.svg").read_text()
    assert ">other: 11.00</text>" in plot
    assert ">emax</text>" in plot
    numbers = [float(value) for value in re.findall(r">([0-9.]+)</text>", plot)]
    accuracies = [value for value in numbers if value > 5]  # 400 images/s are 2.5 ms
    assert min(accuracies) > 45


def test_summary_is_written_into_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, page = write_study(tmp_path), tmp_path / "results.md"
    write_results_of(path, tmp_path / "runs", TOP1)
    page.write_text("Before\n<!-- compare other: begin -->\n")
    refused = refusal(path, tmp_path / "runs", capsys, "--report", "--write", str(page))
    assert "<!-- compare small: begin -->" in refused
    assert not (tmp_path / "runs" / "small" / "report.md").exists()
    page.write_text(
        "Before\n<!-- compare small: begin -->\nold\n<!-- compare small: end -->\nAfter"
    )
    options = ["--output", str(tmp_path / "runs"), "--report", "--write", str(page)]
    assert compare([str(path), *options]) == 0
    first, *lines, last = page.read_text().splitlines()
    assert (first, last) == ("Before", "After")
    reported = capsys.readouterr().out.splitlines()
    assert "| none | 4 | +2.00 | +0.70 to +3.30 | 0.031 |" in lines
    assert all(line in reported for line in lines[1:-1])
    assert "old" not in lines
    assert "## Primary comparison" not in lines


def test_measured_speeds_replace_those_of_the_runs_once_all_methods_have_them(
    tmp_path: Path,
) -> None:
    study = read_study(str(write_study(tmp_path)))
    results = {("tiny", *key): result_of(study, *key, value) for key, value in TOP1.items()}
    times = {"batch": 8, "inference_batch": 10, "training_seconds": [4.0, 0.4, 0.2]}
    cells = {cell.hash: {**times, "inference_seconds": [0.2, 0.1, 9.0]} for cell in study.cells}
    facts = {"device": "cpu", "machine": "m", "load": 0.1, "date": "2026-02-03T04:05:06"}
    *lines, source = cost_table(study, results, {**facts, "cells": cells}, "tiny")
    assert "| emax | 1.235 | 2.0 | 20.0 | 50.0 | 1000.0 | 1.0 | 55.0 |" in lines
    assert "without loading data, on cpu (m, load 0.1 beforehand) on 2026-02-03." in source
    cells.pop(study.cells[0].hash)
    *lines, source = cost_table(study, results, {**facts, "cells": cells}, "tiny")
    assert "| emax | 1.235 | 2.0 | 100.0 | 400.0 | 1000.0 | 1.0 | 55.0 |" in lines
    assert "`emax compare --measure` measures all methods in turns." in source
    assert "several machines" not in source
    results["tiny", "emax", 0]["machine"] = "another"
    first, _, *lines, source = cost_table(study, results, {}, "tiny")
    assert "minutes a run" not in first
    assert "| emax | 1.235 | 2.0 | 100.0 | 400.0 | 1000.0 | 55.0 |" in lines
    assert "on several machines, so their times do not compare" in source


@pytest.mark.slow
def test_speeds_are_measured_for_the_report(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("emax_timm.compare.costs.ROUNDS", 2)
    path = write_study(tmp_path, two_methods, data_dir=str(images))
    study = write_results_of(path, tmp_path / "runs", {("none", 0): 50.0, ("emax", 0): 51.0})
    before = torch.get_num_threads(), cores()
    options = ["--output", str(tmp_path / "runs"), "--device", "cpu", "--measure"]
    assert compare([str(path), *options]) == 0
    assert (torch.get_num_threads(), cores()) == before
    assert "medians of the networks measured in turns" in capsys.readouterr().out
    folder = tmp_path / "runs" / "small"
    found = json.loads((folder / COSTS).read_text())
    assert found["cells"].keys() == {cell.hash for cell in study.cells}
    for cell in found["cells"].values():
        assert (cell["batch"], cell["inference_batch"]) == (8, 8)
        times = cell["training_seconds"] + cell["inference_seconds"]
        assert len(times) == 4
        assert min(times) > 0
    assert not list(folder.rglob("*.safetensors"))


@pytest.mark.slow
def test_report_says_what_is_missing_and_names_what_diverged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    some = {key: value for key, value in TOP1.items() if key[1] < 2 and key[0] != "se"}
    write_results_of(path, tmp_path / "runs", some, diverged="the loss is not finite")
    text = reported(path, tmp_path / "runs", capsys)
    assert "| se | 0 | no common seed yet |  |  |" in text
    assert "**It is not complete" in text
    assert "6 of 14 runs" in text
    assert "- tiny/emax, seed 1: the loss is not finite" in text


def test_p_values_are_corrected_for_the_comparisons_that_lack_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    results, part = [], {key: value for key, value in TOP1.items() if key[0] != "se"}
    for name, values in (("whole", TOP1), ("part", part)):
        write_results_of(path, tmp_path / name, values)
        lines = reported(path, tmp_path / name, capsys).splitlines()
        results.append([line.split(" | ")[-1] for line in lines if line.startswith("| none | 4 |")])
    # With three degrees of freedom the p-value is 0.0163 for none and 0.0154 for SE.
    assert [found[0] for found in results] == ["0.031 |", "0.033 |"]


def test_report_does_without_a_commit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As outside a checkout, where the package was installed."""
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "runs", TOP1, commit=None)
    assert "- commits: unknown" in reported(path, tmp_path / "runs", capsys).splitlines()


def test_loss_that_is_not_finite_has_no_interval(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    bad = {"top1": 10.0, "top5": 50.0, "loss": math.nan}
    write_results_of(path, tmp_path / "runs", {("none", 0): 50.0, ("none", 1): 51.0})
    some = {("emax", 0): 10.0, ("emax", 1): 10.0}
    write_results_of(path, tmp_path / "runs", some, test=bad, diverged="the loss is not finite")
    lines = reported(path, tmp_path / "runs", capsys).splitlines()
    assert "| emax | 2 | nan | +nan |" in lines
    assert "- tiny/emax, seed 1: the loss is not finite" in lines
    assert unpaired([math.inf, 1.0], [1.0, 2.0])[1:3] == (None, None)


def test_report_shows_the_tuned_values_and_compare_refuses_to_do_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tuned.yaml").write_text("tiny/emx: {lr: 0.1}\ntiny/none: {lr: 0.2}\ntiny/se:\n")
    path = write_study(tmp_path, lambda study: study.update(tuned="tuned.yaml"))
    message = refusal(path, tmp_path / "runs", capsys)
    assert "tuned.yaml has no values for tiny/emax; run emax tune" in message
    assert not (tmp_path / "runs" / "small" / "tiny").exists()
    write_results_of(path, tmp_path / "runs", {("none", 0): 50.0})
    assert re.search(
        r"\| tiny/none \| \w+ \| lr: 0.2 \|", reported(path, tmp_path / "runs", capsys)
    )


def refusal(path: Path, folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert compare([str(path), "--output", str(folder), *more]) == 2
    return only_line(capsys.readouterr().err)


OTHER_STUDIES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "recipe": (lambda s: s["recipe"].update(lr=0.1), "was made with another configuration"),
    "method": (lambda s: s["methods"].pop("emax_finest"), "holds another study's runs: tiny/"),
    "fewer seeds": (lambda s: s.update(seeds=[0, 1]), "holds another study's runs: tiny/"),
    "more seeds": (lambda s: s["seeds"].append(4), "was started with seeds [0, 1, 2, 3], not"),
    "primary": (lambda s: s["primary"].update(metric="loss"), "was started with primary {"),
}


@pytest.mark.parametrize("case", mostly_slow(OTHER_STUDIES, 0))
def test_folder_with_other_runs_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "runs", TOP1)
    reported(path, tmp_path / "runs", capsys)
    change, message = OTHER_STUDIES[case]
    other = write_study(tmp_path, change, "other.yaml")
    assert message in refusal(other, tmp_path / "runs", capsys)


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "missing": (lambda r: r.pop("machine"), "machine cannot be nothing"),
    "text": (lambda r: r.update(seconds="60"), "seconds cannot be '60'"),
    "no test": (lambda r: r.update(test=None), "test cannot be None"),
    "metric": (lambda r: r["test"].pop("top1"), "test or slices lack a number"),
    "slice": (lambda r: r["slices"].update(small={}), "test or slices lack a number"),
    "date": (lambda r: r.update(date="yesterday"), "date cannot be 'yesterday'"),
    "seed": (lambda r: r.update(seed=3), "is of seed 3, and its folder is of seed 0"),
}


@pytest.mark.parametrize("case", mostly_slow(DAMAGE, 0, 6))
def test_damaged_result_is_refused(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "runs", TOP1)
    result = tmp_path / "runs" / "small" / "tiny" / "emax" / "seed-0" / RESULT
    content = json.loads(result.read_text())
    DAMAGE[case][0](content)
    result.write_text(json.dumps(content))
    message = refusal(path, tmp_path / "runs", capsys, "--report")
    assert str(result) in message
    assert DAMAGE[case][1] in message


def test_run_that_failed_before_it_trained_does_not_bind_the_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "runs", {("none", 0): 50.0, ("se", 0): 51.0})
    failed = tmp_path / "runs" / "small" / "tiny" / "emax" / "seed-0"
    failed.mkdir(parents=True)
    (failed / JOB).write_text(json.dumps({"hash": "of what was wrong", "seed": 0}))
    assert "2 of 14 runs" in reported(path, tmp_path / "runs", capsys)
    (failed / "checkpoints").mkdir()
    assert "was made with another configuration" in refusal(path, tmp_path / "runs", capsys)


@pytest.mark.parametrize(
    ("date", "said"),
    [
        ("2025-12-31T00:00:00+00:00", "Declared before the first run"),
        ("2026-01-02T12:00:00+00:00", "Declared on 2026-01-02, when 8 of the runs had been made"),
        (None, "Declared in the study file"),
    ],
)
def test_report_says_when_its_comparison_was_declared(
    date: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "runs", TOP1)  # two seeds of four methods by that day
    declared = tmp_path / "runs" / "small" / "declared.json"
    content = json.loads(declared.read_text())
    declared.write_text(json.dumps({**content, "date": date}))
    assert f"\n{said}: top-1 (%)" in reported(path, tmp_path / "runs", capsys)


def test_slices_of_other_images_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "runs", {("none", 0): 50.0})
    other = {"huge": {"images": 3, "top1": 90.0}}
    write_results_of(path, tmp_path / "runs", {("se", 0): 51.0}, slices=other)
    text = reported(path, tmp_path / "runs", capsys)
    (_, table) = text.split("top-1 (%) by slice", 1)
    assert table.startswith(" (images) | small (10) | large (5) |")
    assert [line.split(" | ")[0] for line in table.splitlines()[2:4]] == ["| none", ""]


@pytest.mark.slow
def test_a_further_method_is_no_other_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "runs", TOP1)
    reported(path, tmp_path / "runs", capsys)
    more = write_study(tmp_path, lambda s: s["methods"].update(eca={"attention": "eca"}))
    assert "14 of 18 runs" in reported(more, tmp_path / "runs", capsys)


@pytest.mark.slow
def test_results_of_several_machines_are_merged_by_hash(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    parts = [{k: v for k, v in TOP1.items() if k[1] % 2 == odd} for odd in (0, 1)]
    for number, part in enumerate(parts):
        write_results_of(path, tmp_path / f"machine{number}", part)
    write_results_of(path, tmp_path / "whole", TOP1)
    folders = [str(tmp_path / f"machine{number}" / "small") for number in (0, 1)]
    # The names of the other study do not matter.
    renamed = write_study(tmp_path, lambda s: s.update(name="merged"), "renamed.yaml")
    options = ["--output", str(tmp_path / "runs"), "--merge", *folders]
    assert compare([str(renamed), *options]) == 0
    merged = capsys.readouterr().out.splitlines()
    assert merged[0] == f"14 results copied into {tmp_path / 'runs' / 'merged'}"
    whole = reported(path, tmp_path / "whole", capsys).splitlines()
    rows = [[line for line in text if line.startswith("| ")] for text in (merged, whole)]
    assert rows[0] == rows[1]

    other = write_study(tmp_path, lambda s: s["recipe"].update(lr=0.1), "other.yaml")
    message = refusal(other, tmp_path / "new", capsys, "--merge", folders[0])
    assert "holds no result of a run that" in message
    twice = {key: value + 1 for key, value in parts[0].items()}
    write_results_of(path, tmp_path / "again", twice)
    again = str(tmp_path / "again" / "small")
    message = refusal(path, tmp_path / "new", capsys, "--merge", folders[0], again)
    assert "are of the same run, and differ" in message
    assert not list((tmp_path / "new").rglob(RESULT))


def test_one_configuration_of_two_backbones_is_merged_into_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "one", TOP1)

    def twice(study: dict[str, Any]) -> None:
        study["name"] = "two"
        study["backbones"]["same"] = study["backbones"]["tiny"]

    two = write_study(tmp_path, twice, "two.yaml")
    options = ["--output", str(tmp_path / "runs"), "--merge", str(tmp_path / "one" / "small")]
    assert compare([str(two), *options]) == 0
    assert "28 results copied" in capsys.readouterr().out
    for backbone in ("tiny", "same"):
        assert len(list((tmp_path / "runs" / "two" / backbone).rglob(RESULT))) == 14


def test_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path)
    write_results_of(path, tmp_path / "runs", TOP1)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert compare([str(path), "--output", str(tmp_path / "runs"), "--report"]) == 1
    assert only_line(capsys.readouterr().err).endswith("report.md: the disk is full")


def test_command_line_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path)
    assert compare([]) == 2
    assert "give a study file" in only_line(capsys.readouterr().err)
    assert "there is no config file" in refusal(tmp_path / "x.yaml", tmp_path, capsys)
    assert "nothing to report" in refusal(path, tmp_path / "runs", capsys, "--report")
    assert not list((tmp_path / "runs").rglob("*.json"))
    for two in (["--merge", "x", "--measure"], ["--report", "--grouping", "emax"]):
        assert "are two things" in refusal(path, tmp_path / "runs", capsys, *two)
    jobs = str(len(cores()) + 1)
    message = refusal(path, tmp_path / "runs", capsys, "--jobs", jobs, "--device", "cpu")
    assert f"there are {len(cores())}" in message
    assert not list((tmp_path / "runs").rglob("*.json"))


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"train_split": "nope"}, [], "tiny/emax: "),
        ({}, ["--data-dir", "other"], "the data of the study file are in a folder images, and"),
    ],
)
def test_data_are_opened_before_the_first_run(
    change: dict[str, str],
    options: list[str],
    message: str,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = write_study(
        tmp_path, lambda s: s["methods"]["emax"].update(recipe=change), data_dir=str(images)
    )
    message = message.replace("images", images.name)
    assert message in refusal(path, tmp_path / "runs", capsys, *options)
    assert not list((tmp_path / "runs").rglob("*.json"))


def two_methods(study: dict[str, Any]) -> None:
    study["methods"] = {"none": {}, "emax": {"attention": "emax"}}
    study["references"] = study["primary"]["against"] = ["none"]
    study["seeds"] = [0, 1]


def command(path: Path, folder: Path) -> list[str]:
    main = "import sys; from emax_cli import main; sys.exit(main(sys.argv[1:]))"
    options = ["--output", str(folder), "--device", "cpu"]
    return [sys.executable, "-c", main, "compare", str(path), *options]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_study_that_is_stopped_and_killed_ends_as_one_that_is_not(
    images: Path, tmp_path: Path
) -> None:
    """The runs are processes on their own cores; weights and results are bitwise the same."""
    path = write_study(tmp_path, two_methods, data_dir=str(images), epochs=12, recovery_interval=1)

    def run(folder: Path) -> subprocess.Popen:
        return subprocess.Popen(command(path, folder), env=ENVIRONMENT, stdout=subprocess.DEVNULL)

    def wait_for(folder: Path, pattern: str) -> None:
        for _ in range(6000):
            if list(folder.glob(pattern)):
                return
            time.sleep(0.05)
        raise AssertionError(f"no {pattern} in {folder}")

    assert run(tmp_path / "whole").wait(600) == 0
    for number, seed in ((signal.SIGTERM, 0), (signal.SIGKILL, 1)):
        process = run(tmp_path / "stopped")
        wait_for(tmp_path / "stopped", f"small/tiny/*/seed-{seed}/checkpoints/epoch-*")
        process.send_signal(number)
        assert process.wait(200) == (143 if number == signal.SIGTERM else -number)
    for _ in range(200):  # the processes of the killed one end by themselves
        if run(tmp_path / "stopped").wait(600) == 0:
            break
        time.sleep(0.5)
    for whole in (tmp_path / "whole" / "small").glob("tiny/*/*"):
        other = tmp_path / "stopped" / "small" / whole.relative_to(tmp_path / "whole" / "small")
        assert (whole / "model.safetensors").read_bytes() == (
            other / "model.safetensors"
        ).read_bytes()
        found = [json.loads((folder / RESULT).read_text()) for folder in (whole, other)]
        assert found[0]["test"] == found[1]["test"]
        assert found[0]["core"] in cores()
        assert min(content["processor_seconds"] for content in found) > 1
    assert list((tmp_path / "stopped").rglob(PROCESSOR))
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "whole").rglob(RESULT)}
    assert len(times) == 4
    assert run(tmp_path / "whole").wait(600) == 0
    assert {p: p.stat().st_mtime_ns for p in times} == times


@pytest.mark.slow
def test_run_that_fails_is_named_with_its_last_words(tmp_path: Path, images: Path) -> None:
    path = write_study(tmp_path, two_methods, data_dir=str(images))
    folder = tmp_path / "runs"
    environment = {**ENVIRONMENT, "EMAX_BACKEND": "triton"}
    done = subprocess.run(
        command(path, folder), env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 1
    assert "emax/seed-0 failed: " in only_line(done.stderr)


def test_run_that_is_killed_is_named_with_the_signal(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    process.kill()
    process.wait()
    (tmp_path / "log.txt").write_text("epoch 1\n")
    workers = Workers([None], Stop())
    workers.running[tmp_path / "seed-0"] = Process(process, None, tmp_path / "log.txt")
    with pytest.raises(FailedRunError, match=r"seed-0 was killed by SIGKILL \(no memory left\?\)"):
        workers.ended()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="cores are pinned on Linux alone")
def test_cores_are_those_that_this_process_may_use() -> None:
    assert set(cores()) == os.sched_getaffinity(0)
