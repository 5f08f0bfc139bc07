"""The choice of a backend: who is asked, who serves, who computes the backward pass."""

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from emax_testing import make_ema, make_emax, randn
from PIL import Image
from torch import Tensor

from emax_cli import main
from emax_timm.attention import EMA, EMAX
from emax_timm.ops import Backend, BackendError, dispatch, emax, emax_maps, explain, use_backend
from emax_timm.ops.cpp import library
from emax_timm.ops.portable import PORTABLE

NOT_BUILT = "it is not built for this version of torch and this CPU: run `emax kernels build`"


class Toy:
    """A backend for tests: portable results, at most `channels` wide, and a count of its passes."""

    def __init__(self, name: str = "toy", channels: int = 24) -> None:
        self.calls: Counter[str] = Counter()
        self.channels = channels
        self.backend = Backend(name, self.unsupported, self.forward, self.backward)

    def unsupported(self, x: Tensor, weights: Any) -> str | None:
        return None if x.shape[1] <= self.channels else f"it serves {self.channels} channels"

    def forward(self, x: Tensor, *arguments: Any) -> Any:
        if not torch.compiler.is_compiling():
            self.calls["forward"] += 1
        return PORTABLE.forward(x, *arguments)

    def backward(self, grad: Tensor, *arguments: Any) -> dict[str, Tensor]:
        if not torch.compiler.is_compiling():
            self.calls["backward"] += 1
        return PORTABLE.backward(grad, *arguments)


@pytest.fixture(autouse=True)
def _no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EMAX_BACKEND", raising=False)
    monkeypatch.setattr(library, "_problem", NOT_BUILT)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A backend in front of all others."""
    toy = Toy()
    monkeypatch.setattr(dispatch, "BACKENDS", (toy.backend, *dispatch.BACKENDS))
    return toy


def layer_and_input(channels: int = 24) -> tuple[EMAX, Tensor]:
    module = make_emax(channels, dtype=torch.float32)
    return module, randn(2, channels, 5, 4, dtype=torch.float32)


def chosen(channels: int = 24) -> str:
    module, x = layer_and_input(channels)
    return dispatch.choose(x, module.weights()).name


# Preference -------------------------------------------------------------------------------------


def test_compiled_backends_come_first_and_the_last_one_serves_everything() -> None:
    assert [backend.name for backend in dispatch.BACKENDS][-2:] == ["cpp", "portable"]
    module, x = layer_and_input()
    for other in (x.double(), x.half(), x.to("meta"), x[:0]):
        assert dispatch.BACKENDS[-1].unsupported(other, module.weights()) is None


def test_the_first_that_serves_is_chosen(toy: Toy) -> None:
    assert chosen(24) == "toy"
    assert chosen(40) == "portable"


def test_explain_tells_of_every_backend_why_not(toy: Toy) -> None:
    module, x = layer_and_input(40)
    assert explain(x, module.weights()) == {
        "toy": "it serves 24 channels",
        "triton": "it serves tensors on GPUs, not on the CPU",
        "cpp": NOT_BUILT,
        "portable": None,
    }
    assert explain(x.double(), module.weights())["cpp"] == (
        "it serves float32 and bfloat16, not float64"
    )
    assert "not on meta" in str(explain(x.to("meta"), module.weights())["cpp"])


def test_the_backends_command_prints_a_line_for_each(
    toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["backends", "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["toy", "triton", "cpp", "portable"]
    assert "does not serve: it serves 24 channels (cpu, float32)" in lines[0]
    assert "does not serve: it serves tensors on GPUs" in lines[1]
    assert f"does not serve: {NOT_BUILT}" in lines[2]
    assert "serves here" in lines[3]
    toy.channels = 64
    assert main(["backends", "--device", "cpu", "--dtype", "bfloat16"]) == 0
    assert "serves here (cpu, bfloat16)" in capsys.readouterr().out.splitlines()[0]


# Asking for one ---------------------------------------------------------------------------------


def test_use_backend_nests_and_ends_with_its_context(toy: Toy) -> None:
    with use_backend("portable"):
        assert chosen() == "portable"
        with use_backend("toy"):
            assert chosen() == "toy"
            with use_backend("auto"):
                assert chosen() == "toy"
        assert chosen() == "portable"
    assert chosen() == "toy"


def test_use_backend_ends_with_an_exception(toy: Toy) -> None:
    with pytest.raises(KeyError), use_backend("portable"):
        raise KeyError
    assert chosen() == "toy"


def test_use_backend_serves_as_a_decorator(toy: Toy) -> None:
    assert use_backend("portable")(chosen)() == "portable"
    assert chosen() == "toy"


def test_the_environment_asks_for_a_backend_and_use_backend_overrules_it(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("auto", ""):
        monkeypatch.setenv("EMAX_BACKEND", name)
        assert chosen() == "toy"
    monkeypatch.setenv("EMAX_BACKEND", "portable")
    assert chosen() == "portable"
    with use_backend("toy"):
        assert chosen() == "toy"
    with use_backend("auto"):
        assert chosen() == "toy", "auto overrules the environment as well"
    monkeypatch.setenv("EMAX_BACKEND", "cpp")
    module, x = layer_and_input()
    with pytest.raises(BackendError, match=r"cpp was asked for, but .*`emax kernels build`$"):
        module(x)


def test_another_thread_does_not_see_the_context(toy: Toy) -> None:
    seen = []
    with use_backend("portable"):
        thread = threading.Thread(target=lambda: seen.append(chosen()))
        thread.start()
        thread.join()
        assert chosen() == "portable"
    assert seen == ["toy"]


def test_an_unknown_name_names_the_choices(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = layer_and_input()
    message = "unknown backend nonsense: .* one of auto, toy, triton, cpp, portable$"
    with pytest.raises(BackendError, match=message), use_backend("nonsense"):
        pass
    monkeypatch.setenv("EMAX_BACKEND", "nonsense")
    with pytest.raises(BackendError, match=message):
        module(x)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_backend_that_cannot_serve_is_an_error_with_its_reason(toy: Toy, mode: Any) -> None:
    module, x = layer_and_input(40)
    with use_backend("toy"), mode(), pytest.raises(BackendError) as raised:
        module(x)
    assert str(raised.value) == "the backend toy was asked for, but it serves 24 channels"


def test_children_that_must_be_called_are_an_error_for_the_other_backends(toy: Toy) -> None:
    module, x = layer_and_input()
    module.gn.register_forward_hook(lambda *_: None)
    with use_backend("toy"), pytest.raises(BackendError, match="toy was asked for, but gn has"):
        module(x)
    with use_backend("portable"):
        module(x)
    assert not toy.calls


# Computing --------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [make_emax, make_ema])
def test_another_backend_computes_both_passes(toy: Toy, layer: Any) -> None:
    module, x = layer(24, dtype=torch.float32), layer_and_input()[1].requires_grad_()
    out = module(x)
    assert toy.calls == {"forward": 1}
    out.sum().backward()
    assert toy.calls == {"forward": 1, "backward": 1}
    with torch.no_grad():
        module(x)
    assert toy.calls["forward"] == 2
    module.attention(x)
    assert toy.calls["forward"] == 2, "maps are the portable backend's"


@pytest.mark.parametrize("forward", ["toy", "portable"])
def test_the_backward_pass_takes_the_backend_of_its_forward_pass(toy: Toy, forward: str) -> None:
    module, x = layer_and_input()
    x.requires_grad_()
    for backward in ("toy", "portable", "auto"):
        toy.calls.clear()
        with use_backend(forward):
            out = module(x)
        with use_backend(backward):
            out.sum().backward()
        assert toy.calls["backward"] == (forward == "toy"), backward


def test_one_graph_can_have_layers_of_different_backends(toy: Toy) -> None:
    module, x = layer_and_input()
    x.requires_grad_()
    expected = torch.autograd.grad(module(module(x)).sum(), x)[0]
    toy.calls.clear()
    with use_backend("toy"):
        inner = module(x)
    with use_backend("portable"):
        out = module(inner)
    actual = torch.autograd.grad(out.sum(), x)[0]
    assert toy.calls == {"forward": 1, "backward": 1}
    assert torch.equal(actual, expected)


@pytest.mark.slow
def test_compile_traces_one_graph_with_another_backend(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its operations are in the graph: here a sine that the portable backend does not have."""
    graphs: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    sine = toy.backend._replace(forward=lambda x, *arguments: PORTABLE.forward(x.sin(), *arguments))
    monkeypatch.setattr(dispatch, "BACKENDS", (sine, *dispatch.BACKENDS[1:]))
    module, x = make_ema(24, dtype=torch.float32), layer_and_input()[1].requires_grad_()
    compiled = torch.compile(module, fullgraph=True, backend=look)
    actual = compiled(x)
    torch.compiler.reset()
    assert any("sin()" in graph for graph in graphs)
    torch.testing.assert_close(actual, module(x), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_compile_keeps_the_backend_that_it_was_compiled_with(toy: Toy) -> None:
    module, x = make_ema(24, dtype=torch.float32), layer_and_input()[1]
    with use_backend("portable"):
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        compiled(x)
    compiled(x)
    torch.compiler.reset()
    assert not toy.calls


def scripted(module: EMAX | EMA, x: Tensor) -> Any:
    return torch.jit.script(module)(x)


def traced(module: EMAX | EMA, x: Tensor) -> Any:
    with torch.no_grad():
        graph: Any = torch.jit.trace(module, (x,), check_trace=False)
        return graph(x)


def exported(module: EMAX | EMA, x: Tensor) -> Any:
    return torch.export.export(module, (x,)).module()(x)


def differentiated_forwards(module: EMAX | EMA, x: Tensor) -> Any:
    return torch.func.jvp(module, (x,), (torch.ones_like(x),))[0]


FOLLOWERS = [scripted, traced, exported, differentiated_forwards]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("follow", FOLLOWERS)
@pytest.mark.parametrize("layer", [make_emax, make_ema])
def test_what_follows_single_operations_gets_the_portable_ones(
    toy: Toy, layer: Any, follow: Any
) -> None:
    module, x = layer(24, dtype=torch.float32), layer_and_input()[1]
    actual = follow(module, x)
    assert not toy.calls
    torch.testing.assert_close(actual, module(x), rtol=1e-5, atol=1e-6)


def test_vmap_does_not_run_a_backend_that_does_not_see_into_it() -> None:
    """The C++ one says so: `test_cpp.py` has it loaded."""
    module, x = layer_and_input()
    together = torch.vmap(module)(torch.stack([x, 2 * x]))
    torch.testing.assert_close(together, torch.stack([module(x), module(2 * x)]))


# Input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 5, 4), (2, 24, 5), (2, 24, 3, 5, 4), (2, 12, 5, 4), (24,)])
@pytest.mark.parametrize("layer", [make_emax, make_ema])
def test_another_shape_is_refused_with_the_right_one(layer: Any, shape: tuple[int, ...]) -> None:
    module, x = layer(24), randn(*shape)
    calls = [
        module,
        module.attention,
        lambda x: emax(x, module.weights(), False),
        lambda x: emax_maps(x, module.weights(), False),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"x must be \[b, 24, h, w\], not ") as raised:
            call(x)
        assert str(list(shape)) in str(raised.value)


def test_a_command_with_an_unknown_backend_ends_with_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EMAX_BACKEND", "fast")
    Image.new("L", (28, 28)).save(tmp_path / "image.png")
    options = ["-m", "test_resnet_emax.fashion_mnist", str(tmp_path / "image.png")]
    assert main(["predict", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("emax predict: error: unknown backend fast: ")
    assert error.count("\n") == 1
