"""Options that several benchmarks share."""

import argparse
from collections.abc import Sequence

import torch

from ..training.config import UsageError
from . import networks
from .systems import Tensors

__all__ = [
    "HALF",
    "a_count",
    "a_shape",
    "add_amp",
    "add_device",
    "add_images",
    "add_networks",
    "add_shapes",
    "add_systems",
    "add_tensors",
    "device_of",
    "tensors_of",
]

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The dtypes of mixed precision, by their names on the command line."""


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device that --device names.

    Raises:
        UsageError: If this machine has none.
    """
    if options.device.partition(":")[0] == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"--device {options.device}: torch {torch.__version__} sees no GPU here")
    return torch.empty(1, device=options.device).device  # raises if there is no such device


def tensors_of(options: argparse.Namespace) -> Tensors:
    """Return what the options say of the inputs: their device, dtype and memory format."""
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    amp = HALF.get(getattr(options, "amp", None) or "")
    return Tensors(device_of(options), getattr(torch, options.dtype), layout, amp)


def add_systems(parser: argparse.ArgumentParser, systems: Sequence[str]) -> None:
    text = f"of {'; '.join(systems)}; the usual ones that can be had"
    parser.add_argument("--systems", nargs="+", choices=systems, metavar="NAME", help=text)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu, cuda, …")


def add_tensors(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    dtypes = ["float32", "bfloat16", "float16", "float64"]
    parser.add_argument("--dtype", default="float32", choices=dtypes)
    parser.add_argument("--channels-last", action="store_true", help="instead of contiguous")


def add_amp(parser: argparse.ArgumentParser) -> None:
    text = "mixed precision: autocast to bf16 (if none is named) or fp16, weights in float32"
    parser.add_argument(
        "--amp", nargs="?", const="bf16", default=None, choices=list(HALF), help=text
    )


def add_shapes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=a_shape,
        default=None,
        metavar="BxCxHxW",
        help="of the input; if none are given, ResNet-50's, of 8 images on a CPU and 128 on a GPU",
    )


def add_networks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--models", nargs="+", default=networks.BASES, metavar="NAME", help="of the baselines"
    )


def add_images(parser: argparse.ArgumentParser, batch: int, size: int) -> None:
    parser.add_argument(
        "--batch-size", "-b", type=a_count, default=batch, metavar="N", help="of images"
    )
    parser.add_argument(
        "--img-size", type=a_count, default=size, metavar="N", help="side in pixels"
    )


def a_shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"a shape is four sizes such as 8x64x56x56, not {text}")
    return tuple(map(int, sizes))


def a_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)
