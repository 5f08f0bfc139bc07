"""Build a trainer from a configuration: data, model, optimizer, schedule and loss.

Everything that can be refused is refused before the run directory is made.
"""

import dataclasses
from collections.abc import Callable
from copy import deepcopy
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from timm.utils import random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..files import check_target
from . import checkpoint
from .averaging import WeightAverage
from .config import TrainConfig, UsageError, learning_rate, mixup_options, model_arguments
from .config.checks import check_config
from .config.trial import create_optimizer, create_scheduler, try_training
from .data import (
    class_names,
    data_config_of,
    evaluation_loader,
    ignoring_signals,
    training_loader,
)
from .distributed import DistributedContext
from .evaluate import half_precision
from .loading import create_model
from .loss import training_loss
from .notices import notices
from .resume import restore
from .sources import weights_file
from .splits import open_splits, print_splits, unvalidated
from .trainer import Trainer

__all__ = ["build_trainer"]


def build_trainer(
    config: TrainConfig,
    context: DistributedContext,
    change: Callable[[nn.Module], None] | None = None,
) -> Trainer:
    """Check the configuration and build the trainer, resumed if asked; nothing is written.

    Args:
        config: The configuration.
        context: The distributed context.
        change: Changes the new model in place, before its optimizer is made.

    Raises:
        UsageError: If the configuration, the data or the weights to start from are invalid.
    """
    _check(config, context)
    saved = None
    if config.resume not in ("", "auto"):
        saved = checkpoint.load_checkpoint(Path(config.resume), context)
    splits, num_classes = open_splits(config)
    classes = class_names(splits["train"])

    if (missing := unvalidated(config, splits)) and saved is None:
        context.warn(missing)
    model = _create_model(config, num_classes, change)
    if not timm.is_model(config.model):  # the check of the configuration has not built it
        try_training(config, deepcopy(model).to("meta"), context.size)
    data_config = data_config_of(config, model)
    model = _place(config, model, context)
    loaders = _open_loaders(config, splits, data_config, num_classes, context)
    folder = _run_directory(config, data_config, context)
    given, config = config, _resolve(config, data_config, num_classes, context)
    optimizer = create_optimizer(config, model)
    steps = -(-len(loaders["train"]) // config.grad_accum_steps)
    scheduler, epochs = create_scheduler(config, optimizer, steps)
    if saved is None:
        size = data_config["input_size"]
        for line in notices(given, context.size, model, size, epochs, steps):
            context.warn(line)
    averaged = _averaged(config, model)  # before the model is wrapped
    trainer = Trainer(
        config=config,
        context=context,
        folder=folder,
        model=model,
        network=_wrap(config, model, context),
        averaged=averaged,
        optimizer=optimizer,
        scheduler=scheduler,
        criterion=training_loss(config).to(context.device),
        train_loader=loaders["train"],
        val_loader=loaders.get("validation"),
        test_loader=loaders.get("test"),
        mixup=_mixup_without_prefetcher(config, num_classes),
        epochs=epochs,
        steps_per_epoch=steps,
        data_config=data_config,
        classes=classes,
    )
    if saved is not None:
        restore(trainer, saved)
    _check_place(trainer, context)
    if context.is_primary:
        print_splits(splits)
    return trainer


def _check_place(trainer: Trainer, context: DistributedContext) -> None:
    """Refuse ranks that would not begin at the same step, whose gradients do not belong together.

    A rank may not have seen the newest checkpoint, or not have been able to read it.
    """
    place = [trainer.epoch, trainer.step, trainer.steps_per_epoch]
    last = context.max(torch.tensor(place, device=context.device)).tolist()
    first = context.max(-torch.tensor(place, device=context.device)).neg().tolist()
    if first != last:
        raise UsageError(
            f"the ranks would begin at different places: step {first[1]} of epoch {first[0]} and "
            f"step {last[1]} of epoch {last[0]}, with {first[2]} and {last[2]} steps an epoch; "
            "give all of them the same data and the same --output"
        )


def _check(config: TrainConfig, context: DistributedContext) -> None:
    """Refuse a configuration that is wrong, or wrong on these ranks, or has no place to write."""
    check_config(config, context.size)
    if config.sync_bn and context.size > 1 and context.device.type == "cpu":
        raise UsageError("--sync-bn needs GPUs: torch has none of it for CPUs")
    if not context.is_primary:
        return
    if config.resume in ("", "auto"):
        check_target(Path(config.output, config.experiment or ".run"), folder=True)
    else:
        check_target(Path(config.resume, checkpoint.CONFIG))


def _create_model(
    config: TrainConfig, num_classes: int, change: Callable[[nn.Module], None] | None
) -> Any:
    random_seed(config.seed)  # the same on all ranks, so that they start from the same model
    arguments, overlay = model_arguments(config, num_classes), {}
    if config.pretrained_path:
        weights = checkpoint.read_weights(weights_file(config.pretrained_path))
        # num_classes of -1 makes timm adapt the head.
        overlay = {"state_dict": weights, "num_classes": -1}
    pretrained = config.pretrained or bool(overlay)
    model = create_model(config.model, pretrained, overlay, **arguments)
    if config.initial_checkpoint:
        checkpoint.load_weights(model, weights_file(config.initial_checkpoint))
    head = model.get_classifier()
    with torch.no_grad():
        if config.head_init_scale is not None:
            head.weight.mul_(config.head_init_scale)
            head.bias.mul_(config.head_init_scale)
        if config.head_init_bias is not None:
            head.bias.fill_(config.head_init_bias)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    if change is not None:
        change(model)
    return model


def _place(config: TrainConfig, model: Any, context: DistributedContext) -> Any:
    model.to(context.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)
    if context.size > 1 and config.sync_bn:
        model = convert_sync_batchnorm(model)
    return model


def _averaged(config: TrainConfig, model: nn.Module) -> WeightAverage | None:
    if not config.model_ema:
        return None
    return WeightAverage(model, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)


def _mixup_without_prefetcher(config: TrainConfig, num_classes: int) -> Mixup | None:
    """Return the mixup of the training step; with the prefetcher the loader mixes."""
    if not config.no_prefetcher or not mixup_options(config):
        return None
    return Mixup(**mixup_options(config), num_classes=num_classes)


def _open_loaders(
    config: TrainConfig,
    splits: dict[str, Any],
    data_config: dict[str, Any],
    num_classes: int,
    context: DistributedContext,
) -> dict[str, Any]:
    """Create a loader for each split."""
    batch_size = config.validation_batch_size or config.batch_size
    loaders = {
        name: ignoring_signals(evaluation_loader(config, dataset, data_config, batch_size, context))
        for name, dataset in splits.items()
        if name != "train"
    }
    train = splits["train"]
    loaders["train"] = training_loader(config, train, data_config, num_classes, context)
    if len(loaders["train"]) == 0:
        raise UsageError(
            f"{len(train)} training images make no batch of {config.batch_size} "
            f"on {context.size} ranks; lower --batch-size"
        )
    return loaders


def _resolve(
    config: TrainConfig, data_config: dict[str, Any], num_classes: int, context: DistributedContext
) -> TrainConfig:
    """Return the configuration with all derived values filled in."""
    root = config.data_dir or config.data
    norm = {"bn_momentum": config.bn_momentum, "bn_eps": config.bn_eps}
    norm = {name: value for name, value in norm.items() if value is not None}
    return dataclasses.replace(
        config,
        amp=context.device.type == "cuda" if config.amp is None else config.amp,
        amp_dtype=config.amp_dtype or half_precision(context.device),
        # As arguments of the model, where code that loads the weights reads them.
        model_kwargs={**config.model_kwargs, **norm},
        bn_momentum=None,
        bn_eps=None,
        lr=learning_rate(config, context.size),
        num_classes=num_classes,
        data=None,
        data_dir=str(Path(root).absolute()) if root else None,
        img_size=None,
        in_chans=data_config["input_size"][0],
        input_size=list(data_config["input_size"]),
        mean=list(data_config["mean"]),
        std=list(data_config["std"]),
        interpolation=data_config["interpolation"],
        crop_pct=data_config["crop_pct"],
        resume="",
    )


def _run_directory(
    config: TrainConfig, data_config: dict[str, Any], context: DistributedContext
) -> Path:
    """Return the run directory; one that holds another run is refused."""
    if config.resume not in ("", "auto"):
        return Path(config.resume)
    if config.experiment:
        name = config.experiment
    else:
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(config.model)}"
        name += f"-{data_config['input_size'][-1]}"
    folder = Path(config.output) / name
    # --resume auto starts a run again that ended before its first checkpoint.
    auto = config.resume == "auto"
    begun = checkpoint.checkpoints(folder) if auto else (folder / checkpoint.CONFIG).exists()
    if context.is_primary and begun:
        raise UsageError(
            f"{folder} already holds a run; continue it with --resume {folder}, "
            "or choose another --experiment or --output"
        )
    for parent in (folder, *folder.parents):
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"cannot write to {folder}: {parent} is a file")
    return folder


def _wrap(config: TrainConfig, model: nn.Module, context: DistributedContext) -> nn.Module:
    """Return the model as the training step calls it: compiled and distributed as configured."""
    if config.torchcompile:
        model = torch.compile(  # type: ignore[assignment]
            model, backend=config.torchcompile, mode=config.torchcompile_mode
        )
    if context.size == 1:
        return model
    devices = None if context.device.type == "cpu" else [context.device]
    network = DistributedDataParallel(model, device_ids=devices)
    if config.no_ddp_bb:  # the argument's name changes with torch 2.14
        network.broadcast_buffers = False
    return network
