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
    "TargetError",
    "WriteError",
    "check_sum",
    "check_target",
    "lock_folder",
    "read_sums",
    "remove",
    "remove_partial",
    "replace_file",
    "sha256_of",
    "write_folder",
    "write_text",
    "writing_to",
]


SUMS = "SHA256SUMS"


class WriteError(RuntimeError):
    """A file cannot be written; the message is one line that says where and why."""

    exit_code = 1


class TargetError(WriteError):
    """A file or folder that is to be written cannot be; found before any work."""

    exit_code = 2


def check_target(path: Path, *, folder: bool = False, hint: str = "") -> None:
    """Check that a file or folder can be made or replaced, before the work whose result it holds.

    A hidden file is made and removed where the target will be, because neither permissions nor
    read-only mounts can be told otherwise. What is there is not touched.

    Args:
        path: The file, in a folder that exists, or the folder, whose parents may be missing.
        folder: Whether it is a folder.
        hint: What the message says after the reason, such as the option that names the target.

    Raises:
        TargetError: If it cannot be written.
    """
    where = path.absolute().parent
    while folder and not os.path.lexists(where):
        where = where.parent
    try:
        if path.is_dir() and not folder:
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if folder and path.exists() and not path.is_dir():
            raise FileExistsError(errno.EEXIST, "it is a file")
        if not where.exists():
            raise FileNotFoundError(errno.ENOENT, f"there is no folder {path.parent}")
        if not where.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{where} is no folder")
        probe = where / f".{path.name[:200]}.{os.getpid()}.partial"
        with probe.open("xb"):
            pass
        probe.unlink()
    except OSError as error:
        reason = error.strerror or str(error)
        raise TargetError(f"cannot write to {path}: {reason}{hint and f'; {hint}'}") from None


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


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step by a text in UTF-8, and make its folder if there is none.

    Raises:
        WriteError: If it cannot be written.
    """
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, lambda file: file.write_text(text, encoding="utf-8"))


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
def lock_folder(folder: Path, *, reading: bool = False) -> Iterator[bool]:
    """Hold a folder's lock against other processes; yield False if another process holds it.

    The operating system releases the lock when the process ends, however it ends, and child
    processes do not inherit it.

    Args:
        folder: The folder, in which the file `.lock` is made.
        reading: Only read the folder; where the file cannot be made or opened for writing, nothing
            is held, and another process's lock is still noticed.
    """
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield False
        return
    except OSError:
        if not reading:
            raise
        yield not _is_locked(folder / ".lock")
        return
    try:
        yield True
    finally:
        lock.release()


def _is_locked(path: Path) -> bool:
    """Tell whether a process holds a lock on a file that this one cannot write."""
    try:
        import fcntl  # not on Windows, where locked files cannot be read
    except ImportError:
        return False
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # there is no such file, or the file system has no locks
        pass
    return False


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


def check_sum(path: Path, content: bytes | None = None) -> bool:
    """Compare a file with its sha256 in the `SHA256SUMS` beside it.

    Args:
        path: The file.
        content: What was read of it; None reads it.

    Returns:
        Whether it is listed there; a file that is not is accepted as it is.

    Raises:
        ValueError: If it has another sha256, or the sums cannot be read; in one line.
    """
    expected = read_sums(path.parent).get(path.name)
    if not expected:
        return False
    if sha256_of(path if content is None else content) not in expected:
        hint = (
            ""
            if path.suffix != ".json"
            else (f"; if you edited it on purpose, remove the line of {path.name} from {SUMS}")
        )
        raise ValueError(
            f"{path} is damaged: its sha256 is not the one in {path.parent / SUMS}{hint}"
        )
    return True
