"""The input of a model: channels, size, normalisation, and how images are resized to it."""

from typing import Any

from timm.data import resolve_data_config

from ...errors import UsageError
from ..config.options import InputOptions

__all__ = ["data_config_of", "image_mode", "input_channels"]


def input_channels(options: InputOptions) -> int:
    """Channels of the model's input."""
    return options.input_size[0] if options.input_size else options.in_chans or 3


def image_mode(options: InputOptions) -> str:
    """PIL mode of images for the model."""
    return "RGB" if input_channels(options) == 3 else "L"


def data_config_of(options: InputOptions, model: Any) -> dict[str, Any]:
    """Size and normalisation of the model's input, and how images are resized to it.

    Raises:
        UsageError: If mean or std do not fit the number of channels.
    """
    channels = input_channels(options)
    for name in ("mean", "std"):
        values = getattr(options, name)
        if values is not None and len(values) not in (1, channels):
            raise UsageError(f"{name} has {len(values)} values for {channels} channels")
    return resolve_data_config(vars(options), model=model)
