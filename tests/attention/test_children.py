"""EMA and EMAX whose children must be called: replaced, wrapped, pruned, parametrised or hooked."""

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emax_testing import assert_same, gradients, make_ema, make_emax, randn
from plain_forms import by_formulas
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from emax_timm import use_backend
from emax_timm.ops import dispatch

pytestmark = pytest.mark.parametrize("make", [make_ema, make_emax], ids=["EMA", "EMAX"])


@pytest.fixture(autouse=True)
def nothing_said() -> Iterator[None]:
    said = set(dispatch._reported)
    dispatch._reported.clear()
    yield
    dispatch._reported.update(said)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def replace(layer: Any) -> None:
    layer.conv3x3 = nn.Sequential(layer.conv3x3, Twice())


def parametrise(layer: Any) -> None:
    parametrize.register_parametrization(layer.conv3x3, "weight", Twice())
    parametrize.register_parametrization(layer.conv3x3, "bias", Twice())


def hook(layer: Any) -> None:
    layer.conv3x3.register_forward_hook(lambda module, args, out: 2 * out)


def another_forward(layer: Any) -> None:
    forward = layer.conv3x3.forward
    layer.conv3x3.forward = lambda x: 2 * forward(x)


CHANGES = pytest.mark.parametrize("change", [replace, parametrise, hook, another_forward])


@CHANGES
def test_a_changed_child_is_called(make: Any, change: Callable[[Any], None]) -> None:
    layer, x = make(24), randn(2, 24, 7, 5)
    expected = copy.deepcopy(layer)
    with torch.no_grad():
        expected.conv3x3.weight.mul_(2)
        expected.conv3x3.bias.mul_(2)
    change(layer)
    for training in (False, True):
        layer.train(training)
        expected.train(training)
        torch.manual_seed(0)
        out = layer(x)
        torch.manual_seed(0)
        torch.testing.assert_close(out, expected(x), rtol=0, atol=1e-10)


def test_a_child_of_another_precision_is_called_in_it(make: Any) -> None:
    layer = make(24, dtype=torch.float32)
    layer.conv3x3.register_forward_hook(lambda module, args, out: None)
    x = randn(2, 24, 7, 5, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    out = layer(x)
    assert out.dtype == torch.bfloat16
    assert out.stride() == x.stride()
    torch.testing.assert_close(out.float(), layer(x.float()), rtol=0.01, atol=0.01)


def test_a_pruned_child_loses_its_weights_and_learns(make: Any) -> None:
    layer, x = make(24), randn(2, 24, 7, 5)
    prune.l1_unstructured(layer.conv3x3, "weight", amount=0.5)
    assert (layer.conv3x3.weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(layer(x), by_formulas(layer)(x), rtol=0, atol=1e-10)
    grad = gradients(layer, x, layer)["grad conv3x3.weight_orig"]
    assert (grad[layer.conv3x3.weight_mask == 0] == 0).all()
    assert grad.abs().max() > 1e-3


def test_hooks_of_all_children_fire_and_change_nothing(make: Any) -> None:
    layer, x = make(24), randn(2, 24, 7, 5)
    expected, fired = gradients(layer, x, layer), set()
    for name, child in layer.named_modules():
        if name:
            child.register_forward_hook(lambda *_, name=name: fired.add(name))
    assert_same(gradients(layer, x, layer), expected)
    assert fired == {name for name, _ in layer.named_modules() if name}


def test_it_refuses_an_input_of_another_shape(make: Any) -> None:
    layer = make(24, dtype=torch.float32)
    hook(layer)
    for shape in [(2, 48, 4, 4), (2, 12, 4, 4), (2, 25, 4, 4), (24, 4, 4), (24,), (2, 24, 4, 4, 4)]:
        with pytest.raises(ValueError, match=r"x must be \[b, "):
            layer(torch.zeros(shape))


def test_the_maps_are_those_of_the_children(make: Any) -> None:
    layer, x = make(24), randn(2, 24, 7, 5)
    expected = layer.attention(x)
    layer.conv3x3.register_forward_hook(lambda *_: None)
    torch.testing.assert_close(layer.attention(x), expected, rtol=0, atol=1e-10)


def test_it_says_so_once(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    layer, x = make(24), randn(2, 24, 7, 5)
    with caplog.at_level(logging.WARNING):
        layer(x)
        assert not caplog.records
        hook(layer)
        layer(x)
        layer(x)
    assert [record.message for record in caplog.records] == [
        "EMAX calls its layers one by one, which is slower: conv3x3 has hooks"
    ]


def test_it_is_refused_where_another_backend_is_asked_for(make: Any) -> None:
    layer, x = make(24), randn(2, 24, 7, 5)
    hook(layer)
    with use_backend("portable"):
        layer(x)
    with use_backend("cpp"), pytest.raises(RuntimeError, match="cpp was asked for, but conv3x3"):
        layer(x)


@CHANGES
def test_it_cannot_be_scripted(make: Any, change: Callable[[Any], None]) -> None:
    layer = make(24)
    change(layer)
    with pytest.raises(RuntimeError, match=r"cannot be scripted: its conv3x3 .*torch\.jit\.trace"):
        torch.jit.script(nn.Sequential(layer))


@CHANGES
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_it_can_be_traced(make: Any, change: Callable[[Any], None]) -> None:
    layer, x = make(24), randn(2, 24, 7, 5)
    change(layer)
    traced: Any = torch.jit.trace(nn.Sequential(layer), x)
    torch.testing.assert_close(traced(2 * x), layer(2 * x), rtol=0, atol=1e-10)
