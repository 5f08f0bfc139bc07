"""What every attention of the factory promises: a base class, with a subclass per attention.

Classes whose name does not begin with "Test" are not collected; `test_contract.py` has those that
are.
"""

import copy
import io
import math
import re
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
from emax_testing import assert_same, gradients, randn, randomise
from plain_forms import plain
from timm.models._manipulate import reinit_non_persistent_buffers
from torch import Tensor, nn

from emax_timm.attention import ATTENTIONS, create_attention, set_grouping

LAYOUTS = (torch.contiguous_format, torch.channels_last)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
MODES = pytest.mark.parametrize("training", [False, True], ids=["eval", "training"])


def seeded(call: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The call with the same random numbers every time."""

    def run(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return call(x)

    return run


def through_a_file(save: Callable[[Any], None], load: Callable[[Any], Any]) -> Any:
    file = io.BytesIO()
    save(file)
    file.seek(0)
    return load(file)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


class Subject:
    """An attention, and how it is made."""

    name: ClassVar[str]
    knobs: ClassVar[dict[str, Any]] = {}
    gate_init: ClassVar[float | None] = None
    widths: ClassVar[tuple[int, ...]] = (1, 3, 40, 64, 200)
    """Numbers of channels."""

    def create(self, channels: Any = 24, **options: Any) -> nn.Module:
        """As constructed, in training mode and float32."""
        options = {"gate_init": self.gate_init, **self.knobs, **options}
        return create_attention(self.name, channels, **options)

    def make(
        self, channels: int = 24, dtype: torch.dtype = torch.float64, **options: Any
    ) -> nn.Module:
        """In eval mode, with random parameters and statistics, but with the gate it is given."""
        module = self.create(channels, dtype=dtype, **options).eval()
        randomise(module)
        gate_init = options.get("gate_init", self.gate_init)
        with torch.no_grad():
            if gate_init is not None:
                module.get_parameter("residual_gate").fill_(gate_init)
            for key, buffer in module.named_buffers():
                if key.endswith("running_mean"):
                    buffer.copy_(0.1 * randn(*buffer.shape, seed=5))
                elif key.endswith("running_var"):
                    buffer.copy_(1 + 0.5 * randn(*buffer.shape, seed=6).tanh())
        return module


class AttentionContract(Subject):
    """What an attention computes, in which dtypes and layouts, and how it is built and stored."""

    gates: ClassVar[tuple[float | None, ...]] = (None,)
    """Initial gates with which it must learn."""
    sizes: ClassVar[tuple[str, ...]] = ()
    """Arguments of its class that must be positive integers; timm's classes do not check any."""
    independent: ClassVar[bool] = True
    """Whether a sample's output in eval mode does not depend on its batch."""

    # What it computes ----------------------------------------------------------------------------

    @MODES
    def test_equals_its_plain_form(self, training: bool) -> None:
        for channels, size in product(self.widths, [(1, 1), (2, 1), (7, 7), (17, 9), (30, 5)]):
            module = self.make(channels).train(training)
            x = randn(3, channels, *size)
            expected = gradients(module, x, seeded(plain(self.name, module)))
            assert_same(gradients(module, x, seeded(module)), expected, 1e-9)

    @MODES
    def test_gives_every_parameter_a_finite_gradient_as_constructed(self, training: bool) -> None:
        for gate_init in self.gates:
            module = self.create(gate_init=gate_init).train(training)
            results = gradients(module, randn(3, 24, 5, 4, dtype=torch.float32), module)
            assert all(value.isfinite().all() for value in results.values())

    def test_treats_each_sample_by_itself_in_eval_mode(self) -> None:
        module, x = self.make(), randn(4, 24, 5, 3)
        alone = torch.cat([module(sample) for sample in x.split(1)])
        if self.independent:
            torch.testing.assert_close(module(x), alone, rtol=0, atol=1e-12)

    def test_neither_changes_its_input_nor_touches_the_random_generator_in_eval_mode(self) -> None:
        module, x = self.make(), randn(4, 24, 5, 3)
        before, state = x.clone(), torch.get_rng_state()
        with torch.inference_mode():
            out = module(x)
        assert torch.equal(x, before)
        assert torch.equal(torch.get_rng_state(), state)
        torch.manual_seed(2)
        assert torch.equal(module(x), out)

    # Dtypes and layouts --------------------------------------------------------------------------

    @MODES
    def test_keeps_shape_dtype_and_layout(self, training: bool) -> None:
        for channels, dtype in product(self.widths, DTYPES):
            module = self.create(channels, dtype=dtype).train(training)
            for size, layout in product([(1, 1), (7, 7), (17, 9)], LAYOUTS):
                x = randn(2, channels, *size, dtype=dtype).to(memory_format=layout)
                for context in (torch.enable_grad(), torch.no_grad()):
                    with context:
                        out = module(x)
                    assert out.shape == x.shape
                    assert out.dtype == dtype
                    assert out.isfinite().all()
                    assert out.is_contiguous(memory_format=layout), (layout, size, dtype)

    @HALVES
    def test_keeps_its_inputs_dtype_and_layout_under_autocast(self, half: torch.dtype) -> None:
        module = self.make(dtype=torch.float32)
        x = randn(2, 24, 17, 9, dtype=torch.float32)
        expected = module(x)
        for layout in LAYOUTS:
            x = x.to(memory_format=layout)
            with torch.autocast("cpu", dtype=half):
                outputs = [module(x), module(x.to(half))]
            assert [out.dtype for out in outputs] == [torch.float32, half]
            for out in outputs:
                assert out.is_contiguous(memory_format=layout)
                torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)

    # Arguments -----------------------------------------------------------------------------------

    def test_refuses_an_unknown_keyword_and_names_a_missing_one(self) -> None:
        with pytest.raises(TypeError, match="gate_unit"):
            self.create(gate_unit=1)
        with pytest.raises(TypeError, match="channels"):
            create_attention(self.name, **self.knobs)  # type: ignore[call-arg]

    @pytest.mark.parametrize("value", [0, -4, 2.5, "8", None], ids=str)
    def test_refuses_sizes_that_are_no_positive_integers(self, value: Any) -> None:
        with pytest.raises(ValueError, match=f"channels must be a positive integer, not {value!r}"):
            self.create(value)
        for size in self.sizes:
            message = f"{size} must be a positive integer, not {re.escape(repr(value))}"
            with pytest.raises(ValueError, match=message):
                ATTENTIONS[self.name](**{"channels": 8, size: value})
            if size != "channels":
                with pytest.raises(ValueError, match=message):
                    self.create(**{size: value})

    @MODES
    def test_is_built_where_it_is_told(self, training: bool) -> None:
        with torch.device("meta"):
            modules = [self.create()]
        modules += [self.create(device="meta"), self.create().to("meta")]
        for module in modules:
            assert all(tensor.is_meta for tensor in tensors_of(module))
            out = module.train(training)(torch.empty(2, 24, 17, 9, device="meta"))
            assert out.is_meta
            assert out.shape == (2, 24, 17, 9)

    def test_has_parameters_of_the_dtype_it_is_given(self) -> None:
        for dtype in DTYPES:
            assert {value.dtype for value in self.create(dtype=dtype).parameters()} == {dtype}

    # State ---------------------------------------------------------------------------------------

    def test_strict_loading_names_a_missing_key(self) -> None:
        module = self.create()
        for key in module.state_dict():
            state = module.state_dict()
            del state[key]
            with pytest.raises(RuntimeError, match=f'Missing key.*"{re.escape(key)}"'):
                module.load_state_dict(state)

    def test_state_dict_survives_a_file_and_is_complete(self) -> None:
        module, x = self.make(), randn(2, 24, 4, 3)
        set_grouping(module, warmup=0.25, temperature=0.5)
        state = through_a_file(
            lambda file: torch.save(module.state_dict(), file),
            lambda file: torch.load(file, weights_only=True),
        )
        # As timm and transformers load: a model without memory, and what a checkpoint holds.
        other = self.create(device="meta", dtype=torch.float64).eval().to_empty(device="cpu")
        with torch.no_grad():
            for tensor in tensors_of(other):
                tensor.fill_(77)
        other.load_state_dict(state)
        assert reinit_non_persistent_buffers(other) == []
        assert not any((tensor == 77).any() for tensor in tensors_of(other))
        assert torch.equal(other(x), module(x))

    def test_deepcopy_is_equal_and_independent(self) -> None:
        module, x = self.make(), randn(2, 24, 4, 3)
        before = module(x)
        twin = copy.deepcopy(module)
        assert torch.equal(twin(x), before)
        with torch.no_grad():
            for tensor in tensors_of(twin):
                tensor.zero_()
        assert torch.equal(module(x), before)

    def test_every_part_is_reset_by_a_method(self) -> None:
        for gate_init in self.gates:
            module = self.create(device="meta", gate_init=gate_init).to_empty(device="cpu")
            with torch.no_grad():
                for tensor in tensors_of(module):
                    tensor.fill_(77)
            for part in module.modules():
                if isinstance(reset := getattr(part, "reset_parameters", None), Callable):
                    reset()
            assert not any((tensor == 77).any() for tensor in tensors_of(module))
            if gate_init is not None:
                assert module.get_parameter("residual_gate").tolist() == [gate_init] * 24
            module, x = module.double().eval(), randn(2, 24, 3, 4)
            assert_same({"out": module(x)}, {"out": plain(self.name, module)(x)}, 1e-9)


class GateContract(AttentionContract):
    """What a residual gate adds, EMAX's own or that of `GatedAttention`."""

    gates: ClassVar[tuple[float | None, ...]] = (0.0, 0.25, 1.0)

    @MODES
    def test_a_closed_gate_is_bitwise_the_identity(self, training: bool) -> None:
        cases = [(self.widths[0], (7, 7)), (24, (17, 9)), (40, (1, 1))]
        for (channels, size), dtype in product(cases, DTYPES):
            module = self.create(channels, gate_init=0, dtype=dtype).train(training)
            inputs = (10 * randn(2, channels, *size)).to(dtype)
            for layout in LAYOUTS:
                x = inputs.to(memory_format=layout)
                assert torch.equal(module(x), x)
            module.float()
            half = dtype if dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
            x = inputs if dtype == half else inputs.float()
            with torch.autocast("cpu", dtype=half):
                assert torch.equal(module(x), x)

    def test_a_closed_gate_learns_at_once_and_the_attention_as_soon_as_it_opens(self) -> None:
        module, x = self.make(64, gate_init=1.0), randn(2, 64, 7, 5)
        gate = module.get_parameter("residual_gate")
        with torch.no_grad():
            for key, parameter in module.named_parameters():
                if key.endswith("1.bias"):
                    parameter.abs_()  # some hidden units are above 0
            attended = module(x)
            gate.zero_()
        results = gradients(module, x, module)
        learning = [key for key, value in results.items() if value.abs().max() > 1e-4]
        assert learning == ["out", "grad input", "grad residual_gate"]
        cotangent = randn(*x.shape, seed=99)
        torch.testing.assert_close(results["grad input"], cotangent, rtol=0, atol=1e-15)
        expected = (cotangent * (attended - x)).sum((0, 2, 3))
        torch.testing.assert_close(results["grad residual_gate"], expected, rtol=0, atol=1e-10)
        with torch.no_grad():
            gate.fill_(0.1)
        for key, value in gradients(module, x, module).items():
            assert value.abs().max() > 1e-6, key

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1"])
    def test_refuses_a_gate_that_is_no_finite_number(self, value: Any) -> None:
        with pytest.raises(ValueError, match=f"gate_init must be a finite number, not {value!r}"):
            self.create(gate_init=value)
