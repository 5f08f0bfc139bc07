"""How an EMAX layer comes to be: arguments, initial values, devices, dtypes and checkpoints."""

import copy
import io
from typing import Any

import pytest
import torch
from emax_testing import (
    VARIANTS,
    assert_same,
    emax_results,
    force,
    make_emax,
    naive_results,
    randn,
    reference_of,
)
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import nn

from emax_timm.attention import EMAX, set_grouping
from emax_timm.attention.reference import NaiveEMAX

# Initial values ---------------------------------------------------------------------------------


def test_emax_starts_with_open_gates_and_the_finest_grouping() -> None:
    module = EMAX(40)
    values = {name: value.detach() for name, value in module.state_dict().items()}
    # In order F = 8's candidates 1, 2, 4, 8.
    assert values["group_controller.bias"].tolist() == [0, 0, 0, 1]
    assert (values["group_controller.weight"] == 0).all()
    assert (values["conv3x3.bias"] == 2).all()
    assert (values["global_attn.3.bias"] == 2).all()
    assert (values["channel_gate.3.bias"].abs() < 1).all()
    assert values["gamma"].tolist() == [0]
    assert (values["residual_gate"] == 1).all()
    assert (values["gn.weight"] == 1).all()
    assert (values["gn.bias"] == 0).all()
    assert values["warmup"].item() == values["temperature"].item() == 1
    assert module.gn.eps == 1e-5


@pytest.mark.parametrize("name", ["conv1x1", "conv3x3", "channel_gate.1", "global_attn.3"])
def test_emax_convolutions_start_with_torchs_defaults(name: str) -> None:
    module = EMAX(2048).get_submodule(name)
    assert isinstance(module, nn.Conv2d)
    # torch's default is uniform in +-1 / sqrt(fan-in).
    bound = module.weight[0].numel() ** -0.5
    assert 0.99 * bound < module.weight.max() <= bound
    assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("gate_init", [0.0, 0.5, 1.0])
def test_emax_residual_gate_starts_at_gate_init(gate_init: float) -> None:
    assert EMAX(8, gate_init=gate_init).residual_gate.tolist() == [gate_init] * 8


def test_emax_controller_starts_at_0_without_the_finest_count() -> None:
    controller = EMAX(40, group_counts=[1, 2]).group_controller
    assert controller is not None
    assert controller.bias.tolist() == [0, 0]


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
def test_emax_candidates_are_the_given_divisors_of_the_finest_count(
    channels: int, knobs: dict[str, Any], groups: int, candidates: list[int]
) -> None:
    module = EMAX(channels, **knobs)
    assert (module.groups, module.candidates) == (groups, candidates)
    assert module.group_counts.tolist() == candidates


def test_emax_hidden_channels_follow_the_reduction_but_are_at_least_1() -> None:
    for channels, reduction, hidden in [(64, 16, 4), (40, 16, 2), (8, 16, 1)]:
        gate = EMAX(channels, reduction=reduction).global_attn
        assert gate is not None
        assert gate[1].weight.shape == (hidden, channels, 1, 1)


# Errors -----------------------------------------------------------------------------------------


def test_emax_refuses_an_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="reductions"):
        EMAX(8, reductions=4)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["channels", "factor", "reduction"])
@pytest.mark.parametrize("value", [0, -4, 2.5, "8", None], ids=str)
def test_emax_refuses_sizes_that_are_no_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*positive.*{value}"):
        EMAX(**{"channels": 8, name: value})


@pytest.mark.parametrize("value", ["coarse", [3, 5], [], [0, 4], [-2], 4], ids=str)
def test_emax_refuses_bad_group_counts(value: Any) -> None:
    with pytest.raises(ValueError, match="group_counts") as error:
        EMAX(8, group_counts=value)
    assert str(value) in str(error.value)


def test_emax_names_the_divisors_when_no_count_is_left() -> None:
    with pytest.raises(ValueError, match=r"\[3, 5\].*\[1, 2, 4, 8\]"):
        EMAX(40, group_counts=[3, 5])


# Devices and dtypes -----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_emax_is_built_on_the_device_it_is_given(variant: str) -> None:
    module = EMAX(24, device="meta", **VARIANTS[variant])
    tensors = [*module.parameters(), *module.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_emax_is_built_on_the_default_device() -> None:
    with torch.device("meta"):
        module = EMAX(24)
    assert {t.device.type for t in [*module.parameters(), *module.buffers()]} == {"meta"}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
def test_emax_runs_on_the_meta_device(training: bool) -> None:
    module = EMAX(24, device="meta").train(training)
    out = module(torch.empty(2, 24, 7, 5, device="meta"))
    assert out.shape == (2, 24, 7, 5)
    assert out.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_emax_parameters_have_the_dtype_given_and_the_course_is_float32(dtype: torch.dtype) -> None:
    module = EMAX(24, dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert module.warmup.dtype == module.temperature.dtype == torch.float32


@pytest.mark.parametrize("variant", VARIANTS)
def test_emax_is_complete_after_to_empty_and_reset_parameters(variant: str) -> None:
    knobs = VARIANTS[variant]
    module = EMAX(24, device="meta", dtype=torch.float64, **knobs).to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.fill_(1 if tensor.dtype == torch.bool else 77)
    module.reset_parameters()
    assert not any((parameter == 77).any() for parameter in module.parameters())
    assert module.warmup == module.temperature == 1
    # The buffers that no checkpoint holds, too: every candidate gives the reference's values.
    x = randn(2, 24, 3, 4)
    module.eval()
    for count in module.candidates:
        force(module, count)
        actual = emax_results(module, x)
        assert actual["group_count"].tolist() == [count, count]
        assert_same(actual, naive_results(reference_of(module, 24, **knobs), x))


# Checkpoints ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_emax_state_dict_has_the_keys_of_the_reference(variant: str) -> None:
    knobs = VARIANTS[variant]
    state, expected = EMAX(24, **knobs).state_dict(), NaiveEMAX(24, **knobs).state_dict()
    assert {name: value.shape for name, value in state.items()} == {
        name: value.shape for name, value in expected.items()
    }


def test_emax_state_dict_has_the_keys_of_the_source_and_no_constants() -> None:
    convolutions = ["conv1x1", "conv3x3", "gn", "group_controller"]
    convolutions += [f"{gate}.{i}" for gate in ("channel_gate", "global_attn") for i in (1, 3)]
    expected = {f"{name}.{part}" for name in convolutions for part in ("weight", "bias")}
    expected |= {"gamma", "residual_gate", "warmup", "temperature"}
    assert EMAX(24).state_dict().keys() == expected


@pytest.mark.parametrize("variant", VARIANTS)
def test_emax_state_dict_survives_a_file(variant: str) -> None:
    module = make_emax(24, **VARIANTS[variant])
    set_grouping(module, warmup=0.25, temperature=0.5)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = EMAX(24, dtype=torch.float64, **VARIANTS[variant]).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.warmup.item(), other.temperature.item()) == (0.25, 0.5)
    x = randn(2, 24, 4, 3)
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize("missing", ["residual_gate", "warmup", "global_attn.3.bias"])
def test_emax_strict_loading_names_a_missing_key(missing: str) -> None:
    module = EMAX(24)
    state = module.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        module.load_state_dict(state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_emax_deepcopy_is_equal_and_independent(variant: str) -> None:
    module, x = make_emax(24, **VARIANTS[variant]), randn(2, 24, 4, 3)
    before = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
    assert torch.equal(module(x), before)


def test_emax_is_printed_with_its_candidates() -> None:
    assert "candidates=[1, 2, 4, 8]" in repr(EMAX(40))


def test_constants_are_refilled_as_timm_and_transformers_do() -> None:
    # Both make a model without memory and load what a checkpoint holds.
    layer = EMAX(24, factor=8).eval()
    shadow = EMAX(24, factor=8, device="meta").eval().to_empty(device="cpu")
    for buffer in shadow.buffers():
        buffer.zero_()
    shadow.load_state_dict(layer.state_dict())
    assert reinit_non_persistent_buffers(shadow) == ["(root)"]
    x = torch.randn(2, 24, 5, 5)
    for ours, theirs in zip(layer.attention(x), shadow.attention(x), strict=True):
        assert torch.equal(ours, theirs)
