"""`emax benchmark startup`: the time to import the package and create a model, against timm's.

Each is measured in a fresh process, because the first creation in a process does more work than
later ones.
"""

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from ..tables import heading, row
from .bounds import verdict
from .networks import BASES, check_networks
from .timing import Measured, described, machine, measured, milliseconds

__all__ = ["BASES", "measure_startup", "report_startup"]

CHILD = """
import importlib, json, sys, time
package, name = sys.argv[1:]
start = time.perf_counter()
importlib.import_module(package)
imported = time.perf_counter()
import timm
timm.create_model(name)
print(json.dumps([imported - start, time.perf_counter() - imported]))
"""
THEIRS, OURS = "timm", "emax_timm"
# Bounds: the seconds that our import may add to timm's, and creation time over the baseline's.
IMPORT, CREATION = 0.3, 1.5


def measure_startup(bases: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time imports and model creations in fresh processes, interleaved.

    Args:
        bases: Names of baselines; each is measured beside its variant with EMAX.
        rounds: How often each is measured, after one round that fills the disk cache.

    Returns:
        `imports[package]` and `creations[model]`, seconds as in `Measured`.

    Raises:
        UsageError: If a network does not exist.
    """
    check_networks(bases, ["baseline", "EMAX"])
    pairs = [pair for base in bases for pair in ((THEIRS, base), (OURS, f"{base}_emax"))]
    imports: dict[str, list[float]] = {THEIRS: [], OURS: []}
    creations: dict[str, list[float]] = {name: [] for _, name in pairs}
    for number in tqdm(range(1 + rounds), "processes", leave=False, disable=None):
        for package, name in pairs:
            command = [sys.executable, "-c", CHILD, package, name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            if number > 0:
                imported, created = json.loads(done.stdout)
                imports[package].append(imported)
                creations[name].append(created)
    return {
        "machine": machine(torch.device("cpu")),
        "rounds": rounds,
        "imports": {package: measured(times) for package, times in imports.items()},
        "creations": {name: measured(times) for name, times in creations.items()},
    }


def report_startup(found: dict[str, Any]) -> str:
    """Format the result of `measure_startup` as Markdown."""
    imports, creations = found["imports"], found["creations"]
    lines = heading(["", "ms"])
    lines += [row([f"import {name}", milliseconds(Measured(*t))]) for name, t in imports.items()]
    lines += [row([f"create {name}", milliseconds(Measured(*t))]) for name, t in creations.items()]
    added = Measured(*imports[OURS]).median - Measured(*imports[THEIRS]).median
    lines += ["", *heading(["bound", "at most", "", ""])]
    name = f"import {OURS} - import {THEIRS}, seconds"
    lines.append(verdict(name, IMPORT, [added], added <= IMPORT))
    for base, variant in zip(*[iter(creations)] * 2, strict=True):
        ratio = Measured(*creations[variant]).median / Measured(*creations[base]).median
        name = f"create {variant} / create {base}"
        lines.append(verdict(name, CREATION, [ratio], ratio <= CREATION))
    lines += [
        "",
        f"Medians of {found['rounds']} interleaved rounds of fresh processes, quartiles in "
        f"brackets; imports are measured once for each model. {described(found['machine'])}.",
    ]
    return "\n".join(lines)
