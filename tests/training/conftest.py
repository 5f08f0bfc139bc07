"""Fixtures of the tests of training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
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


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Models this small are slower on more threads, and the machine has other work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
