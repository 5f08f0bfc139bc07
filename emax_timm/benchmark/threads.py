"""`emax benchmark threads`: how much a competing process slows down training on the CPU.

OpenMP's threads wait for each other in a loop that keeps a core busy (they spin) before they sleep.
If every thread has a core, this saves the time of waking up. If another process needs a core, a
thread that computes waits for one that spins. Each policy runs in a process of its own, because
OpenMP reads its environment variables only once.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import timm
import torch
from torch.nn import functional as F
from tqdm import tqdm

from ..tables import heading, row
from .timing import Measured, described, machine, measured, milliseconds

__all__ = ["measure_threads", "report_threads"]

CHILD = "from emax_timm.benchmark.threads import serve; serve()"
BUSY = "while True: pass"
# The environment variables of each policy; all other variables of OpenMP are unset.
POLICIES = {
    "threads spin": {},
    "threads spin 1000 times": {"GOMP_SPINCOUNT": "1000"},
    "threads sleep": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
OTHERS = "the machine as it is", "a busy process beside it"


def serve() -> None:
    """Train the quickstart's model for as many steps as each line of stdin says.

    For each line the mean time of a step, in seconds, goes to stdout.
    """
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet10t_emax", num_classes=10, in_chans=1, channels=(32, 64, 128, 256)
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    images, labels = torch.randn(64, 1, 32, 32), torch.arange(64) % 10
    print(flush=True)
    for line in sys.stdin:
        begin = time.perf_counter()
        for _ in range(int(line)):
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        print((time.perf_counter() - begin) / int(line), flush=True)


def measure_threads(steps: int, rounds: int) -> dict[str, Any]:
    """Time training steps under each policy, interleaved, with and without a competing process.

    Args:
        steps: Training steps per measurement.
        rounds: How often each is measured, after one round that warms up.

    Returns:
        `times[policy][other]`, seconds per step as in `Measured`, and `load`, the load average of
        the last minute before and after; None where the system has none.
    """
    times = {policy: {other: [] for other in OTHERS} for policy in POLICIES}
    load = [_load()]
    with ExitStack() as stack:
        children = {name: stack.enter_context(_child(POLICIES[name])) for name in POLICIES}
        for number in tqdm(range(1 + rounds), "rounds", leave=False, disable=None):
            for other in OTHERS:
                with ExitStack() as beside:
                    if other == OTHERS[1]:
                        beside.enter_context(_process(BUSY, os.environ))
                    for policy, child in children.items():
                        child.stdin.write(f"{steps}\n")
                        child.stdin.flush()
                        seconds = json.loads(child.stdout.readline())
                        if number > 0:
                            times[policy][other].append(seconds)
    load.append(_load())
    return {
        "machine": machine(torch.device("cpu")),
        "cores": os.cpu_count(),
        "steps": steps,
        "rounds": rounds,
        "load": load,
        "times": {
            policy: {other: measured(seconds) for other, seconds in found.items()}
            for policy, found in times.items()
        },
    }


@contextmanager
def _child(variables: dict[str, str]) -> Iterator[Any]:
    own = ("OMP_", "GOMP_", "KMP_", "MKL_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    with _process(CHILD, {**clean, **variables}) as child:
        child.stdout.readline()  # the child is ready
        yield child


@contextmanager
def _process(program: str, variables: Any) -> Iterator[Any]:
    command = [sys.executable, "-c", program]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=variables, **pipes)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _load() -> float | None:
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def report_threads(found: dict[str, Any]) -> str:
    """Format the result of `measure_threads` as Markdown."""
    lines = heading(["a training step, ms", *OTHERS, "ratio"])
    for policy, by_other in found["times"].items():
        free, busy = (Measured(*by_other[other]) for other in OTHERS)
        variables = " ".join(f"`{name}={value}`" for name, value in POLICIES[policy].items())
        name = f"{policy} ({variables})" if variables else f"{policy} (nothing set)"
        lines.append(
            row([name, milliseconds(free), milliseconds(busy), f"{busy.median / free.median:.2f}"])
        )
    load = " and ".join("unknown" if value is None else f"{value:.1f}" for value in found["load"])
    lines += [
        "",
        f"Medians of {found['rounds']} interleaved rounds of {found['steps']} steps of the "
        f"quickstart's model on 64 images of 32 x 32, quartiles in brackets; {found['cores']} "
        f"cores, their load before and after {load}. {described(found['machine'])}.",
    ]
    return "\n".join(lines)
