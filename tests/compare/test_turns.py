"""Functions, and runs of a study, that take turns in one process compute what they do alone."""

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from interpreters import ENVIRONMENT
from study_testing import made, made_together, study_on, write_jobs
from training_testing import rows_without_seconds

from emax_timm.compare.command import together
from emax_timm.compare.run import RESULT
from emax_timm.compare.turns import in_turns
from emax_timm.training.signals import Stopped


def test_one_function_runs_at_a_time_until_it_hands_over() -> None:
    seen: list[str] = []

    def function(name: str, turns: int) -> Callable[[Callable[[], None]], None]:
        def call(hand_over: Callable[[], None]) -> None:
            for turn in range(turns):
                seen.append(f"{name}{turn}")
                time.sleep(0.01)  # another thread that could run would
                seen.append(f"{name}{turn}")
                hand_over()

        return call

    assert in_turns([function("a", 3), function("b", 1), function("c", 2)], lambda: None) == []
    assert seen == [name for name in ("a0", "b0", "c0", "a1", "c1", "a2") for _ in range(2)]


def test_others_end_as_they_are_asked_when_one_fails() -> None:
    asked = threading.Event()

    def fails(hand_over: Callable[[], None]) -> None:
        hand_over()
        raise ValueError("the first")

    def goes_on(hand_over: Callable[[], None]) -> None:
        while not asked.is_set():
            hand_over()
        raise ValueError("asked")

    errors = in_turns([goes_on, fails, goes_on], asked.set)
    assert [str(error) for error in errors] == ["the first", "asked", "asked"]


RUNS = [("none", 1), ("emax", 1), ("emax", 2)]
NAMES = ["none-1", "emax-1", "emax-2"]
# What draws random numbers in a step, beside the order and the augmentation of the data.
RANDOM = {"drop": 0.1, "drop_path": 0.1, "reprob": 0.5, "mixup": 0.4}


def test_runs_side_by_side_have_the_bits_of_runs_alone(images: Path, tmp_path: Path) -> None:
    study = study_on(images, tmp_path, **RANDOM)
    results = made_together(study, RUNS, tmp_path, NAMES)
    for (method, seed), name, result in zip(RUNS, NAMES, results, strict=True):
        alone = made(study, method, seed, tmp_path / f"alone-{name}")
        same_run(tmp_path / name, tmp_path / f"alone-{name}")
        assert (alone["together"], result["together"]) == (1, 3)
        assert result["test"] == alone["test"]
        assert result["memory_bytes"] is None
        assert result["processor_seconds"] > 0


def same_run(first: Path, second: Path) -> None:
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    for name in ("log.jsonl", "gradients.jsonl"):  # without EMAX there are no gradients of it
        logs = [rows_without_seconds(p / name) for p in (first, second) if (p / name).exists()]
        assert len(logs) != 1
        assert logs[:1] == logs[1:]
    assert (first / "log.jsonl").exists()


@pytest.fixture
def _signals() -> Iterator[None]:
    """What has been stopped leaves signals ignored, since its process ends."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_an_error_of_one_stops_the_others_with_checkpoints(images: Path, tmp_path: Path) -> None:
    study = study_on(images, tmp_path)
    (tmp_path / "se-1").mkdir()
    (tmp_path / "se-1" / "checkpoints").write_text("")  # where a folder has to be
    with pytest.raises(Exception, match="File exists") as caught:
        made_together(study, [("none", 1), ("se", 1)], tmp_path, ["none-1", "se-1"])
    assert not isinstance(caught.value, Stopped)
    (last,) = (path.name for path in (tmp_path / "none-1" / "checkpoints").iterdir())
    assert last == "epoch-0001-step-00000006"  # in the second epoch, after the first one's 4 steps
    assert not (tmp_path / "none-1" / RESULT).exists()
    (tmp_path / "se-1" / "checkpoints").unlink()
    made_together(study, [("none", 1), ("se", 1)], tmp_path, ["none-1", "se-1"])
    made(study, "none", 1, tmp_path / "alone")
    same_run(tmp_path / "none-1", tmp_path / "alone")


@pytest.mark.slow
def test_processes_that_are_stopped_go_on_with_all_of_their_runs(
    images: Path, tmp_path: Path
) -> None:
    study = study_on(images, tmp_path, epochs=30)
    jobs = write_jobs(study, RUNS, tmp_path, NAMES)
    command = [sys.executable, "-m", "emax_timm.compare.run", *map(str, jobs)]
    environment = ENVIRONMENT | {"OMP_NUM_THREADS": "1"}
    for number, status in ((signal.SIGTERM, 143), (signal.SIGKILL, -9)):
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("epoch "):
            assert line
        for _ in range(12):
            process.stdout.readline()
        process.send_signal(number)
        process.communicate()
        assert process.returncode == status
        assert not any((folder / RESULT).exists() for folder in jobs)
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    for (method, seed), folder in zip(RUNS, jobs, strict=True):
        made(study, method, seed, tmp_path / "alone" / folder.name)
        same_run(folder, tmp_path / "alone" / folder.name)


def test_a_process_makes_the_runs_of_a_seed(images: Path, tmp_path: Path) -> None:
    runs = study_on(images, tmp_path).runs()
    names = [[str(run) for run in group] for group in together(runs, 0)]
    primary = [[f"tiny/{m}/seed-{s}" for m in ("none", "se", "emax")] for s in range(4)]
    assert names == [*primary, ["tiny/emax_finest/seed-0"], ["tiny/emax_finest/seed-1"]]
    assert [len(group) for group in together(runs, 2)] == [2, 1] * 4 + [1, 1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_side_by_side_on_a_gpu_have_the_bits_of_runs_alone(
    images: Path, tmp_path: Path
) -> None:
    study = study_on(images, tmp_path, **RANDOM, epochs=8)
    made_together(study, RUNS, tmp_path, NAMES, "cuda")
    for run, name in zip(RUNS, NAMES, strict=True):
        made_together(study, [run], tmp_path, [f"alone-{name}"], "cuda")
        same_run(tmp_path / name, tmp_path / f"alone-{name}")
