"""EMAX against the reference at every group count, and the precision of float32."""

import copy
from typing import Any

import pytest
import torch
from attention_contract import LAYOUTS, seeded
from ema_contract import undecided
from emax_testing import (
    assert_as_precise,
    assert_same,
    force,
    gradients,
    make_ema,
    make_emax,
    randn,
    relative_error,
)
from plain_forms import by_formulas
from tiers import mostly_slow
from torch import Tensor

from emax_timm.attention import EMA, EMAX, set_grouping
from emax_timm.ops import reference
from emax_timm.ops.dispatch import draw_noise

# Channels, knobs and candidates. A factor of 12 brings groups of three and six fine groups.
LAYERS: list[tuple[int, dict[str, Any], list[int]]] = [
    (1, {}, [1]),
    (3, {}, [1]),
    (40, {}, [1, 2, 4, 8]),
    (36, {"factor": 12}, [1, 2, 3, 4, 6, 12]),
    (64, {}, [1, 2, 4, 8, 16, 32]),
    (96, {}, [1, 2, 4, 8, 16, 32]),
]
SIZES = [(1, 1), (1, 7), (5, 1), (2, 2), (7, 5)]


def results(module: EMAX, x: Tensor, plain: bool = False) -> dict[str, Tensor]:
    """Output, gradients and maps of the layer, or of its plain form; the noise is the same."""
    found = gradients(module, x, seeded(by_formulas(module) if plain else module))
    torch.manual_seed(0)
    with torch.no_grad():
        if not plain:
            return found | module.attention(x)._asdict()
        weights = module.weights()
        noise = draw_noise(x, module.candidates, module.training)
        return found | reference.emax(x, reference.parts_of(weights), noise)[1]._asdict()


def assert_exact(module: EMAX, x: Tensor) -> dict[str, Tensor]:
    actual = results(module, x)
    assert_same(actual, results(module, x, plain=True))
    return actual


def assert_exact_at_every_group_count(module: EMAX, x: Tensor, counts: list[int]) -> None:
    assert module.candidates == counts
    for count in counts:
        force(module, count)
        assert assert_exact(module, x)["group_count"].tolist() == [count] * len(x)


@pytest.mark.parametrize("size", mostly_slow([(size,) for size in SIZES], 0, 2), ids=str)
@pytest.mark.parametrize(("channels", "knobs", "counts"), LAYERS)
def test_emax_equals_the_formulas_at_every_group_count(
    channels: int, knobs: dict[str, Any], counts: list[int], size: tuple[int, int]
) -> None:
    for layout in LAYOUTS:
        x = randn(2, channels, *size).to(memory_format=layout)
        assert_exact_at_every_group_count(make_emax(channels, **knobs), x, counts)


@pytest.mark.parametrize(("channels", "size"), [(256, (7, 5)), (2048, (1, 1)), (2048, (3, 2))])
def test_a_wide_emax_equals_the_formulas_at_every_group_count(
    channels: int, size: tuple[int, int]
) -> None:
    x = randn(2, channels, *size)
    assert_exact_at_every_group_count(make_emax(channels), x, [1, 2, 4, 8, 16, 32])


def test_emax_equals_the_formulas_in_a_batch_of_different_choices() -> None:
    counts = assert_exact(undecided(40), randn(12, 40, 3, 4))["group_count"]
    assert set(counts.tolist()) == {1, 2, 4, 8}


# 1 - 0.1 is not a float32 number: the complement must be taken in the input's precision.
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("group_counts", [None, [1, 2]], ids=str)
def test_emax_equals_the_formulas_along_the_schedule_of_grouping(
    warmup: float, temperature: float, group_counts: list[int] | None
) -> None:
    module = make_emax(40, group_counts=group_counts)
    force(module, 2)
    set_grouping(module, warmup=warmup, temperature=temperature)
    assert_exact(module, randn(3, 40, 4, 5))


@pytest.mark.parametrize("batch_vote", [False, True], ids=["own_choice", "batch_vote"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_emax_equals_the_formulas_under_training_noise(count: int, batch_vote: bool) -> None:
    module, x = make_emax(40, batch_vote=batch_vote).train(), randn(16, 40, 3, 3)
    force(module, count)
    set_grouping(module, warmup=0.3, temperature=0.5)
    torch.manual_seed(0)
    noise = draw_noise(x, module.candidates, training=True)
    assert noise is not None
    scores = module.attention(x).group_probs.log() + noise
    best, second = scores.topk(2).values.unbind(1)
    assert (best - second).min() > 1e-6, "rounding cannot change the choice"
    assert len(scores.argmax(1).unique()) > 1, "the noise overrules the controller for some"
    assert_exact(module, x)


def test_every_gradient_of_the_exactness_checks_is_far_from_zero() -> None:
    x = randn(2, 40, 7, 5)
    found = gradients(ema := make_ema(40), x, ema)
    assert min(value.abs().max() for value in found.values()) > 1e-3
    module = make_emax(40)
    for count in module.candidates:
        force(module, count)
        assert min(value.abs().max() for value in results(module, x).values()) > 1e-3


# Precision of float32 ---------------------------------------------------------------------------


def float32_case(
    kind: str, make: Any, channels: int, size: tuple[int, int], seed: int
) -> tuple[Any, Tensor]:
    """A layer and its input, neither of which saturates a gate."""
    module = make(channels, seed=seed, dtype=torch.float32)
    if isinstance(module, EMAX):
        force(module, module.candidates[len(module.candidates) // 2])
    x = randn(2, channels, *size, seed=seed, dtype=torch.float32)
    inputs = {"normal": x, "relu": x.relu(), "large_mean": x + 100, "faint": 0.003 * x}
    if kind == "large_mean":
        with torch.no_grad():
            for name, weight in module.named_parameters():
                if name.endswith(("conv1x1.weight", "conv3x3.weight", ".1.weight")):
                    weight.div_(100)
    return module, inputs[kind]


def float32_errors(module: Any, truth: Any, x: Tensor) -> dict[str, tuple[float, float]]:
    """The largest error of each result over its largest value: of the layer, and of the formulas.

    Args:
        truth: Has the parameters that the formulas are given.
    """
    double = copy.deepcopy(truth).double()
    exact = gradients(double, x.double(), by_formulas(double))
    rounded = gradients(truth, x, by_formulas(truth))
    actual = gradients(module, x, module)
    return {
        name: (relative_error(actual[name], value), relative_error(rounded[name], value))
        for name, value in exact.items()
    }


@pytest.mark.parametrize("kind", mostly_slow(["normal", "relu", "large_mean", "faint"], 2, 3))
@pytest.mark.parametrize(
    ("make", "channels", "size"),
    mostly_slow(
        [
            *((make_emax, *case) for case in [(3, (7, 5)), (40, (1, 1)), (96, (14, 14))]),
            (make_emax, 256, (7, 5)),
            *((make_ema, *case) for case in [(3, (7, 5)), (32, (9, 9)), (40, (1, 1))]),
            *((make_ema, *case) for case in [(64, (14, 14)), (100, (5, 7)), (2048, (3, 5))]),
        ],
        *(1, 2, 8),
    ),
)
def test_float32_is_as_precise_as_the_formulas(
    make: Any, channels: int, size: tuple[int, int], kind: str
) -> None:
    draws = []
    for seed in range(9):
        module, x = float32_case(kind, make, channels, size, seed)
        draws.append(float32_errors(module, module, x))
    assert_as_precise(draws)


@pytest.mark.slow
@pytest.mark.parametrize("make", [make_emax, make_ema])
@pytest.mark.parametrize("fault", ["none", "eps", "kernel"])
def test_the_precision_check_fails_a_slightly_wrong_layer(fault: str, make: Any) -> None:
    truth, x = float32_case("normal", make, 96, (14, 14), seed=0)
    module: EMA | EMAX = copy.deepcopy(truth)
    if fault == "none":
        others = [randn(2, 96, 14, 14, seed=seed, dtype=torch.float32) for seed in range(9)]
        assert_as_precise([float32_errors(module, truth, x) for x in others])
        return
    if fault == "eps":
        module.gn.eps = 2e-5
    else:
        with torch.no_grad():
            module.conv3x3.weight[0, 0, 0, 1] *= 1.001
    with pytest.raises(AssertionError, match="error"):
        assert_as_precise([float32_errors(module, truth, x)])
