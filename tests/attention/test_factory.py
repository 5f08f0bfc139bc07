"""Every attention of the factory, against plain sums and products, and the gate around them."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emax_testing import assert_same, gradients, randn, randomise
from timm.models import create_feature_extractor
from torch import Tensor, nn

from emax_timm.attention import ATTENTIONS, EMA, EMAX, GatedAttention, create_attention
from emax_timm.attention.reference import NaiveEMAX, naive_ema

NAMES = ["emax", "ema", "cbam", "se", "eca", "coord", "msa"]
OTHERS = NAMES[1:]
FORMATS = pytest.mark.parametrize(
    "memory_format",
    [torch.contiguous_format, torch.channels_last],
    ids=["contiguous", "channels_last"],
)
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
SIZES = [(1, 1), (7, 7), (17, 9)]


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def make(
    name: str, channels: int = 24, *, dtype: torch.dtype = torch.float64, **knobs: Any
) -> nn.Module:
    """An attention in eval mode whose parameters and statistics are random, but for its gate."""
    module = create_attention(name, channels, dtype=dtype, **knobs).eval()
    gate = knobs.get("gate_init")
    randomise(module)
    with torch.no_grad():
        if gate is not None:
            module.get_parameter("residual_gate").fill_(gate)
        for key, buffer in module.named_buffers():
            if key.endswith("running_mean"):
                buffer.copy_(0.1 * randn(*buffer.shape, seed=5))
            elif key.endswith("running_var"):
                buffer.copy_(1 + 0.5 * randn(*buffer.shape, seed=6).tanh())
    return module


def gated(name: str, channels: int = 24, **knobs: Any) -> GatedAttention:
    module = make(name, channels, **knobs)
    assert isinstance(module, GatedAttention)
    return module


# What each computes -----------------------------------------------------------------------------

State = dict[str, Tensor]


def plain_emax(x: Tensor, state: State, training: bool) -> Tensor:
    module = NaiveEMAX(x.shape[1], dtype=x.dtype).eval()
    return torch.func.functional_call(module, state, (x,))


def plain_ema(x: Tensor, state: State, training: bool) -> Tensor:
    weights = [state[f"{layer}.weight"] for layer in ("conv1x1", "conv3x3", "gn")]
    biases = [state[f"{layer}.bias"] for layer in ("conv1x1", "conv3x3", "gn")]
    groups = math.gcd(x.shape[1], 32)
    one, three, norm = zip(weights, biases, strict=True)
    return naive_ema(x, groups, *one, *three, *norm)


def plain_norm(x: Tensor, state: State, prefix: str, training: bool) -> Tensor:
    """Batch norm of [b, c, h, w]."""
    mean, variance = state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"]
    if training:
        mean = x.mean((0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
    scaled = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    weight, bias = state[f"{prefix}.weight"], state[f"{prefix}.bias"]
    return scaled * weight[:, None, None] + bias[:, None, None]


def mix(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution without bias of [b, c, ...]."""
    return torch.einsum("oi,bi...->bo...", weight[:, :, 0, 0], x)


def plain_se(x: Tensor, state: State, training: bool) -> Tensor:
    """Section 3 of arXiv 1709.01507."""
    squeezed = mix(x.mean((2, 3)), state["fc1.weight"]) + state["fc1.bias"]
    excited = mix(squeezed.clamp(min=0), state["fc2.weight"]) + state["fc2.bias"]
    return x / (1 + (-excited).exp())[:, :, None, None]


def plain_eca(x: Tensor, state: State, training: bool) -> Tensor:
    """Section 3 of arXiv 1910.03151: a channel's gate comes from its neighbours' means."""
    kernel = state["conv.weight"].flatten()
    channels = x.shape[1]
    means = F.pad(x.mean((2, 3)), [len(kernel) // 2] * 2)
    scores = sum(value * means[:, i : i + channels] for i, value in enumerate(kernel))
    assert isinstance(scores, Tensor)
    return x / (1 + (-scores).exp())[:, :, None, None]


def plain_cbam(x: Tensor, state: State, training: bool) -> Tensor:
    """Section 3 of arXiv 1807.06521: channels, then places, each from means and maxima."""

    def shared(pooled: Tensor) -> Tensor:
        return mix(
            mix(pooled, state["channel.fc1.weight"]).clamp(min=0), state["channel.fc2.weight"]
        )

    scores = shared(x.mean((2, 3))) + shared(x.flatten(2).max(2).values)
    x = x / (1 + (-scores).exp())[:, :, None, None]
    pooled = torch.stack([x.mean(1), x.max(1).values], dim=1)
    kernel = state["spatial.conv.conv.weight"]
    assert kernel.shape == (1, 2, 7, 7)
    columns = F.unfold(pooled, 7, padding=3)  # [b, 2 * 49, h * w]
    scores = torch.einsum("k,bkn->bn", kernel.flatten(), columns).view_as(x[:, :1])
    return x / (1 + (-plain_norm(scores, state, "spatial.conv.bn", training)).exp())


def plain_coord(x: Tensor, state: State, training: bool) -> Tensor:
    """Section 3 of arXiv 2103.02907, without biases: the norm follows the shared convolution."""
    h = x.shape[2]
    profile = torch.cat([x.mean(3), x.mean(2)], dim=2).unsqueeze(3)  # [b, c, h + w, 1]
    hidden = plain_norm(mix(profile, state["conv1.weight"]), state, "bn1", training).squeeze(3)
    hidden = hidden * (hidden + 3).clamp(0, 6) / 6
    along_h = mix(hidden[:, :, :h], state["conv_h.weight"])
    along_w = mix(hidden[:, :, h:], state["conv_w.weight"])
    gate_h, gate_w = 1 / (1 + (-along_h).exp()), 1 / (1 + (-along_w).exp())
    return x * gate_h[:, :, :, None] * gate_w[:, :, None, :]


def plain_msa(x: Tensor, state: State, training: bool) -> Tensor:
    """Attention of every pixel over all, in heads of 32 channels where these divide."""
    channels, size = x.shape[1], (min(x.shape[2], 14), min(x.shape[3], 14))
    heads = max(n for n in range(1, 301) if channels % n == 0 and n <= max(1, channels // 32))
    pixels = F.adaptive_avg_pool2d(x, size).flatten(2)
    qkv = mix(pixels, state["attention.qkv.weight"]) + state["attention.qkv.bias"][:, None]
    query, key, value = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    scores = torch.einsum("bgdq,bgdk->bgqk", query, key) / math.sqrt(channels // heads)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    seen = torch.einsum("bgqk,bgdk->bgdq", weights, value).flatten(1, 2)
    out = mix(seen, state["attention.proj.weight"]) + state["attention.proj.bias"][:, None]
    out = out.unflatten(2, size)
    return x + F.interpolate(out, x.shape[2:], mode="bilinear", align_corners=False)


PLAIN: dict[str, Callable[[Tensor, State, bool], Tensor]] = {
    "emax": plain_emax,
    "ema": plain_ema,
    "cbam": plain_cbam,
    "se": plain_se,
    "eca": plain_eca,
    "coord": plain_coord,
    "msa": plain_msa,
}


def plain(name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The plain computation with the parameters of `module`."""
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    if name == "emax":
        state = {key: value for key, value in state.items() if key in module.state_dict()}
    state = {key: value.clone() if "running" in key else value for key, value in state.items()}
    return lambda x: PLAIN[name](x, state, module.training)


def test_the_factory_has_these_attentions_and_a_plain_form_of_each() -> None:
    assert list(ATTENTIONS) == NAMES == list(PLAIN)
    assert type(create_attention("ema", 8)) is EMA
    assert type(create_attention("emax", 8)) is EMAX


@pytest.mark.parametrize("channels", [1, 3, 40, 64, 200])
@pytest.mark.parametrize(
    ("name", "training"),
    [*((name, False) for name in NAMES), *((name, True) for name in OTHERS)],
)
def test_attention_equals_its_plain_form(name: str, channels: int, training: bool) -> None:
    for size in [(2, 1), (7, 7), (17, 9), (30, 5)]:
        module = make(name, channels).train(training)
        x = randn(3, channels, *size)
        expected = gradients(module, x, plain(name, module))
        assert_same(gradients(module, x, module), expected, 1e-9)


@pytest.mark.parametrize(
    ("channels", "size"), [(1, 3), (40, 3), (64, 3), (128, 5), (512, 5), (2048, 7)]
)
def test_eca_reach_grows_with_the_channels(channels: int, size: int) -> None:
    # |log2(c) / 2 + 1 / 2| to the next odd number.
    assert create_attention("eca", channels).get_parameter("conv.weight").shape == (1, 1, size)


@pytest.mark.parametrize("name", ["cbam", "coord"])
def test_batch_norms_learn_in_training_alone(name: str) -> None:
    module = make(name, gate_init=0.0)
    statistics = [b for key, b in module.named_buffers() if "running" in key]
    assert len(statistics) == 2
    for training in (False, True):
        before = [value.clone() for value in statistics]
        module.train(training)(3 + randn(4, 24, 5, 5))
        changed = [not torch.equal(a, b) for a, b in zip(before, statistics, strict=True)]
        assert changed == [training] * 2


@MODES
@pytest.mark.parametrize("name", NAMES)
def test_attention_gives_every_parameter_a_gradient_as_constructed(
    name: str, training: bool
) -> None:
    for gate_init in (None, 0.0, 1.0):
        module = create_attention(name, 24, gate_init=gate_init).train(training)
        x = randn(3, 24, 5, 4, dtype=torch.float32)
        results = gradients(module, x, module)
        assert all(value.isfinite().all() for value in results.values())


@MODES
@pytest.mark.parametrize("gate_init", [None, 0.5])
@pytest.mark.parametrize("channels", [1, 3, 16, 40, 64])
@pytest.mark.parametrize("name", NAMES)
def test_attention_keeps_shape_dtype_and_layout(
    name: str, channels: int, gate_init: float | None, training: bool
) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        module = create_attention(name, channels, gate_init, dtype=dtype).train(training)
        for size in SIZES:
            x = randn(2, channels, *size, dtype=dtype)
            for layout in (torch.contiguous_format, torch.channels_last):
                out = module(x.to(memory_format=layout))
                assert out.shape == x.shape
                assert out.dtype == dtype
                assert out.isfinite().all()
                assert out.is_contiguous(memory_format=layout), (layout, size, dtype)


@HALVES
@pytest.mark.parametrize("name", NAMES)
def test_attention_keeps_its_inputs_dtype_under_autocast(name: str, half: torch.dtype) -> None:
    for gate_init in (None, 0.0, 0.5):
        module = make(name, gate_init=gate_init, dtype=torch.float32)
        x = randn(2, 24, 17, 9, dtype=torch.float32)
        expected = module(x)
        with torch.autocast("cpu", dtype=half):
            outputs = [module(x), module(x.to(half))]
        assert [out.dtype for out in outputs] == [torch.float32, half]
        for out in outputs:
            torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("gate_init", [None, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_attention_in_eval_treats_each_sample_by_itself(name: str, gate_init: float | None) -> None:
    module, x = make(name, gate_init=gate_init), randn(4, 24, 5, 3)
    before = x.clone()
    alone = torch.cat([module(sample) for sample in x.split(1)])
    torch.testing.assert_close(module(x), alone, rtol=0, atol=1e-12)
    assert torch.equal(x, before)


# The gate ---------------------------------------------------------------------------------------


@MODES
@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_closed_gate_is_bitwise_the_identity(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format, training: bool
) -> None:
    for channels, size in [(1, (7, 7)), (24, (17, 9)), (40, (1, 1))]:
        module = create_attention(name, channels, gate_init=0, dtype=dtype).train(training)
        x = (10 * randn(2, channels, *size)).to(dtype).to(memory_format=memory_format)
        assert torch.equal(module(x), x)
        module.float()
        with torch.autocast("cpu", dtype=torch.bfloat16 if dtype == torch.float32 else dtype):
            assert torch.equal(module(x), x)


@MODES
@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_an_open_gate_gives_bitwise_the_attention_and_half_of_it_the_mean(
    name: str, dtype: torch.dtype, memory_format: torch.memory_format, training: bool
) -> None:
    module = gated(name, gate_init=1.0, dtype=dtype).train(training)
    x = randn(2, 24, 17, 9, dtype=dtype).to(memory_format=memory_format)
    attended = module.attention(x)
    assert not torch.equal(attended, x)
    assert torch.equal(module(x), attended)
    with torch.no_grad():
        module.residual_gate.fill_(0.5)
    mean = (x.double() + attended.double()) / 2
    bound = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(module(x).double(), mean, rtol=bound, atol=bound)


@pytest.mark.parametrize("name", OTHERS)
def test_a_gate_blends_each_channel_by_its_own_alpha(name: str) -> None:
    module = gated(name, gate_init=0.0)
    with torch.no_grad():
        module.residual_gate.copy_(torch.linspace(-0.5, 1.5, 24))
    # As many rows and columns as channels: a gate along another axis would fit.
    x = randn(2, 24, 24, 24)
    gate = module.residual_gate[:, None, None]
    expected = gradients(module, x, lambda x: (1 - gate) * x + gate * module.attention(x))
    assert_same(gradients(module, x, module), expected, 1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_closed_gate_learns_at_once_and_the_attention_as_soon_as_it_opens(name: str) -> None:
    module, x = make(name, 64, gate_init=0.0), randn(2, 64, 7, 5)
    results = gradients(module, x, module)
    learning = [key for key, value in results.items() if value.abs().max() > 1e-4]
    assert learning == ["out", "grad input", "grad residual_gate"]
    torch.testing.assert_close(results["grad input"], randn(*x.shape, seed=99), rtol=0, atol=1e-15)
    attended = make(name, 64, gate_init=1.0)(x)
    expected = (randn(*x.shape, seed=99) * (attended - x)).sum((0, 2, 3))
    torch.testing.assert_close(results["grad residual_gate"], expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        module.get_parameter("residual_gate").fill_(0.1)
    for key, value in gradients(module, x, module).items():
        assert value.abs().max() > 1e-6, key


def test_emax_takes_the_gate_itself() -> None:
    for gate_init, value in [(None, 1.0), (0, 0.0), (0.5, 0.5), (1.0, 1.0)]:
        module = create_attention("emax", 8, gate_init=gate_init)
        assert type(module) is EMAX
        assert module.residual_gate.tolist() == [value] * 8


@pytest.mark.parametrize("name", OTHERS)
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
        assert module.state_dict().keys() == {
            "residual_gate",
            *(f"attention.{key}" for key in bare.state_dict()),
        }


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


# Arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_init", [None, 0.0])
def test_create_attention_refuses_an_unknown_name_and_names_the_known(
    gate_init: float | None,
) -> None:
    for name in ("emx", "", "EMA", "self"):
        with pytest.raises(ValueError, match=f"'{name}'.*{', '.join(NAMES)}"):
            create_attention(name, 8, gate_init=gate_init)


@pytest.mark.parametrize("gate_init", [None, 0.0])
@pytest.mark.parametrize("name", NAMES)
def test_create_attention_refuses_an_unknown_keyword(name: str, gate_init: float | None) -> None:
    with pytest.raises(TypeError, match="gate_unit"):
        create_attention(name, 8, gate_init=gate_init, gate_unit=1)
    with pytest.raises(TypeError, match="channels"):
        create_attention(name, gate_init=gate_init)  # type: ignore[call-arg]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_create_attention_refuses_a_gate_that_is_not_finite(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"gate_init must be a finite number, not {value}"):
        create_attention(name, 8, gate_init=value)


@pytest.mark.parametrize(
    ("name", "knobs"),
    [
        ("emax", {"factor": 0}),
        ("emax", {"group_counts": [5]}),
        ("ema", {"factor": 0}),
        ("msa", {"head_dim": 0}),
        ("msa", {"max_size": -1}),
    ],
)
def test_create_attention_passes_bad_values_on(name: str, knobs: dict[str, Any]) -> None:
    for gate_init in (None, 0.0):
        with pytest.raises(ValueError, match=next(iter(knobs))):
            create_attention(name, 8, gate_init=gate_init, **knobs)


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
def test_create_attention_passes_keywords_on(
    name: str, knobs: dict[str, Any], key: str, shape: tuple[int, ...]
) -> None:
    bare = create_attention(name, 64, **knobs)
    assert bare.get_parameter(key).shape == shape
    assert create_attention(name, 64).state_dict().get(key, torch.tensor(0)).shape != shape
    module = create_attention(name, 64, gate_init=0.0, **knobs)
    assert module.get_parameter(key if name == "emax" else f"attention.{key}").shape == shape


def test_create_attention_passes_keywords_on_to_self_attention() -> None:
    module, x = make("msa", 64), randn(2, 64, 9, 9)
    for knobs in ({"head_dim": 8}, {"max_size": 3}):
        other = create_attention("msa", 64, dtype=torch.float64, **knobs)
        other.load_state_dict(module.state_dict())
        assert (other(x) - module(x)).abs().max() > 1e-3


# Devices, dtypes and copies ---------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("gate_init", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_attention_is_built_where_it_is_told(
    name: str, gate_init: float | None, training: bool
) -> None:
    module = create_attention(name, 24, gate_init, device="meta").train(training)
    assert all(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])
    out = module(torch.empty(2, 24, 17, 9, device="meta"))
    assert out.is_meta
    assert out.shape == (2, 24, 17, 9)
    for dtype in (torch.bfloat16, torch.float64):
        module = create_attention(name, 24, gate_init, dtype=dtype)
        assert {parameter.dtype for parameter in module.parameters()} == {dtype}


@pytest.mark.parametrize("gate_init", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_attention_survives_a_copy_and_a_file(name: str, gate_init: float | None) -> None:
    module, x = make(name, gate_init=gate_init), randn(2, 24, 4, 3)
    before = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            tensor.zero_()
    assert torch.equal(module(x), before)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = create_attention(name, 24, gate_init, dtype=torch.float64).eval()
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), before)


@pytest.mark.parametrize("gate_init", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_part_of_an_attention_is_reset_by_a_method(name: str, gate_init: float) -> None:
    module = create_attention(name, 24, gate_init, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(77)
    for part in module.modules():
        if isinstance(reset := getattr(part, "reset_parameters", None), Callable):
            reset()
    assert not any((parameter == 77).any() for parameter in module.parameters())
    assert module.get_parameter("residual_gate").tolist() == [gate_init] * 24


# Scripted, traced, exported and compiled --------------------------------------------------------


def assert_equal_on_all_sizes(traced: Callable[[Tensor], Tensor], module: nn.Module) -> None:
    for batch, *size in [(2, 7, 5), (3, 8, 8), (5, 2, 9)]:
        x = randn(batch, 24, *size, dtype=torch.float32)
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.to(memory_format=layout)
            torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning")
@pytest.mark.parametrize("gate_init", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_script_equals_eager(name: str, gate_init: float | None) -> None:
    module = make(name, gate_init=gate_init, dtype=torch.float32)
    scripted = torch.jit.script(module)
    assert_equal_on_all_sizes(scripted, module)
    x = randn(2, 24, 17, 16, dtype=torch.float32)
    for _ in range(2):
        actual, expected = gradients(scripted, x, scripted), gradients(module, x, module)
        assert_same(actual, expected, 1e-4)
    if gate_init is not None:
        nn.init.zeros_(module.get_parameter("residual_gate"))
        assert torch.equal(scripted(x), x)


@MODES
@pytest.mark.parametrize("gate_init", [None, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_timms_feature_extraction_traces_through_attention(
    name: str, gate_init: float | None, training: bool
) -> None:
    module = make(name, gate_init=gate_init, dtype=torch.float32)
    network = nn.Sequential(nn.Conv2d(3, 24, 1), module, nn.Conv2d(24, 8, 1)).train(training)
    extractor = create_feature_extractor(network, ["1", "2"]).train(training)
    for size in [(9, 9), (4, 17)]:
        x = randn(2, 3, *size, dtype=torch.float32)
        torch.manual_seed(0)
        expected = network(x)
        torch.manual_seed(0)
        actual = extractor(x)
        assert actual["1"].shape == (2, 24, *size)
        torch.testing.assert_close(actual["2"], expected, rtol=1e-5, atol=1e-5)
    # Another dtype than the one that it was traced in.
    x = randn(2, 3, 5, 5)
    network.double()
    extractor.double()
    torch.manual_seed(0)
    expected = network(x)
    torch.manual_seed(0)
    torch.testing.assert_close(extractor(x)["2"], expected)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", NAMES)
def test_export_with_dynamic_sizes_equals_eager(name: str) -> None:
    module = make(name, gate_init=0.5, dtype=torch.float32)
    # Self-attention keeps to the side of its greatest size that it was traced on.
    largest = 14 if name == "msa" else 1 << 20
    dims = {
        0: torch.export.Dim("b", max=1 << 20),
        2: torch.export.Dim("h", max=largest),
        3: torch.export.Dim("w", max=largest),
    }
    x = randn(2, 24, 7, 5, dtype=torch.float32)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": dims}, strict=False)
    assert_equal_on_all_sizes(program.module(), module)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", OTHERS)
def test_compile_traces_one_graph_with_eagers_gradients(name: str) -> None:
    module = make(name, gate_init=0.5, dtype=torch.float32)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for size in [(7, 5), (17, 16)]:
        x = randn(2, 24, *size, dtype=torch.float32)
        assert_same(gradients(module, x, compiled), gradients(module, x, module), 1e-5)


@pytest.mark.parametrize("channels", [0, -4, 2.5, "8", None])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_create_attention_refuses_what_is_no_number_of_channels(name: str, channels: Any) -> None:
    with pytest.raises(ValueError, match="channels must be a positive integer, not"):
        create_attention(name, channels)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_create_attention_refuses_a_gate_that_is_no_number(name: str) -> None:
    with pytest.raises(ValueError, match="gate_init must be a finite number, not '1'"):
        create_attention(name, 8, gate_init="1")  # type: ignore[arg-type]


def test_create_attention_refuses_a_kernel_size_that_eca_would_ignore() -> None:
    with pytest.raises(TypeError, match="gamma and beta"):
        create_attention("eca", 64, kernel_size=7)
    assert create_attention("eca", 512, gamma=1).conv.kernel_size == (11,)  # type: ignore[union-attr]
