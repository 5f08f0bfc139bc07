"""Warm starts through the real hub client, from a local hub and from its cache."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hub_server import COMMIT, Hub, serve
from hub_testing import as_bytes, in_new_process
from tiers import mostly_slow
from torch import Tensor, nn

import emax_timm  # noqa: F401  (registers the models)
from emax_cli import main
from emax_timm.models import weights_index

BASELINES = {
    "resnet18": "a1_in1k",
    "resnet10t": "c3_in1k",
    "convnext_atto": "d2_in1k",
    "mobilenetv2_100": "ra_in1k",
}


def randomised(model: nn.Module) -> nn.Module:
    """Weights as training leaves them: no zero norms, no initial statistics."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5)
        elif tensor.ndim == 1 and tensor.is_floating_point():
            tensor.normal_(std=0.1)
    return model


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of weights of each baseline: timm's models with random values."""
    folder = tmp_path_factory.mktemp("baselines")
    files = {}
    for name in BASELINES:
        files[name] = folder / f"{name}.safetensors"
        model = randomised(timm.create_model(name))
        files[name].write_bytes(as_bytes(model.state_dict()))
    return files


@pytest.fixture
def hub(baselines: dict[str, Path]) -> Hub:
    return Hub(
        {
            f"timm/{name}.{tag}/model.safetensors": baselines[name].read_bytes()
            for name, tag in BASELINES.items()
        }
    )


# Its arguments: the model, a file of its baseline's weights, and the baseline.
COMPARE = """
import logging, sys, timm, torch, emax_timm
logging.basicConfig(format="%(message)s")
name, file, baseline = sys.argv[1:]
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
plain = timm.create_model(baseline)
plain.load_state_dict(timm.models.load_state_dict(file))
model = timm.create_model(name, pretrained=True)
closed = all((p == 0).all() for n, p in model.named_parameters() if n.endswith("residual_gate"))
with torch.no_grad():
    print(torch.equal(model.eval()(x), plain.eval()(x)), closed, "file" in model.pretrained_cfg)
features = timm.create_model(name, pretrained=True, features_only=True)
with torch.no_grad():
    expected = plain.forward_intermediates(x, intermediates_only=True)
    pairs = zip(features.eval()(x), expected, strict=True)
    print(all(torch.equal(a, b) for a, b in pairs))
"""


@pytest.mark.parametrize(
    ("name", "baseline"),
    mostly_slow(
        [
            ("resnet18_emax", "resnet18"),
            ("resnet18_emax.a1_in1k_warm", "resnet18"),
            ("resnet18_cbam", "resnet18"),
            ("convnext_atto_msa", "convnext_atto"),
            ("convnext_atto_emax", "convnext_atto"),
            ("mobilenetv2_100_emax", "mobilenetv2_100"),
        ],
        1,
    ),
)
def test_warm_start_from_a_hub_computes_what_the_baseline_computes(
    name: str, baseline: str, hub: Hub, baselines: dict[str, Path], tmp_path: Path
) -> None:
    with serve(hub):
        result = in_new_process(
            COMPARE, tmp_path, name, baselines[baseline], baseline, HF_ENDPOINT=hub.url
        )
    assert result.stdout.split() == ["True", "True", "False", "True"], result.stderr
    assert (
        f"the weights of timm/{baseline}.{BASELINES[baseline]} with its attention closed"
        in result.stderr
    )
    assert "unverified" in result.stderr
    # Downloaded once, and nothing else is asked for: no pickle.
    asked = {request.partition(" ")[2] for request in hub.requests if " api/" not in request}
    digest = hashlib.sha256(baselines[baseline].read_bytes()).hexdigest()
    assert asked == {
        f"timm/{baseline}.{BASELINES[baseline]}/resolve/main/model.safetensors",
        f"cdn/{digest}",
    }


def test_warm_start_from_the_hubs_cache(baselines: dict[str, Path], tmp_path: Path) -> None:
    repo = tmp_path / "hub" / "models--timm--resnet18.a1_in1k"
    content = baselines["resnet18"].read_bytes()
    blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = repo / "snapshots" / COMMIT / "model.safetensors"
    for path in (blob, snapshot, repo / "refs" / "main"):
        path.parent.mkdir(parents=True)
    blob.write_bytes(content)
    snapshot.symlink_to(Path("..", "..", "blobs", blob.name))
    (repo / "refs" / "main").write_text(COMMIT)
    arguments = ("resnet18_emax", baselines["resnet18"], "resnet18")
    result = in_new_process(COMPARE, tmp_path, *arguments, HF_HUB_OFFLINE="1")
    assert result.stdout.split() == ["True", "True", "False", "True"], result.stderr


LOAD = """
import sys, timm, emax_timm
try:
    timm.create_model("resnet18_emax", pretrained=True)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("status", mostly_slow([401, 403, 404], 0))
def test_warm_start_from_a_hub_that_refuses(status: int, tmp_path: Path) -> None:
    with serve(Hub(status=status)) as hub:
        result = in_new_process(LOAD, tmp_path, HF_ENDPOINT=hub.url)
    assert result.stdout.startswith("cannot get model.safetensors of timm/resnet18.a1_in1k: ")
    assert result.stdout.count("\n") == 1
    assert not any(request.endswith(".bin") for request in hub.requests)


def test_warm_start_offline_without_a_cache(tmp_path: Path) -> None:
    result = in_new_process(LOAD, tmp_path, HF_HUB_OFFLINE="1")
    assert "offline" in result.stdout


PINNED = (
    """
import dataclasses, sys, timm, emax_timm, logging
from emax_timm.models import weights_index
logging.basicConfig(format="%(message)s")
revision, sha256 = sys.argv[1:]
weights_index.INDEX[:] = [
    dataclasses.replace(entry, revision=revision, sha256=sha256) for entry in weights_index.INDEX
]
"""
    + LOAD
)


@pytest.mark.parametrize("right", [True, False])
def test_warm_start_is_verified_where_it_is_pinned(
    right: bool, hub: Hub, baselines: dict[str, Path], tmp_path: Path
) -> None:
    digest = hashlib.sha256(baselines["resnet18"].read_bytes()).hexdigest()
    with serve(hub):
        result = in_new_process(
            PINNED, tmp_path, COMMIT, digest if right else "0" * 64, HF_ENDPOINT=hub.url
        )
    assert f"HEAD timm/resnet18.a1_in1k/resolve/{COMMIT}/model.safetensors" in hub.requests
    if right:
        assert result.stdout == ""
        assert "trained; verified" in result.stderr
    else:
        assert f"its sha256 is {digest}, not {'0' * 64}" in result.stdout


def overlay(file: Path) -> dict[str, Any]:
    return {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file)}}


@pytest.mark.slow
@pytest.mark.parametrize("baseline", BASELINES)
def test_warm_start_adapts_stem_and_head(baseline: str, baselines: dict[str, Path]) -> None:
    options = {"num_classes": 5, "in_chans": 1, **overlay(baselines[baseline])}
    model: Any = timm.create_model(f"{baseline}_emax", **options)
    plain = timm.create_model(baseline, **options)
    head = model.pretrained_cfg["classifier"]
    for name, value in plain.state_dict().items():
        if not name.startswith(head):
            assert torch.equal(model.state_dict()[name], value), name
    headless: Any = timm.create_model(f"{baseline}_emax", **{**options, "num_classes": 0})
    assert headless.num_classes == 0


def changed(tensors: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    tensors = dict(tensors)
    emax = timm.create_model("resnet18_emax").state_dict()
    if how == "a baseline that lacks a key":
        del tensors["layer1.0.conv1.weight"]
    elif how == "a baseline with another key":
        tensors["layer9.weight"] = torch.zeros(1)
    elif how == "a baseline with one key of EMAX":
        tensors["layer1.0.se.gamma"] = torch.zeros(1)
    elif how == "a truncated EMAX checkpoint":
        del emax["layer4.1.se.residual_gate"]
        tensors = emax
    elif how == "another attention":
        tensors = timm.create_model("resnet18_cbam").state_dict()
    elif how == "another width":
        tensors["layer1.0.conv1.weight"] = torch.zeros(64, 32, 3, 3)
    return tensors


@pytest.mark.parametrize("num_classes", mostly_slow([1000, 5], 0))
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("a baseline that lacks a key", "lack layer1.0.conv1.weight$"),
        ("a baseline with another key", "for a model with layer9.weight$"),
        ("a baseline with one key of EMAX", r"lack layer1\.0\.se\..* and \d+ more keys$"),
        ("a truncated EMAX checkpoint", r"lack layer4\.1\.se\.residual_gate$"),
        ("another attention", r"lack layer1\.0\.se\."),
        ("another width", "size mismatch for layer1.0.conv1.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    how: str, message: str, num_classes: int, baselines: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "changed.safetensors"
    file.write_bytes(as_bytes(changed(safetensors.torch.load_file(baselines["resnet18"]), how)))
    with pytest.raises(RuntimeError, match=message):
        timm.create_model("resnet18_emax", num_classes=num_classes, **overlay(file))


def test_warm_start_needs_a_gate(baselines: dict[str, Path]) -> None:
    with pytest.raises(RuntimeError, match="lack"):
        timm.create_model(
            "resnet18_cbam", attn_kwargs={"gate_init": None}, **overlay(baselines["resnet18"])
        )


def test_trained_weights_keep_their_gates(tmp_path: Path) -> None:
    model = randomised(timm.create_model("resnet10t_emax"))
    file = tmp_path / "trained.safetensors"
    file.write_bytes(as_bytes(model.state_dict()))
    copy = timm.create_model("resnet10t_emax", **overlay(file))
    for name, value in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], value), name


def test_weights_without_counters_of_batches_load(
    baselines: dict[str, Path], tmp_path: Path
) -> None:
    tensors = safetensors.torch.load_file(baselines["resnet18"])
    file = tmp_path / "old.safetensors"
    file.write_bytes(as_bytes({k: v for k, v in tensors.items() if "num_batches" not in k}))
    timm.create_model("resnet18_emax", **overlay(file))


def test_index_names_the_baselines_own_weights() -> None:
    baselines = [entry for entry in weights_index.INDEX if entry.cfg is None]
    assert len(baselines) == 21
    for entry in baselines:
        cfg = timm.models.get_pretrained_cfg(f"{entry.model}.{entry.tag}")
        assert cfg is not None, entry
        assert (cfg.hf_hub_id, cfg.license) == (entry.repo, entry.license)
        # Not for commercial use only, nor unknown.
        assert entry.license in ("apache-2.0", "bsd-3-clause", "mit")
        assert entry.sha256 is None or len(entry.sha256) == 64
        # The baseline's default tag is the model's.
        assert timm.models.get_pretrained_cfg(entry.model).tag == entry.tag  # type: ignore
        assert f"{entry.model}_emax.{entry.tag}_warm" in timm.list_pretrained()
    assert not timm.list_pretrained("convnextv2*_emax")


def test_pretrained_without_weights_raises() -> None:
    with pytest.raises(RuntimeError, match="No pretrained weights exist"):
        timm.create_model("convnextv2_atto_emax", pretrained=True)


PIN = "import sys; from emax_cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_pin_fills_in_what_the_hub_says(hub: Hub, tmp_path: Path) -> None:
    index = tmp_path / "weights.json"
    pinned = {"revision": "f" * 40, "sha256": "e" * 64}
    entry = {"tag": "x", "file": "model.safetensors", "license": "mit"}
    unknown = {"revision": None, "sha256": None}
    entries = [
        {"model": "resnet18", "repo": "timm/resnet18.a1_in1k", **entry, **unknown},
        {"model": "kept", "repo": "timm/convnext_atto.d2_in1k", **entry, **pinned},
        {"model": "gone", "repo": "timm/gone", **entry, **unknown},
    ]
    index.write_text(json.dumps(entries))
    with serve(hub):
        command = ("weights", "pin", "--index", index)
        result = in_new_process(PIN, tmp_path, *command, HF_ENDPOINT=hub.url)
    assert result.returncode == 1
    assert result.stderr.startswith("emax weights pin: timm/gone: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == f"2 of 3 files are pinned in {index}\n"
    content = hub.files["timm/resnet18.a1_in1k/model.safetensors"]
    entries[0] |= {"revision": COMMIT, "sha256": hashlib.sha256(content).hexdigest()}
    assert json.loads(index.read_text()) == entries
    assert len(index.read_text().splitlines()) == len(entries) + 2
    assert not any("convnext_atto" in request for request in hub.requests)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"model": "a"}]'])
def test_pin_refuses_what_is_no_index(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "weights.json"
    index.write_text(content)
    assert main(["weights", "pin", "--index", str(index)]) == 2
    assert capsys.readouterr().err.startswith("emax weights: error: ")
    assert index.read_text() == content
