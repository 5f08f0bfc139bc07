"""EMA against its published formula, and what it has of its own."""

from functools import partial
from typing import Any

import pytest
import torch
from attention_contract import LAYOUTS
from emax_testing import assert_same, gradients, make_ema, published_ema, randn
from plain_forms import by_formulas
from tiers import mostly_slow
from torch import Tensor

from emax_timm.attention import EMA, EMAX, set_grouping

KEYS = ["conv1x1.weight", "conv1x1.bias", "conv3x3.weight", "conv3x3.bias", "gn.weight", "gn.bias"]
# Channels, factor and the groups that follow.
LAYERS = [(1, 32, 1), (3, 32, 1), (32, 32, 32), (40, 32, 8), (100, 32, 4), (36, 24, 12), (12, 1, 1)]
SIZES = [(1, 1), (1, 7), (5, 1), (2, 2), (17, 9)]


@pytest.mark.parametrize(
    ("channels", "factor", "groups", "size"),
    mostly_slow(
        [*((*layer, size) for layer in LAYERS for size in SIZES), (2048, 32, 32, (3, 5))],
        *range(0, 35, 3),  # each layer and each size
    ),
)
def test_ema_and_the_reference_equal_the_published_formula(
    channels: int, factor: int, groups: int, size: tuple[int, int]
) -> None:
    normal = randn(2, channels, *size)
    # As they occur; a mean of 100 deviations; and so faint that eps counts.
    kinds = {"normal": normal, "relu": normal.relu(), "mean": normal + 100, "faint": 0.003 * normal}
    for kind, x in kinds.items():
        module = make_ema(channels, factor=factor)
        assert module.groups == groups
        if kind == "mean":
            with torch.no_grad():  # gates that such an input does not saturate
                module.conv1x1.weight.div_(100)
                module.conv3x3.weight.div_(100)
        weights: list[Tensor] = [module.get_parameter(key) for key in KEYS]
        expected = gradients(module, x, partial(published_ema, weights=weights))
        # A large mean costs the reference digits, as it would torch's group norm.
        tolerance = 1e-9 if kind == "mean" else 1e-10
        assert_same(gradients(module, x, by_formulas(module)), expected, tolerance)
        for layout in LAYOUTS:
            assert_same(gradients(module, x.to(memory_format=layout), module), expected)


def test_the_transposed_image_gives_the_transposed_output_of_a_transposed_kernel() -> None:
    module, x = make_ema(24), randn(2, 24, 7, 5)
    expected = module(x).mT
    with torch.no_grad():
        module.conv3x3.weight.copy_(module.conv3x3.weight.mT.clone())
    torch.testing.assert_close(module(x.mT), expected, rtol=0, atol=1e-12)


def test_each_group_is_treated_by_itself() -> None:
    module, x = make_ema(40), randn(5, 40, 4, 3)
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    shuffled = module(x.unflatten(1, (8, 5))[:, order].flatten(1, 2))
    expected = module(x).unflatten(1, (8, 5))[:, order].flatten(1, 2)
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("group_counts", "warmup"), [("finest", 1.0), (None, 0.0), ([1, 2], 0.0)], ids=str
)
@pytest.mark.parametrize("channels", [40, 96])
def test_ema_is_emax_at_the_finest_grouping_without_gates(
    channels: int, group_counts: Any, warmup: float, dtype: torch.dtype
) -> None:
    knobs = {"group_counts": group_counts, "channel_gate": False, "global_gate": False}
    module, twin = make_ema(channels, dtype=dtype), EMAX(channels, **knobs, dtype=dtype).eval()
    twin.load_state_dict(twin.state_dict() | module.state_dict())
    set_grouping(twin, warmup=warmup)
    x = randn(2, channels, 7, 5, dtype=dtype)
    expected = gradients(module, x, module)
    actual = {key: value for key, value in gradients(twin, x, twin).items() if key in expected}
    assert_same(actual, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    if group_counts == "finest":
        assert torch.equal(actual["out"], expected["out"])
        assert torch.equal(twin.attention(x).spatial, module.attention(x))


def test_training_and_eval_are_the_same_and_draw_nothing() -> None:
    module, x = make_ema(40), randn(2, 40, 7, 5)
    state = torch.get_rng_state()
    assert torch.equal(module(x), module.train()(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_gradient_is_more_than_zero_as_constructed() -> None:
    module = EMA(40)
    results = gradients(module, randn(2, 40, 4, 3, dtype=torch.float32), module)
    assert all(value.abs().max() > 0 for value in results.values())


def test_groups_are_the_greatest_common_divisor() -> None:
    for factor in (1, 8, 24, 32, 1000):
        for channels in (*range(1, 101), 2048):
            module = EMA(channels, factor=factor, device="meta")
            divides_both = [n for n in range(1, factor + 1) if channels % n == factor % n == 0]
            assert module.groups == divides_both[-1], (channels, factor)
            assert module.group_channels * module.groups == channels
    assert EMA(40).groups == 8
    assert "groups=8" in repr(EMA(40))


@pytest.mark.parametrize(("channels", "d"), [(32, 1), (40, 5), (64, 2), (2048, 64)])
def test_the_state_dict_is_the_published_one(channels: int, d: int) -> None:
    shapes = [(d, d, 1, 1), (d,), (d, d, 3, 3), (d,), (d,), (d,)]
    module = EMA(channels)
    state = module.state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == dict(
        zip(KEYS, shapes, strict=True)
    )
    assert dict(module.named_parameters()).keys() == set(KEYS)
    given = {key: randn(*value.shape, dtype=torch.float32) for key, value in state.items()}
    module.load_state_dict(given)
    x = randn(2, channels, 3, 4, dtype=torch.float32)
    weights = [given[key] for key in KEYS]
    torch.testing.assert_close(module(x), published_ema(x, weights), rtol=1e-4, atol=1e-5)
