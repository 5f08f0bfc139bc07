"""`emax weights verify` of folders."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hub_testing import REPO, as_bytes
from training_testing import only_line

from emax_cli import main


@pytest.fixture(scope="module")
def original(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "release"
    options = ("--repo", REPO, "--output", str(folder), "-j", "0")
    assert main(["publish", str(trained), *options]) == 0
    return folder


@pytest.fixture
def release(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "release"))


def resum(folder: Path, name: str, content: bytes) -> None:
    """Put a file into a release, with the right sum."""
    import hashlib

    (folder / name).write_bytes(content)
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    lines = [line for line in lines if not line.endswith(f"  {name}")]
    lines.append(f"{hashlib.sha256(content).hexdigest()}  {name}")
    (folder / "SHA256SUMS").write_text("\n".join(lines) + "\n")


def flip(folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


def with_tensor(name: str, value: torch.Tensor) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = safetensors.torch.load_file(folder / "model.safetensors")
        resum(folder, "model.safetensors", as_bytes({**tensors, name: value}))

    return change


def link_out(folder: Path) -> None:
    target = folder.parent / "elsewhere"
    (folder / "log.csv").rename(target)
    (folder / "log.csv").symlink_to(target)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "flip": (flip, "config.yaml is damaged"),
    "missing": (lambda f: (f / "log.csv").unlink(), "log.csv is missing"),
    "no sums": (lambda f: (f / "SHA256SUMS").unlink(), "is no folder of a release"),
    "link": (link_out, "log.csv is a link out of its folder"),
    "pickle": (lambda f: (f / "pytorch_model.bin").write_bytes(b"x"), "may be a pickle"),
    "header": (
        lambda f: resum(f, "model.safetensors", b"\xff" * 8 + b"{}"),
        "not a complete safetensors file",
    ),
    "added": (with_tensor("x", torch.zeros(1)), "it has x, which the model lacks"),
    "infinite": (with_tensor("fc.bias", torch.tensor([0, torch.inf])), "not finite"),
    "config": (lambda f: resum(f, "config.json", b"[]"), "does not describe a model"),
    "hub in config": (
        lambda f: resum(f, "config.json", b'{"architecture": "hf-hub:a/b", "num_classes": 2}'),
        "does not describe a model",
    ),
    "unknown model": (
        lambda f: resum(f, "config.json", b'{"architecture": "resnet19", "num_classes": 2}'),
        "Unknown model",
    ),
    "no weights": (
        lambda f: (f / "SHA256SUMS").write_text(
            "\n".join(
                line
                for line in (f / "SHA256SUMS").read_text().splitlines()
                if "model.safetensors" not in line
            )
        ),
        "lacks model.safetensors",
    ),
}


def test_release_is_verified(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "verify", str(release)]) == 0
    assert capsys.readouterr().out.endswith("verified\n")


@pytest.mark.parametrize("how", FAULTS)
def test_fault_in_a_release_is_named(
    how: str, release: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FAULTS[how]
    change(release)
    assert main(["weights", "verify", str(release)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in only_line(err)


def test_same_run_gives_the_same_release(original: Path, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    options = ("--repo", REPO, "--output", str(folder), "-j", "0")
    assert main(["publish", str(trained), *options]) == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in original.iterdir()
    }


def test_older_release_in_the_folder_is_replaced(release: Path, trained: Path) -> None:
    (release / "log.csv").write_text("old")
    options = ("--repo", REPO, "--output", str(release), "-j", "0")
    assert main(["publish", str(trained), *options]) == 0
    assert (release / "log.csv").read_bytes() == (trained / "log.csv").read_bytes()


def test_unknown_target_has_a_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["weights", "verify", "resnet18_emax.a1_in1k_worm"]) == 2
    assert "the nearest of these is resnet18_emax.a1_in1k_warm" in capsys.readouterr().err
