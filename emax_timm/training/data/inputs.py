"""The input of a model: its channels, size and normalisation, and how images are resized to it."""

from typing import Any

from timm.data import resolve_data_config

from ...errors import UsageError
from ..config.options import InputOptions

__all__ = ["data_config_of", "image_mode", "input_channels"]


def input_channels(options: InputOptions) -> int:
    """Return the number of channels of the model's input."""
    return options.input_size[0] if options.input_size else options.in_chans or 3


def image_mode(options: InputOptions) -> str:
    """Return the PIL mode of images for the model: RGB for three channels, else L (grey)."""
    return "RGB" if input_channels(options) == 3 else "L"


def data_config_of(options: InputOptions, model: Any) -> dict[str, Any]:
    """Return timm's data config: the input's size and normalisation, and how images are resized.

    Raises:
        UsageError: If mean or std has neither one value nor one for each channel.
    """
    channels = input_channels(options)
    for name in ("mean", "std"):
        values = getattr(options, name)
        if values is not None and len(values) not in (1, channels):
            raise UsageError(f"{name} has {len(values)} values for {channels} channels")
    return resolve_data_config(vars(options), model=model)
