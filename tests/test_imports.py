"""Imports between the subpackages point downwards, as [tool.importlinter] of pyproject says."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from interpreters import ROOT

LINT = "from importlinter.cli import lint_imports; exit(lint_imports(no_cache=True))"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The package's modules, and the rule."""
    shutil.copytree(ROOT / "emax_timm", tmp_path / "emax_timm", ignore=_all_but_python)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def _all_but_python(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if Path(folder, name).is_file() and not name.endswith(".py")]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(folder), "PYTHONIOENCODING": "utf-8"}
    return subprocess.run(
        [sys.executable, "-c", LINT],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_imports_point_downwards(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert "Contracts: 2 kept, 0 broken." in done.stdout


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("hub/card.py", "from ..benchmark import timing"),  # sideways
        ("compare/statistics.py", "import emax_timm.interpret.figures"),
        ("models/cost.py", "from ..training.config import TrainConfig"),  # upwards
        ("ops/weights.py", "from ..attention.emax import EMAX"),
        ("training/plan.py", "def late():\n    from ..hub import card"),
        ("a_new_package.py", "import math"),  # on no level
    ],
)
def test_an_import_that_points_elsewhere_is_noticed(copy: Path, module: str, line: str) -> None:
    path = copy / "emax_timm" / module
    text = path.read_text(encoding="utf-8") if path.exists() else '"""New."""\n'
    path.write_text(f"{text}\n{line}\n", encoding="utf-8")
    done = lint(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert Path(module).parts[0].removesuffix(".py") in done.stdout
