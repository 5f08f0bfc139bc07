"""Shards of WebDataset: a stopped run continues at a boundary it can find again, and says so."""

import io
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from faults_testing import assert_same_run, keep_only, with_fault
from interpreters import Interpreter
from PIL import Image
from training_testing import SMALL, TRAIN, state_of


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 16 training images and one of 10 for validation."""
    folder, random = tmp_path_factory.mktemp("shards"), np.random.default_rng(0)
    for name, count in (("train-0000", 16), ("train-0001", 16), ("val-0000", 10)):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for index in range(count):
                image, pixels = io.BytesIO(), random.integers(0, 256, (36, 36, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(image, "png")
                for suffix, content in (("png", image.getvalue()), ("cls", b"%d" % (index % 2))):
                    member = tarfile.TarInfo(f"{name}-{index:03}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def options(shards: Path) -> list[str]:
    text = """--train-split train-{0000..0001}.tar --val-split val-0000.tar --train-num-samples 32
        --val-num-samples 10 --num-classes 2 --epochs 2 --output . --experiment run --resume auto"""
    data = ["--dataset", "wds/shards", "--data-dir", str(shards)]
    return [*SMALL, *data, *text.split(), "-j", "1"]


SIGNAL = """
original = Trainer.{name}
def signalled(self, *args):
    if self.{when}:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(self, *args)
Trainer.{name} = signalled
"""


@pytest.mark.slow
def test_stream_continues_in_mid_epoch_with_a_warning_and_as_many_steps(
    programs: Interpreter, shards: Path, tmp_path: Path
) -> None:
    script = with_fault(tmp_path, SIGNAL.format(name="train_step", when="step == 5"))
    result = programs.run(str(script), *options(shards), cwd=tmp_path)
    assert result.status == 128 + signal.SIGTERM, result.stderr
    assert state_of(tmp_path / "run")["step"] == 6
    result = programs.run(TRAIN, *options(shards), cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert "warning: the data are a stream" in result.stderr
    state = state_of(tmp_path / "run")
    assert (state["epoch"], state["step"]) == (2, 8)
    assert [row["step"] for row in state["rows"]] == [4, 8]


@pytest.mark.slow
def test_stream_continues_after_an_epoch_as_if_it_had_not_stopped(
    programs: Interpreter, shards: Path, tmp_path: Path
) -> None:
    (tmp_path / "whole").mkdir()
    assert programs.run(TRAIN, *options(shards), cwd=tmp_path / "whole").status == 0
    script = with_fault(tmp_path, SIGNAL.format(name="save", when="epoch == 1"))
    result = programs.run(str(script), *options(shards), "--recovery-interval", "4", cwd=tmp_path)
    keep_only(tmp_path / "run", 4)
    result = programs.run(TRAIN, *options(shards), cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert "a stream" not in result.stderr
    assert_same_run(tmp_path / "run", tmp_path / "whole" / "run")
