"""What checks a change is what the project says it is."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CI = ROOT / ".ci"
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_pre_commit_has_the_ruff_of_ci() -> None:
    pinned = re.search(r"^ruff==(.+)$", (CI / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    hooks = load(ROOT / ".pre-commit-config.yaml")["repos"]
    (revision,) = [repo["rev"] for repo in hooks if "ruff" in repo["repo"]]
    assert revision == f"v{pinned[1]}"


def test_workflows_run_what_stands_in_the_repository() -> None:
    commands = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in load(path)["jobs"].values():
            assert job["timeout-minutes"] > 0
            commands += [step["run"] for step in job["steps"] if "run" in step]
    scripts = set(re.findall(r"\.ci/[\w.]+", "\n".join(commands)))
    assert {".ci/run", ".ci/nightly", ".ci/one_step.py"} <= scripts
    for script in scripts:
        assert (ROOT / script).is_file(), script


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_template_is_a_form(path: Path) -> None:
    form = load(path)
    if path.name == "config.yml":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
    else:
        assert form["name"]
        assert form["description"]
        identifiers = [field["id"] for field in form["body"]]
        assert len(set(identifiers)) == len(identifiers) > 0


@pytest.mark.parametrize("name", ["run", "nightly", "lowest"])
def test_script_is_executable_and_has_no_error_of_syntax(name: str) -> None:
    assert os.access(CI / name, os.X_OK)
    subprocess.run(["bash", "-n", CI / name], check=True)


def test_what_runs_in_the_background_can_fail_the_run() -> None:
    lines = [line.partition(" #")[0] for line in (CI / "run").read_text().splitlines()]
    begun = [number for number, line in enumerate(lines) if line.endswith(" &")]
    assert begun
    for number in begun:
        name = lines[number + 1].removesuffix("=$!")
        assert f'wait "${name}"' in lines[number:]


def test_every_test_runs_in_a_script() -> None:
    """The default suite, and by their markers all that it leaves out."""
    settings = (ROOT / "pyproject.toml").read_text()
    assert "-m 'not slow and not cpp and not triton'" in settings
    run, nightly = (CI / "run").read_text(), (CI / "nightly").read_text()
    assert "readme_command pytest" in run
    assert '-m "cpp and not slow"' in run
    assert 'TRITON_INTERPRET=1 .venv/bin/python -m pytest -m "triton and not slow"' in run
    assert '-m "slow and not cpp and not triton"' in nightly
    assert 'TRITON_INTERPRET=1 .venv/bin/python -m pytest -m "triton and slow"' in nightly
    assert '-m "cpp and slow"' in nightly
