"""Python programs in processes of their own, without the seconds that importing torch takes.

Run as a script this file is the server behind `Interpreter`: it imports some modules once, and
forks a process for each program.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

# Every name that a process under test may write to is given to it, so its environment is small.
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TQDM_"))},
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
}


class Result(NamedTuple):
    """What a finished process leaves."""

    status: int
    """Of its end; negative is the number of the signal that killed it."""
    stdout: str
    stderr: str

    @property
    def last_line(self) -> str:
        return self.stdout.splitlines()[-1]


class Interpreter:
    """Runs programs as `python` does, where some modules have been imported already.

    Args:
        modules: What a program finds imported; it reads their environment variables no more.
    """

    def __init__(self, *modules: str) -> None:
        self.server = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def run(
        self,
        *command: str | Path,
        cwd: Path,
        environment: Mapping[str, str] | None = None,
        kill_after: float | None = None,
        ranks: int = 1,
    ) -> Result:
        """Run a script, or Python itself: `run("-c", source, *arguments, cwd=...)`.

        Args:
            command: A script's path, absolute or of this checkout, and its arguments.
            cwd: The folder that it runs in.
            environment: All of its variables; None for `ENVIRONMENT`.
            kill_after: Seconds after which it gets a SIGKILL.
            ranks: Processes that run it together, with the variables that torchrun would give
                them. The status is that of the first of them that failed, in the order of ranks.
        """
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            request = {
                **{"command": list(map(str, command)), "cwd": str(cwd), "kill_after": kill_after},
                **{"environment": dict(ENVIRONMENT if environment is None else environment)},
                **{"out": str(out), "err": str(err), "ranks": ranks},
            }
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            status = int(self.server.stdout.readline())
            return Result(status, out.read_text(), err.read_text())

    def close(self) -> None:
        assert self.server.stdin is not None
        self.server.stdin.close()
        self.server.wait(30)


def _serve(modules: list[str]) -> None:
    """Fork a process for every line that comes in, and answer with its exit status."""
    for name in modules:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        children = []
        for variables in _variables(request["ranks"]):
            children.append(os.fork())
            if children[-1] == 0:
                request["environment"].update(variables)
                _become(**request)
        if request["kill_after"] is not None:
            time.sleep(request["kill_after"])
            for child in children:
                os.kill(child, signal.SIGKILL)  # in vain if it has ended
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(next(filter(None, statuses), 0), flush=True)


def _variables(ranks: int) -> list[dict[str, str]]:
    """The environment variables that describe the ranks, for each of them."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared = {**address, "WORLD_SIZE": str(ranks)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def _become(
    command: list[str], cwd: str, environment: dict[str, str], out: str, err: str, **_: object
) -> None:
    """Be the program, and end as the interpreter does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    status = 1
    try:
        if command[0] == "-c":
            warnings.simplefilter("ignore")
            sys.argv, sys.path[0] = ["-c", *command[2:]], str(ROOT)
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = command, str(ROOT)
            runpy.run_path(str(ROOT / command[0]), run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    atexit._run_exitfuncs()  # multiprocessing ends workers there
    os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1:])
