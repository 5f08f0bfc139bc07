"""`emax benchmark train` trains both loops on the same; its figures are not tested."""

import json
from pathlib import Path

import pytest
from training_testing import image_folder, run_program

from emax_timm.benchmark.command import benchmark
from emax_timm.benchmark.loop import NAMES

EMAX = "import sys; from emax_cli import main; sys.exit(main())"


@pytest.mark.slow
def test_both_loops_train_on_as_much(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")  # 32 for training
    options = ["--data-dir", images, "-b", "8", "--rounds", "2", "--model", "test_resnet"]
    command = ["-c", EMAX, "benchmark", "train"]
    result = run_program(*command, *options, "--json", "speed.json", cwd=tmp_path)
    assert result.status == 0, result.stderr
    found = json.loads((tmp_path / "speed.json").read_text())
    assert list(found["loops"]) == list(NAMES)
    for row in found["loops"].values():
        assert (row["steps"], row["images"]) == (2 * 4, 2 * 32)
        parts = row["data_wait_per_step"], row["compute_per_step"]
        assert 0 < min(parts) < sum(parts) < 2 * row["seconds_per_step"]
    assert len(found["ratios"]) == len(found["cpu_ratios"]) == 2
    table = [line.split("|")[1].strip() for line in result.stdout.splitlines() if "|" in line]
    assert table[2:] == list(NAMES)  # below the heading
    low, high = sorted(found["ratios"])
    assert f"{(low + high) / 2:.3f} ({low:.3f} to {high:.3f})" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"images", "speed.json"}


@pytest.mark.slow
def test_the_first_rank_tells_for_all(tmp_path: Path) -> None:
    images = image_folder(tmp_path / "images")
    program = tmp_path / "emax.py"
    program.write_text(EMAX)
    options = ["--data-dir", images, "-b", "8", "--rounds", "1", "--model", "test_resnet"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    result = run_program(*torchrun, program, "benchmark", "train", *options, cwd=tmp_path)
    assert result.status == 0, result.stderr
    assert result.stdout.count("| ours |") == 1
    assert "batch 8 on each of 2 ranks" in result.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "resnet_emax"], "resnet_emax"),
        (["--data-dir", "/none"], "does not exist"),
        (["--device", "abacus"], "unknown device abacus"),
    ],
)
def test_mistakes_are_refused(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark(["train", *options]) == 2
    assert message in capsys.readouterr().err
