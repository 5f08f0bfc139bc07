"""What the page shows of an image, and what it says of one that it cannot show."""

import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiers import mostly_slow
from timm.data import create_transform, resolve_data_config

from emax_timm.demo import findings
from emax_timm.demo.findings import (
    DemoModel,
    UnfitImageError,
    attention_picture,
    cam_picture,
    count_table,
    examine,
    group_count,
    study_model,
)
from emax_timm.errors import UsageError
from emax_timm.hub import predictions
from emax_timm.interpret import attention_of, grad_cam

DEFAULT = "test_resnet_emax.fashion_mnist"


@pytest.fixture(scope="module")
def subject() -> DemoModel:
    return study_model(DEFAULT, timm.create_model(DEFAULT, pretrained=True).eval())


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise(tmp_path_factory.mktemp("photo") / "photo.png", 0)


def noise(path: Path, seed: int) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (5, 5), np.uint8)
    Image.fromarray(values).resize((50, 40)).convert("RGB").save(path)
    return path


def prepared(subject: DemoModel, path: Path) -> torch.Tensor:
    transform: Any = create_transform(**resolve_data_config(model=subject.model))
    with Image.open(path) as image:
        return transform(image.convert("RGB"))[None]


def test_classes_are_those_of_emax_predict(subject: DemoModel, photo: Path) -> None:
    ((_, expected),) = predictions(subject.model, [photo], top=5)
    found = examine(subject, str(photo)).classes
    assert isinstance(expected, list)
    assert [*found] == [prediction.name for prediction in expected]
    assert [*found.values()] == pytest.approx([p.probability for p in expected])


@pytest.mark.slow
def test_pictures_are_of_the_stage_and_the_group(
    subject: DemoModel, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = examine(subject, str(photo))
    x = prepared(subject, photo)
    drawn: list[torch.Tensor] = []
    monkeypatch.setattr(findings, "draw_attention", lambda a, p, maps, f: drawn.append(maps))
    monkeypatch.setattr(findings, "draw_cam", lambda axis, picture, cam: drawn.append(cam))
    monkeypatch.setattr(findings, "figure_bytes", lambda figure: photo.read_bytes())
    assert [*subject.stages] == ["layer1", "layer2", "layer3", "layer4"]
    for stage in subject.stages:
        maps: Any = attention_of(subject.model, x)[f"{stage}.0.se"]
        fine = maps.spatial[0]
        count = group_count(subject, found, stage)
        assert count == maps.group_count.item()
        for group in range(1, count + 1):
            attention_picture(subject, found, stage, group)
            assert torch.allclose(drawn[-1].mean(0), fine[(group - 1) * len(fine) // count])
        attention_picture(subject, found, stage)
        assert torch.allclose(drawn[-1].mean(0), fine.mean(0))
        cam_picture(subject, found, stage)
        assert torch.allclose(drawn[-1], grad_cam(subject.model, x, stage)[0])


def test_pictures_can_be_drawn(subject: DemoModel, photo: Path) -> None:
    found = examine(subject, str(photo))
    for picture in (
        attention_picture(subject, found, "layer1"),
        cam_picture(subject, found, "layer1"),
    ):
        assert picture is not None
        assert min(picture.size) > 300
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20


def test_group_counts_are_those_that_each_layer_chose(subject: DemoModel, photo: Path) -> None:
    header, *rows = count_table(subject, examine(subject, str(photo)))
    assert header == ["layer", "choices", "chosen", "probability"]
    maps: Any = attention_of(subject.model, prepared(subject, photo))
    assert [row[0] for row in rows] == list(maps)
    for name, choices, chosen, probability in rows:
        place = maps[name].group_probs[0].argmax().item()
        assert choices.split(", ")[place] == chosen == str(maps[name].group_count.item())
        assert probability == f"{maps[name].group_probs[0].max():.2f}"


def as_png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, options.pop("format", "PNG"), **options)
    return buffer.getvalue()


RED = Image.new("RGB", (40, 30), "red")
UNFIT = {
    "text": (b"not an image", "cannot be read as an image: not an image of a known format."),
    "empty": (b"", "cannot be read as an image: the file is empty."),
    "cut": (as_png(RED)[:-30], "cannot be read as an image: "),
    "one pixel": (as_png(RED.resize((1, 1))), "has 1 x 1 pixels, in which there is nothing to see"),
    "one row": (as_png(RED.resize((900, 1))), "has 900 x 1 pixels, in which there is nothing"),
    "narrow": (as_png(RED.resize((8, 161))), "one side is more than 20 times as long as the other"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_image_is_said_in_a_sentence(name: str, subject: DemoModel, tmp_path: Path) -> None:
    content, message = UNFIT[name]
    (tmp_path / "image.png").write_bytes(content)
    with pytest.raises(UnfitImageError) as refused:
        examine(subject, str(tmp_path / "image.png"))
    text = str(refused.value)
    assert message in text
    assert text.startswith("This ")
    assert text.endswith(".")


SHADES = Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)
UNUSUAL: dict[str, tuple[Callable[[], bytes], str]] = {
    "CMYK": (lambda: as_png(RED.convert("CMYK"), format="JPEG"), "CMYK"),
    "16 bits": (lambda: as_png(SHADES), "16-bit values"),
    "transparent": (lambda: as_png(RED.convert("RGBA")), "transparency"),
    "palette": (lambda: as_png(RED.convert("P"), transparency=0), "transparency"),
    "animated": (
        lambda: as_png(RED, format="GIF", save_all=True, append_images=[RED.rotate(90)]),
        "several frames",
    ),
    "usual": (lambda: as_png(RED, format="JPEG"), ""),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_changed_in_an_image_is_said(name: str, subject: DemoModel, tmp_path: Path) -> None:
    make, notice = UNUSUAL[name]
    (tmp_path / "image").write_bytes(make())
    found = examine(subject, str(tmp_path / "image"))
    assert len(found.notices) == bool(notice)
    assert all(notice in text and text.endswith(".") for text in found.notices)
    assert sum(found.classes.values()) <= 1 + 1e-6


def test_users_at_the_same_time_get_their_own_results(subject: DemoModel, tmp_path: Path) -> None:
    paths = [str(noise(tmp_path / f"{seed}.png", seed)) for seed in range(8)]

    def everything(path: str) -> tuple[Any, ...]:
        found = examine(subject, path)
        maps: Any = found.maps
        sums = [maps[layer].spatial.sum().item() for layer in maps]
        return found.classes, found.picture.sum(), sums, count_table(subject, found)

    expected = [everything(path) for path in paths]
    assert len({str(result) for result in expected}) == len(paths)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert [*pool.map(everything, paths)] == expected


# The arguments of a model; its stages, whether each has a map of attention; the kinds of attention;
# whether there is Grad-CAM.
STAGES = ["layer1", "layer2", "layer3", "layer4"]
GREY: dict[str, Any] = {"in_chans": 1}
GREY |= {"pretrained_cfg_overlay": {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}}
MODELS: list[Any] = [
    ("test_resnet_emax", {"attn_layer": "se"}, STAGES, False, ["SEModule"], True),
    ("test_resnet", {}, [*STAGES], False, [], True),
    ("test_vit", {}, None, False, [], False),
    ("test_resnet_emax", {"attn_layer": "cbam"}, STAGES, True, ["CbamModule"], True),
    ("test_convnext_emax", {}, [f"stages.{i}" for i in range(4)], True, ["EMAX"], True),
    ("test_resnet_emax", GREY, STAGES, True, ["EMAX"], True),
]


@pytest.mark.parametrize(
    ("name", "arguments", "stages", "attention", "methods", "cam"), mostly_slow(MODELS, 0, 1, 2)
)
def test_other_models_show_what_they_have(
    name: str,
    arguments: dict[str, Any],
    stages: list[str] | None,
    attention: bool,
    methods: list[str],
    cam: bool,
    photo: Path,
) -> None:
    other = study_model(name, timm.create_model(name, num_classes=3, **arguments).eval())
    assert other.methods == methods
    assert other.cam == cam
    found = examine(other, str(photo))
    assert set(found.classes) == {"class 0", "class 1", "class 2"}
    if stages is not None:
        assert [stage for stage in other.stages if stage != "act1"] == stages
    for stage in [*other.stages][-1:]:
        assert (attention_picture(other, found, stage) is not None) == attention
        assert (cam_picture(other, found, stage) is not None) == cam


def test_model_without_a_classifier_is_refused() -> None:
    model = timm.create_model("test_resnet", num_classes=0).eval()
    with pytest.raises(UsageError, match="model test_resnet has no classifier"):
        study_model("test_resnet", model)
