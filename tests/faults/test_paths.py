"""Names and links that point out of a folder: row 26."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from faults_testing import RUN, assert_same_run, keep_only
from interpreters import Interpreter
from PIL import Image
from training_testing import SMALL, TRAIN, files_in, newest_checkpoint


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder that no run may touch."""
    folder = tmp_path / "outside"
    folder.mkdir()
    for name in ("log.csv", "model.safetensors", "state.pt"):
        (folder / name).write_text(f"the {name} of somebody else")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files_in(folder)}


def test_links_in_a_run_s_folder_are_replaced_not_followed(
    programs: Interpreter, images: Path, whole: Path, outside: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    keep_only(folder, 10)
    # Older than the run's own, so that it is the first to be removed.
    (folder / "checkpoints" / "epoch-0000-step-00000001").symlink_to(outside)
    for name in ("log.csv", "model.safetensors", "SHA256SUMS", "last.safetensors"):
        (folder / name).unlink()
        (folder / name).symlink_to(outside / "log.csv")
    (folder / "config.yaml.partial").symlink_to(outside / "model.safetensors")
    (folder / "checkpoints" / ".epoch-0002-step-00000011.partial").symlink_to(outside)
    before = content(outside)
    result = programs.run(TRAIN, images, *RUN, cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert content(outside) == before
    assert len(list((folder / "checkpoints").iterdir())) == 3
    assert not (folder / "log.csv").is_symlink()
    # The best is not improved on after the tenth step, so it was not written again.
    for name in ("model.safetensors", "SHA256SUMS"):
        if (folder / name).is_symlink():
            (folder / name).unlink()
            shutil.copy(whole / name, folder / name)
    assert_same_run(folder, whole)


@pytest.mark.parametrize("name", ["../outside/state.pt", "/etc/hostname", "state.pt/../state.pt"])
def test_sums_name_no_file_that_is_opened(
    programs: Interpreter, images: Path, whole: Path, tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "run", symlinks=True))
    with (newest_checkpoint(folder) / "SHA256SUMS").open("a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    result = programs.run(TRAIN, images, *RUN, cwd=tmp_path)
    assert (result.status, result.stderr) == (0, "")


def test_members_of_a_tar_with_odd_names_leave_nothing_outside(
    programs: Interpreter, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    odd = ["../../cat/0.png", f"{tmp_path}/dog/1.png", "dog/../../../dog/2.png"]
    with tarfile.open(data / "train.tar", "w") as tar:
        for name in [*(f"{label}/{n}.png" for label in ("cat", "dog") for n in range(8)), *odd]:
            image = io.BytesIO()
            Image.new("RGB", (32, 32), (len(name), 90, 10)).save(image, "png")
            member = tarfile.TarInfo(name)
            member.size = len(image.getvalue())
            tar.addfile(member, io.BytesIO(image.getvalue()))
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    before = files_in(tmp_path)
    options = ["--train-split", "train.tar", "--val-split", "", "--epochs", "1"]
    output = ["--output", tmp_path / "runs", "--experiment", "run"]
    result = programs.run(TRAIN, data, *SMALL, *options, *output, cwd=tmp_path)
    assert result.status == 0, result.stderr
    added = files_in(tmp_path) - before
    assert added
    assert all(name.startswith("runs/run/") for name in added)


@pytest.mark.parametrize("name", ["../run", "..", "a/b", "/tmp/run"])
def test_name_of_a_run_is_that_of_one_folder(
    programs: Interpreter, images: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "cwd").mkdir()
    result = programs.run(TRAIN, images, *SMALL, "--experiment", name, cwd=tmp_path / "cwd")
    assert result.status == 2
    assert "--experiment is the name of one folder" in result.stderr
    assert files_in(tmp_path) == set()
