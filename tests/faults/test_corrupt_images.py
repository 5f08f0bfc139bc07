"""Runs on folders with corrupt images: rows 12 and 13 of the faults."""

import re
import shutil
from pathlib import Path

import pytest
from faults_testing import RUN, assert_same_run
from interpreters import Interpreter
from tiers import mostly_slow
from training_testing import (
    SMALL,
    TRAIN,
    VALIDATE,
    rows_without_seconds,
    run_on_two_ranks,
    state_of,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(images: Path, tmp_path: Path) -> Path:
    """A copy of the images to break some of."""
    return Path(shutil.copytree(images, tmp_path / "images"))


def break_images(folder: Path, count: int, split: str = "train") -> list[Path]:
    """Break some images of a split, each in another way."""
    paths = sorted((folder / split).glob("*/*.*"))[::4][:count]
    for number, path in enumerate(paths):
        data = path.read_bytes()
        path.write_bytes([data[: len(data) // 2], b"", b"<html></html>"][number % 3])
    return paths


def skipped(stderr: str) -> set[str]:
    lines = [line for line in stderr.splitlines() if line.startswith("skipped corrupt image ")]
    return {line.removeprefix("skipped corrupt image ").split(": ")[0] for line in lines}


@pytest.mark.slow
def test_training_skips_and_counts_a_corrupt_image_whatever_the_workers(
    programs: Interpreter, folder: Path, tmp_path: Path
) -> None:
    [path] = break_images(folder, 1)
    runs = []
    for workers in (0, 2):
        cwd = tmp_path / str(workers)
        cwd.mkdir()
        options = ["-j", str(workers), "--max-broken-fraction", "0.1"]
        result = programs.run(TRAIN, folder, *RUN, *options, cwd=cwd)
        assert result.status == 0, result.stderr
        assert skipped(result.stderr) == {str(path)}
        assert result.stderr.count("skipped") == 1
        assert result.stdout.count("corrupt images: 1") == 3
        runs.append(cwd / "run")
        assert [row["broken"] for row in rows_without_seconds(runs[-1] / "log.jsonl")] == [1] * 3
    assert_same_run(*runs)


@pytest.mark.parametrize("workers", mostly_slow([0, 2]))
def test_too_many_corrupt_images_stop_the_run_and_mended_ones_let_it_continue(
    programs: Interpreter, images: Path, folder: Path, tmp_path: Path, workers: int
) -> None:
    paths = break_images(folder, 5)
    argv = [folder, *RUN, "-j", str(workers), "--max-broken-fraction", "0.1"]
    result = programs.run(TRAIN, *argv, cwd=tmp_path)
    assert result.status == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("train.py: error: ")
    assert "of 32 training images are corrupt" in last
    assert "more than --max-broken-fraction 0.1" in last
    assert "Traceback" not in result.stderr
    assert skipped(result.stderr) <= set(map(str, paths))
    step = state_of(tmp_path / "run")["step"]
    assert 0 < step < 4
    again = programs.run(TRAIN, *argv, cwd=tmp_path)
    assert (again.status, again.stderr.splitlines()[-1]) == (1, last)
    for path in paths:
        shutil.copy(images / path.relative_to(folder), path)
    assert programs.run(TRAIN, *argv, cwd=tmp_path).status == 0


@pytest.mark.slow
def test_run_that_continues_has_counted_the_corrupt_images_before(
    programs: Interpreter, folder: Path, tmp_path: Path
) -> None:
    break_images(folder, 4)
    runs = []
    for fraction in ("0.2", "0.06"):
        cwd = tmp_path / fraction
        cwd.mkdir()
        argv = [folder, *RUN, "-j", "2", "--max-broken-fraction"]
        status = programs.run(TRAIN, *argv, fraction, cwd=cwd).status
        assert status == (fraction == "0.06")
        if status:  # in the middle of an epoch, before the step with the second
            assert state_of(cwd / "run")["broken"] == 1
        assert programs.run(TRAIN, *argv, "0.2", cwd=cwd).status == 0
        runs.append(cwd / "run")
    assert_same_run(*runs)


@pytest.mark.slow
def test_too_many_corrupt_images_stop_all_ranks(folder: Path, tmp_path: Path) -> None:
    break_images(folder, 5)
    argv = [ROOT / TRAIN, folder, *RUN, "--max-broken-fraction", "0.1"]
    result = run_on_two_ranks(*argv, cwd=tmp_path)
    assert result.status == 1
    # torchrun may end a rank before its line, so one will do; but they must agree.
    errors = re.findall(r"^train\.py.*: error: (.*)", result.stderr, re.MULTILINE)
    assert "of 32 training images are corrupt by step" in errors[0]
    assert len(set(errors)) == 1
    assert state_of(tmp_path / "run")["epoch"] == 0


@pytest.mark.slow
def test_corrupt_validation_image_is_an_error_that_names_it(
    programs: Interpreter, images: Path, folder: Path, tmp_path: Path
) -> None:
    [path] = break_images(folder, 1, "validation")
    argv = [folder, *SMALL, "--epochs", "1", "--output", ".", "--experiment", "run"]
    result = programs.run(TRAIN, *argv, "--resume", "auto", cwd=tmp_path)
    assert result.status == 1
    error = f"error: corrupt image {path}: "
    assert result.stderr.splitlines()[-1].startswith(f"train.py: {error}")
    assert "Traceback" not in result.stderr
    # The epoch before the validation is not lost.
    assert state_of(tmp_path / "run")["step"] == 4
    last = ["--checkpoint", "run/last.safetensors"]
    for workers in ("0", "2"):
        result = programs.run(VALIDATE, *last, "-j", workers, cwd=tmp_path)
        assert result.status == 1
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1].startswith(f"validate.py: {error}")
    shutil.copy(images / path.relative_to(folder), path)
    assert programs.run(TRAIN, *argv, "--resume", "auto", cwd=tmp_path).status == 0
    assert programs.run(VALIDATE, *last, cwd=tmp_path).status == 0
