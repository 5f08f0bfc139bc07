"""Multi-head self-attention over a feature map, as an attention to compare with."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention2d
from torch import Tensor, nn

__all__ = ["SelfAttention2d"]


def pool_to_at_most(x: Tensor, size: int) -> Tensor:
    """Average [b, c, h, w] over a grid of at most `size` x `size`; a smaller map stays as it is."""
    return F.adaptive_avg_pool2d(x, (min(x.shape[2], size), min(x.shape[3], size)))


def resize_like(x: Tensor, other: Tensor) -> Tensor:
    """Interpolate [b, c, h, w] bilinearly to the height and width of `other`."""
    return F.interpolate(x, size=other.shape[2:], mode="bilinear", align_corners=False)


# One node each in a torch.fx graph: they compare sizes.
torch.fx.wrap("pool_to_at_most")
torch.fx.wrap("resize_like")


class SelfAttention2d(nn.Module):
    """x + self-attention over the pixels of x [b, c, h, w] (timm's `Attention2d`).

    Its cost grows with the square of the pixels, so larger maps are averaged down to a grid of
    `max_size` x `max_size` for it and the result is interpolated back; at 224 x 224 the default
    leaves a network's last two stages (14 x 14 and 7 x 7) at full resolution. There is no position
    embedding: the convolutions around it know where they are, and any size of image works.

    Exported with dynamic sizes, it keeps to the side of `max_size` that it was traced on.

    Args:
        channels: Number of input channels c.
        head_dim: Channels per head; the number of heads is the largest divisor of `channels` up to
            channels / head_dim.
        max_size: Greatest height and width at which the attention is computed.

    Raises:
        ValueError: If an argument is not a positive integer.
    """

    def __init__(
        self, channels: int, head_dim: int = 32, max_size: int = 14, device=None, dtype=None
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__()
        arguments = (("channels", channels), ("head_dim", head_dim), ("max_size", max_size))
        for name, value in arguments:
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        heads = max(n for n in range(1, max(1, channels // head_dim) + 1) if channels % n == 0)
        self.max_size = max_size
        self.attention = Attention2d(channels, num_heads=heads, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention: [b, c, h, w] to [b, c, h, w]."""
        return x + resize_like(self.attention(pool_to_at_most(x, self.max_size)), x)
