"""Whole networks with EMAX against the same networks with the naive formulas."""

import copy

import pytest
import timm
import torch
from emax_testing import assert_as_precise, force, randn, randomise, relative_error
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from emax_timm.attention import EMAX
from emax_timm.benchmark.compared_layers import NaiveEMAX


def network_with_emax(name: str, seed: int) -> nn.Module:
    """With norms of which none is zero, and layers that differ in the groups that they choose."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = timm.create_model(name, num_classes=10)
    for number, module in enumerate(network.modules()):
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            with torch.no_grad():
                module.weight.copy_(1 + 0.2 * randn(*module.weight.shape, seed=seed + number))
        if isinstance(module, ConvNeXtBlock):
            assert module.gamma is not None
            nn.init.ones_(module.gamma)  # layer scale, which starts at 1e-6
        if isinstance(module, EMAX):
            randomise(module, seed + number)
            force(module, module.candidates[number % len(module.candidates)])
    # Batch statistics keep deep features in scale; without noise the choice is the same for all.
    network.train()
    for module in network.modules():
        if isinstance(module, EMAX):
            module.eval()
    return network


def with_the_naive_formulas(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    for module in network.modules():
        if type(module) is EMAX:
            module.__class__ = NaiveEMAX
    return network


def results(network: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Logits, and the gradients of the images and of all parameters that have one."""
    images = images.detach().requires_grad_()
    logits = network(images)
    logits.backward(randn(*logits.shape, seed=7, dtype=logits.dtype))
    found = {"logits": logits.detach(), "grad images": images.grad}
    for name, parameter in network.named_parameters():
        found[f"grad {name}"] = parameter.grad
        parameter.grad = None
    return {name: value for name, value in found.items() if value is not None}


def errors(ours: nn.Module, naive: nn.Module, images: Tensor) -> dict[str, tuple[float, float]]:
    """As `float32_errors` of a layer."""
    exact = results(copy.deepcopy(naive).double(), images.double())
    assert all(value.abs().max() > 0 for name, value in exact.items() if "conv" in name)
    actual, rounded = results(ours, images), results(naive, images)
    assert actual.keys() == rounded.keys() == exact.keys()
    return {
        name: (relative_error(actual[name], value), relative_error(rounded[name], value))
        for name, value in exact.items()
    }


def draw(name: str, seed: int) -> tuple[nn.Module, nn.Module, Tensor]:
    ours = network_with_emax(name, seed)
    images = randn(4, 3, 64, 64, seed=seed, dtype=torch.float32)
    return ours, with_the_naive_formulas(ours), images


@pytest.mark.parametrize("name", ["resnet10t_emax", "convnext_atto_emax"])
@pytest.mark.slow
def test_a_network_in_float32_is_as_precise_as_with_the_naive_formulas(name: str) -> None:
    assert_as_precise([errors(*draw(name, seed)) for seed in range(25)])


@pytest.mark.slow
def test_the_check_of_networks_fails_a_slightly_wrong_layer() -> None:
    draws = []
    for seed in range(2):
        ours, naive, images = draw("resnet10t_emax", seed)
        layer = next(module for module in ours.modules() if isinstance(module, EMAX))
        layer.gn.eps = 1e-4
        draws.append(errors(ours, naive, images))
    with pytest.raises(AssertionError, match="error"):
        assert_as_precise(draws)
