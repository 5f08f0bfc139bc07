"""What the tests of EMAX share: modules with parameters that hide nothing, and comparisons."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from emax_timm.attention import EMA, EMAX
from emax_timm.ops import EMAXMaps, reference

# One entry per way in which a layer can lack a part.
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "finest": {"group_counts": "finest"},
    "without_finest": {"group_counts": [1, 2]},
    "one_coarse": {"group_counts": [2]},
    "no_channel_gate": {"channel_gate": False},
    "no_global_gate": {"global_gate": False},
    "spatial_only": {"channel_gate": False, "global_gate": False},
    "one_hidden_unit": {"reduction": 1000},
}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal numbers that neither read nor move the global generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@torch.no_grad()
def randomise(module: nn.Module, seed: int = 0) -> None:
    """Gives every parameter random values, so that no part of the formulas is hidden by another.

    The rows of the controller's weight are small and sum to 0: neither noise-like inputs nor an
    offset common to all channels outweighs a bias of 3.
    """
    for number, (name, parameter) in enumerate(module.named_parameters()):
        values = randn(*parameter.shape, seed=1000 * seed + number)
        fan_in = math.prod(parameter.shape[1:])
        if "group_controller.weight" in name:
            values = 0.3 * (values - values.mean(1, keepdim=True)) / math.sqrt(fan_in)
        elif name.endswith("gamma"):
            values = 0.7 + 0.1 * values
        elif name.endswith(("gn.weight", "residual_gate")):
            values = 0.8 + 0.3 * values
        elif parameter.ndim > 1:
            values = values / math.sqrt(fan_in)
        parameter.copy_(values)


@torch.no_grad()
def force(module: EMAX, count: int, margin: float = 3.0) -> None:
    """Makes the controller choose `count`, with a softmax that still has a gradient."""
    if module.group_controller is None:
        assert module.candidates == [count]
        return
    bias = module.group_controller.bias
    bias.zero_()
    bias[module.candidates.index(count)] = margin


def make_emax(
    channels: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, **knobs: Any
) -> EMAX:
    """An EMAX layer in eval mode with random parameters."""
    module = EMAX(channels, dtype=dtype, **knobs).eval()
    randomise(module, seed)
    return module


def make_ema(
    channels: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, **knobs: Any
) -> EMA:
    """An EMA layer in eval mode with random parameters."""
    module = EMA(channels, dtype=dtype, **knobs).eval()
    randomise(module, seed)
    return module


class ReferenceEMAX(EMAX):
    """An EMAX layer that computes by the plain formulas of `ops/reference.py`."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        return self._both(x, noise)[0]

    def attention(self, x: Tensor, noise: Tensor | None = None) -> EMAXMaps:
        return self._both(x, noise)[1]

    def _both(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, EMAXMaps]:
        return reference.emax(x, reference.parts_of(self.weights()), noise)


class ReferenceEMA(EMA):
    """An EMA layer that computes by the plain formulas of `ops/reference.py`."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.emax(x, reference.parts_of(self.weights()))[0]


def gradients(module: nn.Module, x: Tensor, call: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """The output of `call` and its gradients for one random cotangent, by name."""
    x = x.detach().requires_grad_()
    module.zero_grad(set_to_none=True)
    out = call(x)
    out.backward(randn(*out.shape, seed=99, dtype=out.dtype))
    results = {"out": out.detach()}
    for name, tensor in [("input", x), *module.named_parameters()]:
        assert tensor.grad is not None, f"no gradient on {name}"
        results[f"grad {name}"] = tensor.grad.clone()
    return results


def emax_results(module: EMAX, x: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """Output, gradients and maps of EMAX; in training each forward pass starts at `seed`."""
    torch.manual_seed(seed)
    results = gradients(module, x, module)
    torch.manual_seed(seed)
    with torch.no_grad():
        return results | module.attention(x)._asdict()


def assert_same(
    actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10
) -> None:
    """Same names, shapes and dtypes, and errors below `tolerance` of max(1, largest value)."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].shape == value.shape, name
        assert actual[name].dtype == value.dtype, name
        error = (actual[name] - value).abs().max().item()
        bound = tolerance * max(1.0, value.abs().max().item())
        # Not `error > bound`, which a NaN would pass.
        assert error <= bound, f"{name} is off by {error:.1e}, more than {bound:.1e}"


def relative_error(actual: Tensor, exact: Tensor) -> float:
    assert actual.isfinite().all()
    error = (actual.double() - exact).abs().max()
    return float(error / exact.abs().max().clamp(min=1e-30))


def assert_as_precise(draws: list[dict[str, tuple[float, float]]]) -> None:
    """The typical error is at most four times that of the naive formulas, or 1e-6.

    Typical is the median over draws: of a single draw, a sum that happens to cancel or a rounding
    that happens to be exact makes the ratio of two errors 10 in either direction.
    """
    for name in draws[0]:
        ours, naive = (statistics.median(draw[name][i] for draw in draws) for i in (0, 1))
        assert ours <= max(4 * naive, 1e-6), f"{name}: error {ours:.1e}, naive {naive:.1e}"


def softmax(values: Tensor) -> Tensor:
    """Over the last dimension."""
    powers = (values - values.amax(-1, keepdim=True)).exp()
    return powers / powers.sum(-1, keepdim=True)


def published_ema(x: Tensor, weights: list[Tensor]) -> Tensor:
    """EMA by sums and products, as in arXiv 2305.13563: n groups of i channels, to o channels."""
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
