"""`.ci/gpu` runs each part in its time limit, says what failed or is missing, and continues."""

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu_run
import pytest
from gpu_parts import PARTS, Command, Part
from gpu_report import outcomes

import emax_cli
from emax_timm.benchmark.command import benchmark_parser
from emax_timm.training import TrainConfig
from emax_timm.training.config import parse_settings

ROOT = Path(__file__).parents[1]
MACHINE = {"card": "an invented card", "torch": "2.11", "modules": []}
WRITE = """-c "import sys; print('| a table |'); open(sys.argv[1], 'w').write('[1]')" {json}"""
CHILD = "import subprocess, sys; p = subprocess.Popen(['sleep', '60']); print(p.pid, flush=True)"
TREE = f"""-c "{CHILD}; p.wait()" """


@pytest.fixture
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.delenv("EMAX_GPU_CACHE", raising=False)
    monkeypatch.setattr(gpu_run, "_facts", lambda *_: MACHINE)
    return tmp_path / "out"


def part(name: str, *words: str, seconds: int = 60, needs: tuple[str, ...] = ("gpu",)) -> Part:
    return Part(name, f"the part {name}", [Command(each) for each in words], seconds, list(needs))


@pytest.mark.slow
def test_the_rest_runs_after_what_fails_hangs_or_is_missing(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        part("broken", """-c "raise SystemExit('no | luck')" """, WRITE),
        part("endless", TREE, WRITE, seconds=2),
        part("absent", WRITE, needs=("module nothing", "file no/file.py")),
        part("sound", WRITE),
    ]
    begin = time.monotonic()
    assert gpu_run.main([], parts) == 1
    assert time.monotonic() - begin < 30
    found = json.loads((out / "gpu.json").read_text())
    assert found["machine"] == MACHINE
    status = {name: one["status"] for name, one in found["parts"].items()}
    assert status == {
        **{"broken": "failed", "endless": "timed out", "absent": "missing", "sound": "ok"}
    }
    message = {name: one["message"] for name, one in found["parts"].items()}
    assert message["broken"] == "1: no | luck"
    assert "killed after 2 s" in message["endless"]
    assert "no time was left" in message["endless"]
    assert message["absent"] == "the module nothing is not installed; there is no no/file.py"
    # The second command of a part runs although the first one fails.
    assert found["parts"]["broken"]["results"] == [None, [1]]
    assert found["parts"]["sound"]["results"] == [[1]]
    page = (out / "gpu.md").read_text()
    assert "- card: an invented card" in page
    assert "| broken | **failed** |" in page
    assert "no / luck |" in page
    assert page.rstrip().endswith("| a table |")
    assert "sound: ok" in capsys.readouterr().out
    child = (out / "cache" / "results" / "endless-1.out").read_text()
    assert _is_gone(int(child))
    assert {path.name for path in out.iterdir()} == {"cache", "gpu.json", "gpu.log", "gpu.md"}


def _is_gone(process: int) -> bool:
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return True
        status = Path(f"/proc/{process}/stat")
        if status.is_file() and status.read_text().split()[2] == "Z":
            return True  # nobody has waited for it
        time.sleep(0.05)
    return False


def test_parts_and_limits_are_chosen(out: Path) -> None:
    parts = [part("first", WRITE), part("second", TREE), part("third", WRITE)]
    assert gpu_run.main(["--parts", "second,third", "--seconds", "second=1"], parts) == 1
    found = json.loads((out / "gpu.json").read_text())["parts"]
    assert {name: one["status"] for name, one in found.items()} == {
        **{"second": "timed out", "third": "ok"}
    }
    assert found["second"]["limit"] == 1
    assert gpu_run.main(["--parts", "first", "--total", "0"], parts) == 1
    (one,) = json.loads((out / "gpu.json").read_text())["parts"].values()
    assert (one["status"], one["message"]) == ("left out", "no time was left")
    assert gpu_run.main(["--parts", "first"], parts) == 0


@pytest.mark.parametrize("wrong", [["--parts", "frist"], ["--seconds", "first=x"]])
def test_mistakes_are_refused(wrong: list[str], out: Path) -> None:
    with pytest.raises(SystemExit) as end:
        gpu_run.main(wrong, [part("first", WRITE)])
    assert end.value.code == 2
    assert not out.exists()


def test_caches_and_homes_are_inside(out: Path) -> None:
    names = ("HOME", "TMPDIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
    show = f"import json, os; print(json.dumps([os.environ[name] for name in {names}]))"
    shown = part("shown", f"-c {shlex.quote(show).replace('{', '{{').replace('}', '}}')}")
    assert gpu_run.main([], [shown]) == 0
    for folder in json.loads((out / "cache" / "results" / "shown-1.out").read_text()):
        assert Path(folder).is_relative_to(out / "cache")


@pytest.mark.parametrize("command", [c for one in PARTS for c in one.commands])
def test_commands_are_understood(command: Command, tmp_path: Path) -> None:
    folders = gpu_run.Folders(tmp_path, tmp_path)
    words = [gpu_run._filled(word, "name", folders) for word in shlex.split(command.words)]
    if words[:2] == ["-m", "emax_cli"]:
        assert words[2] in emax_cli.COMMANDS
        if words[2] == "benchmark":
            benchmark_parser("emax benchmark").parse_args(words[3:])
        else:
            parse_settings(TrainConfig, words[3:], "train")
    elif words[:2] != ["-m", "pytest"]:
        assert Path(words[0]).is_file()


def test_all_parts_together_take_less_than_eight_minutes() -> None:
    assert gpu_run.TOTAL < 480
    assert sum(one.seconds for one in PARTS if one.default) <= 480
    assert len({one.name for one in PARTS}) == len(PARTS)


def test_outcomes_of_tests_are_counted() -> None:
    serial = "tests/a.py::test_a[1 2] PASSED  [ 50%]\ntests/a.py::test_b FAILED [100%]\n"
    assert outcomes(serial + "FAILED tests/a.py::test_b - assert 0\n") == {
        **{"passed": 1, "failed": 1, "which": ["tests/a.py::test_b"]}
    }
    spread = "[gw0] [ 50%] PASSED a.py::test_a \n[gw1] [100%] ERROR a.py::test_b \n"
    assert outcomes(spread) == {"passed": 1, "error": 1, "which": ["a.py::test_b"]}
    assert outcomes("killed") is None


@pytest.mark.slow
def test_script_runs_from_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    environment: dict[str, Any] = {**os.environ, "OUT": str(tmp_path / "out")}
    command = [sys.executable, ROOT / ".ci" / "gpu", "--parts", "loop"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert "package" not in found["machine"], done.stdout
    assert found["machine"]["emax_timm"]
