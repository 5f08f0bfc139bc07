"""Writing files so that a reader never sees half of one."""

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["lock_folder", "replace_file"]


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary path)` make a file, then put it in the place of `path` in one step."""
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        # safetensors writes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock against other processes; gives False if one of them has it.

    The system takes the lock back when the process dies, whatever it dies of, and does not pass it
    on to its children.
    """
    with (folder / ".lock").open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True
