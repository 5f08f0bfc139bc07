"""Train an image classifier: `python train.py --help`, or `emax train` without a clone."""

from emax_timm.training import train

if __name__ == "__main__":
    raise SystemExit(train())
