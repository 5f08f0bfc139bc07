"""The `emax` command."""

import sys
from collections.abc import Callable, Sequence

from .training import train, validate
from .training.config import nearest

COMMANDS: dict[str, tuple[Callable[..., int], str]] = {
    "train": (train, "train an image classifier"),
    "validate": (validate, "validate one"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `emax COMMAND ...`; returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return COMMANDS[name][0](rest, prog=f"emax {name}")
    lines = [f"  emax {command:<10} {text}" for command, (_, text) in COMMANDS.items()]
    usage = "\n".join(["usage: emax COMMAND --help", *lines])
    if name in ("-h", "--help"):
        print(usage)
        return 0
    print(
        f"emax: error: unknown command {name}; the nearest is {nearest(name, COMMANDS)}",
        file=sys.stderr,
    )
    return 2
