"""Atomic writes of files and folders, locks of folders, and sha256 sums."""

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
    """Turn the operating system's errors into a `WriteError` about `path`."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise WriteError(f"cannot write to {path}: {reason}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Replace `path` in one step by the file that `write(temporary_path)` makes."""
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
    """Write a folder of files, which appears complete in one step; `path` must not exist."""
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
    """Remove a file or folder in one step: it is renamed first, so no half of it is ever seen."""
    hidden = _hidden(path)
    _delete(hidden)
    path.rename(hidden)
    _delete(hidden)


def remove_partial(folder: Path) -> None:
    """Remove the temporary files that a killed process has left in a folder."""
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
    """Flush a file, or a folder's list of names, to the disk."""
    # Windows flushes only files that are open for writing, and cannot open folders. There, and on
    # network file systems that answer EINVAL, the file system decides when it writes the names.
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
    """Hold a folder's lock against other processes; yield False if another process holds it.

    The operating system releases the lock when the process ends, however it ends, and child
    processes do not inherit it.
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
    """Compute the sha256 of bytes or of a file, in hex."""
    digest = hashlib.sha256()
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with content.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_sums(folder: Path) -> dict[str, set[str]]:
    """Read the sha256 values of each file that a folder's `SHA256SUMS` names.

    Returns:
        The values by file name, of which a file may have several; empty if the folder has no
        `SHA256SUMS`.

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
