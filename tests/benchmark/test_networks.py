"""`emax benchmark models` measures what it says; its figures are not tested."""

import json
from pathlib import Path

import pytest
import timm
import torch

from emax_timm.benchmark.command import benchmark
from emax_timm.benchmark.networks import Setting, _peak_of_a_process, make_network
from emax_timm.models.cost import activation_bytes
from emax_timm.tables import marks

SMALL = ["--models", "resnet18", "--img-size", "32", "--batch-size", "2", "--rounds", "1"]


@pytest.mark.slow
def test_networks_are_measured_against_their_baselines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, methods = tmp_path / "models.json", ["baseline", "EMAX"]
    text = tmp_path / "text.md"
    begin, end = marks("benchmark models")
    text.write_text(f"# Cost\n{begin}\nold\n{end}\n")
    options = [*SMALL, "--methods", *methods, "--json", str(file), "--write", str(text)]
    assert benchmark(["models", *options]) == 0
    found = json.loads(file.read_text())["models"]["resnet18"]
    assert list(found) == methods
    for figures in found.values():
        assert figures["inference"][0] > 0
        assert figures["training step"][0] > 0
    printed = capsys.readouterr().out
    assert printed in text.read_text()
    assert "old" not in text.read_text()
    row = next(line for line in printed.splitlines() if line.startswith("| EMAX |"))
    ratio = found["EMAX"]["inference"][0] / found["baseline"]["inference"][0]
    assert f"| {ratio:.2f} |" in row


def test_training_can_be_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark(["models", *SMALL, "--systems", "plain", "EMAX", "--no-training"]) == 0
    printed = capsys.readouterr().out
    assert "inference" in printed
    assert "training step" not in printed
    assert "peak memory" not in printed


@pytest.mark.slow
def test_the_peak_grows_by_what_autograd_keeps() -> None:
    ballast = bytearray(b"1" * (1 << 31))  # of this process, whose peak is not asked for
    setting = Setting(64, 64, torch.device("cpu"), torch.float32, torch.contiguous_format)
    few = _peak_of_a_process("resnet18", "EMAX", setting._replace(batch=2))
    many = _peak_of_a_process("resnet18", "EMAX", setting)
    network = timm.create_model("resnet18_emax")
    kept = activation_bytes(network, torch.randn(62, 3, 64, 64))
    assert 0.9 * kept < many - few < 3 * kept
    assert many < len(ballast)


def test_compared_attentions_are_the_published_ones() -> None:
    setting = Setting(1, 32, torch.device("cpu"), torch.float32, torch.contiguous_format)
    published = timm.create_model("resnet18_se", attn_kwargs={"gate_init": None})
    ours = make_network("resnet18", "SE", setting)
    assert ours.state_dict().keys() == published.state_dict().keys()


def test_a_document_without_its_marks_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.md"
    text.write_text("# Cost\n")
    assert benchmark(["models", *SMALL, "--write", str(text)]) == 2
    assert "<!-- benchmark models: begin -->" in capsys.readouterr().err
    assert text.read_text() == "# Cost\n"


@pytest.mark.parametrize("name", ["resnet19", "resnet10t"])
def test_a_network_that_is_not_there_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark(["models", "--models", name, "--systems", "SE"]) == 2
    assert f"no model {name}_se" in capsys.readouterr().err
