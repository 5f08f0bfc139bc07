"""What is measured on a GPU; without one, on events and figures of an invented one."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from emax_timm.benchmark import layers, networks
from emax_timm.benchmark.command import benchmark
from emax_timm.benchmark.gpu import Event, Kernels, Span, kernels, peak_bytes, spans
from emax_timm.benchmark.layers import PASSES
from emax_timm.benchmark.layers_report import report_modules
from emax_timm.benchmark.methods import Tensors
from emax_timm.benchmark.networks_report import report_models
from emax_timm.benchmark.timing import Measured

FLUSH = "void at::native::vectorized_elementwise_kernel<4, bitwise_not_kernel_cuda>"
COST = Kernels(Measured(0.002, 0.001, 0.003), 30, 1, {"pool": 0.0015, "pool 2": 0.0005})
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


def test_events_belong_to_the_call_after_the_flush() -> None:
    events = [
        Event("left over from before", 0.0, 99.0),
        Event(FLUSH, 100.0, 50.0),
        Event("Memcpy DtoD (Device -> Device)", 170.0, 2.0),
        Event("pool", 160.0, 5.0),
        Event("Memset (Device)", 180.0, 1.0),
        Event(FLUSH, 200.0, 50.0),
        Event(FLUSH, 300.0, 50.0),
        Event("scale", 360.0, 7.0),
        Event("scale", 370.0, 4.0),
    ]
    first, second, third = spans(reversed(events), FLUSH)
    assert (first[1:3], second, third[1:3]) == ((1, 2), Span(0, 0, 0, {}), (2, 0))
    assert (first.seconds, third.seconds) == pytest.approx((8e-6, 11e-6))
    assert next(iter(first.each)) == "pool"
    assert third.each == pytest.approx({"scale": 7e-6, "scale 2": 4e-6})


@needs_gpu
def test_kernels_of_a_known_call() -> None:
    device = torch.device("cuda")
    x = torch.ones(1 << 20, device=device)
    found = kernels({"one": lambda: x * 2, "two": lambda: x * 2 + 1}, 5, device)
    assert (found["one"].launches, found["two"].launches) == (1, 2)
    assert 0 < found["one"].seconds.median < found["two"].seconds.median < 1e-3
    assert peak_bytes(lambda: x * 2, device) == 4 << 20


@pytest.fixture
def _invented(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that answers what a GPU is asked."""

    def costs(calls: Mapping[str, Any], *_: Any) -> dict[str, Kernels]:
        return dict.fromkeys(calls, COST)

    for module in (layers, networks):
        monkeypatch.setattr(module, "kernels", costs)
        monkeypatch.setattr(module, "peak_bytes", lambda *_: 1 << 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)


@pytest.mark.usefixtures("_invented")
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_report_on_layers(amp: torch.dtype | None) -> None:
    cpu, methods = torch.device("cpu"), ["SE", "EMAX"]
    x = torch.randn(1, 16, 4, 4, dtype=amp)
    costs = layers.measure_shape(methods, x, 1, dtype=torch.float32, amp=amp, gpu=True)
    assert costs.gpu["forward"]["SE"] == COST
    found = layers.measure_modules(
        [(1, 16, 4, 4)], 1, cpu, torch.float32, torch.channels_last, methods, amp
    )
    found["peak"] = {name: [costs.peak[name]] for name in methods}
    found["gpu"] = {
        passes: {name: [cost[name]] for name in methods} for passes, cost in costs.gpu.items()
    }
    report = report_modules(found)
    for title in ("forward, wall ms", "forward, GPU ms", "forward + backward, GPU ms"):
        assert f"| {title} | 1x16x4x4 | / SE |" in report
    assert "| SE | 2 (1-3) | 1.00 (worst 1.00) |" in report
    assert "| EMAX | 30 | 1 | 30 | 1 | 1 |" in report
    assert "kernels of" not in report  # of other libraries; ours have names that say something
    found["gpu"][PASSES[1]]["EMAX, Triton"] = [COST]
    report = report_modules(found)
    assert "| EMAX, Triton: kernels of forward + backward, us | 1x16x4x4 |" in report
    assert "| pool | 1500.0 |\n| pool 2 | 500.0 |" in report
    assert ("autocast to bfloat16" in report) == (amp is not None)


@pytest.mark.slow
@pytest.mark.usefixtures("_invented")
@pytest.mark.parametrize("training", [True, False])
def test_report_on_networks(training: bool) -> None:
    setting = networks.Setting(
        2, 32, torch.device("cpu"), torch.float32, torch.channels_last, torch.bfloat16
    )
    methods = ["baseline", "SE", "EMAX"]
    kinds = {networks.INFERENCE: networks.inference}
    if training:
        kinds[networks.STEP] = networks._training_step
    models = {"resnet18": networks._on_gpu("resnet18", setting, 1, methods, kinds)}
    found = networks.measure_models(["resnet18"], setting, 1, ["baseline"], training=False)
    found |= {"models": models, "machine": {"device": "invented", "cuda": "13.0"}}
    for own in models["resnet18"].values():
        own["images per second"] = dict.fromkeys(own["images per second"], 1500.0)
    report = report_models(found)
    words = "| SE | seresnet18 | 1500 | 1.00 | 1.00 | 2 | 30 |"
    assert words in report
    assert ("| peak, GiB |" in report) == training
    assert ("training step, images/s" in report) == training


@pytest.mark.usefixtures("_invented")
def test_a_method_that_cannot_compute_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken(torch.nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no kernel of 8 channels\nand more")

    monkeypatch.setitem(layers.LAYERS, "CBAM", Broken)
    tensors = Tensors(torch.device("cpu"), torch.float32, torch.contiguous_format)
    assert layers._working(["SE", "CBAM", "EMAX"], [(1, 8, 4, 4)], tensors) == ["SE", "EMAX"]
    assert capsys.readouterr().err == "CBAM is left out: no kernel of 8 channels\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("what", ["modules", "models", "growth"])
def test_no_gpu_is_one_line(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert benchmark([what, "--device", "cuda"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "sees no GPU here" in error


def test_triton_is_refused_where_it_cannot_serve(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--methods", "EMAX, Triton", "--shapes", "1x8x4x4", "--rounds", "1"]
    assert benchmark(["modules", *options, "--dtype", "float64"]) == 2
    assert "triton" in capsys.readouterr().err
