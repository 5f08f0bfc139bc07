"""The gates, against a plain statement of what they compute."""

import torch
from emax_testing import randn
from torch import nn

from emax_timm.attention.gates import squeeze_excite


def test_squeeze_excite_equals_its_modules() -> None:
    gate = nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1), nn.ReLU(), nn.Conv2d(3, 8, 1), nn.Sigmoid()
    ).double()
    x = randn(2, 8, 3, 4)
    weights = [parameter.detach() for parameter in gate.parameters()]
    actual, _ = squeeze_excite(x.mean((2, 3)), weights)
    torch.testing.assert_close(actual, gate(x).flatten(1), rtol=0, atol=1e-14)
