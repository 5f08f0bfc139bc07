"""What a result was made with: versions, commit, machine, and when."""

import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch

from ..attention import EMAX
from ..ops import explain
from ..training.distributed import DistributedContext
from ..version import __version__

__all__ = ["commit", "environment", "now"]


def environment(context: DistributedContext) -> dict[str, Any]:
    """Return what a measurement is made with: versions, commit, machine, and when."""
    device = context.device
    cuda = device.type == "cuda"
    layer = EMAX(32).to(device)
    backends = explain(torch.zeros(1, 32, 4, 4, device=device), layer.weights())
    return {
        "backend": next(name for name, reason in backends.items() if reason is None),
        "commit": commit(),
        "emax_timm": __version__,
        "torch": str(torch.__version__),
        "timm": timm.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
        "machine": f"{platform.machine()} {_processor()}",
        "date": now(),
    }


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def commit() -> str | None:
    """Return the commit of the checkout that this package is in, with + for changes, if any."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        tracked = git("ls-files", "--error-unmatch", __file__)  # not a repository around a venv
        if not tracked or not (name := git("rev-parse", "--short=12", "HEAD")):
            return None
        return name + ("+" if git("status", "--porcelain", "--", "..") else "")
    except OSError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
