"""The EMAX layer: Enhanced Multi-scale Attention with eXpressive learning.

EMAX is the grouped cross-spatial attention of EMA ("Efficient Multi-Scale Attention Module with
Cross-Spatial Learning", arXiv 2305.13563) with a learned group count per sample, channel attention,
global attention and a residual gate. `docs/emax.md` defines it and derives the form computed here.

`emax_timm.ops` explains the letters in the shapes.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..ops import EMAXConfig, EMAXMaps, EMAXWeights, bias_of, emax, emax_maps
from ..ops.reference import Parts
from .children import (
    CONVOLUTIONS,
    SqueezeExcite,
    by_children,
    changed_child,
    refuse_scripting,
    without_exports,
)

__all__ = ["EMAX"]

# Each of these is one node of a torch.fx graph, because the code inside depends on the dtype of x.
torch.fx.wrap("emax")
torch.fx.wrap("emax_maps")


class EMAX(nn.Module):
    """EMAX attention, a layer that scales a feature map [b, c, h, w] and keeps its shape.

    It goes where a squeeze-and-excite or CBAM layer would go: after the convolutions of a block. It
    takes any number of channels and any height and width, contiguous or channels_last, and returns
    the memory format and dtype that it was given. In eval mode it is deterministic, and the output
    of a sample does not depend on the rest of its batch unless `batch_vote` is set. The formulas
    are in `docs/emax.md`; without its additions it is EMA (arXiv 2305.13563).

    Args:
        channels: Number of input channels c.
        factor: Upper bound of the finest group count, F = gcd(channels, factor).
        reduction: Channels per hidden unit of the two squeeze-and-excite gates.
        group_counts: Candidates for the group count, which each sample chooses among: None for
            every divisor of F, "finest" for F alone, or a list, of which this layer keeps the
            divisors of F.
        batch_vote: Whether all samples use the most frequent choice of the batch (the smallest
            count if several are equally frequent).
        channel_gate: Whether to add gamma * x * channel attention to the spatially attended x.
        global_gate: Whether to scale the result by the global attention.
        gate_init: Initial value of the residual gate: 1 gives the attended features, 0 returns x.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters.

    Raises:
        ValueError: If an argument is out of its range, or no given group count divides F.
    """

    dims: ClassVar[int] = 2
    """The number n of spatial axes; `emax_nd.py` has the layers of 1 and 3."""
    warmup: Tensor
    temperature: Tensor

    def __init__(
        self,
        channels: int,
        factor: int = 32,
        reduction: int = 16,
        group_counts: str | Sequence[int] | None = None,
        batch_vote: bool = False,
        channel_gate: bool = True,
        global_gate: bool = True,
        gate_init: float = 1.0,
        device=None,
        dtype=None,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        for name, value in (("channels", channels), ("factor", factor), ("reduction", reduction)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        if not isinstance(gate_init, int | float) or not math.isfinite(gate_init):
            raise ValueError(f"gate_init must be a finite number, not {gate_init!r}")
        self.channels = channels
        self.groups = math.gcd(channels, factor)  # F
        self.candidates = _candidates(self.groups, group_counts)
        self.batch_vote = batch_vote
        self.gate_init = gate_init
        group_channels = channels // self.groups  # d
        hidden = max(1, channels // reduction)

        convolution = CONVOLUTIONS[self.dims]
        self.conv1x1 = convolution(group_channels, group_channels, kernel_size=1, **dd)
        self.conv3x3 = convolution(group_channels, group_channels, kernel_size=3, padding=1, **dd)
        self.gn = nn.GroupNorm(group_channels, group_channels, **dd)
        self.group_controller = None
        if len(self.candidates) > 1:
            self.group_controller = nn.Linear(channels, len(self.candidates), **dd)
        self.channel_gate = (
            SqueezeExcite(channels, hidden, self.dims, **dd) if channel_gate else None
        )
        self.gamma = nn.Parameter(torch.empty(1, **dd)) if channel_gate else None
        self.global_attn = SqueezeExcite(channels, hidden, self.dims, **dd) if global_gate else None
        self.residual_gate = nn.Parameter(torch.empty(channels, **dd))

        # The state of the schedule of the grouping, which `schedule.set_grouping` sets.
        self.register_buffer("warmup", torch.empty((), device=device, dtype=torch.float32))
        self.register_buffer("temperature", torch.empty((), device=device, dtype=torch.float32))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise every parameter and buffer, for instance after `to_empty()`.

        The values are torch's defaults, except that the gates start open, at sigmoid(2) = 0.88
        rather than 0.5. Otherwise each layer would scale its features to a quarter or a third
        at first.
        """
        self.conv1x1.reset_parameters()
        self.conv3x3.reset_parameters()
        nn.init.constant_(self.conv3x3.bias, 2.0)  # type: ignore[arg-type]
        self.gn.reset_parameters()
        if self.group_controller is not None:
            nn.init.zeros_(self.group_controller.weight)
            nn.init.zeros_(self.group_controller.bias)
            if self.groups in self.candidates:
                finest = self.candidates.index(self.groups)
                nn.init.ones_(self.group_controller.bias[finest])
        for gate in (self.channel_gate, self.global_attn):
            if gate is not None:
                gate.reset_parameters()
        if self.gamma is not None:
            nn.init.zeros_(self.gamma)
        if self.global_attn is not None:
            nn.init.constant_(self.global_attn[3].bias, 2.0)  # type: ignore[arg-type]
        nn.init.constant_(self.residual_gate, self.gate_init)

        self.warmup.fill_(1.0)
        self.temperature.fill_(1.0)

    @torch.jit.export
    def attention(self, x: Tensor) -> EMAXMaps:
        """Compute the attention maps of x [b, c, h, w] without applying them.

        The portable backend computes them, whatever backend was requested. In training mode every
        call draws new noise for the choice of group counts.

        Raises:
            ValueError: If x has another shape or number of channels.
            RuntimeError: If a child module was replaced, and a backend other than the portable one
                was requested.
        """
        if not torch.jit.is_scripting():
            change = changed_child(self)
            if change is not None:
                return by_children(x, self, change)[1]
        return emax_maps(x, self.weights(), self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to x [b, c, h, w]; the result has the shape of x.

        Raises:
            ValueError: If x has another shape or number of channels.
            RuntimeError: If a backend was requested that cannot serve.
        """
        if not torch.jit.is_scripting():
            change = changed_child(self)
            if change is not None:
                return by_children(x, self, change)[0]
        return emax(x, self.weights(), self.training)

    def weights(self) -> EMAXWeights:
        """Return the constants and tensors of this layer that a backend computes with."""
        # TorchScript takes a value for present only directly after a comparison with None.
        controller_weight: Tensor | None = None
        controller_bias: Tensor | None = None
        if self.group_controller is not None:
            controller_weight = self.group_controller.weight
            controller_bias = self.group_controller.bias
        channel: list[Tensor | None] = [None, None, None, None]
        if self.channel_gate is not None:
            channel = self.channel_gate.weights()
        global_: list[Tensor | None] = [None, None, None, None]
        if self.global_attn is not None:
            global_ = self.global_attn.weights()
        conv1x1 = self.conv1x1
        conv3x3 = self.conv3x3
        gn = self.gn
        return EMAXWeights(
            config=EMAXConfig(self.groups, self.candidates, self.batch_vote, gn.eps),
            conv1x1_weight=conv1x1.weight,
            conv1x1_bias=bias_of(conv1x1.weight, conv1x1.bias),
            conv3x3_weight=conv3x3.weight,
            conv3x3_bias=bias_of(conv3x3.weight, conv3x3.bias),
            gn_weight=gn.weight,
            gn_bias=gn.bias,
            controller_weight=controller_weight,
            controller_bias=controller_bias,
            channel_reduce_weight=channel[0],
            channel_reduce_bias=channel[1],
            channel_expand_weight=channel[2],
            channel_expand_bias=channel[3],
            gamma=self.gamma,
            global_reduce_weight=global_[0],
            global_reduce_bias=global_[1],
            global_expand_weight=global_[2],
            global_expand_bias=global_[3],
            residual_gate=self.residual_gate,
            warmup=self.warmup,
            temperature=self.temperature,
        )

    @torch.jit.unused
    def parts(self) -> Parts:
        """Return the children of this layer, for the computation that calls them."""
        # The norm has its own eps, so the one here is not used.
        config = EMAXConfig(self.groups, self.candidates, self.batch_vote, 0.0)
        return Parts(
            config=config,
            conv1x1=self.conv1x1,
            conv3x3=self.conv3x3,
            gn=self.gn,
            group_controller=self.group_controller,
            channel_gate=self.channel_gate,
            global_attn=self.global_attn,
            gamma=self.gamma,
            residual_gate=self.residual_gate,
            warmup=self.warmup,
            temperature=self.temperature,
        )

    def __prepare_scriptable__(self) -> nn.Module:
        return refuse_scripting(self)

    def __dir__(self) -> list[str]:
        return without_exports(self, super().__dir__())

    def extra_repr(self) -> str:
        return f"groups={self.groups}, candidates={self.candidates}, batch_vote={self.batch_vote}"


def _candidates(finest: int, group_counts: str | Sequence[int] | None) -> list[int]:
    """Return the candidate group counts of a layer with `finest` fine groups, ascending."""
    divisors = [count for count in range(1, finest + 1) if finest % count == 0]
    if group_counts is None:
        return divisors
    if isinstance(group_counts, str):
        if group_counts != "finest":
            raise ValueError(
                f'group_counts must be None, "finest" or a list of integers, not {group_counts!r}'
            )
        return [finest]
    if not isinstance(group_counts, Sequence):
        raise ValueError(
            f'group_counts must be None, "finest" or a list of integers, not {group_counts!r}'
        )
    if any(not isinstance(count, int) or count < 1 for count in group_counts):
        raise ValueError(f"group_counts must be positive integers, not {list(group_counts)}")
    candidates = [count for count in divisors if count in group_counts]
    if not candidates:
        raise ValueError(
            f"none of the group_counts {list(group_counts)} divides the finest group count "
            f"{finest}; its divisors are {divisors}"
        )
    return candidates
