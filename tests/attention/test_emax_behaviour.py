"""What EMAX promises beyond its values: independence, gradients, dtypes, layouts, identity."""

from typing import Any

import pytest
import torch
from emax_testing import VARIANTS, emax_results, force, make_emax, randn, reference_of
from torch import Tensor, nn

from emax_timm.attention import EMAX, set_grouping


def undecided(channels: int, **knobs: Any) -> EMAX:
    """A layer whose samples choose differently."""
    module = make_emax(channels, **knobs)
    force(module, module.candidates[0], margin=0.0)
    with torch.no_grad():
        assert module.group_controller is not None
        module.group_controller.weight.mul_(20)
    return module


# Batch and random numbers -----------------------------------------------------------------------


def test_emax_in_eval_treats_each_sample_by_itself() -> None:
    module = undecided(40)
    x = randn(5, 40, 4, 3)
    assert len(module.attention(x).group_count.unique()) > 1
    alone = torch.cat([module(sample) for sample in x.split(1)])
    torch.testing.assert_close(module(x), alone, rtol=0, atol=1e-12)


def test_emax_with_batch_vote_depends_on_the_batch() -> None:
    module = undecided(40, batch_vote=True)
    x = randn(5, 40, 4, 3)
    alone = torch.cat([module(sample) for sample in x.split(1)])
    changes = (module(x) - alone).abs().amax((1, 2, 3))
    assert (changes > 1e-4).any()
    assert (changes < 1e-12).any(), "those who agree with the winner keep their output"


def test_emax_batch_vote_leaves_each_samples_own_choice_in_the_maps() -> None:
    x = randn(5, 40, 4, 3)
    voting, free = undecided(40, batch_vote=True), undecided(40)
    assert torch.equal(voting.attention(x).group_count, free.attention(x).group_count)


def test_emax_in_eval_neither_reads_nor_moves_the_random_generator() -> None:
    module, x = undecided(40), randn(5, 40, 4, 3)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = module(x)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(module(x), first)


def test_emax_in_training_samples_the_group_count() -> None:
    module, x = make_emax(40).train(), randn(1, 40, 4, 3)
    force(module, 8, margin=1.0)
    torch.manual_seed(0)
    outputs = {round(module(x).sum().item(), 6) for _ in range(60)}
    assert len(outputs) == len(module.candidates)


def test_emax_leaves_its_input_alone() -> None:
    module, x = make_emax(24), randn(2, 24, 4, 3)
    before = x.clone()
    with torch.inference_mode():
        module(x)
    assert torch.equal(x, before)


# Gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "warmup"), [(True, 0.0), (True, 0.5), (True, 1.0), (False, 1.0)]
)
@pytest.mark.parametrize("variant", VARIANTS)
def test_emax_gives_every_parameter_a_gradient_tensor(
    variant: str, training: bool, warmup: float
) -> None:
    # As constructed: gamma and the controller's weight are zero.
    module = EMAX(24, **VARIANTS[variant]).train(training)
    set_grouping(module, warmup=warmup)
    module(randn(2, 24, 4, 3, dtype=torch.float32)).sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_emax_controller_learns_as_soon_as_the_warm_up_lets_it(training: bool) -> None:
    module, x = make_emax(40).train(training), randn(2, 40, 4, 3)
    strengths = []
    for warmup in (0.0, 0.5, 1.0):
        set_grouping(module, warmup=warmup)
        gradient = emax_results(module, x)["grad group_controller.weight"]
        strengths.append(gradient.abs().max().item())
    assert strengths[0] == 0
    assert min(strengths[1:]) > 1e-4


def test_emax_is_finite_where_fine_groups_differ_wildly() -> None:
    module = EMAX(64)
    x = randn(2, 64, 5, 5, dtype=torch.float32)
    x[:, :32] *= 3000
    for count in module.candidates:
        force(module, count)
        results = emax_results(module.eval(), x)
        for name, value in results.items():
            assert value.isfinite().all(), f"{name} at {count} groups"


# Precision --------------------------------------------------------------------------------------

HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)


@HALVES
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_emax_maps_are_the_same_under_autocast(half: torch.dtype, training: bool) -> None:
    module = make_emax(40, dtype=torch.float32).train(training)
    x = randn(3, 40, 7, 5, dtype=torch.float32)
    torch.manual_seed(0)
    expected = module.attention(x)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=half):
        actual = module.attention(x)
    for name, value in expected._asdict().items():
        assert value.dtype == (torch.int64 if name == "group_count" else torch.float32)
        assert torch.equal(getattr(actual, name), value), name


@HALVES
def test_emax_under_autocast_keeps_the_dtype_of_its_input(half: torch.dtype) -> None:
    module = make_emax(40, dtype=torch.float32)
    force(module, 2)
    x = randn(3, 40, 7, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=half):
        assert module(x).dtype == torch.float32
        out = module(x.to(half))
    assert out.dtype == half
    torch.testing.assert_close(out.float(), module(x), rtol=0.02, atol=0.02)


@HALVES
def test_emax_of_a_half_input_computes_its_maps_in_float32(half: torch.dtype) -> None:
    module = make_emax(40, dtype=torch.float32)
    x = randn(3, 40, 7, 5).to(half)
    expected, actual = module.attention(x.float()), module.attention(x)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    out = module(x)
    assert out.dtype == half
    assert torch.equal(out, module(x.float()).to(half))


@HALVES
@pytest.mark.parametrize("variant", VARIANTS)
def test_emax_in_half_precision_is_close_to_float32(half: torch.dtype, variant: str) -> None:
    module = make_emax(24, dtype=torch.float32, **VARIANTS[variant])
    force(module, module.candidates[0])
    x = randn(2, 24, 7, 5, dtype=torch.float32)
    expected = module(x)
    module.to(half)
    out = emax_results(module, x.to(half))["out"]
    assert out.dtype == half
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    maps = module.attention(x.to(half))
    assert {value.dtype for value in maps} == {torch.float32, torch.int64}


def test_emax_survives_half_inputs_whose_squares_overflow() -> None:
    module = make_emax(24, dtype=torch.float32)
    out = module((300 * randn(2, 24, 9, 9)).half())
    assert out.isfinite().all()


# Layout and identity ----------------------------------------------------------------------------


def test_emax_with_channels_last_weights_computes_the_same() -> None:
    module, x = make_emax(96), randn(2, 96, 5, 7)
    expected = module(x)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["default", "spatial_only"])
@pytest.mark.parametrize(("channels", "given"), [(1, 3), (24, 48), (24, 12), (24, 25)])
def test_emax_refuses_an_input_with_other_channels(channels: int, given: int, variant: str) -> None:
    module = EMAX(channels, **VARIANTS[variant])
    with pytest.raises((RuntimeError, ValueError)):
        module(torch.zeros(2, given, 4, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_emax_keeps_the_memory_format(
    dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    module = make_emax(24, dtype=torch.float32)
    x = randn(2, 24, 5, 7, dtype=dtype).to(memory_format=memory_format)
    for context in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu")):
        with context:
            out = module(x)
        assert out.is_contiguous(memory_format=memory_format)
        assert out.stride() == x.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_emax_with_a_closed_residual_gate_is_bitwise_the_identity(
    training: bool, memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    module = make_emax(24, dtype=torch.float32).train(training)
    nn.init.zeros_(module.residual_gate)
    x = randn(2, 24, 5, 7, dtype=dtype).to(memory_format=memory_format)
    assert torch.equal(module(x), x)


@pytest.mark.parametrize("variant", VARIANTS)
def test_emax_starts_at_the_identity_with_gate_init_0(variant: str) -> None:
    module = EMAX(24, gate_init=0, **VARIANTS[variant])
    x = randn(2, 24, 5, 7, dtype=torch.float32)
    assert torch.equal(module(x), x)


# Maps -------------------------------------------------------------------------------------------


def test_emax_maps_rebuild_the_output() -> None:
    module, x = make_emax(40), randn(2, 40, 7, 5)
    maps = module.attention(x)
    spatial = maps.spatial.repeat_interleave(5, dim=1)
    assert module.gamma is not None
    fused = x * spatial + module.gamma * x * maps.channel[:, :, None, None]
    gate = module.residual_gate[:, None, None]
    expected = x + gate * (fused * maps.global_[:, :, None, None] - x)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)


def test_emax_maps_of_a_missing_gate_are_the_constants_it_contributes() -> None:
    maps = make_emax(24, channel_gate=False, global_gate=False).attention(randn(2, 24, 3, 3))
    assert torch.equal(maps.channel, torch.zeros(2, 24, dtype=torch.float64))
    assert torch.equal(maps.global_, torch.ones(2, 24, dtype=torch.float64))


def test_emax_group_probabilities_ignore_noise_temperature_and_warm_up() -> None:
    module, x = make_emax(40), randn(6, 40, 3, 3)
    expected = module.attention(x)
    set_grouping(module.train(), warmup=0.0, temperature=0.1)
    actual = module.attention(x)
    assert torch.equal(actual.group_probs, expected.group_probs)
    assert torch.equal(actual.group_count, expected.group_count)


def test_emax_takes_the_smallest_count_when_all_are_equally_probable() -> None:
    module, x = make_emax(40), randn(2, 40, 3, 3)
    with torch.no_grad():
        assert module.group_controller is not None
        module.group_controller.weight.zero_()
        module.group_controller.bias.zero_()
    out = module(x)
    assert module.attention(x).group_count.tolist() == [1, 1]
    force(module, 1)
    torch.testing.assert_close(out, module(x), rtol=0, atol=1e-12)


# The course of grouping -------------------------------------------------------------------------


class Wrapper(nn.Module):
    """What DistributedDataParallel does to the names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def three_layers() -> nn.Sequential:
    return nn.Sequential(EMAX(8), nn.ReLU(), nn.Sequential(EMAX(16), EMAX(3)))


def courses(model: nn.Module) -> list[tuple[float, float]]:
    return [
        (round(layer.warmup.item(), 6), round(layer.temperature.item(), 6))
        for layer in model.modules()
        if isinstance(layer, EMAX)
    ]


@pytest.mark.parametrize("wrap", [lambda model: model, Wrapper, torch.compile])
def test_set_grouping_sets_all_layers_and_counts_them(wrap: Any) -> None:
    model = three_layers()
    assert set_grouping(wrap(model), warmup=0.25, temperature=0.5) == 3
    assert courses(model) == [(0.25, 0.5)] * 3


def test_set_grouping_keeps_what_it_is_not_given() -> None:
    model = three_layers()
    set_grouping(model, warmup=0.25)
    set_grouping(model, temperature=2)
    assert set_grouping(model) == 3
    assert courses(model) == [(0.25, 2.0)] * 3


def test_set_grouping_finds_nothing_in_a_plain_model() -> None:
    assert set_grouping(nn.Sequential(nn.Conv2d(3, 3, 1)), warmup=0.5) == 0


@pytest.mark.parametrize(
    "values",
    [
        {"warmup": -0.1},
        {"warmup": 1.1},
        {"warmup": float("nan")},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"warmup": 0.5, "temperature": -1.0},
    ],
    ids=str,
)
def test_set_grouping_refuses_values_out_of_range(values: dict[str, float]) -> None:
    model = three_layers()
    with pytest.raises(ValueError, match=f"not {list(values.values())[-1]}"):
        set_grouping(model, **values)
    assert courses(model) == [(1.0, 1.0)] * 3, "a refused call changes nothing"


def test_set_grouping_keeps_the_buffers_and_their_dtype() -> None:
    # A compiled or exported model holds on to these very tensors.
    module = make_emax(8)
    buffers = module.warmup, module.temperature
    set_grouping(module, warmup=0.5, temperature=0.5)
    assert (module.warmup, module.temperature) == buffers
    assert module.warmup is buffers[0]
    assert module.temperature is buffers[1]
    assert module.warmup.dtype == torch.float32


def test_set_grouping_reaches_the_reference_through_a_state_dict() -> None:
    module = make_emax(24)
    set_grouping(module, warmup=0.25, temperature=0.5)
    naive = reference_of(module, 24)
    assert (naive.warmup.item(), naive.temperature.item()) == (0.25, 0.5)
