"""The built wheel, installed away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import emax_timm

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)]
    subprocess.run(pip, check=True, timeout=300)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for site-packages: with the wheel alone in it."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
    subprocess.run([*pip, str(wheel)], check=True, timeout=300)
    return folder


def run(installed: Path, cwd: Path, *command: str) -> subprocess.CompletedProcess[str]:
    # PYTHONPATH comes before the checkout that the tests may be installed from.
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_wheel_holds_the_package_its_data_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"emax_timm-{emax_timm.__version__}.dist-info/"
    assert all(name.startswith(("emax_cli.py", "emax_timm/", info)) for name in names)
    assert {
        "emax_cli.py",
        "emax_timm/py.typed",
        "emax_timm/configs/quickstart.yaml",
        "emax_timm/demo/page.css",
        "emax_timm/demo/page.js",
        "emax_timm/training/config/timm_flags.yaml",
        "emax_timm/configs/studies/scenes48.yaml",
        "emax_timm/models/weights.json",
        "emax_timm/models/pretrained/test_resnet_emax.fashion_mnist.safetensors",
        "emax_timm/models/pretrained/test_convnext_emax.fashion_mnist.safetensors",
        "emax_timm/samples/fashion_mnist/train.tar",
        "emax_timm/samples/fashion_mnist/test.tar",
        "emax_timm/samples/fashion_mnist/LICENSE",
        f"{info}licenses/LICENSE",
    } <= set(names)
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "emax_timm").rglob("*.py")}
    assert sources <= set(names)


def test_installed_package_registers_its_models(installed: Path, tmp_path: Path) -> None:
    script = (
        "import timm, emax_timm; print(emax_timm.__file__); print(*timm.list_models('*_emax'));"
        "timm.create_model('resnet10t_emax', num_classes=2)"
    )
    result = run(installed, tmp_path, sys.executable, "-c", script)
    assert result.returncode == 0, result.stderr
    where, names = result.stdout.splitlines()
    assert where.startswith(str(installed))
    assert "resnet50_emax" in names.split()


def test_installed_command_trains_and_validates(installed: Path, tmp_path: Path) -> None:
    emax = str(installed / "bin" / "emax")
    options = ["--output", "runs", "--epochs", "1", "--val-fraction", "0.9"]
    trained = run(installed, tmp_path, emax, "train", "-c", "quickstart", *options)
    assert trained.returncode == 0, trained.stderr
    checkpoint = "runs/quickstart/model.safetensors"
    validated = run(installed, tmp_path, emax, "validate", "--checkpoint", checkpoint)
    assert validated.returncode == 0, validated.stderr
    assert validated.stdout.startswith("top1: ")
    assert f"test {validated.stdout.strip()}" in trained.stdout
