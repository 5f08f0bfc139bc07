"""The options that training and validation share, and those of validate.py.

Names and defaults are those of timm's scripts. Where the default differs from timm's, or timm has
no such option, the help says so. Each class is a group of flags in `--help`.
"""

from dataclasses import dataclass
from math import inf
from typing import Any

from .option import AT_LEAST_0, AT_LEAST_1, FILTERS, POSITIVE, option

__all__ = ["DataOptions", "DeviceOptions", "InputOptions", "ValidateConfig"]


@dataclass
class DataOptions:
    """Data."""

    data: str | None = option(None, "as --data-dir", positional=True)
    data_dir: str | None = option(None, "root folder of the data set, or a .tar file")
    dataset: str = option(
        "",
        "TYPE/NAME of the data set: empty for a folder of class folders or tars, torch/…, hfds/…, "
        "wds/…, tfds/… as in timm, sample/fashion_mnist, which comes with the package, or "
        "scenes/fashion_mnist_96, scenes/fashion_mnist_48, composed of its items",
        "-d",
        metavar="TYPE/NAME",
    )
    dataset_download: bool = option(False, "download the data set if its type can")
    class_map: str = option("", "text file with one class name per line, in label order")
    input_img_mode: str | None = option(
        None,
        "PIL mode that images are converted to (RGB, or L for one channel)",
        choices=("RGB", "L", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F"),
    )
    exif_orientation: bool = option(
        False, "not in timm, which ignores it: turn images upright as their EXIF orientation says"
    )
    input_key: str | None = option(
        None,
        "key of the images in hfds, wds and tfds data; of folders and tars the extensions "
        "of images, such as .png;.jpg (default: all)",
    )
    target_key: str | None = option(None, "key of the labels in hfds, wds and tfds data")
    workers: int = option(
        4, "processes that load images; 0 loads in the main process", "-j", bounds=AT_LEAST_0
    )
    pin_mem: bool = option(False, "page-locked memory for the transfer to a GPU")
    no_prefetcher: bool = option(False, "normalise on the CPU, image by image")


@dataclass
class InputOptions:
    """Input of the model (default: as its weights were trained)."""

    img_size: int | None = option(None, "side of the square input in pixels", bounds=AT_LEAST_1)
    in_chans: int | None = option(None, "channels of the input", bounds=AT_LEAST_1)
    input_size: list[int] | None = option(None, "channels, height and width", nargs=3)
    crop_pct: float | None = option(
        None, "side of the centre crop over that of the resized image", bounds=(1e-3, inf)
    )
    crop_mode: str | None = option(
        None, "crop for validation", choices=("center", "squash", "border")
    )
    mean: list[float] | None = option(None, "mean per channel, of pixels in [0, 1]")
    std: list[float] | None = option(None, "standard deviation per channel", bounds=POSITIVE)
    interpolation: str = option("", "resize filter for validation", choices=("", *FILTERS))


@dataclass
class DeviceOptions:
    """Device."""

    device: str = option(
        "", "device to compute on: cpu, cuda, … (unlike timm, default: cuda if available, else cpu)"
    )
    amp: bool | None = option(
        None, "automatic mixed precision (unlike timm, on where a GPU trains unless --no-amp)"
    )
    amp_dtype: str = option(
        "",
        "dtype of mixed precision (unlike timm, bfloat16 wherever the device has it)",
        choices=("", "float16", "bfloat16"),
    )
    channels_last: bool = option(False, "channels_last memory layout")
    dist_timeout: float = option(
        600.0,
        "not in timm: seconds after which a rank that waits for the others gives up",
        bounds=AT_LEAST_1,
    )


@dataclass
class EvaluationOptions:
    """Model and checkpoint to validate, and the split to validate on."""

    checkpoint: str = option(
        "",
        "run directory, or a .safetensors file in it; the run gives the model, the data and the "
        "split, and the flags given here override it",
        metavar="RUN",
    )
    model: str | None = option(None, "name of a timm model, or a run directory", "-m")
    pretrained: bool = option(False, "start from published weights (always without --checkpoint)")
    num_classes: int | None = option(None, "number of classes", bounds=AT_LEAST_1)
    gp: str | None = option(None, "global pooling")
    model_kwargs: dict[str, Any] = option({}, "keyword arguments of the model")
    split: str | None = option(
        None, "split to validate on (default: the run's test split, else its validation split)"
    )
    num_samples: int | None = option(
        None,
        "images: the length of a stream; else as many of the split, at random",
        bounds=AT_LEAST_1,
    )
    batch_size: int | None = option(
        None, "images per forward pass (default: as the run)", "-b", bounds=AT_LEAST_1
    )


@dataclass
class ValidateConfig(EvaluationOptions, DeviceOptions, InputOptions, DataOptions):
    """Validate an image classifier; the options are those of timm's validate.py."""
