"""What is said at the start of a run: settings that are valid, and not what one expects of them."""

from collections.abc import Iterator
from typing import Any

from .config import TrainConfig, learning_rate
from .config.arguments import lr_scaling

__all__ = ["notices"]

# The averaged weights may hold this fraction of the weights that they start from.
NEGLIGIBLE = 0.05

# Parts of the names of optimizers whose steps have the size of the learning rate, whatever the
# gradients, and a rate that is above all that they are used with.
ADAPTIVE, HIGH = ("adam", "adan", "adopt", "lamb", "lion"), 0.02


def notices(
    config: TrainConfig, ranks: int, model: Any, size: tuple[int, ...], epochs: int, steps: int
) -> Iterator[str]:
    """Yield one line for each thing about a run that its user should know before it starts.

    Args:
        config: The configuration as it was given: its `lr` is None where it is to be derived.
        ranks: The number of processes that train.
        model: The model.
        size: Channels, height and width of its input.
        epochs: The number of epochs, with those that the schedule adds.
        steps: Optimizer steps per epoch.
    """
    if config.lr is None:
        yield _derived_rate(config, ranks)
    yield from _schedule(config, learning_rate(config, ranks), epochs, steps)
    if config.model_ema and not config.model_ema_warmup:
        yield from _averaging(config.model_ema_decay, epochs * steps)
    if config.bce_loss and not (config.smoothing or config.mixup or config.cutmix):
        yield (
            "--bce-loss has no effect without --smoothing, --mixup or --cutmix, as in timm: "
            "the loss is cross entropy"
        )
    stride = _stride(model)
    if min(size[1:]) < stride:
        yield (
            f"images of {size[1]} x {size[2]} pixels are smaller than the stride of "
            f"{config.model}, {stride}: its last map has a single row or column"
        )


def _remaining_start(decay: float, steps: int) -> float:
    """Return how much of the averaged weights are those after the first step, which begin them."""
    return decay ** max(0, steps - 1)


def _derived_rate(config: TrainConfig, ranks: int) -> str:
    rate, batch = learning_rate(config, ranks), config.batch_size * ranks * config.grad_accum_steps
    root = "the square root of " if lr_scaling(config) == "sqrt" else ""
    line = (
        f"the learning rate is {rate:.4g}: --lr-base {config.lr_base:g} times {root}"
        f"{batch} / {config.lr_base_size}, the global batch over --lr-base-size; --lr sets it"
    )
    if rate > HIGH and any(part in config.opt.lower() for part in ADAPTIVE):
        line += f". This is far above what {config.opt} is used with; try --lr 0.001"
    return line


def _schedule(config: TrainConfig, rate: float, epochs: int, steps: int) -> Iterator[str]:
    warmup = config.warmup_epochs
    if config.sched != "none" and not config.warmup_prefix and 0 < epochs <= warmup:
        # The rate rises from step to step of the schedule; the last one is not followed by another.
        reached = (epochs - (1 / steps if config.sched_on_updates else 1)) / warmup
        highest = config.warmup_lr + (rate - config.warmup_lr) * reached
        yield (
            f"warm-up takes {_count(warmup, 'epoch')} and the run has {epochs}: the learning rate "
            f"never exceeds {highest:.4g} of {rate:.4g}; --warmup-epochs {epochs // 5} would fit"
        )
    if config.epochs == 1:
        return  # there is no epoch in which it could decay
    if config.sched == "step" and config.decay_epochs >= config.epochs:
        yield (
            f"the learning rate never decays: --decay-epochs {config.decay_epochs:g} is not within "
            f"the run's {_count(config.epochs, 'epoch')}; "
            f"--decay-epochs {max(1, config.epochs // 3)} would fit"
        )
    if config.sched == "multistep" and min(config.decay_milestones) >= config.epochs:
        thirds = sorted({max(1, config.epochs * part // 3) for part in (1, 2)})
        yield (
            f"the learning rate never decays: no milestone of --decay-milestones is within the "
            f"run's {_count(config.epochs, 'epoch')}; "
            f"--decay-milestones {' '.join(map(str, thirds))} would fit"
        )


def _averaging(decay: float, steps: int) -> Iterator[str]:
    left = _remaining_start(decay, steps)
    if left <= NEGLIGIBLE:
        return
    window = f"spans about {1 / (1 - decay):.0f} steps" if decay < 1 else "never moves"
    fits = f"--model-ema-decay {1 - 5 / steps:.3g}" if steps > 5 else "no --model-ema"
    yield (
        f"the averaged weights, which are validated and published, would still be {left:.0%} the "
        f"start at the end: --model-ema-decay {decay:g} {window}, the run has {steps}; "
        f"{fits} would fit, or --model-ema-warmup"
    )


def _stride(model: Any) -> int:
    """Return the stride of the model's last map; 1 if the model does not say."""
    infos = getattr(model, "feature_info", None) or []
    infos = infos if isinstance(infos, list) else getattr(infos, "info", [])
    return max((int(info.get("reduction", 1)) for info in infos), default=1)


def _count(number: int, name: str) -> str:
    return f"{number} {name}" + ("s" if number != 1 else "")
