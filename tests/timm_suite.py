"""timm's own model tests, run on this package's models.

timm's source distribution carries them; it is fetched for the version that is installed.

    python tests/timm_suite.py --write docs/timm_suite.md

runs them on every model of the package and records how many passed.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import timm
import torch

import emax_timm.models

MODULES = sorted(
    name for name in vars(emax_timm.models) if name.startswith("emax_") and "__" not in name
)
ALL = [name for module in MODULES for name in timm.list_models(module=module)]

# The smallest model, for every change.
SMALL = ["test_resnet_emax"]

# They ask for weights on the public hub, the last one of every test_* model that has any;
# tests/models/test_weights.py and test_shipped_weights.py repeat them without.
NEED_THE_HUB = (
    "test_model_load_pretrained",
    "test_model_features_pretrained",
    "test_model_inference",
)

# The conftest.py beside timm's tests: of thousands it keeps those of our models.
SELECT = """
import re
def pytest_collection_modifyitems(items):
    found = [(item, re.search(r"{}", item.nodeid)) for item in items]
    items[:] = [item for item, match in found if match and match[1] not in {}]
"""


def fetch(folder: Path) -> Path:
    """timm's tests/test_models.py in `folder`, told that our models have forward_intermediates."""
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
    if listed == source:
        raise RuntimeError("timm's tests no longer have FEAT_INTER_FILTERS")
    copy.write_text(listed)
    return copy


def run(
    suite: Path, names: Sequence[str], output: bool = False, workers: str = "auto"
) -> dict[str, Counter[str]]:
    """Run the tests of these models.

    Args:
        suite: What `fetch` returned.
        names: Of the models.
        output: Print what pytest printed.
        workers: Processes, as pytest-xdist's `-n` takes them.

    Returns:
        For each model how many tests "passed", "failed" and were "skipped".
    """
    # An id is a test's name and its parameters, such as test_model_forward[1-resnet18_emax], with
    # the weights' tag in some.
    pattern = re.compile(rf"::(\w+)\[(?:.*-)?({'|'.join(names)})(?:\.\w+)?(?:-\w+)?\]$")
    (suite.parent / "conftest.py").write_text(SELECT.format(pattern.pattern, NEED_THE_HUB))
    report = suite.parent / "report.xml"
    result = _pytest(
        suite, "-W", "ignore", "--tb=short", "-n", workers, f"--junitxml={report}", suite.name
    )
    if output or result.returncode not in (0, 1):
        print(result.stdout[-20000:], result.stderr[-2000:])
    counts = {name: Counter[str]() for name in names}
    for case in ElementTree.parse(report).iter("testcase"):
        match = pattern.search(f"::{case.get('name')}")
        assert match is not None, case.get("name")
        outcomes = {child.tag for child in case} & {"failure", "error", "skipped"}
        outcome = "passed" if not outcomes else "skipped" if "skipped" in outcomes else "failed"
        counts[match[2]][outcome] += 1
        if outcome != "passed":
            print(outcome, case.get("name"))
    return counts


def _pytest(suite: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", "emax_timm", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, "-q", "-o", "addopts=", *arguments],
        cwd=suite.parent,
        # A process per core instead of a thread per core, which these small inputs do not fill.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=7200,
    )


def markdown(counts: dict[str, Counter[str]]) -> str:
    """The record of a run."""
    rows = [
        f"| {name} | {counter['passed']} | {counter['failed']} | {counter['skipped']} |"
        for name, counter in counts.items()
    ]
    total = sum(counts.values(), Counter[str]())
    return "\n".join(
        [
            "# timm's model tests on the models of this package",
            "",
            "Made by `python tests/timm_suite.py --write docs/timm_suite.md` with timm "
            f"{timm.__version__}, torch {torch.__version__.split('+')[0]} and Python "
            f"{platform.python_version()}. {', '.join(f'`{name}`' for name in NEED_THE_HUB)} "
            "need the public hub and are left out; `tests/models/test_weights.py` and "
            "`tests/models/test_shipped_weights.py` check the same without it.",
            "",
            "| model | passed | failed | skipped |",
            "| --- | --- | --- | --- |",
            *rows,
            f"| all {len(counts)} | {total['passed']} | {total['failed']} | {total['skipped']} |",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="Run timm's model tests on every model.")
    parser.add_argument("--write", type=Path, metavar="FILE", help="record the counts there")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        counts = run(fetch(Path(folder)), ALL)
    record = markdown(counts)
    print(record)
    if arguments.write:
        arguments.write.write_text(record)
    return int(any(counter["failed"] for counter in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
