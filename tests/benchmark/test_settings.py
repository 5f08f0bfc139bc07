"""`emax benchmark settings` measures in every setting; its figures are not tested."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from emax_timm.benchmark import settings
from emax_timm.benchmark.command import benchmark

SMALL = ["settings", "--shapes", "1x8x4x4", "2x8x3x5", "--rounds", "1"]


@pytest.mark.slow
def test_every_setting_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "settings.json"
    assert benchmark([*SMALL, "--methods", "EMAX", "SE", "--json", str(file)]) == 0
    found = json.loads(file.read_text())["settings"]
    instructions = torch.backends.cpu.get_cpu_capability()
    expected = [
        (dtype, layout, instructions)
        for dtype in ("float32", "bfloat16")
        for layout in ("contiguous", "channels_last")
    ]
    if instructions == "AVX512":
        expected.append(("float32", "contiguous", "AVX2"))
    printed = capsys.readouterr().out
    for name, setting in zip(expected, found, strict=True):
        rows = [line for line in printed.splitlines() if line.startswith(f"| {', '.join(name)} |")]
        assert len(rows) == 2
        ours, theirs = (setting["times"]["forward"][method] for method in ("EMAX", "SE"))
        ratios = [a[0] / b[0] for a, b in zip(ours, theirs, strict=True)]
        assert f"({min(ratios):.2f}-{max(ratios):.2f})" in rows[0]


def test_kernels_are_built_where_they_are_absent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = []

    def process(
        program: str, words: Sequence[str], setting: settings.Setting
    ) -> subprocess.CompletedProcess[str]:
        commands.append((list(words), dict(setting.variables)))
        return subprocess.CompletedProcess([], int(program == settings.LOADED), "", "")

    monkeypatch.setattr(settings, "_process", process)
    settings._build_kernels(settings.AVX2)
    assert commands[1:] == [(["kernels", "build"], {"ATEN_CPU_CAPABILITY": "avx2"})]
    assert capsys.readouterr().err == "building the kernels for avx2\n"


def test_a_process_that_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert benchmark([*SMALL, "--device", "cuda:99"]) == 2
    assert capsys.readouterr().err.startswith("emax benchmark: error: ")
    (tmp_path / "torch.py").write_text("raise ImportError('another torch')")
    environment: Any = {**os.environ, "PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(os, "environ", environment)
    assert benchmark([*SMALL, "--methods", "EMAX"]) == 2
    error = capsys.readouterr().err
    assert "`emax benchmark modules` failed: " in error
    assert "another torch" in error
