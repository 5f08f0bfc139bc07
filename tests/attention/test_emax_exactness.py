"""EMAX against the naive formulas: values, maps and gradients."""

import copy
from typing import Any

import pytest
import torch
from emax_testing import (
    VARIANTS,
    assert_as_precise,
    assert_same,
    emax_results,
    force,
    gumbel_noise,
    make_emax,
    naive_results,
    randn,
    reference_of,
    relative_error,
)
from torch import Tensor

from emax_timm.attention import EMAX, set_grouping
from emax_timm.attention.reference import NaiveEMAX, naive_ema

FORMATS = [torch.contiguous_format, torch.channels_last]
# Channels, knobs and candidates. A factor of 12 brings groups of three and six fine groups.
LAYERS: list[tuple[int, dict[str, Any], list[int]]] = [
    (1, {}, [1]),
    (3, {}, [1]),
    (40, {}, [1, 2, 4, 8]),
    (36, {"factor": 12}, [1, 2, 3, 4, 6, 12]),
    (64, {}, [1, 2, 4, 8, 16, 32]),
    (96, {}, [1, 2, 4, 8, 16, 32]),
    (256, {}, [1, 2, 4, 8, 16, 32]),
    (2048, {}, [1, 2, 4, 8, 16, 32]),
]
SIZES = [(1, 1), (1, 7), (5, 1), (2, 2), (7, 5)]


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("channels", "knobs", "counts"), LAYERS)
def test_emax_equals_the_naive_formulas_at_every_group_count(
    channels: int,
    knobs: dict[str, Any],
    counts: list[int],
    size: tuple[int, int],
    memory_format: torch.memory_format,
) -> None:
    fast = make_emax(channels, **knobs)
    x = randn(2, channels, *size).to(memory_format=memory_format)
    assert fast.candidates == counts
    for count in counts:
        force(fast, count)
        actual = emax_results(fast, x)
        assert actual["group_count"].tolist() == [count, count]
        assert_same(actual, naive_results(reference_of(fast, channels, **knobs), x))


def test_emax_equals_the_naive_formulas_in_a_batch_of_different_choices() -> None:
    fast = make_emax(40)
    force(fast, 4, margin=0.0)
    with torch.no_grad():
        assert fast.group_controller is not None
        fast.group_controller.weight.mul_(20)
    x = randn(12, 40, 3, 4)
    actual = emax_results(fast, x)
    assert set(actual["group_count"].tolist()) == {1, 2, 4, 8}
    assert_same(actual, naive_results(reference_of(fast, 40), x))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
@pytest.mark.parametrize("batch_vote", [False, True], ids=["own_choice", "batch_vote"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_emax_equals_the_naive_formulas_in_every_variant(
    variant: str, batch_vote: bool, training: bool
) -> None:
    knobs: dict[str, Any] = VARIANTS[variant] | {"batch_vote": batch_vote}
    fast = make_emax(24, **knobs).train(training)
    # An even bias: the noise decides, and in eval the weights.
    force(fast, fast.candidates[0], margin=0.0)
    set_grouping(fast, warmup=0.3, temperature=0.5)
    naive = reference_of(fast, 24, **knobs)
    x = randn(9, 24, 5, 6)
    noise = None
    if training:
        probabilities = naive.attention(x)["group_probs"]
        noise = gumbel_noise(probabilities, seed=5)
        assert_clear_choice(probabilities.log() + noise)
    assert_same(emax_results(fast, x, seed=5), naive_results(naive, x, noise))


# 1 - 0.1 is not a float32 number: the complement must be taken in the input's precision.
@pytest.mark.parametrize("warmup", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize("group_counts", [None, [1, 2]], ids=str)
def test_emax_equals_the_naive_formulas_along_the_course_of_grouping(
    warmup: float, temperature: float, group_counts: list[int] | None
) -> None:
    fast = make_emax(40, group_counts=group_counts)
    force(fast, 2)
    set_grouping(fast, warmup=warmup, temperature=temperature)
    naive = reference_of(fast, 40, group_counts=group_counts)
    assert float(naive.warmup) == pytest.approx(warmup)
    x = randn(3, 40, 4, 5)
    assert_same(emax_results(fast, x), naive_results(naive, x))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_emax_equals_the_naive_formulas_under_training_noise(count: int) -> None:
    fast = make_emax(40).train()
    force(fast, count)
    naive = reference_of(fast, 40)
    x = randn(16, 40, 3, 3)
    probabilities = naive.attention(x)["group_probs"]
    noise = gumbel_noise(probabilities, seed=3)
    assert_clear_choice(probabilities.log() + noise)
    chosen = (probabilities.log() + noise).argmax(1)
    assert len(chosen.unique()) > 1, "the noise overrules the controller for some samples"
    assert_same(emax_results(fast, x, seed=3), naive_results(naive, x, noise))


def test_emax_equals_the_naive_formulas_on_a_strided_input() -> None:
    fast = make_emax(24)
    x = randn(4, 48, 12, 5)[::2, ::2, 1::2].transpose(2, 3)
    assert_same(emax_results(fast, x), naive_results(reference_of(fast, 24), x))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_every_gradient_of_the_exactness_checks_is_far_from_zero(count: int) -> None:
    module = make_emax(40)
    force(module, count)
    results = emax_results(module, randn(2, 40, 7, 5))
    assert min(value.abs().max().item() for value in results.values()) > 1e-3


def assert_clear_choice(scores: Tensor) -> None:
    """Rounding cannot change the argmax."""
    if scores.shape[1] > 1:
        best, second = scores.topk(2).values.unbind(1)
        assert (best - second).min() > 1e-6


# Equality with EMA ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("group_counts", "warmup"), [("finest", 1.0), (None, 0.0), ([1, 2], 0.0)], ids=str
)
@pytest.mark.parametrize(("channels", "groups"), [(3, 1), (40, 8), (96, 32)])
def test_emax_without_gates_is_ema_at_the_finest_grouping(
    channels: int, groups: int, group_counts: Any, warmup: float
) -> None:
    if group_counts == [1, 2] and groups == 1:
        group_counts = [1]
    fast = make_emax(channels, group_counts=group_counts, channel_gate=False, global_gate=False)
    torch.nn.init.ones_(fast.residual_gate)
    if fast.group_controller is not None:
        force(fast, 1)
    set_grouping(fast, warmup=warmup)
    weights = [fast.conv1x1.weight, fast.conv1x1.bias, fast.conv3x3.weight, fast.conv3x3.bias]
    x = randn(2, channels, 7, 5)
    expected = naive_ema(x, groups, *weights, fast.gn.weight, fast.gn.bias)  # type: ignore[arg-type]
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-12)


# Numeric gradients ------------------------------------------------------------------------------


@pytest.mark.parametrize("knobs", [{"group_counts": "finest"}, {}], ids=["finest", "warm_up"])
@pytest.mark.parametrize("size", [(1, 1), (3, 2)], ids=str)
def test_emax_gradients_are_the_numeric_ones(knobs: dict[str, Any], size: tuple[int, int]) -> None:
    # Only where no choice is made: the straight-through gradient is not the numeric one.
    module = make_emax(6, factor=2, reduction=2, **knobs)
    set_grouping(module, warmup=0.0)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = [randn(2, 6, *size), *(value.detach() for value in module.parameters())]
    inputs = [value.requires_grad_() for value in inputs]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_emax_gradients_are_the_numeric_ones_at_a_forced_coarse_grouping() -> None:
    # K = 1 leaves nothing to choose, and the blocks are larger than the fine groups.
    module = make_emax(8, factor=4, group_counts=[2])
    x = randn(2, 8, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(module, [x], fast_mode=True)


# Precision of float32 ---------------------------------------------------------------------------


def float32_case(channels: int, size: tuple[int, int], kind: str, seed: int) -> tuple[EMAX, Tensor]:
    """A layer and its input, neither of which saturates a gate."""
    fast = make_emax(channels, seed=seed, dtype=torch.float32)
    force(fast, fast.candidates[len(fast.candidates) // 2])
    x = randn(2, channels, *size, seed=seed, dtype=torch.float32)
    if kind == "relu":
        x = x.relu()
    if kind == "large_mean":
        x = x + 100
        with torch.no_grad():
            for part in ("conv1x1", "conv3x3", "channel_gate.1", "global_attn.1"):
                fast.get_parameter(f"{part}.weight").div_(100)
    return fast, x


def float32_errors(fast: EMAX, naive: NaiveEMAX, x: Tensor) -> dict[str, tuple[float, float]]:
    """The largest error of each result over its largest value: EMAX's and the naive formulas'."""
    exact = naive_results(copy.deepcopy(naive).double(), x.double())
    rounded = naive_results(naive, x)
    actual = emax_results(fast, x)
    assert torch.equal(actual["group_count"], exact["group_count"])
    return {
        name: (relative_error(actual[name], value), relative_error(rounded[name], value))
        for name, value in exact.items()
    }


FLOAT32_LAYERS = [(3, (7, 5)), (40, (1, 1)), (96, (14, 14)), (256, (7, 5))]


@pytest.mark.parametrize("kind", ["normal", "relu", "large_mean"])
@pytest.mark.parametrize(("channels", "size"), FLOAT32_LAYERS, ids=str)
def test_emax_in_float32_is_as_precise_as_the_naive_formulas(
    channels: int, size: tuple[int, int], kind: str
) -> None:
    draws = []
    for seed in range(9):
        fast, x = float32_case(channels, size, kind, seed)
        draws.append(float32_errors(fast, reference_of(fast, channels), x))
    assert_as_precise(draws)


@pytest.mark.parametrize("fault", ["eps", "kernel"])
def test_the_precision_check_fails_a_slightly_wrong_emax(fault: str) -> None:
    fast, x = float32_case(96, (14, 14), "normal", seed=0)
    naive = reference_of(fast, 96)
    if fault == "eps":
        fast.gn.eps = 2e-5
    else:
        with torch.no_grad():
            fast.conv3x3.weight[0, 0, 0, 1] *= 1.001
    with pytest.raises(AssertionError, match="error"):
        assert_as_precise([float32_errors(fast, naive, x)])
