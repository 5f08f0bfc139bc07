"""Bad input: exit status 2, one line on stderr that says what to do, nothing written.

Cases that need no data name a folder that does not exist: the message must be about the mistake, so
the data was not touched before.
"""

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from interpreters import Interpreter, Result
from tiers import mostly_slow
from training_testing import (
    SMALL,
    TRAIN,
    VALIDATE,
    files_in,
    image_folder,
    newest_checkpoint,
    only_line,
    run_program,
    state_of,
    sum_up,
)

from emax_timm.training import train, validate

SMALL_VALIDATION = ["--model", "resnet10t_emax", "--img-size", "32", "-j", "0"]

Refused = Callable[..., str]


def message(result: Result, script: str) -> str:
    assert "Traceback" not in result.stderr, result.stderr
    line = only_line(result.stderr)
    assert result.status == 2
    assert result.stdout == ""
    assert line.startswith(f"{script}: error: ")
    return line


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Runs a script's command, in this process, that must be refused, and returns its one line."""

    def refused(script: str, *arguments: str | Path) -> str:
        folder = tmp_path / "cwd"
        folder.mkdir(exist_ok=True)
        before = files_in(tmp_path)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            command = {TRAIN: train, VALIDATE: validate}[script]
            status = command([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        line = message(Result(status, printed.out, printed.err), script)
        assert files_in(tmp_path) == before
        assert not any(folder.iterdir())
        return line

    return refused


@pytest.fixture(scope="module")
def finished(programs: Interpreter, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run on `images`; not to be written to."""
    folder = tmp_path_factory.mktemp("finished")
    options = ["--output", folder, "--experiment", "run", "--epochs", "1"]
    result = programs.run(TRAIN, images, *SMALL, *options, cwd=folder)
    assert result.status == 0, result.stderr
    return folder / "run"


@pytest.fixture
def run_copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run that may be damaged."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.mark.parametrize("script", mostly_slow([TRAIN, VALIDATE]))
def test_program_started_as_users_do_refuses_an_unknown_flag(script: str, tmp_path: Path) -> None:
    # The other cases are calls in this process; this one shows that they leave nothing out.
    import interpreters

    program = interpreters.ROOT / script
    result = run_program(program, "/nowhere", "--modle", "resnet18", cwd=tmp_path)
    assert message(result, script).endswith(
        "unknown flag --modle; the nearest valid one is --model"
    )
    assert not any(tmp_path.iterdir())


MISTAKES = {
    "flag": ("--epoch 3", ["--epochs"]),
    "second folder": ("/elsewhere", ["/elsewhere"]),
    "choice": ("--sched cosin", ["cosine"]),
    "type": ("--epochs many", ["--epochs", "many"]),
    "number of values": ("--input-size 3 32", ["--input-size"]),
    "key=value": ("--model-kwargs attn_stages", ["--model-kwargs", "attn_stages"]),
    "model": ("--model resnet18_emx", ["resnet18_emx", "resnet18_emax"]),
    "model keyword": ("--model-kwargs atn_stages=[1]", ["atn_stages", "attn_stages"]),
    "keyword of another family": (
        "--model hiera_tiny_224 --model-kwargs num_klasses=3",
        ["num_klasses"],
    ),
    "attention option": (
        "--model resnet18_emax --model-kwargs attn_kwargs={'faktor':8}",
        ["faktor", "factor"],
    ),
    "attention value": (
        "--model resnet18_emax --model-kwargs attn_kwargs={'factor':0}",
        ["factor", "0"],
    ),
    "attention stage": (
        "--model resnet18_emax --model-kwargs attn_stages=[4]",
        ["stages", "0 to 3", "4"],
    ),
    "model value": ("--model-kwargs output_stride=5", ["resnet50_emax"]),
    "pooling": ("--gp averge", ["averge"]),
    "optimizer": ("--opt adamww", ["adamww", "adamw"]),
    "recipe": ("-c quikstart", ["quikstart", "quickstart"]),
    "bound": ("--epochs 0", ["epochs", "at least 1"]),
    "not a number": ("--lr nan", ["lr", "nan"]),
    "seed": ("--seed -1", ["seed", "-1"]),
    "grouping": ("--grouping-warmup 0.5 0.2", ["grouping_warmup"]),
    "infinite temperature": ("--grouping-temperature inf 1", ["grouping_temperature", "inf"]),
    "no temperature": ("--grouping-temperature nan 1", ["grouping_temperature", "nan"]),
    "probability": ("--hflip 2", ["hflip", "2"]),
    "crop": ("--crop-pct 0", ["crop_pct"]),
    "no number": ("--weight-decay nan", ["weight_decay"]),
    "weights among the model's arguments": (
        "--model-kwargs checkpoint_path=x.pth",
        ["checkpoint_path"],
    ),
    "abstract device": ("--device meta", ["meta", "cpu"]),
    "odd batch": ("--mixup 0.2 -b 7", ["even", "7"]),
    "splits": ("--aug-splits 1", ["aug_splits"]),
    "device": ("--device gpu", ["gpu", "cpu"]),
    "folder names": ("--experiment a/b", ["--experiment", "a/b"]),
    "parent folder": ("--experiment ..", ["--experiment"]),
    "pickle to start from": ("--pretrained-path w.pth", ["w.pth"]),
    "run to resume": ("--resume /nowhere", ["/nowhere"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_train_refuses_a_mistake_before_it_touches_the_data(refused: Refused, name: str) -> None:
    mistake, hints = MISTAKES[name]
    line = refused(TRAIN, "/nowhere", *mistake.split())
    for hint in hints:
        assert hint in line
    assert "the data folder" not in line


WITH_DATA = {
    "model source": ("--model local-dir:/nowhere", ["/nowhere"]),
    "no weights to start from": ("--pretrained-path w.safetensors", ["w.safetensors"]),
    "auto-augment policy": ("--aa rnd-m9", ["rnd-m9"]),
    "crop mode": ("--train-crop-mode rcc", ["rcc"]),
    "validation filter": ("--interpolation bicubik", ["bicubik"]),
    "training filter": ("--train-interpolation bicubik", ["bicubik"]),
    "mean": ("--mean 0.5 0.5", ["mean"]),
    "compiler": ("--torchcompile inducter", ["inducter"]),
    "second-order optimizer": ("--opt adahessian", ["adahessian"]),
    "optimizer option": ("--opt adamw --opt-kwargs fast=1", ["adamw", "fast"]),
    "optimizer betas": ("--opt adamw --opt-betas 0.9", ["adamw"]),
    "optimizer of a missing package": ("--opt fusedadam", ["fusedadam"]),
    "data set type": ("--dataset trch/cifar10", ["trch"]),
    "data set": ("--dataset torch/cifar11", ["cifar11"]),
    "sample": ("--dataset sample/fasion", ["fasion", "fashion_mnist"]),
    "sample of no name": ("--dataset sample/", ["fashion_mnist"]),
    "training split": ("--train-split trian", ["trian"]),
    "validation split": ("--val-split valdation", ["valdation"]),
    "test split": ("--test-split tset", ["tset"]),
    "class map": ("--class-map classes.txt", ["classes.txt"]),
    "pickled class map": ("--class-map classes.pkl", ["classes.pkl"]),
    "few classes": ("--num-classes 1", ["2 classes", "--num-classes"]),
    "no batch": ("-b 64", ["32", "--batch-size"]),
    "nothing held out": ("--val-fraction 0.001", ["--val-fraction"]),
    "image mode": ("--input-img-mode RBG", ["RBG"]),
    "long name": (f"--experiment {'x' * 300}", ["xxx"]),
}


@pytest.mark.parametrize("name", WITH_DATA)
def test_train_refuses_what_does_not_fit_the_data(
    refused: Refused, images: Path, name: str
) -> None:
    mistake, hints = WITH_DATA[name]
    line = refused(TRAIN, images, *SMALL, "--epochs", "1", *mistake.split())
    for hint in hints:
        assert hint in line


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("modle: resnet18", ["unknown key modle", "is model"]),
        ("epochs: many", ["epochs", "an integer", "many"]),
        ("sched: cosin", ["cosin", "cosine"]),
        ("model: resnet18_emx", ["resnet18_emax"]),
        ("model_kwargs: {attn_kwargs: {faktor: 8}}", ["faktor", "factor"]),
        ("model: |\n  two\n  lines", ["two", "lines"]),
        ("- list", ["key: value"]),
    ],
)
def test_train_refuses_a_mistake_in_its_file(
    refused: Refused, tmp_path: Path, text: str, hints: list[str]
) -> None:
    (tmp_path / "my.yaml").write_text(text + "\n")
    line = refused(TRAIN, "/nowhere", "-c", tmp_path / "my.yaml")
    for hint in hints:
        assert hint in line


@pytest.mark.parametrize("script", [TRAIN, VALIDATE])
def test_program_without_data_says_how_to_give_it(refused: Refused, script: str) -> None:
    assert "--data-dir" in refused(script, "--model", "resnet18")


def test_train_refuses_a_missing_or_empty_folder(refused: Refused, tmp_path: Path) -> None:
    assert "/nowhere" in refused(TRAIN, "/nowhere", *SMALL)
    (tmp_path / "empty").mkdir()
    line = refused(TRAIN, tmp_path / "empty", *SMALL)
    assert "empty is empty" in line


@pytest.mark.parametrize("splits", [["validation"], ["train"], ["images"]])
def test_train_refuses_a_folder_without_a_split(
    refused: Refused, tmp_path: Path, splits: list[str]
) -> None:
    # timm would read the folder itself in place of a missing split: with `train` alone the
    # training images would validate.
    folder = image_folder(tmp_path / "data", splits)
    line = refused(TRAIN, folder, *SMALL, "--epochs", "1")
    assert ("validation" if splits == ["train"] else "train") in line


def test_train_refuses_a_split_without_images(refused: Refused, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", ["train"])
    (folder / "validation" / "cat").mkdir(parents=True)
    assert "validation" in refused(TRAIN, folder, *SMALL, "--epochs", "1")


@pytest.mark.parametrize("others", [["cat", "dog", "emu"], ["cat"], ["cat", "wolf"]])
def test_train_refuses_classes_that_differ_between_splits(
    refused: Refused, tmp_path: Path, others: list[str]
) -> None:
    folder = image_folder(tmp_path / "data", ["train"])
    image_folder(folder, ["validation"], others)
    line = refused(TRAIN, folder, *SMALL, "--epochs", "1")
    assert "validation" in line
    for name in {"cat", "dog"} ^ set(others):
        assert name in line


def test_train_refuses_a_class_map_that_misses_classes(
    refused: Refused, images: Path, tmp_path: Path
) -> None:
    (tmp_path / "classes.txt").write_text("emu\ngnu\n")
    line = refused(TRAIN, images, *SMALL, "--class-map", tmp_path / "classes.txt")
    assert "train" in line


def test_train_refuses_the_folder_of_a_run(refused: Refused, images: Path, run_copy: Path) -> None:
    options = [*SMALL, "--output", run_copy.parent, "--experiment", run_copy.name]
    line = refused(TRAIN, images, *options)
    assert "--resume" in line
    assert str(run_copy) in line


@pytest.mark.parametrize("output", ["file", "file/below"])
def test_train_refuses_an_output_that_is_a_file(
    refused: Refused, images: Path, tmp_path: Path, output: str
) -> None:
    (tmp_path / "file").write_text("precious")
    line = refused(TRAIN, images, *SMALL, "--output", tmp_path / output)
    assert str(tmp_path / "file") in line
    assert (tmp_path / "file").read_text() == "precious"


class Canary:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return open, (str(self.path), "w")


def spoil(path: Path, how: str, canary: Path) -> None:
    """Put something in the place of a file of weights."""
    content = path.read_bytes()
    if how == "pickle":
        path.write_bytes(pickle.dumps(Canary(canary)))
    elif how == "torch file":
        torch.save({"weight": Canary(canary)}, path)
    elif how == "old torch file":
        torch.save(Canary(canary), path, _use_new_zipfile_serialization=False)
    else:
        cut = {"cut": len(content) // 2, "header only": 9, "nothing": 0}
        path.write_bytes(b"<html></html>" * 9 if how == "page" else content[: cut[how]])


SPOILT = ["pickle", "torch file", "old torch file", "cut", "header only", "nothing", "page"]


@pytest.mark.parametrize("how", SPOILT)
def test_validate_refuses_a_spoilt_checkpoint(
    refused: Refused, run_copy: Path, tmp_path: Path, how: str
) -> None:
    weights, canary = run_copy / "model.safetensors", tmp_path / "canary"
    spoil(weights, how, canary)
    assert str(weights) in refused(VALIDATE, "--checkpoint", weights)
    assert not canary.exists()


@pytest.mark.parametrize("how", ["torch file", "cut"])
@pytest.mark.parametrize("flag", ["--initial-checkpoint", "--pretrained-path"])
def test_train_refuses_to_start_from_a_spoilt_checkpoint(
    refused: Refused, images: Path, run_copy: Path, tmp_path: Path, flag: str, how: str
) -> None:
    weights, canary = run_copy / "model.safetensors", tmp_path / "canary"
    spoil(weights, how, canary)
    assert str(weights) in refused(TRAIN, images, *SMALL, flag, weights)
    assert not canary.exists()


@pytest.mark.parametrize("flag", ["--initial-checkpoint", "--pretrained-path"])
def test_train_refuses_to_start_from_a_pickle(
    refused: Refused, images: Path, tmp_path: Path, flag: str
) -> None:
    weights, canary = tmp_path / "weights.pth", tmp_path / "canary"
    torch.save({"weight": Canary(canary)}, weights)
    line = refused(TRAIN, images, *SMALL, flag, weights)
    assert ".safetensors files only" in line
    assert not canary.exists()


@pytest.mark.parametrize("how", ["pickle", "torch file", "old torch file", "cut", "nothing"])
def test_train_refuses_to_resume_from_a_spoilt_state(
    refused: Refused, run_copy: Path, tmp_path: Path, how: str
) -> None:
    state, canary = newest_checkpoint(run_copy) / "state.pt", tmp_path / "canary"
    spoil(state, how, canary)
    sum_up(state.parent)  # as whoever plants a file would
    line = refused(TRAIN, "--resume", run_copy, "--epochs", "2")
    assert str(state) in line
    assert not canary.exists()
    # Advice to lift the restriction would undo it.
    assert "False" not in line


@pytest.mark.parametrize("content", [[1], {"epoch": 1}, None])
def test_train_refuses_to_resume_from_another_kind_of_state(
    refused: Refused, run_copy: Path, content: object
) -> None:
    folder = newest_checkpoint(run_copy)
    if content is None:
        content = state_of(run_copy)
        del content["best"]
    torch.save(content, folder / "state.pt")
    sum_up(folder)
    assert "run" in refused(TRAIN, "--resume", run_copy, "--epochs", "2")


@pytest.mark.parametrize("name", ["state.pt", "model.pth", "model.bin", "model.safetensors.pt"])
def test_validate_refuses_files_that_may_be_pickles(
    refused: Refused, run_copy: Path, tmp_path: Path, name: str
) -> None:
    torch.save({"weight": Canary(tmp_path / "canary")}, run_copy / name)
    line = refused(VALIDATE, "--checkpoint", run_copy / name)
    assert name in line
    assert "only" in line  # for what they are called, before they are opened
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--model", "resnet18", "--model-kwargs"], "it lacks"),
        (["--model", "resnet10t", "--model-kwargs", "channels=[8,8,8,8]"], "the model lacks"),
        (["--model-kwargs", "channels=[8,8,8,16]"], "[16"),
        (["--num-classes", "3"], "fc.weight is [2, 8], in the model [3, 8]"),
        (["--in-chans", "1"], "conv1.0.weight"),
    ],
)
def test_validate_refuses_weights_of_another_model(
    refused: Refused, finished: Path, arguments: list[str], hint: str
) -> None:
    line = refused(VALIDATE, "--checkpoint", finished / "model.safetensors", *arguments)
    assert "model.safetensors" in line
    assert hint in line


VALIDATE_MISTAKES = {
    "nothing": ("", ["--checkpoint", "--model"]),
    "flag": ("--modle resnet18", ["--modle", "--model"]),
    "training flag": ("--epochs 3", ["--epochs"]),
    "checkpoint": ("--checkpoint /nowhere.safetensors", ["/nowhere.safetensors"]),
    "recipe": ("-c quikstart --model resnet18", ["quikstart"]),
    "model": ("--model resnet18_emx", ["resnet18_emax"]),
    "attention option": (
        "--model resnet18_emax --model-kwargs attn_kwargs={'faktor':8}",
        ["faktor", "factor"],
    ),
    "unpublished weights": ("--model convnextv2_atto_emax --pretrained", ["convnextv2_atto_emax"]),
    "device": ("--model resnet18 --device gpu", ["gpu"]),
    "batch": ("--model resnet18 -b 0", ["batch_size"]),
}


@pytest.mark.parametrize("name", VALIDATE_MISTAKES)
def test_validate_refuses_a_mistake(refused: Refused, images: Path, name: str) -> None:
    mistake, hints = VALIDATE_MISTAKES[name]
    data = images if name == "unpublished weights" else "/nowhere"
    line = refused(VALIDATE, data, *mistake.split())
    for hint in hints:
        assert hint in line


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        ("--split tset", "tset"),
        ("--interpolation bicubik", "bicubik"),
        ("--mean 0.5 0.5", "mean"),
        ("--dataset sample/fasion", "fashion_mnist"),
        ("--data-dir /nowhere", "/nowhere"),
        ("/nowhere", "/nowhere"),
    ],
)
def test_validate_of_a_run_refuses_a_mistake(
    refused: Refused, finished: Path, arguments: str, hint: str
) -> None:
    checkpoint = finished / "model.safetensors"
    assert hint in refused(VALIDATE, "--checkpoint", checkpoint, *arguments.split())


def test_validate_refuses_data_of_other_classes(
    refused: Refused, finished: Path, tmp_path: Path
) -> None:
    folder = image_folder(tmp_path / "data", ["validation"], ["cat", "wolf"])
    line = refused(VALIDATE, folder, "--checkpoint", finished / "model.safetensors")
    assert "dog" in line
    assert "wolf" in line


def test_validate_refuses_more_classes_than_the_model_has(refused: Refused, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", ["validation"], ["a", "b", "c"])
    line = refused(VALIDATE, folder, *SMALL_VALIDATION, "--num-classes", "2")
    assert "3 classes" in line


@pytest.mark.parametrize("content", ["{", "[]", ""])
@pytest.mark.parametrize("name", ["config.yaml", "config.json"])
def test_validate_refuses_a_spoilt_description_of_the_run(
    refused: Refused, run_copy: Path, name: str, content: str
) -> None:
    (run_copy / name).write_text(content)
    line = refused(VALIDATE, "--checkpoint", run_copy / "model.safetensors")
    assert name in line


def test_validate_without_a_description_asks_for_the_model(
    refused: Refused, run_copy: Path, images: Path
) -> None:
    for name in ("config.json", "config.yaml"):
        (run_copy / name).unlink()
    line = refused(VALIDATE, images, "--checkpoint", run_copy / "model.safetensors")
    assert "--model" in line


def test_train_refuses_to_resume_a_run_of_another_model(refused: Refused, run_copy: Path) -> None:
    line = refused(TRAIN, "--resume", run_copy, "--epochs", "2", "--model", "resnet10t")
    assert "other options" in line
