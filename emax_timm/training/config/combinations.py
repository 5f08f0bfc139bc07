"""Checks of options against each other: what each of them allows, but not together."""

from collections.abc import Callable
from typing import Any

import torch

from ...errors import UsageError, nearest
from ..data.inputs import image_mode, input_channels
from .arguments import mixup_options
from .options import DataOptions, InputOptions
from .train_options import TrainConfig

__all__ = ["check_combinations", "check_input"]

# Channels of the images by PIL mode.
CHANNELS = {"L": 1, "I": 1, "F": 1, "RGB": 3, "YCbCr": 3, "LAB": 3, "HSV": 3, "RGBA": 4, "CMYK": 4}

# What timm.create_model takes and model_kwargs must not hold.
OPTIONS = {"num_classes": "--num-classes", "in_chans": "--in-chans", "global_pool": "--gp"}


def check_combinations(config: TrainConfig) -> None:
    """Check the options of training that depend on each other.

    Raises:
        UsageError: If some exclude each other; the message says what would be right.
    """
    check_input(config, config)
    for check in (_check_model, _check_augmentation, _check_loss, _check_schedule, _check_compiler):
        check(config)


def check_input(data: DataOptions, size: InputOptions) -> None:
    """Check the options of a model's input against each other and the mode of the images.

    Raises:
        UsageError: If the input has two sizes, or images have other channels than it.
    """
    if size.input_size and size.img_size and [size.img_size] * 2 != size.input_size[1:]:
        raise UsageError(
            f"--img-size {size.img_size} and --input-size {_listed(size.input_size)} differ; "
            "give one of them"
        )
    if size.input_size and size.in_chans not in (None, size.input_size[0]):
        raise UsageError(
            f"--in-chans {size.in_chans} and --input-size {_listed(size.input_size)} differ; "
            "give one of them"
        )
    channels, mode = input_channels(size), data.input_img_mode or image_mode(size)
    if CHANNELS[mode] != channels:
        modes = [name for name, number in CHANNELS.items() if number == channels]
        right = f"give --input-img-mode {' or '.join(modes)}" if modes else "images have 1, 3 or 4"
        raise UsageError(
            f"the model's input has {channels} channels, images of mode {mode} have "
            f"{CHANNELS[mode]}: {right}"
        )


def _check_model(config: TrainConfig) -> None:
    for name, flag in OPTIONS.items():
        if name in config.model_kwargs:
            raise UsageError(f"model_kwargs cannot hold {name}: there is {flag} for that")
    if config.model_kwargs.get("features_only"):
        raise UsageError("model_kwargs cannot hold features_only: a classifier is trained")


def _check_augmentation(config: TrainConfig) -> None:
    mixed = mixup_options(config)
    if config.aug_splits == 1 or (config.aug_splits and mixed):
        raise UsageError("aug_splits must be 0, or at least 2 and without mixup and cutmix")
    if config.aug_splits and config.no_prefetcher:
        raise UsageError("--aug-splits needs the prefetcher: leave out --no-prefetcher")
    if mixed and config.batch_size % 2:
        raise UsageError(f"mixup and cutmix need an even --batch-size, not {config.batch_size}")
    for name in ("scale", "ratio", "cutmix_minmax"):
        values = getattr(config, name)
        if values is not None and values[0] > values[1]:
            raise UsageError(f"{name} must ascend, not be {_listed(values)}")


def _check_loss(config: TrainConfig) -> None:
    if config.jsd_loss and not config.aug_splits:
        raise UsageError("--jsd-loss needs --aug-splits of at least 2")
    if config.jsd_loss and config.bce_loss:
        raise UsageError("--jsd-loss and --bce-loss exclude each other; leave out one of them")
    if config.on_spike != TrainConfig.on_spike and not config.loss_spike:
        raise UsageError(f"--on-spike {config.on_spike} needs --loss-spike, its limit")
    if config.clip_mode != "norm" and config.clip_grad is None:
        raise UsageError(f"--clip-mode {config.clip_mode} needs --clip-grad, its limit")


def _check_schedule(config: TrainConfig) -> None:
    if config.sched == "plateau":
        held_out = config.val_fraction or config.val_split
        if not held_out or config.val_interval != 1:
            raise UsageError("--sched plateau needs a validation after every epoch")
        if config.sched_on_updates:
            raise UsageError("--sched plateau steps per epoch: leave out --sched-on-updates")
    if config.decay_milestones != sorted(set(config.decay_milestones)):
        raise UsageError(f"decay_milestones must ascend, not be {_listed(config.decay_milestones)}")
    if config.lr_noise is not None and len(config.lr_noise) not in (1, 2):
        raise UsageError(f"lr_noise takes one or two fractions, not {_listed(config.lr_noise)}")
    if config.opt_betas is not None and len(config.opt_betas) < 2:
        raise UsageError(
            f"optimizer {config.opt}: --opt-betas takes two values or more, "
            f"not {_listed(config.opt_betas)}"
        )


def _check_compiler(config: TrainConfig) -> None:
    if config.torchcompile_mode and not config.torchcompile:
        raise UsageError("--torchcompile-mode needs --torchcompile")
    if not config.torchcompile:
        return
    # list_backends imports the compiler, which takes seconds. The tags hide eager and the like.
    list_backends: Callable[..., list[str]] = torch.compiler.list_backends
    backends = list_backends(exclude_tags=())
    if config.torchcompile not in backends:
        raise UsageError(
            f"unknown torch.compile backend {config.torchcompile}; "
            f"the nearest is {nearest(config.torchcompile, backends)}"
        )
    if not config.torchcompile_mode:
        return
    if config.torchcompile != "inductor":
        raise UsageError("--torchcompile-mode is for the backend inductor")
    modes = list(torch._inductor.list_mode_options())
    if config.torchcompile_mode not in modes:
        raise UsageError(
            f"unknown torch.compile mode {config.torchcompile_mode}; the nearest of "
            f"{', '.join(modes)} is {nearest(config.torchcompile_mode, modes)}"
        )


def _listed(values: list[Any]) -> str:
    return " ".join(map(str, values))
