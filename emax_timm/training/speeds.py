"""Training speeds that were measured, from which `emax plan` and the recipes take their hours.

To bring them up to date, put the training images/s of
`emax benchmark models --device cuda --amp --channels-last -b 128` here, and let
`python .ci/recipe_hours.py` write the estimates of the recipes anew.
"""

from typing import NamedTuple

__all__ = ["SETTING", "SIZE", "TRAINING", "Speed", "measured_speed"]


class Speed(NamedTuple):
    """A measured training speed."""

    images: float
    """Images per second, of a step of forward, backward and SGD on images that are on the card."""
    card: str
    """The card that it was measured on."""


H100 = "NVIDIA H100 80GB HBM3"
H200 = "NVIDIA H200"
SETTING = "batch 128, bfloat16 autocast, channels_last, torch 2.11 without torch.compile"
SIZE = 224
"""Height and width of the images in pixels."""
# Measured in November 2026; on the H200 the EMAX of convnext_tiny was computed by the portable
# backend.
TRAINING = {
    "resnet50": Speed(3583, H100),
    "seresnet50": Speed(2423, H100),
    "resnet50_se": Speed(2391, H200),
    "resnet50_cbam": Speed(1341, H100),
    "resnet50_coord": Speed(1654, H200),
    "resnet50_ema": Speed(1977, H100),
    "resnet50_emax": Speed(1680, H100),
    "convnext_tiny": Speed(2758, H200),
    "convnext_tiny_se": Speed(2215, H200),
    "convnext_tiny_emax": Speed(559, H200),
}


def measured_speed(model: str, height: int, width: int) -> Speed | None:
    """Return the speed that a model trains at on one card, None if unmeasured.

    Images of another size than `SIZE` are taken to cost as much per pixel.
    """
    speed = TRAINING.get(model)
    if speed is None:
        return None
    return speed._replace(images=speed.images * SIZE**2 / (height * width))
