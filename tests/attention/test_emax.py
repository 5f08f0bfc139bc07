"""What EMAX alone has: a group count per sample, its schedule, maps and initial values."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from attention_contract import MODES, seeded
from ema_contract import undecided
from emax_testing import VARIANTS, assert_same, emax_results, force, gradients, make_emax, randn
from graph_contract import assert_equal_on_all_sizes
from torch import nn

from emax_timm.attention import EMAX, set_grouping
from emax_timm.benchmark.layers import saved_bytes


@pytest.fixture
def fresh_compiler() -> Any:
    yield
    torch.compiler.reset()


# The choice of a group count --------------------------------------------------------------------


def test_samples_choose_by_themselves_in_eval_mode() -> None:
    module, x = undecided(40), randn(5, 40, 4, 3)
    assert len(module.attention(x).group_count.unique()) > 1
    alone = torch.cat([module(sample) for sample in x.split(1)])
    torch.testing.assert_close(module(x), alone, rtol=0, atol=1e-12)


def test_a_batch_that_votes_takes_one_choice_and_tells_each_samples_own() -> None:
    voting, free, x = undecided(40, batch_vote=True), undecided(40), randn(5, 40, 4, 3)
    alone = torch.cat([voting(sample) for sample in x.split(1)])
    changes = (voting(x) - alone).abs().amax((1, 2, 3))
    assert (changes > 1e-4).any()
    assert (changes < 1e-12).any(), "those who agree with the winner keep their output"
    assert torch.equal(voting.attention(x).group_count, free.attention(x).group_count)


def test_training_samples_every_group_count() -> None:
    module, x = make_emax(40).train(), randn(1, 40, 4, 3)
    force(module, 8, margin=1.0)
    torch.manual_seed(0)
    outputs = {round(module(x).sum().item(), 6) for _ in range(60)}
    assert len(outputs) == len(module.candidates)


def test_the_smallest_count_is_taken_when_all_are_equally_probable() -> None:
    module, x = make_emax(40), randn(2, 40, 3, 3)
    assert module.group_controller is not None
    nn.init.zeros_(module.group_controller.weight)
    nn.init.zeros_(module.group_controller.bias)
    out = module(x)
    assert module.attention(x).group_count.tolist() == [1, 1]
    force(module, 1)
    torch.testing.assert_close(out, module(x), rtol=0, atol=1e-12)


def test_group_probabilities_ignore_noise_temperature_and_warm_up() -> None:
    module, x = make_emax(40), randn(6, 40, 3, 3)
    expected = module.attention(x)
    set_grouping(module.train(), warmup=0.0, temperature=0.1)
    actual = module.attention(x)
    assert torch.equal(actual.group_probs, expected.group_probs)
    assert torch.equal(actual.group_count, expected.group_count)


@MODES
def test_the_controller_learns_as_soon_as_the_warm_up_lets_it(training: bool) -> None:
    module, x = make_emax(40).train(training), randn(2, 40, 4, 3)
    strengths = []
    for warmup in (0.0, 0.5, 1.0):
        set_grouping(module, warmup=warmup)
        gradient = emax_results(module, x)["grad group_controller.weight"]
        strengths.append(gradient.abs().max().item())
    assert strengths[0] == 0
    assert min(strengths[1:]) > 1e-4


@MODES
def test_every_parameter_has_a_finite_gradient_at_every_point_of_the_schedule(
    training: bool,
) -> None:
    # As constructed: gamma and the controller's weight are zero.
    for knobs, warmup in product(VARIANTS.values(), (0.0, 0.5, 1.0)):
        module = EMAX(24, **knobs).train(training)
        set_grouping(module, warmup=warmup)
        results = gradients(module, randn(2, 24, 4, 3, dtype=torch.float32), module)
        assert all(value.isfinite().all() for value in results.values())


def test_values_are_finite_where_fine_groups_differ_wildly() -> None:
    module, x = EMAX(64).eval(), randn(2, 64, 5, 5, dtype=torch.float32)
    x[:, :32] *= 3000
    for count in module.candidates:
        force(module, count)
        for name, value in emax_results(module, x).items():
            assert value.isfinite().all(), f"{name} at {count} groups"


# Maps -------------------------------------------------------------------------------------------


def test_maps_of_a_missing_gate_are_the_constants_it_contributes() -> None:
    maps = make_emax(24, channel_gate=False, global_gate=False).attention(randn(2, 24, 3, 3))
    assert torch.equal(maps.channel, torch.zeros(2, 24, dtype=torch.float64))
    assert torch.equal(maps.global_, torch.ones(2, 24, dtype=torch.float64))


# The schedule of grouping -----------------------------------------------------------------------


def three_layers() -> nn.Sequential:
    return nn.Sequential(EMAX(8), nn.ReLU(), nn.Sequential(EMAX(16), EMAX(3)))


def schedules(model: nn.Module) -> list[tuple[float, float]]:
    layers = [layer for layer in model.modules() if isinstance(layer, EMAX)]
    return [(round(m.warmup.item(), 6), round(m.temperature.item(), 6)) for m in layers]


@pytest.mark.parametrize(
    "wrap", [lambda model: model, lambda model: nn.ModuleDict({"module": model}), torch.compile]
)
def test_set_grouping_sets_all_layers_counts_them_and_keeps_what_it_is_not_given(wrap: Any) -> None:
    model = three_layers()
    assert set_grouping(wrap(model), warmup=0.25, temperature=0.5) == 3
    assert schedules(model) == [(0.25, 0.5)] * 3
    set_grouping(wrap(model), temperature=2)
    assert set_grouping(wrap(model)) == 3
    assert schedules(model) == [(0.25, 2.0)] * 3
    assert set_grouping(wrap(nn.Sequential(nn.Conv2d(3, 3, 1))), warmup=0.5) == 0


@pytest.mark.parametrize(
    "values",
    [
        *({"warmup": value} for value in (-0.1, 1.1, math.nan)),
        *({"temperature": value} for value in (0.0, -1.0, math.inf, math.nan)),
        {"warmup": 0.5, "temperature": -1.0},
    ],
    ids=str,
)
def test_set_grouping_refuses_values_out_of_range(values: dict[str, float]) -> None:
    model = three_layers()
    with pytest.raises(ValueError, match=f"not {list(values.values())[-1]}"):
        set_grouping(model, **values)
    assert schedules(model) == [(1.0, 1.0)] * 3, "a refused call changes nothing"


def test_set_grouping_keeps_the_buffers_and_their_dtype() -> None:
    # A compiled or exported model holds on to these very tensors.
    module = make_emax(8)
    warmup, temperature = module.warmup, module.temperature
    set_grouping(module, warmup=0.5, temperature=0.5)
    assert module.warmup is warmup
    assert module.temperature is temperature
    assert warmup.dtype == temperature.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The TorchScript type system")  # of torch.fx's own class
def test_a_traced_layer_can_be_scripted_and_follows_set_grouping() -> None:
    # The traced module shares the buffers; as plain modules its layers are no longer EMAX.
    module = make_emax(24, dtype=torch.float32)
    traced = torch.fx.symbolic_trace(module)
    assert_equal_on_all_sizes(torch.jit.script(traced), module)
    force(module, 1)
    set_grouping(module, warmup=0.0)
    assert_equal_on_all_sizes(traced, module)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_a_compiled_layer_follows_set_grouping_without_compiling_again() -> None:
    module, x = make_emax(24, dtype=torch.float32), randn(2, 24, 7, 5, dtype=torch.float32)
    force(module, 1)
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    outputs = [compiled(x)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for warmup in (0.5, 0.0):
            assert set_grouping(compiled, warmup=warmup) == 1
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], module(x))
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])


# Graphs that cost more than the contract's ------------------------------------------------------


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.slow
def test_export_of_a_batch_that_votes() -> None:
    module = make_emax(24, dtype=torch.float32, batch_vote=True)
    dims = {axis: torch.export.Dim(f"d{axis}", max=1 << 20) for axis in (0, 2, 3)}
    x = randn(2, 24, 7, 5, dtype=torch.float32)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": dims}, strict=False)
    assert_equal_on_all_sizes(program.module(), module)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(("training", "autocast"), [(False, False), (True, False), (True, True)])
def test_compile_with_inductor_equals_eager(training: bool, autocast: bool) -> None:
    module = make_emax(24, dtype=torch.float32).train(training)
    x = randn(2, 24, 7, 5, dtype=torch.float32).to(memory_format=torch.channels_last)
    # Without fallback_random Inductor draws other numbers than eager does.
    compiled: Any = torch.compile(module, fullgraph=True, options={"fallback_random": True})
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        expected = gradients(module, x, seeded(module))
        assert_same(gradients(module, x, seeded(compiled)), expected, 1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_inductor_keeps_one_feature_map_for_the_backward_pass() -> None:
    module = make_emax(64, factor=8, dtype=torch.float32)
    x = randn(2, 64, 14, 14, dtype=torch.float32)
    compiled: Any = torch.compile(module, dynamic=False, fullgraph=True)
    assert saved_bytes(compiled, x) < 2 * x.numel() * x.element_size()


# Arguments, initial values and state ------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "knobs", "groups", "candidates"),
    [
        (3, {}, 1, [1]),
        (40, {}, 8, [1, 2, 4, 8]),
        (2048, {}, 32, [1, 2, 4, 8, 16, 32]),
        (36, {"factor": 24}, 12, [1, 2, 3, 4, 6, 12]),
        (64, {"group_counts": "finest"}, 32, [32]),
        (40, {"group_counts": [32, 4, 1, 4, 3]}, 8, [1, 4]),
        (40, {"group_counts": (2,)}, 8, [2]),
    ],
)
def test_candidates_are_the_given_divisors_of_the_finest_count(
    channels: int, knobs: dict[str, Any], groups: int, candidates: list[int]
) -> None:
    module = EMAX(channels, **knobs)
    assert (module.groups, module.candidates) == (groups, candidates)
    assert f"candidates={candidates}" in repr(module)


@pytest.mark.parametrize("value", ["coarse", [3, 5], [], [0, 4], [-2], 4], ids=str)
def test_bad_group_counts_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="group_counts") as error:
        EMAX(8, group_counts=value)
    assert str(value) in str(error.value)
    with pytest.raises(ValueError, match=r"\[3, 5\].*\[1, 2, 4, 8\]"):
        EMAX(40, group_counts=[3, 5])


def test_hidden_channels_follow_the_reduction_but_are_at_least_1() -> None:
    for channels, reduction, hidden in [(64, 16, 4), (40, 16, 2), (8, 16, 1)]:
        gate = EMAX(channels, reduction=reduction).global_attn
        assert gate is not None
        assert gate[1].weight.shape == (hidden, channels, 1, 1)


def test_gates_start_open_and_the_grouping_at_the_finest() -> None:
    values = EMAX(40).state_dict()
    # In order F = 8's candidates 1, 2, 4, 8.
    assert values["group_controller.bias"].tolist() == [0, 0, 0, 1]
    assert (values["group_controller.weight"] == 0).all()
    assert (values["conv3x3.bias"] == 2).all()
    assert (values["global_attn.3.bias"] == 2).all()
    assert (values["channel_gate.3.bias"].abs() < 1).all()
    assert values["gamma"].tolist() == [0]
    assert (values["residual_gate"] == 1).all()
    assert values["warmup"].item() == values["temperature"].item() == 1
    coarse = EMAX(40, group_counts=[1, 2]).group_controller
    assert coarse is not None
    assert coarse.bias.tolist() == [0, 0]


def test_the_schedule_is_float32_stored_and_reset() -> None:
    module = EMAX(24, dtype=torch.bfloat16)
    assert module.warmup.dtype == module.temperature.dtype == torch.float32
    set_grouping(module, warmup=0.25, temperature=0.5)
    other = EMAX(24)
    other.load_state_dict(module.state_dict())
    assert schedules(other) == [(0.25, 0.5)]
    other.reset_parameters()
    assert schedules(other) == [(1.0, 1.0)]


def test_the_state_dict_has_the_keys_of_the_source_and_no_constants() -> None:
    children = ["conv1x1", "conv3x3", "gn", "group_controller"]
    children += [f"{gate}.{i}" for gate in ("channel_gate", "global_attn") for i in (1, 3)]
    expected = {f"{name}.{part}" for name in children for part in ("weight", "bias")}
    expected |= {"gamma", "residual_gate", "warmup", "temperature"}
    assert EMAX(24).state_dict().keys() == expected
    for name, knobs in VARIANTS.items():
        keys = EMAX(24, **knobs).state_dict().keys()
        absent = {key.partition(".")[0] for key in expected - keys}
        gates = {"no_channel_gate": {"channel_gate", "gamma"}, "no_global_gate": {"global_attn"}}
        gates["spatial_only"] = {"channel_gate", "gamma", "global_attn"}
        one = {"group_controller"} if name in ("finest", "one_coarse") else set()
        assert keys <= expected
        assert absent == gates.get(name, set()) | one, name
