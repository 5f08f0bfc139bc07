"""Options that several benchmarks share."""

import argparse
from collections.abc import Callable, Sequence

import torch

from ..training.config import UsageError
from ..training.distributed import find_device
from . import networks
from .methods import Tensors

__all__ = [
    "HALF",
    "a_count",
    "a_shape",
    "a_shape_of_any_rank",
    "add_amp",
    "add_device",
    "add_images",
    "add_methods",
    "add_networks",
    "add_shapes",
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
    return find_device(options.device)


def tensors_of(options: argparse.Namespace) -> Tensors:
    """Return what the options say of the inputs: their device, dtype and memory format."""
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    amp = HALF.get(getattr(options, "amp", None) or "")
    return Tensors(device_of(options), getattr(torch, options.dtype), layout, amp)


def add_methods(parser: argparse.ArgumentParser, methods: Sequence[str]) -> None:
    parser.add_argument(
        "--methods",
        "--systems",
        nargs="+",
        type=_method,
        choices=methods,
        metavar="NAME",
        help=f"methods to compare, of {'; '.join(methods)} (without this option, the usual ones "
        "that are available)",
    )


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="device to measure on: cpu, cuda, …")


def add_tensors(parser: argparse.ArgumentParser) -> None:
    add_device(parser)
    types = ["float32", "bfloat16", "float16", "float64"]
    text = "dtype of the input and the weights"
    parser.add_argument("--dtype", default="float32", choices=types, help=text)
    text = "measure in channels_last memory format, instead of contiguous"
    parser.add_argument("--channels-last", action="store_true", help=text)


def add_amp(parser: argparse.ArgumentParser) -> None:
    text = "mixed precision: autocast to bf16 (if none is named) or fp16, weights in float32"
    parser.add_argument(
        "--amp", nargs="?", const="bf16", default=None, choices=list(HALF), help=text
    )


def add_shapes(
    parser: argparse.ArgumentParser,
    shape: Callable[[str], tuple[int, ...]] | None = None,
    metavar: str = "BxCxHxW",
    others: str = "",
) -> None:
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape or a_shape,
        default=None,
        metavar=metavar,
        help="shapes of the input; by default those of ResNet-50's stages, of 8 images on a CPU "
        f"and of 128 on a GPU{others}",
    )


def add_networks(parser: argparse.ArgumentParser) -> None:
    text = "names of baselines, which are compared with their variants with attention"
    parser.add_argument("--models", nargs="+", default=networks.BASES, metavar="NAME", help=text)


def add_images(parser: argparse.ArgumentParser, batch: int, size: int) -> None:
    text = "images in a batch"
    parser.add_argument("--batch-size", "-b", type=a_count, default=batch, metavar="N", help=text)
    text = "side of the square images in pixels"
    parser.add_argument("--img-size", type=a_count, default=size, metavar="N", help=text)


def _method(text: str) -> str:
    name, *modes = text.split(", ")
    return ", ".join(["baseline" if name == "plain" else name, *modes])  # an earlier name


def a_shape(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"a shape is four sizes such as 8x64x56x56, not {text}")
    return tuple(map(int, sizes))


def a_shape_of_any_rank(text: str) -> tuple[int, ...]:
    sizes = text.split("x")
    if not 3 <= len(sizes) <= 5 or not all(size.isdecimal() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"a shape is 3 to 5 sizes such as 8x64x56x56, not {text}")
    return tuple(map(int, sizes))


def a_count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return int(text)
