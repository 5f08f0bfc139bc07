"""EMA: Efficient Multi-scale Attention with cross-spatial learning (arXiv 2305.13563).

Dimension letters as in `emax.py`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from .analytic import emax
from .functional import emax_maps
from .layer import Layer

__all__ = ["EMA"]

# One node each in a torch.fx graph: inside, the code depends on the input's dtype.
torch.fx.wrap("emax")
torch.fx.wrap("emax_maps")


class EMA(nn.Module):
    """EMA attention on [b, c, h, w] features, for any h, w >= 1 and any c >= 1.

    Same formula and state-dict keys as the module its authors published, computed in EMAX's exact
    shortcut form (`docs/emax.md`), and with a group count that always divides the channels: theirs
    fails where `factor` does not divide them, as on 40 channels.

    Args:
        channels: Number of input channels c.
        factor: Upper bound of the group count, F = gcd(channels, factor).

    Raises:
        ValueError: If an argument is not a positive integer.
    """

    def __init__(self, channels: int, factor: int = 32, device=None, dtype=None) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        for name, value in (("channels", channels), ("factor", factor)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        self.groups = math.gcd(channels, factor)  # F
        self.group_channels = channels // self.groups  # d
        self.conv1x1 = nn.Conv2d(self.group_channels, self.group_channels, kernel_size=1, **dd)
        self.conv3x3 = nn.Conv2d(
            self.group_channels, self.group_channels, kernel_size=3, padding=1, **dd
        )
        self.gn = nn.GroupNorm(self.group_channels, self.group_channels, **dd)

    @torch.jit.export
    def attention(self, x: Tensor) -> Tensor:
        """The spatial attention of `x` in (0, 1), not applied to it: [b, F, h, w]."""
        return emax_maps(x, self._layer(), torch.ones(1, device=x.device), False).spatial

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention: [b, c, h, w] to [b, c, h, w]."""
        return emax(x, self._layer(), False)

    def _layer(self) -> Layer:
        conv1x1_bias, conv3x3_bias = self.conv1x1.bias, self.conv3x3.bias
        # To TorchScript a convolution's bias is optional.
        assert conv1x1_bias is not None
        assert conv3x3_bias is not None
        nothing: list[Tensor] = []
        return Layer(
            groups=self.groups,
            batch_vote=False,
            eps=self.gn.eps,
            grouping=nothing,
            spatial=[
                self.conv1x1.weight,
                conv1x1_bias,
                self.conv3x3.weight,
                conv3x3_bias,
                self.gn.weight,
                self.gn.bias,
            ],
            controller=nothing,
            channel=nothing,
            gamma=nothing,
            global_=nothing,
            residual_gate=nothing,
        )

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
