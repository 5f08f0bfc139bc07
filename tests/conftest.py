"""Fixtures of the tests that train."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from training_testing import Programs, image_folder


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Runs train.py and validate.py in processes of their own."""
    programs = Programs()
    yield programs
    programs.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 32 training and 10 validation images of two classes; not to be written to."""
    return image_folder(tmp_path_factory.mktemp("images"))
