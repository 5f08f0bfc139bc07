"""The autograd node of a layer: what it keeps, and gradients of gradients, forwards and per sample.

All is compared with autograd on the plain formulas of `ops/reference.py`, in float64. What each
backend computes in the backward pass, `backend_tester.py` tests.
"""

from typing import Any

import pytest
import torch
from emax_testing import VARIANTS, ReferenceEMA, ReferenceEMAX, make_ema, make_emax, randn
from tiers import mostly_slow
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from emax_timm.attention import EMA, EMAX, set_grouping
from emax_timm.benchmark.layers import saved_bytes
from emax_timm.ops import use_backend
from emax_timm.ops.dispatch import draw_noise
from emax_timm.ops.portable.forward import emax_plain

KINDS = pytest.mark.parametrize("kind", [EMAX, EMA])
FEATURES = pytest.mark.parametrize(
    "features", mostly_slow(["normal", "zero", "constant", "one_pixel"], 0, 3)
)


def pair(kind: type[nn.Module], channels: int = 8, **knobs: Any) -> tuple[Any, Any]:
    """A layer, and the plain formulas with the same parameters."""
    make, twin = (make_emax, ReferenceEMAX) if kind is EMAX else (make_ema, ReferenceEMA)
    if kind is EMAX:
        knobs = {"reduction": 2, **knobs}  # several hidden units, of which some are on
    module = make(channels, factor=4, **knobs)
    reference = twin(channels, factor=4, dtype=torch.float64, **knobs).eval()
    reference.load_state_dict(module.state_dict())
    return module, reference


def images(features: str, *shape: int) -> Tensor:
    x = randn(*shape)
    return {
        "normal": lambda: x,
        "zero": lambda: torch.zeros_like(x),
        # One constant channel, whose variance and thus gradient of a norm is 0.
        "constant": lambda: torch.cat([torch.full_like(x[:, :1], 0.7), x[:, 1:]], 1),
        "one_pixel": lambda: x[:, :, :1, :1],
    }[features]()


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    """Finite where the expected ones are, and the same there."""
    assert expected.isfinite().all(), f"the plain formulas' {what} is not finite"
    bound = 1e-9 * max(1.0, expected.abs().max().item())
    assert (actual - expected).abs().max().item() <= bound, what


# What is kept -----------------------------------------------------------------------------------


def test_plain_autograd_keeps_several_times_the_input() -> None:
    """The bound on what is kept, in `backend_tester.py`, can fail."""

    class Plain(EMAX):
        def forward(self, x: Tensor) -> Tensor:
            weights = self.weights()
            noise = draw_noise(x, weights.config.candidates, self.training)
            return emax_plain(x, weights, noise)

    x = randn(2, 256, 14, 14, dtype=torch.float32)
    assert saved_bytes(Plain(256), x) > 3 * x.numel() * x.element_size()


# Gradients that are differentiated again --------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_that_can_be_differentiated_again_are_the_same(variant: str) -> None:
    module = make_emax(24, **VARIANTS[variant])
    x = randn(2, 24, 5, 4).requires_grad_()
    inputs = [x, *module.parameters()]
    loss = module(x).square().sum()
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    again = torch.autograd.grad(loss, inputs, create_graph=True)
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
        assert b.requires_grad


def second_gradients(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of x and every parameter, of a penalty on all first gradients."""
    x = x.clone().requires_grad_()
    inputs = dict(module.named_parameters(), x=x)
    loss = (module(x) * randn(*x.shape, seed=7)).sum()
    first = torch.autograd.grad(loss, [*inputs.values()], create_graph=True)
    penalty = sum((g * randn(*g.shape, seed=n)).sum() for n, g in enumerate(first))
    assert isinstance(penalty, Tensor)
    second = torch.autograd.grad(penalty, [*inputs.values()], allow_unused=True)
    return {
        name: torch.zeros_like(inputs[name]) if g is None else g
        for name, g in zip(inputs, second, strict=True)
    }


@FEATURES
@KINDS
def test_second_gradients_are_the_plain_formulas(kind: type[nn.Module], features: str) -> None:
    module, reference = pair(kind)
    x = images(features, 2, 8, 4, 3)
    actual, expected = second_gradients(module, x), second_gradients(reference, x)
    for name, value in expected.items():
        assert_close(actual[name], value, name)
    if features == "normal":
        smallest = {name: value.abs().max().item() for name, value in expected.items()}
        assert min(smallest.values()) > 1e-6, smallest


@pytest.mark.parametrize("part", ["input", "parameters"])
@KINDS
def test_second_gradients_are_the_numeric_ones(kind: type[nn.Module], part: str) -> None:
    module, _ = pair(kind, 4)
    # No choice is made: the straight-through gradient is not the numeric one.
    set_grouping(module, warmup=0.0)
    x = randn(2, 4, 3, 2).requires_grad_()
    if part == "input":
        assert torch.autograd.gradgradcheck(module, [x], fast_mode=True)
        return
    chosen = {name: p for name, p in module.named_parameters() if "controller" not in name}

    def call(*values: Tensor) -> Tensor:
        named = dict(zip(chosen, values, strict=True))
        return torch.func.functional_call(module, named, (x.detach(),))

    values = [value.detach().requires_grad_() for value in chosen.values()]
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


def test_third_gradients_are_the_plain_formulas() -> None:
    results = []
    for module in pair(EMA, 4):
        x = randn(1, 4, 2, 2).requires_grad_()
        value = module(x).square().sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(value, x, create_graph=True)
            value = (gradient * randn(*x.shape, seed=3)).sum()
        results.append(torch.autograd.grad(value, x)[0])
    assert_close(*results, "third gradient")  # type: ignore[misc]


@FEATURES
@KINDS
def test_hessians_are_the_plain_formulas(kind: type[nn.Module], features: str) -> None:
    """Forwards over the gradient (`torch.func`), and backwards over it."""
    x, cotangent = images(features, 1, 4, 2, 3), randn(1, 4, 2, 3, seed=7)
    cotangent = cotangent[..., : x.shape[2], : x.shape[3]]
    module, reference = pair(kind, 4)
    expected = torch.autograd.functional.hessian(lambda x: (reference(x) * cotangent).sum(), x)

    def loss(x: Tensor) -> Tensor:
        return (module(x) * cotangent).sum()

    assert_close(torch.func.hessian(loss)(x), expected, "forwards")  # type: ignore[arg-type]
    backwards: Any = torch.autograd.functional.hessian(loss, x)
    assert_close(backwards, expected, "backwards")  # type: ignore[arg-type]


# Forwards, and per sample -----------------------------------------------------------------------


@FEATURES
@pytest.mark.parametrize("tangents", ["x", "parameters"])
@KINDS
def test_forward_mode_is_the_plain_formulas(
    kind: type[nn.Module], tangents: str, features: str
) -> None:
    results = []
    for module in pair(kind):
        x = images(features, 2, 8, 4, 3)
        parameters = {name: p.detach() for name, p in module.named_parameters()}

        def call(x: Tensor, values: Any, module: nn.Module = module) -> Tensor:
            return torch.func.functional_call(module, values, (x,))

        along_x = randn(*x.shape, seed=5) if tangents == "x" else torch.zeros_like(x)
        along = {
            name: randn(*p.shape, seed=n) if tangents == "parameters" else torch.zeros_like(p)
            for n, (name, p) in enumerate(parameters.items())
        }
        results.append(torch.func.jvp(call, (x, parameters), (along_x, along)))
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected, tangents)


@KINDS
def test_gradients_of_single_samples_by_vmap(kind: type[nn.Module]) -> None:
    module, reference = pair(kind)
    x = randn(3, 8, 5, 4)

    def loss(sample: Tensor) -> Tensor:
        return module(sample.unsqueeze(0)).square().sum()

    actual = torch.func.vmap(torch.func.grad(loss))(x)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(reference(x).square().sum(), x)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@KINDS
def test_gradients_of_the_parameters_by_sample(kind: type[nn.Module]) -> None:
    module, _ = pair(kind)
    x = randn(3, 8, 5, 4)
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def loss(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(module, values, (sample.unsqueeze(0),)).sin().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for number, sample in enumerate(x):
        module.zero_grad()
        module(sample.unsqueeze(0)).sin().sum().backward()
        for name, parameter in module.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(found[name][number], parameter.grad, rtol=0, atol=1e-12)


# Graphs that are used in unusual ways -----------------------------------------------------------


def test_a_graph_can_be_gone_through_twice_if_it_is_kept() -> None:
    module, x = make_emax(24), randn(2, 24, 5, 4).requires_grad_()
    loss = module(x).sin().sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(loss, x)[0], first)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, x)


def test_a_weight_that_was_changed_before_the_backward_pass_is_noticed() -> None:
    module, x = make_emax(24), randn(2, 24, 5, 4).requires_grad_()
    out = module(x)
    with torch.no_grad():
        module.conv3x3.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


class Operations(TorchDispatchMode):
    """Records the operations that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@KINDS
def test_operations_are_the_same_whichever_weights_are_frozen(kind: type[nn.Module]) -> None:
    """Equal bits would show nothing: only some machines have others for another product."""
    seen = []
    for frozen in ([], [0, 2], [1, 3], range(64)):
        module, x = pair(kind)[0], randn(2, 8, 5, 4).requires_grad_()
        for place, parameter in enumerate(module.parameters()):
            parameter.requires_grad_(place not in frozen)
        with Operations() as operations, use_backend("portable"):
            torch.autograd.grad(module(x).sum(), x)
            with torch.no_grad():
                module(x)
        seen.append([name for name in operations.names if "detach" not in name])
    assert len(seen[0]) > 100
    assert all(names == seen[0] for names in seen)


def test_checkpointing_gives_the_same_gradients() -> None:
    module, x = make_emax(24).train(), randn(2, 24, 5, 4).requires_grad_()
    torch.manual_seed(0)
    expected = torch.autograd.grad(module(x).sin().sum(), x)[0]
    torch.manual_seed(0)
    out: Any = checkpoint(module, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(out.sin().sum(), x)[0], expected)


def test_an_output_that_nothing_is_asked_of_has_no_gradient() -> None:
    module, x = make_emax(24), randn(2, 24, 5, 4).requires_grad_()
    assert torch.autograd.grad(x.sum() + 0 * module(x.detach()).sum(), x)[0].eq(1).all()
