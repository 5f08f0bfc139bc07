"""From train.py through the hub and back: the same model, the same figures."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from hub_testing import REPO, Published, emax, in_new_process
from interpreters import Interpreter
from tiers import mostly_slow
from training_testing import VALIDATE

import emax_timm  # noqa: F401  (registers the models)

LOAD = """
import sys, timm, torch, emax_timm
model = timm.create_model(sys.argv[1], pretrained=True).eval()
x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(model(x), sys.argv[2])
print(model.pretrained_cfg["label_names"], model.pretrained_cfg["source"])
"""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # As the new processes have, for the number of threads decides the last bits.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def logits_of(folder: Path) -> torch.Tensor:
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        return model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_published_model_computes_the_same_elsewhere(published: Published, tmp_path: Path) -> None:
    for name in (f"hf-hub:{REPO}", f"hf-hub:{REPO}@v1"):
        environment = published.hub.environment(tmp_path / "cache")
        done = in_new_process(LOAD, tmp_path, name, tmp_path / "logits", **environment)
        assert done.stdout == "['cat', 'dog'] hf-hub\n", done.stderr
        found = torch.load(tmp_path / "logits", weights_only=True)
        assert torch.equal(found, logits_of(published.run))


def test_published_model_has_the_same_top1(
    published: Published, images: Path, tmp_path: Path
) -> None:
    summary = json.loads((published.run / "summary.json").read_text())["validation"]
    program = "import sys; from emax_timm.training import validate; sys.exit(validate())"
    arguments = ("--model", f"hf-hub:{REPO}", "--data-dir", images, "--split", "validation")
    environment = published.hub.environment(tmp_path)
    done = in_new_process(program, tmp_path, *arguments, "-j", "0", **environment)
    assert done.stdout == f"top1: {summary['top1']:.3f} top5: {summary['top5']:.3f}\n", done.stderr


def test_release_is_a_run_that_can_be_validated(
    published: Published, images: Path, programs: Interpreter, tmp_path: Path
) -> None:
    """The commands in the card."""
    summary = json.loads((published.run / "summary.json").read_text())["validation"]
    weights = published.run / "release" / "model.safetensors"
    arguments = ("--checkpoint", weights, "--data-dir", images)
    done = programs.run(VALIDATE, *arguments, cwd=tmp_path)
    assert done.last_line == f"top1: {summary['top1']:.3f} top5: {summary['top5']:.3f}"


def test_release_is_one_commit_with_a_tag(published: Published) -> None:
    repo = published.hub.repos[REPO]
    release = published.run / "release"
    assert len(repo.commits) == 2  # the hub's first, and the release
    assert repo.tags == {"v1": repo.head.name}
    files = {path.name: path.read_bytes() for path in release.iterdir()}
    assert repo.head.files == {**files, ".gitattributes": b"* lfs\n"}
    assert set(files) == {
        *("model.safetensors", "config.json", "config.yaml", "log.csv", "README.md"),
        "SHA256SUMS",
    }
    for line in files["SHA256SUMS"].decode().splitlines():
        value, name = line.split("  ")
        assert hashlib.sha256(files[name]).hexdigest() == value
    assert f"{REPO} v1 published: commit {repo.head.name}" in published.stdout


@pytest.mark.slow
def test_publishing_again_changes_nothing(published: Published) -> None:
    repo = published.hub.repos[REPO]
    before = (list(repo.commits), dict(repo.tags))
    options = ("--repo", REPO, "--push", "-j", "0")
    done = emax(
        *("publish", published.run, *options),
        **{"hub": published.hub, "home": published.home, "HF_TOKEN": "hf_rightright"},
    )
    assert "v1 was published before" in done.stdout, done.stderr
    assert (repo.commits, repo.tags) == before


@pytest.mark.parametrize("revision", mostly_slow(["", "@v1"], 1))
def test_repository_is_verified(revision: str, published: Published, tmp_path: Path) -> None:
    done = emax("weights", "verify", REPO + revision, hub=published.hub, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 6
    assert done.stdout.endswith("\nverified\n")


def test_damaged_file_of_a_repository_is_named(published: Published, tmp_path: Path) -> None:
    files = published.hub.repos[REPO].head.files
    card = files["README.md"]
    files["README.md"] = card + b" "
    done = emax("weights", "verify", REPO, hub=published.hub, home=tmp_path)
    files["README.md"] = card
    assert done.returncode == 2
    assert "README.md is damaged" in done.stderr


@pytest.mark.slow
def test_transformers_load_what_is_published(published: Published, tmp_path: Path) -> None:
    program = """
import sys, torch, emax_timm
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
processor = AutoImageProcessor.from_pretrained(sys.argv[1])
x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(model(x).logits, sys.argv[2])
print(list(model.config.id2label.values()))
"""
    environment = published.hub.environment(tmp_path)
    done = in_new_process(program, tmp_path, REPO, tmp_path / "logits", **environment)
    assert done.stdout == "['cat', 'dog']\n", done.stderr
    found = torch.load(tmp_path / "logits", weights_only=True)
    assert torch.equal(found, logits_of(published.run))


def test_token_is_nowhere(published: Published) -> None:
    token = b"hf_rightright"
    assert published.hub.authorizations == {f"Bearer {token.decode()}"}
    for path in published.run.rglob("*"):
        assert not path.is_file() or token not in path.read_bytes(), path
    assert token.decode() not in published.stdout
    head = published.hub.repos[REPO].head
    assert not any(token in content for content in head.files.values())
