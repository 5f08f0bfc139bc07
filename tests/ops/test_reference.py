"""The reference against statements of the formulas that share nothing with it.

One for any number of spatial dimensions, by torch's layers, group by group; and one of EMA in two,
by sums and products.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from emax_testing import VARIANTS, force, make_ema, make_emax, published_ema, randn
from tiers import mostly_slow
from torch import Tensor

from emax_timm.attention import set_grouping
from emax_timm.ops import EMAXWeights, reference
from emax_timm.ops.weights import TENSORS

IMAGES = [(1,), (6,), (1, 1), (1, 5), (4, 3), (1, 1, 1), (2, 3, 4), (3, 1, 2)]
POOLS: Any = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
CONVS: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def weights_for(module: Any, dimensions: int) -> EMAXWeights:
    """The weights of a layer of images, with kernels for another number of dimensions."""
    weights = module.weights()
    tensors = {
        name: tensor.detach().requires_grad_(name not in ("warmup", "temperature"))
        for name, tensor in zip(TENSORS, weights[1:], strict=True)
        if tensor is not None
    }
    d = len(weights.gn_bias)
    kernel = randn(d, d, *[3] * dimensions, seed=50) / (d * 3**dimensions) ** 0.5
    tensors["conv3x3_weight"] = kernel.requires_grad_()
    mixing = tensors["conv1x1_weight"].detach().reshape(d, d, *[1] * dimensions)
    tensors["conv1x1_weight"] = mixing.requires_grad_()
    return EMAXWeights(weights.config, **tensors)


def gradients(out: Tensor, x: Tensor, weights: EMAXWeights) -> dict[str, Tensor]:
    inputs = {"x": x}
    for name in TENSORS:
        tensor = getattr(weights, name)
        if tensor is not None and tensor.requires_grad:
            inputs[name] = tensor
    loss = (out * randn(*out.shape, seed=9)).sum()
    found = torch.autograd.grad(loss, [*inputs.values()], allow_unused=True)
    return {
        name: torch.zeros_like(inputs[name]) if g is None else g
        for name, g in zip(inputs, found, strict=True)
    }


# By torch's layers, group by group --------------------------------------------------------------


def group_maps(sample: Tensor, w: EMAXWeights) -> dict[int, Tensor]:
    """By group count, the map of each fine group of one sample [c, ...]: [F, ...]."""
    size, groups, d = sample.shape[1:], w.config.groups, len(w.gn_bias)
    n = len(size)
    one, two = [], []
    for block in sample.split(d):
        block = block[None]
        gated = block
        for axis in range(n):
            shape = [length if a == axis else 1 for a, length in enumerate(size)]
            pooled = POOLS[n](block, shape)
            gated = gated * CONVS[n](pooled, w.conv1x1_weight, w.conv1x1_bias).sigmoid()
        one.append(torch.group_norm(gated, d, w.gn_weight, w.gn_bias, w.config.eps))
        two.append(CONVS[n](block, w.conv3x3_weight, w.conv3x3_bias, padding=1))
    maps = {}
    for count in {*w.config.candidates, groups}:
        members = groups // count
        rows = []
        for first in range(0, groups, members):
            a = torch.cat(one[first : first + members], 1)[0].flatten(1)  # [c / G, pixels]
            b = torch.cat(two[first : first + members], 1)[0].flatten(1)
            map_ = a.mean(1).softmax(0) @ b + b.mean(1).softmax(0) @ a
            rows += [map_.view(size)] * members
        maps[count] = torch.stack(rows)
    return maps


def straight_through(means: Tensor, w: EMAXWeights, noise: Tensor | None) -> Tensor:
    """The choice of a candidate: [b, K]."""
    if w.controller_weight is None:
        return means.new_ones(len(means), 1)
    assert w.temperature is not None
    logits = F.linear(means, w.controller_weight, w.controller_bias)
    logits = logits if noise is None else logits + noise
    soft = F.softmax(logits / w.temperature.double(), 1)
    taken = [int(row.argmax()) for row in soft]
    if w.config.batch_vote and taken:
        taken = [max(sorted(set(taken)), key=taken.count)] * len(taken)
    hard = F.one_hot(torch.tensor(taken), soft.shape[1]).double()
    return soft + (hard - soft).detach()


def squeeze_excite(means: Tensor, w: EMAXWeights, name: str) -> Tensor:
    tensors = [
        getattr(w, f"{name}_{part}_{kind}")
        for part in ("reduce", "expand")
        for kind in ("weight", "bias")
    ]
    hidden = F.linear(means, tensors[0].flatten(1), tensors[1]).relu()
    return F.linear(hidden, tensors[2].flatten(1), tensors[3]).sigmoid()


def by_layers(x: Tensor, w: EMAXWeights, noise: Tensor | None = None) -> Tensor:
    """Section 2 of the definition, sample by sample."""
    choice = straight_through(x.flatten(2).mean(2), w, noise)
    outputs = []
    for sample, shares in zip(x, choice, strict=True):
        maps = group_maps(sample, w)
        s = 0.0 if w.warmup is None else float(w.warmup)
        mixed = (1 - s) * maps[w.config.groups]
        for share, count in zip(shares, w.config.candidates, strict=True):
            mixed = mixed + s * share * maps[count]
        attended = sample * mixed.sigmoid().repeat_interleave(len(w.gn_bias), 0)
        flat, fused = sample.flatten(1), attended.flatten(1)  # [c, pixels]
        if w.gamma is not None:
            gate = squeeze_excite(flat.mean(1), w, "channel")
            fused = fused + w.gamma * flat * gate[:, None]
        if w.global_reduce_weight is not None:
            fused = fused * squeeze_excite(fused.mean(1), w, "global")[:, None]
        if w.residual_gate is not None:
            alpha = w.residual_gate[:, None]
            fused = alpha * fused + (1 - alpha) * flat
        outputs.append(fused.view_as(sample))
    return torch.stack(outputs) if outputs else x * 0


def assert_equals_layers(x: Tensor, weights: EMAXWeights, noise: Tensor | None = None) -> None:
    """The output, and the gradients of x and of every tensor."""
    x = x.requires_grad_()
    actual, _ = reference.emax(x, reference.parts_of(weights), noise)
    expected = by_layers(x, weights, noise)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    found, wanted = gradients(actual, x, weights), gradients(expected, x, weights)
    for name, value in wanted.items():
        error = (found[name] - value).abs().max().item() if value.numel() else 0
        assert error <= 1e-9 * max(1.0, value.abs().max().item() if value.numel() else 0), name


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("channels", mostly_slow([3, 12, 24], 1))
def test_it_equals_torchs_layers_in_any_number_of_dimensions(
    channels: int, image: tuple[int, ...]
) -> None:
    module = make_emax(channels, factor=12)
    set_grouping(module, warmup=0.6, temperature=0.8)
    for count in module.candidates[:3]:
        force(module, count)
        assert_equals_layers(randn(2, channels, *image), weights_for(module, len(image)))


@pytest.mark.parametrize("image", [(6,), (4, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_equals_torchs_layers_without_each_part(variant: str, image: tuple[int, ...]) -> None:
    module = make_emax(24, **VARIANTS[variant])
    force(module, module.candidates[0])
    assert_equals_layers(randn(2, 24, *image), weights_for(module, len(image)))


@pytest.mark.parametrize("batch_vote", [False, True])
@pytest.mark.parametrize("image", [(6,), (4, 3), (2, 3, 2)], ids=str)
def test_it_equals_torchs_layers_under_noise(image: tuple[int, ...], batch_vote: bool) -> None:
    module = make_emax(24, batch_vote=batch_vote)
    force(module, 2, margin=0.5)
    weights = weights_for(module, len(image))
    noise = 2 * randn(6, len(module.candidates), seed=4)
    x = randn(6, 24, *image)
    _, maps = reference.emax(x, reference.parts_of(weights), noise)
    assert len((maps.group_probs.log() + noise).argmax(1).unique()) > 1
    assert_equals_layers(x, weights, noise)


@pytest.mark.parametrize("image", [(6,), (4, 3), (2, 3, 2)], ids=str)
def test_ema_equals_torchs_layers(image: tuple[int, ...]) -> None:
    module = make_ema(40)
    assert_equals_layers(randn(2, 40, *image), weights_for(module, len(image)))


@pytest.mark.parametrize("image", [(6,), (4, 3), (2, 3, 2)], ids=str)
@pytest.mark.parametrize("batch_vote", [False, True])
def test_an_empty_batch_has_gradients_of_zero(image: tuple[int, ...], batch_vote: bool) -> None:
    weights = weights_for(make_emax(24, batch_vote=batch_vote), len(image))
    x = torch.zeros(0, 24, *image, dtype=torch.float64, requires_grad=True)
    out, maps = reference.emax(x, reference.parts_of(weights))
    assert out.shape == x.shape
    assert maps.spatial.shape == (0, 8, *image)
    assert maps.group_count.shape == (0,)
    assert all((value == 0).all() for value in gradients(out, x, weights).values())


# The maps, and numeric gradients ----------------------------------------------------------------


def test_the_maps_are_what_the_output_is_made_of() -> None:
    module, x = make_emax(24), randn(3, 24, 5, 4)
    force(module, 4)
    weights = module.weights()
    out, maps = reference.emax(x, reference.parts_of(weights))
    assert weights.gamma is not None
    assert weights.residual_gate is not None
    spatial = maps.spatial.repeat_interleave(3, 1)
    fused = x * (spatial + weights.gamma * maps.channel[:, :, None, None])
    attended = fused * maps.global_[:, :, None, None]
    expected = x + weights.residual_gate[:, None, None] * (attended - x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    assert maps.group_count.tolist() == [4, 4, 4]
    logits = F.linear(x.mean((2, 3)), *weights[7:9])  # type: ignore[arg-type]
    torch.testing.assert_close(maps.group_probs, logits.softmax(1), rtol=0, atol=1e-14)


@pytest.mark.parametrize("image", [(1,), (3,), (2, 3), (1, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("counts", mostly_slow(["finest", [2], None], 2), ids=str)
def test_gradients_are_the_numeric_ones(counts: Any, image: tuple[int, ...]) -> None:
    module = make_emax(8, factor=4, reduction=4, group_counts=counts)
    if counts is None:
        # No choice is made: the straight-through gradient is not the numeric one.
        set_grouping(module, warmup=0.0)
    weights = weights_for(module, len(image))
    names = [
        name
        for name in TENSORS
        if name not in ("warmup", "temperature") and getattr(weights, name) is not None
    ]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        changed = weights._replace(**dict(zip(names, values, strict=True)))
        return reference.emax(x, reference.parts_of(changed))[0]

    inputs = [randn(2, 8, *image).requires_grad_(), *(getattr(weights, name) for name in names)]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


# EMA in two dimensions, in sums and products ----------------------------------------------------


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (2, 2), (7, 5), (17, 9)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 32, 40, 64, 100])
def test_ema_equals_the_published_formula(channels: int, size: tuple[int, int]) -> None:
    weights = make_ema(channels).weights()
    x = randn(2, channels, *size).requires_grad_()
    actual, _ = reference.emax(x, reference.parts_of(weights))
    expected = published_ema(x, list(weights[1:7]))  # type: ignore[arg-type]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    found, wanted = gradients(actual, x, weights), gradients(expected, x, weights)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-9, msg=name)
