"""Training speeds that were measured, from which `emax plan` and the recipes take their hours.

To bring them up to date, put the training images/s of
`emax benchmark models --device cuda --amp --channels-last -b 128` here, and let
`python .ci/recipe_hours.py` write the estimates of the recipes anew.
"""

__all__ = ["CARD", "SETTING", "SIZE", "TRAINING", "measured_speed"]

CARD = "NVIDIA H200"
SETTING = "batch 128, bfloat16 autocast, channels_last, torch 2.11 without torch.compile"
SIZE = 224
"""Height and width of the images in pixels."""
# Training images per second on one card: a step of forward, backward and SGD on random images that
# are on the card. Measured in November 2026, EMAX and EMA with the portable backend.
TRAINING = {
    "resnet50": 4229,
    "seresnet50": 2923,
    "resnet50_se": 2391,
    "resnet50_cbam": 1417,
    "resnet50_coord": 1654,
    "resnet50_ema": 551,
    "resnet50_emax": 504,
    "convnext_tiny": 2758,
    "convnext_tiny_se": 2215,
    "convnext_tiny_emax": 559,
}


def measured_speed(model: str, height: int, width: int) -> float | None:
    """Return the images per second that a model trains at on one `CARD`, None if unmeasured.

    Images of another size than `SIZE` are taken to cost as much per pixel.
    """
    speed = TRAINING.get(model)
    return None if speed is None else speed * SIZE**2 / (height * width)
