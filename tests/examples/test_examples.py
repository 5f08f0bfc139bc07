"""The examples as users start them, with less work, and the scenes that they are made of."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torchvision.ops import box_iou, masks_to_boxes

from emax_timm.samples import scenes
from emax_timm.training import train

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str | Path) -> Any:
    """Run `python examples/NAME.py` with these arguments in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=280,
    )


def table(text: str) -> dict[str, list[float]]:
    """The lines of a name and numbers."""
    rows = re.findall(r"^ *([a-z][a-z ]*?) ((?: +\d\.\d{3})+)$", text, flags=re.MULTILINE)
    return {name: [float(number) for number in numbers.split()] for name, numbers in rows}


def needs(package: str) -> None:
    """Skip where a package of the extra is missing; in CI that fails the test."""
    if not os.environ.get("CI"):
        pytest.importorskip(package)


@pytest.fixture(scope="module")
def items() -> Any:
    return scenes.load_items("test")


def test_items_have_the_groups_of_their_classes(items: Any) -> None:
    assert items.pixels.shape == (1000, 28, 28)
    # A hundred of each of ten classes: five of them tops, one trousers, three shoes, one bags.
    assert np.bincount(items.groups).tolist() == [0, 500, 100, 300, 100]


def test_items_of_the_splits_differ(items: Any) -> None:
    training = scenes.load_items("train").pixels
    assert len(training) == 4000
    assert not {image.tobytes() for image in items.pixels} & {image.tobytes() for image in training}


def test_scene_boxes_are_those_of_its_masks(items: Any) -> None:
    random = np.random.default_rng(0)
    counts = set()
    for _ in range(50):
        scene = scenes.compose(items, random)
        counts.add(len(scene.boxes))
        numbers = torch.arange(1, len(scene.boxes) + 1)
        masks = scene.instances == numbers[:, None, None]
        # torchvision's right and lower edges are inclusive.
        boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
        torch.testing.assert_close(scene.boxes, boxes)
        overlap = box_iou(boxes, boxes).fill_diagonal_(0)
        assert overlap.max() == 0
        for mask, group in zip(masks, scene.groups, strict=True):
            assert (scene.mask[mask] == group).all()
        assert (scene.mask[scene.instances == 0] == 0).all()
        assert scene.instances.max() == len(boxes)
    assert counts >= {2, 3, 4}


def test_scene_shows_the_items_themselves(items: Any) -> None:
    def tight(pixels: np.ndarray) -> bytes:
        rows, columns = np.nonzero(pixels)
        return pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].tobytes()

    groups = {
        tight(pixels): group for pixels, group in zip(items.pixels, items.groups, strict=True)
    }
    random = np.random.default_rng(0)
    for _ in range(10):
        scene = scenes.compose(items, random, side=(28, 28))
        image = (scene.image[0] * 255).round().byte()
        canvas = image[scene.instances == 0].float()
        assert canvas.max() < 96
        assert canvas.std() > 20
        for number, (box, group) in enumerate(zip(scene.boxes, scene.groups, strict=True), 1):
            x1, y1, x2, y2 = box.int().tolist()
            shown = torch.where(scene.instances == number, image, 0)[y1:y2, x1:x2]
            assert groups[shown.numpy().tobytes()] == group


def test_scenes_follow_from_the_seed(items: Any) -> None:
    first, again, other = (scenes.compose(items, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.image, other.image)
    torch.manual_seed(0)
    assert torch.equal(scenes.compose(items, np.random.default_rng(0)).image, first.image)


def test_scene_leaves_out_what_has_no_place(items: Any) -> None:
    random = np.random.default_rng(0)
    scene = scenes.compose(items, random, size=40, count=(4, 4), side=(36, 40))
    assert 1 <= len(scene.boxes) < 4
    assert scene.image.shape == (1, 40, 40)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("segmentation", "segmentation_models_pytorch"),
        ("text", "babel"),
        ("transformers_timm", "transformers"),
    ],
)
def test_example_says_which_extra_is_missing(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # to import it is then a ModuleNotFoundError
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert package in line
    assert "pip install 'emax-timm[downstream]'" in line


@pytest.mark.slow
def test_detection_learns(tmp_path: Path) -> None:
    done = run_example("detection", "--steps", "24", "--scenes", "10", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert list(rows) == ["top", "trousers", "shoe", "bag", "mean"]
    untrained, trained = rows["mean"]
    assert untrained < 0.02
    assert trained > 0.05
    weights = safetensors.torch.load_file(tmp_path / "detector.safetensors")
    assert any("residual_gate" in key for key in weights)
    with Image.open(tmp_path / "detections.png") as picture:
        assert np.asarray(picture).std() > 20


@pytest.mark.slow
def test_segmentation_learns(tmp_path: Path) -> None:
    needs("segmentation_models_pytorch")
    done = run_example("segmentation", "--steps", "40", "--scenes", "16", "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert list(rows) == ["canvas", "top", "trousers", "shoe", "bag", "mean"]
    untrained, outlined, trained = rows["mean"]
    assert untrained < 0.3
    assert rows["canvas"][1] == 1.0
    assert trained > outlined + 0.05
    weights = safetensors.torch.load_file(tmp_path / "unet.safetensors")
    assert any("residual_gate" in key for key in weights)
    with Image.open(tmp_path / "masks.png") as picture:
        assert len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 20


def test_clips_show_the_group_and_the_motion_of_their_class() -> None:
    video = runpy.run_path(str(EXAMPLES / "video.py"))
    groups = np.arange(1, 5)
    pixels = np.broadcast_to(60 * groups[:, None, None], (4, 28, 28)).astype(np.uint8)
    squares = scenes.Items(pixels, groups)  # whose brightness is their group
    clips, classes = video["batch"](squares, np.random.default_rng(0), 64)
    assert clips.shape == (64, 1, 8, 32, 32)
    assert set(classes.tolist()) == set(range(16))
    directions = {0: (0, -1), 1: (0, 1), 2: (-1, 0), 3: (1, 0)}  # left, right, up, down
    for clip, number in zip(clips[:, 0], classes.tolist(), strict=True):
        same = {}
        for motion, (down, right) in directions.items():
            for speed in (1, 2, 3):
                moved = clip[:-1].roll((down * speed, right * speed), (1, 2))
                same[motion, speed] = (moved == clip[1:]).sum((1, 2))  # the noise never is
        (motion, _), shown = max(same.items(), key=lambda item: int(item[1].sum()))
        assert shown.tolist() == [400] * 7  # the whole item of 20 x 20, from frame to frame
        brightness = (clip * scenes.STD + scenes.MEAN).flatten().mode().values
        assert round(float(brightness) * 255 / 60) == 1 + number // 4
        assert motion == number % 4


@pytest.mark.slow
def test_video_needs_more_than_single_frames() -> None:
    done = run_example("video", "--seeds", "2")
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert list(rows) == ["single frames", "clips", "clips with emax"]
    assert re.search(r"^change by emax, paired: [+-]\d\.\d{3} \+- \d\.\d{3}$", done.stdout, re.M)
    *_, item, motion = rows["single frames"]
    assert item > 0.35  # chance is a quarter, for the motion as well
    assert motion < 0.35
    for name in ("clips", "clips with emax"):
        assert rows[name][3] > 0.4


@pytest.mark.slow
def test_transformers_computes_what_timm_does(tmp_path: Path) -> None:
    needs("transformers")
    done = run_example("transformers_timm", "--steps", "50", "--limit", "100", "--output", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    differences = re.findall(r"^  (\w+), (\w+) +(\S+)$", done.stdout, flags=re.MULTILINE)
    assert [name for name, _, _ in differences] == ["inputs", "logits", "features", "features"]
    assert all(float(value) < 1e-4 for _, _, value in differences)
    assert "attn_stages: config.json [2, 3], as loaded [2, 3]" in done.stdout
    ours, theirs = map(float, re.findall(r"(?:timm|transformers) (\d\.\d{3})", done.stdout))
    assert ours == theirs > 0.2  # twice chance
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["attn_stages"] == [2, 3]
    model: Any = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert (model.num_classes, model.pretrained_cfg["input_size"]) == (10, (1, 32, 32))


@pytest.mark.slow
def test_linear_probe_compares_a_checkpoint(tmp_path: Path) -> None:
    options = ["--epochs", "2", "--val-fraction", "0.5", "--output", str(tmp_path)]
    options += ["--model-kwargs", "channels=[16,32,64,128]"]
    assert train(["-c", "quickstart", *options]) == 0
    checkpoint = tmp_path / "quickstart" / "model.safetensors"
    options = ["--limit", "1000", "--checkpoint", checkpoint]
    done = run_example("linear_probe", *options, "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    rows = table(done.stdout)
    assert list(rows) == ["raw pixels", "random weights", "checkpoint"]
    assert min(min(row) for row in rows.values()) > 0.3  # chance is 0.1
    assert rows["checkpoint"][0] > rows["random weights"][0] + 0.05
    features = safetensors.torch.load_file(tmp_path / "features.safetensors")
    assert features["train_features"].shape == (1000, 128)
    assert features["test_labels"].bincount().tolist() == [100] * 10
    images, model = torch.zeros(1, 1, 32, 32), timm.create_model(f"local-dir:{checkpoint.parent}")
    assert model.eval()(images).shape == (1, 10)  # the same folder, as any model of timm's


@pytest.mark.slow
def test_linear_probe_without_checkpoint_is_repeatable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["linear_probe.py", "--limit", "100"])
    printed = []
    for _ in range(2):
        runpy.run_path(str(EXAMPLES / "linear_probe.py"), run_name="__main__")
        printed.append(capsys.readouterr().out)
    assert list(table(printed[0])) == ["raw pixels", "random weights"]
    assert printed[0] == printed[1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["test_resnet_emax", "test_convnext_emax"])
def test_compressed_models_classify_as_the_page_on_deployment_says(name: str) -> None:
    needs("onnxruntime")
    done = run_example("compress", "--model", name)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^(\w.*?)  +(\d\.\d{3})(?: +(\d+\.\d))?$", done.stdout, re.MULTILINE)
    found = {row: float(value) for row, value, _ in rows}
    sizes = {row: float(size) for row, _, size in rows if size}
    assert found["float32, ONNX"] == found["float32"]
    assert sizes["int8, ONNX"] < sizes["float32, ONNX"] / 2
    page = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
    quantised, pruned = re.findall(rf"^\| `{name}` \|(.*)\|$", page, re.MULTILINE)
    said = [float(cell) for cell in (*quantised.split("|")[:2], *pruned.split("|"))]
    names = ("float32", "int8, ONNX", "float32", "pruned 30%", "pruned 50%", "pruned 70%")
    # Rounding differs between processors, and an image is a thousandth.
    assert [found[row] for row in names] == pytest.approx(said, abs=0.01)


def test_linear_probe_refuses_what_is_no_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["linear_probe.py", "--checkpoint", "no/model.safetensors"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "linear_probe.py"), run_name="__main__")
    assert stop.value.code == 2
    assert "no/model.safetensors is not the model.safetensors of a run" in capsys.readouterr().err
