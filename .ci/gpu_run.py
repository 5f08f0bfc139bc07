"""The runner of `.ci/gpu`: each part in its time limit, then one JSON file and one of Markdown.

`.ci/gpu` runs all parts but `together`; `--parts modules,together` runs those that it names;
`--seconds tester=300` gives one another limit. $OUT (default: build/gpu in the checkout) is the
folder of gpu.json, gpu.md and gpu.log, with the output of all parts. Caches are in $OUT/cache, or
where $EMAX_GPU_CACHE says.
A part that fails, takes too long or lacks something is said to, and the rest still runs; the exit
status is 0 if all parts passed.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import site
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_parts import PARTS, Command, Part
from gpu_report import markdown, outcomes

__all__ = ["Folders", "main"]

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 470
FACTS = """
import importlib.util, json, platform, sys
found = {"python": platform.python_version(), "modules": []}
for name in ("pytest", "xdist", "pytest_timeout", "filelock", "triton", "ninja"):
    if importlib.util.find_spec(name) is not None:
        found["modules"].append(name)
import torch
found.update(torch=torch.__version__, cuda=torch.version.cuda, card=None)
if torch.cuda.is_available():
    facts = torch.cuda.get_device_properties(0)
    found.update(card=facts.name, capability=f"{facts.major}.{facts.minor}")
    found.update(memory=f"{facts.total_memory / 2**30:.0f} GiB")
for name in ("triton", "timm"):
    try:
        found[name] = importlib.import_module(name).__version__
    except Exception as error:
        found[name] = f"cannot be imported: {error}"
try:
    import emax_timm
    from emax_timm.ops.dispatch import BACKENDS
    found["emax_timm"] = emax_timm.__version__
    found["backends"] = ", ".join(backend.name for backend in BACKENDS)
except Exception as error:
    found["package"] = f"emax_timm cannot be imported: {type(error).__name__}: {error}"
print(json.dumps(found))
"""


class Folders(NamedTuple):
    """Where results and caches go."""

    out: Path
    cache: Path


def main(argv: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the parts that the command line asks for, and return the exit status."""
    options = _parser(parts).parse_args(argv)
    begin = time.monotonic()
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()
    folders = Folders(out, Path(os.environ.get("EMAX_GPU_CACHE") or out / "cache").resolve())
    for name in ("results", "resume", "runs"):  # what an earlier call has left
        shutil.rmtree(folders.cache / name, ignore_errors=True)
    for folder in (out, *(folders.cache / name for name in ("home", "tmp", "results"))):
        folder.mkdir(parents=True, exist_ok=True)
    (out / "gpu.log").write_text("")
    environment = _environment(folders)
    found: dict[str, Any] = {"machine": _facts(environment, folders), "parts": {}}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()), flush=True)
    for part in parts:
        if part.name not in options.parts:
            continue
        left = options.total - (time.monotonic() - begin)
        limit = min(options.seconds.get(part.name, part.seconds), left)
        one = found["parts"][part.name] = _part(part, limit, found["machine"], folders, environment)
        found["seconds"] = round(time.monotonic() - begin, 1)
        (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (out / "gpu.md").write_text(markdown(found))
        print(f"{part.name}: {one['status']}, {one['seconds']:.0f} s. {one['message']}", flush=True)
    print(f"{found.get('seconds', 0):.0f} s in all; see {out / 'gpu.md'}")
    return int(any(one["status"] != "ok" for one in found["parts"].values()))


def _part(
    part: Part, limit: float, machine: dict[str, Any], folders: Folders, environment: dict[str, str]
) -> dict[str, Any]:
    """Run a part, and return its status, results and report."""
    one: dict[str, Any] = {"status": "ok", "text": part.text, "limit": round(limit), "seconds": 0.0}
    one |= {"message": "", "results": [], "reports": []}
    reason = "; ".join(filter(None, (_lacks(need, machine) for need in part.needs)))
    if reason or limit <= 0:
        status = "missing" if reason else "left out"
        return one | {"status": status, "message": reason or "no time was left"}
    begin, messages = time.monotonic(), []
    for number, command in enumerate(part.commands, 1):
        left = limit - (time.monotonic() - begin)
        name = f"{part.name}-{number}"
        status, output, message = _run(command, name, left, machine, folders, environment)
        if status != "ok" and one["status"] in ("ok", "failed"):
            one["status"] = status
        messages.append(message)
        one["results"].append(_result(command, name, folders, output))
        one["reports"].append(output if output.startswith("|") else "")
    one["seconds"] = round(time.monotonic() - begin, 1)
    one["message"] = "; ".join(dict.fromkeys(filter(None, messages)))
    return one


def _run(
    command: Command,
    name: str,
    limit: float,
    machine: dict[str, Any],
    folders: Folders,
    environment: dict[str, str],
) -> tuple[str, str, str]:
    """Run a command; returns how it ended, its output and, unless all is well, a message."""
    words = [_filled(word, name, folders) for word in shlex.split(command.words)]
    if words[:2] == ["-m", "pytest"] and "xdist" in machine.get("modules", []):
        words += ["-n", "8", "--dist", "load"]
    if limit <= 0:
        return "timed out", "", f"no time was left for {' '.join(words[:4])}"
    with (
        Path(folders.cache, "results", f"{name}.out").open("w+") as out,
        Path(folders.cache, "results", f"{name}.err").open("w+") as err,
    ):
        process = subprocess.Popen(
            [sys.executable, *words],
            **{"cwd": folders.cache, "env": environment, "stdout": out, "stderr": err},
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # workers that were left over, too
            process.wait()
        out.seek(0)
        err.seek(0)
        output, errors = out.read(), err.read()
    with Path(folders.out, "gpu.log").open("a") as log:
        print(f"== {name}: {shlex.join(words)}: {status}\n{output}\n{errors}", file=log)
    last = [line for line in f"{output}\n{errors}".splitlines() if line.strip()][-1:]
    if status is None:
        return "timed out", output, f"killed after {limit:.0f} s"
    return ("ok", output, "") if status == 0 else ("failed", output, f"{status}: {''.join(last)}")


def _result(command: Command, name: str, folders: Folders, output: str) -> Any:
    """Return the result that a command has left, or the counts of tests in its output."""
    file = Path(_filled(command.result, name, folders))
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text())
    return outcomes(output)


def _filled(word: str, name: str, folders: Folders) -> str:
    places = {"root": ROOT, "ci": ROOT / ".ci", "cache": folders.cache}
    return word.format(**places, json=folders.cache / "results" / f"{name}.json")


def _lacks(need: str, machine: dict[str, Any]) -> str:
    """Say what is missing of what a part needs, if anything is."""
    kind, _, name = need.partition(" ")
    if kind == "gpu":
        return "" if machine.get("card") else machine.get("error", "torch sees no GPU")
    if kind == "module":
        return "" if name in machine.get("modules", []) else f"the module {name} is not installed"
    if kind == "file":
        return "" if (ROOT / name).is_file() else f"there is no {name}"
    return machine.get(kind, "")


def _facts(environment: dict[str, str], folders: Folders) -> dict[str, Any]:
    """Describe the card, its driver, and the versions of what is installed."""
    facts: dict[str, Any] = {}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        facts["driver"] = answer.stdout.split("\n")[0]
    command = [sys.executable, "-c", FACTS]
    try:
        done = subprocess.run(
            command, cwd=folders.cache, env=environment, capture_output=True, text=True, timeout=120
        )
        return facts | json.loads(done.stdout.strip().split("\n")[-1])
    except subprocess.TimeoutExpired:
        return facts | {"error": "importing torch takes more than two minutes"}
    except ValueError:
        return facts | {"error": (done.stderr.strip().splitlines() or ["no answer"])[-1]}


def _environment(folders: Folders) -> dict[str, str]:
    """Return variables that keep all writing in the folders, and take the package from here."""
    inside = {
        **{"HOME": "home", "TMPDIR": "tmp", "TRITON_HOME": "home", "TRITON_CACHE_DIR": "triton"},
        **{"TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda", "TORCH_HOME": "torch"},
        **{"XDG_CACHE_HOME": "home/.cache", "XDG_CONFIG_HOME": "home/.config", "HF_HOME": "hf"},
        **{"MPLCONFIGDIR": "home/matplotlib", "EMAX_KERNELS_DIR": "kernels"},
    }
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        **{variable: str(folders.cache / name) for variable, name in inside.items()},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUSERBASE": site.getuserbase(),  # which would follow HOME
        "PYTHONDONTWRITEBYTECODE": "1",
        "HF_HUB_OFFLINE": "1",
        "EMAX_TEST_DEVICE": "cuda",
    }


def _parser(parts: Sequence[Part]) -> argparse.ArgumentParser:
    names = [part.name for part in parts]
    default = [part.name for part in parts if part.default]

    def chosen(text: str) -> list[str]:
        wrong = set(text.split(",")) - set(names)
        if wrong:
            raise argparse.ArgumentTypeError(f"no part {wrong.pop()}; there are {', '.join(names)}")
        return text.split(",")

    class Seconds(argparse.Action):
        def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
            for name, _, value in (one.partition("=") for one in values):
                if name not in names or not value.isdecimal():
                    parser.error(f"--seconds takes PART=N, not {name}={value}")
                namespace.seconds[name] = int(value)

    parser = argparse.ArgumentParser(".ci/gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    text = ", ".join(f"{part.name} ({part.seconds} s: {part.text})" for part in parts)
    parser.add_argument("--parts", type=chosen, default=default, metavar="A,B", help=f"of {text}")
    text = "another time limit for a part"
    parser.add_argument("--seconds", nargs="+", action=Seconds, default={}, help=text)
    text = "the time limit of all parts together (default: %(default)s)"
    parser.add_argument("--total", type=float, default=TOTAL, metavar="N", help=text)
    return parser
