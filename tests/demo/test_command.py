"""What `emax demo` refuses before it loads a model."""

import importlib.util
import socket

import pytest
from training_testing import only_line

from emax_cli import main
from emax_timm.demo import command


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["demo", "--model", "no_such_model", *arguments]) == 2
    return only_line(capsys.readouterr().err)


@pytest.mark.parametrize("package", command.PACKAGES)
def test_missing_package_names_the_extra(
    package: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else 1)
    line = refused(capsys, "--port", "0")
    name = command.PACKAGES[package]
    assert line == (
        f"emax demo: error: the demo needs the package {name}: pip install 'emax-timm[demo]'"
    )


@pytest.fixture
def _all_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: 1)


@pytest.mark.usefixtures("_all_packages")
def test_port_that_is_taken_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert f"cannot serve on 127.0.0.1:{port}: " in refused(capsys, "--port", str(port))


@pytest.mark.usefixtures("_all_packages")
def test_address_of_another_machine_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert "cannot serve on 192.0.2.1:0: " in refused(capsys, "--host", "192.0.2.1", "--port", "0")


def test_port_out_of_range_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "port" in refused(capsys, "--port", "65536")
