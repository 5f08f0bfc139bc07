"""EMAX by its formulas, for any number of spatial dimensions; every backend is tested against it.

It takes no shortcut and shares no code with the backends: every candidate group count is regrouped
and evaluated by itself. The parts of a layer are functions here, so the same code serves weights
and modules that must be called. The shapes in the comments are those of two dimensions.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .weights import EMAXConfig, EMAXMaps, EMAXWeights, present

__all__ = ["Parts", "emax", "parts_of"]

Layer = Callable[[Tensor], Tensor]


class Parts(NamedTuple):
    """The parts of a layer as functions; a part that the layer does not have is None."""

    config: EMAXConfig
    conv1x1: Layer  # of [n, d, h + w, 1]
    conv3x3: Layer  # of [n, d, h, w], as is gn
    gn: Layer
    group_controller: Layer | None = None  # [b, c] to [b, K]
    channel_gate: Layer | None = None  # [b, c, h, w] to [b, c, 1, 1]
    global_attn: Layer | None = None
    gamma: Tensor | None = None
    residual_gate: Tensor | None = None
    warmup: Tensor | None = None
    temperature: Tensor | None = None


def parts_of(weights: EMAXWeights) -> Parts:
    """Make the parts of a layer from its weights."""
    w = weights
    channel = w.channel_reduce_weight, w.channel_reduce_bias
    channel += w.channel_expand_weight, w.channel_expand_bias
    global_ = w.global_reduce_weight, w.global_reduce_bias
    global_ += w.global_expand_weight, w.global_expand_bias
    return Parts(
        w.config,
        lambda x: _convolve(x, w.conv1x1_weight, w.conv1x1_bias),
        lambda x: _convolve(x, w.conv3x3_weight, w.conv3x3_bias),
        lambda x: _instance_norm(x, w.gn_weight, w.gn_bias, w.config.eps),
        _linear(w.controller_weight, w.controller_bias),
        _squeeze_excite(*channel),
        _squeeze_excite(*global_),
        *(w.gamma, w.residual_gate, w.warmup, w.temperature),
    )


def emax(x: Tensor, parts: Parts, noise: Tensor | None = None) -> tuple[Tensor, EMAXMaps]:
    """Compute the output of a layer, like x [b, c, h, w], and its maps; the noise is [b, K]."""
    config, (b, c, *size) = parts.config, x.shape
    groups, ones = config.groups, [1] * len(size)
    axes = range(len(size))
    image = [2 + axis for axis in axes]

    fine = x.reshape(b * groups, c // groups, *size)  # [b*F, d, h, w]
    pooled = [fine] if len(size) == 1 else [fine.mean([*image[:i], *image[i + 1 :]]) for i in axes]
    joined = torch.cat(pooled, 2).reshape(*fine.shape[:2], sum(size), *ones[1:])  # [b*F, d, h+w, 1]
    gates = torch.sigmoid(parts.conv1x1(joined)).flatten(2).split(size, 2)
    gated = fine
    for axis, gate in enumerate(gates):
        gated = gated * gate.unflatten(2, [*ones[:axis], size[axis], *ones[axis + 1 :]])
    x1, x2 = parts.gn(gated), parts.conv3x3(fine)  # [b*F, d, h, w]

    maps = {n: _cross_spatial(x1, x2, b, n, groups) for n in {*config.candidates, groups}}
    mean = x.mean(image)  # [b, c]
    logits = parts.group_controller(mean) if parts.group_controller else mean.new_zeros(b, 1)
    choice = _choose(logits, noise, parts.temperature, config.batch_vote)  # [b, K]
    s = 0.0 if parts.warmup is None else parts.warmup.to(x.dtype)
    mixed = (1 - s) * maps[groups]
    for k, count in enumerate(config.candidates):
        mixed = mixed + s * choice[:, k].reshape(b, 1, *ones) * maps[count]
    spatial = torch.sigmoid(mixed)  # [b, F, h, w]

    y_f = (fine.unflatten(0, [b, groups]) * spatial.unsqueeze(2)).reshape(x.shape)
    w_c, gamma = x.new_zeros(b, c, *ones), parts.gamma
    if parts.channel_gate and gamma is not None:
        w_c = parts.channel_gate(x)
        y_f = y_f + gamma * (x * w_c)
    w_g = parts.global_attn(y_f) if parts.global_attn else x.new_ones(b, c, *ones)
    out = y_f * w_g
    if parts.residual_gate is not None:
        out = x + parts.residual_gate.reshape(1, c, *ones) * (out - x)
    probs = torch.softmax(logits, 1)
    # Made on the device: a copy from the host cannot be part of a CUDA graph.
    counts = torch.cat([torch.full((1,), count, device=x.device) for count in config.candidates])
    chosen = counts[probs.argmax(1)]
    return out, EMAXMaps(spatial, w_c.reshape(b, c), w_g.reshape(b, c), probs, chosen)


def _cross_spatial(x1: Tensor, x2: Tensor, b: int, count: int, groups: int) -> Tensor:
    """Compute softmax_c(mean(X1)) X2 + softmax_c(mean(X2)) X1; maps are repeated to F groups."""
    d, *size = x1.shape[1:]
    shape = b * count, groups // count * d, math.prod(size)  # [b*G, c/G, h*w]
    x1, x2 = x1.reshape(shape), x2.reshape(shape)
    weights1, weights2 = (torch.softmax(x.mean(2, keepdim=True), 1) for x in (x1, x2))
    m = (weights1 * x2).sum(1) + (weights2 * x1).sum(1)  # [b*G, h*w]
    return m.reshape(b, count, *size).repeat_interleave(groups // count, 1)


def _choose(logits: Tensor, noise: Tensor | None, tau: Tensor | None, batch_vote: bool) -> Tensor:
    """Compute p_hat [b, K]: one-hot rows that have the gradient of softmax((logits + g) / tau)."""
    y = logits if noise is None else logits + noise
    y = torch.softmax(y if tau is None else y / tau.to(y.dtype), 1)
    # torch's argmax returns the first of several maxima, here the smallest count.
    hard = F.one_hot(y.argmax(1), y.shape[1])
    if batch_vote:
        hard = F.one_hot(hard.sum(0).argmax(), y.shape[1]).expand_as(hard)
    return hard.to(y.dtype) + (y - y.detach())


def _convolve(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Correlate x [n, d, ...], padded with zeros, with a kernel [o, d, ...] of odd sizes."""
    size, kernel = x.shape[2:], weight.shape[2:]
    padded = F.pad(x, [k // 2 for k in reversed(kernel) for _ in range(2)])
    out = bias.reshape(-1, *[1] * len(size))
    for offset in itertools.product(*map(range, kernel)):
        window = padded[(..., *(slice(o, o + n) for o, n in zip(offset, size, strict=True)))]
        out = out + torch.einsum(
            "oi,ni...->no...", weight[(slice(None), slice(None), *offset)], window
        )
    return out


def _instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    image, shape = list(range(2, x.ndim)), [1, -1, *[1] * (x.ndim - 2)]
    deviation = x - x.mean(image, keepdim=True)
    normed = deviation / torch.sqrt(deviation.square().mean(image, keepdim=True) + eps)
    return normed * weight.reshape(shape) + bias.reshape(shape)


def _linear(weight: Tensor | None, bias: Tensor | None) -> Layer | None:
    return None if weight is None else lambda x: x @ weight.flatten(1).mT + present(bias)


def _squeeze_excite(*weights: Tensor | None) -> Layer | None:
    reduce, expand = _linear(*weights[:2]), _linear(*weights[2:])
    if not reduce or not expand:
        return None
    return lambda x: torch.sigmoid(expand(torch.relu(reduce(x.flatten(2).mean(2))))).reshape(
        *x.shape[:2], *[1] * (x.ndim - 2)
    )
