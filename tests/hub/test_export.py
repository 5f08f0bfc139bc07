"""`emax export`: real files, read by onnxruntime and by a process without this package."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from export_testing import SIZE, OtherInGraphs, files_in, onnx, onnxruntime
from torch import Tensor, nn

from emax_timm.attention import EMAX
from emax_timm.hub import ExportError, export, export_model
from emax_timm.models.export_check import verify
from emax_timm.training import checkpoint
from emax_timm.training.model_config import save_model_config

SLOW = pytest.mark.slow
ROOT = Path(__file__).parents[2]
SMALL = {"channels": [16, 16, 32, 64], "num_classes": 5, "attn_stages": (3,)}
# Attention in one stage, to save time: tracing a layer takes seconds.
FAMILIES = {
    "convnext_atto_emax": (3,),
    "mobilenetv2_100_emax": (0,),
    "resnet18_cbam": (3,),
}
MODELS = (
    pytest.param(("resnet10t_emax", SMALL), id="small", marks=SLOW),
    *(
        pytest.param((name, {"num_classes": 5, "attn_stages": stages}), id=name, marks=SLOW)
        for name, stages in FAMILIES.items()
    ),
)
ALL_STAGES = pytest.param(("resnet10t_emax", {"num_classes": 5}), id="all_stages", marks=SLOW)
SMALL_ARGUMENTS = [
    *("resnet10t_emax", "--num-classes", "5", "--img-size", "64"),
    *("--model-kwargs", "channels=[16,16,32,64]", "attn_stages=[3]"),
]
# Neither the sizes that are traced nor those that the export compares on.
UNSEEN = ((1, 3, 96, 64), (5, 3, 70, 91), (2, 3, 128, 65))


@torch.no_grad()
def randomised(name: str, **arguments: Any) -> nn.Module:
    """A model in eval mode in which no weight hides a part of the graph.

    A bias of the controller decides the choice of groups: the argmax of EMAX is not continuous.
    """
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments).eval()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm2d, nn.GroupNorm, nn.LayerNorm)):
            module.weight.normal_(1, 0.2)
            module.bias.normal_(0, 0.2)  # type: ignore[union-attr]
        if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 1.5)
        if isinstance(module, EMAX):
            module.residual_gate.normal_(0.8, 0.3)
            if module.gamma is not None:
                module.gamma.fill_(0.7)
            assert module.group_controller is not None
            module.group_controller.weight.normal_(0, 0.01)
            module.group_controller.bias.zero_()
            module.group_controller.bias[1] = 4
    for key, parameter in model.named_parameters():
        if key.endswith((".gamma", "layer_scale.weight")) and parameter.numel() > 1:
            parameter.normal_(0.5, 0.2)
    head = model.get_classifier()  # type: ignore[operator]
    head.weight.normal_(0, 0.3)  # of logits of about 1
    return model


def images(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed))


def assert_decided(model: nn.Module, inputs: Tensor) -> None:
    """That no layer's choice of groups is near a tie, and none is the finest."""
    margins = []

    def look(layer: nn.Module, args: Any) -> None:
        assert isinstance(layer, EMAX)
        maps = layer.attention(args[0])
        top = maps.group_probs.topk(2).values
        margins.append((top[:, 0] - top[:, 1]).min().item())
        assert (maps.group_count < layer.groups).all()

    hooks = [m.register_forward_pre_hook(look) for m in model.modules() if isinstance(m, EMAX)]
    model(inputs)
    for hook in hooks:
        hook.remove()
    assert all(margin > 0.3 for margin in margins)


def run_onnx(path: Path, inputs: Tensor) -> list[Tensor]:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    arrays: Any = session.run(None, {"images": inputs.numpy()})
    return [torch.from_numpy(array) for array in arrays]


def assert_near(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
    assert error <= 1e-4


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return randomised("resnet10t_emax", **SMALL)


@pytest.fixture(scope="module")
def onnx_file(small: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's; not to be written to."""
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    export_model(small, path, input_size=SIZE)
    return path


# Parity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [*MODELS, ALL_STAGES])
@torch.no_grad()
def test_onnx_computes_the_model_at_sizes_never_seen(case: Any, tmp_path: Path) -> None:
    model = randomised(case[0], **case[1])
    report = export_model(model, tmp_path / "model.onnx", input_size=SIZE)
    assert os.listdir(tmp_path) == ["model.onnx"]  # nor data beside it
    shapes = [check.shape for check in report.checks]
    assert len({shape[0] for shape in shapes}) >= 3
    assert any(h != w for *_, h, w in shapes)
    assert any(h % 32 and w % 32 for *_, h, w in shapes)
    for shape in UNSEEN:
        assert shape not in shapes
        inputs = images(*shape)
        assert_decided(model, inputs)
        expected = model(inputs)
        assert expected.abs().max() > 0.5
        (actual,) = run_onnx(report.path, inputs)
        assert_near(actual, expected)


ELSEWHERE = """
import sys, torch
from safetensors.torch import load_file, save_file
program = torch.export.load("model.pt2").module()
with torch.no_grad():
    save_file({k: program(x) for k, x in load_file("in.safetensors").items()}, "out.safetensors")
assert not {"emax_timm", "timm"} & sys.modules.keys()
"""


@pytest.mark.parametrize("case", MODELS[:-1])
@torch.no_grad()
def test_pt2_computes_the_model_in_a_process_without_this_package(
    case: Any, tmp_path: Path
) -> None:
    model = randomised(case[0], **case[1])
    report = export_model(model, tmp_path / "model.pt2", input_size=SIZE)
    assert os.listdir(tmp_path) == ["model.pt2"]
    assert report.ranges["batch"] == (1, None)
    inputs = {str(number): images(*shape) for number, shape in enumerate(UNSEEN)}
    safetensors.torch.save_file(inputs, tmp_path / "in.safetensors")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", ELSEWHERE], cwd=tmp_path, env=environment, check=True, timeout=120
    )
    outputs = safetensors.torch.load_file(tmp_path / "out.safetensors")
    for key, shape in enumerate(UNSEEN):
        assert shape not in [check.shape for check in report.checks]
        assert_near(outputs[str(key)], model(inputs[str(key)]))


@pytest.mark.slow
def test_onnx_names_its_axes(onnx_file: Path) -> None:
    model = onnx.load(onnx_file)
    onnx.checker.check_model(model)
    (entry,), (end,) = model.graph.input, model.graph.output
    dims = [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]
    assert (entry.name, end.name) == ("images", "output")
    assert dims == ["batch", 3, "height", "width"]
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]


@pytest.mark.slow
def test_export_with_fixed_axes_takes_one_shape(small: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    report = export_model(small, path, input_size=SIZE, fixed_size=True, fixed_batch=True)
    assert {check.shape for check in report.checks} == {(1, 3, 64, 64)}
    assert "batch 1, height 64, width 64" in str(report)
    program = torch.export.load(path).module()
    for shape in UNSEEN:
        with pytest.raises(Exception, match=r"size|shape"):
            program(images(*shape))


@pytest.mark.slow
def test_export_of_small_images_says_which_it_takes(small: nn.Module, tmp_path: Path) -> None:
    report = export_model(small, tmp_path / "model.pt2", input_size=(3, 28, 28))
    least, most = report.ranges["height"]
    assert least <= 28
    assert most == 32  # beyond, the last stage has more than a pixel
    assert f"height from {least} to 32" in str(report)
    assert all(h <= 32 and w <= 32 for *_, h, w in (check.shape for check in report.checks))


@SLOW
@torch.no_grad()
def test_export_of_features_has_an_output_per_stage(tmp_path: Path) -> None:
    path = tmp_path / "features.onnx"
    model = randomised("resnet10t_emax", **SMALL)
    checkpoint.save_best(model, tmp_path)
    weights = tmp_path / "model.safetensors"
    options = ["--checkpoint", str(weights), "--features-only", "--output", str(path)]
    assert export([*SMALL_ARGUMENTS, *options]) == 0
    twin = timm.create_model("resnet10t_emax", features_only=True, **SMALL).eval()
    twin.load_state_dict(model.state_dict(), strict=False)
    inputs = images(*UNSEEN[1])
    expected = twin(inputs)
    actual = run_onnx(path, inputs)
    assert len(actual) == len(expected) == 5
    for ours, theirs in zip(actual, expected, strict=True):
        assert_near(ours, theirs)


# Verification that fails ------------------------------------------------------------------------


@pytest.mark.slow
def test_verification_finds_one_changed_weight_in_an_onnx_file(
    small: nn.Module, onnx_file: Path, tmp_path: Path
) -> None:
    shapes = [(1, *SIZE), (2, 3, 65, 80)]
    assert len(verify(onnx_file, small, "onnx", shapes)) == 2
    model = onnx.load(onnx_file)
    # The last layer's bias, which no rewriting folds into another tensor.
    bias = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("fc.bias"))
    values = onnx.numpy_helper.to_array(bias).copy()
    values[0] += 0.01
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(ExportError, match=r"away from the model on input 1, 1 x 3 x 64 x 64"):
        verify(tmp_path / "changed.onnx", small, "onnx", shapes)


@pytest.mark.slow
def test_verification_finds_another_choice_of_groups(onnx_file: Path) -> None:
    other = randomised("resnet10t_emax", **SMALL)
    layer = next(module for module in other.modules() if isinstance(module, EMAX))
    assert layer.group_controller is not None
    assert len(verify(onnx_file, other, "onnx", [(1, *SIZE)])) == 1
    with torch.no_grad():
        layer.group_controller.bias.copy_(layer.group_controller.bias.flip(0))
    with pytest.raises(ExportError, match="away from the model"):
        verify(onnx_file, other, "onnx", [(1, *SIZE)])


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("factor", [1.01, float("nan")])
@pytest.mark.slow
def test_failed_verification_leaves_the_target_as_it_was(
    format: str, factor: float, tmp_path: Path
) -> None:
    model, path = OtherInGraphs(factor).eval(), tmp_path / f"model.{format}"
    with pytest.raises(ExportError, match=r"away from the model on input 1, 1 x 3 x 64 x 64"):
        export_model(model, path, input_size=SIZE)
    assert files_in(tmp_path) == {}
    path.write_bytes(b"precious")
    with pytest.raises(ExportError, match="away from the model"):
        export_model(model, path, input_size=SIZE, overwrite=True)
    assert files_in(tmp_path) == {path.name: b"precious"}
    export_model(OtherInGraphs(1.0).eval(), path, input_size=SIZE, overwrite=True)
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() != b"precious"


@pytest.mark.slow
def test_failed_verification_exits_with_one_line(
    small: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {key: value.clone() for key, value in small.state_dict().items()}
    state["fc.weight"][0] = 3e38  # finite, but not what comes out of it
    state["fc.bias"][0] = 3e38
    safetensors.torch.save_file(state, tmp_path / "w.safetensors")
    before = files_in(tmp_path)
    options = ["--checkpoint", str(tmp_path / "w.safetensors"), "--output"]
    target = str(tmp_path / "model.pt2")
    status = export([*SMALL_ARGUMENTS, *options, target])
    captured = capsys.readouterr()
    assert (status, captured.out) == (1, "")
    (line,) = captured.err.splitlines()
    assert line.startswith("emax export: error: the model's own output is not finite on input 1")
    assert files_in(tmp_path) == before


# The command ------------------------------------------------------------------------------------


@SLOW
@torch.no_grad()
def test_command_exports_the_folder_of_a_run_and_says_nothing_else(
    small: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint.save_best(small, folder)
    arguments = {**SMALL, "attn_stages": [3]}
    data_config = {"input_size": SIZE}
    save_model_config(small, folder / "config.json", arguments, data_config, None)
    program = "import sys; from emax_timm.hub import export; sys.exit(export(sys.argv[1:]))"
    result = subprocess.run(
        [sys.executable, "-c", program, "local-dir:run", "--output", "model.onnx"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert (result.returncode, result.stderr) == (0, "")
    head, *table = result.stdout.splitlines()
    assert head.startswith("model.onnx: ONNX, opset 18")
    assert "height from 1, width from 1" in head
    assert [line.split("  ")[0] for line in table] == [
        *("input", "1 x 3 x 64 x 64", "2 x 3 x 48 x 80", "3 x 3 x 77 x 69")
    ]
    inputs = images(*UNSEEN[1])
    assert_near(run_onnx(tmp_path / "model.onnx", inputs)[0], small(inputs))


@pytest.mark.slow
def test_command_says_that_weights_are_initial_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-classes", "0", "--img-size", "32", "--fixed-size", "--output"]
    assert export(["resnet10t", *options, str(tmp_path / "model.pt2")]) == 0
    out = capsys.readouterr().out
    assert "initial" in out
    assert "height 32" in out
    features = torch.export.load(tmp_path / "model.pt2").module()(images(2, 3, 32, 32))
    assert features.shape == (2, 512)
