"""Every attention of this package by its name."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import EcaModule, SEModule
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn

from ..ops import exporting
from .ema import EMA
from .emax import EMAX
from .emax_nd import EMAX1d, EMAX3d
from .self_attention import SelfAttention2d

__all__ = ["ATTENTIONS", "GatedAttention", "create_attention"]

ATTENTIONS: dict[str, Callable[..., nn.Module]] = {
    "emax": EMAX,
    "ema": EMA,
    "cbam": CbamModule,  # arXiv 1807.06521
    "se": SEModule,  # arXiv 1709.01507
    "eca": EcaModule,  # arXiv 1910.03151
    "coord": CoordAttn,  # arXiv 2103.02907
    "msa": SelfAttention2d,
}
_BY_DIMS: dict[int, type[EMAX]] = {1: EMAX1d, 2: EMAX, 3: EMAX3d}
"""EMAX by its number of spatial axes; the other attentions have two."""


class GatedAttention(nn.Module):
    """An attention behind a residual gate: x + alpha * (attention(x) - x), with alpha [c].

    EMAX has such a gate of its own; this is the gate for the other attentions. Where attention(x)
    is finite, alpha = 0 gives x and alpha = 1 gives attention(x) bit for bit.

    Args:
        channels: Number of input channels c.
        attention: A module that maps [b, c, h, w] to [b, c, h, w].
        gate_init: Initial value of alpha.
        device: Device of the gate.
        dtype: Dtype of the gate.

    Raises:
        ValueError: If `gate_init` is no finite number.
    """

    def __init__(
        self,
        channels: int,
        attention: nn.Module,
        gate_init: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if not isinstance(gate_init, int | float) or not math.isfinite(gate_init):
            raise ValueError(f"gate_init must be a finite number, not {gate_init!r}")
        self.gate_init = gate_init
        self.attention = attention
        self.residual_gate = nn.Parameter(torch.empty(channels, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the gate alone; the layers of the attention have methods of their own."""
        nn.init.constant_(self.residual_gate, self.gate_init)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the gated attention to x [b, c, h, w]; the result has the shape of x."""
        gate = self.residual_gate.to(x.dtype).view(1, -1, 1, 1)
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves no other one out)
            if exporting():
                return self._lerp_by_parts(x.contiguous(), gate)
        return torch.lerp(x, self.attention(x).to(x.dtype), gate)

    @torch.jit.unused
    def _lerp_by_parts(self, x: Tensor, gate: Tensor) -> Tensor:
        """Compute `torch.lerp` by its formula: torch.export would guard on the strides of lerp."""
        attended = self.attention(x).to(x.dtype)
        change = attended - x
        return torch.where(gate < 0.5, x + gate * change, attended - (1 - gate) * change)


def create_attention(
    name: str,
    channels: int,
    gate_init: float | None = None,
    device=None,
    dtype=None,
    dims: int = 2,
    **kwargs: Any,
) -> nn.Module:
    """Create an attention layer by name; it maps [b, c, h, w] to [b, c, h, w].

    Args:
        name: One of "emax", "ema" (arXiv 2305.13563), "cbam" (1807.06521), "se" (1709.01507), "eca"
            (1910.03151), "coord" (2103.02907) and "msa" (self-attention over the pixels).
        channels: Number of input channels c.
        gate_init: Initial value of a residual gate per channel that the layer is put behind: 1
            gives the attention, 0 returns the input. With None, EMAX has its own gate at 1, and the
            other attentions have no gate.
        device: Device of the parameters.
        dtype: Dtype of the parameters.
        dims: The number of axes of the features beside batch and channels. EMAX serves 1, which
            are sequences [b, c, l], 2 and 3, which are videos [b, c, t, h, w]; the others serve 2.
        kwargs: Further arguments of the attention's class, such as `factor` of EMAX.

    Raises:
        TypeError: If the class does not know a keyword.
        ValueError: If the name is unknown or a value is out of its range.
    """
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    if name not in ATTENTIONS:
        raise ValueError(f"unknown attention {name!r}; there are {', '.join(ATTENTIONS)}")
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels must be a positive integer, not {channels!r}")
    if name == "eca" and "kernel_size" in kwargs:
        # timm accepts this argument, but does not use it where it knows the channels.
        raise TypeError("ECA has its kernel_size from the channels, by gamma and beta")
    served = list(_BY_DIMS) if name == "emax" else [2]
    if dims not in served:
        raise ValueError(
            f"dims of {name} must be {' or '.join(map(str, served))}, not {dims!r}: the number of "
            "axes of its features beside batch and channels"
        )
    if name == "emax":
        gate = {} if gate_init is None else {"gate_init": gate_init}
        return _BY_DIMS[dims](channels, **kwargs, **gate, **dd)
    attention = ATTENTIONS[name](channels, **kwargs, **dd)
    if gate_init is None:
        return attention
    return GatedAttention(channels, attention, gate_init, **dd)
