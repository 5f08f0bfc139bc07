"""The options of train.py for augmentation and regularisation, with timm's names and defaults."""

from dataclasses import dataclass

from .option import AT_LEAST_0, AT_LEAST_1, FILTERS, FRACTION, POSITIVE, option

__all__ = ["AugmentationOptions"]


@dataclass
class AugmentationOptions:
    """Augmentation and regularisation."""

    no_aug: bool = option(False, "no augmentation of the training images")
    train_crop_mode: str | None = option(
        None, "crop of the training images", choices=("rrc", "rkrc", "rkrr")
    )
    scale: list[float] = option(
        [0.08, 1.0], "range of the random crop's area", nargs=2, bounds=POSITIVE
    )
    ratio: list[float] = option(
        [3 / 4, 4 / 3], "range of the random crop's aspect ratio", nargs=2, bounds=POSITIVE
    )
    hflip: float = option(0.5, "probability of a horizontal flip", bounds=FRACTION)
    vflip: float = option(0.0, "probability of a vertical flip", bounds=FRACTION)
    color_jitter: float = option(0.4, "strength of colour jitter", bounds=AT_LEAST_0)
    color_jitter_prob: float | None = option(None, "probability of colour jitter", bounds=FRACTION)
    grayscale_prob: float | None = option(
        None, "probability of a conversion to grey", bounds=FRACTION
    )
    gaussian_blur_prob: float | None = option(None, "probability of a blur", bounds=FRACTION)
    aa: str | None = option(None, "auto-augment policy, such as rand-m9-mstd0.5-inc1")
    aug_repeats: float = option(
        0.0, "views of each image that follow each other", bounds=AT_LEAST_0
    )
    aug_splits: int = option(0, "augmentation splits: 0, or 2 and more", bounds=AT_LEAST_0)
    jsd_loss: bool = option(False, "Jensen-Shannon loss over the augmentation splits")
    bce_loss: bool = option(False, "binary cross entropy")
    bce_sum: bool = option(False, "sum the binary cross entropy over classes")
    bce_target_thresh: float | None = option(
        None,
        "threshold at which soft targets become 0 or 1 for binary cross entropy",
        bounds=FRACTION,
    )
    bce_pos_weight: float | None = option(
        None, "weight of the positives in binary cross entropy", bounds=POSITIVE
    )
    reprob: float = option(0.0, "probability of random erasing", bounds=FRACTION)
    remode: str = option("pixel", "fill of random erasing", choices=("const", "rand", "pixel"))
    recount: int = option(1, "areas that random erasing erases in an image", bounds=AT_LEAST_1)
    resplit: bool = option(False, "no erasing in the first augmentation split")
    mixup: float = option(0.0, "mixup's alpha; off at 0", bounds=AT_LEAST_0)
    cutmix: float = option(0.0, "cutmix's alpha; off at 0", bounds=AT_LEAST_0)
    cutmix_minmax: list[float] | None = option(
        None, "range of cutmix's box", nargs=2, bounds=FRACTION
    )
    mixup_prob: float = option(
        1.0, "probability of mixup or cutmix, where one is on", bounds=FRACTION
    )
    mixup_switch_prob: float = option(
        0.5, "probability of cutmix where both are on", bounds=FRACTION
    )
    mixup_mode: str = option(
        "batch",
        "images that share one choice of mixup or cutmix",
        choices=("batch", "pair", "elem"),
    )
    mixup_off_epoch: int = option(
        0, "epoch from which mixup and cutmix are off; 0 for never", bounds=AT_LEAST_0
    )
    smoothing: float = option(0.1, "label smoothing", bounds=(0, 0.999))
    train_interpolation: str = option(
        "random", "resize filter for training", choices=("random", "", *FILTERS)
    )
