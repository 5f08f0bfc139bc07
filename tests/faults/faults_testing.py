"""What the tests of faults share: a run with every source of randomness, and what it leaves."""

import shutil
from pathlib import Path

from training_testing import SMALL, left_by, same_tensors

# 3 epochs of 4 steps, or of 2 on two ranks, with a checkpoint after every step.
OPTIONS = """
    --mixup 0.4 --cutmix 1 --reprob 0.5 --aa rand-m9-mstd0.5 --drop-path 0.2 --drop 0.1
    --model-ema --model-ema-decay 0.9 --opt adamw --lr 0.001 --sched-on-updates
    --epochs 3 --recovery-interval 1 --output . --experiment run --resume auto
"""
RUN = [*SMALL, *OPTIONS.split()]

# A batch of the last rank is multiplied at step 6.
NAN_AT = """
def nan_at(self, batches):
    if self.step == 5 and rank == int(os.environ.get("WORLD_SIZE", 1)) - 1:
        images, labels = batches[0]
        batches = [(images * {factor}, labels)]
    return step(self, batches)
Trainer.train_step = nan_at
"""


def keep_only(folder: Path, step: int) -> None:
    """Let a run stand where it stood after a step, as if it had been killed then."""
    (kept,) = (folder / "checkpoints").glob(f"epoch-*-step-{step:08}")
    for path in (folder / "checkpoints").iterdir():
        if path != kept:
            shutil.rmtree(path)
    link = folder / "last.safetensors"
    link.unlink()
    link.symlink_to(kept.relative_to(folder) / "model.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    """Both folders hold bitwise the same."""
    first, second = left_by(found), left_by(expected)
    assert first.keys() == second.keys()
    for part, value in first.items():
        assert same_tensors(value, second[part]), part


def with_fault(folder: Path, fault: str) -> Path:
    """A train.py that first does `fault`, Python that may patch the `Trainer` class."""
    script = folder / "faulty_train.py"
    script.write_text(
        "import os, signal, sys, time\nimport torch\n"
        "from emax_timm.training.trainer import Trainer\n"
        "from emax_timm.training import train\n"
        "step, rank = Trainer.train_step, int(os.environ.get('RANK', 0))\n"
        f"{fault}\n"
        "raise SystemExit(train())\n"
    )
    return script
