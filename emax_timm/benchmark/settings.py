"""`emax benchmark settings`: layers by memory format, dtype and CPU instructions, in one table.

Each setting is measured by `emax benchmark modules` in a process of its own, because torch chooses
its CPU instructions when it is loaded.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from ..tables import heading, row
from ..training.config import UsageError
from .layers import PASSES
from .methods import CPP, backend_serves
from .timing import Measured, described, digits

__all__ = ["measure_settings", "report_settings"]

PEERS = ("SE", "CBAM")
EMAX = "import sys; from emax_cli import main; sys.exit(main())"
LOADED = "import sys; from emax_timm.ops.cpp.library import problem; sys.exit(bool(problem()))"


class Setting(NamedTuple):
    """Options of `emax benchmark modules`, and environment variables for it."""

    options: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()


SETTINGS = [
    Setting(),
    Setting(("--channels-last",)),
    Setting(("--dtype", "bfloat16")),
    Setting(("--dtype", "bfloat16", "--channels-last")),
]
AVX2 = Setting(variables=(("ATEN_CPU_CAPABILITY", "avx2"),))


def measure_settings(
    shapes: Sequence[tuple[int, ...]],
    rounds: int,
    device: torch.device,
    methods: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measure layers in every setting that this machine supports.

    Args:
        shapes: Sizes [b, c, h, w] of the inputs.
        rounds: How often each time is measured.
        device: The device of the inputs and the layers.
        methods: The methods, of `layers.METHODS`; None for EMAX in PyTorch, its fastest variant,
            and `PEERS`.

    Returns:
        `settings`, the results of `emax benchmark modules` in each.

    Raises:
        UsageError: If a measuring process fails.
    """
    if methods is None:
        fastest = "EMAX, C++" if backend_serves(CPP, device, torch.float32) else "EMAX, compiled"
        methods = [fastest, "EMAX", *PEERS]
    settings = list(SETTINGS)
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512":
        settings.append(AVX2)
    options = ["--device", str(device), "--rounds", str(rounds), "--methods", *methods]
    options += ["--shapes", *("x".join(map(str, shape)) for shape in shapes)]
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "modules.json")
        for setting in tqdm(settings, "settings", leave=False, disable=None):
            if any("C++" in name for name in methods):
                _build_kernels(setting)
            words = ["benchmark", "modules", *options, *setting.options, "--json", str(file)]
            _run(words, setting)
            found.append(json.loads(file.read_text()))
    return {"rounds": rounds, "settings": found}


def _build_kernels(setting: Setting) -> None:
    """Build the C++ backend for the CPU instructions of a setting, unless it is built already."""
    if _process(LOADED, [], setting).returncode:
        kind = dict(setting.variables).get("ATEN_CPU_CAPABILITY", "this CPU")
        print(f"building the kernels for {kind}", file=sys.stderr)
        _run(["kernels", "build"], setting)


def _run(words: Sequence[str], setting: Setting) -> None:
    done = _process(EMAX, words, setting)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UsageError(f"`emax {' '.join(words[:2])}` failed: {last}")


def _process(
    program: str, words: Sequence[str], setting: Setting
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **dict(setting.variables)}
    command = [sys.executable, "-c", program, *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def report_settings(found: dict[str, Any]) -> str:
    """Format the result of `measure_settings` as Markdown."""
    first = found["settings"][0]
    shapes = ", ".join("x".join(map(str, shape)) for shape in first["shapes"])
    lines: list[str] = []
    for passes in PASSES:
        methods = list(first["times"][passes])
        pairs = [(ours, peer) for ours in methods for peer in PEERS if ours.startswith("EMAX")]
        pairs = [pair for pair in pairs if pair[1] in methods]
        ratios = [f"{ours} / {peer}" for ours, peer in pairs]
        lines += heading([passes, *(f"{name}, ms" for name in methods), *ratios])
        for setting in found["settings"]:
            medians = {
                name: [Measured(*one).median for one in times]
                for name, times in setting["times"][passes].items()
            }
            cells = [_name(setting)]
            cells += [digits(1000 * geometric_mean(medians[name])) for name in methods]
            cells += [_ratio(medians[ours], medians[peer]) for ours, peer in pairs]
            lines.append(row(cells))
        lines.append("")
    facts = {key: value for key, value in first["machine"].items() if key != "instructions"}
    lines.append(
        f"Geometric means over {shapes}, of ratios with the least and greatest in brackets; "
        f"medians of {found['rounds']} interleaved rounds. {described(facts)}."
    )
    return "\n".join(lines)


def _name(setting: dict[str, Any]) -> str:
    instructions = setting["machine"].get("instructions")  # None on a GPU
    words = [setting["dtype"], setting["memory_format"].removesuffix("_format"), instructions]
    return ", ".join(filter(None, words))


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> str:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{geometric_mean(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
