"""Folders in which nothing can be written, also for root."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["read_only"]

# Root writes everywhere by this capability (capabilities(7)), of which a thread can do without.
_DAC_OVERRIDE = 1 << 1
_VERSION_3 = 0x20080522


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder and all folders and files below it read-only, for root as for others.

    Their modes lose the right to write, and where this thread has the capability that makes root
    exempt from modes, it gives it up meanwhile; so do the threads and processes that it starts.
    """
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths if not path.is_symlink()}
    for path, mode in modes.items():
        path.chmod(mode & ~0o222)
    try:
        with _without_override():
            probe = folder / "probe"
            with contextlib.suppress(PermissionError):
                probe.touch()
            assert not probe.exists(), "the folder can be written to after all"
            yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)


@contextlib.contextmanager
def _without_override() -> Iterator[None]:
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        yield
        return
    libc, header, sets = ctypes.CDLL(None, use_errno=True), _Header(_VERSION_3, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    before = sets[0].effective
    sets[0].effective = before & ~_DAC_OVERRIDE
    assert libc.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = before
        assert libc.capset(ctypes.byref(header), sets) == 0
