"""Where Python lacks what Linux has, the package imports, trains, validates and predicts."""

from pathlib import Path

import pytest
from interpreters import ROOT
from training_testing import run_program

# What Windows lacks, taken away before anything else is imported. The locks that filelock has for
# Windows are not here either: it takes those that every file system has.
WITHOUT = """
import errno, os, runpy, shutil, signal, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("fcntl", "pty", "resource", "termios"):
            raise ImportError(f"No module named {name!r}")

sys.meta_path.insert(0, Absent())
for name in ("fcntl", "pty", "resource", "termios"):
    sys.modules.pop(name, None)
for name in ("O_DIRECTORY", "fork", "forkpty", "sched_getaffinity"):
    delattr(os, name)
del signal.SIGCHLD
shutil._use_fd_functions = False
system_open, system_fsync, read_only, refused = os.open, os.fsync, set(), []

def open_file(path, flags, *arguments, **options):
    if os.path.isdir(path):
        refused.append("open a folder")
        raise PermissionError(errno.EACCES, "Permission denied", path)
    descriptor = system_open(path, flags, *arguments, **options)
    (read_only.discard if flags & (os.O_WRONLY | os.O_RDWR) else read_only.add)(descriptor)
    return descriptor

def fsync(descriptor):
    if descriptor in read_only:
        raise OSError(errno.EBADF, "Bad file descriptor")
    system_fsync(descriptor)

def no_link(*arguments, **options):
    refused.append("link")
    raise OSError(errno.EPERM, "A required privilege is not held by the client")

os.open, os.fsync, os.symlink = open_file, fsync, no_link
if sys.argv[2] == "neither":
    os.link = no_link
"""
RUN = """
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert "emax_timm" in sys.modules and not hasattr(os, "fork")
print("refused:", refused.count("link"), "open a folder" in refused)
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("links", "refused"), [("hard links", 1), ("neither", 2)])
def test_quickstart_trains_a_step_without_what_linux_has(
    links: str, refused: int, tmp_path: Path
) -> None:
    one_step = ROOT / ".ci" / "one_step.py"
    done = run_program("-c", WITHOUT + RUN, one_step, links, cwd=tmp_path, timeout=280)
    assert done.status == 0, done.stderr
    trained, *_ = (line for line in done.stdout.splitlines() if line.startswith("epoch"))
    called, _, predicted, last = done.stdout.splitlines()[-4:]
    assert "loss: " in trained
    assert done.stdout.count("\nemax ") == 2
    assert predicted.startswith("image.png ")
    assert last == f"refused: {refused} True"
    assert called.startswith("emax predict ")
