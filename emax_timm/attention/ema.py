"""The EMA layer: Efficient Multi-scale Attention with cross-spatial learning (arXiv 2305.13563).

`emax_timm.ops` explains the letters in the shapes.
"""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import EMAXConfig, EMAXWeights, bias_of, emax, emax_maps
from ..ops.reference import Parts
from .children import by_children, changed_child, refuse_scripting, without_exports

__all__ = ["EMA"]

# Each of these is one node of a torch.fx graph, because the code inside depends on the dtype of x.
torch.fx.wrap("emax")
torch.fx.wrap("emax_maps")


class EMA(nn.Module):
    """EMA attention, a layer that scales a feature map [b, c, h, w] and keeps its shape.

    It has the formula and the state-dict keys of the module that its authors published. It computes
    them by the exact shortcuts of EMAX (`docs/emax.md`), with a group count that always divides the
    channels: the published module fails where `factor` does not divide them, as on 40 channels.

    Args:
        channels: Number of input channels c.
        factor: Upper bound of the group count, F = gcd(channels, factor).
        device: Device of the parameters.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is not a positive integer.
    """

    dims: ClassVar[int] = 2

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
        """Compute the spatial attention of x [b, c, h, w] without applying it.

        It is [b, F, h, w], in (0, 1).
        """
        if not torch.jit.is_scripting():
            change = changed_child(self)
            if change is not None:
                return by_children(x, self, change)[1].spatial
        return emax_maps(x, self.weights(), False).spatial

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to x [b, c, h, w]; the result has the shape of x."""
        if not torch.jit.is_scripting():
            change = changed_child(self)
            if change is not None:
                return by_children(x, self, change)[0]
        return emax(x, self.weights(), False)

    def weights(self) -> EMAXWeights:
        """Return the constants and tensors of this layer that a backend computes with."""
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
        """Return the children of this layer, for the computation that calls them."""
        return Parts(
            EMAXConfig(self.groups, [self.groups], False, 0.0), self.conv1x1, self.conv3x3, self.gn
        )

    def __prepare_scriptable__(self) -> nn.Module:
        return refuse_scripting(self)

    def __dir__(self) -> list[str]:
        return without_exports(self, super().__dir__())

    def extra_repr(self) -> str:
        return f"groups={self.groups}"
