"""What every command does with an error: one line on stderr, and an exit status.

An exception class with an `exit_code`, as click's have it, is meant for whoever typed the command:
2 for what the command line, the files or the machine must offer and do not, 1 for a run that
failed. All others are defects of this package, and keep their traceback.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["FailedRunError", "command"]


class FailedRunError(RuntimeError):
    """What the command line asked for was tried and failed; the message is one line."""

    exit_code = 1


class Command(Protocol):
    """A command as a function: from its arguments, sys.argv's if None, to an exit status."""

    def __call__(self, argv: Sequence[str] | None = None, prog: str = ...) -> int: ...


def command(prog: str) -> Callable[[Callable[[Sequence[str], str], int]], Command]:
    """Make a command of a function of arguments and a name, which raises its errors.

    Args:
        prog: The name in its help and its errors, unless the caller gives another.
    """

    def decorate(function: Callable[[Sequence[str], str], int]) -> Command:
        @functools.wraps(function)
        def run(argv: Sequence[str] | None = None, prog: str = prog) -> int:
            try:
                return function(sys.argv[1:] if argv is None else list(argv), prog)
            except Exception as error:
                exit_code = getattr(error, "exit_code", None)
                if exit_code is None:
                    raise
                rank = os.environ.get("RANK", "0")
                who = prog if rank == "0" else f"{prog} (rank {rank})"
                # One line, also where the error of a library has several.
                print(f"{who}: error: {' '.join(str(error).split())}", file=sys.stderr)
                return exit_code

        return run

    return decorate
