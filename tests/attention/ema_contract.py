"""What EMA and EMAX promise beyond the contract of every attention: a base class, as in
`attention_contract.py`.
"""

import re
from itertools import product
from typing import Any

import pytest
import torch
from attention_contract import HALVES, LAYOUTS, MODES, AttentionContract, seeded
from emax_testing import assert_same, force, gradients, make_emax, randn
from graph_contract import GraphContract
from plain_forms import by_formulas
from torch import Tensor, nn

from emax_timm.attention import ATTENTIONS, EMAX, set_grouping
from emax_timm.ops import reference
from emax_timm.ops.dispatch import draw_noise


def undecided(channels: int, **knobs: Any) -> EMAX:
    """A layer whose samples choose differently."""
    module = make_emax(channels, **knobs)
    force(module, module.candidates[0], margin=0.0)
    with torch.no_grad():
        assert module.group_controller is not None
        module.group_controller.weight.mul_(20)
    return module


def maps_of(module: Any, x: Tensor) -> tuple[Tensor, ...]:
    """EMAX tells five maps, EMA one."""
    torch.manual_seed(0)
    maps = module.attention(x)
    return maps if isinstance(maps, tuple) else (maps,)


def assert_identical(actual: Any, expected: Any) -> None:
    """The same values and dtypes."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


class EMAContract(AttentionContract, GraphContract):
    """Values are computed in float32 or better, whatever the input and autocast; layout is kept."""

    def layer(self, dtype: torch.dtype = torch.float64) -> Any:
        """In eval mode, with random parameters."""
        return self.make(24, dtype)

    # Precision -----------------------------------------------------------------------------------

    @HALVES
    @MODES
    def test_is_the_same_under_autocast(self, half: torch.dtype, training: bool) -> None:
        module, x = self.layer(torch.float32).train(training), randn(3, 24, 7, 5).float()

        def under_autocast(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=half):
                return module(x)

        expected = gradients(module, x, seeded(module))
        assert_identical(gradients(module, x, seeded(under_autocast)), expected)
        of_half = seeded(module)(x.to(half))
        assert_identical(seeded(under_autocast)(x.to(half)), of_half)
        with torch.autocast("cpu", dtype=half):
            maps = maps_of(module, x)
        assert_identical(maps, maps_of(module, x))
        assert {value.dtype for value in maps} <= {torch.float32, torch.int64}

    @HALVES
    def test_computes_in_float32_for_a_half_input(self, half: torch.dtype) -> None:
        module, x = self.layer(torch.float32), randn(3, 24, 7, 5).to(half)
        assert_identical(maps_of(module, x), maps_of(module, x.float()))
        assert_identical(module(x), module(x.float()).to(half))

    @HALVES
    def test_in_half_precision_is_the_float32_layer_with_rounded_weights(
        self, half: torch.dtype
    ) -> None:
        module, x = self.layer(torch.float32).to(half), randn(3, 24, 7, 5).to(half)
        results, maps = gradients(module, x, module), maps_of(module, x)
        assert {value.dtype for value in results.values()} == {half}
        module.float()
        assert_identical(maps, maps_of(module, x.float()))
        assert_identical(results["out"], module(x))
        for name, value in gradients(module, x.float(), module).items():
            bound = 0.02 * value.abs().max().item()
            torch.testing.assert_close(results[name].float(), value, rtol=0.02, atol=bound)

    def test_survives_half_inputs_whose_squares_overflow(self) -> None:
        module = self.layer(torch.float32)
        with torch.no_grad():
            module.conv3x3.weight.div_(1000)
        results = gradients(module, (3000 * randn(2, 24, 9, 9)).half(), module)
        assert all(value.isfinite().all() for value in results.values())

    def test_computes_in_float64_for_a_float64_input(self) -> None:
        module, x = self.layer(torch.float32), randn(2, 24, 7, 5)
        out, maps = module(x), maps_of(module, x)
        assert out.dtype == maps[0].dtype == torch.float64
        torch.testing.assert_close(out, module.double()(x), rtol=0, atol=1e-12)

    # Layout and shape ----------------------------------------------------------------------------

    def test_keeps_the_strides_of_its_input(self) -> None:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        contexts = torch.enable_grad(), torch.no_grad(), torch.autocast("cpu")
        for channels in (40, 32, self.widths[1]):  # not 1, which has one stride for both
            module = self.make(channels, torch.float32)
            for dtype, layout, context in product(dtypes, LAYOUTS, contexts):
                x = randn(2, channels, 5, 7, dtype=dtype).to(memory_format=layout)
                with context:
                    out = module(x)
                assert out.is_contiguous(memory_format=layout)
                assert out.stride() == x.stride()

    def test_equals_its_plain_form_on_any_strides_of_input_and_weights(self) -> None:
        module = self.layer()
        x = randn(4, 48, 12, 5)[::2, ::2, 1::2].transpose(2, 3)
        expected = gradients(module, x, by_formulas(module))
        assert_same(gradients(module, x, module), expected)
        module.to(memory_format=torch.channels_last)
        assert_same(gradients(module, x, module), expected)

    def test_refuses_an_input_of_another_shape(self) -> None:
        module = self.layer()
        shapes = [(2, 48, 4, 4), (2, 12, 4, 4), (2, 25, 4, 4), (24, 4, 4), (24,), (2, 24, 4, 4, 4)]
        for call, shape in product((module, module.attention), shapes):
            message = f"x must be [b, 24, h, w], not {list(shape)}"
            with pytest.raises(ValueError, match=re.escape(message)):
                call(torch.zeros(shape))

    # Gradients and parts -------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [(1, 1), (3, 2)], ids=str)
    def test_gradients_are_the_numeric_ones(self, size: tuple[int, int]) -> None:
        knobs: dict[str, Any] = {"reduction": 2} if self.name == "emax" else {}
        module = self.make(8, factor=4, **knobs)
        if "group_controller.weight" in module.state_dict():
            # Only where no choice is made: the straight-through gradient is not the numeric one.
            set_grouping(module, warmup=0.0)
        names = [name for name, _ in module.named_parameters()]

        def call(x: Tensor, *values: Tensor) -> Tensor:
            return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))

        inputs = [randn(2, 8, *size), *(value.detach() for value in module.parameters())]
        inputs = [value.requires_grad_() for value in inputs]
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)

    @MODES
    def test_computes_what_its_children_would(self, training: bool) -> None:
        module, x = self.layer().train(training), randn(3, 24, 7, 5)

        def by_children(x: Tensor) -> Tensor:
            parts = module.parts()
            return reference.emax(x, parts, draw_noise(x, parts.config.candidates, training))[0]

        expected = gradients(module, x, seeded(by_children))
        assert_same(gradients(module, x, seeded(module)), expected)

    def test_maps_rebuild_the_output(self) -> None:
        module, x = self.layer(), randn(2, 24, 7, 5)
        spatial, *gates = maps_of(module, x)
        assert spatial.shape == (2, module.groups, 7, 5)
        assert ((spatial > 0) & (spatial < 1)).all()
        expected = x * spatial.repeat_interleave(24 // module.groups, dim=1)
        if gates:
            channel, global_ = (gate[:, :, None, None] for gate in gates[:2])
            gamma = 0 if module.gamma is None else module.gamma
            attended = (expected + gamma * x * channel) * global_
            expected = x + module.residual_gate[:, None, None] * (attended - x)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12)

    def test_starts_with_torchs_defaults(self) -> None:
        module: Any = ATTENTIONS[self.name](2048, **self.knobs)
        assert (module.gn.weight == 1).all()
        assert (module.gn.bias == 0).all()
        assert module.gn.eps == 1e-5
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Conv2d):
                # Uniform in +-1 / sqrt(fan-in).
                bound = layer.weight[0].numel() ** -0.5
                assert 0.98 * bound < layer.weight.max() <= bound, name
                assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)

    def test_script_gives_the_maps(self) -> None:
        module, x = self.layer(), randn(2, 24, 7, 5)
        maps = maps_of(torch.jit.script(module), x)
        torch.testing.assert_close(maps, maps_of(module, x), rtol=0, atol=1e-12)

    @HALVES
    def test_script_stays_close_under_autocast(self, half: torch.dtype) -> None:
        # TorchScript cannot leave autocast: its products are half precision, unlike EMAX's.
        module, x = self.layer(torch.float32), randn(2, 24, 7, 5, dtype=torch.float32)
        scripted: Any = torch.jit.script(module)
        with torch.autocast("cpu", dtype=half):
            outputs = [scripted(x), scripted(x.to(half))]
        assert [out.dtype for out in outputs] == [torch.float32, half]
        for out in outputs:
            torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)
