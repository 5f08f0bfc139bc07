"""A training step without data, in which all parts of it can refuse what they do not support.

The model is on torch's meta device, whose tensors have shapes and no values, so that a step takes
no time to speak of.
"""

import random
from dataclasses import replace
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from torch import Tensor

from ...attention import EMA, EMAX
from ...errors import UsageError
from ..data.inputs import data_config_of, image_mode
from .arguments import learning_rate
from .train_options import TrainConfig

__all__ = ["create_optimizer", "create_scheduler", "try_training"]

# Optimizer steps per epoch where their number is not known yet.
SOME_STEPS = 1000

# Augmentations drawn, so many that each of a policy's is among them.
DRAWS = 100


def try_training(config: TrainConfig, model: Any, ranks: int = 1) -> None:
    """Check that a model takes the images and the options that it is to be trained with.

    Args:
        config: The configuration.
        model: On the meta device; it is changed.
        ranks: The number of processes that train.

    Raises:
        UsageError: If the images are too small, batch norm would see one value per channel, or the
            model, the optimizer, the schedule or the augmentation does not support what is asked.
    """
    # Fused kernels are for devices that hold values.
    kwargs = {k: v for k, v in config.opt_kwargs.items() if k not in ("fused", "capturable")}
    config = replace(config, lr=learning_rate(config, ranks), opt_kwargs=kwargs)
    if config.grad_checkpointing:
        try:
            model.set_grad_checkpointing(enable=True)
        except (AssertionError, AttributeError):
            raise UsageError(
                f"model {config.model} does not support --grad-checkpointing"
            ) from None
    if config.head_init_scale is not None or config.head_init_bias is not None:
        head = model.get_classifier()
        if getattr(head, "weight", None) is None or getattr(head, "bias", None) is None:
            raise UsageError(
                f"the classifier of model {config.model} has no weight and bias that "
                "--head-init-scale or --head-init-bias could set"
            )
    create_scheduler(config, create_optimizer(config, model), SOME_STEPS)
    data_config = data_config_of(config, model)
    _augment(config, data_config)
    _forward(config, model, data_config["input_size"], ranks)


def _augment(config: TrainConfig, data_config: dict[str, Any]) -> None:
    """Augment an image of the mode, unless it is RGB, which all augmentations take."""
    mode = config.input_img_mode or image_mode(config)
    names = ("no_aug", "train_crop_mode", "scale", "ratio", "hflip", "vflip", "color_jitter")
    try:
        transform: Any = create_transform(
            data_config["input_size"],
            is_training=True,
            **{name: getattr(config, name) for name in names},
            color_jitter_prob=config.color_jitter_prob,
            grayscale_prob=config.grayscale_prob or 0.0,
            gaussian_blur_prob=config.gaussian_blur_prob or 0.0,
            auto_augment=config.aa,
            mean=data_config["mean"],
            std=data_config["std"],
            use_prefetcher=not config.no_prefetcher,
            separate=config.aug_splits > 0,
        )
    except Exception as error:  # as timm's loader would raise it
        reason = " ".join(str(error).split())
        raise UsageError(f"cannot augment as asked (--aa {config.aa}): {reason}") from None
    if mode == "RGB":
        return
    state = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            random.seed(0)
            for _ in range(DRAWS):
                image: Any = Image.new(mode, (48, 40))
                for part in transform if isinstance(transform, tuple) else [transform]:
                    image = part(image)
    except Exception as error:  # Pillow and timm raise anything for other modes
        reason = " ".join(str(error).split())
        raise UsageError(
            f"images of mode {mode} cannot be augmented as asked ({reason}): leave out --aa, "
            "--grayscale-prob and --color-jitter, or give --no-aug"
        ) from None
    finally:
        random.setstate(state)


def _forward(config: TrainConfig, model: Any, size: tuple[int, ...], ranks: int) -> None:
    images = config.batch_size * max(1, config.aug_splits)
    if config.sync_bn:
        images *= ranks
    for module in model.modules():
        if isinstance(module, (EMA, EMAX)):  # they take any image and keep its shape
            module.forward = _unchanged
    # More images than two make no difference to what is refused.
    x = torch.zeros(min(images, 2), *size, device="meta")
    shape = " x ".join(map(str, size))
    try:
        with torch.no_grad():
            model.train()(x)
    except Exception as error:  # a model may raise anything for images that do not fit
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, NotImplementedError) or "meta" in reason.lower():
            return  # the model looks at values, or torch lacks an operation for that device
        if "more than 1 value per channel" in reason:
            raise UsageError(
                f"--batch-size {config.batch_size} leaves batch norm one value per channel, for "
                f"model {config.model} on images of {shape}; take a larger one"
            ) from None
        raise UsageError(f"model {config.model} on images of {shape}: {reason}") from None


def _unchanged(x: Tensor) -> Tensor:
    return x


def create_optimizer(config: TrainConfig, model: Any) -> torch.optim.Optimizer:
    """Create timm's optimizer.

    Raises:
        UsageError: If it is given wrong arguments, or needs second derivatives.
    """
    try:
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(config), **config.opt_kwargs)
    except Exception as error:  # optimizers may raise anything
        raise UsageError(f"optimizer {config.opt}: {str(error) or type(error).__name__}") from None
    if getattr(optimizer, "is_second_order", False):
        raise UsageError(f"optimizer {config.opt} needs second derivatives, which are not computed")
    return optimizer


def create_scheduler(
    config: TrainConfig, optimizer: torch.optim.Optimizer, steps_per_epoch: int
) -> tuple[Any, int]:
    """Create timm's scheduler; also returns the epochs with those that the schedule adds.

    Raises:
        UsageError: If the options make no schedule.
    """
    options: dict[str, Any] = scheduler_kwargs(
        config,  # type: ignore[arg-type]
        decreasing_metric=config.eval_metric == "loss",
    )
    try:
        return create_scheduler_v2(optimizer, **options, updates_per_epoch=steps_per_epoch)
    except (AssertionError, ValueError) as error:
        raise UsageError(f"--sched {config.sched}: {error}") from None
