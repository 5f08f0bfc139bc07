"""Models in the tools that their users put them into: right, or refused with a reason."""

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from emax_testing import randn, randomise
from tiers import mostly_slow
from torch import Tensor, nn
from torch.nn.utils import prune

from emax_timm import EMAX
from emax_timm.attention import EMA

NAMES = ["test_resnet_emax", "test_convnext_emax", "resnet18_ema"]
ALL = pytest.mark.parametrize("name", NAMES)
ONE = pytest.mark.parametrize("name", mostly_slow(NAMES, 0))


def model_named(name: str) -> Any:
    """In eval mode, with attention whose parts are all random."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    for layer in model.modules():
        if isinstance(layer, EMAX | EMA):
            randomise(layer)
    return model


def images(*size: int, seed: int = 0) -> Tensor:
    return randn(*(size or (2, 3, 64, 64)), seed=seed, dtype=torch.float32)


def attention_layers(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if isinstance(layer, EMAX | EMA)]


@pytest.mark.slow
@ONE
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_trace_equals_eager_at_other_sizes(name: str) -> None:
    model = model_named(name)
    traced: Any = torch.jit.trace(model, images())
    for size in [(1, 3, 96, 64), (3, 3, 70, 85)]:
        torch.testing.assert_close(traced(images(*size)), model(images(*size)))


@ONE
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.slow
def test_tensorboard_draws_the_graph(name: str, tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(model_named(name), images())
    (file,) = tmp_path.iterdir()
    assert b"conv3x3" in file.read_bytes()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:UserWarning:torch")
def test_dynamic_quantisation_stays_near_float32() -> None:
    model = model_named("test_resnet_emax")
    quantised = torch.ao.quantization.quantize_dynamic(
        copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
    )
    layer = attention_layers(quantised)[0]
    assert not isinstance(layer.group_controller, nn.Linear), "the controller is quantised, too"
    expected, actual = model(images()), quantised(images())
    assert not torch.equal(actual, expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0.05 * expected.abs().max().item())


@pytest.mark.slow
@ALL
def test_a_pruned_network_trains(name: str) -> None:
    model = model_named(name).train()
    layer = max(attention_layers(model), key=lambda layer: layer.conv1x1.weight.numel())
    prune.l1_unstructured(layer.conv1x1, "weight", amount=0.5)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images()), torch.tensor([0, 1]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    removed = layer.conv1x1.weight_mask == 0
    assert removed.any()
    assert (layer.conv1x1.weight[removed] == 0).all()


@ALL
def test_hooks_fire_on_every_child_of_every_attention(name: str) -> None:
    model, fired = model_named(name), set()
    expected = model(images())
    children = [child for layer in attention_layers(model) for child in list(layer.modules())[1:]]
    handles = [
        child.register_forward_hook(lambda module, *_: fired.add(module)) for child in children
    ]
    torch.testing.assert_close(model(images()), expected)
    assert fired == set(children)
    for handle in handles:
        handle.remove()
    assert torch.equal(model(images()), expected)


@ALL
def test_forward_mode_gives_the_difference_quotient(name: str) -> None:
    model = model_named(name).double()
    x, tangent = images().double(), images(seed=1).double()
    actual = torch.func.jvp(model, (x,), (tangent,))[1]
    step = 1e-6
    with torch.no_grad():
        expected = (model(x + step * tangent) - model(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    [
        "test_convnext_emax",
        "convnext_atto_se",
        "convnext_atto_emax",
        "resnet18_emax",
        "mobilenetv2_100_emax",
    ],
)
@pytest.mark.slow
def test_export_takes_any_height_and_width_from_a_least_one(name: str) -> None:
    model = model_named(name)
    dims = {0: torch.export.Dim("batch", max=4096)}
    dims |= {axis: torch.export.Dim(side, min=64) for axis, side in ((2, "height"), (3, "width"))}
    with torch.no_grad():
        program = torch.export.export(model, (images(),), dynamic_shapes=(dims,), strict=False)
    for size in [(1, 3, 64, 160), (3, 3, 97, 81)]:
        torch.testing.assert_close(
            program.module()(images(*size)), model(images(*size)), rtol=1e-4, atol=1e-5
        )
