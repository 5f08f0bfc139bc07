"""Validate an image classifier: `python validate.py --help`, or `emax validate`."""

from emax_timm.training import validate

if __name__ == "__main__":
    raise SystemExit(validate())
