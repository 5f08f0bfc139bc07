"""Losses and metrics that are not what they should be: rows 9 to 11."""

import itertools
import json
import math
from pathlib import Path

import pytest
from faults_testing import NAN_AT, RUN, assert_same_run, with_fault
from interpreters import Interpreter
from tiers import mostly_slow
from training_testing import TRAIN, left_by, state_of


@pytest.mark.slow
def test_loss_that_is_not_finite_keeps_the_last_good_step(
    programs: Interpreter, images: Path, whole: Path, tmp_path: Path
) -> None:
    script = with_fault(tmp_path, NAN_AT.format(factor="float('nan')"))
    result = programs.run(str(script), images, *RUN, cwd=tmp_path)
    assert result.status == 1
    samples, last = result.stderr.splitlines()[-2:]
    assert "not finite at step 6 of epoch 2 on rank 0" in last
    files = samples.split(": ", 1)[1].split(", ")
    assert len(files) == 8
    assert all((images / "train" / file).is_file() for file in files)
    assert state_of(tmp_path / "run")["step"] == 5
    assert not any(
        math.isnan(value.sum().item())
        for value in left_by(tmp_path / "run")["model.safetensors"].values()
    )
    assert programs.run(TRAIN, images, *RUN, cwd=tmp_path).status == 0
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.slow
def test_step_that_is_not_finite_is_skipped_if_asked(
    programs: Interpreter, images: Path, tmp_path: Path
) -> None:
    script = with_fault(tmp_path, NAN_AT.format(factor="float('inf')"))
    result = programs.run(str(script), images, *RUN, "--nonfinite", "skip", cwd=tmp_path)
    assert result.status == 0, result.stderr
    warning = (
        "the loss or a gradient is not finite at step 6 of epoch 2 on rank 0: the step is left"
    )
    assert warning in result.stderr
    state = left_by(tmp_path / "run")
    assert state["step"] == 12
    assert all(value.isfinite().all() for value in state["model.safetensors"].values())
    assert math.isfinite(
        json.loads((tmp_path / "run" / "summary.json").read_text())["validation"]["loss"]
    )


METRICS = """
from emax_timm.training.evaluate import Metrics
def validate(self):
    return Metrics(*{metrics}[self.epoch])
Trainer.validate = validate
"""
NAN = "float('nan')"


@pytest.mark.slow
def test_metric_that_is_not_a_number_is_never_the_best(
    programs: Interpreter, images: Path, tmp_path: Path
) -> None:
    metrics = f"[(1, {NAN}, 9), (1, 70, 9), ({NAN}, 80, 9)]"
    script = with_fault(tmp_path, METRICS.format(metrics=metrics))
    result = programs.run(str(script), images, *RUN, cwd=tmp_path)
    assert result.status == 0, result.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["best_epoch"], summary["validation"]["top1"]) == (2, 70)


# The 11th step, the first that has enough before it.
SPIKE = """
loss = Trainer._loss
def spike(self, images, labels):
    return loss(self, images, labels) * (10_000 if self.step == 10 else 1)
Trainer._loss = spike
"""


@pytest.mark.parametrize("policy", mostly_slow(["warn", "skip", "stop"]))
def test_spike_of_the_loss_meets_the_policy_and_names_its_samples(
    programs: Interpreter, images: Path, tmp_path: Path, policy: str
) -> None:
    script = with_fault(tmp_path, SPIKE)
    options = ["--loss-spike", "20", "--on-spike", policy]
    result = programs.run(str(script), images, *RUN, *options, cwd=tmp_path)
    text = "the loss is a spike at step 11 of epoch 3"
    lines = result.stderr.splitlines()
    # Before the first step, train.py may have said what it thinks of the options.
    samples, message, *rest = itertools.dropwhile(lambda line: "samples" not in line, lines)
    assert samples.startswith("samples at step 11 of epoch 3 on rank 0: ")
    files = samples.split(": ", 1)[1].split(", ")
    assert len(files) == 8
    assert all((images / "train" / file).is_file() for file in files)
    start = "train.py: error: " if policy == "stop" else "warning: "
    assert message.startswith(start + text)
    assert message.endswith("left out") == (policy == "skip")
    assert rest == []
    assert result.status == (1 if policy == "stop" else 0)
    state = state_of(tmp_path / "run")
    assert state["step"] == (10 if policy == "stop" else 12)
    # The optimizer counts the steps that were made.
    made = {int(values["step"]) for values in state["optimizer"]["state"].values()}
    assert made == {{"warn": 12, "skip": 11, "stop": 10}[policy]}
