"""The list of what torch.compile makes of a layer; no figure but what no compiler can undercut."""

import pytest

from emax_timm.benchmark.compiled_kernels import compiled_kernels


@pytest.mark.slow
def test_the_loops_of_all_passes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert compiled_kernels(["--shape", "2", "16", "8", "8", "--rounds", "1"]) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    moved = [[float(cell) for cell in cells[1:]] for cells in lines if cells[0] == "all"]
    assert len(moved) == 3  # forward in evaluation and in training, and backward
    for read, written in moved:
        # Each has to read x and to write a tensor of its size.
        assert read >= 1
        assert written >= 1
    assert any("_fused_" in cells[0] and float(cells[1]) > 0 for cells in lines)
