"""Values that follow from a configuration: keyword arguments for timm, and the learning rate."""

from typing import Any

from .train_options import TrainConfig

__all__ = ["learning_rate", "lr_scaling", "mixup_options", "model_arguments"]


def learning_rate(config: TrainConfig, ranks: int) -> float:
    """Return `--lr`, or else `--lr-base` scaled with the global batch size, as in timm.

    Args:
        config: Its `lr_base_scale` selects linear or square-root scaling; where that is empty,
            adaptive optimizers ("ada" or "lamb" in their name) take the square root.
        ranks: The number of processes, each with a batch of its own.
    """
    if config.lr is not None:
        return config.lr
    ratio = config.batch_size * ranks * config.grad_accum_steps / config.lr_base_size
    if lr_scaling(config) == "sqrt":
        ratio **= 0.5
    return config.lr_base * ratio


def lr_scaling(config: TrainConfig) -> str:
    """Return how the learning rate follows the batch size: linear or sqrt, as in timm."""
    adaptive = any(name in config.opt.lower() for name in ("ada", "lamb"))
    return config.lr_base_scale or ("sqrt" if adaptive else "linear")


def mixup_options(config: TrainConfig) -> dict[str, Any]:
    """Return timm's Mixup arguments without `num_classes`; empty if mixup and cutmix are off."""
    if config.mixup <= 0 and config.cutmix <= 0 and config.cutmix_minmax is None:
        return {}
    return {
        "mixup_alpha": config.mixup,
        "cutmix_alpha": config.cutmix,
        "cutmix_minmax": config.cutmix_minmax,
        "prob": config.mixup_prob,
        "switch_prob": config.mixup_switch_prob,
        "mode": config.mixup_mode,
        "label_smoothing": config.smoothing,
    }


def model_arguments(config: TrainConfig, num_classes: int | None) -> dict[str, Any]:
    """Return the arguments of timm.create_model that define the model, not those about its weights.

    Options that are not set are left out.
    """
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
