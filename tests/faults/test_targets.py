"""Folders that cannot be written to: runs there are read, and targets there refused first."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from read_only import read_only
from run_commands import command
from tiers import mostly_slow
from training_testing import files_in, only_line

from emax_cli import main
from emax_timm.files import lock_folder

READING = ["predict", "validate", "export", "visualize", "publish", "verify"]


@pytest.mark.parametrize("name", mostly_slow(READING, 0, 4))
def test_command_reads_a_run_that_cannot_be_written_to(
    name: str, run: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with read_only(run):
        assert main(command(name, run, images, tmp_path_factory.mktemp("out"))) == 0
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


def test_read_only_run_in_training_is_not_published(
    run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("publish", run, images, tmp_path)
    with lock_folder(run) as free, read_only(run):
        assert free
        assert main(words) == 2
    assert "a process is training in" in only_line(capsys.readouterr().err)


# Commands whose target is in a folder where nothing can be written.
TARGETS = {
    "export": "export resnet18_emax --output OUT/model.onnx",
    "visualize": "visualize --images IMAGE --output OUT/report",
    "predict": "predict IMAGE --embed OUT/features.npz",
    "publish": "publish OUT/run --repo me/cats",
    "publish to": "publish RUN --repo me/cats --output OUT/release",
    "publish in an index": "publish RUN --repo me/cats.a --output NEW --push --index --index-file "
    "OUT/weights.json",
    "train": "train IMAGES --model test_resnet_emax --output OUT --experiment run",
    "train deep": "train IMAGES --model test_resnet_emax --output OUT/a/b",
    "resume": "train --resume OUT/run --epochs 9",
    "curves": "curves OUT/run",
    "pin": "weights pin --index OUT/weights.json",
    "list": "list --write OUT/page.md",
    "benchmark": "benchmark modules --write OUT/page.md",
    "benchmark as JSON": "benchmark modules --json OUT/found.json",
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("how", ["read-only", "a file"])
def test_target_that_cannot_be_written_is_refused_before_any_work(
    name: str,
    how: str,
    run: Path,
    images: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    if how == "a file" and "OUT/run" in TARGETS[name]:
        pytest.skip("a run is a folder")
    shutil.copytree(run, out / "run")
    (out / "weights.json").write_text("[\n]\n")
    (out / "page.md").write_text("")
    if how == "a file":
        shutil.rmtree(out)
        out.write_text("mine")

    create = timm.create_model

    def on_meta(*arguments: Any, **keywords: Any) -> Any:
        assert torch.empty(0).is_meta, "work has begun"
        return create(*arguments, **keywords)

    monkeypatch.setattr(timm, "create_model", on_meta)
    image = images / "validation" / "cat" / "0.png"
    values = {"RUN": run, "IMAGES": images, "IMAGE": image, "NEW": tmp_path / "new"}
    words = [str(values.get(w, w)).replace("OUT", str(out)) for w in TARGETS[name].split()]
    before = files_in(tmp_path)
    with read_only(out) if how == "read-only" else contextlib.nullcontext():
        assert main(words) == 2
    line = only_line(capsys.readouterr().err)
    assert str(out) in line
    assert "cannot" in line or "there is no" in line or "is no" in line
    assert files_in(tmp_path) == before
