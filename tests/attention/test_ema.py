"""EMA against its published formula, and in every setting that a network may meet."""

import copy
import io
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from emax_testing import assert_same, gradients, randn, randomise
from timm.models import create_feature_extractor
from torch import Tensor, nn

from emax_timm.attention import EMA, EMAX
from emax_timm.attention.reference import naive_ema

KEYS = ["conv1x1.weight", "conv1x1.bias", "conv3x3.weight", "conv3x3.bias", "gn.weight", "gn.bias"]
# Channels, factor and the groups that follow.
LAYERS = [
    (1, 32, 1),
    (3, 32, 1),
    (32, 32, 32),
    (40, 32, 8),
    (64, 32, 32),
    (100, 32, 4),
    (36, 24, 12),
    (12, 1, 1),
]
SIZES = [(1, 1), (1, 7), (5, 1), (2, 2), (7, 5), (17, 9)]
KINDS = ["normal", "relu", "large_mean", "faint"]
FORMATS = [torch.contiguous_format, torch.channels_last]
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def make_ema(
    channels: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, **knobs: Any
) -> EMA:
    """An EMA layer in eval mode with random parameters."""
    module = EMA(channels, dtype=dtype, **knobs).eval()
    randomise(module, seed)
    return module


def layer_for(kind: str, channels: int, **knobs: Any) -> EMA:
    """A layer with gates that inputs of `kind` do not saturate."""
    module = make_ema(channels, **knobs)
    if kind == "large_mean":
        with torch.no_grad():
            module.conv1x1.weight.div_(100)
            module.conv3x3.weight.div_(100)
    return module


def features(kind: str, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs as they occur; "large_mean" has a mean of 100 deviations, "faint" lets eps count."""
    x = randn(*shape, seed=seed)
    values = {"normal": x, "relu": x.relu(), "large_mean": x + 100, "faint": 0.003 * x}
    return values[kind].to(dtype)


# The formula ------------------------------------------------------------------------------------


def tensors_of(module: EMA) -> list[Tensor]:
    """In the order of `naive_ema`."""
    return [module.get_parameter(key) for key in KEYS]


def naive(module: EMA) -> Callable[[Tensor], Tensor]:
    """The reference with the parameters of `module`."""
    mix, mix_bias, kernel, kernel_bias, scale, shift = tensors_of(module)

    def call(x: Tensor) -> Tensor:
        groups = x.shape[1] // len(shift)
        return naive_ema(x, groups, mix, mix_bias, kernel, kernel_bias, scale, shift)

    return call


def softmax(values: Tensor) -> Tensor:
    """Over the last dimension."""
    powers = (values - values.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def formula(x: Tensor, weights: list[Tensor]) -> Tensor:
    """Algorithm of arXiv 2305.13563 in sums and products: n groups of i channels, to o channels."""
    mix, mix_bias, kernel, kernel_bias, scale, shift = weights
    h, w = x.shape[2:]
    grouped = x.reshape(-1, len(mix), h, w)
    # The two directions share one 1x1 convolution.
    along_h = torch.einsum("oi,nih->noh", mix[:, :, 0, 0], grouped.sum(3) / w)
    along_w = torch.einsum("oi,niw->now", mix[:, :, 0, 0], grouped.sum(2) / h)
    gate_h = 1 / (1 + (-along_h - mix_bias[:, None]).exp())
    gate_w = 1 / (1 + (-along_w - mix_bias[:, None]).exp())
    gated = torch.einsum("nihw,nih,niw->nihw", grouped, gate_h, gate_w)
    deviation = gated - gated.sum((2, 3), keepdim=True) / (h * w)
    variance = (deviation**2).sum((2, 3), keepdim=True) / (h * w)
    one = deviation / (variance + 1e-5).sqrt() * scale[:, None, None] + shift[:, None, None]

    padded = torch.zeros(len(grouped), len(mix), h + 2, w + 2, dtype=x.dtype)
    padded[:, :, 1:-1, 1:-1] = grouped
    three = kernel_bias[:, None, None].expand(len(grouped), -1, h, w)
    for row in range(3):
        for column in range(3):
            seen = padded[:, :, row : row + h, column : column + w]
            three = three + torch.einsum("oi,nihw->nohw", kernel[:, :, row, column], seen)

    cross = torch.einsum("ni,nihw->nhw", softmax(one.mean((2, 3))), three)
    cross = cross + torch.einsum("ni,nihw->nhw", softmax(three.mean((2, 3))), one)
    return (grouped / (1 + (-cross[:, None]).exp())).view_as(x)


@pytest.mark.parametrize(
    ("channels", "factor", "groups", "size"),
    [
        *((*layer, size) for layer in LAYERS for size in SIZES),
        (2048, 32, 32, (1, 1)),
        (2048, 32, 32, (3, 5)),
    ],
)
def test_ema_equals_the_published_formula(
    channels: int, factor: int, groups: int, size: tuple[int, int]
) -> None:
    for kind in KINDS:
        module = layer_for(kind, channels, factor=factor)
        assert module.groups == groups
        x = features(kind, 2, channels, *size)
        actual = gradients(module, x, module)
        assert_same(actual, gradients(module, x, partial(formula, weights=tensors_of(module))))
        # torch's group norm takes E[u^2] - E[u]^2, and thus loses digits where the mean is large.
        if kind != "large_mean":
            assert_same(actual, gradients(module, x, naive(module)))
        elif size != (1, 1):
            assert_same(actual, gradients(module, x, naive(module)), 1e-9)


@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
def test_ema_equals_the_published_formula_in_any_layout(
    memory_format: torch.memory_format,
) -> None:
    module = make_ema(40)
    module.to(memory_format=memory_format)  # type: ignore[call-overload]
    x = randn(2, 40, 7, 5).to(memory_format=memory_format)
    assert_same(gradients(module, x, module), gradients(module, x, naive(module)))
    x = randn(4, 80, 12, 5)[::2, ::2, 1::2].transpose(2, 3)
    assert_same(gradients(module, x, module), gradients(module, x, naive(module)))


def test_every_gradient_of_the_exactness_checks_is_far_from_zero() -> None:
    module = make_ema(40)
    results = gradients(module, randn(2, 40, 7, 5), module)
    assert results.keys() == {"out", "grad input", *(f"grad {key}" for key in KEYS)}
    assert min(value.abs().max().item() for value in results.values()) > 1e-3


@pytest.mark.parametrize("size", [(1, 1), (3, 2)], ids=str)
def test_ema_gradients_are_the_numeric_ones(size: tuple[int, int]) -> None:
    module = make_ema(6, factor=2)
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = [randn(2, 6, *size), *(value.detach() for value in module.parameters())]
    assert torch.autograd.gradcheck(
        call, [value.requires_grad_() for value in inputs], fast_mode=True
    )


def test_ema_of_the_transposed_image_is_the_transposed_one_with_a_transposed_kernel() -> None:
    module, x = make_ema(24), randn(2, 24, 7, 5)
    expected = module(x).mT
    with torch.no_grad():
        module.conv3x3.weight.copy_(module.conv3x3.weight.mT.clone())
    torch.testing.assert_close(module(x.mT), expected, rtol=0, atol=1e-12)


def test_ema_treats_each_sample_and_each_group_by_itself() -> None:
    module, x = make_ema(40), randn(5, 40, 4, 3)
    out = module(x)
    alone = torch.cat([module(sample) for sample in x.split(1)])
    torch.testing.assert_close(alone, out, rtol=0, atol=1e-12)
    order = torch.tensor([3, 0, 7, 1, 2, 6, 5, 4])
    shuffled = module(x.unflatten(1, (8, 5))[:, order].flatten(1, 2))
    expected = out.unflatten(1, (8, 5))[:, order].flatten(1, 2)
    torch.testing.assert_close(shuffled, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("channels", [3, 40, 64])
def test_ema_is_emax_at_the_finest_grouping_without_gates(
    channels: int, dtype: torch.dtype
) -> None:
    module = make_ema(channels, dtype=dtype)
    twin = EMAX(
        channels, group_counts="finest", channel_gate=False, global_gate=False, dtype=dtype
    ).eval()
    missing, unexpected = twin.load_state_dict(module.state_dict(), strict=False)
    assert set(missing) == {"residual_gate", "warmup", "temperature"}
    assert not unexpected
    x = randn(2, channels, 7, 5, dtype=dtype)
    actual = gradients(module, x, module)
    expected = gradients(twin, x, twin)
    del expected["grad residual_gate"]
    assert torch.equal(actual["out"], expected["out"])
    assert_same(actual, expected, 1e-12 if dtype == torch.float64 else 1e-5)
    assert torch.equal(module.attention(x), twin.attention(x).spatial)


def test_ema_attention_is_what_multiplies_the_input() -> None:
    module, x = make_ema(40), randn(2, 40, 7, 5)
    attention = module.attention(x)
    assert attention.shape == (2, 8, 7, 5)
    assert ((attention > 0) & (attention < 1)).all()
    expected = x * attention.repeat_interleave(5, dim=1)
    torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-15)


def test_ema_computes_the_same_in_training_and_eval() -> None:
    module, x = make_ema(40), randn(2, 40, 7, 5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert torch.equal(module(x), module.train()(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_ema_leaves_its_input_alone() -> None:
    module, x = make_ema(24), randn(2, 24, 4, 3)
    before = x.clone()
    with torch.inference_mode():
        module(x)
    assert torch.equal(x, before)


def test_ema_gives_every_parameter_a_gradient_as_constructed() -> None:
    module = EMA(40)
    module(randn(2, 40, 4, 3, dtype=torch.float32)).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


# Precision of float32 ---------------------------------------------------------------------------


def float32_errors(module: EMA, truth: EMA, x: Tensor) -> dict[str, tuple[float, float]]:
    """The largest error of each result over its largest value: of `module`, and of the formula.

    Args:
        truth: Has the parameters that the formula is given.
    """
    double = copy.deepcopy(truth).double()
    exact = gradients(double, x.double(), naive(double))
    results = gradients(module, x, module), gradients(truth, x, naive(truth))
    errors = {}
    for name, value in exact.items():
        largest = value.abs().max().clamp(min=1e-30)
        ours, theirs = (((r[name] - value).abs().max() / largest).item() for r in results)
        errors[name] = ours, theirs
    return errors


def assert_as_precise(draws: list[dict[str, tuple[float, float]]]) -> None:
    """In the median over draws, at most four times the naive formula's error or 1e-6."""
    for name in draws[0]:
        ours, theirs = (statistics.median(draw[name][i] for draw in draws) for i in (0, 1))
        assert ours <= max(4 * theirs, 1e-6), f"{name}: error {ours:.1e}, naive {theirs:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("channels", "size"),
    [(3, (7, 5)), (32, (9, 9)), (40, (1, 1)), (64, (14, 14)), (100, (5, 7)), (2048, (3, 5))],
    ids=str,
)
def test_ema_in_float32_is_as_precise_as_the_naive_formula(
    channels: int, size: tuple[int, int], kind: str
) -> None:
    draws = []
    for seed in range(15):
        module = layer_for(kind, channels, seed=seed, dtype=torch.float32)
        x = features(kind, 2, channels, *size, seed=seed, dtype=torch.float32)
        draws.append(float32_errors(module, module, x))
    assert_as_precise(draws)


@pytest.mark.parametrize("fault", ["none", "eps", "kernel"])
def test_the_precision_check_fails_a_slightly_wrong_ema(fault: str) -> None:
    truth = make_ema(64, dtype=torch.float32)
    module = copy.deepcopy(truth)
    x = randn(2, 64, 14, 14, dtype=torch.float32)
    if fault == "none":
        others = [randn(2, 64, 14, 14, dtype=torch.float32, seed=seed) for seed in range(9)]
        assert_as_precise([float32_errors(module, truth, x) for x in others])
        return
    if fault == "eps":
        module.gn.eps = 2e-5
    else:
        with torch.no_grad():
            module.conv3x3.weight[0, 0, 0, 1] *= 1.001
    with pytest.raises(AssertionError, match="error"):
        assert_as_precise([float32_errors(module, truth, x)])


# Construction -----------------------------------------------------------------------------------


def test_ema_groups_are_the_greatest_common_divisor() -> None:
    for factor in (1, 8, 24, 32, 1000):
        for channels in (*range(1, 101), 2048):
            module = EMA(channels, factor=factor, device="meta")
            divides_both = [n for n in range(1, factor + 1) if channels % n == factor % n == 0]
            assert module.groups == divides_both[-1], (channels, factor)
            assert module.group_channels * module.groups == channels
    assert EMA(40).groups == 8
    assert "groups=8" in repr(EMA(40))


@pytest.mark.parametrize(("channels", "d"), [(32, 1), (40, 5), (64, 2), (2048, 64)])
def test_ema_state_dict_is_the_published_one(channels: int, d: int) -> None:
    shapes = [(d, d, 1, 1), (d,), (d, d, 3, 3), (d,), (d,), (d,)]
    module = EMA(channels)
    state = module.state_dict()
    assert state.keys() == set(KEYS)
    assert {key: tuple(value.shape) for key, value in state.items()} == dict(
        zip(KEYS, shapes, strict=True)
    )
    assert dict(module.named_parameters()).keys() == set(KEYS)
    given = {key: randn(*value.shape, dtype=torch.float32) for key, value in state.items()}
    module.load_state_dict(given)
    x = randn(2, channels, 3, 4, dtype=torch.float32)
    weights = [given[key] for key in KEYS]
    torch.testing.assert_close(module(x), formula(x, weights), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", KEYS)
def test_ema_strict_loading_names_a_missing_key(key: str) -> None:
    module = EMA(24)
    state = module.state_dict()
    del state[key]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{key}"'):
        module.load_state_dict(state)


def test_ema_state_dict_survives_a_file() -> None:
    module, x = make_ema(24), randn(2, 24, 4, 3)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = EMA(24, dtype=torch.float64)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), module(x))


def test_ema_starts_with_torchs_defaults() -> None:
    module = EMA(2048)
    assert (module.gn.weight == 1).all()
    assert (module.gn.bias == 0).all()
    assert module.gn.eps == 1e-5
    for layer in (module.conv1x1, module.conv3x3):
        bound = layer.weight[0].numel() ** -0.5
        assert 0.99 * bound < layer.weight.max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert layer.bias is not None
        assert 0.5 * bound < layer.bias.abs().max() <= bound


def test_ema_deepcopy_is_equal_and_independent() -> None:
    module, x = make_ema(24), randn(2, 24, 4, 3)
    before = module(x)
    twin = copy.deepcopy(module)
    assert torch.equal(twin(x), before)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(module(x), before)


def test_ema_refuses_an_unknown_keyword() -> None:
    with pytest.raises(TypeError, match="factors"):
        EMA(8, factors=4)  # type: ignore[call-arg]


@pytest.mark.parametrize("name", ["channels", "factor"])
@pytest.mark.parametrize("value", [0, -4, 2.5, "8", None], ids=str)
def test_ema_refuses_sizes_that_are_no_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*positive.*{value}"):
        EMA(**{"channels": 8, name: value})


@pytest.mark.parametrize(("channels", "given"), [(1, 3), (24, 48), (24, 12), (24, 25)])
def test_ema_refuses_an_input_with_other_channels(channels: int, given: int) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        EMA(channels)(torch.zeros(2, given, 4, 4))


# Devices, dtypes and layouts --------------------------------------------------------------------


@MODES
def test_ema_is_built_and_runs_on_the_meta_device(training: bool) -> None:
    for module in (EMA(24, device="meta"), EMA(24).to("meta")):
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
        out = module.train(training)(torch.empty(2, 24, 7, 5, device="meta"))
        assert out.shape == (2, 24, 7, 5)
        assert out.device.type == "meta"
    with torch.device("meta"):
        assert EMA(24).gn.weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_ema_parameters_have_the_dtype_given(dtype: torch.dtype) -> None:
    assert {parameter.dtype for parameter in EMA(24, dtype=dtype).parameters()} == {dtype}


@HALVES
@MODES
def test_ema_is_the_same_under_autocast(half: torch.dtype, training: bool) -> None:
    module = make_ema(40, dtype=torch.float32).train(training)
    x = randn(3, 40, 7, 5, dtype=torch.float32)
    with torch.autocast("cpu", dtype=half):
        attention, of_half = module.attention(x), module(x.to(half))
    assert torch.equal(attention, module.attention(x))
    assert torch.equal(of_half, module(x.to(half)))
    assert of_half.dtype == half

    def under_autocast(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=half):
            return module(x)

    actual, expected = gradients(module, x, under_autocast), gradients(module, x, module)
    assert all(torch.equal(value, expected[name]) for name, value in actual.items())


@HALVES
def test_ema_of_a_half_input_computes_in_float32(half: torch.dtype) -> None:
    module = make_ema(40, dtype=torch.float32)
    x = randn(3, 40, 7, 5).to(half)
    assert module.attention(x).dtype == torch.float32
    assert torch.equal(module.attention(x), module.attention(x.float()))
    out = module(x)
    assert out.dtype == half
    assert torch.equal(out, module(x.float()).to(half))


@HALVES
def test_ema_in_half_precision_is_the_float32_layer_with_rounded_weights(
    half: torch.dtype,
) -> None:
    module = make_ema(40, dtype=torch.float32).to(half)
    x = randn(3, 40, 7, 5).to(half)
    results = gradients(module, x, module)
    assert {value.dtype for value in results.values()} == {half}
    module.float()
    assert torch.equal(results["out"], module(x))
    for name, value in gradients(module, x.float(), module).items():
        bound = 0.02 * value.abs().max().item()
        torch.testing.assert_close(results[name].float(), value, rtol=0.02, atol=bound)


def test_ema_survives_half_inputs_whose_squares_overflow() -> None:
    module = make_ema(24, dtype=torch.float32)
    x = (3000 * randn(2, 24, 9, 9)).half()
    with torch.no_grad():
        module.conv3x3.weight.div_(1000)
    results = gradients(module, x, module)
    assert all(value.isfinite().all() for value in results.values())


def test_ema_computes_in_float64_for_float64_inputs() -> None:
    module = make_ema(40, dtype=torch.float32)
    x = randn(2, 40, 7, 5)
    out = module(x)
    assert out.dtype == module.attention(x).dtype == torch.float64
    torch.testing.assert_close(out, module.double()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("memory_format", FORMATS, ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("channels", [3, 32, 40])
def test_ema_keeps_the_memory_format(
    channels: int, dtype: torch.dtype, memory_format: torch.memory_format
) -> None:
    module = make_ema(channels, dtype=torch.float32)
    x = randn(2, channels, 5, 7, dtype=dtype).to(memory_format=memory_format)
    for context in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu")):
        with context:
            out = module(x)
        assert out.is_contiguous(memory_format=memory_format)
        assert out.stride() == x.stride()


# Scripted, traced, exported and compiled --------------------------------------------------------


def assert_equal_on_all_sizes(traced: Callable[[Tensor], Tensor], module: nn.Module) -> None:
    for batch, *size in [(2, 7, 5), (1, 1, 1), (3, 8, 8), (5, 2, 9)]:
        x = randn(batch, 24, *size, dtype=torch.float32)
        for memory_format in FORMATS:
            x = x.to(memory_format=memory_format)
            # A norm of a few nearly equal pixels multiplies rounding errors.
            torch.testing.assert_close(traced(x), module(x), rtol=1e-4, atol=1e-5)


class TestScript:
    pytestmark = [  # noqa: RUF012
        pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
        pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning"),
    ]

    @MODES
    def test_script_equals_eager(self, training: bool) -> None:
        module = make_ema(24, dtype=torch.float32).train(training)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(module), file)
        file.seek(0)
        assert_equal_on_all_sizes(torch.jit.load(file), module)

    def test_script_has_eagers_gradients(self) -> None:
        module, x = make_ema(24), randn(2, 24, 7, 5)
        scripted = torch.jit.script(module)
        expected = gradients(module, x, module)
        # From its second call on, TorchScript runs a graph optimised for what it has seen.
        scripted(x)
        for _ in range(3):
            assert_same(gradients(scripted, x, scripted), expected)

    @HALVES
    def test_script_stays_close_under_autocast(self, half: torch.dtype) -> None:
        module = make_ema(24, dtype=torch.float32)
        scripted = torch.jit.script(module)
        x = randn(2, 24, 7, 5, dtype=torch.float32)
        with torch.autocast("cpu", dtype=half):
            outputs = [scripted(x), scripted(x.to(half))]
        assert [out.dtype for out in outputs] == [torch.float32, half]
        for out in outputs:
            torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)

    def test_script_gives_the_attention(self) -> None:
        module, x = make_ema(24), randn(2, 24, 7, 5)
        actual = torch.jit.script(module).attention(x)
        torch.testing.assert_close(actual, module.attention(x), rtol=0, atol=1e-12)


@MODES
def test_symbolic_trace_equals_eager(training: bool) -> None:
    module = make_ema(24, dtype=torch.float32).train(training)
    traced = torch.fx.symbolic_trace(module)
    assert_equal_on_all_sizes(traced, module)
    x = randn(2, 24, 7, 5)
    module.double()
    assert_same(gradients(traced, x, traced), gradients(module, x, module))


@MODES
def test_timms_feature_extraction_traces_through_ema(training: bool) -> None:
    module = make_ema(24, dtype=torch.float32)
    network = nn.Sequential(nn.Conv2d(3, 24, 3), module, nn.Conv2d(24, 8, 1)).train(training)
    extractor = create_feature_extractor(network, ["1", "2"]).train(training)
    for dtype in (torch.float32, torch.bfloat16):
        network.to(dtype)
        extractor.to(dtype)
        for size in [(9, 9), (4, 11)]:
            x = randn(2, 3, *size, dtype=dtype)
            actual = extractor(x)
            assert actual["1"].dtype == dtype
            torch.testing.assert_close(actual["1"], module(network[0](x)))
            torch.testing.assert_close(actual["2"], network(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_with_dynamic_sizes_equals_eager(strict: bool) -> None:
    module = make_ema(24, dtype=torch.float32)
    # The bounds are for torch 2.6, whose unbounded sizes collide with its largest integer.
    names = {0: "b", 2: "h", 3: "w"}
    dims = {axis: torch.export.Dim(name, max=1 << 20) for axis, name in names.items()}
    x = randn(2, 24, 7, 5, dtype=torch.float32)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": dims}, strict=strict)
    assert_equal_on_all_sizes(program.module(), module)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_compile_traces_one_graph_with_eagers_gradients(autocast: bool) -> None:
    module, x = make_ema(24, dtype=torch.float32), randn(2, 24, 7, 5, dtype=torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual, expected = gradients(module, x, compiled), gradients(module, x, module)
    assert_same(actual, expected, 1e-5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compile_serves_all_sizes_after_two() -> None:
    module = make_ema(24, dtype=torch.float32)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    compiled(randn(2, 24, 7, 5, dtype=torch.float32))
    compiled(randn(3, 24, 8, 6, dtype=torch.float32))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in [(5, 24, 2, 9), (7, 24, 11, 4)]:
            x = randn(*size, dtype=torch.float32)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
