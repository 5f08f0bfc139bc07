"""Self-attention over pixels: against torch's own attention, its pooling and its heads."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emax_testing import assert_same, gradients, randn, randomise
from torch import Tensor

from emax_timm.attention.self_attention import SelfAttention2d


def make_msa(channels: int, **knobs: Any) -> SelfAttention2d:
    module = SelfAttention2d(channels, dtype=torch.float64, **knobs).eval()
    randomise(module)
    return module


def attend(module: SelfAttention2d, x: Tensor, heads: int) -> Tensor:
    """Of every pixel of [b, c, h, w] over all of them, without the shortcut: torch's functions."""
    weight, bias = module.attention.qkv.weight, module.attention.qkv.bias
    pixels = x.flatten(2).mT  # [b, n, c]
    query, key, value = (
        part.unflatten(2, (heads, -1)).transpose(1, 2)
        for part in F.linear(pixels, weight[:, :, 0, 0], bias).chunk(3, dim=2)
    )
    seen = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    out = F.linear(seen, module.attention.proj.weight[:, :, 0, 0], module.attention.proj.bias)
    return out.mT.unflatten(2, x.shape[2:])


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (14, 14), (14, 2)], ids=str)
@pytest.mark.parametrize(
    ("channels", "knobs", "heads"),
    [
        (1, {}, 1),
        (3, {}, 1),
        (40, {}, 1),
        (96, {}, 3),
        (100, {}, 2),
        (24, {"head_dim": 4}, 6),
        (12, {"head_dim": 1}, 12),
    ],
    ids=str,
)
def test_maps_up_to_max_size_are_attended_at_full_resolution(
    channels: int, knobs: dict[str, Any], heads: int, size: tuple[int, int]
) -> None:
    module = make_msa(channels, **knobs)
    x = randn(2, channels, *size)
    expected = gradients(module, x, lambda x: x + attend(module, x, heads))
    assert_same(gradients(module, x, module), expected)


@pytest.mark.parametrize(
    ("size", "max_size", "grid"),
    [
        ((15, 14), 14, (14, 14)),
        ((14, 15), 14, (14, 14)),
        ((28, 28), 14, (14, 14)),
        ((17, 9), 14, (14, 9)),
        ((1, 30), 14, (1, 14)),
        ((6, 4), 4, (4, 4)),
        ((5, 7), 1, (1, 1)),
        ((16, 16), 16, (16, 16)),
        ((9, 3), 8, (8, 3)),
    ],
    ids=str,
)
def test_larger_maps_are_averaged_down_and_interpolated_back(
    size: tuple[int, int], max_size: int, grid: tuple[int, int]
) -> None:
    module = make_msa(16, head_dim=8, max_size=max_size)

    def explicit(x: Tensor) -> Tensor:
        small = attend(module, F.adaptive_avg_pool2d(x, grid), heads=2)
        return x + F.interpolate(small, size, mode="bilinear", align_corners=False)

    x = randn(2, 16, *size)
    assert_same(gradients(module, x, module), gradients(module, x, explicit))


def test_a_grid_of_blocks_is_their_means() -> None:
    module = make_msa(16, max_size=4)
    x = randn(2, 16, 8, 12)
    means = x.unflatten(2, (4, 2)).unflatten(4, (4, 3)).mean((3, 5))
    small = attend(module, means, heads=1)
    # Away from the border, the pixel between the centres of two blocks takes a share of each.
    out = (module(x) - x).unflatten(2, (4, 2)).unflatten(4, (4, 3))
    middle = out[:, :, 1, 0, 1, 1]  # a quarter of a block above the centre of block (1, 1)
    expected = 0.75 * small[:, :, 1, 1] + 0.25 * small[:, :, 0, 1]
    torch.testing.assert_close(middle, expected, rtol=0, atol=1e-12)


def test_small_maps_forget_where_their_pixels_are() -> None:
    module, x = make_msa(24, head_dim=8), randn(2, 24, 7, 5)
    order = torch.randperm(35, generator=torch.Generator().manual_seed(0))
    shuffled = x.flatten(2)[:, :, order].unflatten(2, (7, 5))
    expected = module(x).flatten(2)[:, :, order].unflatten(2, (7, 5))
    torch.testing.assert_close(module(shuffled), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(module(x.mT), module(x).mT, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head_dim", [1, 7, 8, 32, 1000])
def test_heads_are_the_largest_divisor_that_leaves_them_head_dim_channels(head_dim: int) -> None:
    for channels in (*range(1, 301), 2048):
        module = SelfAttention2d(channels, head_dim=head_dim, device="meta")
        heads = module.attention.num_heads
        assert heads * module.attention.dim_head == channels
        assert heads == 1 or module.attention.dim_head >= head_dim
        larger = (n for n in range(heads + 1, channels + 1) if channels % n == 0)
        assert all(channels // n < head_dim for n in larger), (channels, head_dim)


def test_self_attention_state_dict_does_not_depend_on_the_size() -> None:
    state = SelfAttention2d(24, max_size=3).state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == {
        "attention.qkv.weight": (72, 24, 1, 1),
        "attention.qkv.bias": (72,),
        "attention.proj.weight": (24, 24, 1, 1),
        "attention.proj.bias": (24,),
    }
    SelfAttention2d(24, head_dim=4).load_state_dict(state)


def test_self_attention_is_the_same_in_training_and_eval() -> None:
    module, x = make_msa(24), randn(2, 24, 17, 5)
    assert torch.equal(module(x), module.train()(x))


def test_self_attention_without_its_projection_is_the_identity() -> None:
    module, x = make_msa(24), randn(2, 24, 17, 5)
    torch.nn.init.zeros_(module.attention.proj.weight)
    assert module.attention.proj.bias is not None
    torch.nn.init.zeros_(module.attention.proj.bias)
    assert torch.equal(module(x), x)


@pytest.mark.parametrize("capture", [torch.jit.script, torch.fx.symbolic_trace])
def test_scripted_and_traced_self_attention_pools_by_the_size_it_meets(capture: Any) -> None:
    module = make_msa(16, max_size=4)
    captured = capture(copy.deepcopy(module))
    for size in [(3, 4), (9, 3), (2, 8), (11, 12), (4, 4)]:
        x = randn(2, 16, *size)
        torch.testing.assert_close(captured(x), module(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("traced", "low", "high", "sizes"),
    [((3, 3), 1, 4, [(1, 4), (4, 2)]), ((9, 8), 5, 64, [(5, 30), (12, 7)])],
    ids=["small", "large"],
)
def test_exported_self_attention_serves_the_side_it_was_traced_on(
    traced: tuple[int, int], low: int, high: int, sizes: list[tuple[int, int]]
) -> None:
    module = make_msa(16, max_size=4)
    dims = {
        2: torch.export.Dim("h", min=low, max=high),
        3: torch.export.Dim("w", min=low, max=high),
    }
    program = torch.export.export(
        module, (randn(2, 16, *traced),), dynamic_shapes={"x": dims}, strict=False
    )
    for size in sizes:
        x = randn(2, 16, *size)
        torch.testing.assert_close(program.module()(x), module(x), rtol=0, atol=1e-12)
