"""Writing files so that a reader never sees half of one, and their sha256 sums."""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

__all__ = [
    "SUMS",
    "WriteError",
    "lock_folder",
    "read_sums",
    "remove",
    "remove_partial",
    "replace_file",
    "sha256_of",
    "write_folder",
    "writing_to",
]


SUMS = "SHA256SUMS"


class WriteError(RuntimeError):
    """A file cannot be written; the message is one line that says where and why."""

    exit_code = 1


@contextlib.contextmanager
def writing_to(path: Path) -> Iterator[None]:
    """Turn the system's errors into a `WriteError`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise WriteError(f"cannot write to {path}: {reason}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary path)` make a file, then put it in the place of `path` in one step."""
    temporary = path.with_name(path.name + ".partial")
    try:
        write(temporary)
        _sync(temporary)
        # safetensors writes files that only their owner can read.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_folder(path: Path, files: dict[str, bytes]) -> None:
    """Make a folder of files that appears, complete, in one step; `path` must not exist."""
    temporary = _hidden(path)
    _delete(temporary)
    try:
        temporary.mkdir()
        for name, content in files.items():
            (temporary / name).write_bytes(content)
            _sync(temporary / name)
        _sync(temporary)
        temporary.rename(path)
        _sync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            _delete(temporary)


def remove(path: Path) -> None:
    """Remove a file or folder so that it is gone at once, whatever happens in between."""
    hidden = _hidden(path)
    _delete(hidden)
    path.rename(hidden)
    _delete(hidden)


def remove_partial(folder: Path) -> None:
    """Remove what a process that was killed has left of these functions' work in a folder."""
    for path in folder.glob("*.partial"):
        _delete(path)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk."""
    # Windows flushes only what is open for writing, and opens no folders: there, and on the network
    # file systems that answer EINVAL, the file system alone decides when it writes the names.
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        if folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock against other processes; gives False if one of them has it.

    The system takes the lock back when the process dies, whatever it dies of, and does not pass it
    on to its children.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def sha256_of(content: bytes | Path) -> str:
    """The sha256 of bytes or of a file, in hex."""
    digest = hashlib.sha256()
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, set[str]]:
    """The sha256 values of each file that a folder's `SHA256SUMS` names; none if it has none.

    Raises:
        ValueError: If it cannot be read.
    """
    path = folder / SUMS
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None
    sums: dict[str, set[str]] = {}
    for line in lines:
        value, _, name = line.partition("  ")
        sums.setdefault(name, set()).add(value)
    return sums
