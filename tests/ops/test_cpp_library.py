"""The library of C++ operators: what may stand in the way of building, loading and using it."""

import contextlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emax_testing import make_emax, randn

from emax_cli import main
from emax_timm.attention import EMAX
from emax_timm.ops import BackendError, dispatch, use_backend
from emax_timm.ops.cpp import library
from emax_timm.ops.cpp.library import BuildError


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of libraries; nothing has been tried yet in this process."""
    home = tmp_path / "kernels"
    monkeypatch.setenv("EMAX_KERNELS_DIR", str(home))
    monkeypatch.delenv("EMAX_BACKEND", raising=False)
    monkeypatch.setattr(library, "_problem", library._NOT_TRIED)
    return home


def served_by() -> str:
    module, x = make_emax(24, dtype=torch.float32), randn(2, 24, 5, 4, dtype=torch.float32)
    return dispatch.choose(x, module.weights()).name


# Where it is ------------------------------------------------------------------------------------


def test_the_path_names_what_the_library_depends_on(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = library.library_path()
    assert path.parent == home
    assert f"-torch{torch.__version__}-" in path.name
    assert torch.backends.cpu.get_cpu_capability().replace(" ", "_") in path.name
    changed = tmp_path / "forward.cpp"
    changed.write_bytes(library.SOURCES[0].read_bytes() + b"\n")
    monkeypatch.setattr(library, "SOURCES", [changed, *library.SOURCES[1:]])
    assert library.library_path() != path, "another source is another library"


def test_without_a_folder_it_is_in_the_users_cache(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("EMAX_KERNELS_DIR")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert library.library_path().parent == tmp_path / ".cache" / "emax_timm"


# Without it -------------------------------------------------------------------------------------


def test_without_a_library_the_portable_backend_serves_and_nothing_is_said(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert served_by() == "portable"
    assert not caplog.records
    assert not home.exists()


@pytest.mark.parametrize("how", ["environment", "context"])
def test_to_ask_for_it_is_then_an_error_that_says_what_to_run(
    home: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = EMAX(24), randn(2, 24, 5, 4, dtype=torch.float32)
    if how == "environment":
        monkeypatch.setenv("EMAX_BACKEND", "cpp")
    context = use_backend("cpp") if how == "context" else contextlib.nullcontext()
    with context, pytest.raises(BackendError, match=r"run `emax kernels build`$") as raised:
        module(x)
    assert "\n" not in str(raised.value)


def test_an_unknown_backend_names_the_choices(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMAX_BACKEND", "nonsense")
    with pytest.raises(BackendError, match=r"nonsense: .* one of auto, .*cpp, portable$"):
        served_by()


def test_a_library_that_cannot_be_loaded_is_named_once_and_not_used(
    home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = library.library_path()
    home.mkdir()
    path.write_bytes(b"\x7fELF, but not to the end")
    with caplog.at_level(logging.WARNING):
        assert served_by() == served_by() == "portable"
    (record,) = caplog.records
    message = record.getMessage()
    assert str(path) in message
    assert message.endswith("run `emax kernels build`")
    assert "\n" not in message
    with use_backend("cpp"), pytest.raises(BackendError, match="cannot be loaded"):
        served_by()


# In a process whose first use of EMAX is a compiled one: opening files is nothing to trace.
COMPILE_FIRST = """
import torch
from emax_timm.attention import EMA
layer, x = EMA(8), torch.randn(2, 8, 5, 7, requires_grad=True)
torch.compile(layer, backend="eager", fullgraph=True)(x).sum().backward()
"""


@pytest.mark.slow
def test_the_first_use_may_be_a_compiled_one(home: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE_FIRST],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# Building it ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("fault", ["no compiler", "compiler fails", "no folder"])
def test_a_failed_build_is_one_line_and_leaves_nothing(
    fault: str,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CXX", "false" if fault == "compiler fails" else "no-such-compiler")
    if fault == "no folder":
        home.write_text("a file")
    assert main(["kernels", "build"]) == 2
    printed = capfd.readouterr()
    # Of torch's extension loader there may be warnings above it.
    assert printed.err.splitlines()[-1].startswith("emax kernels: error: ")
    assert "Traceback" not in printed.err
    assert "built" not in printed.out
    assert home.is_file() or list(home.iterdir()) == []


def test_a_build_puts_the_library_in_place_in_one_step(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a compiler that writes what it is asked for."""
    from torch.utils import cpp_extension

    folders = []

    def compile_(name: str, sources: list[str], build_directory: str, **options: object) -> None:
        assert not library.library_path().exists()
        assert len(sources) == len(library.SOURCES)
        folders.append(Path(build_directory))
        (folders[-1] / f"{name}.so").write_bytes(b"a library")

    monkeypatch.setattr(cpp_extension, "load", compile_)
    assert main(["kernels", "build"]) == 0
    assert str(library.library_path()) in capsys.readouterr().out
    assert list(home.iterdir()) == [library.library_path()]
    assert library.library_path().read_bytes() == b"a library"
    assert folders[0].parent == home, "on the same file system, which a rename needs"


def test_of_a_compilers_errors_the_first_is_told(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch.utils import cpp_extension

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("Error building extension\n\nx.cpp:1: error: no `at`\nerror: more")

    monkeypatch.setattr(cpp_extension, "load", fail)
    with pytest.raises(BuildError) as raised:
        library.build()
    assert str(raised.value) == "the kernels cannot be built: x.cpp:1: error: no `at`"
