"""Loss and accuracy of a model; every image counts once, whatever the number of ranks."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import DistributedContext

__all__ = ["Metrics", "autocast", "evaluate", "half_precision", "improves"]


class Metrics(NamedTuple):
    """Means over the images: cross entropy, and top-1 and top-5 accuracy in per cent."""

    loss: float
    top1: float
    top5: float

    def __str__(self) -> str:
        return f"top1: {self.top1:.3f} top5: {self.top5:.3f}"


def improves(new: Metrics, best: Metrics | None, name: str) -> bool:
    """Return whether new metrics are better than the best ones by the metric `name`.

    Metrics with a value or a loss that is not finite are never better: an accuracy can be computed
    even from logits that are not finite.
    """
    value = getattr(new, name)
    finite = math.isfinite(value) and math.isfinite(new.loss)
    if best is None or not finite:
        return finite
    old = getattr(best, name)
    return value < old if name == "loss" else value > old


def autocast(context: DistributedContext, amp: bool, amp_dtype: str) -> AbstractContextManager:
    """Return torch.autocast if `amp` is on, else a context that does nothing."""
    if not amp:
        return nullcontext()
    return torch.autocast(context.device.type, dtype=getattr(torch, amp_dtype))


def half_precision(device: torch.device) -> str:
    """Return the dtype of mixed precision: bfloat16, which needs no scaling, else float16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "float16"
    return "bfloat16"


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    context: DistributedContext,
    amp: bool = False,
    amp_dtype: str = "float16",
    channels_last: bool = False,
) -> Metrics:
    """Evaluate `model` in eval mode; its mode is restored.

    Args:
        model: Maps [b, c, h, w] images to [b, classes] logits.
        batches: This rank's share of the images, with their labels [b].
        context: The distributed context, whose ranks share the images.
        amp, amp_dtype, channels_last: As in training.

    Returns:
        The metrics over the images of all ranks; with n < 5 classes, top5 is the top-n accuracy.
    """
    training = model.training
    model.eval()
    # Sums of the loss and of correct top-1 and top-5 predictions, and the number of images.
    totals = torch.zeros(4, dtype=torch.float64, device=context.device)
    for images, labels in batches:
        images, labels = images.to(context.device), labels.to(context.device)
        if channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(context, amp, amp_dtype):
            logits = model(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # [b, 5]
        right = best == labels.unsqueeze(1)
        totals += torch.stack(
            [
                F.cross_entropy(logits, labels, reduction="sum").double(),
                right[:, 0].sum().double(),
                right.sum().double(),
                torch.tensor(len(labels), dtype=torch.float64, device=context.device),
            ]
        )
    model.train(training)
    loss, top1, top5, count = context.sum(totals).tolist()
    return Metrics(loss / count, 100 * top1 / count, 100 * top5 / count)
