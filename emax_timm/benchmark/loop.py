"""`emax benchmark train`: the time of our training loop against timm's.

Our `Trainer`, and a loop as in timm's train.py from timm's own components, train the same model on
the same images with the same augmentation, an epoch each in turn. Neither validates nor writes
checkpoints. Under torchrun both train on all ranks.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import timm
import torch
from timm.data import FastCollateMixup, create_loader
from timm.loss import SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import ModelEmaV3, dispatch_clip_grad, distribute_bn
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..tables import heading, row
from ..training.build import build_trainer
from ..training.config import TrainConfig, mixup_options
from ..training.data import image_mode, open_split
from ..training.distributed import DistributedContext
from ..training.evaluate import autocast
from ..training.progress import Timing
from ..training.trainer import Trainer
from .timing import described, machine

__all__ = ["NAMES", "RECIPE", "Epoch", "compare", "our_epochs", "report", "timms_epochs"]

# The options of a typical recipe that give the loop and the loader work.
RECIPE: dict[str, Any] = {
    **{"mixup": 0.2, "cutmix": 1.0, "aa": "rand-m7-mstd0.5-inc1", "reprob": 0.25},
    **{"model_ema": True, "clip_grad": 5.0, "opt": "lamb", "lr": 0.001, "weight_decay": 0.02},
    **{"sched_on_updates": True, "warmup_epochs": 0, "amp_dtype": "bfloat16", "val_split": ""},
}
NAMES = ("ours", "timm's parts in a plain loop")


class Epoch(NamedTuple):
    """The time of one training epoch on this rank.

    Args:
        seconds: Wall time from before the first batch is requested until the device is done.
        cpu: CPU time of all threads of this process in seconds. Other processes do not count:
            neither those that slow it down, nor the workers of the loader.
        steps: Optimizer steps.
        timing: The split of the wall time into data wait and compute.
    """

    seconds: float
    cpu: float
    steps: int
    timing: Timing


def compare(config: TrainConfig, context: DistributedContext) -> dict[str, Any]:
    """Train with both loops in turn, and compare their times.

    Args:
        config: The options of the training run; the first of its epochs is a warm-up.
        context: The distributed context.

    Returns:
        `loops`, medians over all epochs but each loop's first, and `ratios` and `cpu_ratios`, ours
        over timm's in wall and CPU time per step, for each pair of epochs.
    """
    trainer = build_trainer(config, context)
    loops = our_epochs(trainer), timms_epochs(trainer.config, context)
    pairs: list[Any] = []
    for number in range(config.epochs):
        # The order alternates, so that a machine that slows down favours neither loop.
        order = (0, 1) if number % 2 else (1, 0)
        epochs = {which: next(loops[which]) for which in order}
        pairs.append((epochs[0], epochs[1]))
    ratios = [(a.seconds / a.steps) / (b.seconds / b.steps) for a, b in pairs[1:]]
    cpu_ratios = [(a.cpu / a.steps) / (b.cpu / b.steps) for a, b in pairs[1:]]
    return {
        "machine": machine(context.device),
        "model": config.model,
        "ranks": context.size,
        "workers": config.workers,
        "batch_size": config.batch_size,
        "epochs": len(ratios),
        "loops": {name: _medians(epochs[1:]) for name, *epochs in zip(NAMES, *pairs, strict=True)},
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
    }


def our_epochs(trainer: Trainer) -> Iterator[Epoch]:
    """Train with our trainer, and yield the time of each epoch."""
    while trainer.epoch < trainer.epochs:
        first, start = trainer.step, _now()
        trainer.train_epoch()
        _synchronise(trainer.context)
        yield Epoch(*_since(start), trainer.step - first, trainer.timing)
        trainer.epoch += 1
        if trainer.scheduler is not None:
            trainer.scheduler.step(trainer.epoch)
        trainer.losses, trainer.timing = [], Timing()


def timms_epochs(config: TrainConfig, context: DistributedContext) -> Iterator[Epoch]:
    """Train as timm's train.py does, and yield the time of each epoch.

    Args:
        config: The trainer's config, in which all derived values are filled in.
        context: The distributed context.
    """
    model: Any = timm.create_model(config.model, num_classes=config.num_classes)
    model.to(context.device)
    averaged = ModelEmaV3(model, decay=config.model_ema_decay)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(config))
    criterion = SoftTargetCrossEntropy()
    loader: Any = _timms_loader(config, context)
    schedule: dict[str, Any] = scheduler_kwargs(config)
    scheduler: Any = create_scheduler_v2(optimizer, **schedule, updates_per_epoch=len(loader))[0]
    network: nn.Module = model
    if context.size > 1:
        places = None if context.device.type == "cpu" else [context.device]
        network = DistributedDataParallel(model, device_ids=places)
    step = 0
    for epoch in range(config.epochs):
        first, timing, start = step, Timing(), _now()
        if context.size > 1:
            loader.sampler.set_epoch(epoch)
        network.train()
        for images, labels in timing.waiting(loader):
            with timing.computing(len(labels) * context.size):
                with autocast(context, bool(config.amp), config.amp_dtype):
                    loss = criterion(network(images), labels)
                loss.backward()
                dispatch_clip_grad(model_parameters(model), config.clip_grad)  # type: ignore
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                averaged.update(model, step=step)
                scheduler.step_update(step)
            if context.is_primary and (step - first) % config.log_interval == 0:
                print(f"timm's  step {step}  loss: {loss.item():.4g}", file=sys.stderr)
        if context.size > 1:
            distribute_bn(model, context.size, reduce=True)
        _synchronise(context)
        yield Epoch(*_since(start), step - first, timing)
        scheduler.step(epoch + 1)


def _timms_loader(config: TrainConfig, context: DistributedContext) -> Any:
    dataset = open_split(
        config,
        config.train_split,
        input_img_mode=image_mode(config),
        training=True,
        batch_size=config.batch_size,
    )
    arguments: dict[str, Any] = {
        "input_size": config.input_size,
        "batch_size": config.batch_size,
        "is_training": True,
        "re_prob": config.reprob,
        "re_mode": config.remode,
        "re_count": config.recount,
        "scale": config.scale,
        "ratio": config.ratio,
        "hflip": config.hflip,
        "color_jitter": config.color_jitter,
        "auto_augment": config.aa,
        "interpolation": config.train_interpolation,
        "mean": config.mean,
        "std": config.std,
        "num_workers": config.workers,
        "distributed": context.size > 1,
        "pin_memory": config.pin_mem,
        "device": context.device,
    }
    mixup: dict[str, Any] = {**mixup_options(config), "num_classes": config.num_classes}
    return create_loader(dataset, **arguments, collate_fn=FastCollateMixup(**mixup))


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def _since(start: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _now()
    return wall - start[0], cpu - start[1]


def _synchronise(context: DistributedContext) -> None:
    if context.device.type == "cuda":
        torch.cuda.synchronize(context.device)


def _medians(epochs: Sequence[Epoch]) -> dict[str, float]:
    """Return the medians over epochs; `steps` and `images` are sums."""
    return {
        "seconds_per_step": median(epoch.seconds / epoch.steps for epoch in epochs),
        "data_wait_per_step": median(epoch.timing.wait / epoch.steps for epoch in epochs),
        "compute_per_step": median(epoch.timing.compute / epoch.steps for epoch in epochs),
        "cpu_per_step": median(epoch.cpu / epoch.steps for epoch in epochs),
        "images_per_second": median(epoch.timing.images / epoch.seconds for epoch in epochs),
        "steps": sum(epoch.steps for epoch in epochs),
        "images": sum(epoch.timing.images for epoch in epochs),
    }


def report(found: dict[str, Any]) -> str:
    """Format the result of `compare` as Markdown."""
    columns = ("ms/step", "data wait", "compute", "CPU ms", "images/s", "steps", "images")
    lines = heading(["loop", *columns])
    for name, figures in found["loops"].items():
        values = list(figures.values())
        milliseconds = [f"{1000 * value:.1f}" for value in values[:4]]
        lines.append(row([name, *milliseconds, *(f"{value:.0f}" for value in values[4:])]))
    each = f"batch {found['batch_size']} on each of {found['ranks']} ranks"
    return "\n".join(
        [
            *lines,
            "",
            f"Time per step, ours / timm's: {_spread(found['ratios'])}; CPU time per step: "
            f"{_spread(found['cpu_ratios'])}. Medians of {found['epochs']} epochs in turns, the "
            f"least and greatest ratio in brackets. {found['model']}, {each}, {found['workers']} "
            f"workers; {described(found['machine'])}.",
        ]
    )


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.3f} ({min(values):.3f} to {max(values):.3f})"
