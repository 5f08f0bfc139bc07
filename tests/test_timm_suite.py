"""timm's own model tests, run on this package's models.

timm's source distribution carries them; it is fetched for the version that is installed.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

import emax_timm.models

MODULES = sorted(
    name for name in vars(emax_timm.models) if name.startswith("emax_") and "__" not in name
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """timm's tests/test_models.py, told that our models have forward_intermediates."""
    folder = tmp_path_factory.mktemp("timm")
    version = f"timm=={timm.__version__}"
    command = ["-m", "pip", "download", "--no-deps", "--no-binary=timm", "-d", str(folder), version]
    subprocess.run([sys.executable, *command], check=True, timeout=300)
    with tarfile.open(next(folder.glob("timm-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    tests = next(folder.glob("timm-*/tests/test_models.py"))
    # Out of timm's folder, whose timm would otherwise be imported instead of the installed one.
    copy = folder / "test_models.py"
    source = tests.read_text()
    listed = source.replace("FEAT_INTER_FILTERS = [", f"FEAT_INTER_FILTERS = [*{MODULES}, ", 1)
    assert listed != source
    copy.write_text(listed)
    return copy


def pytest_on(suite: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "emax_timm", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-q", "-o", "addopts=", *arguments],
        cwd=suite.parent,
        # A process per core instead of a thread per core, which these small inputs do not fill.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3000,
    )


@pytest.mark.slow
@pytest.mark.timeout(3300)
def test_timm_suite_passes_on_every_model(suite: Path) -> None:
    names = [name for module in MODULES for name in timm.list_models(module=module)]
    assert len(names) >= 9
    collected = pytest_on(suite, "--collect-only", "test_models.py").stdout.splitlines()
    # An id is a test's name and its parameters, such as test_model_forward[1-resnet18_emax].
    ours = re.compile(rf"[\[-]({'|'.join(names)})\]$")
    ids = [line for line in collected if ours.search(line)]
    for name in names:
        tests = {line.split("::")[1].split("[")[0] for line in ids if ours.search(line)[1] == name}  # type: ignore[index]
        assert len(tests) >= 9, (name, tests)
    (suite.parent / "ids.txt").write_text("\n".join(ids))
    result = pytest_on(suite, "-W", "ignore", "--tb=short", "-n", "auto", "@ids.txt")
    print(result.stdout[-20000:], result.stderr[-2000:])
    assert result.returncode == 0
    # None skipped either.
    assert f"{len(ids)} passed" in result.stdout.splitlines()[-1]
