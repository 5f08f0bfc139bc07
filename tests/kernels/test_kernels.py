"""The kernels: built by a real compiler, the same results, and what may stand in their way."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EMAX = "import sys; from emax_timm.cli import main; sys.exit(main(sys.argv[1:]))"
# An output and a gradient, which depend on all passes.
COMPUTE = """
import torch
from emax_timm import kernels
from emax_timm.attention import EMAX
torch.manual_seed(0)
layer, x = EMAX(24), torch.randn(2, 24, 5, 7, requires_grad=True)
layer.eval()(x).sin().sum().backward()
print(kernels.load(), x.grad.double().sum().item())
"""


def run(
    arguments: Sequence[str | Path], home: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python where kernels are built in and taken from `home`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("EMAX_")}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, arguments)],
        env={**clean, "OMP_NUM_THREADS": "1", "EMAX_KERNELS_DIR": str(home), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )


def one_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "CUDA" not in line]
    assert len(lines) == 1, text
    return lines[0]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the kernels of this machine."""
    home = tmp_path_factory.mktemp("kernels")
    done = run(["-c", EMAX, "kernels", "build"], home)
    assert done.returncode == 0, done.stderr
    (library,) = home.iterdir()
    assert str(library) in done.stdout
    return home


@pytest.mark.slow
def test_attention_is_exact_with_the_kernels(built: Path) -> None:
    """All tests of the attention, with an error if they ran without the kernels."""
    done = run(["-m", "pytest", "-q", "tests/attention"], built, EMAX_KERNELS="require")
    assert done.returncode == 0, done.stdout[-3000:]


COMPARE = """
import sys, torch
from emax_timm import kernels
from emax_timm.attention import EMAX
SIZES = (
    (2, 256, (14, 14)), (3, 96, (17, 33)), (4, 5, (3, 64)), (2, 64, (1, 16)), (3, 256, (7, 7)),
    (3, 100, (9, 10)), (64, 24, (5, 5)), (0, 24, (5, 5)),
)
results = []
for mode in (True, False):
    kernels._loaded = mode and kernels.load()
    assert bool(kernels._loaded) == mode
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            # Batches that threads can share by whole samples, and those that they cannot.
            for batch, channels, size in SIZES:
                torch.manual_seed(1)
                layer = EMAX(channels)
                torch.nn.init.normal_(layer.group_controller.weight) if channels > 5 else None
                layer.warmup.fill_(0.3 if size == (17, 33) else 1)
                x = torch.randn(batch, channels, *size).to(dtype).to(memory_format=layout)
                x = x[..., ::2] if size == (9, 10) else x
                dense = batch > 0 and size != (9, 10)
                x.requires_grad_()
                torch.manual_seed(2)
                out = layer(x)
                assert out.dtype == dtype and (not dense or out.stride() == x.stride())
                out.float().square().sum().backward()
                assert not dense or x.grad.stride() == x.stride()
                grads = [p.grad for p in layer.parameters()]
                results.append((mode, dtype, [out, x.grad, *grads]))
half = len(results) // 2
for (_, dtype, ours), (_, _, theirs) in zip(results[:half], results[half:], strict=True):
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        # Sums over all pixels cancel, in the parameters' gradients, and amplify rounding.
        tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5 if number < 2 else 2e-3
        assert a.shape == b.shape
        if not b.numel():
            continue
        error = (a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-6)
        assert error <= tolerance, (dtype, a.shape, error)
layer, x = EMAX(64).eval(), torch.randn(4, 2, 64, 5, 7)
with torch.no_grad():
    together = torch.vmap(layer)(x)
    torch.testing.assert_close(together, torch.stack([layer(images) for images in x]))
print("the same")
"""


@pytest.mark.slow
def test_kernels_compute_what_the_portable_path_does(built: Path) -> None:
    done = run(["-c", COMPARE], built)
    assert done.stdout == "the same\n", done.stderr


# What one thread computes first must not reach what it computes next, in the same memory.
ISOLATE = """
import torch
from emax_timm import kernels
from emax_timm.attention import EMAX
assert kernels.load()
torch.manual_seed(0)
layer, x = EMAX(64, factor=4).eval(), torch.randn(3, 64, 5, 7)
results = []
for value in (1.0, float("nan"), float("inf")):
    spoilt = x.clone()
    spoilt[0] = value
    spoilt.requires_grad_()
    out = layer(spoilt)
    out.square().sum().backward()
    assert out[0].isfinite().all() == (value == 1)
    results.append(torch.cat([out[1:], spoilt.grad[1:]]))
print(all(torch.equal(results[0], result) for result in results))
"""


@pytest.mark.slow
def test_a_sample_that_is_not_finite_leaves_the_others_alone(built: Path) -> None:
    assert run(["-c", ISOLATE], built).stdout == "True\n"


@pytest.mark.slow
def test_kernels_are_used_unless_they_are_switched_off(built: Path) -> None:
    with_kernels = run(["-c", COMPUTE], built, EMAX_KERNELS="require").stdout.split()
    without = run(["-c", COMPUTE], built, EMAX_KERNELS="off").stdout.split()
    assert (with_kernels[0], without[0]) == ("True", "False")
    assert float(with_kernels[1]) == pytest.approx(float(without[1]), rel=1e-4, abs=1e-5)


def test_without_kernels_the_portable_path_computes(tmp_path: Path) -> None:
    done = run(["-c", COMPUTE], tmp_path)
    assert done.stdout.startswith("False ")
    assert done.stderr == ""


COMPILE_FIRST = """
import torch
from emax_timm.attention import EMAX
layer, x = EMAX(8), torch.randn(2, 8, 5, 7, requires_grad=True)
torch.compile(layer, backend="eager", fullgraph=True)(x).sum().backward()
"""


def test_kernels_are_looked_for_outside_the_graph_of_torch_compile(tmp_path: Path) -> None:
    """In a process whose first use of EMAX is a compiled one."""
    done = run(["-c", COMPILE_FIRST], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]


def test_required_kernels_that_are_not_built_are_an_error(tmp_path: Path) -> None:
    done = run(["-c", COMPUTE], tmp_path, EMAX_KERNELS="require")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("run `emax kernels build`")


def test_a_library_that_cannot_be_loaded_is_named_and_not_used(tmp_path: Path) -> None:
    where = "from emax_timm.kernels import library_path; print(library_path())"
    library = Path(run(["-c", where], tmp_path).stdout.strip())
    assert library.parent == tmp_path
    library.write_bytes(b"\x7fELF, but not to the end")
    done = run(["-c", COMPUTE], tmp_path)
    assert done.stdout.startswith("False ")
    assert str(library) in one_line(done.stderr)


def test_another_mode_is_refused(tmp_path: Path) -> None:
    done = run(["-c", COMPUTE], tmp_path, EMAX_KERNELS="on")
    assert done.stderr.splitlines()[-1].endswith("must be one of auto, off, require, not on")


@pytest.mark.parametrize("fault", ["no compiler", "compiler fails", "no folder"])
def test_a_failed_build_is_one_line_and_leaves_nothing(fault: str, tmp_path: Path) -> None:
    home, environment = tmp_path / "kernels", {"CXX": "no-such-compiler"}
    if fault == "compiler fails":
        environment = {"CXX": "false"}
    if fault == "no folder":
        home.write_text("a file")
    done = run(["-c", EMAX, "kernels", "build"], home, **environment)
    assert done.returncode == 2
    # Of torch's extension loader there may be warnings above it.
    assert done.stderr.splitlines()[-1].startswith("emax kernels: error: ")
    assert "Traceback" not in done.stderr
    assert home.is_file() or list(home.iterdir()) == []
