"""From a configuration to a trainer: checks, model, data, optimizer, schedule, loss.

Everything that can be refused is refused before the run's folder is made, and what needs no data
before the data is touched.
"""

import dataclasses
import inspect
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import Mixup
from timm.layers import convert_sync_batchnorm
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, list_optimizers, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..attention import EMAX
from . import checkpoint
from .config import UsageError, nearest
from .data import (
    class_names,
    data_config_of,
    evaluation_loader,
    hold_out,
    mixup_options,
    open_split,
    same_classes,
    training_loader,
)
from .distributed import World
from .options import TrainConfig
from .trainer import Trainer

__all__ = ["build_trainer", "check_config", "check_model"]


def build_trainer(config: TrainConfig, world: World) -> Trainer:
    """Check the configuration and build all that a run consists of; nothing is written.

    Raises:
        UsageError: If the configuration, the data or the weights to start from are refused.
    """
    check_config(config)
    state = None
    if config.resume:
        state = checkpoint.load_state(Path(config.resume) / checkpoint.LAST_STATE, world.device)
    splits = _open_splits(config)
    classes = class_names(splits["train"])
    num_classes = _num_classes(config, classes)

    random_seed(config.seed)  # the same on all ranks, so that they start from the same model
    model = _create_model(config, num_classes)
    data_config = data_config_of(config, model)
    model.to(world.device)
    if config.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if world.size > 1 and config.sync_bn:
        model = convert_sync_batchnorm(model)
    averaged = None
    if config.model_ema:
        averaged = ModelEmaV3(
            model, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup
        )

    train_loader = training_loader(config, splits["train"], data_config, num_classes, world)
    if len(train_loader) == 0:
        raise UsageError(
            f"{len(splits['train'])} training images make no batch of {config.batch_size} "
            f"on {world.size} ranks; lower --batch-size"
        )
    batch_size = config.validation_batch_size or config.batch_size
    loaders = {
        name: evaluation_loader(config, dataset, data_config, batch_size, world)
        for name, dataset in splits.items()
        if name != "train"
    }
    folder = _run_folder(config, data_config, world)
    config = _resolve(config, data_config, num_classes, world)
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(config), **config.opt_kwargs)
    except Exception as error:  # whatever the optimizer makes of its options
        raise UsageError(f"optimizer {config.opt}: {str(error) or type(error).__name__}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"optimizer {config.opt} needs second derivatives, which are not computed")
    steps = -(-len(train_loader) // config.grad_accum_steps)
    schedule: dict[str, Any] = scheduler_kwargs(
        config, decreasing_metric=config.eval_metric == "loss"
    )
    scheduler, epochs = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=steps)
    mixup = None
    if config.no_prefetcher and mixup_options(config):
        mixup = Mixup(**mixup_options(config), num_classes=num_classes)
    trainer = Trainer(
        config=config,
        world=world,
        folder=folder,
        model=model,
        network=_wrap(config, model, world),
        averaged=averaged,
        optimizer=optimizer,
        scheduler=scheduler,
        criterion=_training_loss(config).to(world.device),
        train_loader=train_loader,
        val_loader=loaders.get("validation"),
        test_loader=loaders.get("test"),
        mixup=mixup,
        epochs=epochs,
        steps_per_epoch=steps,
        data_config=data_config,
        classes=classes,
    )
    if state is not None:
        trainer.load_state_dict(state)
    return trainer


# The least and the greatest value of options that have bounds.
BOUNDS: dict[str, tuple[float, float]] = {
    "epochs": (1, float("inf")),
    "batch_size": (1, float("inf")),
    "validation_batch_size": (1, float("inf")),
    "grad_accum_steps": (1, float("inf")),
    "workers": (0, float("inf")),
    "val_interval": (1, float("inf")),
    "log_interval": (1, float("inf")),
    "num_classes": (1, float("inf")),
    "img_size": (1, float("inf")),
    "in_chans": (1, float("inf")),
    "seed": (0, 2**63 - 1),
    "val_fraction": (0, 1),
    "lr": (0, float("inf")),
    "weight_decay": (0, float("inf")),
    "clip_grad": (0, float("inf")),
    "crop_pct": (1e-3, float("inf")),
    "hflip": (0, 1),
    "vflip": (0, 1),
    "smoothing": (0, 1),
    "drop": (0, 1),
    "reprob": (0, 1),
    "model_ema_decay": (0, 1),
}


def check_config(config: TrainConfig) -> None:
    """Refuse what can be refused without data.

    Raises:
        UsageError: With what is wrong and what would be right.
    """
    check_bounds(config)
    names = [str(name) for name in list_optimizers()]
    if config.opt.lower().removeprefix("lookahead_") not in names:
        raise UsageError(
            f"unknown optimizer {config.opt}; the nearest is {nearest(config.opt, names)}"
        )
    start, end = config.grouping_warmup
    if not 0 <= start <= end <= 1:
        raise UsageError(f"grouping_warmup must ascend within [0, 1], not {start} {end}")
    if not all(0 < value < float("inf") for value in config.grouping_temperature):
        raise UsageError(
            f"grouping_temperature must be positive and finite, not {config.grouping_temperature}"
        )
    if config.aug_splits == 1 or (config.aug_splits and mixup_options(config)):
        raise UsageError("aug_splits must be 0, or at least 2 and without mixup and cutmix")
    if config.jsd_loss and not config.aug_splits:
        raise UsageError("--jsd-loss needs --aug-splits of at least 2")
    if mixup_options(config) and config.batch_size % 2:
        raise UsageError(f"mixup and cutmix need an even --batch-size, not {config.batch_size}")
    if Path(config.experiment).name != config.experiment or config.experiment == "..":
        raise UsageError(f"--experiment is the name of one folder, not {config.experiment}")
    if len(config.experiment.encode()) > 255:
        raise UsageError(f"--experiment is too long for a folder's name: {config.experiment}")
    for path in (config.pretrained_path, config.initial_checkpoint):
        if path:
            checkpoint.read_weights(Path(path))
    backends = torch.compiler.list_backends()
    if config.torchcompile and config.torchcompile not in backends:
        raise UsageError(
            f"unknown torch.compile backend {config.torchcompile}; "
            f"the nearest is {nearest(config.torchcompile, backends)}"
        )
    check_model(config.model, _model_arguments(config, config.num_classes))


def check_bounds(config: Any) -> None:
    """Refuse numbers out of the range of their option."""
    for name, (least, greatest) in BOUNDS.items():
        value = getattr(config, name, None)
        if value is not None and not least <= value <= greatest:
            bound = f"at least {least}" if greatest == float("inf") else f"in [{least}, {greatest}]"
            raise UsageError(f"{name} must be {bound}, not {value}")


# Arguments of timm.create_model that are about weights, not about the model.
RESERVED = {
    "cache_dir",
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
}


def check_model(name: str, arguments: dict[str, Any]) -> None:
    """Build the model without memory, to refuse a wrong name or argument before all else.

    Raises:
        UsageError: With the nearest valid name.
    """
    try:
        json.dumps(arguments)
    except TypeError as error:
        raise UsageError(f"model_kwargs must be plain values: {error}") from None
    if reserved := sorted(RESERVED & arguments.keys()):
        raise UsageError(f"model_kwargs cannot hold {reserved[0]}: there is an option for that")
    if ":" in name:  # hf-hub: and local-dir: models are known once their config is read
        return
    if not timm.is_model(name):
        raise UsageError(
            f"unknown model {name}; the nearest is {nearest(name, timm.list_models())}"
        )
    try:
        with torch.device("meta"):
            timm.create_model(name, **arguments)
    except TypeError as error:
        raise UsageError(f"model {name}: {_explain(error, name)}") from None
    except Exception as error:  # whatever the model makes of its arguments
        raise UsageError(f"model {name}: {str(error) or type(error).__name__}") from None


def _explain(error: TypeError, name: str) -> str:
    """The message of a TypeError, with the nearest valid keyword for an unknown one."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if not found:
        return str(error)
    owner, keyword = found.groups()
    # The class that was asked for, which may have handed the keyword to a base.
    model_class: Any = inspect.signature(timm.model_entrypoint(name)).return_annotation
    if owner == "EMAX":
        model_class = EMAX
    elif not inspect.isclass(model_class) or model_class is inspect.Signature.empty:
        model_class = getattr(timm.models, owner, nn.Module)
    classes = inspect.getmro(model_class)
    keywords = {
        parameter.name
        for cls in classes
        for parameter in inspect.signature(cls.__init__).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    } - {"self", "device", "dtype"}
    if not keywords:
        return f"unknown keyword {keyword}"
    return f"unknown keyword {keyword}; the nearest valid one is {nearest(keyword, keywords)}"


def _model_arguments(config: TrainConfig, num_classes: int | None) -> dict[str, Any]:
    arguments = {
        "num_classes": num_classes,
        "in_chans": config.input_size[0] if config.input_size else config.in_chans,
        "drop_rate": config.drop or None,
        "drop_path_rate": config.drop_path,
        "drop_block_rate": config.drop_block,
        "global_pool": config.gp,
        "bn_momentum": config.bn_momentum,
        "bn_eps": config.bn_eps,
        **config.model_kwargs,
    }
    return {name: value for name, value in arguments.items() if value is not None}


def _create_model(config: TrainConfig, num_classes: int) -> Any:
    arguments = _model_arguments(config, num_classes)
    if config.pretrained_path:
        weights = checkpoint.read_weights(Path(config.pretrained_path))
        # num_classes of -1 makes timm adapt the head.
        arguments["pretrained_cfg_overlay"] = {"state_dict": weights, "num_classes": -1}
    try:
        model: Any = timm.create_model(
            config.model, pretrained=config.pretrained or bool(config.pretrained_path), **arguments
        )
    except Exception as error:  # whatever stands in the way of its weights
        raise UsageError(f"model {config.model}: {str(error) or type(error).__name__}") from None
    if config.initial_checkpoint:
        checkpoint.load_weights(model, Path(config.initial_checkpoint))
    head = model.get_classifier()
    with torch.no_grad():
        if config.head_init_scale is not None:
            head.weight.mul_(config.head_init_scale)
            head.bias.mul_(config.head_init_scale)
        if config.head_init_bias is not None:
            head.bias.fill_(config.head_init_bias)
    if config.grad_checkpointing:
        model.set_grad_checkpointing(enable=True)
    return model


def _open_splits(config: TrainConfig) -> dict[str, Any]:
    """Data sets by name: train, and where there are any validation and test."""
    channels = config.input_size[0] if config.input_size else config.in_chans or 3
    mode = "RGB" if channels == 3 else "L"

    def split(name: str, training: bool, samples: int | None) -> Any:
        return open_split(
            config,
            name,
            input_img_mode=mode,
            training=training,
            must_exist=True,
            batch_size=config.batch_size,
            num_samples=samples,
            seed=config.seed,
            repeats=config.epoch_repeats if training else 0.0,
        )

    splits = {"train": split(config.train_split, True, config.train_num_samples)}
    if config.val_fraction:
        splits["train"], splits["validation"] = hold_out(splits["train"], config.val_fraction)
    elif config.val_split:
        splits["validation"] = split(config.val_split, False, config.val_num_samples)
    if config.test_split:
        splits["test"] = split(config.test_split, False, None)
    for name, dataset in splits.items():
        same_classes(class_names(splits["train"]), class_names(dataset), name)
    return splits


def _num_classes(config: TrainConfig, classes: list[str] | None) -> int:
    known = len(classes) if classes is not None else None
    if config.num_classes is None:
        return known or timm.get_pretrained_cfg_value(config.model, "num_classes") or 1000
    if known is not None and known > config.num_classes:
        raise UsageError(f"the data has {known} classes, more than --num-classes allows")
    return config.num_classes


def _resolve(
    config: TrainConfig, data_config: dict[str, Any], num_classes: int, world: World
) -> TrainConfig:
    """The configuration with everything that was derived written down in it."""
    lr = config.lr
    if lr is None:
        ratio = config.batch_size * world.size * config.grad_accum_steps / config.lr_base_size
        adaptive = any(name in config.opt.lower() for name in ("ada", "lamb"))
        if (config.lr_base_scale or ("sqrt" if adaptive else "linear")) == "sqrt":
            ratio **= 0.5
        lr = config.lr_base * ratio
    root = config.data_dir or config.data
    norm = {"bn_momentum": config.bn_momentum, "bn_eps": config.bn_eps}
    norm = {name: value for name, value in norm.items() if value is not None}
    return dataclasses.replace(
        config,
        # Where whoever loads the weights finds them.
        model_kwargs={**config.model_kwargs, **norm},
        bn_momentum=None,
        bn_eps=None,
        lr=lr,
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


def _run_folder(config: TrainConfig, data_config: dict[str, Any], world: World) -> Path:
    """Where the run's files go; refused if it holds another run's."""
    if config.resume:
        return Path(config.resume)
    if config.experiment:
        name = config.experiment
    else:
        name = f"{datetime.now():%Y%m%d-%H%M%S}-{safe_model_name(config.model)}"
        name += f"-{data_config['input_size'][-1]}"
    folder = Path(config.output) / name
    if world.is_primary and (folder / checkpoint.CONFIG).exists():
        raise UsageError(
            f"{folder} already holds a run; continue it with --resume {folder}, "
            "or choose another --experiment or --output"
        )
    for parent in (folder, *folder.parents):
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"cannot write to {folder}: {parent} is a file")
    return folder


def _wrap(config: TrainConfig, model: nn.Module, world: World) -> nn.Module:
    """The model as the training step calls it."""
    if config.torchcompile:
        model = torch.compile(  # type: ignore[assignment]
            model, backend=config.torchcompile, mode=config.torchcompile_mode
        )
    if world.size == 1:
        return model
    return DistributedDataParallel(
        model,
        device_ids=None if world.device.type == "cpu" else [world.device],
        broadcast_buffers=not config.no_ddp_bb,
    )


def _training_loss(config: TrainConfig) -> nn.Module:
    if config.jsd_loss:
        return JsdCrossEntropy(num_splits=config.aug_splits, smoothing=config.smoothing)
    mixed = bool(mixup_options(config))
    if config.bce_loss and (mixed or config.smoothing):
        weight = config.bce_pos_weight
        return BinaryCrossEntropy(
            smoothing=0.0 if mixed else config.smoothing,  # mixup smooths its targets itself
            target_threshold=config.bce_target_thresh,
            sum_classes=config.bce_sum,
            pos_weight=None if weight is None else torch.tensor(weight),
        )
    if mixed:
        return SoftTargetCrossEntropy()
    if config.smoothing:
        return LabelSmoothingCrossEntropy(smoothing=config.smoothing)
    return nn.CrossEntropyLoss()
