"""The Triton backend: on the GPU that EMAX_TEST_DEVICE names, or interpreted on the CPU.

Triton interprets kernels if TRITON_INTERPRET is 1 when it is imported.
"""

import ctypes
import importlib
import logging
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from backend_harness import BackendHarness, Tolerances
from backend_tester import FORMATS, BackendTester
from emax_testing import force
from interpreters import ENVIRONMENT, ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from emax_timm.attention import EMA, EMAX
from emax_timm.benchmark.layers import SHAPES
from emax_timm.ops import BackendError, explain, triton, use_backend

pytest.importorskip("triton")

DEVICE = os.environ.get("EMAX_TEST_DEVICE", "cpu")
LIMITS = {
    torch.float32: Tolerances(1e-6, 3e-5, 1e-3),
    # Interpreted, numbers are cut off to bfloat16 and not rounded.
    torch.bfloat16: Tolerances(8e-3 if DEVICE == "cpu" else 4e-3, 3e-5, 2e-3),
    torch.float16: Tolerances(5e-4, 3e-5, 2e-3),
}
READY = DEVICE != "cpu" or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.triton,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not READY, reason="needs EMAX_TEST_DEVICE=cuda or TRITON_INTERPRET=1"),
]


class TestTritonInShort(BackendHarness):
    """A few cases of everything, which take seconds where the kernels are interpreted."""

    name = "triton"
    device = DEVICE
    dtypes: ClassVar = LIMITS

    @FORMATS
    def test_both_passes(self, layout: torch.memory_format) -> None:
        module = self.layer(EMAX, 24, factor=4).train()
        force(module, 2, margin=20.0)
        self.check(module, self.features(2, 24, 5, 4).to(memory_format=layout))

    def test_half_precision(self) -> None:
        module = self.layer(EMAX, 32, factor=2)  # whose products are matrix products
        force(module, 1)
        self.check(module, self.features(1, 32, 3, 5, dtype=torch.bfloat16))

    def test_ema(self) -> None:
        self.check(self.layer(EMA, 6, factor=4), self.features(2, 6, 4, 3, dtype=torch.float16))

    def test_votes(self) -> None:
        module = self.layer(EMAX, 12, factor=4, batch_vote=True)
        force(module, 2)
        self.check(module, self.features(2, 12, 3, 3))

    def test_channels_last_parameters(self) -> None:
        """A model that was converted to channels_last has them."""
        module = self.layer(EMAX, 24, factor=4).to(memory_format=torch.channels_last)
        assert not module.conv3x3.weight.is_contiguous()
        force(module, 2)
        x = self.features(2, 24, 4, 4).to(memory_format=torch.channels_last)
        results = self.check(module, x)
        weight = module.conv3x3.weight
        assert results["grad conv3x3.weight"].stride() == weight.stride()


@pytest.mark.slow
class TestTriton(BackendTester):
    name = "triton"
    device = DEVICE
    dtypes: ClassVar = LIMITS
    operators = ("emax_triton.forward", "emax_triton.backward")

    def test_transforms_of_torch_func_get_another_backend(self) -> None:
        """They do not see into a kernel: asked for, it says so."""
        module, x = self.layer(EMAX, 12), self.features(2, 2, 12, 5, 7)
        with pytest.raises(BackendError, match="triton was asked for, but transforms of"):
            torch.vmap(module)(x)

    @pytest.mark.skipif(DEVICE == "cpu", reason="too large to be interpreted")
    @FORMATS
    @pytest.mark.parametrize(("channels", "height", "width"), [shape[1:] for shape in SHAPES])
    def test_full_sizes(
        self,
        channels: int,
        height: int,
        width: int,
        layout: torch.memory_format,
        dtype: torch.dtype,
    ) -> None:
        """The shapes of ResNet-50 at batch 32."""
        module = self.layer(EMAX, channels).train()
        force(module, 4, margin=20.0)
        x = self.features(32, channels, height, width, dtype=dtype).to(memory_format=layout)
        self.check(module, x)

    @pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
    def test_cuda_graphs(self) -> None:
        module = self.layer(EMAX, 64, factor=8).train()
        force(module, 4, margin=20.0)
        x = self.features(4, 64, 9, 7, dtype=torch.bfloat16)
        compiled = torch.compile(module, mode="reduce-overhead", fullgraph=True)

        def results(function: Any) -> list[torch.Tensor]:
            torch.manual_seed(0)
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            with use_backend("triton"):
                out = function(leaf)
                out.backward(torch.ones_like(out))
            tensors = [out, leaf.grad, *[parameter.grad for parameter in module.parameters()]]
            return [tensor.detach().clone() for tensor in tensors if tensor is not None]

        # Compiled first: what is kept between calls must not be memory of the graphs.
        *_, actual = [results(compiled) for _ in range(4)]
        for one, other in zip(actual, results(module), strict=True):
            torch.testing.assert_close(one, other)
        torch.compiler.reset()


class _Kernels(TorchDispatchMode):
    """Counts the operators that compute, each of which a GPU gets as at least one launch."""

    FREE = (
        "empty",
        "new_empty",
        "split",
        "detach",
        "view",
        "select",
        "slice",
        "permute",
        "_unsafe",
    )

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__
        if not name.startswith(self.FREE):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_launches() -> None:
    """At most 14 for a forward pass with its noise, and 30 for a backward pass."""
    from emax_timm.ops.dispatch import draw_noise
    from emax_timm.ops.triton.backward import backward
    from emax_timm.ops.triton.forward import forward
    from emax_timm.ops.triton.program import recorded_launches

    module = EMAX(64, device="meta")
    x = torch.empty(4, 64, 8, 8, device="meta").to(memory_format=torch.channels_last)
    weights = module.weights()
    with torch.no_grad(), recorded_launches() as launches, _Kernels() as others:
        noise = draw_noise(x, module.candidates, True)
        _, saved = forward(x, weights, noise, True)
    assert len(launches) + len(others.names) <= 14, others.names
    with torch.no_grad(), recorded_launches() as launches, _Kernels() as others:
        backward(x, x, weights, saved[0])
    assert len(launches) + len(others.names) <= 30, others.names
    assert len(launches) >= 15, "the kernels are counted"


def interpreted(launch: Any) -> SimpleNamespace:
    """Run a kernel, and return what Triton returns of a compiled one, which takes pointers."""
    kernel, arguments, grid, constants, _ = launch
    kernel[grid](*arguments, **constants)
    names = kernel.arg_names[len(arguments) :]

    def run(x: int, y: int, z: int, stream: int, *given: Any) -> None:
        values, rest = given[5 : 5 + len(arguments)], given[5 + len(arguments) :]
        assert (stream, *given[:5]) == (7, "function", "metadata", None, None, None)
        assert rest == tuple(constants[name] for name in names)
        tensors = [
            memory_at(value, argument) if isinstance(argument, torch.Tensor) else value
            for value, argument in zip(values, arguments, strict=True)
        ]
        kernel[(x, y, z)](*tensors, **constants)

    return SimpleNamespace(run=run, function="function", packed_metadata="metadata")


def memory_at(pointer: int, like: torch.Tensor) -> torch.Tensor:
    if like.numel() == 0:
        return like
    memory = (ctypes.c_char * like.nbytes).from_address(pointer)
    return torch.frombuffer(memory, dtype=like.dtype, count=like.numel())


@pytest.mark.skipif(DEVICE != "cpu", reason="runs interpreted kernels at addresses")
@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"batch_vote": True}, marks=pytest.mark.slow),
        pytest.param({"channel_gate": False, "global_gate": False}, marks=pytest.mark.slow),
        pytest.param({"group_counts": "finest"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_pass_is_launched_again(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With pointers to what it is given then: the bits are those of a first pass."""
    from emax_timm.ops.triton import plan, program

    monkeypatch.setattr(program, "_compile_and_launch", interpreted)
    monkeypatch.setattr(program, "_stream", lambda: 7)
    module = EMAX(8, factor=4, **options).train()
    generator = torch.Generator().manual_seed(0)

    def results(plans: dict[Any, Any], x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
        monkeypatch.setattr(plan, "_plans", plans)
        torch.manual_seed(0)
        module.zero_grad()
        x.requires_grad_()
        with use_backend("triton"):
            out = module(x)
            out.backward(grad)
        tensors = [out, x.grad, *[parameter.grad for parameter in module.parameters()]]
        return [tensor for tensor in tensors if tensor is not None]

    def kept() -> list[bool]:
        return [known._program is not None for known in plans.values()]

    images = torch.randn(4, 2, 8, 2, 3, generator=generator)
    x, other, *last = [image.to(memory_format=torch.channels_last) for image in images]
    plans: dict[Any, plan.Plan] = {}
    results(plans, x, x.detach())  # x is its own gradient, and will not be the next time
    assert kept() == [True, False]
    results(plans, other, x.detach())
    assert kept() == [True, True]
    again = results(plans, *[tensor.clone() for tensor in last])
    for one, same in zip(results({}, *last), again, strict=True):
        assert torch.equal(one, same)


def test_kernels_get_the_weights_of_every_model_in_float32() -> None:
    """What they are compiled for is kept by sizes and by the dtype of x alone."""
    from emax_timm.ops.triton.plan import plan_for

    x = torch.zeros(1, 64, 2, 2, device=DEVICE, dtype=torch.float16)
    for module in (EMAX(64), EMAX(64).half(), EMAX(64).bfloat16()):
        weights, _ = plan_for("forward", x, module.to(DEVICE).weights())
        dtypes = {tensor.dtype for tensor in weights[1:] if tensor is not None}
        assert dtypes == {torch.float32}
    assert weights.warmup is not None


def test_what_does_not_serve_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(x: torch.Tensor, factor: int = 32) -> str:
        return explain(x, EMAX(x.shape[1], factor).weights())["triton"] or ""

    here = torch.ones(1, 4, 2, 2, device=DEVICE)
    assert "float32, bfloat16 and float16, not float64" in reason(here.double())
    assert "64 channels, not 1 of 300" in reason(here.repeat(1, 75, 1, 1), factor=1)
    assert "in 32 bits, which are too few" in reason(here[..., :1, :1].expand(1, 4, 30_000, 30_000))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert reason(torch.ones(1, 4, 2, 2)) == "it serves tensors on GPUs, not on the CPU"
    assert "not on meta" in reason(torch.ones(1, 4, 2, 2, device="meta"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with monkeypatch.context() as patch:
        patch.setattr("triton.__version__", "3.2.0")
        triton._triton_problem.cache_clear()
        assert reason(here) == "it needs Triton 3.3 or newer, not 3.2.0"
        patch.setattr("triton.__version__", "3.10.0")
        triton._triton_problem.cache_clear()
        assert reason(here) == ""
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    triton._triton_problem.cache_clear()
    assert reason(here) == "Triton is not installed"
    triton._triton_problem.cache_clear()


def test_a_gpu_without_it_is_told_why_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(triton, "_device_problem", lambda device: None)
    triton._report.cache_clear()
    on_a_gpu: Any = SimpleNamespace(
        is_cuda=True,
        device=torch.device("cuda"),
        dtype=torch.float64,
        shape=(1, 4, 2, 2),
        ndim=4,
    )
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert "not float64" in str(triton.TRITON.unsupported(on_a_gpu, EMAX(4).weights()))
    assert [record.getMessage() for record in caplog.records] == [
        "EMAX runs without its Triton backend: it serves float32, bfloat16 and float16, not float64"
    ]


class Broken:
    """A kernel that cannot be compiled, as Triton or the machine says so."""

    arg_names = ()

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, grid: object) -> Any:
        def launch(*arguments: object, **constants: object) -> None:
            raise self.error

        return launch


# What a machine without a compiler raises is no class of Triton's.
BROKEN = [
    ("maps.fine_maps", RuntimeError("Failed to find C compiler.\nno such instruction")),
    ("map_gradients.map_gradient", subprocess.CalledProcessError(1, "no such instruction")),
]


@pytest.mark.parametrize(("kernel", "error"), BROKEN, ids=["forward", "backward"])
def test_a_kernel_that_fails_gives_way(
    kernel: str,
    error: Exception,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """One log line, right values, and another backend from then on; asked for, an error."""
    importlib.import_module("emax_timm.ops.triton.backward")
    monkeypatch.setattr(f"emax_timm.ops.triton.kernels.{kernel}", Broken(error))
    monkeypatch.setattr("emax_timm.ops.triton.plan._plans", {})
    monkeypatch.setattr(triton, "_failure", None)
    triton._report.cache_clear()
    module = EMAX(8, factor=2).to(DEVICE)
    images = torch.randn(2, 8, 3, 3, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for name in ("portable", "auto"):
        x = images.clone().requires_grad_()
        torch.manual_seed(0)
        with use_backend(name), caplog.at_level(logging.WARNING):
            out = module(x)
            out.square().sum().backward()
        results.append((out.detach(), x.grad))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert "without its Triton backend: a kernel cannot be compiled here" in lines[0]
    assert "no such instruction" in (explain(x, module.weights())["triton"] or "")
    monkeypatch.setattr(triton, "_failure", None)
    with (
        use_backend("triton"),
        pytest.raises(BackendError, match="triton was asked for, but a ker"),
    ):
        module(x).sum().backward()


def run_check(*flags: str) -> subprocess.CompletedProcess[str]:
    # In a process of its own, for here the kernels may be interpreted.
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "emax_cli", "kernels", "check", *flags]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)


def test_a_kernel_compiles_without_a_gpu() -> None:
    done = run_check("--kernel", "apply_attention")
    assert done.returncode == 0, done.stderr
    *_, line = done.stdout.splitlines()
    name, registers, spilled, _, loads, wide = line.split()
    assert (name, spilled) == ("apply_attention", "0")
    assert 16 <= int(registers) <= 255
    assert 0 < int(wide) <= int(loads)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--target", "sm_5"], "unknown target sm_5: it must be one of sm_80, sm_90"),
        (["--shape", "big"], "--shape must be channels x size, like 256x56, not big"),
        (["--kernel", "nothing"], "there is no kernel nothing"),
    ],
)
@pytest.mark.slow
def test_check_refuses(flags: list[str], message: str) -> None:
    done = run_check(*flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("shape", ["256x56", "512x28", "1024x14", "2048x7"])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_no_kernel_spills(target: str, shape: str) -> None:
    done = run_check("--target", target, "--shape", shape)
    assert done.returncode == 0, done.stdout + done.stderr
