"""Faults of the Hugging Face Hub: every one a distinct line, no random weights, no pickle.

All of them are injected in a local hub at once, a repository each, and one process loads them all
through the hub's client, which itself retries some for 23 seconds.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Commit, Fault, Hub, Repo, serve
from hub_testing import as_bytes, in_new_process
from tiers import mostly_slow

import emax_timm  # noqa: F401  (registers the models)

CONFIG = {
    "architecture": "test_resnet_emax",
    "num_classes": 3,
    "pretrained_cfg": {"num_classes": 3, "input_size": [3, 32, 32]},
}

# Loads each repository as weights of a config, as the index has them, and as hf-hub:; a line each.
LOAD = """
import json, sys, timm, emax_timm
from concurrent.futures import ThreadPoolExecutor
from emax_timm.training.loading import create_model

def of_config(name):
    overlay = {"hf_hub_id": name, "num_classes": 3, "input_size": (3, 32, 32)}
    return timm.create_model(
        "test_resnet_emax", num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay
    )

def of_name(name):
    return create_model(f"hf-hub:{name}", pretrained=True)

def outcome(load, name):
    try:
        return load(name).state_dict()["fc.bias"].tolist()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

with ThreadPoolExecutor(32) as pool:
    names = sys.argv[1:]
    first, second = (list(pool.map(lambda n: outcome(f, n), names)) for f in (of_config, of_name))
print(json.dumps({n: [a, b] for n, a, b in zip(names, first, second)}))
"""

# What each repository's fault is, and what the message says.
STATUSES = {
    "unauthorized": (401, "does not know your token"),
    "forbidden": (403, "forbids it"),
    "limited": (429, "too many requests"),
    "broken": (503, "out of order: try again later (503)"),
    "failing": (500, "out of order: try again later (500)"),
}
BODIES = {
    "short": ("short", "incomplete"),
    "cut": ("cut", "incomplete"),
    "flipped": ("wrong bytes", "is damaged (its sha256 is not the hub's)"),
    "silent": ("close", "cannot be reached"),
}
OTHERS = {
    "gated": "must be asked for",
    "private": "or a private one",
    "absent": "no such repository",
    "pickle": "no such file (404)",
    "old@v7": "no such revision",
}
EXPECTED = {
    **{name: text for name, (_, text) in {**STATUSES, **BODIES}.items()},
    **OTHERS,
}


class Outcome(dict):
    """What loading each repository gave, and the requests that it took."""

    requests: list[str]
    cache: Path


def weights(seed: int) -> tuple[bytes, list[float]]:
    """A file of weights, and its classifier's bias."""
    torch.manual_seed(seed)
    tensors = timm.create_model("test_resnet_emax", num_classes=3).state_dict()
    tensors["fc.bias"] = torch.rand(3)
    return as_bytes(tensors), tensors["fc.bias"].tolist()


def faulty_hub(canary: Path) -> Hub:
    hub = Hub()
    names = [*STATUSES, *BODIES, "gated", "private", "old", "good"]
    for seed, name in enumerate(names):
        content = weights(seed)[0]
        files = {"model.safetensors": content, "config.json": json.dumps(CONFIG).encode()}
        hub.repos[f"me/{name}"] = Repo([Commit(f"{seed:040x}", files)])
        if name in STATUSES:
            hub.faults.append(Fault(f"me/{name}/resolve", STATUSES[name][0]))
        if name in BODIES:
            digest = hashlib.sha256(content).hexdigest()
            hub.faults.append(Fault(f"GET cdn/{digest}", BODIES[name][0]))
    hub.private.add("me/private")
    gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model is restricted."}
    hub.faults.append(Fault("me/gated/resolve", 403, headers=gated))
    files = {"pytorch_model.bin": bomb(canary), "config.json": json.dumps(CONFIG).encode()}
    hub.repos["me/pickle"] = Repo([Commit("f" * 40, files)])
    return hub


def bomb(canary: Path) -> bytes:
    """A pickle that makes a file when it is read."""
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(canary), "w")

    return pickle.dumps({"fc.weight": Bomb()})


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    folder = tmp_path_factory.mktemp("hub")
    with serve(faulty_hub(folder / "canary")) as hub:
        names = [f"me/{name}" for name in (*EXPECTED, "good")]
        done = in_new_process(LOAD, folder, *names, **hub.environment(folder))
    assert done.returncode == 0, done.stderr
    found = Outcome({n.removeprefix("me/"): v for n, v in json.loads(done.stdout).items()})
    found.requests, found.cache = list(hub.requests), folder
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_fault_of_the_hub_is_one_line(name: str, outcome: Outcome) -> None:
    of_config, of_name = outcome[name]
    assert of_config.startswith(f"RuntimeError: cannot get model.safetensors of me/{name[:3]}")
    assert of_name.startswith(f"UsageError: model hf-hub:me/{name}: ")
    for message in (of_config, of_name):
        assert EXPECTED[name] in message
        assert "\n" not in message


@pytest.mark.slow
def test_faults_of_the_hub_are_distinct(outcome: Outcome) -> None:
    messages = {outcome[name][0].partition(": ")[2].partition(": ")[2] for name in EXPECTED}
    # A short and a cut body are both incomplete, an absent and a private repository look alike.
    assert len(messages) == len(EXPECTED) - 2, messages


@pytest.mark.slow
def test_sound_repository_loads_beside_faulty_ones(outcome: Outcome) -> None:
    bias = weights(len(STATUSES) + len(BODIES) + 3)[1]
    assert outcome["good"] == [bias, bias]


@pytest.mark.slow
def test_no_fault_of_the_hub_leads_to_a_pickle(outcome: Outcome) -> None:
    assert not [line for line in outcome.requests if ".bin" in line or ".pth" in line]
    assert not (outcome.cache / "canary").exists()


@pytest.mark.slow
def test_nothing_damaged_stays_in_the_cache(outcome: Outcome) -> None:
    blobs = [path for path in outcome.cache.rglob("blobs/*") if len(path.name) == 64]
    assert len(blobs) == 1  # the sound one
    for blob in blobs:
        assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name
    for path in outcome.cache.rglob("snapshots/*/model.safetensors"):
        assert path.exists(), "a link to nothing"


ONCE = """
import sys, timm, emax_timm
overlay = {"hf_hub_id": "me/model", "num_classes": 3, "input_size": (3, 32, 32)}
for _ in range(2):
    try:
        model = timm.create_model(
            "test_resnet_emax", num_classes=3, pretrained=True, pretrained_cfg_overlay=overlay
        )
        print(model.state_dict()["fc.bias"].tolist())
    except RuntimeError as error:
        print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("action", mostly_slow(["cut", "wrong bytes"], 1))
def test_damaged_download_is_made_anew(action: str, tmp_path: Path) -> None:
    content, bias = weights(0)
    files = {"me/model/model.safetensors": content}
    with serve(Hub(files, faults=[Fault("GET cdn/", action, times=1)])) as hub:
        done = in_new_process(ONCE, tmp_path, **hub.environment(tmp_path))
    first, second = done.stdout.splitlines()
    assert first.startswith("cannot get model.safetensors of me/model: "), done.stderr
    assert second == str(bias)


@pytest.mark.slow
def test_unreachable_and_offline_hub_with_and_without_a_cache(tmp_path: Path) -> None:
    content, bias = weights(0)
    with serve(Hub({"me/model/model.safetensors": content})) as hub:
        environment = hub.environment(tmp_path)
        done = in_new_process(ONCE, tmp_path, **environment)
    assert done.stdout == f"{bias}\n{bias}\n", done.stderr
    # The hub is gone.
    for more in ({}, {"HF_HUB_OFFLINE": "1"}):
        done = in_new_process(ONCE, tmp_path, **{**environment, **more})
        assert done.stdout == f"{bias}\n{bias}\n", done.stderr
    empty = tmp_path / "empty"
    offline = in_new_process(ONCE, empty, **{**hub.environment(empty), "HF_HUB_OFFLINE": "1"})
    assert offline.stdout.splitlines()[0].endswith("the hub's client is offline (HF_HUB_OFFLINE)")


@pytest.mark.slow
def test_unreachable_hub_without_a_cache(tmp_path: Path) -> None:
    with serve(Hub()) as hub:
        environment = hub.environment(tmp_path)
    done = in_new_process(ONCE, tmp_path, **environment)
    assert set(done.stdout.splitlines()) == {
        f"cannot get model.safetensors of me/model: the hub at {hub.url} cannot be reached"
    }


LISTED = """
import dataclasses, sys
from emax_timm.models import weights_index
entry = weights_index.WeightsEntry(
    "test_resnet_emax", "x", "me/model", "model.safetensors", sys.argv[1], sys.argv[2], "mit",
    cfg={"num_classes": 3},
)
weights_index.INDEX.append(entry)
"""


@pytest.mark.slow
@pytest.mark.parametrize("right", mostly_slow([True, False], 1))
def test_listed_weights_are_those_of_the_index(right: bool, tmp_path: Path) -> None:
    """The hub's own sums may be right, and yet the file another than the one that was listed."""
    content, bias = weights(0)
    digest = hashlib.sha256(content).hexdigest() if right else "0" * 64
    with serve(Hub({"me/model/model.safetensors": content})) as hub:
        revision = hub.repos["me/model"].head.name
        arguments = (revision, digest)
        done = in_new_process(LISTED + ONCE, tmp_path, *arguments, **hub.environment(tmp_path))
    if right:
        assert done.stdout == f"{bias}\n{bias}\n", done.stderr
    else:
        assert f"not {digest}" in done.stdout
        assert str(bias) not in done.stdout
    assert f"HEAD me/model/resolve/{revision}/model.safetensors" in hub.requests


UNFIT = """
import json, sys, timm, emax_timm
for name in ("lacks", "added", "shape", "cut", "header"):
    for num_classes in (3, 5):
        try:
            timm.create_model(f"hf-hub:me/{name}", pretrained=True, num_classes=num_classes)
            print("loaded")
        except Exception as error:
            print(" ".join(str(error).split()))
"""


@pytest.mark.slow
def test_weights_of_the_hub_that_do_not_fit(tmp_path: Path) -> None:
    """Also where timm itself would let that pass, for another number of classes."""
    tensors = timm.create_model("test_resnet_emax", num_classes=3).state_dict()
    gate = next(key for key in tensors if key.endswith("residual_gate"))
    whole = as_bytes(tensors)
    unfit = {
        "lacks": as_bytes({key: value for key, value in tensors.items() if key != gate}),
        "added": as_bytes({**tensors, "layer9.weight": torch.zeros(1)}),
        "shape": as_bytes({**tensors, "layer1.0.conv1.weight": torch.zeros(1, 2, 3, 3)}),
        "cut": whole[:-8],
        "header": b"\xff" * 7 + b"\x00" + whole[8:],
    }
    hub = Hub()
    for number, (name, content) in enumerate(unfit.items()):
        files = {"model.safetensors": content, "config.json": json.dumps(CONFIG).encode()}
        hub.repos[f"me/{name}"] = Repo([Commit(f"{number:040x}", files)])
    with serve(hub):
        done = in_new_process(UNFIT, tmp_path, **hub.environment(tmp_path))
    lines = done.stdout.splitlines()
    expected = [f"lack {gate}", "are for a model with layer9.weight", "layer1.0.conv1.weight"]
    expected += ["is no complete safetensors file"] * 2
    assert len(lines) == 10, done.stderr
    for number, line in enumerate(lines):
        assert expected[number // 2] in line
