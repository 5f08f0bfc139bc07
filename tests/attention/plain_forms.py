"""Every attention of the factory in plain sums and products, and the gate around them."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emax_timm.attention import GatedAttention
from emax_timm.ops import reference
from emax_timm.ops.dispatch import draw_noise

State = dict[str, Tensor]


def by_formulas(module: Any) -> Callable[[Tensor], Tensor]:
    """EMA and EMAX by the reference, with the weights of `module`; it draws noise as they do."""

    def call(x: Tensor) -> Tensor:
        weights = module.weights()
        noise = draw_noise(x, weights.config.candidates, module.training)
        return reference.emax(x, reference.parts_of(weights), noise)[0]

    return call


def _norm(x: Tensor, state: State, prefix: str, training: bool) -> Tensor:
    """Batch norm of [b, c, h, w]."""
    mean, variance = state[f"{prefix}.running_mean"], state[f"{prefix}.running_var"]
    if training:
        mean = x.mean((0, 2, 3))
        variance = (x - mean[:, None, None]).square().mean((0, 2, 3))
    scaled = (x - mean[:, None, None]) / (variance[:, None, None] + 1e-5).sqrt()
    weight, bias = state[f"{prefix}.weight"], state[f"{prefix}.bias"]
    return scaled * weight[:, None, None] + bias[:, None, None]


def _mix(x: Tensor, weight: Tensor) -> Tensor:
    """A 1x1 convolution without bias of [b, c, ...]."""
    return torch.einsum("oi,bi...->bo...", weight[:, :, 0, 0], x)


def _se(x: Tensor, state: State, training: bool) -> Tensor:
    """Section 3 of arXiv 1709.01507."""
    squeezed = _mix(x.mean((2, 3)), state["fc1.weight"]) + state["fc1.bias"]
    excited = _mix(squeezed.clamp(min=0), state["fc2.weight"]) + state["fc2.bias"]
    return x / (1 + (-excited).exp())[:, :, None, None]


def _eca(x: Tensor, state: State, training: bool) -> Tensor:
    """Section 3 of arXiv 1910.03151: a channel's gate comes from its neighbours' means."""
    kernel = state["conv.weight"].flatten()
    channels = x.shape[1]
    means = F.pad(x.mean((2, 3)), [len(kernel) // 2] * 2)
    scores = sum(value * means[:, i : i + channels] for i, value in enumerate(kernel))
    assert isinstance(scores, Tensor)
    return x / (1 + (-scores).exp())[:, :, None, None]


def _cbam(x: Tensor, state: State, training: bool) -> Tensor:
    """Section 3 of arXiv 1807.06521: channels, then places, each from means and maxima."""

    def shared(pooled: Tensor) -> Tensor:
        hidden = _mix(pooled, state["channel.fc1.weight"]).clamp(min=0)
        return _mix(hidden, state["channel.fc2.weight"])

    scores = shared(x.mean((2, 3))) + shared(x.flatten(2).max(2).values)
    x = x / (1 + (-scores).exp())[:, :, None, None]
    pooled = torch.stack([x.mean(1), x.max(1).values], dim=1)
    kernel = state["spatial.conv.conv.weight"]
    assert kernel.shape == (1, 2, 7, 7)
    columns = F.unfold(pooled, 7, padding=3)  # [b, 2 * 49, h * w]
    scores = torch.einsum("k,bkn->bn", kernel.flatten(), columns).view_as(x[:, :1])
    return x / (1 + (-_norm(scores, state, "spatial.conv.bn", training)).exp())


def _coord(x: Tensor, state: State, training: bool) -> Tensor:
    """Section 3 of arXiv 2103.02907, without biases: the norm follows the shared convolution."""
    h = x.shape[2]
    profile = torch.cat([x.mean(3), x.mean(2)], dim=2).unsqueeze(3)  # [b, c, h + w, 1]
    hidden = _norm(_mix(profile, state["conv1.weight"]), state, "bn1", training).squeeze(3)
    hidden = hidden * (hidden + 3).clamp(0, 6) / 6
    along_h = _mix(hidden[:, :, :h], state["conv_h.weight"])
    along_w = _mix(hidden[:, :, h:], state["conv_w.weight"])
    gate_h, gate_w = 1 / (1 + (-along_h).exp()), 1 / (1 + (-along_w).exp())
    return x * gate_h[:, :, :, None] * gate_w[:, :, None, :]


def _msa(x: Tensor, state: State, training: bool) -> Tensor:
    """Attention of every pixel over all, in heads of 32 channels where these divide."""
    channels, size = x.shape[1], (min(x.shape[2], 14), min(x.shape[3], 14))
    heads = max(n for n in range(1, 301) if channels % n == 0 and n <= max(1, channels // 32))
    pixels = F.adaptive_avg_pool2d(x, size).flatten(2)
    qkv = _mix(pixels, state["attention.qkv.weight"]) + state["attention.qkv.bias"][:, None]
    query, key, value = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    scores = torch.einsum("bgdq,bgdk->bgqk", query, key) / math.sqrt(channels // heads)
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    seen = torch.einsum("bgqk,bgdk->bgdq", weights, value).flatten(1, 2)
    out = _mix(seen, state["attention.proj.weight"]) + state["attention.proj.bias"][:, None]
    out = out.unflatten(2, size)
    return x + F.interpolate(out, x.shape[2:], mode="bilinear", align_corners=False)


_PLAIN: dict[str, Callable[[Tensor, State, bool], Tensor]] = {
    "cbam": _cbam,
    "se": _se,
    "eca": _eca,
    "coord": _coord,
    "msa": _msa,
}


def plain(name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """The plain form of an attention, with the parameters, statistics and mode of `module`."""
    if isinstance(module, GatedAttention):
        inner, gate = plain(name, module.attention), module.residual_gate[:, None, None]
        return lambda x: (1 - gate) * x + gate * inner(x)
    if name in ("ema", "emax"):
        return by_formulas(module)
    state = dict(module.named_parameters()) | dict(module.named_buffers())
    return lambda x: _PLAIN[name](x, state, module.training)
