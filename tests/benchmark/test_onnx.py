"""`emax benchmark onnx` measures what it says; its figures are not tested."""

import json
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch

from emax_timm.benchmark import onnx
from emax_timm.benchmark.command import benchmark
from emax_timm.hub import export_model

SMALL = ["onnx", "--models", "test_resnet", "--methods", "baseline", "EMAX", "--img-size", "32"]


@pytest.mark.slow
def test_networks_are_measured_in_both_runtimes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "onnx.json"
    assert benchmark([*SMALL, "--rounds", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["machine"]["onnxruntime"] == onnxruntime.__version__
    methods = found["models"]["test_resnet"]
    assert list(methods) == ["baseline", "EMAX"]
    runtimes = {
        name: [times[name][0] for times in methods.values()] for name in methods["baseline"]
    }
    assert set(runtimes) == {"PyTorch", "ONNX Runtime"}
    (_, eager), (baseline, emax) = runtimes["PyTorch"], runtimes["ONNX Runtime"]
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.startswith("| EMAX |"))
    assert f"| {emax / baseline:.2f} |" in row
    assert row.endswith(f"| {emax / eager:.2f} |")


@pytest.mark.slow
def test_the_session_computes_what_the_network_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = torch.nn.Conv2d(3, 2, 3).eval()
    export_model(network, tmp_path / "network.onnx", input_size=(3, 8, 8))
    images, outputs = torch.randn(2, 3, 8, 8), []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def watched(session: onnxruntime.InferenceSession, binding: onnxruntime.IOBinding) -> None:
        run(session, binding)
        outputs.append(torch.from_numpy(binding.copy_outputs_to_cpu()[0]))

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", watched)
    onnx._session(tmp_path / "network.onnx", images)()
    torch.testing.assert_close(outputs[0], network(images))


def test_a_missing_onnxruntime_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert benchmark(SMALL) == 2
    error = capsys.readouterr().err
    assert "pip install 'emax-timm[export]'" in error
    assert error.count("\n") == 1


def test_a_device_that_onnxruntime_lacks_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["AzureExecutionProvider"])
    assert benchmark(SMALL) == 2
    assert "cannot use cpu; it has AzureExecutionProvider" in capsys.readouterr().err
