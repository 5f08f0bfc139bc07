"""The studies in docs/results: their tables are what their results give, of the code as it says."""

import re
import shutil
from pathlib import Path

import pytest
from interpreters import ROOT

from emax_timm.compare.command import REPORT, compare
from emax_timm.compare.results import RESULT, read_json, read_results
from emax_timm.compare.study import read_study
from emax_timm.tables import marks

PAGES = [ROOT / "README.md", ROOT / "docs" / "results.md"]
FOLDERS = sorted(path.parent for path in (ROOT / "docs" / "results").glob(f"*/{REPORT}"))
NAMES = [folder.name for folder in FOLDERS]


def without_command(text: str) -> str:
    return re.sub(r"^Made by `.*?`", "Made by", text, flags=re.MULTILINE)


def block(page: Path, study: str) -> str | None:
    begin, end = marks(f"compare {study}")
    text = page.read_text(encoding="utf-8")
    return text.partition(begin)[2].partition(end)[0] if begin in text else None


@pytest.fixture
def folder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A study's folder; the current directory is one where what its runs start from can be read."""
    study = ROOT / "configs" / "studies" / f"{request.param.name}.yaml"
    if "pretrained_path:" in study.read_text(encoding="utf-8"):
        monkeypatch.chdir(request.getfixturevalue("lite0_weights").parents[1])
    return request.param


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES, indirect=True)
def test_tables_are_those_of_the_results(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, page = folder.name, tmp_path / "page.md"
    shutil.copytree(folder, tmp_path / name)
    page.write_text("\n".join(marks(f"compare {name}")) + "\n")
    arguments = [f"studies/{name}", "--report", "--output", str(tmp_path), "--write", str(page)]
    assert compare(arguments) == 0
    made = capsys.readouterr().out
    published = (folder / REPORT).read_text(encoding="utf-8")
    assert without_command(made).strip() == without_command(published).strip()
    blocks = [found for path in PAGES if (found := block(path, name)) is not None]
    assert blocks
    for found in blocks:
        assert without_command(found) == without_command(block(page, name) or "")


@pytest.mark.parametrize("folder", FOLDERS, ids=NAMES, indirect=True)
def test_results_were_made_by_code_that_was_committed(folder: Path) -> None:
    study = read_study(f"studies/{folder.name}")
    results = read_results(study, folder)
    assert len(results) == len(list(folder.glob(f"*/*/*/{RESULT}")))
    for content in results.values():
        assert re.fullmatch("[0-9a-f]{12}", content["commit"])
        assert content["config"]["data_dir"] == "data"  # no folder of a machine
    declared = read_json(folder / "declared.json")
    del declared["date"]
    assert declared == study.declared()
