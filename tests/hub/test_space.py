"""The folder of a Space: what is in it, that it serves the page, and what it does not overwrite."""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml
from hub_server import Hub
from hub_testing import REPO, Published
from interpreters import ROOT
from training_testing import only_line

from emax_cli import main
from emax_timm.hub.space import GRADIO, space_files, write_space


def test_header_is_what_spaces_need() -> None:
    readme = space_files("me/resnet10t_emax.clothes", "apache-2.0")["README.md"].decode()
    header = yaml.safe_load(readme.split("---\n")[1])
    assert header["sdk"] == "gradio"
    assert header["app_file"] == "app.py"
    assert header["models"] == ["me/resnet10t_emax.clothes"]
    assert header["license"] == "apache-2.0"
    assert header["title"] == "resnet10t_emax.clothes"
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {header["colorFrom"], header["colorTo"]} <= colors


def test_gradio_is_the_one_that_the_page_is_tested_with() -> None:
    constraints = (ROOT / ".ci" / "constraints.txt").read_text()
    assert f"\ngradio=={GRADIO}\n" in constraints
    (lowest,) = re.findall(r'"gradio>=([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert GRADIO.startswith(lowest)
    header = yaml.safe_load(space_files("me/a", "mit")["README.md"].decode().split("---\n")[1])
    assert header["sdk_version"] == GRADIO


def test_requirements_name_this_version() -> None:
    version = importlib.metadata.version("emax-timm")
    assert (
        space_files("me/a", "mit")["requirements.txt"].decode() == f"emax-timm[demo]=={version}\n"
    )


@pytest.mark.parametrize("what", ["folder", "file", "dangling link", "beyond a file"])
def test_what_is_there_is_not_overwritten(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    space = tmp_path / "space"
    if what == "folder":
        space.mkdir()
    elif what == "dangling link":
        space.symlink_to(tmp_path / "nowhere")
    else:
        space.write_text("mine")
    before = sorted(tmp_path.iterdir())
    target = space / "below" if what == "beyond a file" else space
    # The folder of the run is empty: the target is looked at first.
    (tmp_path / "run").mkdir()
    command = ["publish", str(tmp_path / "run"), "--repo", REPO, "--space", str(target)]
    assert main(command) == 2
    line = only_line(capsys.readouterr().err)
    expected = "cannot write to" if what == "beyond a file" else "is there already"
    assert str(target) in line
    assert expected in line
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "run"])
    assert not space.is_file() or space.read_text() == "mine"


def test_folder_is_complete_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_space(tmp_path / "new" / "space", REPO, "mit")
    assert not [*(tmp_path / "new").iterdir()]
    write_space(tmp_path / "new" / "space", REPO, "mit")
    names = {path.name for path in (tmp_path / "new" / "space").iterdir()}
    assert names == {"app.py", "requirements.txt", "README.md"}


@pytest.mark.slow
def test_published_space_serves_the_page_of_the_release(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec("gradio") is None:
        message = "no gradio: pip install 'emax-timm[demo]'"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    space = tmp_path / "space"
    options = ["--repo", REPO, "--output", str(tmp_path / "release"), "-j", "0"]
    assert main(["publish", str(published.run), *options, "--space", str(space)]) == 0
    assert f"{space}: a Space that serves a page for hf-hub:{REPO}" in capsys.readouterr().out
    hub: Hub = published.hub
    environment = {**os.environ, **hub.environment(tmp_path), "GRADIO_SERVER_PORT": "0"}
    process = subprocess.Popen(
        [sys.executable, "app.py"], cwd=space, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith(f"hf-hub:{REPO} on http://127.0.0.1:")
        with urllib.request.urlopen(line.split(" on ")[1].split(";")[0], timeout=60) as answer:
            page = answer.read().decode()
        assert "2 classes: cat, dog" in page
    finally:
        process.kill()
        process.communicate()
