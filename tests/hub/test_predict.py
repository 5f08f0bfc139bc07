"""`emax predict` on real images."""

import csv
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiers import mostly_slow
from timm.data import create_transform, resolve_data_config
from training_testing import files_in, only_line

from emax_cli import main
from emax_timm.hub.predict import predictions
from emax_timm.training import UsageError
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


@pytest.fixture(scope="module")
def expected(trained: Path, images: Path) -> dict[Path, list[tuple[str, float]]]:
    """Classes and probabilities that timm gives for the validation images, one by one."""
    model: Any = timm.create_model(f"local-dir:{trained}", pretrained=True).eval()
    transform: Any = create_transform(**resolve_data_config(model=model))
    found = {}
    for path in sorted((images / "validation").rglob("*.*")):
        with torch.no_grad(), Image.open(path) as image:
            values = model(transform(image.convert("RGB"))[None]).softmax(dim=1)[0].tolist()
        pairs = sorted(zip(values, ("cat", "dog"), strict=True), reverse=True)
        found[path] = [(name, value) for value, name in pairs]
    return found


Expected = dict[Path, list[tuple[str, float]]]


def test_folder_is_classified_with_the_class_names_of_the_run(
    trained: Path, images: Path, expected: Expected, capsys: pytest.CaptureFixture[str]
) -> None:
    title, *lines = predicted(capsys, images / "validation", "-m", trained, "--top", "2")
    assert title.split() == ["image", "top", "1", "top", "2"]
    assert len(lines) == len(expected) == 10
    for line, (path, pairs) in zip(lines, expected.items(), strict=True):
        first, second = ([name, f"{value:.3f}"] for name, value in pairs)
        assert line.split() == [str(path), *first, *second]
    assert len({len(line) for line in lines}) == 1  # aligned


@pytest.mark.parametrize("workers", mostly_slow(["0", "2"], 0))
def test_formats_for_programs_say_the_same(
    trained: Path,
    images: Path,
    expected: Expected,
    workers: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (images / "validation", "-m", trained, "--top", "2", "-b", "3", "-j", workers)
    rows = list(csv.DictReader(predicted(capsys, *arguments, "--format", "csv")))
    flat = [
        (str(path), rank, name, value)
        for path, pairs in expected.items()
        for rank, (name, value) in enumerate(pairs, start=1)
    ]
    for row, (path, rank, name, value) in zip(rows, flat, strict=True):
        assert (row["path"], row["rank"], row["label"]) == (path, str(rank), name)
        assert float(row["probability"]) == pytest.approx(value, abs=1e-5)
    objects = [json.loads(line) for line in predicted(capsys, *arguments, "--format", "jsonl")]
    assert [row["path"] for row in objects] == [str(path) for path in expected]
    found = [(p["label"], p["probability"]) for row in objects for p in row["predictions"]]
    assert [name for name, _ in found] == [name for _, _, name, _ in flat]
    assert [value for _, value in found] == pytest.approx([row[3] for row in flat], abs=1e-5)


def test_features_are_the_input_of_the_classifier(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"no image")
    file = tmp_path / "features.npz"
    arguments = [tmp_path / "broken.png", images / "validation", "-m", trained, "--embed", file]
    assert main(["predict", *map(str, arguments)]) == 1
    with np.load(file, allow_pickle=False) as found:
        features, paths = found["features"], found["paths"]
    assert paths.tolist() == [str(p) for p in sorted((images / "validation").rglob("*.*"))]
    model: Any = timm.create_model(f"local-dir:{trained}", pretrained=True).eval()
    assert (features.shape, features.dtype) == ((10, model.num_features), np.float32)
    # The classifier makes of them what the model makes of the images.
    with torch.no_grad():
        values = model.get_classifier()(torch.from_numpy(features)).softmax(dim=1)
    for (path, predicted), row in zip(predictions(model, paths), values, strict=True):
        assert not isinstance(predicted, CorruptImageError), path
        assert predicted[0].probability == pytest.approx(row.max().item(), abs=1e-5)
    assert files_in(tmp_path) == {"broken.png", "features.npz"}
    assert "the features of 10 images" in capsys.readouterr().err


def test_model_without_a_classifier_gives_features_alone(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = timm.create_model(f"local-dir:{trained}", pretrained=True, num_classes=0)
    timm.models.save_for_hf(model, str(tmp_path / "backbone"), safe_serialization=True)
    arguments = ["predict", str(images / "validation"), "-m", str(tmp_path / "backbone")]
    assert main(arguments) == 2
    assert "has no classifier; --embed" in only_line(capsys.readouterr().err)
    assert main([*arguments, "--embed", str(tmp_path / "f.npz")]) == 0
    assert capsys.readouterr().out == ""
    assert np.load(tmp_path / "f.npz")["features"].shape[0] == 10


def test_folders_are_searched_in_order_and_without_what_is_hidden(
    trained: Path, clothes: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = clothes["8_bag"].read_bytes()
    names = ["b/2.png", "b/10.PNG", "a.webp", "b/._2.png", ".trash/1.png", "b/notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with Image.open(clothes["8_bag"]) as image:
        image.save(tmp_path / "a.webp")
    (tmp_path / "b" / "again").symlink_to(tmp_path)  # a folder in itself
    arguments = (tmp_path, tmp_path / "b" / "2.png", tmp_path / "b" / "._2.png")
    lines = predicted(capsys, *arguments, "-m", trained, "--format", "jsonl")
    found = [str(Path(json.loads(line)["path"]).relative_to(tmp_path)) for line in lines]
    # A file that is named is read whatever its name is; none is read twice.
    assert found == ["a.webp", "b/2.png", "b/10.PNG", "b/._2.png"]


@pytest.mark.slow
def test_reader_that_stops_reading_is_no_error(trained: Path, images: Path) -> None:
    command = [sys.executable, "-m", "emax_cli", "predict", str(images), "-m", str(trained)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(100) == 141


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


def test_model_of_other_channels_is_refused(clothes: dict[str, Path]) -> None:
    overlay = {"input_size": (4, 32, 32), "mean": (0.5,) * 4, "std": (0.5,) * 4}
    model = timm.create_model("test_resnet", in_chans=4, pretrained_cfg_overlay=overlay).eval()
    with pytest.raises(UsageError, match="images of 4 channels"):
        next(predictions(model, [clothes["8_bag"]]))


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
    assert out.splitlines()[1].startswith(f"{clothes['8_bag']} ")
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
        ([__file__, "--embed", "features.npy"], "--embed writes a .npz file, not features.npy"),
        ([__file__, "--embed", "nowhere/f.npz"], "there is no folder nowhere"),
        ([__file__, "--embed", __file__ + "/f.npz"], "is no folder"),
        ([str(Path(__file__).parent)], "holds no images"),
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
