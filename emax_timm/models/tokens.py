"""Attention for models of tokens: between a layout of tokens and feature maps [b, c, h, w].

A block of a vision transformer sees tokens [b, n, c] and not the grid that they lie on, which for
models that take images of any size is not known before an image comes. `run_on_grid` sets the
grid for the time of a forward pass, and `grid_of` gives it to the block.
"""

import math
import threading
from collections.abc import Callable
from typing import Any

import torch
from timm.models import hiera
from torch import Tensor, nn

__all__ = [
    "ChannelsLastAttention",
    "TokenAttention",
    "UnrolledAttention",
    "feature_layer",
    "grid_of",
    "has_grid",
    "patches_of",
    "run_on_grid",
]

NO_GRID = "the tokens are not on the grid of the image: were some merged or dropped?"

Grid = tuple[int, int]
"""Height and width in patches, or in pixels for models without patches."""


class TokenAttention(nn.Module):
    """Attention for tokens [b, n, c]: p prefix tokens, then the rows of a grid of h x w tokens.

    Prefix tokens, such as class and register tokens, pass unchanged.

    Args:
        attention: A module that maps [b, c, h, w] to [b, c, h, w].
        prefix: Number of prefix tokens p.
        stride: Patches per token of the grid, along each side.
    """

    def __init__(self, attention: nn.Module, prefix: int, stride: int = 1) -> None:
        super().__init__()
        self.attention = attention
        self.prefix = prefix
        self.stride = stride

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Apply the attention to x [b, n, c]; the result has the shape of x.

        Args:
            x: The tokens of images of one size, with n = p + h * w.
            grid: Height and width of the images in patches.
        """
        height, width = (-(-size // self.stride) for size in grid)
        batch, count, channels = x.shape
        torch._assert(count == self.prefix + height * width, NO_GRID)
        tokens = x[:, self.prefix :]  # [b, h * w, c]
        features = tokens.transpose(1, 2).reshape(batch, channels, height, width)
        # The attention keeps the memory format, so that later layers compute the same bits.
        tokens = self.attention(features).flatten(2).transpose(1, 2)
        return torch.cat([x[:, : self.prefix], tokens], 1) if self.prefix else tokens

    def extra_repr(self) -> str:
        return f"prefix={self.prefix}, stride={self.stride}"


class ChannelsLastAttention(nn.Module):
    """Attention for features [b, h, w, c], the layout of Swin Transformer's stages.

    Args:
        attention: A module that maps [b, c, h, w] to [b, c, h, w].
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to x [b, h, w, c]; the result has the shape of x."""
        return self.attention(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class UnrolledAttention(nn.Module):
    """Attention for the tokens [b, n, c] of Hiera, which are not in the order of rows.

    Args:
        attention: A module that maps [b, c, h, w] to [b, c, h, w].
        reroll: Hiera's module that orders the tokens [b, n, c] after a block as [b, h, w, c].
        unroll: Hiera's module that orders tokens [b, h * w, c] as they come after the block.
        block: Index of the block.
    """

    def __init__(
        self, attention: nn.Module, reroll: hiera.Reroll, unroll: hiera.Unroll, block: int
    ) -> None:
        super().__init__()
        self.attention = ChannelsLastAttention(attention)
        self.reroll = reroll
        self.unroll = unroll
        self.block = block
        self.count = math.prod(unroll.size)  # n

    def forward(self, x: Tensor) -> Tensor:
        """Apply the attention to x [b, n, c]; the result has the shape of x."""
        torch._assert(x.shape[1] == self.count, NO_GRID)
        return self.unroll(self.attention(self.reroll(x, self.block)).flatten(1, 2))


LAYOUTS = (TokenAttention, ChannelsLastAttention, UnrolledAttention)


def feature_layer(stage: nn.Module) -> nn.Module:
    """Return the layer whose output is the output of a stage as feature maps [b, c, h, w].

    It is the stage itself if it has no attention in another layout.
    """
    if isinstance(stage, nn.ModuleList):
        return feature_layer(stage[-1])
    layer = getattr(stage, "attention", None)
    if not isinstance(layer, LAYOUTS):
        return stage
    while isinstance(layer, LAYOUTS):
        layer = layer.attention
    return layer


class _Pass(threading.local):
    """The forward pass that runs in this thread; no state is left on the model."""

    grid: Grid | None = None


_PASS = _Pass()


def run_on_grid(run: Callable[..., Any], model: nn.Module, images: Tensor, *args, **kwargs) -> Any:
    """Call `run(model, images, ...)`, for whose time `grid_of` gives the grid of the images."""
    outer = _PASS.grid
    _PASS.grid = patches_of(model, images)
    try:
        return run(model, images, *args, **kwargs)
    finally:
        _PASS.grid = outer


def grid_of(x: Tensor) -> Grid:
    """Return the grid of the forward pass that tokens x [b, n, c] belong to.

    Gradient checkpointing runs a block again in the backward pass, with the same tensor, when other
    images may have been through the model: the tensor keeps the grid of its own pass.

    Raises:
        RuntimeError: If no forward pass of the model runs, and x was in none.
    """
    eager = isinstance(x, Tensor) and not torch.compiler.is_compiling()
    grid = (getattr(x, "_grid", None) if eager else None) or _PASS.grid
    if grid is None:
        raise RuntimeError(
            "a block with token attention runs inside of its model's forward pass, from which it "
            "has the size of the images (gradient checkpointing needs use_reentrant=False)"
        )
    if eager and x.requires_grad:
        x._grid = grid  # pyright: ignore[reportAttributeAccessIssue]
    return grid


def patches_of(model: nn.Module, images: Tensor) -> Grid:
    """Return height and width of images [b, c, h, w] in the patches that a model divides them into.

    They are pixels if the model does not say what its patches are.
    """
    height, width = images.shape[-2:]
    patch_embed: Any = getattr(model, "patch_embed", None)
    return patch_embed.dynamic_feat_size((height, width)) if has_grid(model) else (height, width)


def has_grid(model: nn.Module) -> bool:
    """Return whether a model says into how many patches it divides an image."""
    return hasattr(getattr(model, "patch_embed", None), "dynamic_feat_size")
