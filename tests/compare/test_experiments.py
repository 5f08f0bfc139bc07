"""What a study tries out beside the package's options: a controller that sees more."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from study_testing import made, study_on
from torch import Tensor

from emax_timm import EMAX, capture_attention
from emax_timm.compare.experiments import EPS, WideController, widen_controllers
from emax_timm.errors import UsageError
from emax_timm.ops.reference import emax


def wide_layer() -> EMAX:
    layer = EMAX(8, factor=4).double()
    widen_controllers(torch.nn.Sequential(layer))
    return layer


def logits_of(layer: EMAX, x: Tensor) -> Tensor:
    """The logits of a wide controller by its definition."""
    pixels = x.flatten(2)
    mean = pixels.sum(2) / pixels.shape[2]
    deviation = ((pixels - mean[:, :, None]).square().sum(2) / pixels.shape[2] + EPS).sqrt()
    seen = torch.cat([mean, deviation, pixels.max(2).values], 1)
    assert isinstance(layer.group_controller, WideController)
    return seen @ layer.group_controller.weight.T + layer.group_controller.bias


def test_wide_controller_is_the_formulas_with_its_own_logits() -> None:
    torch.manual_seed(0)
    layer = wide_layer()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(6, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    layer.eval()
    with torch.no_grad():
        layer.group_controller.bias -= logits_of(layer, x).mean(0)  # type: ignore[union-attr]
    logits = logits_of(layer, x)
    assert len(set(logits.argmax(1).tolist())) > 1
    parts = layer.parts()._replace(group_controller=lambda _: logits)
    expected, maps = emax(x, parts)
    wanted = torch.autograd.grad(expected.square().sum(), [x, *layer.parameters()])
    found = layer(x)
    torch.testing.assert_close(found, expected)
    gradients = torch.autograd.grad(found.square().sum(), [x, *layer.parameters()])
    for gradient, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, other)
    with capture_attention(torch.nn.Sequential(layer)) as captured:
        copy.deepcopy(torch.nn.Sequential(layer))(x)
        torch.nn.Sequential(layer)(x)
    (seen,) = captured.values()
    assert torch.equal(seen.group_count, maps.group_count)  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="within a call of its layer alone"):
        layer.attention(x)


def test_widened_model_starts_as_the_defined_one_and_trains_all_of_its_parameters() -> None:
    def model(change: Any) -> Any:
        torch.manual_seed(0)
        model = timm.create_model("test_resnet_emax", num_classes=3)
        change(model)
        return model, torch.rand(1)

    (plain, number), (wide, other) = model(lambda _: None), model(widen_controllers)
    assert number == other  # of the random numbers that follow
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(plain.eval()(x), wide.eval()(x), rtol=1e-4, atol=1e-5)
    assert sum(isinstance(module, WideController) for module in wide.modules()) > 2
    for (
        parameter
    ) in wide.parameters():  # those that end a block start at 0, and let nothing through
        if parameter.ndim == 1 and not parameter.any():
            torch.nn.init.normal_(parameter)
    wide.train()(x).square().sum().backward()
    assert all(parameter.grad is not None for parameter in wide.parameters())
    controllers = [m for m in wide.modules() if isinstance(m, WideController)]
    for controller in controllers:
        assert controller.weight.grad is not None
        assert controller.weight.grad[:, controller.in_features // 3 :].any()


def test_model_without_a_choice_cannot_be_widened() -> None:
    layer = EMAX(8, group_counts="finest")
    with pytest.raises(UsageError, match="no EMAX layer of the model chooses"):
        widen_controllers(torch.nn.Sequential(layer))


@pytest.mark.slow
def test_run_of_an_experiment_is_reproducible(images: Path, tmp_path: Path) -> None:
    def change(study: dict[str, Any]) -> None:
        study["methods"]["wide"] = {"like": "emax", "experiment": "wide_controller"}

    study = study_on(images, tmp_path, change)
    found = [made(study, "wide", 1, tmp_path / name) for name in ("first", "second")]
    weights = [tmp_path / name / "model.safetensors" for name in ("first", "second")]
    assert len({hashlib.sha256(path.read_bytes()).hexdigest() for path in weights}) == 1
    assert found[0]["test"] == found[1]["test"]
    assert found[0]["experiment"] == "wide_controller"
    assert found[0]["parameters"] > made(study, "emax", 1, tmp_path / "plain")["parameters"]
