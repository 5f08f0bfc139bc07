"""EMA: Efficient Multi-scale Attention with cross-spatial learning (arXiv 2305.13563).

Dimension letters as in `emax_timm.ops`.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import EMAXConfig, EMAXWeights, bias_of, emax, emax_maps
from ..ops.reference import Parts
from .children import by_children, changed_child, refuse_scripting, without_exports

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
        self.channels = channels
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
        if not torch.jit.is_scripting():
            change = changed_child(self)
            if change is not None:
                return by_children(x, self, change)[1].spatial
        return emax_maps(x, self.weights(), False).spatial

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention: [b, c, h, w] to [b, c, h, w]."""
        if not torch.jit.is_scripting():
            change = changed_child(self)
            if change is not None:
                return by_children(x, self, change)[0]
        return emax(x, self.weights(), False)

    def weights(self) -> EMAXWeights:
        """The constants and tensors that a backend takes, for this layer."""
        conv1x1 = self.conv1x1
        conv3x3 = self.conv3x3
        gn = self.gn
        return EMAXWeights(
            config=EMAXConfig(self.groups, [self.groups], False, gn.eps),
            conv1x1_weight=conv1x1.weight,
            conv1x1_bias=bias_of(conv1x1.weight, conv1x1.bias),
            conv3x3_weight=conv3x3.weight,
            conv3x3_bias=bias_of(conv3x3.weight, conv3x3.bias),
            gn_weight=gn.weight,
            gn_bias=gn.bias,
        )

    @torch.jit.unused
    def parts(self) -> Parts:
        """The children, for whoever computes by calling them."""
        return Parts(
            EMAXConfig(self.groups, [self.groups], False, 0.0), self.conv1x1, self.conv3x3, self.gn
        )

    def __prepare_scriptable__(self) -> nn.Module:
        return refuse_scripting(self)

    def __dir__(self) -> list[str]:
        return without_exports(self, super().__dir__())

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
