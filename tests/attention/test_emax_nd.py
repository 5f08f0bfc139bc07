"""EMAX for sequences and videos: exactness, and what every attention promises to torch's tools."""

import copy
import io
import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from attention_contract import HALVES, MODES, seeded
from emax_testing import VARIANTS, assert_same, force, gradients, randn, randomise
from plain_forms import by_formulas
from tiers import mostly_slow
from torch import Tensor, nn

import emax_timm
from emax_timm.attention import EMAX, EMAX1d, EMAX3d, create_attention, set_grouping
from emax_timm.benchmark.layers import saved_bytes
from emax_timm.models.capture import capture_attention
from emax_timm.ops import dispatch, reference

SIZES = {EMAX1d: [(1,), (2,), (9,)], EMAX3d: [(1, 1, 1), (2, 1, 5), (3, 4, 5), (1, 2, 2)]}
CASES = [(kind, size) for kind, sizes in SIZES.items() for size in sizes]
KINDS = pytest.mark.parametrize(("kind", "size"), [(EMAX1d, (9,)), (EMAX3d, (3, 4, 5))])


def make(
    kind: type[EMAX], channels: int = 24, dtype: torch.dtype = torch.float64, **knobs: Any
) -> Any:
    """In eval mode, with random parameters."""
    module = kind(channels, dtype=dtype, **knobs).eval()
    randomise(module)
    return module


def assert_exact(module: Any, x: Tensor) -> None:
    """The output, every gradient and the maps are those of the formulas, for the same noise."""
    expected = gradients(module, x, seeded(by_formulas(module)))
    assert_same(gradients(module, x, seeded(module)), expected)
    torch.manual_seed(0)
    maps = module.attention(x)
    torch.manual_seed(0)
    noise = dispatch.draw_noise(x, module.candidates, module.training)
    expected_maps = reference.emax(x, reference.parts_of(module.weights()), noise)[1]
    assert_same(maps._asdict(), expected_maps._asdict())


# Exactness --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "size"), CASES, ids=str)
@pytest.mark.parametrize(
    ("channels", "factor"), mostly_slow([(24, 12), (3, 32), (1, 32), (36, 12), (40, 32)], 0, 1)
)
def test_it_equals_the_formulas_at_every_group_count(
    kind: type[EMAX], size: tuple[int, ...], channels: int, factor: int
) -> None:
    module = make(kind, channels, factor=factor)
    for count in module.candidates:
        force(module, count)
        assert_exact(module, randn(2, channels, *size))


@KINDS
@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, 0, 3, 6))
def test_it_equals_the_formulas_without_each_part(
    kind: type[EMAX], size: tuple[int, ...], variant: str
) -> None:
    module = make(kind, **VARIANTS[variant])
    force(module, module.candidates[0])
    set_grouping(module, warmup=0.3, temperature=0.7)
    assert_exact(module, randn(2, 24, *size))


@KINDS
@pytest.mark.parametrize("batch_vote", [False, True])
def test_it_equals_the_formulas_under_training_noise(
    kind: type[EMAX], size: tuple[int, ...], batch_vote: bool
) -> None:
    module = make(kind, 40, batch_vote=batch_vote).train()
    force(module, 2, margin=0.5)
    set_grouping(module, warmup=0.6)
    assert_exact(module, randn(6, 40, *size))


@KINDS
def test_float32_is_precise_where_means_are_large(kind: type[EMAX], size: tuple[int, ...]) -> None:
    module = make(kind, 36, factor=12)
    force(module, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.div_(30)
    x = randn(2, 36, *size) + 30
    exact = gradients(module, x, by_formulas(module))
    rounded = gradients(module.float(), x.float(), module)
    for name, value in exact.items():
        error = (rounded[name] - value).abs().max() / value.abs().max()
        assert error < (1e-5 if name == "out" else 2e-3), f"{name}: {error:.1e}"


@KINDS
def test_gradients_are_the_numeric_ones(kind: type[EMAX], size: tuple[int, ...]) -> None:
    module = make(kind, 8, factor=4, reduction=2)
    set_grouping(module, warmup=0.0)  # no choice is made, whose gradient is not the numeric one
    names = [name for name, _ in module.named_parameters()]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

    inputs = [randn(2, 8, *size[:2]) if len(size) == 1 else randn(2, 8, 2, 3, 2)]
    inputs = [
        value.requires_grad_() for value in [*inputs, *(p.detach() for p in module.parameters())]
    ]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@KINDS
@pytest.mark.parametrize("features", mostly_slow(["normal", "zero", "one_pixel"], 0, 1))
def test_second_and_forward_gradients_are_finite_and_the_formulas(
    kind: type[EMAX], size: tuple[int, ...], features: str
) -> None:
    module = make(kind, 8, factor=4, reduction=2)
    x = randn(2, 8, *([1] * len(size) if features == "one_pixel" else size))
    x = torch.zeros_like(x) if features == "zero" else x
    tangent, cotangent, results = randn(*x.shape, seed=3), randn(*x.shape, seed=4), []
    for call in (module, by_formulas(module)):
        y = x.clone().requires_grad_()
        inputs = [y, *module.parameters()]
        first = torch.autograd.grad((call(y) * cotangent).sum(), inputs, create_graph=True)
        penalty = sum((g * randn(*g.shape, seed=n)).sum() for n, g in enumerate(first))
        second = torch.autograd.grad(penalty, inputs, allow_unused=True)  # type: ignore[arg-type]
        along = torch.func.jvp(call, (x,), (tangent,))[1]
        results.append([along, *(torch.zeros(1) if g is None else g for g in second)])
    for actual, expected in zip(*results, strict=True):
        assert expected.isfinite().all()
        bound = 1e-9 * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


@KINDS
def test_gradients_of_single_samples_by_vmap(kind: type[EMAX], size: tuple[int, ...]) -> None:
    module, x = make(kind, 8, factor=4), randn(3, 8, *size)

    def loss(sample: Tensor) -> Tensor:
        return module(sample.unsqueeze(0)).square().sum()

    actual = torch.func.vmap(torch.func.grad(loss))(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(by_formulas(module)(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


# Samples, dtypes, layouts and memory ------------------------------------------------------------


@KINDS
def test_each_sample_is_treated_by_itself_in_eval_mode(
    kind: type[EMAX], size: tuple[int, ...]
) -> None:
    module, x = make(kind), randn(4, 24, *size)
    alone = torch.cat([module(sample) for sample in x.split(1)])
    torch.testing.assert_close(module(x), alone, rtol=0, atol=1e-12)
    x[2] = torch.nan
    others = [0, 1, 3]
    torch.testing.assert_close(module(x)[others], alone[others], rtol=0, atol=1e-12)


@MODES
@KINDS
def test_every_parameter_has_a_gradient_as_constructed(
    kind: type[EMAX], size: tuple[int, ...], training: bool
) -> None:
    for gate_init, warmup in product((0.0, 1.0), (0.0, 1.0)):
        module = kind(24, gate_init=gate_init).train(training)
        set_grouping(module, warmup=warmup)
        results = gradients(module, randn(2, 24, *size, dtype=torch.float32), module)
        assert all(value.isfinite().all() for value in results.values())
        x = randn(2, 24, *size, dtype=torch.float32)
        assert torch.equal(module(x), x) == (gate_init == 0)


@HALVES
@KINDS
def test_half_precision_is_that_of_inputs_and_outputs_alone(
    kind: type[EMAX], size: tuple[int, ...], half: torch.dtype
) -> None:
    module, x = make(kind, dtype=torch.float32), randn(2, 24, *size, dtype=torch.float32)
    expected = gradients(module, x, module)
    with torch.autocast("cpu", half):
        actual = gradients(module, x, module)
        assert torch.equal(module(x.to(half)), module(x.to(half).float()).to(half))
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


@KINDS
def test_it_keeps_layout_and_takes_any_strides(kind: type[EMAX], size: tuple[int, ...]) -> None:
    module, x = make(kind), randn(2, 24, *size)
    expected = gradients(module, x, module)
    last = x.movedim(1, -1).contiguous().movedim(-1, 1)
    wide = randn(2, 24, *size, 2)
    wide[..., 0] = x
    for strided in (last, wide[..., 0]):
        assert_same(gradients(module, strided, module), expected, 1e-12)
    assert module(last).stride() == last.stride()
    hook = module.conv3x3.register_forward_hook(lambda *_: None)
    if kind is EMAX3d:
        assert module(last).stride() == last.stride()
    hook.remove()


@KINDS
def test_nothing_but_the_input_is_kept_for_the_backward_pass(
    kind: type[EMAX], size: tuple[int, ...]
) -> None:
    x = randn(2, 64, *(4 * n for n in size), dtype=torch.float32)
    kept = saved_bytes(kind(64).train(), x)
    assert x.nbytes <= kept < 1.01 * x.nbytes + 1000


@KINDS
def test_it_is_built_where_it_is_told_and_survives_a_copy(
    kind: type[EMAX], size: tuple[int, ...]
) -> None:
    for module in (kind(24, device="meta"), kind(24).to("meta")):
        assert module(torch.empty(2, 24, *size, device="meta")).shape == (2, 24, *size)
    assert {p.dtype for p in kind(24, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}
    module, x = make(kind), randn(2, 24, *size)
    other = kind(24, device="meta", dtype=torch.float64).eval().to_empty(device="cpu")
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), module(x))
    other.reset_parameters()
    twin = copy.deepcopy(other)
    assert torch.equal(twin(x), other(x))
    assert twin.residual_gate.tolist() == [1] * 24
    assert (twin.conv3x3.bias == 2).all()


# Names, arguments and errors --------------------------------------------------------------------


@KINDS
def test_parameters_have_the_names_of_emax(kind: type[EMAX], size: tuple[int, ...]) -> None:
    state, images = kind(40).state_dict(), EMAX(40).state_dict()
    assert list(state) == list(images)
    n = len(size)
    assert state["conv3x3.weight"].shape == (5, 5, *[3] * n)
    assert state["conv1x1.weight"].shape == (5, 5, *[1] * n)
    assert state["global_attn.1.weight"].shape == (2, 40, *[1] * n)
    assert repr(kind(40)).startswith(f"EMAX{n}d(\n  groups=8, candidates=[1, 2, 4, 8]")
    with pytest.raises(TypeError, match="facto"):
        kind(40, facto=8)  # type: ignore[call-arg]


@pytest.mark.parametrize(("dims", "kind"), [(1, EMAX1d), (2, EMAX), (3, EMAX3d)])
def test_the_factory_makes_it(dims: int, kind: type[EMAX]) -> None:
    module: Any = create_attention("emax", 24, gate_init=0.5, dims=dims, factor=8)
    assert type(module) is kind
    assert module.residual_gate.tolist() == [0.5] * 24
    assert module.groups == 8


def test_the_factory_says_what_dimensions_there_are() -> None:
    with pytest.raises(ValueError, match="dims of emax must be 1 or 2 or 3, not 4"):
        create_attention("emax", 24, dims=4)
    with pytest.raises(ValueError, match="dims of se must be 2, not 1"):
        create_attention("se", 24, dims=1)


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [(EMAX1d, "[b, 24, l]"), (EMAX, "[b, 24, h, w]"), (EMAX3d, "[b, 24, t, h, w]")],
)
def test_a_tensor_of_another_shape_is_refused(kind: type[EMAX], wanted: str) -> None:
    module = kind(24)
    right = wanted.count(",") + 1
    for _ in range(2):
        for rank in range(1, 7):
            for shape in ([2, 24, 3, 3, 3, 3][:rank], [2, 48, 3, 3, 3, 3][:rank]):
                if rank == right and shape[1] == 24:
                    continue
                message = re.escape(f"x must be {wanted}, not {shape}")
                for call in (module, module.attention):
                    with pytest.raises(ValueError, match=message):
                        call(torch.zeros(shape))
        module.conv3x3.register_forward_hook(lambda *_: None)  # the children are called


@KINDS
def test_backends_of_images_say_so(kind: type[EMAX], size: tuple[int, ...]) -> None:
    module, x = make(kind, dtype=torch.float32), randn(2, 24, *size, dtype=torch.float32)
    reasons = dispatch.explain(x, module.weights())
    n = len(size)
    assert reasons["portable"] is None
    assert reasons["cpp"] == f"it serves 2 dimensions (images) alone, not {n}"
    with (
        emax_timm.use_backend("cpp"),
        pytest.raises(
            dispatch.BackendError, match=rf"cpp .* 2 dimensions \(images\) alone, not {n}"
        ),
    ):
        module(x)


# Children, the schedule and capture -------------------------------------------------------------


@KINDS
def test_children_that_changed_are_called(kind: type[EMAX], size: tuple[int, ...]) -> None:
    module, x = make(kind), randn(2, 24, *size)
    expected, fired = gradients(module, x, module), set()
    for name, child in module.named_modules():
        if name:
            child.register_forward_hook(lambda *_, name=name: fired.add(name))
    assert_same(gradients(module, x, module), expected)
    assert fired == {name for name, _ in module.named_modules() if name}


@KINDS
def test_set_grouping_and_capture_attention_serve_it(
    kind: type[EMAX], size: tuple[int, ...]
) -> None:
    module, x = make(kind).train(), randn(2, 24, *size)
    network = nn.Sequential(nn.Identity(), module)
    assert set_grouping(network, warmup=0.25, temperature=0.5) == 1
    assert (module.warmup.item(), module.temperature.item()) == (0.25, 0.5)
    torch.manual_seed(1)
    expected = network(x)
    torch.manual_seed(1)
    with capture_attention(network) as maps:
        assert torch.equal(network(x), expected)
    assert maps["1"].spatial is not None
    assert maps["1"].spatial.shape == (2, module.groups, *size)


# Graphs -----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


OTHERS = {EMAX1d: [(1,), (2,), (40,)], EMAX3d: [(1, 1, 1), (2, 1, 7), (5, 8, 6)]}


def assert_equal_on_other_sizes(graph: Callable[[Tensor], Tensor], module: Any) -> None:
    for size in OTHERS[type(module)]:
        for batch in (1, 3):
            x = randn(batch, 24, *size, dtype=torch.float32)
            # The bounds of `graph_contract.py`.
            torch.testing.assert_close(seeded(graph)(x), seeded(module)(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", mostly_slow([False, True], 0), ids=["eval", "training"])
@KINDS
def test_script_and_fx_equal_eager(kind: type[EMAX], size: tuple[int, ...], training: bool) -> None:
    module = make(kind, dtype=torch.float32).train(training)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(module), file)
    file.seek(0)
    assert_equal_on_other_sizes(torch.jit.load(file), module)
    assert_equal_on_other_sizes(torch.fx.symbolic_trace(module), module)
    module, x = make(kind).train(training), randn(2, 24, *size)
    scripted: Any = torch.jit.script(module)
    expected = gradients(module, x, seeded(module))
    for _ in range(3):  # from the second call on, TorchScript optimises
        assert_same(gradients(scripted, x, seeded(scripted)), expected)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@KINDS
def test_trace_equals_eager(kind: type[EMAX], size: tuple[int, ...]) -> None:
    module = make(kind, dtype=torch.float32)
    traced: Any = torch.jit.trace(module, randn(2, 24, *size, dtype=torch.float32))
    assert_equal_on_other_sizes(traced, module)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("kind", "size", "strict"),
    mostly_slow(
        [
            (EMAX1d, (9,), False),
            (EMAX1d, (9,), True),
            (EMAX3d, (3, 4, 5), False),
            (EMAX3d, (3, 4, 5), True),
        ]
    ),
)
def test_export_with_dynamic_sizes_equals_eager(
    kind: type[EMAX], size: tuple[int, ...], strict: bool
) -> None:
    module = make(kind, dtype=torch.float32)
    axes = {axis: torch.export.Dim(f"s{axis}", max=1 << 20) for axis in range(2 + len(size))}
    dims = {"x": {axis: dim for axis, dim in axes.items() if axis != 1}}
    x = randn(2, 24, *size, dtype=torch.float32)
    program = torch.export.export(module, (x,), dynamic_shapes=dims, strict=strict)
    assert_equal_on_other_sizes(program.module(), module)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@MODES
@KINDS
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_traces_one_graph_with_eagers_gradients(
    kind: type[EMAX], size: tuple[int, ...], training: bool, backend: str
) -> None:
    module, x = make(kind, dtype=torch.float32), randn(2, 24, *size, dtype=torch.float32)
    module.train(training)
    # Without fallback_random Inductor draws other numbers than eager does.
    options: Any = {"fallback_random": True} if backend == "inductor" else None
    compiled: Any = torch.compile(module, fullgraph=True, backend=backend, options=options)
    expected = gradients(module, x, seeded(module))
    assert_same(gradients(module, x, seeded(compiled)), expected, 1e-4)
