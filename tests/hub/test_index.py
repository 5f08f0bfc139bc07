"""The index of weights: what `emax publish --index` adds to it, and the tags that follow."""

import json
from pathlib import Path

import pytest
import timm
from hub_testing import REPO, Published, emax, in_new_process
from training_testing import only_line, sum_up

import emax_timm  # noqa: F401  (registers the models)
from emax_cli import main
from emax_timm.models import weights_index
from emax_timm.models.weights_index import INDEX_FILE, WeightsEntry, read_index, write_index

KNOWN = {
    **{"model": "m", "tag": "t", "repo": "a/b", "file": "model.safetensors"},
    **{"revision": None, "sha256": None, "license": "mit"},
}


def test_index_file_is_as_it_would_be_written(tmp_path: Path) -> None:
    write_index(read_index(), tmp_path / "weights.json")
    assert (tmp_path / "weights.json").read_text() == INDEX_FILE.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "model.bin"}, "weights are safetensors files, not model.bin"),
        ({"file": "../model.safetensors"}, "no name of a file inside its folder"),
        ({"file": "/model.safetensors"}, "no name of a file inside its folder"),
        ({"cfg": {}}, "weights of the package's own have a sha256"),
        ({"repo": None}, "neither a repo nor a file"),
        ({"url": "x"}, "url"),
    ],
)
def test_index_refuses_an_entry(change: dict, message: str, tmp_path: Path) -> None:
    path = tmp_path / "weights.json"
    path.write_text(json.dumps([{**KNOWN, **change}]))
    with pytest.raises(ValueError, match=message):
        read_index(path)


@pytest.fixture(scope="module")
def index(published: Published, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index to which the run has been published."""
    path = tmp_path_factory.mktemp("index") / "weights.json"
    write_index([WeightsEntry(**KNOWN)], path)
    options = ("--repo", REPO, "--push", "--index", "--index-file", path, "-j", "0")
    for _ in range(2):  # a second time changes nothing
        done = emax(
            *("publish", published.run, *options),
            **{"hub": published.hub, "home": published.home, "HF_TOKEN": "hf_rightright"},
        )
        assert done.returncode == 0, done.stderr
    return path


@pytest.mark.slow
def test_publishing_adds_to_the_index(index: Path, published: Published) -> None:
    first, entry = read_index(index)
    assert first == WeightsEntry(**KNOWN)
    summary = json.loads((published.run / "summary.json").read_text())["validation"]
    assert (entry.name, entry.repo, entry.file) == (
        "test_resnet_emax.cats",
        REPO,
        "model.safetensors",
    )
    assert entry.revision == published.hub.repos[REPO].head.name
    sums = (published.run / "release" / "SHA256SUMS").read_text()
    assert f"{entry.sha256}  model.safetensors" in sums
    assert entry.metrics == {
        "validation_top1": round(summary["top1"], 3),
        "validation_top5": round(summary["top5"], 3),
    }
    assert entry.cfg is not None
    assert entry.cfg["label_names"] == ["cat", "dog"]
    assert entry.license == "apache-2.0"


@pytest.mark.slow
def test_listed_tag_loads_by_name(index: Path, published: Published, tmp_path: Path) -> None:
    """A package with that index: the tag, the classes, the weights; and nothing but them."""
    program = """
import sys
from pathlib import Path
path = Path(sys.argv[1])
# Before the package reads its own.
original = Path.read_text
Path.read_text = lambda self, *a, **k: original(path if self.name == "weights.json" else self)
import timm, torch, emax_timm
model = timm.create_model("test_resnet_emax.cats", pretrained=True)
assert timm.get_pretrained_cfg("test_resnet_emax").tag == "cats"
other = timm.create_model("local-dir:" + sys.argv[2], pretrained=True)
same = [torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values())]
print(all(same), model.num_classes, model.pretrained_cfg["label_names"], timm.list_models(
    "test_resnet_emax", pretrained=True))
"""
    arguments = (index, published.run)
    done = in_new_process(program, tmp_path, *arguments, **published.hub.environment(tmp_path))
    expected = "True 2 ('cat', 'dog') ['test_resnet_emax.cats']\n"
    assert done.stdout == expected, done.stderr
    entry = read_index(index)[1]
    assert f"HEAD {REPO}/resolve/{entry.revision}/model.safetensors" in published.hub.requests


def test_tags_are_those_of_the_index() -> None:
    """A tag exists if, and only if, its weights do."""
    tags = {
        name
        for module in ("emax_resnet", "emax_convnext", "emax_mobilenet")
        for name in timm.list_models(module=module, pretrained=True)
    }
    baselines = {entry.name for entry in weights_index.INDEX if entry.cfg is None}
    own = {entry.name for entry in weights_index.INDEX if entry.cfg is not None}
    for tag in tags - own:
        model, _, baseline_tag = tag.partition(".")
        assert f"{model.rpartition('_')[0]}.{baseline_tag.removesuffix('_warm')}" in baselines
    assert own <= tags


def test_run_with_arguments_is_not_for_the_index(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its name alone would not build it."""
    config = json.loads((run / "config.json").read_text())
    config["model_args"]["attn_kwargs"] = {"batch_vote": True}
    (run / "config.json").write_text(json.dumps(config))
    sum_up(run)
    options = ("--repo", REPO, "--push", "--index", "-j", "0")
    assert main(["publish", str(run), *options]) == 2
    assert "--index takes models that their name alone builds" in only_line(capsys.readouterr().err)
