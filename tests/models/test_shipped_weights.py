"""The weights in the package: they load without the hub, and compute what they always have."""

import json
from pathlib import Path
from typing import Any

import golden
import pytest
import safetensors.torch
import timm
import torch
from hub_testing import in_new_process
from tiers import mostly_slow

import emax_timm
from emax_cli import main
from emax_timm.models import weights_index
from emax_timm.models.weights_index import INDEX
from emax_timm.training import validate

ENTRIES = {entry.name: entry for entry in INDEX if entry.repo is None}
NAMES = ["test_resnet_emax.fashion_mnist", "test_convnext_emax.fashion_mnist"]


def test_shipped_are_what_the_package_promises() -> None:
    assert set(ENTRIES) == set(NAMES) == set(golden.read())
    for name, entry in ENTRIES.items():
        assert entry.path.stat().st_size <= 2_000_000, name
        model = name.partition(".")[0]
        assert timm.get_pretrained_cfg(model).tag == "fashion_mnist"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_golden(name: str) -> None:
    expected = torch.tensor(golden.read()[name])
    # Kernels of other processors and versions of torch round otherwise; a changed layer does not.
    torch.testing.assert_close(golden.logits_of(name), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_golden_logits_notice_a_small_change(name: str) -> None:
    """The tolerance is below what an altered layer does: gates 1 % wider, one norm's epsilon."""
    expected = torch.tensor(golden.read()[name])
    model: Any = timm.create_model(name, pretrained=True).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("residual_gate"):
                parameter.mul_(1.01)
        found = model(golden.golden_images())
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_attention_of_shipped_weights_is_open() -> None:
    """They are no warm start."""
    for entry in ENTRIES.values():
        tensors = safetensors.torch.load_file(entry.path)
        gates = [value for key, value in tensors.items() if key.endswith("residual_gate")]
        assert gates
        assert all((gate.abs() > 1e-3).any() for gate in gates), entry.name


OFFLINE = """
import sys, timm, emax_timm
for name in sys.argv[1:]:
    model = timm.create_model(name, pretrained=True)
    print(model.num_classes, model.pretrained_cfg["label_names"][9], "file" in model.pretrained_cfg)
    features = timm.create_model(name, pretrained=True, features_only=True)
    other = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1)
    print(other.num_classes)
"""


def test_shipped_weights_load_offline(tmp_path: Path) -> None:
    done = in_new_process(
        OFFLINE, tmp_path, *NAMES, HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:9"
    )
    assert done.stdout.splitlines() == ["10 Ankle boot False", "3"] * len(NAMES), done.stderr


@pytest.mark.parametrize("name", mostly_slow(NAMES, 0))
def test_shipped_weights_classify_the_sample(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On the 1,000 images of the sample, about as on all 10,000 that it is drawn from."""
    options = ["--model", name, "--dataset", "sample/fashion_mnist", "--split", "test.tar"]
    assert validate([*options, "-j", "0"]) == 0
    found = float(capsys.readouterr().out.split()[1])
    metrics = ENTRIES[name].metrics
    assert metrics is not None
    assert found == pytest.approx(metrics["test_top1"], abs=3)


def test_changed_file_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = ENTRIES[NAMES[0]]
    copy = tmp_path / entry.file
    copy.parent.mkdir()
    content = bytearray(entry.path.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    monkeypatch.setattr(weights_index, "INDEX_FILE", tmp_path / "weights.json")
    cfg = timm.get_pretrained_cfg(entry.name)
    assert cfg is not None
    monkeypatch.setattr(cfg, "file", str(copy))
    with pytest.raises(RuntimeError, match="that the index lists: its sha256 is"):
        timm.create_model(entry.name, pretrained=True, pretrained_cfg_overlay={"file": str(copy)})
    assert emax_timm.__file__


def test_shipped_weights_are_verified(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "verify"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        *(f"{name}: {entry.sha256}" for name, entry in ENTRIES.items()),
        "verified",
    ]


def test_prediction_out_of_the_box(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = golden.open_split(
        golden.TrainConfig(dataset="sample/fashion_mnist"),
        *("test.tar", "RGB"),
        **{"training": False, "batch_size": 1},
    )
    dataset[999][0].save(tmp_path / "boot.png")
    assert main(["predict", str(tmp_path / "boot.png"), "--top", "1"]) == 0
    _, row = capsys.readouterr().out.splitlines()
    assert row.split(maxsplit=1)[1].startswith("Ankle boot   0.")


def test_metrics_in_the_index_are_of_a_test_split() -> None:
    for entry in json.loads(weights_index.INDEX_FILE.read_text()):
        if entry["repo"] is None:
            assert {"validation_top1", "test_top1"} <= entry["metrics"].keys()
