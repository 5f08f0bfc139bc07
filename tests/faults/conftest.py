"""Fixtures of the tests of faults."""

from pathlib import Path

import pytest
from faults_testing import RUN
from interpreters import Interpreter
from training_testing import TRAIN


@pytest.fixture(scope="session")
def whole(programs: Interpreter, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that nothing befell."""
    folder = tmp_path_factory.mktemp("whole")
    result = programs.run(TRAIN, images, *RUN, cwd=folder)
    assert result.status == 0, result.stderr
    return folder / "run"


@pytest.fixture(scope="session")
def whole_on_two_ranks(
    programs: Interpreter, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same on two ranks."""
    folder = tmp_path_factory.mktemp("whole2")
    result = programs.run(TRAIN, images, *RUN, cwd=folder, ranks=2)
    assert result.status == 0, result.stderr
    return folder / "run"
