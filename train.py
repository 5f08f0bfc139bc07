"""Train an image classifier: `python train.py --help`, or `emax train` without a clone."""

from emax_cli import run

if __name__ == "__main__":
    raise SystemExit(run("train", None, "train.py"))
