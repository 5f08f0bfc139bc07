"""EMAX and EMA straight from their formulas: slow, plain, and the yardstick for the fast module.

Nothing here is shared with the fast implementation, and no algebraic shortcut is taken: every
candidate group count is regrouped and evaluated on its own, every full-size intermediate is formed.
Tests compare values and gradients against this file, benchmarks compare time and memory.

Dimension letters, in the shape comments and docstrings:

    b  batch size
    c  channels
    h  height
    w  width
    F  the finest group count, gcd(c, factor)
    d  channels per finest group, c / F
    G  a group count that divides F; its groups hold F / G finest groups, c / G channels each
    K  number of candidate group counts
    r  squeezed channels of a gate, max(1, c // reduction)
"""

import torch
from torch import Tensor, nn

__all__ = ["NaiveEMAX", "naive_ema"]


class NaiveEMAX(nn.Module):
    """EMAX attention for maps [b, c, h, w], one statement per formula.

    State dicts are interchangeable with those of the fast module. The Gumbel noise is an argument
    of the call, so training and evaluation compute the same function and draw no random number.

    Attributes:
        channels: c.
        finest: F.
        width: d.
        candidates: the K candidate group counts, ascending.
        batch_vote: whether the whole batch takes its most frequent choice of group count.
        conv1x1: d to d channels, weight [d, d, 1, 1], bias [d].
        conv3x3: d to d channels, weight [d, d, 3, 3], bias [d].
        gn: scale and shift of the instance norm, weight [d], bias [d].
        channel_gate: squeeze-excite c to r to c, or None.
        gamma: weight of the channel branch, [1], or None without `channel_gate`.
        global_attn: squeeze-excite c to r to c, or None.
        group_controller: linear c to K, weight [K, c], bias [K], or None when K = 1.
        residual_gate: alpha, [c].
        warmup: s, float32 buffer without dimensions; 0 is the grouping of plain EMA.
        temperature: tau, float32 buffer without dimensions.
    """

    warmup: Tensor
    temperature: Tensor

    def __init__(
        self,
        channels: int,
        factor: int = 32,
        reduction: int = 16,
        group_counts: list[int] | tuple[int, ...] | str | None = None,
        batch_vote: bool = False,
        channel_gate: bool = True,
        global_gate: bool = True,
        gate_init: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Builds the parts and initialises them.

        Args:
            channels: c, at least 1.
            factor: the finest group count wanted, at least 1; F is its gcd with c.
            reduction: how far the two gates squeeze the channels, at least 1.
            group_counts: the candidates. None takes every divisor of F, "finest" takes F alone, a
                list is taken without the counts that do not divide F.
            batch_vote: gives every sample the most frequent choice of its batch.
            channel_gate: whether there is a channel branch; without it Y_f = Y_s.
            global_gate: whether there is global attention; without it w_g = 1.
            gate_init: what alpha starts from: 1 is the source's formula, 0 the identity.
            device: where parameters and buffers live.
            dtype: of the parameters; the two buffers are float32 in any case.

        Raises:
            ValueError: if a size or a group count is below 1, if `group_counts` is another string
                than "finest", or if none of the counts divides F.
        """
        super().__init__()
        for name, size in (("channels", channels), ("factor", factor), ("reduction", reduction)):
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        self.channels = channels
        self.finest = max(
            n for n in range(1, channels + 1) if channels % n == 0 and factor % n == 0
        )
        self.width = channels // self.finest
        self.candidates = _candidates(self.finest, group_counts)
        self.batch_vote = batch_vote
        self.gate_init = gate_init

        c, d, k = self.channels, self.width, len(self.candidates)
        self.conv1x1 = nn.Conv2d(d, d, 1, device=device, dtype=dtype)
        self.conv3x3 = nn.Conv2d(d, d, 3, padding=1, device=device, dtype=dtype)
        # Holds the two parameters only: torch's forward refuses a batch with one value per channel.
        self.gn = nn.GroupNorm(d, d, eps=1e-5, device=device, dtype=dtype)
        self.channel_gate: nn.Sequential | None = None
        self.gamma: nn.Parameter | None = None
        if channel_gate:
            self.channel_gate = _squeeze_excite(c, reduction, device, dtype)
            self.gamma = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.global_attn: nn.Sequential | None = None
        if global_gate:
            self.global_attn = _squeeze_excite(c, reduction, device, dtype)
        self.group_controller: nn.Linear | None = None
        if k > 1:
            self.group_controller = nn.Linear(c, k, device=device, dtype=dtype)
        self.residual_gate = nn.Parameter(torch.empty(c, device=device, dtype=dtype))
        self.register_buffer("warmup", torch.ones((), device=device, dtype=torch.float32))
        self.register_buffer("temperature", torch.ones((), device=device, dtype=torch.float32))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws the initial parameters; the warm-up and the temperature stay as they are.

        Convolutions, linears and the norm start from torch's defaults, except that the last bias of
        `global_attn` and the bias of `conv3x3` are 2 (both sigmoids start at 0.88). The controller
        starts at weight 0 and bias 0 but 1 for F, gamma at 0, alpha at `gate_init`.
        """
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.GroupNorm):
                part.reset_parameters()
        for name, parameter in self.named_parameters():
            if name in ("conv3x3.bias", "global_attn.3.bias"):
                parameter.fill_(2.0)
        if self.group_controller is not None:
            self.group_controller.weight.zero_()
            self.group_controller.bias.zero_()
            if self.finest in self.candidates:
                self.group_controller.bias[self.candidates.index(self.finest)] = 1.0
        if self.gamma is not None:
            self.gamma.zero_()
        self.residual_gate.fill_(self.gate_init)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Applies the attention.

        Args:
            x: [b, c, h, w], in the dtype of the parameters.
            noise: the Gumbel noise g, [b, K]; None is zeros, in training as well.

        Returns:
            out = X + alpha * (EMAX(X) - X), [b, c, h, w].

        Raises:
            ValueError: if x or the noise has another shape.
        """
        return self._apply_formulas(x, noise)[0]

    def attention(self, x: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
        """Computes the attention maps and the choice of grouping.

        Args:
            x: [b, c, h, w], in the dtype of the parameters.
            noise: the Gumbel noise g, [b, K]; None is zeros, in training as well.

        Returns:
            A dict of

            spatial: S, [b, F, h, w].
            channel: w_c, [b, c]; 0 without a channel gate.
            global_: w_g, [b, c]; 1 without a global gate.
            group_probs: softmax(logits), free of noise and temperature, [b, K].
            group_count: each sample's most probable candidate by `group_probs`, [b], int64; neither
                warm-up nor batch vote changes it.

        Raises:
            ValueError: if x or the noise has another shape.
        """
        return self._apply_formulas(x, noise)[1]

    def _apply_formulas(self, x: Tensor, noise: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Evaluates all formulas in order.

        Args:
            x: [b, c, h, w].
            noise: [b, K] or None.

        Returns:
            The output [b, c, h, w] and the dict that `attention` describes.

        Raises:
            ValueError: if x or the noise has another shape.
        """
        if x.ndim != 4 or x.shape[1] != self.channels:
            raise ValueError(f"x must be [b, {self.channels}, h, w], got {list(x.shape)}")
        b, c, h, w = x.shape
        f, d = self.finest, self.width

        x1, x2 = self._fine_features(x)  # [b*F, d, h, w] each
        maps = {n: self._cross_spatial(x1, x2, n) for n in {*self.candidates, f}}  # [b, F, h, w]

        logits = self._logits(x)  # [b, K]
        p_hat = self._choose(logits, noise)  # [b, K]
        s = self.warmup.to(x.dtype)
        # p's two terms stay apart, since onehot(F) has no place in p when F is no candidate.
        chosen = torch.zeros_like(maps[f])  # [b, F, h, w]
        for k, n in enumerate(self.candidates):
            chosen = chosen + p_hat[:, k].reshape(b, 1, 1, 1) * maps[n]
        m = (1 - s) * maps[f] + s * chosen  # [b, F, h, w]
        spatial = torch.sigmoid(m)

        x_grouped = x.reshape(b, f, d, h, w)  # [b, F, d, h, w]
        y_s = (x_grouped * spatial.reshape(b, f, 1, h, w)).reshape(b, c, h, w)  # [b, c, h, w]

        w_c = x.new_zeros(b, c, 1, 1)
        y_f = y_s
        if self.channel_gate is not None and self.gamma is not None:
            w_c = self.channel_gate(x)  # [b, c, 1, 1]
            y_f = y_s + self.gamma * (x * w_c)  # [b, c, h, w]

        w_g = x.new_ones(b, c, 1, 1)
        if self.global_attn is not None:
            w_g = self.global_attn(y_f)  # [b, c, 1, 1]
        emax = y_f * w_g  # [b, c, h, w]

        alpha = self.residual_gate.reshape(1, c, 1, 1)
        out = x + alpha * (emax - x)  # [b, c, h, w]

        group_probs = torch.softmax(logits, dim=1)  # [b, K]
        counts = torch.tensor(self.candidates, dtype=torch.int64, device=x.device)  # [K]
        return out, {
            "spatial": spatial,
            "channel": w_c.reshape(b, c),
            "global_": w_g.reshape(b, c),
            "group_probs": group_probs,
            "group_count": counts[group_probs.argmax(dim=1)],  # [b]
        }

    def _fine_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Computes the features of the two branches at the finest grouping.

        Args:
            x: [b, c, h, w].

        Returns:
            X1, the normed strip-gated features, and X2, the 3x3 features, [b*F, d, h, w] each.
        """
        b, _, h, w = x.shape
        x_f = x.reshape(b * self.finest, self.width, h, w)  # [b*F, d, h, w]

        mean_w = x_f.mean(dim=3, keepdim=True)  # [b*F, d, h, 1]
        mean_h = x_f.mean(dim=2, keepdim=True).transpose(2, 3)  # [b*F, d, w, 1]
        strips = torch.sigmoid(self.conv1x1(torch.cat([mean_w, mean_h], dim=2)))  # [b*F, d, h+w, 1]
        sh, sw = strips.split([h, w], dim=2)  # [b*F, d, h, 1], [b*F, d, w, 1]
        u = x_f * sh * sw.transpose(2, 3)  # [b*F, d, h, w]

        mean = u.mean(dim=(2, 3), keepdim=True)  # [b*F, d, 1, 1]
        variance = ((u - mean) ** 2).mean(dim=(2, 3), keepdim=True)  # [b*F, d, 1, 1]
        scale = self.gn.weight.reshape(1, self.width, 1, 1)
        shift = self.gn.bias.reshape(1, self.width, 1, 1)
        x1 = (u - mean) / torch.sqrt(variance + self.gn.eps) * scale + shift  # [b*F, d, h, w]

        x2 = self.conv3x3(x_f)  # [b*F, d, h, w]
        return x1, x2

    def _cross_spatial(self, x1: Tensor, x2: Tensor, groups: int) -> Tensor:
        """Computes m_G = softmax_c(mean_hw(X1)) X2 + softmax_c(mean_hw(X2)) X1.

        Args:
            x1: [b*F, d, h, w].
            x2: [b*F, d, h, w].
            groups: G, a divisor of F.

        Returns:
            m_G with each of its G maps repeated for the F / G finest groups in it, [b, F, h, w].
        """
        bf, d, h, w = x1.shape
        repeats = self.finest // groups
        b = bf // self.finest
        x1 = x1.reshape(b * groups, repeats * d, h * w)  # [b*G, c/G, h*w]
        x2 = x2.reshape(b * groups, repeats * d, h * w)  # [b*G, c/G, h*w]
        weights1 = torch.softmax(x1.mean(dim=2), dim=1).unsqueeze(1)  # [b*G, 1, c/G]
        weights2 = torch.softmax(x2.mean(dim=2), dim=1).unsqueeze(1)  # [b*G, 1, c/G]
        m = torch.matmul(weights1, x2) + torch.matmul(weights2, x1)  # [b*G, 1, h*w]
        m = m.reshape(b, groups, h, w)  # [b, G, h, w]
        return m.repeat_interleave(repeats, dim=1)  # [b, F, h, w]

    def _logits(self, x: Tensor) -> Tensor:
        """Rates the candidates.

        Args:
            x: [b, c, h, w].

        Returns:
            group_controller(mean_hw(X)), [b, K]; zeros when K = 1, whose softmax is 1.
        """
        if self.group_controller is None:
            return x.new_zeros(x.shape[0], 1)
        return self.group_controller(x.mean(dim=(2, 3)))

    def _choose(self, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Chooses a candidate for every sample, with the straight-through gradient.

        Args:
            logits: [b, K].
            noise: g, [b, K]; None is zeros.

        Returns:
            p_hat, [b, K]: the value of a one-hot row, the gradient of softmax((logits + g) / tau).

        Raises:
            ValueError: if the noise is not [b, K].
        """
        b, k = logits.shape
        g = torch.zeros_like(logits) if noise is None else noise
        if g.shape != logits.shape:
            raise ValueError(f"noise must be [{b}, {k}], got {list(g.shape)}")
        tau = self.temperature.to(logits.dtype)
        y = torch.softmax((logits + g) / tau, dim=1)  # [b, K]
        # torch's argmax returns the first of several maxima, here the smallest count.
        onehot = nn.functional.one_hot(y.argmax(dim=1), k)  # [b, K]
        if self.batch_vote:
            winner = onehot.sum(dim=0).argmax()  # []
            onehot = nn.functional.one_hot(winner, k).expand(b, k)  # [b, K]
        return onehot.to(y.dtype) + (y - y.detach())


def naive_ema(
    x: Tensor,
    groups: int,
    conv1x1_weight: Tensor,
    conv1x1_bias: Tensor,
    conv3x3_weight: Tensor,
    conv3x3_bias: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    eps: float = 1e-5,
) -> Tensor:
    """Computes EMA attention as published at ICASSP 2023: X * sigmoid(m), with fixed groups.

    Args:
        x: [b, c, h, w].
        groups: G, a divisor of c; each group has c / G channels.
        conv1x1_weight: [c/G, c/G, 1, 1].
        conv1x1_bias: [c/G].
        conv3x3_weight: [c/G, c/G, 3, 3].
        conv3x3_bias: [c/G].
        gn_weight: [c/G].
        gn_bias: [c/G].
        eps: added to the variance in the norm.

    Returns:
        The reweighted input, [b, c, h, w].

    Raises:
        ValueError: if `groups` does not divide c; from torch, in the norm, if b*G*h*w = 1.
    """
    fn = nn.functional
    b, c, h, w = x.shape
    if groups < 1 or c % groups != 0:
        raise ValueError(f"groups must be a divisor of the {c} channels, got {groups}")
    n = c // groups
    blocks = x.reshape(b * groups, n, h, w)  # [b*G, c/G, h, w]

    along_h = fn.adaptive_avg_pool2d(blocks, (h, 1))  # [b*G, c/G, h, 1]
    along_w = fn.adaptive_avg_pool2d(blocks, (1, w))  # [b*G, c/G, 1, w]
    profile = torch.cat((along_h, along_w.permute(0, 1, 3, 2)), dim=2)  # [b*G, c/G, h+w, 1]
    profile = fn.conv2d(profile, conv1x1_weight, conv1x1_bias)  # [b*G, c/G, h+w, 1]
    gate_h = profile[:, :, :h].sigmoid()  # [b*G, c/G, h, 1]
    gate_w = profile[:, :, h:].permute(0, 1, 3, 2).sigmoid()  # [b*G, c/G, 1, w]
    gated = blocks * gate_h * gate_w  # [b*G, c/G, h, w]
    branch1 = fn.group_norm(gated, n, gn_weight, gn_bias, eps)  # [b*G, c/G, h, w]
    branch3 = fn.conv2d(blocks, conv3x3_weight, conv3x3_bias, padding=1)  # [b*G, c/G, h, w]

    query1 = fn.softmax(fn.adaptive_avg_pool2d(branch1, 1).flatten(1), dim=-1)  # [b*G, c/G]
    query3 = fn.softmax(fn.adaptive_avg_pool2d(branch3, 1).flatten(1), dim=-1)  # [b*G, c/G]
    cross13 = torch.matmul(query1[:, None, :], branch3.flatten(2))  # [b*G, 1, h*w]
    cross31 = torch.matmul(query3[:, None, :], branch1.flatten(2))  # [b*G, 1, h*w]
    gate = (cross13 + cross31).reshape(b * groups, 1, h, w).sigmoid()  # [b*G, 1, h, w]
    return (blocks * gate).reshape(b, c, h, w)  # [b, c, h, w]


def _candidates(finest: int, group_counts: list[int] | tuple[int, ...] | str | None) -> list[int]:
    """Lists the candidate group counts of a layer.

    Args:
        finest: F.
        group_counts: None, "finest", or counts; see `NaiveEMAX`.

    Returns:
        K different divisors of F, ascending.

    Raises:
        ValueError: if a count is below 1, the string is another one, or no count divides F.
    """
    divisors = [n for n in range(1, finest + 1) if finest % n == 0]
    if group_counts is None:
        return divisors
    if group_counts == "finest":
        return [finest]
    if isinstance(group_counts, str):
        raise ValueError(f'group_counts must be None, "finest" or a list, got "{group_counts}"')
    if any(n < 1 for n in group_counts):
        raise ValueError(f"group_counts must be at least 1, got {list(group_counts)}")
    kept = [n for n in divisors if n in group_counts]
    if not kept:
        raise ValueError(
            f"group_counts must contain a divisor of {finest}, that is, one of {divisors}; "
            f"got {list(group_counts)}"
        )
    return kept


def _squeeze_excite(
    channels: int,
    reduction: int,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> nn.Sequential:
    """Builds a gate that maps [b, c, h, w] to [b, c, 1, 1] in (0, 1).

    Args:
        channels: c.
        reduction: the gate squeezes to r = max(1, c // reduction) channels.
        device: where the parameters live.
        dtype: of the parameters.

    Returns:
        Mean over h and w, c to r, ReLU, r to c, sigmoid.
    """
    r = max(1, channels // reduction)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),  # [b, c, 1, 1]
        nn.Conv2d(channels, r, 1, device=device, dtype=dtype),  # [b, r, 1, 1]
        nn.ReLU(),
        nn.Conv2d(r, channels, 1, device=device, dtype=dtype),  # [b, c, 1, 1]
        nn.Sigmoid(),
    )
