"""Multi-head self-attention over the pixels of a feature map, as an attention to compare with."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention2d
from torch import Tensor, nn

__all__ = ["SelfAttention2d"]


def pool_to_at_most(x: Tensor, size: int) -> Tensor:
    """Average x [b, c, h, w] down to at most `size` x `size` pixels; a smaller x stays as it is."""
    return F.adaptive_avg_pool2d(x, (min(x.shape[2], size), min(x.shape[3], size)))


def resize_like(x: Tensor, other: Tensor) -> Tensor:
    """Interpolate x [b, c, h, w] bilinearly to the height and width of `other`."""
    return F.interpolate(x, size=other.shape[2:], mode="bilinear", align_corners=False)


# Each of these is one node of a torch.fx graph, because they compare sizes.
torch.fx.wrap("pool_to_at_most")
torch.fx.wrap("resize_like")


class SelfAttention2d(nn.Module):
    """Self-attention over the pixels of x [b, c, h, w] (timm's `Attention2d`), added to x.

    Its cost grows with the square of the number of pixels. Feature maps larger than `max_size` x
    `max_size` are therefore averaged down to that size, and the result is interpolated back; for
    images of 224 x 224 the default keeps the last two stages of a network (14 x 14 and 7 x 7) at
    full resolution. There is no position embedding, because the convolutions around the layer know
    positions, so images of any size work (arXiv 1706.03762).

    Exported with dynamic sizes, it averages down or not as it did for the sizes it was traced with.

    Args:
        channels: Number of input channels c.
        head_dim: Channels per head; the number of heads is the largest divisor of `channels` up to
            channels / head_dim.
        max_size: Greatest height and width, in pixels, at which the attention is computed.
        device: Device of the parameters.
        dtype: Dtype of the parameters.

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
        """Add the self-attention of x [b, c, h, w] to x; the result has the shape of x."""
        return x + resize_like(self.attention(pool_to_at_most(x, self.max_size)), x)
