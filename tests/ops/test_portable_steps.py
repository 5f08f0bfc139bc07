"""The steps of the portable backend, each against a plain statement of what it computes."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emax_testing import randn
from torch import Tensor, nn

from emax_timm.ops import EMAXConfig
from emax_timm.ops.dispatch import draw_noise
from emax_timm.ops.portable.fine_maps import border_means, correlate
from emax_timm.ops.portable.fine_maps_nd import border_means_nd, correlate_nd
from emax_timm.ops.portable.gates import squeeze_excite
from emax_timm.ops.portable.grouping import choose_groups, mix_groups

# The pass over x --------------------------------------------------------------------------------

SIZES = pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (2, 2), (1, 2), (7, 5)], ids=str)


@SIZES
def test_border_means_are_the_means_of_the_convolutions_by_one_offset(
    size: tuple[int, int],
) -> None:
    x = randn(2, 3, 4, *size)
    images = x.reshape(-1, 1, *size)
    expected = F.conv2d(images, torch.eye(9).double().view(9, 1, 3, 3), padding=1).mean((2, 3))
    actual = border_means(x, x.mean(4), x.mean(3))
    torch.testing.assert_close(actual, expected.view(2, 3, 4, 9), rtol=0, atol=1e-14)


@SIZES
@pytest.mark.parametrize("plain", [False, True])
def test_correlate_is_a_convolution_of_each_group(size: tuple[int, int], plain: bool) -> None:
    x, kernel = randn(2, 3, 4, *size), randn(4, 9, seed=1)
    groups = x.flatten(0, 1)
    expected = F.conv2d(groups, kernel.view(1, 4, 3, 3), padding=1).view(2, 3, *size)
    torch.testing.assert_close(correlate(x, kernel, plain), expected, rtol=0, atol=1e-13)


SHAPES = pytest.mark.parametrize(
    "size", [(1,), (2,), (7,), (1, 1, 1), (2, 1, 3), (1, 5, 2), (4, 3, 5)], ids=str
)
CONVOLUTIONS: Any = {1: F.conv1d, 3: F.conv3d}


@SHAPES
def test_border_means_of_sequences_and_videos_are_those_of_convolutions_by_one_offset(
    size: tuple[int, ...],
) -> None:
    x, offsets = randn(2, 3, 4, *size), 3 ** len(size)
    kernels = torch.eye(offsets).double().view(offsets, 1, *[3] * len(size))
    seen = CONVOLUTIONS[len(size)](x.reshape(-1, 1, *size), kernels, padding=1)
    expected = seen.flatten(2).mean(2).view(2, 3, 4, offsets)
    torch.testing.assert_close(border_means_nd(x, None), expected, rtol=0, atol=1e-14)


@SHAPES
def test_correlate_nd_is_a_convolution_of_each_group(size: tuple[int, ...]) -> None:
    x, kernel = randn(2, 3, 4, *size), randn(4, 3 ** len(size), seed=1)
    weight = kernel.view(1, 4, *[3] * len(size))
    expected = CONVOLUTIONS[len(size)](x.flatten(0, 1), weight, padding=1).view(2, 3, *size)
    torch.testing.assert_close(correlate_nd(x, kernel, None), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("places", [[0], [3], [0, 1, 2], [4, 5, 6], [1, 2, 5], [0, 6]], ids=str)
def test_with_a_mask_both_are_those_of_the_tokens_alone(places: list[int]) -> None:
    x, kernel = randn(2, 3, 4, 7), randn(4, 3, seed=1)
    tokens = torch.tensor([place in places for place in range(7)])
    x[..., ~tokens] = 0
    mask, alone = tokens.expand(2, 7), x[..., tokens]
    expected = border_means_nd(alone, None)
    torch.testing.assert_close(border_means_nd(x, mask), expected, rtol=0, atol=1e-14)
    expected = correlate_nd(alone, kernel, None)
    actual = correlate_nd(x, kernel, mask)[..., tokens]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-13)


# Mixing -----------------------------------------------------------------------------------------


def same_group(fine: int, counts: list[int]) -> Tensor:
    """Whether two fine groups share a group, count by count."""
    blocks = [[j * count // fine for j in range(fine)] for count in counts]
    return torch.tensor([[[a == b for a in row] for b in row] for row in blocks])


def mixing_matrices(
    score: Tensor, choice: Tensor, counts: list[int], warmup: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The matrices that act on the first and the second term, each [b, F, F]."""
    config = EMAXConfig(score.shape[1], counts, batch_vote=False, eps=1e-5)
    mixing = mix_groups(score, choice, config, torch.tensor(warmup))
    return mixing.first, mixing.second


@pytest.mark.parametrize("warmup", [0.0, 0.3, 1.0])
def test_mix_groups_rows_are_stochastic(warmup: float) -> None:
    choice = torch.softmax(randn(3, 6), dim=1)
    for matrix in mixing_matrices(randn(3, 12, seed=1), choice, [1, 2, 3, 4, 6, 12], warmup):
        assert (matrix >= 0).all()
        torch.testing.assert_close(matrix.sum(2), torch.ones(3, 12).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(("k", "count"), [(0, 1), (1, 2), (2, 3), (3, 6)])
def test_mix_groups_weights_are_equal_and_a_softmax_within_each_group(k: int, count: int) -> None:
    score, block = randn(2, 6, seed=1), 6 // count
    choice = F.one_hot(torch.tensor([k, k]), 4).double()
    first, second = mixing_matrices(score, choice, [1, 2, 3, 6])
    for start, stop in pairwise(range(0, 7, block)):
        inside = slice(start, stop)
        weights = torch.softmax(score[:, inside], dim=1)
        assert torch.allclose(first[:, inside, inside], torch.tensor(1 / block).double())
        assert torch.allclose(
            second[:, inside, inside], weights[:, None, :].expand(2, block, block)
        )
    shared = same_group(6, [count])[0]
    assert (first[:, ~shared] == 0).all()
    assert (second[:, ~shared] == 0).all()


@pytest.mark.parametrize("count", [1, 2, 4])
def test_mix_groups_stays_finite_when_scores_differ_by_1000(count: int) -> None:
    # In float32 exp(-1000) is 0: groups far below the largest score need a maximum of their own.
    score = torch.tensor([[1000.0, 1000.0, 0.0, 0.0]], requires_grad=True)
    choice = F.one_hot(torch.tensor([[1, 2, 4].index(count)]), 3).float()
    first, second = mixing_matrices(score, choice, [1, 2, 4])
    for matrix in (first, second):
        torch.testing.assert_close(matrix.sum(2), torch.ones(1, 4), rtol=0, atol=1e-6)
    if count == 2:
        expected = torch.tensor([[0.5, 0.5, 0, 0]] * 2 + [[0, 0, 0.5, 0.5]] * 2)
        assert torch.equal(second[0], expected)
    (gradient,) = torch.autograd.grad((second * randn(4, 4).float()).sum(), score)
    assert gradient.isfinite().all()


# Choosing ---------------------------------------------------------------------------------------

ONE = torch.tensor(1.0)


def test_choose_groups_is_one_hot_at_the_argmax() -> None:
    logits = randn(20, 5)
    choice = choose_groups(logits, ONE, None, batch_vote=False)[0]
    assert torch.equal(choice, F.one_hot(logits.argmax(1), 5).double())


def test_choose_groups_takes_the_first_of_equals() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    choice = choose_groups(logits, ONE, None, batch_vote=False)[0]
    assert choice.argmax(1).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("batch_vote", [False, True])
def test_choose_groups_has_the_gradient_of_the_softmax(
    temperature: float, batch_vote: bool
) -> None:
    logits, cotangent = randn(4, 3), randn(4, 3, seed=1)
    tau = torch.tensor(temperature)
    _, actual = torch.autograd.functional.vjp(
        lambda logits: choose_groups(logits, tau, None, batch_vote)[0], logits, cotangent
    )
    y = torch.softmax(logits / temperature, dim=1)
    expected = y * (cotangent - (y * cotangent).sum(1, keepdim=True)) / temperature
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("choices", "winner"),
    [([0, 2, 2], 2), ([2, 1, 2, 1], 1), ([0, 1, 2], 0), ([2], 2)],
    ids=str,
)
def test_choose_groups_lets_the_batch_vote_and_ties_go_to_the_smallest(
    choices: list[int], winner: int
) -> None:
    # The losers' certainty does not count, only their number.
    logits = F.one_hot(torch.tensor(choices), 3) * torch.linspace(9, 1, len(choices))[:, None]
    choice = choose_groups(logits, ONE, None, batch_vote=True)[0]
    assert choice.argmax(1).tolist() == [winner] * len(choices)
    assert torch.equal(choice.sum(1), torch.ones(len(choices)))


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_choose_groups_samples_with_the_softmaxs_probabilities(temperature: float) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 0.5])
    torch.manual_seed(0)
    tau = torch.tensor(temperature)
    logits = logits.expand(40_000, 4)
    choice, _ = choose_groups(logits, tau, draw_noise(logits, [1, 2, 4, 8], True), False)
    # Four standard deviations of a frequency are 0.01.
    torch.testing.assert_close(choice.mean(0), torch.softmax(logits[0], dim=0), rtol=0, atol=0.01)


def test_choose_groups_survives_an_exponential_sample_of_zero(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Tensor, "exponential_", Tensor.zero_)
    logits = randn(3, 4, dtype=torch.float32)
    noise = draw_noise(logits, [1, 2, 4, 8], True)
    choice, _ = choose_groups(logits, ONE, noise, batch_vote=False)
    assert torch.equal(choice, F.one_hot(logits.argmax(1), 4).float())


def test_draw_noise_draws_where_there_is_something_to_choose_in_training() -> None:
    x = randn(3, 24, 2, 2)
    assert draw_noise(x, [8], True) is None
    assert draw_noise(x, [4, 8], False) is None
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        noise = draw_noise(x.to(dtype), [4, 8], True)
        assert noise is not None
        assert noise.shape == (3, 2)
        assert noise.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# Gates ------------------------------------------------------------------------------------------


def test_squeeze_excite_equals_its_modules() -> None:
    gate = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1), nn.ReLU(), nn.Conv2d(3, 8, 1), nn.Sigmoid()
    ).double()
    x = randn(2, 8, 3, 4)
    actual, hidden = squeeze_excite(x.mean((2, 3)), *gate.parameters())
    torch.testing.assert_close(actual, gate(x).flatten(1), rtol=0, atol=1e-14)
    torch.testing.assert_close(hidden, gate[:3](x).flatten(1), rtol=0, atol=1e-14)
