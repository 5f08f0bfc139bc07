"""What every backend must do: a base class of tests, with one thin subclass per backend.

Each case goes through the public modules, is compared with `ops/reference.py` in float64, and fails
unless the backend that is tested computed both passes.
"""

import copy
import math
from typing import Any

import pytest
import torch
from backend_harness import BackendHarness, Layer, cotangent_for, exact_results
from emax_testing import VARIANTS, force
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from emax_timm.attention import EMA, EMAX, set_grouping
from emax_timm.benchmark.layers import SHAPES, saved_bytes
from emax_timm.ops import dispatch, reference

FORMATS = pytest.mark.parametrize(
    "layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"]
)
# The namespaces of the backends' operators.
LIBRARIES = ("emax_timm", "emax_triton")
# Channels, factor and image: one pixel, one row or column, channels that 32 does not divide, groups
# and rows that fill vectors of 8 or 16 numbers, and those that do not.
SIZES = [
    (1, 32, (1, 1)),
    (40, 32, (1, 1)),
    (40, 32, (1, 7)),
    (36, 12, (5, 1)),
    (3, 32, (5, 4)),
    (24, 32, (2, 2)),
    (100, 32, (3, 17)),
    (64, 32, (8, 8)),
    (96, 32, (9, 14)),
    (132, 32, (7, 5)),
    (24, 8, (2, 36)),
    (10, 2, (4, 50)),
    (12, 1, (17, 9)),
]


OPERATORS = [f"{library}.{name}" for library in LIBRARIES for name in ("forward", "backward")]


class BackendTester(BackendHarness):
    """The tests; a subclass says which backend, and how precise it is."""

    # Exactness -----------------------------------------------------------------------------------

    @pytest.mark.parametrize(("channels", "factor", "size"), SIZES)
    @pytest.mark.parametrize("kind", [EMAX, EMA])
    def test_sizes(
        self, kind: type[Layer], channels: int, factor: int, size: tuple[int, int], dtype: Any
    ) -> None:
        module = self.layer(kind, channels, factor=factor)
        if isinstance(module, EMAX):
            force(module, module.candidates[len(module.candidates) // 2])
        self.check(module, self.features(2, channels, *size, dtype=dtype))

    @FORMATS
    @pytest.mark.parametrize("cotangent", ["same", "other", "expanded"])
    def test_layouts(self, layout: torch.memory_format, cotangent: str, dtype: Any) -> None:
        """The output and the gradient of x are laid out like x, however the cotangent is."""
        module = self.layer(EMAX, 40)
        force(module, 4)
        x = self.features(3, 40, 6, 9, dtype=dtype).to(memory_format=layout)
        grad = {
            "same": cotangent_for(x).to(memory_format=layout),
            "other": cotangent_for(x).mT.contiguous().mT,
            "expanded": x.new_tensor(0.7).expand(x.shape),
        }[cotangent]
        results = self.check(module, x, grad)
        assert results["out"].stride() == x.stride()
        assert results["grad x"].stride() == x.stride()

    @pytest.mark.parametrize(
        "view", ["pixels", "channels", "transposed", "samples", "batch", "map"]
    )
    def test_views(self, view: str, dtype: Any) -> None:
        module = self.layer(EMAX, 24)
        force(module, 4)
        x = {
            "pixels": lambda: self.features(2, 24, 11, 10, dtype=dtype)[:, :, 1::2, ::2],
            "channels": lambda: self.features(2, 48, 5, 5, dtype=dtype)[:, ::2],
            "transposed": lambda: self.features(2, 24, 7, 5, dtype=dtype).mT,
            "samples": lambda: self.features(6, 24, 5, 4, dtype=dtype)[1::2],
            "batch": lambda: self.features(1, 24, 5, 4, dtype=dtype).expand(3, -1, -1, -1),
            "map": lambda: self.features(2, 24, 1, 1, dtype=dtype).expand(-1, -1, 5, 4),
        }[view]()
        self.check(module, x, cancelling=view == "map")

    @FORMATS
    @pytest.mark.parametrize("kind", [EMAX, EMA])
    @pytest.mark.parametrize("batch_vote", [False, True])
    def test_empty_batch(
        self, kind: type[Layer], batch_vote: bool, layout: torch.memory_format, dtype: Any
    ) -> None:
        module = self.layer(kind, 24, **({"batch_vote": batch_vote} if kind is EMAX else {}))
        x = self.features(0, 24, 5, 4, dtype=dtype).to(memory_format=layout)
        results = self.check(module.train(), x)
        assert all((value == 0).all() for value in results.values())

    @pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 12])
    @pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])
    def test_every_group_count(self, count: int, training: bool, dtype: Any) -> None:
        module = self.layer(EMAX, 36, factor=12).train(training)
        force(module, count, margin=20.0 if training else 3.0)
        self.check(module, self.features(2, 36, 6, 7, dtype=dtype))

    @pytest.mark.parametrize("warmup", [0.0, 0.1, 0.6, 1.0])
    @pytest.mark.parametrize("temperature", [0.5, 1.7])
    @pytest.mark.parametrize("counts", [None, [1, 2], [2]], ids=str)
    def test_schedule(
        self, warmup: float, temperature: float, counts: list[int] | None, dtype: Any
    ) -> None:
        module = self.layer(EMAX, 40, group_counts=counts)
        force(module, 2)
        set_grouping(module, warmup=warmup, temperature=temperature)
        self.check(module, self.features(3, 40, 4, 5, dtype=dtype))

    @pytest.mark.parametrize("variant", VARIANTS)
    @pytest.mark.parametrize("warmup", [0.3, 1.0])
    def test_parts_switched_off(self, variant: str, warmup: float, dtype: Any) -> None:
        module = self.layer(EMAX, 24, **VARIANTS[variant])
        force(module, module.candidates[0])
        set_grouping(module, warmup=warmup)
        self.check(module, self.features(3, 24, 5, 6, dtype=dtype))

    @pytest.mark.parametrize("absent", ["residual_gate", "warmup", "controller"])
    def test_tensors_that_no_module_lacks(self, absent: str) -> None:
        """`EMAXWeights` allows more than the modules make use of."""
        module = self.layer(EMAX, 24, group_counts=[2] if absent == "controller" else None)
        force(module, 2)
        weights = module.weights()
        if absent != "controller":
            weights = weights._replace(**{absent: None})
        double = copy.deepcopy(module).double().weights()
        if absent != "controller":
            double = double._replace(**{absent: None})
        x = self.features(2, 24, 5, 6)
        out = dispatch.emax(x.requires_grad_(), weights, False)
        exact, _ = reference.emax(x.detach().double(), reference.parts_of(double))
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-5)
        out.sum().backward()
        assert self.calls[f"{self.name}.backward"] == 1

    @pytest.mark.parametrize("temperature", [0.5, 1.0])
    def test_training_noise(self, temperature: float, dtype: Any) -> None:
        """Samples of a batch that choose each for itself, by the noise."""
        module = self.layer(EMAX, 40).train()
        force(module, 2, margin=0.0)
        set_grouping(module, warmup=0.8, temperature=temperature)
        self.check(module, self.features(9, 40, 5, 4, dtype=dtype), seed=3)

    @pytest.mark.parametrize(
        "choices", [[0, 3, 3], [2, 1, 2, 1, 0], [3, 0, 1], [1]], ids=lambda choices: str(choices)
    )
    @pytest.mark.parametrize("batch_vote", [False, True], ids=["own_choice", "batch_vote"])
    @pytest.mark.parametrize("warmup", [0.4, 1.0])
    def test_batches_of_different_choices(
        self, choices: list[int], batch_vote: bool, warmup: float, dtype: Any
    ) -> None:
        """The batch's vote: its most frequent choice, of equally frequent ones the smallest."""
        module = self.layer(EMAX, 40, batch_vote=batch_vote)
        set_grouping(module, warmup=warmup)
        x = self.features(len(choices), 40, 5, 4, dtype=dtype)
        with torch.no_grad():
            module.group_controller.weight[:, :4] = torch.eye(4) * 3
        for sample, choice in enumerate(choices):
            x[sample, choice] += 2
        weights = copy.deepcopy(module).double().weights()
        maps = reference.emax(x.double(), reference.parts_of(weights))[1]
        assert maps.group_count.tolist() == [module.candidates[choice] for choice in choices]
        self.check(module, x)

    @pytest.mark.parametrize("features", ["relu", "large_mean", "faint", "constant", "zero"])
    @pytest.mark.parametrize("kind", [EMAX, EMA])
    def test_unusual_features(self, kind: type[Layer], features: str, dtype: Any) -> None:
        """Among them those in which the norm's eps counts, and those whose variance cancels."""
        module, x = self.layer(kind, 40), self.features(2, 40, 7, 9, dtype=dtype)
        if kind is EMAX:
            force(module, 4)
        x = {
            "relu": lambda: x.relu(),
            "large_mean": lambda: x + 30,
            "faint": lambda: 0.003 * x,
            "constant": lambda: x[..., :1, :1].expand_as(x).contiguous(),
            "zero": lambda: 0 * x,
        }[features]()
        if features == "large_mean":  # saturates no gate
            with torch.no_grad():
                for parameter in module.parameters():
                    if parameter.ndim > 1:
                        parameter.div_(30)
        self.check(module, x, cancelling=features in ("large_mean", "constant"))

    def test_hidden_units_that_are_off(self) -> None:
        """A relu at exactly 0 passes no gradient."""
        module = self.layer(EMAX, 24)
        with torch.no_grad():
            for gate in (module.channel_gate, module.global_attn):
                gate[1].weight.zero_()
                gate[1].bias.zero_()
        results = self.check(module, self.features(2, 24, 5, 4))
        assert results["grad global_attn.1.weight"].abs().max() == 0

    @pytest.mark.parametrize("schedule", ["kept", "converted"])
    def test_half_precision_parameters(self, schedule: str, dtype: Any) -> None:
        """As of `model.half()`, which converts the schedule of the grouping as well."""
        module = self.layer(EMAX, 24).to(dtype)
        if schedule == "kept":
            module.warmup, module.temperature = module.warmup.float(), module.temperature.float()
        force(module, 4)
        x = self.features(2, 24, 5, 4, dtype=dtype)
        actual, exact = self.compute(module, x), exact_results(module, x)
        for name, value in exact.items():
            assert actual[name].dtype == dtype
            error = (actual[name].double() - value).abs().max()
            bound = max(self.dtypes[dtype].parameters, torch.finfo(dtype).eps)
            assert error <= bound * value.abs().max().clamp(min=1), name

    # Samples, calls and memory -------------------------------------------------------------------

    @FORMATS
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("kind", [EMAX, EMA])
    def test_a_sample_that_is_not_finite_leaves_the_others_alone(
        self, kind: type[Layer], value: float, layout: torch.memory_format, dtype: Any
    ) -> None:
        # What a thread computes first must not reach what it computes next, in the same memory.
        module = self.layer(kind, 64, factor=4)
        x = self.features(4, 64, 5, 7, dtype=dtype).to(memory_format=layout)
        expected = self.compute(module, x)
        for spoilt in (0, 2):
            others = [sample for sample in range(4) if sample != spoilt]
            spoilt_x = x.clone()
            spoilt_x[spoilt] = value
            actual = self.compute(module, spoilt_x)
            assert not actual["out"][spoilt].isfinite().all()
            for name in ("out", "grad x"):
                assert torch.equal(actual[name][others], expected[name][others]), name

    def test_samples_do_not_depend_on_their_batch(self) -> None:
        module, x = self.layer(EMAX, 40), self.features(5, 40, 4, 3)
        alone = [self.compute(module, sample) for sample in x.split(1)]
        together = self.compute(
            module, x, torch.cat([cotangent_for(sample) for sample in x.split(1)])
        )
        for name in ("out", "grad x"):
            expected = torch.cat([results[name] for results in alone])
            torch.testing.assert_close(together[name], expected, rtol=0, atol=1e-5)

    @FORMATS
    @pytest.mark.parametrize("kind", [EMAX, EMA])
    def test_a_repeated_call_gives_the_same_bits(
        self, kind: type[Layer], layout: torch.memory_format, dtype: Any
    ) -> None:
        module = self.layer(kind, 40).train()
        x = self.features(3, 40, 6, 5, dtype=dtype).to(memory_format=layout)
        kept = x.clone()
        first = {name: value.clone() for name, value in self.compute(module, x).items()}
        again = self.compute(module, x)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert torch.equal(x, kept), "the input was written to"

    @FORMATS
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_the_output_is_the_same(
        self, mode: Any, layout: torch.memory_format, dtype: Any
    ) -> None:
        for kind in (EMAX, EMA):
            module = self.layer(kind, 40)
            x = self.features(3, 40, 6, 5, dtype=dtype).to(memory_format=layout)
            expected = self.compute(module, x)["out"]
            self.calls.clear()
            with mode():
                assert torch.equal(module(x), expected)
            assert self.calls == {f"{self.name}.forward": 1}

    def test_autocast_changes_nothing(self, dtype: Any) -> None:
        module, x = self.layer(EMAX, 40), self.features(2, 40, 5, 4, dtype=dtype)
        expected = {name: value.clone() for name, value in self.compute(module, x).items()}
        with torch.autocast(self.device, torch.bfloat16):
            actual = self.compute(module, x)
        assert all(torch.equal(actual[name], value) for name, value in expected.items())

    @FORMATS
    def test_the_output_may_be_added_to_in_place(
        self, layout: torch.memory_format, dtype: Any
    ) -> None:
        module = self.layer(EMAX, 24)
        x = self.features(2, 24, 5, 4, dtype=dtype).to(memory_format=layout).requires_grad_()
        gradients = []
        for in_place in (False, True):
            out = module(x)
            out = out.add_(x) if in_place else out + x
            gradients.append(torch.autograd.grad(out.square().sum(), x)[0])
        assert torch.equal(*gradients)
        assert self.calls == {f"{self.name}.forward": 2, f"{self.name}.backward": 2}

    @pytest.mark.parametrize("chosen", ["parameters", "x", "some"])
    @pytest.mark.parametrize("kind", [EMAX, EMA])
    def test_gradients_where_not_everything_asks_for_one(
        self, kind: type[Layer], chosen: str
    ) -> None:
        module, x = self.layer(kind, 24), self.features(2, 24, 5, 4).requires_grad_()
        everything: dict[str, Any] = dict(module.named_parameters(), x=x)
        gradients = torch.autograd.grad(module(x).sin().sum(), [*everything.values()])
        expected = dict(zip(everything, gradients, strict=True))
        names = [*everything] if chosen == "some" else ["x"]
        if chosen == "parameters":
            names = [name for name in everything if name != "x"]
        if chosen == "some":
            names = names[2::5]
        for name, tensor in everything.items():
            tensor.requires_grad_(name in names)
        actual = torch.autograd.grad(module(x).sin().sum(), [everything[name] for name in names])
        for name, gradient in zip(names, actual, strict=True):
            assert torch.equal(gradient, expected[name]), name
        assert self.calls[f"{self.name}.backward"] == 2

    @pytest.mark.parametrize("kind", [EMAX, EMA])
    def test_little_more_than_the_input_is_kept(self, kind: type[Layer]) -> None:
        """At most 1.2 of x over the benchmark's shapes, as `test_autograd.py` says it can fail."""
        ratios = []
        for _, channels, height, width in SHAPES:
            x = self.features(2, channels, height, width, dtype=torch.float32)
            module = kind(channels, device=self.device).train()
            ratios.append(saved_bytes(module, x) / (x.numel() * x.element_size()))
        assert self.calls == {f"{self.name}.forward": len(SHAPES)}
        assert min(ratios) >= 1, "x itself is kept"
        assert math.prod(ratios) ** (1 / len(ratios)) <= 1.2
        assert max(ratios) <= 1.3

    # torch.compile -------------------------------------------------------------------------------

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "training", "layout"),
        [
            (EMAX, True, torch.contiguous_format),
            (EMA, False, torch.channels_last),
            (EMAX, False, torch.channels_last),
        ],
        ids=["EMAX", "EMA", "EMAX-channels_last"],
    )
    def test_compile(self, kind: type[Layer], training: bool, layout: torch.memory_format) -> None:
        """One graph, with this backend in both passes, and the results of the eager layer."""
        operators: set[str] = set()

        def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            operators.update(str(node.target) for node in graph.graph.nodes)
            return make_boxed_func(graph.forward)

        backend = aot_autograd(fw_compiler=look, bw_compiler=look)
        self.compare_compiled(kind, training, layout, self.dtype, backend)
        for operator in OPERATORS:
            found = any(operator in name for name in operators)
            assert found == (operator in self.operators), operators

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("kind", "features"), [(EMAX, torch.float32), (EMA, torch.bfloat16)], ids=["EMAX", "EMA"]
    )
    def test_compile_with_inductor(self, kind: type[Layer], features: torch.dtype) -> None:
        if features not in self.dtypes:
            pytest.skip(f"{self.name} does not serve {features}")
        self.compare_compiled(kind, False, torch.contiguous_format, features, "inductor")

    def compare_compiled(
        self, kind: type[Layer], training: bool, layout: torch.memory_format, dtype: Any, to: Any
    ) -> None:
        module = self.layer(kind, 24).train(training)
        x = self.features(2, 24, 6, 4, dtype=dtype).to(memory_format=layout)
        if isinstance(module, EMAX):
            force(module, 4, margin=20.0)
        eager = {name: value.clone() for name, value in self.compute(module, x).items()}
        torch.compiler.reset()
        compiled = torch.compile(module, fullgraph=True, backend=to)
        x.requires_grad_()
        module.zero_grad()
        torch.manual_seed(0)
        out = compiled(x)
        out.backward(cotangent_for(out))
        torch.compiler.reset()
        results = {"out": out, "grad x": x.grad}
        results |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
        for name, value in eager.items():
            limit = max(2 * torch.finfo(value.dtype).eps, self.dtypes[dtype].parameters)
            error = (results[name].double() - value.double()).abs().max()
            assert error <= limit * value.double().abs().max().clamp(min=1), name
        assert out.stride() == x.stride()
