"""Weights put into the package."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from training_testing import files_in, only_line, sum_up

from emax_timm.files import sha256_of
from emax_timm.hub import ship as shipping
from emax_timm.hub.ship import ship
from emax_timm.models.weights_index import read_index


@pytest.fixture
def index(tmp_path: Path) -> Path:
    path = tmp_path / "models" / "weights.json"
    path.parent.mkdir()
    path.write_text("[\n]\n")
    return path


@pytest.mark.slow
def test_shipped_file_is_the_runs_best_and_in_the_index(trained: Path, index: Path) -> None:
    for _ in range(2):  # again, it takes its own place
        assert ship([str(trained), "--tag", "cats", "--index", str(index)]) == 0
    (entry,) = read_index(index)
    assert (entry.name, entry.repo, entry.revision) == ("test_resnet_emax.cats", None, None)
    path = index.parent / entry.file
    assert sha256_of(path) == entry.sha256
    shipped = safetensors.torch.load_file(path)
    best = safetensors.torch.load_file(trained / "model.safetensors")
    assert shipped.keys() == best.keys()
    assert all(torch.equal(value, best[name]) for name, value in shipped.items())
    assert entry.cfg is not None
    assert entry.cfg["label_names"] == ["cat", "dog"]


@pytest.mark.parametrize("how", ["large", "unfinished", "arguments"])
def test_what_is_not_fit_is_not_shipped(
    how: str,
    run: Path,
    index: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if how == "large":
        monkeypatch.setattr(shipping, "LARGEST", 1000)
        message = "at most 1000 are shipped"
    elif how == "unfinished":
        (run / "summary.json").unlink()
        message = "the run has not ended"
    else:
        config = run / "config.json"
        option = '"attn_kwargs": {"batch_vote": true}, "in_chans"'
        config.write_text(config.read_text().replace('"in_chans"', option))
        sum_up(run)
        message = "its name alone must build it"
    assert ship([str(run), "--tag", "cats", "--index", str(index)]) == 2
    assert message in only_line(capsys.readouterr().err)
    assert files_in(index.parent) == {"weights.json"}
    assert index.read_text() == "[\n]\n"
