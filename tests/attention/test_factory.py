"""Attentions by name, and the gate around them."""

from typing import Any

import pytest
import torch
from attention_contract import HALVES, LAYOUTS, MODES, Subject
from emax_testing import assert_same, gradients, randn
from torch import Tensor, nn

from emax_timm.attention import ATTENTIONS, EMA, EMAX, GatedAttention, create_attention

NAMES = ["emax", "ema", "cbam", "se", "eca", "coord", "msa"]
OTHERS = pytest.mark.parametrize("name", NAMES[1:])


def gated(attention: str, **options: Any) -> GatedAttention:
    class Gated(Subject):
        name = attention

    module = Gated().make(**options)
    assert isinstance(module, GatedAttention)
    return module


def test_the_factory_has_these_attentions() -> None:
    assert list(ATTENTIONS) == NAMES
    assert type(create_attention("ema", 8)) is EMA
    for gate_init, value in [(None, 1.0), (0, 0.0), (0.5, 0.5), (1.0, 1.0)]:
        module = create_attention("emax", 8, gate_init=gate_init)
        assert type(module) is EMAX
        assert module.residual_gate.tolist() == [value] * 8


@pytest.mark.parametrize("gate_init", [None, 0.0])
def test_an_unknown_name_is_refused_and_the_known_are_named(gate_init: float | None) -> None:
    for name in ("emx", "", "EMA", "self"):
        with pytest.raises(ValueError, match=f"'{name}'.*{', '.join(NAMES)}"):
            create_attention(name, 8, gate_init=gate_init)


# Keywords ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "knobs", "key", "shape"),
    [
        ("emax", {"factor": 8}, "conv1x1.weight", (8, 8, 1, 1)),
        ("emax", {"group_counts": [2, 4]}, "group_controller.bias", (2,)),
        ("ema", {"factor": 8}, "conv1x1.weight", (8, 8, 1, 1)),
        ("cbam", {"rd_ratio": 0.25}, "channel.fc1.weight", (16, 64, 1, 1)),
        ("cbam", {"spatial_kernel_size": 3}, "spatial.conv.conv.weight", (1, 2, 3, 3)),
        ("se", {"rd_channels": 12}, "fc1.weight", (12, 64, 1, 1)),
        ("eca", {"gamma": 1}, "conv.weight", (1, 1, 7)),
        ("coord", {"rd_channels": 12}, "conv1.weight", (12, 64, 1, 1)),
        ("coord", {"bias": True}, "conv_h.bias", (64,)),
    ],
    ids=str,
)
def test_keywords_are_passed_on(
    name: str, knobs: dict[str, Any], key: str, shape: tuple[int, ...]
) -> None:
    bare = create_attention(name, 64, **knobs)
    assert bare.get_parameter(key).shape == shape
    assert create_attention(name, 64).state_dict().get(key, torch.tensor(0)).shape != shape
    module = create_attention(name, 64, gate_init=0.0, **knobs)
    assert module.get_parameter(key if name == "emax" else f"attention.{key}").shape == shape


def test_keywords_are_passed_on_to_self_attention() -> None:
    module, x = gated("msa", channels=64, gate_init=1.0), randn(2, 64, 9, 9)
    for knobs in ({"head_dim": 8}, {"max_size": 3}):
        other = create_attention("msa", 64, 1.0, dtype=torch.float64, **knobs)
        other.load_state_dict(module.state_dict())
        assert (other(x) - module(x)).abs().max() > 1e-3


@pytest.mark.parametrize("gate_init", [None, 0.0])
def test_bad_values_are_passed_on(gate_init: float | None) -> None:
    with pytest.raises(ValueError, match="group_counts"):
        create_attention("emax", 8, gate_init=gate_init, group_counts=[5])


@pytest.mark.parametrize(
    ("channels", "size"), [(1, 3), (40, 3), (64, 3), (128, 5), (512, 5), (2048, 7)]
)
def test_eca_reach_grows_with_the_channels(channels: int, size: int) -> None:
    # |log2(c) / 2 + 1 / 2| to the next odd number.
    assert create_attention("eca", channels).get_parameter("conv.weight").shape == (1, 1, size)


def test_a_kernel_size_that_eca_would_ignore_is_refused() -> None:
    with pytest.raises(TypeError, match="gamma and beta"):
        create_attention("eca", 64, kernel_size=7)
    wide = create_attention("eca", 512, gamma=1)
    assert wide.get_parameter("conv.weight").shape == (1, 1, 11)


@pytest.mark.parametrize("name", ["cbam", "coord"])
def test_batch_norms_learn_in_training_alone(name: str) -> None:
    module = gated(name, gate_init=0.0)
    statistics = [b for key, b in module.named_buffers() if "running" in key]
    assert len(statistics) == 2
    for training in (False, True):
        before = [value.clone() for value in statistics]
        module.train(training)(3 + randn(4, 24, 5, 5))
        changed = [not torch.equal(a, b) for a, b in zip(before, statistics, strict=True)]
        assert changed == [training] * 2


# The gate ---------------------------------------------------------------------------------------


@OTHERS
def test_the_others_are_wrapped_where_a_gate_is_asked_for(name: str) -> None:
    bare = create_attention(name, 8)
    assert type(bare) is ATTENTIONS[name]
    assert not any(key.endswith("residual_gate") for key in bare.state_dict())
    for gate_init in (0, 0.25, 1.0, -2):
        module = create_attention(name, 8, gate_init=gate_init)
        assert type(module) is GatedAttention
        assert type(module.attention) is ATTENTIONS[name]
        assert module.residual_gate.tolist() == [gate_init] * 8
        assert module.residual_gate.requires_grad
        keys = {"residual_gate", *(f"attention.{key}" for key in bare.state_dict())}
        assert module.state_dict().keys() == keys


@MODES
@OTHERS
def test_an_open_gate_gives_bitwise_the_attention_and_half_of_it_the_mean(
    name: str, training: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for layout in LAYOUTS:
            module = gated(name, gate_init=1.0, dtype=dtype).train(training)
            x = randn(2, 24, 17, 9, dtype=dtype).to(memory_format=layout)
            attended = module.attention(x)
            assert not torch.equal(attended, x)
            assert torch.equal(module(x), attended)
            nn.init.constant_(module.residual_gate, 0.5)
            mean = (x.double() + attended.double()) / 2
            bound = 2 * torch.finfo(dtype).eps
            torch.testing.assert_close(module(x).double(), mean, rtol=bound, atol=bound)


@OTHERS
def test_a_gate_blends_each_channel_by_its_own_alpha(name: str) -> None:
    module = gated(name, gate_init=0.0)
    with torch.no_grad():
        module.residual_gate.copy_(torch.linspace(-0.5, 1.5, 24))
    # As many rows and columns as channels: a gate along another axis would fit.
    x, gate = randn(2, 24, 24, 24), module.residual_gate[:, None, None]

    def blend(x: Tensor) -> Tensor:
        return (1 - gate) * x + gate * module.attention(x)

    assert_same(gradients(module, x, module), gradients(module, x, blend), 1e-12)


@HALVES
def test_a_nearly_closed_gate_is_not_rounded_to_a_closed_one(half: torch.dtype) -> None:
    # 1 - 2^-13 is 1 in half precision.
    module = GatedAttention(3, nn.Threshold(10.0, 1.0), gate_init=2**-13)
    out = module(torch.zeros(2, 3, 4, 5, dtype=half))
    assert (out == 2**-13).all()


@HALVES
def test_a_gate_takes_an_attention_that_autocast_leaves_in_half_precision(
    half: torch.dtype,
) -> None:
    module = GatedAttention(3, nn.Conv2d(3, 3, 1))
    x = randn(2, 3, 4, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=half):
        assert module.attention(x).dtype == half
        results = [module(x), module(x.to(half))]
    assert [out.dtype for out in results] == [torch.float32, half]
    for out in results:
        torch.testing.assert_close(out.float(), module.attention(x), rtol=0.02, atol=0.02)


def test_a_gate_fits_any_module_and_starts_open() -> None:
    module, x = GatedAttention(3, nn.Tanh()), randn(2, 3, 4, 5, dtype=torch.float32)
    assert torch.equal(module(x), x.tanh())
    assert list(module.state_dict()) == ["residual_gate"]
