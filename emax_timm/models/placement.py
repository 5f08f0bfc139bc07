"""Insertion of attention into a model: into the slots of its blocks, or after its stages.

The existing parameters keep their names, so the weights of the baseline fit.

There are two sets of names for the same choice. A model class has `attn_layer`, as timm's ResNet
has, and `attn_stages`, because they stand among all its other arguments, and in the configurations
and weights that users keep. `insert_attention` and "with_attention" are about nothing but the
attention, and say `attention` and `stages`; they alone have `where`, for a model class always puts
it into its blocks.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from timm.models import _efficientnet_blocks as efficientnet_blocks
from timm.models import convnext, regnet, res2net, resnet, sknet
from torch import Tensor, nn

from ..attention import create_attention
from .append import append, with_grid
from .stages import check_keeps_tokens, chosen_stages, probe_stages, stage_names
from .tokens import TokenAttention

__all__ = ["BlockAttention", "place_after_stages", "place_in_blocks"]

Build = Callable[[int], nn.Module]
"""A function that creates the attention for a number of channels."""

# The block classes that have an attention slot, `se`, in the residual branch, and the layer before
# the slot, whose output channels are those of the attention.
SLOTS: dict[type[nn.Module], str] = {
    resnet.BasicBlock: "bn2",
    resnet.Bottleneck: "bn3",
    res2net.Bottle2neck: "bn3",
    sknet.SelectiveKernelBasic: "conv2.bn",
    sknet.SelectiveKernelBottleneck: "conv3.bn",
    regnet.Bottleneck: "conv2.bn",
    efficientnet_blocks.DepthwiseSeparableConv: "bn1",
    efficientnet_blocks.InvertedResidual: "bn2",
    efficientnet_blocks.EdgeResidual: "bn1",
    efficientnet_blocks.UniversalInvertedResidual: "pw_exp.bn",
}


class ConvNeXtAttentionBlock(convnext.ConvNeXtBlock):
    """A ConvNeXt block of timm with attention between its MLP and its layer scale.

    Args:
        block: The block whose layers this one takes over, under the same names.
        attention: A module that maps [b, c, h, w] to [b, c, h, w].
    """

    def __init__(self, block: convnext.ConvNeXtBlock, attention: nn.Module) -> None:
        nn.Module.__init__(self)
        self.use_conv_mlp = block.use_conv_mlp
        self.conv_dw = block.conv_dw
        self.norm = block.norm
        self.mlp = block.mlp
        self.attention = attention
        self.gamma = block.gamma
        self.shortcut = block.shortcut
        self.drop_path = block.drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to x [b, c, h, w]; the result has the shape of x."""
        shortcut = x
        x = self.conv_dw(x)
        if self.use_conv_mlp:
            x = self.mlp(self.norm(x))
        else:
            x = x.permute(0, 2, 3, 1)  # [b, h, w, c]
            x = self.mlp(self.norm(x)).permute(0, 3, 1, 2)  # [b, c, h, w], channels_last
        x = self.attention(x)
        if self.gamma is not None:
            x = x.mul(self.gamma.reshape(1, -1, 1, 1))
        return self.drop_path(x) + self.shortcut(shortcut)


class BlockAttention:
    """A mixin that gives a timm model class attention in the blocks of some of its stages.

    Args:
        args: The positional arguments of timm's class.
        attn_layer: The name of the attention, as in `create_attention`.
        attn_stages: The indices of the stages that have attention, from 0; None is all of them.
        attn_kwargs: Keyword arguments of the attention, which JSON can represent. Every attention
            sits behind a residual gate; `gate_init` is its initial value, 1 unless given.
        device: Device of the parameters and buffers.
        dtype: Dtype of the parameters.
        kwargs: The keyword arguments of timm's class.

    Raises:
        TypeError: If a keyword is unknown, here or in `attn_kwargs`.
        ValueError: If a stage does not exist, or a value in `attn_kwargs` is out of its range.
    """

    def __init__(
        self,
        *args: Any,
        attn_layer: str = "emax",
        attn_stages: Sequence[int] | None = None,
        attn_kwargs: Mapping[str, Any] | None = None,
        device=None,
        dtype=None,
        **kwargs: Any,
    ) -> None:
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(*args, **kwargs, **dd)
        # The attention is built after the initialisation of the model, which would initialise the
        # attention anew. This also gives the backbone and its baseline the same weights for a seed.
        attention = {"gate_init": 1.0, **(attn_kwargs or {})}
        build = functools.partial(create_attention, attn_layer, dims=2, **attention, **dd)
        place_in_blocks(cast(nn.Module, self), build, attn_stages)


def place_in_blocks(model: nn.Module, build: Build, stages: Sequence[int] | None = None) -> int:
    """Insert attention into the residual branch of every block of the stages, in place.

    If the slot of a block holds an attention already, the new one comes after it.

    Args:
        model: A timm model.
        build: Creates the attention for a number of channels.
        stages: Indices of stages, from 0; None is all of them.

    Returns:
        The number of blocks that got attention.

    Raises:
        ValueError: If a stage does not exist, or no block of the model has a slot.
    """
    chosen = set(chosen_stages(model, stages))
    slots = (*SLOTS, convnext.ConvNeXtBlock)
    blocks = [
        name
        for name, stage in _stage_of_each_module(model).items()
        if stage in chosen and isinstance(model.get_submodule(name), slots)
    ]
    if chosen and not blocks:
        raise ValueError(
            f"the blocks of {type(model).__name__} have no slot for attention; "
            'where="stage" puts it after each stage'
        )
    for name in blocks:
        block: Any = model.get_submodule(name)
        norm: Any
        if isinstance(block, convnext.ConvNeXtBlock):
            norm = block.norm
            attention = build(norm.weight.shape[0]).train(block.training)
            _replace(model, name, ConvNeXtAttentionBlock(block, attention))
        else:
            before = next(layer for kind, layer in SLOTS.items() if isinstance(block, kind))
            norm = block.get_submodule(before)
            attention = build(norm.weight.shape[0]).train(block.training)
            slot: Any = block.se
            if slot is None or isinstance(slot, nn.Identity):
                block.se = attention
            else:
                append(slot, attention)
    return len(blocks)


def place_after_stages(model: nn.Module, build: Build, stages: Sequence[int] | None = None) -> None:
    """Insert attention after each of the stages, in place.

    Args:
        model: A timm model, or a video model of torchvision.
        build: Creates the attention for a number of channels.
        stages: Indices of stages, from 0; None is all of them.

    Raises:
        ValueError: If a stage does not exist, or its output is not one tensor of features on a
            grid.
    """
    check_keeps_tokens(model)
    for stage in probe_stages(model, chosen_stages(model, stages)):
        module = model.get_submodule(stage.name)
        attention = stage.adapt(build(stage.channels)).train(module.training)
        append(module, attention)
    if any(isinstance(module, TokenAttention) for module in model.modules()):
        model.__class__ = with_grid(type(model))


def _stage_of_each_module(model: nn.Module) -> dict[str, int]:
    """Map the name of each module to its stage; modules after the last stage belong to it.

    A stage is everything from the end of the previous stage to the end of its module, because the
    feature_info of EfficientNet names only the last part of some stages.
    """
    stages = stage_names(model)
    last = {}
    for position, (name, _) in enumerate(model.named_modules()):
        for stage in stages:
            if name == stage or name.startswith(stage + "."):
                last[stage] = position
    return {
        name: next((i for i, s in enumerate(stages) if position <= last[s]), len(stages) - 1)
        for position, (name, _) in enumerate(model.named_modules())
    }


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
