"""Make the runs of a seed one after the other and side by side: the same bits in less time.

`python .ci/gpu_together.py --folder FOLDER --json FILE [--device cpu]` trains ResNet-18 at half
width, without attention and with SE, EMA and EMAX, on scenes made of the sample in the package.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

STUDY = """
name: together
primary: {method: emax, against: [none]}
seeds: [0]
recipe:
  dataset: scenes/sample_48
  train_split: train
  val_split: ""
  test_split: test
  input_size: [1, 48, 48]
  mean: [0.25]
  std: [0.3]
  no_aug: true
  epochs: %d
  batch_size: 64
  validation_batch_size: 500
  opt: adamw
  lr: 0.004
  warmup_epochs: 0
backbones:
  half_resnet18: {model: resnet18, model_kwargs: {channels: [32, 64, 128, 256], stem_width: 32}}
methods:
  none: {}
  se: {attention: se}
  ema: {attention: ema}
  emax: {attention: emax}
"""
SAME = ("test", "slices", "training_top1")  # of two results of a run


def main() -> int:
    """Make the runs both ways and compare them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    study = options.folder / "study.yaml"
    study.write_text(STUDY % options.epochs)
    results = {}
    for name, jobs in (("alone", "1"), ("together", "0")):
        command = [sys.executable, "-m", "emax_cli", "compare", str(study), "--jobs", jobs]
        command += ["--device", options.device, "--output", str(options.folder / name)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        paths = sorted((options.folder / name).glob("together/*/*/*/result.json"))
        results[name] = {p.parent.parent.name: json.loads(p.read_text()) for p in paths}
    alone, together = results["alone"], results["together"]
    equal = {m: all(alone[m][key] == together[m][key] for key in SAME) for m in alone}
    rows = {method: [_milliseconds(r[method]) for r in (alone, together)] for method in alone}
    print("| ms a step | alone | together | same result |\n| --- | ---: | ---: | --- |")
    for method, (one, other) in rows.items():
        print(f"| {method} | {one:.2f} | {other:.2f} | {equal[method]} |")
    options.json.write_text(json.dumps({"ms": rows, "equal": equal}, indent=1) + "\n")
    return 0 if all(equal.values()) and len(equal) == 4 else 1


def _milliseconds(result: dict[str, Any]) -> float:
    """Return the time of a step, in which the other networks of the process have none."""
    return 1000 * result["seconds"] / result["steps"]


if __name__ == "__main__":
    sys.exit(main())
