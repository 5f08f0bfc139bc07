"""The table of commands: what each does with `--help`, with a wrong flag, and before torch."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from training_testing import only_line, run_program

from emax_cli import COMMANDS, WAITING, main
from emax_timm import runner

ANSWERS = {"--help": 0, "trian": 2}


@pytest.mark.parametrize("word", ANSWERS)
def test_answers_that_need_no_model_load_neither_torch_nor_timm(word: str, tmp_path: Path) -> None:
    asked = f"import sys, emax_cli; status = emax_cli.main([{word!r}])\n"
    told = "print(status, *sys.modules)"
    done = run_program("-c", asked + told, cwd=tmp_path)
    assert done.status == 0, done.stderr
    status, *modules = done.last_line.split()
    assert int(status) == ANSWERS[word]
    assert not {"emax_timm", "numpy", "timm", "torch"} & set(modules)


def test_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    @runner.command("emax wait")
    def wait(argv: Sequence[str], prog: str) -> int:
        raise KeyboardInterrupt

    assert wait([]) == 130
    assert only_line(capsys.readouterr().err) == "emax wait: interrupted"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: emax {command} ")
    assert shown.err == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_flag_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--no-such-flag"]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert only_line(shown.err).startswith(f"emax {command}: error: ")


TOO_LONG = "a" * 300  # for the name of a file, so that the file cannot even be looked for


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data-dir", TOO_LONG],
        ["train", "--resume", TOO_LONG],
        ["validate", "--checkpoint", f"{TOO_LONG}.safetensors"],
        ["curves", TOO_LONG],
        ["plan", TOO_LONG, "--gpus", "1"],
        ["list", "--write", TOO_LONG],
        ["benchmark", "modules", "--write", TOO_LONG],
        ["export", "resnet18", "--output", "a.pt2", "--checkpoint", f"{TOO_LONG}.safetensors"],
        ["predict", TOO_LONG],
        ["visualize", "--images", TOO_LONG, "--output", "report"],
        ["publish", TOO_LONG, "--repo", "me/model.tag"],
        ["weights", "verify", TOO_LONG],
    ],
    ids=lambda arguments: arguments[0],
)
def test_a_path_that_cannot_be_read_is_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith(f"emax {arguments[0]}: error: ")
    assert TOO_LONG in line


def test_an_error_that_names_no_file_keeps_its_traceback() -> None:
    @runner.command("emax test")
    def fails(argv: Sequence[str], prog: str) -> int:
        raise OSError("of unknown origin")

    with pytest.raises(OSError, match="of unknown origin"):
        fails([])


@pytest.mark.parametrize(
    ("command", "own", "policy"),
    [
        ("train", {}, "passive"),
        ("predict", {}, "passive"),
        ("train", {"OMP_WAIT_POLICY": "active"}, "active"),
        ("train", {"GOMP_SPINCOUNT": "1000"}, None),
        ("train", {"OMP_NUM_THREADS": "1"}, "passive"),
        ("benchmark", {}, None),
    ],
)
def test_threads_that_wait_sleep_unless_the_user_says_otherwise(
    command: str, own: dict[str, str], policy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    environment.pop("OMP_NUM_THREADS", None)
    environment |= own
    monkeypatch.setattr(os, "environ", environment)
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert environment.get("OMP_WAIT_POLICY") == policy
    # torchrun sets it for its ranks.
    assert environment.get("OMP_NUM_THREADS") == own.get("OMP_NUM_THREADS")
