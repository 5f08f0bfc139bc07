"""`emax visualize`: what its report holds, how it looks in a browser, what it refuses."""

import base64
import json
import os
import re
import resource
import shutil
import sys
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from browser import open_page
from PIL import Image
from tiers import mostly_slow
from timm.data import create_transform, resolve_data_config
from training_testing import files_in, only_line

from emax_cli import main
from emax_timm import EMAX
from emax_timm.hub.predict import predictions
from emax_timm.interpret import attention_of, contents
from emax_timm.interpret.images import find_images, spread
from emax_timm.training.data import SAMPLES

DEFAULT = "test_resnet_emax.fashion_mnist"


@pytest.fixture(scope="module")
def clothes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of each of three classes of Fashion-MNIST's test sample, in folders."""
    folder = tmp_path_factory.mktemp("clothes")
    with tarfile.open(SAMPLES / "fashion_mnist" / "test.tar") as archive:
        for member in archive:
            label, name = member.name.split("/")[-2:] if member.isfile() else ("", "")
            if label in ("3_dress", "5_sandal", "8_bag") and len(files(folder / label)) < 6:
                (folder / label).mkdir(exist_ok=True)
                source = archive.extractfile(member)
                assert source is not None
                (folder / label / name).write_bytes(source.read())
    (folder / "notes.txt").write_text("not an image")
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*")) if folder.exists() else []


@pytest.fixture(scope="module")
def report(clothes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report on those images, and EMA, CBAM and SE beside EMAX, with every kind of figure."""
    folder = tmp_path_factory.mktemp("report")
    others = []
    for attention in ("ema", "cbam", "se"):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet_emax", attn_layer=attention, num_classes=3)
        timm.models.save_for_hf(model, str(folder / attention), safe_serialization=True)
        others.append(f"local-dir:{folder / attention}")
    arguments = ["--images", clothes, "--output", folder / "report", "--max-images", "4"]
    assert main(["visualize", *map(str, arguments), "--compare", *others]) == 0
    return folder / "report"


class Parsed(HTMLParser):
    """Pictures, tables and headings of a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.pictures: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] in (["td"], ["th"]) and data.strip():
            self.rows[-1].append(data)
        if self.tags[-1:] == ["h2"] and data.strip():
            self.headings.append(data)


@pytest.mark.slow
def test_report_is_one_file_with_its_pictures_in_it(report: Path) -> None:
    page = Parsed(report / "report.html")
    assert not {"script", "iframe", "object", "embed"} & set(page.tags)
    kinds = ("spatial", "weights", "groups", "comparison")
    stems = sorted({path.name[:3] for path in report.glob("0*.png")})
    assert stems == ["001", "002", "003", "004"]
    assert len(page.pictures) == 2 + 4 * len(kinds) == len(list(report.glob("*.png")))
    saved = {path.read_bytes() for path in report.glob("*.png")}
    for picture in page.pictures:
        assert picture["alt"]
        head, _, data = (picture["src"] or "").partition(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data) in saved
    text = (report / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)|url\(|@import|https?://", text)


@pytest.mark.slow
def test_report_has_a_section_for_each_image_spread_over_the_classes(report: Path) -> None:
    headings = Parsed(report / "report.html").headings
    assert headings[:2] == ["Attention layers", "Group counts"]
    assert [h.split("/")[0] for h in headings[2:]] == ["3_dress", "3_dress", "5_sandal", "8_bag"]


@pytest.mark.slow
def test_group_counts_of_the_classes_are_those_of_the_images(report: Path, clothes: Path) -> None:
    model: Any = timm.create_model(DEFAULT, pretrained=True).eval()
    transform: Any = create_transform(**resolve_data_config(model=model))
    rows = {row[0]: row[1:] for row in Parsed(report / "report.html").rows if row}
    for label in ("3_dress", "5_sandal", "8_bag"):
        images = []
        for path in files(clothes / label):
            with Image.open(path) as image:
                images.append(transform(image.convert("RGB")))
        maps = attention_of(model, torch.stack(images))
        expected = ["6"]
        for layer in maps.values():
            counts = layer.group_count.tolist()  # type: ignore[union-attr]
            most = max(counts, key=counts.count)
            share = f"{counts.count(most) / 6:.0%}"
            expected.append(f"{most} ({share})")
        found = rows[label]
        assert found[0] == expected[0]
        for cell, right in zip(found[1:], expected[1:], strict=True):
            # Of two as frequent counts either may be named.
            assert cell.split()[1] == right.split()[1]


@pytest.mark.slow
def test_report_names_the_layers_and_the_predictions(report: Path, clothes: Path) -> None:
    model: Any = timm.create_model(DEFAULT, pretrained=True).eval()
    rows = Parsed(report / "report.html").rows
    for name, layer in model.named_modules():
        if isinstance(layer, EMAX):
            assert layer.gamma is not None
            counts = ", ".join(map(str, layer.candidates))
            gate = layer.residual_gate.abs().mean().item()
            assert [name, "EMAX", counts, f"{layer.gamma.item():.3f}", f"{gate:.3f}"] in rows
    ((_, found),) = predictions(model, [files(clothes / "8_bag")[0]])
    assert isinstance(found, list)
    for prediction in found:
        assert [prediction.name, f"{prediction.probability:.3f}"] in rows


@pytest.mark.slow
def test_run_has_its_training_and_svg_figures(
    trained: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--checkpoint", trained / "model.safetensors", "--format", "svg", "--no-grad-cam"]
    arguments += ["--images", images / "validation", "--output", tmp_path / "a" / "b"]
    assert main(["visualize", *map(str, arguments), "--max-images", "1"]) == 0
    assert only_line(capsys.readouterr().out) == str(tmp_path / "a" / "b" / "report.html")
    assert {"training.svg", "gates.svg", "group-counts.svg"} <= files_in(tmp_path / "a" / "b")
    page = Parsed(tmp_path / "a" / "b" / "report.html")
    assert "Training" in page.headings
    assert all((p["src"] or "").startswith("data:image/svg+xml;base64,") for p in page.pictures)


@pytest.mark.slow
def test_odd_names_do_not_break_the_page(clothes: Path, tmp_path: Path) -> None:
    name = "<b>&\"x' $title.png"
    shutil.copy(files(clothes / "8_bag")[0], tmp_path / name)
    arguments = ["--images", tmp_path / name, "--output", tmp_path / "out", "--no-grad-cam"]
    assert main(["visualize", *map(str, arguments)]) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;b&gt;&amp;&quot;x&#x27; $title.png" in text
    assert "<b>" not in text


@pytest.mark.slow
def test_earlier_report_is_replaced_only_when_asked(
    clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["visualize", "--images", str(files(clothes / "8_bag")[0]), "--no-grad-cam"]
    arguments += ["--output", str(output)]
    assert main(arguments) == 0
    before = (output / "report.html").read_bytes()
    (output / "old").write_text("")
    assert main(arguments) == 2
    message = f"{output} is not empty; --overwrite replaces it"
    assert only_line(capsys.readouterr().err) == f"emax visualize: error: {message}"
    assert (output / "old").exists()
    assert main([*arguments, "--overwrite"]) == 0
    assert "old" not in files_in(output)
    assert (output / "report.html").read_bytes() == before
    assert files_in(tmp_path) == {f"out/{name}" for name in files_in(output)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to look at: give --images DIR or files"),
        (["--images", "IMAGE"], "nowhere to write to: give --output DIR"),
        (["--images", "missing.png", "--output", "OUT"], "missing.png does not exist"),
        (["--images", "EMPTY", "--output", "OUT"], "empty holds no images"),
        (["--images", "TEXT", "--output", "OUT"], "text.png: not an image of a known format"),
        (["--images", "IMAGE", "--output", "FULL"], "full is not empty; give another one"),
        (["--images", "IMAGE", "--output", "TEXT"], "text.png is not a folder"),
        (["--images", "IMAGE", "--output", "TEXT/out"], "text.png is no folder"),
        (["--images", "IMAGE", "--output", "/proc/out"], "cannot write to /proc/out: "),
        (
            ["--images", "IMAGE", "--output", "OUT", "--model", "test_resnet", "--no-pretrained"],
            "model test_resnet has no EMAX, EMA, CBAM, SE or ECA layer",
        ),
        (
            ["--images", "IMAGE", "--output", "OUT", "--model", "resnet18_emx"],
            "the nearest is resnet18_emax",
        ),
        (["--images", "IMAGE", "--output", "OUT", "--max-images", "0"], "at least 1, not 0"),
        (["--images", "IMAGE", "--output", "OUT", "--format", "pdf"], "has no choice pdf"),
        (
            ["--images", "IMAGE", "--output", "OUT", "--checkpoint", "TEXT"],
            ".safetensors files only",
        ),
        (["--imagse", "IMAGE"], "the nearest valid one is --images"),
    ],
)
def test_wrong_usage_is_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    clothes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "full"):
        Path(name).mkdir()
    Path("full", "thesis.tex").write_text("years of work")
    Path("text.png").write_text("no image")
    names = {
        "IMAGE": str(files(clothes / "8_bag")[0]),
        "TEXT": "text.png",
        "TEXT/out": "text.png/out",
    }
    names |= {"EMPTY": "empty", "FULL": "full", "OUT": "out"}
    assert main(["visualize", *(names.get(word, word) for word in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in only_line(err)
    assert sorted(os.listdir()) == ["empty", "full", "text.png"]
    assert files_in(Path("full")) == {"thesis.tex"}


@pytest.mark.slow
def test_many_classes_are_drawn_as_one(
    clothes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "MAX_BARS", 11)  # four layers and three classes are more
    arguments = ["--images", clothes, "--output", tmp_path / "out", "--max-images", "1"]
    assert main(["visualize", *map(str, arguments), "--no-grad-cam"]) == 0
    page = Parsed(tmp_path / "out" / "report.html")
    assert "by layer; the classes are in the table" in str(page.pictures[1]["alt"])
    assert {"3_dress", "5_sandal", "8_bag"} <= {row[0] for row in page.rows if row}


def test_attention_that_is_not_finite_is_one_line(
    clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = timm.create_model(DEFAULT, pretrained=True)
    torch.nn.init.constant_(model.layer2[0].se.conv1x1.weight, float("nan"))
    timm.models.save_for_hf(model, str(tmp_path / "nan"), safe_serialization=True)
    image = files(clothes / "8_bag")[0]
    arguments = ["--images", image, "--output", tmp_path / "out", "-m", f"local-dir:{tmp_path}/nan"]
    assert main(["visualize", *map(str, arguments)]) == 2
    assert only_line(capsys.readouterr().err).endswith(f"its attention to {image} is not finite")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["matplotlib", "pytorch_grad_cam"])
def test_missing_package_is_named_before_anything_else(
    package: str,
    clothes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    arguments = ["--images", str(clothes), "--output", str(tmp_path / "out")]
    assert main(["visualize", *arguments]) == 2
    assert "pip install 'emax-timm[viz]'" in only_line(capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("earlier", mostly_slow([False, True]))
def test_full_disk_leaves_what_was_there(
    earlier: bool, clothes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    arguments = ["--images", str(files(clothes / "8_bag")[0]), "--output", str(tmp_path / "out")]
    if earlier:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "report.html").write_text("the earlier one")
        arguments.append("--overwrite")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        status = main(["visualize", *arguments, "--no-grad-cam"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert "the disk is full" in only_line(capsys.readouterr().err)
    assert files_in(tmp_path) == ({"out/report.html"} if earlier else set())


def test_images_of_folders_have_classes_and_those_drawn_are_spread(clothes: Path) -> None:
    sources = find_images([str(clothes)])
    assert [source.label for source in sources] == sorted(["3_dress", "5_sandal", "8_bag"] * 6)
    assert {source.label for source in find_images([str(clothes / "8_bag")])} == {""}
    one = find_images([str(sources[0].path)])
    assert one[0].name == sources[0].path.name
    drawn = spread(sources, 7)
    assert [source.label for source in drawn] == ["3_dress"] * 3 + ["5_sandal"] * 2 + ["8_bag"] * 2
    assert drawn[0] == sources[0]
    assert spread(sources, 100) == sources


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_report_opens_in_a_browser_without_requests_and_errors(
    width: int, height: int, dark: bool, report: Path, tmp_path: Path
) -> None:
    with open_page(tmp_path / "profile") as page:
        page.open(report / "report.html", width, height, dark)
        asked = [event["request"]["url"] for event in page.told("Network.requestWillBeSent")]
        assert [url for url in asked if not url.startswith("data:")] == [
            (report / "report.html").as_uri()
        ]
        for problem in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
            assert page.told(problem) == []
        # The page scrolls downwards alone; what is wider scrolls in a box of its own.
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        pictures = json.loads(page.evaluate(PICTURES))
        assert len(pictures) == len(list(report.glob("*.png")))
        for natural, shown in pictures:
            assert natural > 0  # it was decoded
            # Letters are at least 0.55 of their size, or they could not be read.
            assert shown >= 0.55 * natural
        assert json.loads(page.evaluate(OVERLAPS)) == []
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert ground == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
        page.screenshot(tmp_path / "page.png")
        with Image.open(tmp_path / "page.png") as image:
            assert image.width <= width
            assert image.height > 3000


@pytest.mark.slow
def test_browser_tells_of_errors_requests_and_overlaps(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        "<section><h2>a</h2><p style='margin-top: -50px'>b</p><img src='missing.png'></section>"
        "<script>console.log('c'); undefined.d</script>"
    )
    with open_page(tmp_path / "profile") as page:
        page.open(tmp_path / "page.html", 800, 600)
        assert len(page.told("Network.requestWillBeSent")) == 2
        assert len(page.told("Runtime.consoleAPICalled")) == 1
        assert len(page.told("Runtime.exceptionThrown")) == 1
        assert len(page.told("Log.entryAdded")) == 1
        assert json.loads(page.evaluate(PICTURES))[0][0] == 0
        assert json.loads(page.evaluate(OVERLAPS)) == ["P"]


PICTURES = "JSON.stringify([...document.images].map(i => [i.naturalWidth, i.clientWidth]))"
# Boxes of the parts of a section that lie upon each other.
OVERLAPS = """
const parts = [...document.querySelectorAll('header, nav, section')];
JSON.stringify(parts.flatMap(part => {
  const boxes = [...part.querySelectorAll('h1, h2, p, .scroll, figcaption, ul')]
    .map(e => [e.className || e.tagName, e.getBoundingClientRect()]);
  return boxes.slice(1).filter(([, box], i) => box.top < boxes[i][1].bottom - 1)
    .map(([name]) => name);
}))"""
