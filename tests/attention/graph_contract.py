"""What every attention promises to tools that turn it into a graph; base classes, as in
`attention_contract.py`.
"""

from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import timm.models
import torch
import torchvision.models.feature_extraction
from attention_contract import LAYOUTS, MODES, Subject, seeded, through_a_file
from emax_testing import assert_same, gradients, randn
from tiers import mostly_slow
from torch import Tensor, nn

EXTRACTORS = [
    timm.models.create_feature_extractor,
    torchvision.models.feature_extraction.create_feature_extractor,
]


def assert_equal_on_all_sizes(graph: Callable[[Tensor], Tensor], module: nn.Module) -> None:
    """Also in values drawn at random: both start from the same seed."""
    normed = any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    for batch, *size in [(2, 7, 5), (1, 1, 1), (3, 8, 8), (5, 2, 9)]:
        if normed and module.training and batch == 1:
            continue  # torch's batch norm refuses a single value per channel
        x = randn(batch, 24, *size, dtype=torch.float32)
        for layout in LAYOUTS:
            x = x.to(memory_format=layout)
            expected = seeded(module)(x)
            # timm's bounds for its traced models. On maps of a few nearly equal pixels the norm
            # multiplies a rounding error, which depends on the order of sums, by up to 300.
            torch.testing.assert_close(seeded(graph)(x), expected, rtol=1e-4, atol=1e-5)


class GraphContract(Subject):
    """TorchScript and torch.fx: cheap enough for every attention, bare and gated."""

    @MODES
    def test_script_equals_eager_and_follows_its_mode(self, training: bool) -> None:
        module = self.make(dtype=torch.float32).train(training)
        scripted = through_a_file(
            lambda file: torch.jit.save(torch.jit.script(module), file), torch.jit.load
        )
        assert_equal_on_all_sizes(scripted, module)
        if training:
            module.eval()
            scripted.eval()
            assert_equal_on_all_sizes(scripted, module)

    @MODES
    def test_script_has_eagers_gradients(self, training: bool) -> None:
        module, x = self.make().train(training), randn(2, 24, 17, 16)
        scripted: Any = torch.jit.script(module)
        expected = gradients(module, x, seeded(module))
        # From its second call on, TorchScript runs a graph optimised for what it has seen; it must
        # not take for granted that the input never asks for a gradient.
        scripted(x)
        for _ in range(3):
            assert_same(gradients(scripted, x, seeded(scripted)), expected)
        if "residual_gate" in module.state_dict():
            nn.init.zeros_(module.get_parameter("residual_gate"))
            assert torch.equal(scripted(x), x)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_trace_equals_eager_on_other_sizes_too(self) -> None:
        module = self.make(dtype=torch.float32)
        traced: Any = torch.jit.trace(module, randn(2, 24, 7, 5, dtype=torch.float32))
        assert_equal_on_all_sizes(traced, module)
        module, x = self.make(), randn(3, 24, 6, 8)
        traced = torch.jit.trace(module, randn(2, 24, 7, 5))
        assert_same(gradients(traced, x, traced), gradients(module, x, module))

    @MODES
    def test_symbolic_trace_equals_eager(self, training: bool) -> None:
        module = self.make(dtype=torch.float32).train(training)
        traced = torch.fx.symbolic_trace(module)
        assert_equal_on_all_sizes(traced, module)
        module, x = self.make().train(training), randn(2, 24, 7, 5)
        traced = torch.fx.symbolic_trace(module)
        expected = gradients(module, x, seeded(module))
        assert_same(gradients(traced, x, seeded(traced)), expected)

    @MODES
    @pytest.mark.parametrize("create_extractor", EXTRACTORS, ids=["timm", "torchvision"])
    def test_feature_extractors_trace_through_it(
        self, create_extractor: Any, training: bool
    ) -> None:
        layers = [nn.Conv2d(3, 24, 1), nn.BatchNorm2d(24), self.make(dtype=torch.float32)]
        network = nn.Sequential(*layers, nn.Conv2d(24, 8, 1)).train(training)
        extractor = create_extractor(network, ["2", "3"]).train(training)
        # Other dtypes than the one that it was traced in, too.
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            network.to(dtype)
            extractor.to(dtype)
            for size in [(9, 9), (4, 17)]:
                x = randn(2, 3, *size, dtype=dtype)
                torch.manual_seed(0)
                found = extractor(x)
                attended = seeded(network[:3])(x)
                assert found["2"].dtype == dtype
                torch.testing.assert_close(found["2"], attended)
                torch.testing.assert_close(found["3"], network[3](attended))


class ExportContract(Subject):
    """torch.export, which takes seconds."""

    @pytest.fixture(autouse=True)
    def fresh_compiler(self) -> Iterator[None]:
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize("strict", mostly_slow([True, False]), ids=["strict", "non_strict"])
    def test_export_with_dynamic_sizes_equals_eager(self, strict: bool) -> None:
        module = self.make(dtype=torch.float32)
        # Self-attention keeps to the side of its greatest size that it was traced on. The other
        # bounds are for torch 2.6, whose unbounded sizes collide with its largest integer.
        largest = 14 if self.name == "msa" else 1 << 20
        sizes = {0: ("b", 1 << 20), 2: ("h", largest), 3: ("w", largest)}
        dims = {axis: torch.export.Dim(name, max=size) for axis, (name, size) in sizes.items()}
        x = randn(2, 24, 7, 5, dtype=torch.float32)
        program = torch.export.export(module, (x,), dynamic_shapes={"x": dims}, strict=strict)
        program = through_a_file(lambda file: torch.export.save(program, file), torch.export.load)
        assert_equal_on_all_sizes(program.module(), module)


class CompileContract(Subject):
    """torch.compile, which takes even longer."""

    exact_under_autocast: ClassVar[bool] = False
    """Whether autocast changes nothing, to the bit."""

    @pytest.fixture(autouse=True)
    def fresh_compiler(self) -> Iterator[None]:
        yield
        torch.compiler.reset()

    @pytest.mark.parametrize(
        ("training", "autocast"),
        mostly_slow([(False, False), (True, False), (True, True)]),
        ids=["eval", "training", "training_autocast"],
    )
    def test_compile_traces_one_graph_with_eagers_gradients(
        self, training: bool, autocast: bool
    ) -> None:
        module = self.make(dtype=torch.float32).train(training)
        compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
        tolerance = 1e-5 if self.exact_under_autocast or not autocast else 0.05
        x = randn(2, 24, 7, 5, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            actual = gradients(module, x, seeded(compiled))
            expected = gradients(module, x, seeded(module))
        assert_same(actual, expected, tolerance)

    @pytest.mark.slow
    def test_compile_serves_all_sizes_after_two(self) -> None:
        module = self.make(dtype=torch.float32)
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        compiled(randn(2, 24, 7, 5, dtype=torch.float32))
        compiled(randn(3, 24, 8, 6, dtype=torch.float32))
        with torch.compiler.set_stance("fail_on_recompile"):
            for size in [(5, 24, 2, 9), (7, 24, 11, 4)]:
                x = randn(*size, dtype=torch.float32)
                torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
        # Self-attention pools maps of this size, and is compiled again.
        x = randn(2, 24, 17, 16, dtype=torch.float32)
        torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-5)
