"""Every attention of the zoo by name."""

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


class GatedAttention(nn.Module):
    """x + alpha * (attention(x) - x), with EMAX's residual gate alpha, [c], for any attention.

    Exact at both ends: alpha = 0 gives x and alpha = 1 gives attention(x), to the bit, wherever
    attention(x) is finite.

    Args:
        channels: Number of input channels c.
        attention: Maps [b, c, h, w] to [b, c, h, w].
        gate_init: Initial alpha.

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
        """Initialise the gate; the attention's layers have methods of their own."""
        nn.init.constant_(self.residual_gate, self.gate_init)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention: [b, c, h, w] to [b, c, h, w]."""
        gate = self.residual_gate.to(x.dtype).view(1, -1, 1, 1)
        if not torch.jit.is_scripting():  # noqa: SIM102  (TorchScript leaves no other one out)
            if exporting():
                return self._lerp_by_parts(x.contiguous(), gate)
        return torch.lerp(x, self.attention(x).to(x.dtype), gate)

    @torch.jit.unused
    def _lerp_by_parts(self, x: Tensor, gate: Tensor) -> Tensor:
        """lerp's formula, where torch.export would guard on the strides of lerp's result."""
        attended = self.attention(x).to(x.dtype)
        change = attended - x
        return torch.where(gate < 0.5, x + gate * change, attended - (1 - gate) * change)


def create_attention(
    name: str,
    channels: int,
    gate_init: float | None = None,
    device=None,
    dtype=None,
    **kwargs: Any,
) -> nn.Module:
    """Build an attention that maps [b, c, h, w] to [b, c, h, w].

    Args:
        name: A key of `ATTENTIONS`.
        channels: Number of input channels c.
        gate_init: Put the attention behind a residual gate that starts at this value: 1 is the
            attention, 0 the identity. EMAX has a gate of its own, at 1 for None; the others have
            none for None.
        kwargs: Of the attention's class.

    Raises:
        TypeError: For an unknown keyword.
        ValueError: For an unknown name or a bad value.
    """
    dd: dict[str, Any] = {"device": device, "dtype": dtype}
    if name not in ATTENTIONS:
        raise ValueError(f"unknown attention {name!r}; there are {', '.join(ATTENTIONS)}")
    if not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels must be a positive integer, not {channels!r}")
    if name == "eca" and "kernel_size" in kwargs:
        # timm takes it and does not use it where it knows the channels.
        raise TypeError("ECA has its kernel_size from the channels, by gamma and beta")
    if name == "emax":
        gate = {} if gate_init is None else {"gate_init": gate_init}
        return EMAX(channels, **kwargs, **gate, **dd)
    attention = ATTENTIONS[name](channels, **kwargs, **dd)
    if gate_init is None:
        return attention
    return GatedAttention(channels, attention, gate_init, **dd)
