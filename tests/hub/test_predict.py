"""`emax predict` on real images."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from training_testing import only_line

from emax_cli import main
from emax_timm.hub.predict import predictions
from emax_timm.training.data import SAMPLES
from emax_timm.training.data.decoding import CorruptImageError


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An image file of each class of Fashion-MNIST's test sample, by the name of its folder."""
    folder, found = tmp_path_factory.mktemp("clothes"), {}
    with tarfile.open(SAMPLES / "fashion_mnist" / "test.tar") as archive:
        for member in archive:
            name = member.name.split("/")[-2]
            if member.isfile() and name not in found:
                found[name] = folder / f"{name}.png"
                source = archive.extractfile(member)
                assert source is not None
                found[name].write_bytes(source.read())
    return found


def predicted(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[str]:
    assert main(["predict", *map(str, arguments)]) == 0
    return capsys.readouterr().out.splitlines()


def test_run_classifies_images_with_its_class_names(
    trained: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((images / "validation").rglob("*.*"))
    lines = predicted(capsys, *files, "--model", f"local-dir:{trained}", "--top", "2")
    model = timm.create_model(f"local-dir:{trained}", pretrained=True).eval()
    transform: Any = create_transform(**resolve_data_config(model=model))
    for path, line in zip(files, lines, strict=True):
        with torch.no_grad(), Image.open(path) as image:
            values = model(transform(image.convert("RGB"))[None]).softmax(dim=1)[0].tolist()
        first, second = sorted(zip(values, ("cat", "dog"), strict=True), reverse=True)
        assert line == f"{path}: {first[1]} {first[0]:.3f}, {second[1]} {second[0]:.3f}"


def test_model_without_names_has_numbers(
    tmp_path: Path, clothes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    ((_, found),) = predictions(model, [clothes["8_bag"]], top=9)
    assert not isinstance(found, CorruptImageError)
    assert {p.name for p in found} == {f"class {index}" for index in range(4)}
    assert sum(p.probability for p in found) == pytest.approx(1)


def test_imagenet_model_has_imagenets_names(clothes: dict[str, Path]) -> None:
    model: Any = timm.create_model("test_resnet").eval()
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.zero_()[805] = 50
    ((_, found),) = predictions(model, [clothes["8_bag"]], top=1)
    assert not isinstance(found, CorruptImageError)
    assert found[0].name == "soccer ball"


def test_grey_model_takes_colour_images(tmp_path: Path) -> None:
    Image.new("CMYK", (40, 30)).save(tmp_path / "a.jpg")
    model = timm.create_model(
        "test_resnet",
        in_chans=1,
        pretrained_cfg_overlay={"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)},
    ).eval()
    ((_, found),) = predictions(model, [tmp_path / "a.jpg"])
    assert not isinstance(found, CorruptImageError)


def test_photograph_is_turned_upright(clothes: dict[str, Path], tmp_path: Path) -> None:
    model = timm.create_model("test_resnet", num_classes=4).eval()
    with Image.open(clothes["0_t-shirt"]) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 90 degrees clockwise
        buffer = io.BytesIO()
        turned.save(buffer, "PNG", exif=exif)
    (tmp_path / "turned.png").write_bytes(buffer.getvalue())
    paths = [clothes["0_t-shirt"], tmp_path / "turned.png"]
    upright, turned_back = (found for _, found in predictions(model, paths))
    assert upright == turned_back
    _, lying = (found for _, found in predictions(model, paths, exif_orientation=False))
    assert lying != upright


def test_corrupt_image_is_named_and_the_others_are_classified(
    trained: Path, clothes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt = tmp_path / "corrupt.png"
    corrupt.write_bytes(clothes["8_bag"].read_bytes()[:100])
    arguments = [corrupt, clothes["8_bag"], "--model", f"local-dir:{trained}"]
    assert main(["predict", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert only_line(out).startswith(f"{clothes['8_bag']}: ")
    assert only_line(err).startswith(f"emax predict: error: corrupt image {corrupt}: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to classify: give image files"),
        (["missing.png"], "missing.png does not exist"),
        (["missing"], "missing does not exist"),
        ([__file__, "--model", "resnet18_emx"], "the nearest is resnet18_emax"),
        ([__file__, "--top", "0"], "top must be at least 1, not 0"),
        ([__file__, "--model", "convnextv2_atto_emax"], "No pretrained weights exist"),
        ([__file__, "--model", "local-dir:nowhere"], "nowhere"),
        ([__file__, "--topp", "1"], "the nearest valid one is --top"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["predict", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in only_line(err)


def test_folder_with_a_pickle_alone_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self) -> tuple[object, ...]:
            return open, (str(canary), "w")

    (tmp_path / "config.json").write_bytes((trained / "config.json").read_bytes())
    torch.save({"fc.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    assert main(["predict", __file__, "--model", f"local-dir:{tmp_path}"]) == 2
    assert "has no model.safetensors" in only_line(capsys.readouterr().err)
    with pytest.raises(RuntimeError, match=r"has no model\.safetensors"):
        timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert not canary.exists()
