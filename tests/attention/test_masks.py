"""EMAX1d with a mask: every sequence of a batch gives what its tokens give alone."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from emax_testing import VARIANTS, force, randn, randomise
from torch import Tensor

from emax_timm.attention import EMAX1d, set_grouping
from emax_timm.models.capture import capture_attention
from emax_timm.ops import dispatch

LENGTH = 9
# Right-padded, left-padded, full, of one token, in the middle, without tokens, and with gaps.
PLACES = [[0, 1, 2, 3], [5, 6, 7, 8], [*range(LENGTH)], [4], [2, 3, 4], [], [0, 2, 3, 7], [1, 8]]
MASK = torch.tensor([[place in places for place in range(LENGTH)] for places in PLACES])
FILLINGS = pytest.mark.parametrize("filling", [0.0, 1e4, math.nan, math.inf, -math.inf])


def make(channels: int = 24, dtype: torch.dtype = torch.float64, **knobs: Any) -> EMAX1d:
    module = EMAX1d(channels, dtype=dtype, **knobs).eval()
    randomise(module)
    return module


def padded(channels: int = 24, filling: float = 0.0, mask: Tensor = MASK) -> Tensor:
    x = randn(*mask.shape[:1], channels, *mask.shape[1:])
    return torch.where(mask[:, None], x, filling)


def alone(
    module: EMAX1d, x: Tensor, mask: Tensor, cotangent: Tensor, noise: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and gradients from a call per sequence, on its tokens in their order."""
    inputs, grad_x, out = dict(module.named_parameters()), cotangent.clone(), x.clone()
    total = {name: torch.zeros_like(parameter) for name, parameter in inputs.items()}
    for number, tokens in enumerate(mask):
        if not tokens.any():
            continue
        sequence = x[number : number + 1, :, tokens].detach().requires_grad_()
        own = None if noise is None else noise[number : number + 1]
        found = dispatch.emax_plain(sequence, module.weights(), own)
        grad = cotangent[number : number + 1, :, tokens]
        first, *others = torch.autograd.grad(found, [sequence, *inputs.values()], grad)
        out[number, :, tokens], grad_x[number, :, tokens] = found[0].detach(), first[0]
        for name, value in zip(inputs, others, strict=True):
            total[name] += value
    return out, {"x": grad_x, **total}


def together(
    module: EMAX1d, x: Tensor, mask: Tensor, cotangent: Tensor, call: Any = None
) -> tuple[Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = (module if call is None else call)(x, mask)
    out.backward(cotangent)
    grads: dict[str, Any] = {name: p.grad for name, p in module.named_parameters()}
    grads["x"] = x.grad
    return out.detach(), grads


def assert_equals_the_sequences_alone(
    module: EMAX1d, x: Tensor, mask: Tensor, call: Any = None, noise: Tensor | None = None
) -> None:
    cotangent = randn(*x.shape, seed=9)
    expected, expected_grads = alone(module, x, mask, cotangent, noise)
    out, grads = together(module, x, mask, cotangent, call)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10, equal_nan=True)
    padding = ~mask[:, None].expand_as(x)
    assert torch.equal(out[padding].nan_to_num(7), x[padding].nan_to_num(7))
    for name, value in expected_grads.items():
        assert value.isfinite().all()
        error = (grads[name] - value).abs().max().item()
        assert error <= 1e-10 * max(1.0, value.abs().max().item()), f"{name}: {error:.1e}"


@FILLINGS
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_it_gives_what_each_sequence_gives_alone(count: int, filling: float) -> None:
    module = make()
    force(module, count)
    assert_equals_the_sequences_alone(module, padded(filling=filling), MASK)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_does_so_without_each_part(variant: str) -> None:
    module = make(**VARIANTS[variant])
    set_grouping(module, warmup=0.4, temperature=0.7)
    assert_equals_the_sequences_alone(module, padded(filling=math.nan), MASK)


def test_it_does_so_under_training_noise() -> None:
    module, x = make(40).train(), padded(40, math.nan)
    force(module, 2, margin=0.5)
    torch.manual_seed(0)
    noise = dispatch.draw_noise(x, module.candidates, training=True)
    torch.manual_seed(0)
    assert_equals_the_sequences_alone(module, x, MASK, noise=noise)


def test_it_does_so_where_children_are_called() -> None:
    module = make()
    module.conv3x3.register_forward_hook(lambda *_: None)
    assert_equals_the_sequences_alone(module, padded(filling=math.nan), MASK)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 40)], ids=str)
def test_a_mask_of_tokens_everywhere_changes_nothing(shape: tuple[int, int]) -> None:
    module, mask = make(), torch.ones(shape, dtype=torch.bool)
    x = padded(mask=mask)
    torch.testing.assert_close(module(x, mask), module(x), rtol=0, atol=1e-12)


def test_a_batch_without_any_token_is_returned_and_has_gradients_of_zero() -> None:
    for training in (False, True):
        module, x = make().train(training), padded(filling=math.nan) * math.nan
        cotangent = randn(*x.shape, seed=9)
        out, grads = together(module, x, torch.zeros_like(MASK), cotangent)
        assert out.isnan().all()
        assert torch.equal(grads.pop("x"), cotangent)
        assert all((value == 0).all() for value in grads.values())


def test_sequences_of_zero_length_are_returned() -> None:
    module, mask = make(), torch.zeros(2, 0, dtype=torch.bool)
    x = torch.zeros(2, 24, 0, dtype=torch.float64, requires_grad=True)
    for call in (lambda: module(x), lambda: module(x, mask)):
        module.zero_grad(set_to_none=True)
        out = call()
        assert out.shape == x.shape
        out.sum().backward()
        for parameter in module.parameters():
            assert parameter.grad is not None
            assert (parameter.grad == 0).all()


def test_a_sequence_without_tokens_has_no_vote() -> None:
    module, x = make(40, batch_vote=True), randn(3, 40, 4)
    force(module, 2, margin=0.0)
    with torch.no_grad():
        assert module.group_controller is not None
        module.group_controller.weight[:, :4] = torch.eye(4) * 3
    x[0, 1] += 9  # for the second candidate; zeros would vote for the first
    mask = torch.tensor([[True] * 4, [False] * 4, [False] * 4])
    torch.testing.assert_close(module(x, mask)[:1], module(x[:1]), rtol=0, atol=1e-12)


def test_second_gradients_are_finite_and_those_of_each_sequence_alone() -> None:
    module = make(8, factor=4, reduction=2)
    x, cotangent = padded(8, math.nan), randn(len(MASK), 8, LENGTH, seed=9)

    def penalties(x: Tensor, *mask: Tensor) -> Tensor:
        gradient = torch.autograd.grad(module(x, *mask), x, cotangent_of(x), create_graph=True)[0]
        return gradient.square().sum()

    def cotangent_of(x: Tensor) -> Tensor:
        return cotangent if x.shape[2] == LENGTH and len(x) > 1 else own

    x.requires_grad_()
    (actual,) = torch.autograd.grad(penalties(x, MASK), x)
    for number, tokens in enumerate(MASK):
        assert actual[number, :, ~tokens].eq(0).all()
        if tokens.any():
            own = cotangent[number : number + 1, :, tokens]
            sequence = x[number : number + 1, :, tokens].detach().requires_grad_()
            (expected,) = torch.autograd.grad(penalties(sequence), sequence)
            found = actual[number : number + 1, :, tokens]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_the_maps_are_those_of_each_sequence_alone_and_zero_elsewhere() -> None:
    module, x = make(), padded(filling=math.nan)
    force(module, 4)
    for _ in range(2):
        maps = module.attention(x, MASK)
        assert maps.spatial[~MASK[:, None].expand_as(maps.spatial)].eq(0).all()
        for number, tokens in enumerate(MASK):
            if tokens.any():
                own = module.attention(x[number : number + 1, :, tokens])
                kept = [value[number : number + 1] for value in maps]
                kept[0] = kept[0][:, :, tokens]
                torch.testing.assert_close(kept, [*own], rtol=0, atol=1e-12)
        module.conv3x3.register_forward_hook(lambda *_: None)  # by calls of the children


def test_capture_sees_the_mask_however_it_is_given() -> None:
    module, x = make(), padded(filling=math.nan)
    expected = module.attention(x, MASK).spatial
    for call in (
        lambda: module(x, MASK),
        lambda: module(x, mask=MASK),
        lambda: module(x=x, mask=MASK),
    ):
        with capture_attention(module) as maps:
            call()
        assert torch.equal(maps[""].spatial, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(half: torch.dtype) -> None:
    module, x = make(dtype=torch.float32), padded(filling=math.nan).to(half)
    out = module(x, MASK)
    with torch.autocast("cpu", half):
        assert torch.equal(module(x, MASK).nan_to_num(7), out.nan_to_num(7))
    expected = module(x.float(), MASK)
    assert out.dtype == half
    torch.testing.assert_close(out, expected.to(half), rtol=0, atol=0, equal_nan=True)


# What is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize("hooked", [False, True])
def test_a_wrong_mask_is_refused(hooked: bool) -> None:
    module, x = make(), randn(2, 24, 5)
    if hooked:
        module.conv3x3.register_forward_hook(lambda *_: None)
    for call in (module, module.attention):
        for shape in ((2, 4), (3, 5), (2, 24, 5), (5,), (2, 1, 5)):
            message = re.escape(f"mask must be [b, l] = [2, 5], not {list(shape)}")
            with pytest.raises(ValueError, match=message):
                call(x, torch.ones(shape, dtype=torch.bool))
        for dtype in (torch.float32, torch.int64, torch.uint8):
            with pytest.raises(ValueError, match=f"mask must be a torch.bool tensor, not {dtype}"):
                call(x, torch.ones(2, 5, dtype=dtype))


def test_a_vote_by_changed_children_is_refused() -> None:
    module = make(batch_vote=True)
    module.conv3x3.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="batch_vote"):
        module(padded(), MASK)


# Graphs -----------------------------------------------------------------------------------------


def check_graph(graph: Callable[..., Tensor], module: EMAX1d) -> None:
    for places in ([[0], [0]], [[0, 1], [1]], [[], [0, 3, 4]], [[*range(30)], [*range(7, 20)]]):
        length = 1 + max(place for row in places for place in row)
        mask = torch.tensor([[place in row for place in range(length)] for row in places])
        x = padded(filling=math.nan, mask=mask).float()
        expected = module(x, mask)
        torch.testing.assert_close(graph(x, mask), expected, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_script_takes_the_mask_and_has_its_gradients() -> None:
    module = make(dtype=torch.float32)
    scripted: Any = torch.jit.script(module)
    check_graph(scripted, module)
    check_graph(torch.fx.symbolic_trace(module), module)
    module = make()
    scripted = torch.jit.script(module)
    x = padded(filling=math.nan)
    for _ in range(3):  # from the second call on, TorchScript optimises
        assert_equals_the_sequences_alone(module, x, MASK, scripted)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_export_takes_the_mask(strict: bool) -> None:
    module = make(dtype=torch.float32)
    b, length = torch.export.Dim("b", max=1 << 20), torch.export.Dim("l", max=1 << 20)
    shapes = {"x": {0: b, 2: length}, "mask": {0: b, 1: length}}
    inputs = padded().float(), MASK
    program = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=strict)
    check_graph(program.module(), module)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_takes_the_mask_in_one_graph(backend: str) -> None:
    module, x = make(), padded(filling=math.nan)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    try:
        assert_equals_the_sequences_alone(module, x, MASK, compiled)
    finally:
        torch.compiler.reset()
