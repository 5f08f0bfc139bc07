"""Measures of how well a heatmap explains a classifier: pointing game, insertion and deletion.

Dimension letters: n images, c channels, h w height and width.
"""

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

__all__ = ["area_under", "insertion_deletion", "pointing_game"]


def pointing_game(heat: Tensor, masks: Tensor) -> Tensor:
    """Play the pointing game: is the maximum of each heatmap on the object?

    It follows arXiv 1608.00507, without the margin.

    Args:
        heat: The heatmaps, [n, h, w].
        masks: True on the object, [n, h, w].

    Returns:
        [n]: 1 for a hit and 0 for a miss. Of several equal maxima it is the share that hits, so
        that a constant map scores as chance does.
    """
    heat, masks = heat.flatten(1), masks.flatten(1)
    best = heat == heat.amax(1, keepdim=True)
    return (best & masks).sum(1) / best.sum(1)


@torch.inference_mode()
def insertion_deletion(
    model: nn.Module, images: Tensor, heat: Tensor, classes: Tensor, steps: int = 16
) -> tuple[Tensor, Tensor]:
    """Measure a class's probability as pixels are inserted or deleted (arXiv 1806.07421).

    Insertion starts from the blurred image and restores its pixels; deletion starts from the image
    and sets its pixels to 0, the mean of normalised images. The hottest pixels come first, and ties
    are broken at random, in the same way at each call.

    Args:
        model: A classifier that maps [n, c, h, w] to logits, in eval mode.
        images: The normalised images, [n, c, h, w].
        heat: The heatmaps, [n, h, w].
        classes: The index of the class of each image, [n].
        steps: The number of steps in which the pixels change.

    Returns:
        The curves of insertion and deletion, [n, steps + 1] each, over the share of pixels that
        have changed, from 0 to 1.
    """
    n, _, h, w = images.shape
    shuffle = torch.randperm(h * w, generator=torch.Generator().manual_seed(0))
    order = heat.flatten(1)[:, shuffle].argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, shuffle[order], torch.arange(h * w).expand(n, -1))
    rank = rank.view(n, 1, h, w)
    sigma = min(h, w) / 8
    blurred = gaussian_blur(images, [2 * int(2 * sigma) + 1] * 2, [sigma, sigma])
    insertion, deletion = [], []
    for step in range(steps + 1):
        changed = rank < round(h * w * step / steps)
        for curve, mixed in (
            (insertion, torch.where(changed, images, blurred)),
            (deletion, images.masked_fill(changed, 0)),
        ):
            probability = model(mixed).softmax(1)
            curve.append(probability.gather(1, classes.unsqueeze(1)).squeeze(1))
    return torch.stack(insertion, 1), torch.stack(deletion, 1)


def area_under(curve: Tensor) -> Tensor:
    """Compute the areas [n] under curves [n, points] on [0, 1], by the trapezoidal rule."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)
