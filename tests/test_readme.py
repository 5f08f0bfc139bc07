"""What the README shows works as it stands there."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
from hub_server import Hub, serve
from hub_testing import emax
from PIL import Image
from timm_suite import ALL

from emax_cli import main
from emax_timm.attention import ATTENTIONS
from emax_timm.benchmark import markdown, measure, model_names
from emax_timm.benchmark.command import benchmark_parser, mark_of
from emax_timm.compare.faithfulness import MEASURES, FaithfulnessConfig
from emax_timm.tables import text_around
from emax_timm.training import TrainConfig, train
from emax_timm.training.config import from_mapping, parse_settings
from emax_timm.training.data import SAMPLES
from emax_timm.training.data.command import DataReportOptions
from emax_timm.training.plan import plan

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two images of the sample, `boot.png` and `coat.png`."""
    folder = tmp_path_factory.mktemp("readme")
    with tarfile.open(SAMPLES / "fashion_mnist" / "test.tar") as archive:
        files = [member for member in archive if member.isfile()]
        for name, member in (("boot.png", files[-1]), ("coat.png", files[500])):
            source = archive.extractfile(member)
            assert source is not None
            (folder / name).write_bytes(source.read())
    return folder


@pytest.fixture(scope="module")
def quickstart(workplace: Path) -> Path:
    """That folder, with a run of the quickstart cut short, of a smaller model."""
    options = "--epochs 1 --val-fraction 0.9 --model-kwargs channels=[8,8,8,8] --output"
    assert train(["-c", "quickstart", *options.split(), str(workplace / "runs")]) == 0
    return workplace


@pytest.fixture(scope="module")
def all_data(quickstart: Path) -> Path:
    """That folder, with all else that the README's commands take, small.

    It has a run of "Your own images", cut short, photos of two classes and an ImageNet of eight
    images.
    """
    folder = quickstart
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            (folder / "imagenet" / split / label).mkdir(parents=True)
            for number in range(4):
                image = Image.new("RGB", (40, 40), (60 * number, 100, 100))
                image.save(folder / "imagenet" / split / label / f"{number}.png")
    for label, shade in (("cat", 60), ("dog", 180)):
        (folder / "photos" / "train" / label).mkdir(parents=True)
        for number in range(1, 6):
            image = Image.new("RGB", (80, 60), (shade, 20 * number, 100))
            image.save(folder / "photos" / "train" / label / f"{number:03}.png")
    Image.new("RGB", (80, 60), (180, 60, 100)).save(folder / "photos" / "new.png")
    (line,) = [line for line in commands() if "--data-dir photos" in line]
    words = shlex.split(line)[2:]
    words[words.index("--data-dir") + 1] = str(folder / "photos")
    words[words.index("--output") + 1] = str(folder / "runs")
    assert train([*words, "--epochs", "1", "-b", "4"]) == 0
    return folder


def test_readme_python_runs(quickstart: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(quickstart)
    source = "\n".join(blocks("python"))
    assert "create_model" in source
    exec(compile(source, "README.md", "exec"), {})


DOCS = [
    # The page on deployment exports models, which takes long.
    pytest.param(page, marks=[pytest.mark.slow] * (page.stem == "deployment"))
    for page in sorted((ROOT / "docs").glob("*.md"))
]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the page on deployment
@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_python_of_the_docs_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "\n".join(blocks("python", page.read_text(encoding="utf-8")))
    exec(compile(source, page.name, "exec"), {})


# Where names of models stand: the README, the docs, the configs, the examples.
PAGES = sorted(
    [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "configs").rglob("*.yaml"),
        *(ROOT / "examples").glob("*.py"),
    ]
)
# A name of timm's begins so; one of ours also ends so.
FAMILY = r"(?:tu-)?(?:wide_)?(?:resne|convnext|mobilenet|regnet|efficientnet|densenet|swin_|vit_)"
METHOD = rf"_(?:{'|'.join(ATTENTIONS)})"
NAME = re.compile(rf"(?<![\w/.-])({FAMILY}\w*|\w+{METHOD})(\.\w+(?:_in1k|_warm)\w*)?(?![\w*{{/])")


def names_in(text: str) -> set[str]:
    """What looks like the name of a model, with its tag if it has one."""
    return {name.removeprefix("tu-") + tag for name, tag in NAME.findall(text)}


def is_known(name: str) -> bool:
    known = timm.list_pretrained() if "." in name else timm.list_models()
    return name in known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_models_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"https?://[^\s)]+", "", text)
    options = {field.name for field in dataclasses.fields(TrainConfig)}
    assert not {name for name in names_in(text) - options if not is_known(name)}
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", text):
        assert (page.parent / target).exists(), target


def test_names_of_models_are_found() -> None:
    text = """`resnet50_emax`, "convnext_tiny_cbam", resnet50_emx (`resnet50_emax.a9_in1k_warm`),
    model: resnet18_emax, tu-resnet18_emax, timm/resnet50.a1_in1k, foo_emax, resnet*_emax"""
    found = names_in(text)
    assert {name for name in found if not is_known(name)} == {
        *("resnet50_emx", "resnet50_emax.a9_in1k_warm", "foo_emax")
    }
    assert {"resnet50_emax", "convnext_tiny_cbam", "resnet18_emax"} <= found


MODELS = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_table_of_the_page_on_models_has_every_model() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", MODELS.partition("## All models")[2], re.MULTILINE)
    for name in ALL:
        assert rows.count(name) == 1, name


def test_models_of_the_readme_are_ten_rows_of_the_page_on_models() -> None:
    header, *rows = re.findall(r"^\| (?:Model|`\w+_emax`) \|.*$", README, re.MULTILINE)
    assert len(rows) == 10
    assert not {header, *rows} - set(MODELS.splitlines())


@pytest.mark.slow
def test_table_of_the_page_on_models_is_what_its_command_gives() -> None:
    rows = [measure(name) for name in model_names("")]
    assert f"Made by `emax list --write docs/models.md`:\n\n{markdown(rows)}\n" in MODELS


def commands() -> list[str]:
    """The command lines of the README, but for the two that set everything up."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and "venv" not in line]


TRAINING = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
DEPLOYMENT = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")


# `emax plan` builds a whole model; test_plan.py has smaller ones.
@pytest.mark.parametrize(
    "line",
    [
        pytest.param(line, marks=pytest.mark.slow if line.startswith("emax plan") else ())
        for block in blocks("bash", TRAINING) + blocks("bash", DEPLOYMENT)
        for line in block.splitlines()
        if "train.py" in line or line.startswith("emax plan")
    ],
)
def test_command_of_the_pages_on_training_and_deployment_is_understood(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line)
    if words[:2] == ["emax", "plan"]:
        assert plan(words[2:]) == 0
    elif words[:2] == ["emax", "data"]:
        settings = parse_settings(DataReportOptions, words[2:], "emax data")
        from_mapping(DataReportOptions, settings, "the page")
    else:
        flags = words[words.index("train.py") + 1 :]
        from_mapping(TrainConfig, parse_settings(TrainConfig, flags, "train.py"), "the page")


PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_benchmarks_of_the_page_on_performance_are_understood() -> None:
    """As are the commands that made the tables: what they measure takes minutes."""
    lines = [line for block in blocks("bash", PERFORMANCE) for line in block.splitlines()]
    lines += re.findall(r"^Made by `(emax benchmark [^`]*)`", PERFORMANCE + README, re.MULTILINE)
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("emax benchmark ")]
    assert {command[0] for command in commands} == {
        *("modules", "models", "onnx", "train", "growth", "settings", "startup")
    }
    for command in commands:
        options = benchmark_parser("emax benchmark").parse_args(command)
        if options.write is not None:
            text_around(ROOT / options.write, mark_of(options))


WEIGHTS = (ROOT / "docs" / "weights.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_commands_of_the_page_on_weights_run(all_data: Path) -> None:
    lines = [line for block in blocks("bash", WEIGHTS) for line in block.splitlines()]
    lines.sort(key=lambda line: "verify" in line)  # of what the other lines publish
    assert sum("publish" in line for line in lines) == 2
    with serve(Hub()) as hub:
        for line in lines:
            line = line.replace("ORG/NAME", "me/resnet10t_emax.clothes")
            program, *words = shlex.split(line)
            assert program == "emax"
            words = [str(all_data / w) if w.startswith("runs/") else w for w in words]
            done = emax(*words, hub=hub, home=all_data)
            assert done.returncode == 0, done.stderr
        assert hub.repos["me/resnet10t_emax.clothes"].tags


INTERPRETABILITY = (ROOT / "docs" / "interpretability.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_commands_of_the_page_on_interpretability_run(
    all_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line for block in blocks("bash", INTERPRETABILITY) for line in block.splitlines()]
    assert len(lines) == 2
    for name in ("runs", "boot.png", "coat.png"):
        (tmp_path / name).symlink_to(all_data / name)
    (tmp_path / "photographs").symlink_to(all_data / "imagenet" / "validation")
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line)
        assert main(words[1:]) == 0
        assert Path(words[words.index("--output") + 1], "report.html").exists()


def test_tables_of_the_page_on_interpretability_are_of_the_command_named_there() -> None:
    prefix = "python -m emax_timm.compare.faithfulness"
    (line,) = re.findall(rf"^Made by `{prefix} ?(.*)`:", INTERPRETABILITY, re.MULTILINE)
    settings = parse_settings(FaithfulnessConfig, shlex.split(line), prefix)
    options = from_mapping(FaithfulnessConfig, settings, "the page")
    assert options.write == "docs/interpretability.md"
    for title, _ in MEASURES.values():
        assert f"\n| {title} | " in INTERPRETABILITY


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        (TRAINING, [*range(1, 18), *range(21, 27)]),
        (WEIGHTS, [14, 15, 16, 18, 19, 20, 26]),
    ],
)
def test_page_names_a_test_for_each_fault(page: str, expected: list[int]) -> None:
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == expected
    for _, tests in rows:
        names = re.findall(r"`([\w/]+\.py)`", tests)
        assert names
        for name in names:
            assert (ROOT / name).exists() or (ROOT / "tests" / "faults" / name).exists(), name


def test_readme_set_up_commands_are_two() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if "venv" in line]
    assert len(commands) == 2
    assert "train.py -c configs/quickstart.yaml" in commands[0]
    assert commands[1].endswith("pytest")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "readme_command train.py" in ci
    assert "readme_command pytest" in ci


@pytest.mark.slow
def test_readme_picture_is_what_its_command_draws(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = [line for line in commands() if line.startswith("emax visualize --images ")]
    assert "](docs/attention.png)" in README
    monkeypatch.chdir(workplace)
    words = shlex.split(line)[1:]
    words[words.index("--output") + 1] = str(tmp_path / "attention")
    assert main(words) == 0
    drawn, expected = (
        np.asarray(Image.open(path).convert("RGB")).astype(int)
        for path in (tmp_path / "attention" / "001-boot-spatial.png", ROOT / "docs/attention.png")
    )
    assert drawn.shape == expected.shape
    assert abs(drawn - expected).mean() < 1  # of 255: rounding differs between machines


@pytest.mark.slow
@pytest.mark.parametrize("line", commands())
def test_readme_command_runs(line: str, all_data: Path) -> None:
    # The same command on data, a model size and a number of ranks that exist here.
    line = line.replace("/data/imagenet", str(all_data / "imagenet"))
    line = line.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2")
    program, *arguments = shlex.split(line)
    if "--data-dir" in arguments:
        small = "--epochs 1 --img-size 32 -b 2 -j 1 --model resnet10t_emax --amp-dtype bfloat16"
        arguments += small.split()
    if "--experiment" in arguments:
        arguments += ["--experiment", "again"]  # the fixture has trained the one named there
    if "--resume" in arguments:
        arguments[arguments.index("--epochs") + 1] = "2"
    launchers = {
        **{"python": [], "torchrun": ["-m", "torch.distributed.run"]},
        "emax": ["-c", "import sys; from emax_cli import main; sys.exit(main())"],
    }
    launcher = launchers[program]
    arguments = [str(ROOT / a) if (ROOT / a).suffix == ".py" else a for a in arguments]
    result = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=all_data,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    if "train.py" in line or "validate.py" in line:
        assert "top1: " in result.stdout.splitlines()[-1]
    if "--output" in arguments:
        assert (all_data / arguments[arguments.index("--output") + 1]).exists()
