"""Validate an image classifier: `python validate.py --help`, or `emax validate`."""

from emax_cli import run

if __name__ == "__main__":
    raise SystemExit(run("validate", None, "validate.py"))
