"""The devices that a command computes on, and those that it refuses."""

import pytest
import torch

from emax_timm.training import UsageError, train
from emax_timm.training.distributed import find_device


def test_device_is_the_named_one_or_the_best_there_is() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("abacus", "unknown device abacus"),
        ("meta", "tensors on the device meta hold no data"),
        ("cuda:99", "--device cuda:99: no such CUDA device is available"),
        ("xpu:99", "--device xpu:99: it cannot be used"),
    ],
)
def test_device_that_computes_nothing_here_is_refused_with_those_that_do(
    name: str, problem: str
) -> None:
    with pytest.raises(UsageError, match=rf"^{problem}.*; there (is|are) cpu.* here$"):
        find_device(name)


def test_train_refuses_the_meta_device_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["-c", "quickstart", "--device", "meta"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("train.py: error: tensors on the device meta hold no data")
    assert error.count("\n") == 1
