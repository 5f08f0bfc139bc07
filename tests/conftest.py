"""Fixtures of the tests that train, and of those that publish what was trained."""

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything loads torch: workers of pytest-xdist, and what they start, share the cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Kernels that whoever runs the tests has built would compute in place of what is tested; the
# processes that tests start have this environment, too.
if "EMAX_KERNELS_DIR" not in os.environ:
    _no_kernels = tempfile.TemporaryDirectory(prefix="emax-kernels-")
    os.environ["EMAX_KERNELS_DIR"] = _no_kernels.name

import pytest
from hub_server import Hub, serve
from hub_testing import REPO, Published, emax
from interpreters import Interpreter
from training_testing import TRAIN, image_folder


@pytest.fixture(scope="session", autouse=True)
def _no_curves() -> None:
    importlib.import_module("no_curves")


@pytest.fixture(scope="session")
def programs() -> Iterator[Interpreter]:
    """Runs train.py and validate.py in processes of their own."""
    programs = Interpreter("emax_timm.training", "no_curves")
    yield programs
    programs.close()


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 32 training and 10 validation images of two classes; not to be written to."""
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def trained(programs: Interpreter, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run of train.py; not to be written to."""
    options = "--model test_resnet_emax --img-size 32 -b 8 -j 0 --warmup-epochs 0 --epochs 3"
    options += " --opt adamw --lr 0.003 --output . --experiment run"
    folder = tmp_path_factory.mktemp("trained")
    result = programs.run(TRAIN, images, *options.split(), cwd=folder)
    assert result.status == 0, result.stderr
    return folder / "run"


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def published(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Published]:
    """The run, published by `emax publish`."""
    folder = tmp_path_factory.mktemp("published")
    run = Path(shutil.copytree(trained, folder / "run"))
    with serve(Hub(token="hf_rightright")) as hub:
        options = ("--repo", REPO, "--push", "-j", "0")
        done = emax("publish", run, *options, hub=hub, home=folder, HF_TOKEN="hf_rightright")
        assert done.returncode == 0, done.stderr
        yield Published(run, hub, folder, done.stdout)
