"""The recipes under configs/: options, model, stated source and stated batch."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import timm
from interpreters import ROOT
from recipe_hours import with_estimate

import emax_timm  # noqa: F401  (registers the models)
from emax_timm.training import TrainConfig
from emax_timm.training.config import from_mapping, parse_settings, read_yaml
from emax_timm.training.config.checks import check_config

FOLDER = ROOT / "configs"
STUDIES = FOLDER / "studies"  # tests/compare/test_study.py
RECIPES = [path for path in sorted(FOLDER.rglob("*.yaml")) if STUDIES not in path.parents]
IMAGENET = sorted((FOLDER / "imagenet").glob("*.yaml"))
SLURM = FOLDER / "imagenet" / "slurm.sh"
BATCH = re.compile(r"(\d+) GPUs x (\d+) images x (\d+) = (\d+)(?:, with (-.+?)\.$)?", re.MULTILINE)

imagenet = pytest.mark.parametrize("path", IMAGENET, ids=lambda path: path.stem)


def load(path: Path) -> TrainConfig:
    return from_mapping(TrainConfig, read_yaml(path), str(path))


def head(path: Path) -> str:
    """The comment at the head of a recipe, without its signs."""
    lines = path.read_text(encoding="utf-8").splitlines()
    end = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line[2:] for line in lines[:end])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_read_and_its_model_makes_a_step(path: Path) -> None:
    config = load(path)
    assert timm.is_model(config.model)  # of another kind of model no step is tried
    check_config(config)
    assert config.experiment


def test_recipes_of_imagenet_are_all_there() -> None:
    assert {path.stem for path in IMAGENET} >= {
        *("convnext_tiny_emax", "mobilenetv2_100_emax"),
        *("resnet50_emax_a1", "resnet50_emax_a2", "resnet50_emax_a3", "resnet50_emax_classic90"),
        *("resnet50_emax_finetune10", "resnet50_emax_finetune30"),
    }
    assert len({load(path).experiment for path in IMAGENET}) == len(IMAGENET)


@imagenet
def test_recipe_names_its_source_and_marks_its_estimates(path: Path) -> None:
    text = head(path)
    assert re.search(r"arxiv\.org/abs/\d{4}\.\d{5}|[Oo]ur own choice", text)
    assert "Estimates, not measurements" in text


@pytest.mark.slow
@imagenet
def test_recipe_has_the_estimate_that_follows_from_the_measured_speeds(path: Path) -> None:
    """If not, `python .ci/recipe_hours.py` writes it anew."""
    assert path.read_text(encoding="utf-8") == with_estimate(path)


@imagenet
def test_recipe_has_the_batch_that_it_states(path: Path) -> None:
    config, stated = load(path), BATCH.findall(head(path))
    assert len(stated) == 2
    totals = set()
    for gpus, images, passes, total, flags in stated:
        assert int(gpus) * int(images) * int(passes) == int(total)
        settings = parse_settings(TrainConfig, ["-c", str(path), *flags.split()], "train.py")
        run = from_mapping(TrainConfig, settings, "the command line")
        assert (run.batch_size, run.grad_accum_steps) == (int(images), int(passes))
        totals.add(int(total))
    assert len(totals) == 1
    first, second = stated
    assert (config.batch_size, config.grad_accum_steps) == (int(first[1]), int(first[2]))
    assert (first[0], first[4]) == ("8", "")
    nodes, flags = int(second[0]) // 8, second[4]
    assert f"--nnodes {nodes} " in head(path)
    command = f"sbatch --nodes {nodes} configs/imagenet/slurm.sh {relative(path)} {flags}"
    assert re.sub(r"\\\n +", "", head(path)).endswith(command)


@imagenet
def test_recipe_names_itself_in_its_commands(path: Path) -> None:
    assert set(re.findall(r"configs/imagenet/\w+\.yaml", head(path))) == {relative(path)}


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize(
    ("name", "rate", "batch", "epochs"),
    [
        ("resnet50_emax_a1", 5e-3, 2048, 600),
        ("resnet50_emax_a2", 5e-3, 2048, 300),
        ("resnet50_emax_a3", 8e-3, 2048, 100),
        ("resnet50_emax_classic90", 0.1, 256, 90),
        ("convnext_tiny_emax", 4e-3, 4096, 300),
        ("mobilenetv2_100_emax", 0.4, 512, 400),
    ],
)
def test_recipe_has_the_source_s_rate_batch_and_length(
    name: str, rate: float, batch: int, epochs: int
) -> None:
    config = load(FOLDER / "imagenet" / f"{name}.yaml")
    assert (config.lr, config.epochs) == (rate, epochs)
    assert 8 * config.batch_size * config.grad_accum_steps == batch


@pytest.mark.parametrize("name", ["finetune10", "finetune30"])
def test_fine_tuning_starts_from_the_warm_weights(name: str) -> None:
    path = FOLDER / "imagenet" / f"resnet50_emax_{name}.yaml"
    config = load(path)
    assert config.pretrained
    cfg = timm.get_pretrained_cfg(config.model)
    assert cfg is not None
    assert f"{config.model}.{cfg.tag}" in head(path)


# The commands of Slurm and torchrun, written down instead of run; the first training is signalled.
FAKE = """#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"
case $(basename "$0") in
    scontrol) [[ $1 == show ]] && echo node1 && echo node2 ;;
    srun)
        [[ $SIGNALLED ]] || exit "$STATUS"
        kill -USR1 "$PPID"
        for _ in {1..100}; do grep -q '^scancel' "$CALLS" && exit 143; sleep 0.05; done ;;
esac
exit 0
"""


@pytest.mark.parametrize(("signalled", "status"), [("", 0), ("", 3), ("yes", 0)])
def test_slurm_script_starts_and_requeues(tmp_path: Path, signalled: str, status: int) -> None:
    calls = tmp_path / "calls"
    for name in ("srun", "scontrol", "scancel"):
        (tmp_path / name).write_text(FAKE)
        (tmp_path / name).chmod(0o755)
    environment = {
        **os.environ,
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)},
        **{"SIGNALLED": signalled, "STATUS": str(status)},
        **{"SLURM_JOB_ID": "70123", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2"},
        "SLURM_GPUS_ON_NODE": "8",
    }
    command = ["bash", str(SLURM), "r.yaml", "-b", "128"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    lines = calls.read_text().splitlines()
    assert [line for line in lines if line.startswith("srun")] == [
        "srun --kill-on-bad-exit=1 torchrun --nnodes 2 --nproc-per-node 8 --rdzv-id 70123 "
        "--rdzv-backend c10d --rdzv-endpoint node1:20123 train.py -c r.yaml --resume auto -b 128"
    ]
    assert ("scontrol requeue 70123" in lines) == bool(signalled)
    assert ("scancel --signal=TERM 70123.0" in lines) == bool(signalled)


def test_slurm_script_asks_for_requeue_and_a_signal() -> None:
    text = SLURM.read_text()
    assert "\n#SBATCH --requeue\n" in text
    assert re.search(r"\n#SBATCH --signal=B:USR1@\d+\n", text)
