"""What a model costs: multiply-accumulates, and the activations that training keeps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..ops import use_backend

__all__ = ["BATCH", "Cost", "activation_bytes", "count_macs", "estimated_cost"]

# Batch of the count of activations: what does not grow with the batch is spread over this many.
BATCH = 64


class Cost(NamedTuple):
    """The cost of one image."""

    macs: int
    """Multiply-accumulates in evaluation."""
    activation_bytes: float
    """What autograd keeps for the backward pass in float32."""


def estimated_cost(model: nn.Module, input_size: Sequence[int]) -> Cost:
    """Estimate the cost from the shapes of tensors that hold no data; nothing is computed.

    Args:
        model: On the meta device; it is left with fake tensors, in training mode.
        input_size: Channels, height and width.

    Raises:
        RuntimeError: If the model does not take such images, or looks at values.
    """
    macs = count_macs(model, torch.zeros(1, *input_size, device="meta"))
    # On the meta device self-attention is not fused, and would keep more than in training.
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        return Cost(macs, activation_bytes(model, torch.zeros(BATCH, *input_size)) / BATCH)


def count_macs(model: nn.Module, x: Tensor) -> int:
    """Count multiply-accumulates for images x [b, c, h, w]; leaves the model in evaluation mode."""
    counter = FlopCounterMode(display=False)
    # Fused self-attention on the CPU and our backends are unknown to the counter.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), use_backend("portable"), counter:
        model.eval()(x)
    return counter.get_total_flops() // 2


def activation_bytes(model: nn.Module, x: Tensor) -> int:
    """Count the bytes that autograd keeps after the forward pass of the images x [b, c, h, w].

    Each storage counts once and as a whole; those of parameters and buffers do not. Leaves the
    model in training mode.
    """
    own = [tensor.untyped_storage() for tensor in [*model.parameters(), *model.buffers()]]
    kept: list[torch.UntypedStorage] = []  # alive, so that no id is used twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage())
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.train()(x)
    sizes = {id(storage): storage.nbytes() for storage in kept}
    return sum(sizes[key] for key in sizes.keys() - set(map(id, own)))
