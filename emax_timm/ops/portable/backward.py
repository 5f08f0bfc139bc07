"""The backward pass of a layer; those of images are written out, as `docs/emax.md` derives them."""

import torch
from torch import Tensor

from ..weights import TENSORS, EMAXWeights, detached, present
from .fine_maps import FineMaps, weigh_channels
from .fine_maps_backward import FineGrads, fine_maps_backward
from .forward import Attended, attend_again, emax_plain, prepare
from .grouping import mix_groups, score_groups

__all__ = ["backward", "plain_gradients"]


def backward(
    grad: Tensor,
    x: Tensor,
    weights: EMAXWeights,
    noise: Tensor | None,
    saved: list[Tensor],
    mask: Tensor | None,
) -> dict[str, Tensor]:
    """Run the backward pass: the gradients of x and of the weights, by name.

    Args:
        grad: The gradient of the output, [b, c, ...].
        x: The input, [b, c, ...].
        weights: The constants and tensors of the layer.
        noise: The noise of the forward pass, [b, K], or None.
        saved: The tensors that `forward` saved.
        mask: Where sequences have tokens, [b, l], or None.
    """
    if x.ndim != 4:
        return plain_gradients(grad, x, weights, noise, mask)
    grouped, weights = prepare(x, detached(weights))
    grad = grad.to(grouped.dtype).unflatten(1, grouped.shape[1:3])
    fine = FineMaps(*saved[:6])
    pooled = saved[6] if len(saved) > 6 else fine.mean
    if torch.compiler.is_compiling():
        ready = grad[:1, :1, :1].sum((3, 4), keepdim=True) == 0  # of one channel
        grouped = _when(ready, grouped)
        first, second = _when(ready[0], fine.first), _when(ready[0], fine.second)
        fine = fine._replace(first=first, second=second)
    return _backward(grouped, grad, weights, noise, fine, pooled)


def plain_gradients(
    grad: Tensor,
    x: Tensor,
    weights: EMAXWeights,
    noise: Tensor | None,
    mask: Tensor | None,
    create_graph: bool = False,
) -> dict[str, Tensor]:
    """Compute the gradients by autograd, which follows a forward pass of its own.

    Sequences and videos have no other backward pass; it is also that of gradients that are to be
    differentiated again (`create_graph`).

    Returns:
        The gradients, by name, of those of x and the weights that require one.
    """
    everything = {"x": x, **{name: getattr(weights, name) for name in TENSORS}}
    inputs = {name: t for name, t in everything.items() if t is not None and t.requires_grad}
    with torch.enable_grad():
        out = emax_plain(x, weights, noise, mask)
    grads = torch.autograd.grad(out, list(inputs.values()), grad, create_graph=create_graph)
    return dict(zip(inputs, grads, strict=True))


def _when(ready: Tensor, x: Tensor) -> Tensor:
    """Return x, whatever `ready` holds, but make it depend on `ready`.

    `ready` follows from the gradient of the output. Without it torch.compile would compute in the
    forward pass what follows from saved tensors alone, if it occurs there or costs a matrix
    product, and keep it for the backward pass: a third of the size of x at 14 x 14.
    """
    return torch.where(ready, x, x)


def _backward(
    x: Tensor,
    grad: Tensor,
    weights: EMAXWeights,
    noise: Tensor | None,
    fine: FineMaps,
    pooled: Tensor,
) -> dict[str, Tensor]:
    """Compute the gradients by name, from x and that of the output, [b, F, d, h, w] each."""
    pixels = x.shape[3] * x.shape[4]
    # Small values are computed again.
    attended = attend_again(fine, pooled, weights, noise)
    spatial = attended.spatial

    # out = x * (scale * S + offset)
    product = x * grad
    with_map = torch.matmul(product.flatten(3), spatial.flatten(2).unsqueeze(-1)).squeeze(-1)
    grad_scale, grad_offset = with_map.flatten(1), product.sum((3, 4)).flatten(1)  # [b, c]
    grad_spatial = _weigh(product, attended.gates.scale.view_as(fine.mean))  # [b, F, h, w]
    grad_mean, grad_pooled, grads = _gates_backward(grad_scale, grad_offset, attended, weights)

    grad_pooled = grad_pooled.view_as(fine.mean) / pixels
    grad_spatial = grad_spatial + _weigh(x, grad_pooled)
    grad_map = grad_spatial * spatial * (1 - spatial)

    grad_first = grad_second = grad_map
    grad_score = torch.zeros_like(fine.mean[:, :, 0])
    if weights.warmup is not None and weights.config.candidates != [weights.config.groups]:
        grad_first, grad_second, grad_score, grad_choice = _mixing_backward(
            grad_map, attended, weights
        )
        if weights.controller_weight is not None:
            soft = attended.groups.soft
            grad_logits = soft * (grad_choice - (soft * grad_choice).sum(1, keepdim=True))
            grad_logits = grad_logits / present(weights.temperature)
            grads["controller_weight"] = torch.matmul(grad_logits.mT, fine.mean.flatten(1))
            grads["controller_bias"] = grad_logits.sum(0)
            grad_mean = grad_mean + torch.matmul(grad_logits, weights.controller_weight)

    meeting = FineGrads(
        grad_first, grad_second, grad_score, grad_mean.view_as(fine.mean), grad_pooled
    )
    return grads | fine_maps_backward(x, grad, weights, attended, meeting)


def _weigh(x: Tensor, weights: Tensor) -> Tensor:
    """Sum x [b, F, d, h, w] times weights [b, F, d] over d: [b, F, h, w]."""
    return weigh_channels(x, weights.unsqueeze(2)).squeeze(2)


def _mixing_backward(
    grad: Tensor, attended: Attended, weights: EMAXWeights
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of the fine maps, the scores and the choice from that of the mixed map.

    Args:
        grad: The gradient of the mixed map before its sigmoid, [b, F, h, w].
        attended: The results of the forward pass.
        weights: The tensors of the layer, in the dtype of `grad`.

    Returns:
        The gradients of both fine maps, [b, F, h, w] each, the scores, [b, F], and the choice,
        [b, K].
    """
    fine, choice = attended.fine, attended.groups.choice
    warmup = present(weights.warmup).to(grad.dtype)
    mixing = mix_groups(score_groups(fine), choice, weights.config, warmup)
    flat = grad.flatten(2)
    grad_first = torch.matmul(mixing.first.mT, flat).view_as(grad)
    grad_second = torch.matmul(mixing.second.mT, flat).view_as(grad)
    # The gradients of the two matrices, [b, F, F] and, for broadcasting over K, [b, 1, F, F].
    to_first = torch.matmul(flat, fine.first.flatten(2).mT)
    to_second = torch.matmul(flat, fine.second.flatten(2).mT).unsqueeze(1)
    weighted = mixing.weighted * to_second
    grad_choice = torch.matmul(to_first.flatten(1), mixing.equal.flatten(1).mT)
    grad_choice = warmup * (grad_choice + weighted.sum((2, 3)))
    # Each row of the matrix of a candidate is a softmax of the scores.
    grad_score = weighted - mixing.weighted * weighted.sum(3, keepdim=True)
    grad_score = torch.matmul((warmup * choice).unsqueeze(1), grad_score.sum(2)).squeeze(1)
    return grad_first, grad_second, grad_score, grad_choice


def _gates_backward(
    grad_scale: Tensor, grad_offset: Tensor, attended: Attended, weights: EMAXWeights
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Compute the gradients of the inputs and parameters of the gates.

    Args:
        grad_scale: The gradient of `Gates.scale`, [b, c].
        grad_offset: The gradient of `Gates.offset`, [b, c].
        attended: The results of the forward pass.
        weights: The tensors of the layer, in the dtype of `grad_scale`.

    Returns:
        The gradients of the means of x and of x * S, [b, c] each, and of the parameters, by name.
    """
    gates, mean = attended.gates, attended.fine.mean.flatten(1)
    grads: dict[str, Tensor] = {}
    grad_mean = grad_fused = torch.zeros_like(mean)
    # offset = 1 - alpha + scale * branch, with branch = gamma * w_c; scale = alpha * w_g
    branch = torch.zeros_like(mean)
    if weights.gamma is not None:
        branch = weights.gamma * gates.channel
    grad_scale = grad_scale + grad_offset * branch
    grad_global = grad_scale
    if weights.residual_gate is not None:
        grad_global = grad_scale * weights.residual_gate
        grads["residual_gate"] = (grad_scale * gates.global_ - grad_offset).sum(0)
    if weights.global_reduce_weight is not None:
        grad_fused, of_gate = _squeeze_excite_backward(
            grad_global,
            gates.fused,
            gates.global_,
            gates.global_hidden,
            weights.global_reduce_weight,
            present(weights.global_expand_weight),
        )
        grads |= {f"global_{name}": value for name, value in of_gate.items()}
    if weights.gamma is not None:
        # fused = pooled + branch * mean
        grad_branch = grad_offset * gates.scale + grad_fused * mean
        grads["gamma"] = (grad_branch * gates.channel).sum()
        grad_mean, of_gate = _squeeze_excite_backward(
            grad_branch * weights.gamma,
            mean,
            gates.channel,
            gates.channel_hidden,
            present(weights.channel_reduce_weight),
            present(weights.channel_expand_weight),
        )
        grads |= {f"channel_{name}": value for name, value in of_gate.items()}
        grad_mean = grad_mean + grad_fused * branch
    return grad_mean, grad_fused, grads


def _squeeze_excite_backward(
    grad: Tensor,
    mean: Tensor,
    gate: Tensor,
    hidden: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the gradients of the means [b, c] and of the weights from that of the gate [b, c]."""
    grad = grad * gate * (1 - gate)  # [b, c]
    grad_hidden = torch.matmul(grad, expand_weight.flatten(1)) * (hidden > 0)  # [b, r]
    grads = {
        "reduce_weight": torch.matmul(grad_hidden.mT, mean),
        "reduce_bias": grad_hidden.sum(0),
        "expand_weight": torch.matmul(grad.mT, hidden),
        "expand_bias": grad.sum(0),
    }
    return torch.matmul(grad_hidden, reduce_weight.flatten(1)), grads
