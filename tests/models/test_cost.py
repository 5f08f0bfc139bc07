"""What a model costs, against formulas."""

import pytest
import torch
from torch import nn

from emax_timm.models.cost import activation_bytes, count_macs


def small_net() -> nn.Sequential:
    """Three layers on [b, 3, h, w]."""
    return nn.Sequential(
        nn.Conv2d(3, 8, kernel_size=3, stride=2, padding=1),
        nn.Sigmoid(),
        nn.Conv2d(8, 16, kernel_size=3, padding=1, groups=4, bias=False),
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_macs_are_those_of_the_formula(device: str) -> None:
    x = torch.zeros(1, 3, 20, 12, device=device)
    pixels = 10 * 6
    expected = pixels * 8 * 3 * 9 + pixels * 16 * (8 // 4) * 9
    assert count_macs(small_net().to(device), x) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_activations_are_those_of_the_formula(device: str) -> None:
    x = torch.zeros(5, 3, 20, 12, device=device)
    # The image for the first convolution; the sigmoid's output, for itself and the second one.
    expected = 4 * 5 * (3 * 20 * 12 + 8 * 10 * 6)
    assert activation_bytes(small_net().to(device), x) == expected
    with torch.no_grad():
        assert activation_bytes(small_net().to(device), x) == expected


def test_activations_count_a_storage_once_and_no_parameters() -> None:
    class Net(nn.Module):
        constant: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, 3))
            self.register_buffer("constant", torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * self.weight[0]  # keeps x and a view of the weight
            y = y * self.constant  # keeps the buffer
            return y[:, :1] * y[:, 1:2]  # keeps two views of y

    x = torch.zeros(7, 3)
    assert activation_bytes(Net(), x) == 2 * x.nbytes


def test_macs_are_of_evaluation_and_activations_of_training() -> None:
    net, x = nn.Sequential(small_net(), nn.Dropout()), torch.zeros(1, 3, 20, 12)
    assert activation_bytes(net, x) > activation_bytes(small_net(), x)
    assert net.training
    count_macs(net, x)
    assert not net.training
