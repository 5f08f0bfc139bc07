"""What the README shows works as it stands there."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
from PIL import Image

import emax_timm  # noqa: F401  (registers the models)
from emax_timm.training import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of the quickstart, cut short, and an ImageNet of eight images."""
    folder = tmp_path_factory.mktemp("readme")
    options = ["--epochs", "1", "--val-fraction", "0.9", "--output", str(folder / "runs")]
    assert train(["-c", "quickstart", *options]) == 0
    for split in ("train", "validation"):
        for label in ("cat", "dog"):
            (folder / "imagenet" / split / label).mkdir(parents=True)
            for number in range(4):
                image = Image.new("RGB", (40, 40), (60 * number, 100, 100))
                image.save(folder / "imagenet" / split / label / f"{number}.png")
    return folder


def test_readme_python_runs(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    source = "\n".join(blocks("python"))
    assert "create_model" in source
    exec(compile(source, "README.md", "exec"), {})


def test_readme_names_exist() -> None:
    models = set(re.findall(r"`(\w+_emax)`", README))
    assert models == set(timm.list_models("*_emax"))
    for target in re.findall(r"\]\(((?!http)[^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def programs() -> list[str]:
    """The command lines of the README, but for the two that set everything up."""
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    return [line for line in lines if line and "venv" not in line]


def test_readme_set_up_commands_are_two() -> None:
    commands = [line for block in blocks("bash") for line in block.splitlines() if "venv" in line]
    assert len(commands) == 2
    assert "train.py -c configs/quickstart.yaml" in commands[0]
    assert commands[1].endswith("pytest")
    ci = (ROOT / ".ci" / "run").read_text()
    assert "readme_command train.py" in ci
    assert "readme_command pytest" in ci


@pytest.mark.slow
@pytest.mark.parametrize("line", programs())
def test_readme_command_runs(line: str, workplace: Path) -> None:
    # The same command on data, a model size and a number of ranks that exist here.
    line = line.replace("/data/imagenet", str(workplace / "imagenet"))
    line = line.replace("--nproc-per-node 8", "--standalone --nproc-per-node 2")
    program, *arguments = shlex.split(line)
    if "--data-dir" in arguments:
        small = "--epochs 1 --img-size 32 -b 2 -j 1 --model resnet10t_emax --amp-dtype bfloat16"
        arguments += small.split()
    if "--resume" in arguments:
        arguments[arguments.index("--epochs") + 1] = "2"
    launcher = {"python": [], "torchrun": ["-m", "torch.distributed.run"]}[program]
    arguments = [str(ROOT / a) if (ROOT / a).suffix == ".py" else a for a in arguments]
    result = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=workplace,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "top1: " in result.stdout.splitlines()[-1]
