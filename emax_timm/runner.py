"""The error handling of all commands: one line on stderr, and an exit status.

An exception class with an `exit_code`, as in click, is meant for whoever typed the command: 2 for
an error in the command line, the files or the machine, 1 for a run that failed. An `OSError` that
names a file is an error in the files too, such as a path that cannot even be looked up. Ctrl-C ends
a command that does not handle it itself. All other exceptions are defects of this package, and keep
their traceback.
"""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol

__all__ = ["FailedRunError", "command"]


class FailedRunError(RuntimeError):
    """The requested work was attempted and failed; the message is one line."""

    exit_code = 1


class Command(Protocol):
    """A command as a function from its arguments (None for sys.argv's) to an exit status."""

    def __call__(self, argv: Sequence[str] | None = None, prog: str = ...) -> int: ...


def command(prog: str) -> Callable[[Callable[[Sequence[str], str], int]], Command]:
    """Turn a function of arguments and a command name, which raises its errors, into a command.

    Args:
        prog: The default name of the command in its help and its errors.
    """

    def decorate(function: Callable[[Sequence[str], str], int]) -> Command:
        @functools.wraps(function)
        def run(argv: Sequence[str] | None = None, prog: str = prog) -> int:
            try:
                return function(sys.argv[1:] if argv is None else list(argv), prog)
            except BrokenPipeError:  # whoever reads stdout, such as `head`, has seen enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 128 + 13  # as if SIGPIPE had ended it
            except KeyboardInterrupt:
                print(f"{prog}: interrupted", file=sys.stderr)
                return 128 + 2  # as if SIGINT had ended it
            except Exception as error:
                exit_code, message = getattr(error, "exit_code", None), str(error)
                if isinstance(error, OSError) and error.filename is not None:
                    exit_code, message = 2, f"{error.filename}: {error.strerror}"
                if exit_code is None:
                    raise
                rank = os.environ.get("RANK", "0")
                who = prog if rank == "0" else f"{prog} (rank {rank})"
                # Messages of libraries may have several lines; they are joined.
                print(f"{who}: error: {' '.join(message.split())}", file=sys.stderr)
                return exit_code

        return run

    return decorate
