"""Faults of publishing: what is unfit is refused, nothing is half-published, nothing escapes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hub_server import Commit, Fault, Hub, Repo, serve
from hub_testing import REPO, as_bytes, in_new_process
from tiers import mostly_slow
from torch import Tensor
from training_testing import only_line, sum_up

from emax_cli import main

# The library alone, for most of what can go wrong is in its requests.
UPLOAD = """
import sys
from pathlib import Path
from emax_timm.hub.upload import UploadError, upload
folder, repo = sys.argv[1:]
try:
    done = upload({p.name: p.read_bytes() for p in Path(folder).iterdir()}, repo, "Release")
    print(done.version, done.new)
except UploadError as error:
    print(error)
"""
FILES = {"model.safetensors": as_bytes({"a": torch.zeros(3)}), "README.md": b"# a\n"}


@pytest.fixture
def release(tmp_path: Path) -> Path:
    folder = tmp_path / "files"
    folder.mkdir()
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def released(repo: Repo) -> list[str]:
    """The names of the commits with a release, which is whole in each of them."""
    names = []
    for commit in repo.commits:
        found = {name: content for name, content in commit.files.items() if name in FILES}
        assert found in ({}, FILES)
        if found:
            names.append(commit.name)
    return names


# A request of an upload at which the client is killed, whether the hub has carried it out by then,
# and how many releases there are.
KILLS = [
    ("POST api/repos/create", False, 0),
    ("/preupload/", False, 0),
    ("PUT upload/", False, 0),
    ("POST verify", True, 0),
    ("/commit/", False, 0),
    ("/commit/", True, 1),
    ("/refs", True, 1),
    ("/tag/", False, 1),
    ("/tag/", True, 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("request_line", "carried_out", "releases"), KILLS)
def test_upload_killed_at_a_request(
    request_line: str, carried_out: bool, releases: int, release: Path, tmp_path: Path
) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    def kill(hub: Hub) -> bool:
        processes[0].kill()
        processes[0].wait()
        return not carried_out

    command = [sys.executable, "-W", "ignore", "-c", UPLOAD, str(release), REPO]
    with serve(Hub(faults=[Fault(request_line, kill, times=1)])) as hub:
        environment = {**os.environ, **hub.environment(tmp_path)}
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE))
        assert processes[0].wait(120) == -signal.SIGKILL
        with hub.lock:  # the answer to the dead is complete
            repo = hub.repos.get(REPO)
        assert len(released(repo) if repo else []) == releases
        again = in_new_process(UPLOAD, tmp_path, release, REPO, **hub.environment(tmp_path))
        tagged = request_line == "/tag/" and carried_out
        assert again.stdout == f"v1 {not tagged}\n", again.stderr
        assert released(hub.repos[REPO]) == [hub.repos[REPO].head.name]
        assert hub.repos[REPO].tags == {"v1": hub.repos[REPO].head.name}


@pytest.mark.slow
def test_upload_loses_a_race_and_is_repeated(release: Path, tmp_path: Path) -> None:
    def commit_first(hub: Hub) -> None:
        hub.commit(hub.repos[REPO], {"other.txt": b"1"})

    with serve(Hub(faults=[Fault("/commit/", commit_first, times=1)])) as hub:
        first = in_new_process(UPLOAD, tmp_path, release, REPO, **hub.environment(tmp_path))
        assert "somebody else has changed the repository" in only_line(first.stdout)
        assert released(hub.repos[REPO]) == []
        second = in_new_process(UPLOAD, tmp_path, release, REPO, **hub.environment(tmp_path))
        assert second.stdout == "v1 True\n", second.stderr
        assert hub.repos[REPO].head.files == {**FILES, "other.txt": b"1"}


@pytest.mark.slow
def test_new_weights_are_a_new_version(release: Path, tmp_path: Path) -> None:
    with serve(Hub()) as hub:
        for version in ("v1", "v2"):
            done = in_new_process(UPLOAD, tmp_path, release, REPO, **hub.environment(tmp_path))
            assert done.stdout == f"{version} True\n", done.stderr
            (release / "model.safetensors").write_bytes(as_bytes({"a": torch.ones(3)}))
        repo = hub.repos[REPO]
        assert repo.tags == {"v1": repo.commits[1].name, "v2": repo.commits[2].name}


@pytest.mark.slow
def test_repository_with_a_pickle_is_refused(release: Path, tmp_path: Path) -> None:
    with serve(Hub({f"{REPO}/pytorch_model.bin": b"x"})) as hub:
        done = in_new_process(UPLOAD, tmp_path, release, REPO, **hub.environment(tmp_path))
        assert "holds pytorch_model.bin" in only_line(done.stdout)
        assert len(hub.repos[REPO].commits) == 1


@pytest.mark.slow
def test_upload_without_a_token(release: Path, tmp_path: Path) -> None:
    with serve(Hub(token="hf_right")) as hub:
        environment = {**hub.environment(tmp_path), "HF_TOKEN": "hf_wrongwrong"}
        done = in_new_process(UPLOAD, tmp_path, release, REPO, **environment)
        assert "does not know your token" in only_line(done.stdout)
        assert "hf_wrongwrong" not in done.stdout + done.stderr
        assert hub.repos == {}


def weights_of(run: Path) -> dict[str, Tensor]:
    return safetensors.torch.load_file(run / "model.safetensors")


def with_value(value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors["fc.bias"].fill_(value)


UNFIT: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "NaN": (with_value(float("nan")), "fc.bias holds values that are not finite"),
    "beyond float16": (with_value(7e4), "fc.bias has a value of 7e+04, which float16 cannot"),
    "lacks": (lambda tensors: tensors.pop("fc.bias"), "it lacks fc.bias"),
    "added": (lambda t: t.update(extra=torch.zeros(1)), "it has extra, which the model lacks"),
    "shape": (lambda t: t.update({"fc.bias": torch.zeros(7)}), "fc.bias is [7]"),
}


def refused(capsys: pytest.CaptureFixture[str], run: Path, *options: str) -> str:
    """The one line with which `emax publish --push` refuses a run, having written nothing."""
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    repo = () if "--repo" in options else ("--repo", REPO)
    # There is no hub: that it is not asked shows in the message.
    assert main(["publish", str(run), *repo, "--push", "-j", "0", *options]) == 2
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before
    out, err = capsys.readouterr()
    assert out == ""
    return only_line(err)


@pytest.mark.parametrize("how", UNFIT)
def test_unfit_weights_are_not_published(
    how: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = UNFIT[how]
    tensors = weights_of(run)
    change(tensors)
    (run / "model.safetensors").write_bytes(as_bytes(tensors))
    sum_up(run)
    assert message in refused(capsys, run)


def test_damaged_weights_are_not_published(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert "is damaged" in refused(capsys, run)
    sum_up(run)
    path.write_bytes(content[:-4])
    sum_up(run)
    assert "is not a complete safetensors file" in refused(capsys, run)


def test_pickle_is_not_published(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "canary"), "w")

    for content in (pickle.dumps(Bomb()), pickle.dumps({"fc.bias": Bomb()})):
        (run / "model.safetensors").write_bytes(content)
        sum_up(run)
        assert "is not a complete safetensors file" in refused(capsys, run)
    torch.save({"fc.bias": Bomb()}, run / "model.safetensors")
    sum_up(run)
    assert "is not a complete safetensors file" in refused(capsys, run)
    assert not (tmp_path / "canary").exists()


def test_run_that_has_not_ended_is_not_published(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "summary.json").unlink()
    assert "the run has not ended" in refused(capsys, run)


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", "\x00"])
def test_run_with_a_damaged_file_is_not_published(
    name: str, content: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / name).write_text(content)
    assert str(run / name) in refused(capsys, run)


def test_run_of_another_model_than_its_config_is_not_published(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What others would build could not take the weights."""
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "architecture": "test_resnet"}))
    sum_up(run)
    assert "which the model lacks" in refused(capsys, run)


@pytest.mark.slow
def test_run_in_training_is_not_published(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program = (
        "import sys, time; from pathlib import Path; from emax_timm.files import lock_folder\n"
    )
    program += "with lock_folder(Path(sys.argv[1])): print('locked', flush=True); time.sleep(100)"
    command = [sys.executable, "-c", program, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "locked\n"
        assert "a process is training in" in refused(capsys, run)
        process.kill()


def test_weights_must_give_the_figures_of_the_run(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = json.loads((run / "summary.json").read_text())
    summary["validation"]["top1"] -= 10
    (run / "summary.json").write_text(json.dumps(summary))
    assert "where the run recorded" in refused(capsys, run)


def test_token_in_a_run_is_not_published(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run / "config.yaml"
    text = config.read_text().replace("experiment: run", "experiment: hf_abcdefghijklmnopqrstuvwx")
    config.write_text(text)
    line = refused(capsys, run)
    assert "config.yaml of the release would hold a token" in line
    assert "abcdef" not in line


@pytest.mark.parametrize(
    "repo", ["model", "../model", "a/b/c", "/etc/passwd", "me/..", "me/a b", "https://hub/me/a"]
)
def test_repo_is_org_and_name(repo: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--repo is ORG/NAME" in refused(capsys, run, "--repo", repo)


def test_folder_that_is_no_release_is_not_replaced(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    assert "is no release" in refused(capsys, run, "--output", str(folder))
    assert (folder / "thesis.txt").read_text() == "mine"


def test_index_without_push_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["publish", str(run), "--repo", REPO, "--index"]) == 2
    assert "a tag exists only if its weights do" in only_line(capsys.readouterr().err)


# Names in a repository that would lead out of the cache.
ESCAPES = ["../../../../escaped", "/tmp/escaped", "a/../../../escaped"]


@pytest.mark.parametrize("name", mostly_slow(ESCAPES))
def test_names_in_a_repository_do_not_escape(name: str, tmp_path: Path) -> None:
    sums = f"{'0' * 64}  {name}\n".encode()
    config = json.dumps(
        {
            "architecture": "test_resnet_emax",
            "num_classes": 3,
            "pretrained_cfg": {"num_classes": 3, "hf_hub_filename": f"{name}.safetensors"},
        }
    ).encode()
    home = tmp_path / "a" / "b" / "c" / "d" / "home"
    hub = Hub({"me/evil/SHA256SUMS": sums, "me/evil/config.json": config})
    hub.repos["me/evil"].head.files[f"{name}.safetensors"] = b"evil"
    with serve(hub):
        verify = "import sys; from emax_cli import main; sys.exit(main(sys.argv[1:]))"
        environment = hub.environment(home)
        done = in_new_process(verify, home, "weights", "verify", "me/evil", **environment)
        assert done.returncode == 2
        assert "is no name of a file inside its folder" in only_line(done.stderr)
        # `create_model` of timm, and of the programs, which names the one file that it takes.
        load = "import timm, emax_timm; timm.create_model('hf-hub:me/evil', pretrained=True)"
        done = in_new_process(load, home, **environment)
        assert "is no name of a file inside its folder" in done.stderr.splitlines()[-1]
        arguments = ("predict", shutil.__file__, "-m", "hf-hub:me/evil")
        done = in_new_process(verify, home, *arguments, **environment)
        assert "the repository has no such file" in only_line(done.stderr)
    assert not list(tmp_path.rglob("*escaped*"))
    assert not list(Path("/tmp").glob("*escaped*"))


def test_sources_in_a_config_of_a_repository_are_not_followed(tmp_path: Path) -> None:
    """A config cannot have files of this machine read, or a URL fetched."""
    secret = tmp_path / "secret.pth"
    torch.save({"fc.bias": torch.zeros(3)}, secret)
    cfg = {"num_classes": 3, "file": str(secret), "url": "http://127.0.0.1:9/a.pth"}
    cfg |= {"custom_load": True, "state_dict": {"fc.bias": 0}, "source": "file"}
    config = {"architecture": "test_resnet_emax", "num_classes": 3, "pretrained_cfg": cfg}
    hub = Hub({"me/evil/config.json": json.dumps(config).encode()})
    hub.repos["me/evil"] = Repo([Commit("1" * 40, hub.repos["me/evil"].head.files)])
    load = "import timm, emax_timm; timm.create_model('hf-hub:me/evil', pretrained=True)"
    with serve(hub):
        done = in_new_process(load, tmp_path, **hub.environment(tmp_path))
    assert re.search(r"cannot get model\.safetensors of me/evil", done.stderr.splitlines()[-1])
