"""EMAX's own autograd node: what it keeps, and the gradients that are asked for in unusual ways.

Its gradients are compared with the naive formulas' in `test_emax_exactness.py`.
"""

import math
from typing import Any

import pytest
import torch
from emax_testing import VARIANTS, make_emax, randn
from torch import Tensor, nn

from emax_timm.attention import EMA, EMAX, set_grouping
from emax_timm.attention.functional import emax_plain
from emax_timm.attention.grouping import draw_noise
from emax_timm.benchmark.modules import SHAPES, saved_bytes


@pytest.mark.parametrize("layer", [EMAX, EMA])
def test_saved_activations_are_little_more_than_the_input(layer: type[nn.Module]) -> None:
    ratios = []
    for _, channels, height, width in SHAPES:
        x = randn(2, channels, height, width, dtype=torch.float32)
        module = layer(channels).train()  # pyright: ignore[reportCallIssue]
        ratios.append(saved_bytes(module, x) / (x.numel() * x.element_size()))
    assert min(ratios) >= 1, "x itself is kept"
    assert math.prod(ratios) ** (1 / len(ratios)) <= 1.2
    assert max(ratios) <= 1.3


def test_saved_activations_of_plain_autograd_are_several_times_the_input() -> None:
    """The bound above can fail."""

    class Plain(EMAX):
        def forward(self, x: Tensor) -> Tensor:
            layer = self._layer()
            return emax_plain(x, layer, draw_noise(x, layer, self.training))

    x = randn(2, 256, 14, 14, dtype=torch.float32)
    assert saved_bytes(Plain(256), x) > 3 * x.numel() * x.element_size()


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_that_can_be_differentiated_again_are_the_same(variant: str) -> None:
    module = make_emax(24, **VARIANTS[variant])
    x = randn(2, 24, 5, 4).requires_grad_()
    inputs = [x, *module.parameters()]
    loss = module(x).square().sum()
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, create_graph=True)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert b.requires_grad


def test_second_derivatives_are_the_numeric_ones() -> None:
    module = make_emax(6, factor=2, reduction=2)
    # No choice is made: the straight-through gradient is not the numeric one.
    set_grouping(module, warmup=0.0)
    x = randn(2, 6, 3, 2).requires_grad_()
    assert torch.autograd.gradgradcheck(module, [x], fast_mode=True)


def test_gradients_of_single_samples_by_vmap() -> None:
    module = make_emax(24)
    x = randn(3, 24, 5, 4)

    def loss(sample: Tensor) -> Tensor:
        return module(sample.unsqueeze(0)).square().sum()

    actual = torch.func.vmap(torch.func.grad(loss))(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [EMAX, EMA])
def test_compile_traces_one_graph_without_gradients(layer: type[nn.Module]) -> None:
    module = layer(24).eval()  # pyright: ignore[reportCallIssue]
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = randn(2, 24, 5, 4, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_networks_may_add_to_the_output_in_place(
    memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    module = make_emax(24, dtype=torch.float32)
    x = randn(2, 24, 5, 4, dtype=dtype).to(memory_format=memory_format).requires_grad_()
    gradients = []
    for in_place in (False, True):
        out = module(x)
        assert out.stride() == x.stride()
        if in_place:
            out += x
        else:
            out = out + x
        gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("frozen", ["input", "parameters", "some"])
def test_gradients_where_not_everything_asks_for_one(frozen: str) -> None:
    module = make_emax(24)
    x = randn(2, 24, 5, 4).requires_grad_()
    everything: dict[str, Any] = dict(module.named_parameters(), x=x)
    gradients = torch.autograd.grad(module(x).sin().sum(), [*everything.values()])
    expected = dict(zip(everything, gradients, strict=True))
    chosen = {
        "input": [name for name in everything if name != "x"],
        "parameters": ["x"],
        "some": ["gamma", "conv3x3.bias", "residual_gate"],
    }[frozen]
    for name, tensor in everything.items():
        tensor.requires_grad_(name in chosen)
    actual = torch.autograd.grad(module(x).sin().sum(), [everything[name] for name in chosen])
    for name, gradient in zip(chosen, actual, strict=True):
        assert torch.equal(gradient, expected[name]), name
