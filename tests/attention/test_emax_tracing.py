"""EMAX under TorchScript, torch.fx, torch.export and torch.compile."""

import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from emax_testing import VARIANTS, assert_same, emax_results, force, gradients, make_emax, randn
from timm.models import create_feature_extractor as timm_create_feature_extractor
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from emax_timm.attention import EMAX, set_grouping
from emax_timm.benchmark.modules import saved_bytes

SIZES = [(2, 7, 5), (1, 1, 1), (3, 8, 8), (5, 2, 9)]
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
SCRIPTING = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def small_network() -> nn.Sequential:
    """A layer inside a network, in eval mode."""
    emax = make_emax(24, dtype=torch.float32)
    return nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), emax, nn.Conv2d(24, 8, 1)).eval()


def assert_equal_on_all_sizes(
    traced: Callable[[Tensor], Tensor], module: nn.Module, channels: int
) -> None:
    """Also in values drawn at random: both start from the same seed."""
    for batch, *size in SIZES:
        x = randn(batch, channels, *size, dtype=torch.float32)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            x = x.to(memory_format=memory_format)
            torch.manual_seed(0)
            expected = module(x)
            torch.manual_seed(0)
            # timm's bounds for its traced models. On maps of a few nearly equal pixels the norm
            # multiplies a rounding error, which depends on the order of sums, by up to 300.
            torch.testing.assert_close(traced(x), expected, rtol=1e-4, atol=1e-5)


# TorchScript ------------------------------------------------------------------------------------


class TestScript:
    pytestmark = SCRIPTING

    @MODES
    @pytest.mark.parametrize("variant", [*VARIANTS, "batch_vote"])
    def test_script_equals_eager(self, variant: str, training: bool) -> None:
        knobs = VARIANTS.get(variant, {"batch_vote": True})
        module = make_emax(24, dtype=torch.float32, **knobs).train(training)
        assert_equal_on_all_sizes(torch.jit.script(module), module, 24)

    @MODES
    def test_script_has_eagers_gradients(self, training: bool) -> None:
        module = make_emax(24).train(training)
        scripted = torch.jit.script(module)
        x = randn(2, 24, 7, 5)
        expected = emax_results(module, x)
        # From its second call on, TorchScript runs a graph optimised for what it has seen; it must
        # not take for granted that the input never asks for a gradient.
        scripted(x)
        for _ in range(3):
            torch.manual_seed(0)
            actual = gradients(scripted, x, scripted)
            assert_same(actual, {name: expected[name] for name in actual})

    def test_script_follows_train_and_eval(self) -> None:
        module = make_emax(24, dtype=torch.float32).train()
        scripted = torch.jit.script(module)
        module.eval()
        scripted.eval()
        assert_equal_on_all_sizes(scripted, module, 24)

    def test_script_returns_the_maps_by_name(self) -> None:
        module, x = make_emax(24), randn(2, 24, 7, 5)
        maps = torch.jit.script(module.eval()).attention(x)
        assert torch.equal(maps.group_count, module.attention(x).group_count)
        torch.testing.assert_close(maps.spatial, module.attention(x).spatial)

    @pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
    def test_script_stays_close_under_autocast(self, half: torch.dtype) -> None:
        # TorchScript cannot leave autocast: its products are half precision, unlike eager's.
        module = make_emax(24, dtype=torch.float32)
        scripted = torch.jit.script(module)
        x = randn(2, 24, 7, 5, dtype=torch.float32)
        with torch.autocast("cpu", dtype=half):
            outputs = [scripted(x), scripted(x.to(half))]
        assert [out.dtype for out in outputs] == [torch.float32, half]
        for out in outputs:
            torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)

    def test_script_survives_a_file(self) -> None:
        module = make_emax(24, dtype=torch.float32)
        set_grouping(module, warmup=0.25)
        file = io.BytesIO()
        torch.jit.save(torch.jit.script(module), file)
        file.seek(0)
        loaded = torch.jit.load(file)
        assert_equal_on_all_sizes(loaded, module, 24)

    def test_script_of_a_network(self) -> None:
        network = small_network()
        scripted = torch.jit.script(network)
        x = randn(2, 3, 9, 9, dtype=torch.float32)
        torch.testing.assert_close(scripted(x), network(x), rtol=1e-5, atol=1e-5)

    def test_script_of_an_fx_graph(self) -> None:
        module = make_emax(24, dtype=torch.float32)
        scripted = torch.jit.script(torch.fx.symbolic_trace(module))
        assert_equal_on_all_sizes(scripted, module, 24)


# torch.fx ---------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("variant", VARIANTS)
def test_symbolic_trace_equals_eager(variant: str, training: bool) -> None:
    module = make_emax(24, dtype=torch.float32, **VARIANTS[variant]).train(training)
    assert_equal_on_all_sizes(torch.fx.symbolic_trace(module), module, 24)


@MODES
def test_symbolic_trace_has_eagers_gradients(training: bool) -> None:
    module, x = make_emax(24).train(training), randn(2, 24, 7, 5)
    traced = torch.fx.symbolic_trace(module)
    expected = emax_results(module, x)
    torch.manual_seed(0)
    actual = gradients(traced, x, traced)
    assert actual.keys() == {name for name in expected if name == "out" or "grad" in name}
    assert_same(actual, {name: expected[name] for name in actual})


def test_symbolic_trace_follows_set_grouping() -> None:
    # The traced module shares the buffers; as plain modules its layers are no longer EMAX.
    module = make_emax(24, dtype=torch.float32)
    traced = torch.fx.symbolic_trace(module)
    force(module, 1)
    set_grouping(module, warmup=0.0)
    assert_equal_on_all_sizes(traced, module, 24)


@pytest.mark.parametrize("create", [create_feature_extractor, timm_create_feature_extractor])
@MODES
def test_feature_extractors_trace_through_emax(create: Any, training: bool) -> None:
    network = small_network().train(training)
    x = randn(2, 3, 9, 9, dtype=torch.float32)
    extractor = create(network, ["1", "3"]).train(training)
    torch.manual_seed(0)
    expected = network(x)
    torch.manual_seed(0)
    features = extractor(x)
    torch.testing.assert_close(features["3"], expected, rtol=1e-5, atol=1e-5)


# torch.export -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strict", "knobs"),
    [(True, {}), (False, {}), (False, {"batch_vote": True})],
    ids=str,
)
def test_export_with_dynamic_sizes_equals_eager(strict: bool, knobs: dict[str, Any]) -> None:
    module = make_emax(24, dtype=torch.float32, **knobs)
    # The bounds are for torch 2.6, whose unbounded sizes collide with its largest integer.
    names = {0: "b", 2: "h", 3: "w"}
    dims = {axis: torch.export.Dim(name, max=1 << 20) for axis, name in names.items()}
    x = randn(2, 24, 7, 5, dtype=torch.float32)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": dims}, strict=strict)
    assert_equal_on_all_sizes(program.module(), module, 24)


def test_export_survives_a_file() -> None:
    module = make_emax(24, dtype=torch.float32)
    x = randn(2, 24, 7, 5, dtype=torch.float32)
    file = io.BytesIO()
    torch.export.save(torch.export.export(module, (x,)), file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), module(x))


# torch.compile ----------------------------------------------------------------------------------


COMPILED = pytest.mark.parametrize(
    ("training", "autocast"),
    [(False, False), (True, False), (True, True)],
    ids=["eval", "training", "training_autocast"],
)


def assert_compiled_equals_eager(
    module: EMAX, x: Tensor, autocast: bool, tolerance: float, **compiler: Any
) -> None:
    """Output and gradients, without a graph break."""
    compiled = torch.compile(module, fullgraph=True, **compiler)
    results = []
    for call in (compiled, module):
        torch.manual_seed(0)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            results.append(gradients(module, x, call))
    assert_same(results[0], results[1], tolerance)


@COMPILED
def test_compile_traces_one_graph_with_eagers_gradients(training: bool, autocast: bool) -> None:
    module = make_emax(24, dtype=torch.float32).train(training)
    x = randn(2, 24, 7, 5, dtype=torch.float32)
    assert_compiled_equals_eager(module, x, autocast, 1e-5, backend="aot_eager")


@pytest.mark.slow
@COMPILED
def test_compile_with_inductor_equals_eager(training: bool, autocast: bool) -> None:
    module = make_emax(24, dtype=torch.float32).train(training)
    x = randn(2, 24, 7, 5, dtype=torch.float32).to(memory_format=torch.channels_last)
    # Without fallback_random Inductor draws other numbers than eager does.
    options = {"fallback_random": True}
    assert_compiled_equals_eager(module, x, autocast, 1e-4, backend="inductor", options=options)


@pytest.mark.slow
def test_inductor_keeps_one_feature_map_for_the_backward_pass() -> None:
    module = make_emax(64, factor=8, dtype=torch.float32)
    x = randn(2, 64, 14, 14, dtype=torch.float32)
    compiled: Any = torch.compile(module, dynamic=False, fullgraph=True)
    kept = saved_bytes(compiled, x)
    assert kept < 2 * x.numel() * x.element_size()


def test_compile_serves_all_sizes_after_two() -> None:
    module = make_emax(24, dtype=torch.float32)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    compiled(randn(2, 24, 7, 5, dtype=torch.float32))
    compiled(randn(3, 24, 8, 6, dtype=torch.float32))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in [(5, 24, 2, 9), (7, 24, 11, 4)]:
            x = randn(*size, dtype=torch.float32)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)


def test_compile_follows_set_grouping_without_compiling_again() -> None:
    module = make_emax(24, dtype=torch.float32)
    force(module, 1)
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    x = randn(2, 24, 7, 5, dtype=torch.float32)
    outputs = [compiled(x)]
    with torch.compiler.set_stance("fail_on_recompile"):
        for warmup in (0.5, 0.0):
            assert set_grouping(compiled, warmup=warmup) == 1
            outputs.append(compiled(x))
            torch.testing.assert_close(outputs[-1], module(x))
    assert not torch.allclose(outputs[0], outputs[1])
    assert not torch.allclose(outputs[1], outputs[2])
