"""Kill a training run and resume it: it must end with the bits of one that ran through.

`python .ci/gpu_resume.py --folder FOLDER --json FILE [--device cpu]` trains the quickstart twice at
a time, kills one of the runs after a checkpoint in its second epoch, and resumes it.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

TRAIN = "-m emax_cli train -c quickstart --epochs 2 --recovery-interval 10 --resume auto -j 0"
AFTER = 70  # of 112 steps
PATIENCE = 600


def main() -> int:
    """Train, kill, resume and compare; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    base = [sys.executable, *TRAIN.split(), "--device", options.device]
    base += ["--output", str(options.folder), "--experiment"]
    whole = subprocess.Popen([*base, "whole"])
    killed = subprocess.Popen([*base, "killed"])
    try:
        step = _kill_after(killed, options.folder / "killed")
        status = subprocess.call([*base, "killed"])
        if status or whole.wait():
            print(f"a run failed: {status}, {whole.returncode}")
            return 1
    finally:
        for process in (whole, killed):
            process.kill()
    sums = {name: _sums(options.folder / name) for name in ("whole", "killed")}
    equal = sums["whole"] == sums["killed"]
    found = {"killed after step": step, "bit-equal": equal, "sha256": sums}
    options.json.write_text(json.dumps(found, indent=2) + "\n")
    print(f"killed after step {step}; weights after resuming bit-equal: {equal}")
    return 0 if equal and step < _last(options.folder / "whole") else 1


def _kill_after(process: subprocess.Popen, folder: Path) -> int:
    """Kill a run once it has a checkpoint of step `AFTER` or later."""
    end = time.monotonic() + PATIENCE
    while (step := _last(folder)) < AFTER:
        if process.poll() is not None or time.monotonic() > end:
            raise SystemExit(f"the run to be killed ended by itself: {process.returncode}")
        time.sleep(0.01)
    process.kill()
    process.wait()
    return step


def _last(folder: Path) -> int:
    """Return the step of the newest checkpoint of a run, 0 without one."""
    names = [path.name for path in folder.glob("checkpoints/epoch-*-step-*") if path.is_dir()]
    steps = [name.rpartition("-")[2] for name in names if name.rpartition("-")[2].isdecimal()]
    return max(map(int, steps), default=0)


def _sums(folder: Path) -> dict[str, str]:
    """Return the sums of the best and of the last weights."""
    files = [folder / name for name in ("model.safetensors", "last.safetensors")]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


if __name__ == "__main__":
    sys.exit(main())
