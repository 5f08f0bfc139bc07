"""How a backend is tested: asked for, counted, and compared with the reference in float64."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from emax_testing import make_ema, make_emax, randn
from tiers import mostly_slow
from torch import Tensor

from emax_timm.attention import EMA, EMAX
from emax_timm.ops import Backend, dispatch, reference, use_backend

Layer = EMAX | EMA


class Tolerances(NamedTuple):
    """Largest errors, over the largest value of the reference or 1, whichever is larger."""

    features: float
    """Of the output and the gradient of x."""
    parameters: float
    """Of the gradients of the parameters, which are sums over all pixels."""
    cancelling: float
    """Of the gradients of the parameters where deviations are far smaller than means, or eps."""


class BackendHarness:
    """Computes with one backend, and fails unless that one computed."""

    name: str
    dtypes: ClassVar[dict[torch.dtype, Tolerances]]
    """Of x; the first one is what the cases without a dtype of their own take."""
    device = "cpu"
    operators: tuple[str, ...] = ()
    """The custom operators that a compiled graph calls where this backend computes."""
    calls: Counter[str]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        if "dtype" in metafunc.fixturenames:
            # By default every dtype in all sizes, and the first alone in everything else.
            kept = range(len(self.dtypes) if metafunc.function.__name__ == "test_sizes" else 1)
            cases = mostly_slow(self.dtypes, *kept)
            metafunc.parametrize("dtype", cases, ids=lambda dtype: str(dtype)[6:])

    @pytest.fixture(autouse=True)
    def _asked_for(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Ask for the backend, and count what it computes."""
        self.calls = Counter()
        backends = tuple(_counting(backend, self.calls) for backend in dispatch.BACKENDS)
        monkeypatch.setattr(dispatch, "BACKENDS", backends)
        with use_backend(self.name):
            yield

    # What the cases share ------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.dtypes))

    def features(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        return randn(*shape, seed=seed, dtype=dtype or self.dtype).to(self.device)

    def layer(self, kind: type[Layer], channels: int, **knobs: Any) -> Any:
        """A layer of the backend's device with random parameters, in eval mode."""
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        make = make_emax if kind is EMAX else make_ema
        return make(channels, dtype=knobs.pop("dtype", dtype), **knobs).to(self.device)

    def compute(
        self, module: Any, x: Tensor, cotangent: Tensor | None = None, seed: int = 0
    ) -> dict[str, Tensor]:
        """Output and every gradient; the backend under test must have computed them."""
        before = self.calls.copy()
        x = x.detach().requires_grad_()
        module.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        out = module(x)
        assert out.dtype == x.dtype
        out.backward(cotangent_for(out) if cotangent is None else cotangent)
        own = {f"{self.name}.forward": 1, f"{self.name}.backward": 1}
        assert self.calls - before == own, f"computed by {self.calls - before}"
        results = {"out": out.detach(), "grad x": x.grad}
        results |= {f"grad {name}": p.grad for name, p in module.named_parameters()}
        return results

    def check(
        self,
        module: Any,
        x: Tensor,
        cotangent: Tensor | None = None,
        seed: int = 0,
        cancelling: bool = False,
    ) -> dict[str, Tensor]:
        """Compare output and every gradient with the reference's; returns them."""
        actual = self.compute(module, x, cotangent, seed)
        exact = exact_results(module, x, cotangent, seed)
        limits = self.dtypes[x.dtype]
        dtypes = {"out": x.dtype, "grad x": x.dtype}
        dtypes |= {f"grad {name}": p.dtype for name, p in module.named_parameters()}
        assert actual.keys() == exact.keys()
        for name, value in exact.items():
            assert actual[name].dtype == dtypes[name], name
            assert actual[name].shape == value.shape, name
            if not value.numel():
                continue
            limit = limits.cancelling if cancelling else limits.parameters
            if name in ("out", "grad x"):
                limit = limits.features * (10 if cancelling else 1)
            error = (actual[name].double() - value).abs().max().item()
            bound = limit * max(1.0, value.abs().max().item())
            # Not `error > bound`, which a NaN would pass.
            assert error <= bound, f"{name} is off by {error:.1e}, more than {bound:.1e}"
        return actual


def exact_results(
    module: Any, x: Tensor, cotangent: Tensor | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """The reference's output and gradients in float64, for the same noise.

    The choice of groups is discontinuous: no rounding must be able to change it.
    """
    double = copy.deepcopy(module).double()
    candidates = getattr(module, "candidates", [module.groups])
    torch.manual_seed(seed)
    noise = dispatch.draw_noise(x, candidates, module.training and isinstance(module, EMAX))
    noise = None if noise is None else noise.double()
    exact_x = x.detach().double().contiguous().requires_grad_()
    out, maps = reference.emax(exact_x, reference.parts_of(double.weights()), noise)
    if len(candidates) > 1 and len(x):
        scores = maps.group_probs.log() + (0 if noise is None else noise)
        best, second = scores.topk(2).values.unbind(1)
        assert (best - second).min() > 1e-2, "the choice of groups is too close"
    out.backward((cotangent_for(x) if cotangent is None else cotangent).double())
    results: dict[str, Any] = {"out": out.detach(), "grad x": exact_x.grad}
    return results | {f"grad {name}": p.grad for name, p in double.named_parameters()}


def cotangent_for(like: Tensor) -> Tensor:
    return randn(*like.shape, seed=99, dtype=like.dtype).to(like.device)


def _counting(backend: Backend, calls: Counter[str]) -> Backend:
    """A backend that counts its passes."""

    def forward(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            calls[f"{backend.name}.forward"] += 1
        return backend.forward(*arguments)

    def backward(*arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            calls[f"{backend.name}.backward"] += 1
        return backend.backward(*arguments)

    return backend._replace(forward=forward, backward=backward)
