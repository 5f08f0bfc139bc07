"""The options of train.py, with timm's names and defaults unless the help says otherwise."""

from dataclasses import dataclass
from typing import Any

from .augmentation_options import AugmentationOptions
from .option import AT_LEAST_0, AT_LEAST_1, FRACTION, POSITIVE, option
from .options import DataOptions, DeviceOptions, InputOptions

__all__ = ["TrainConfig"]


@dataclass
class TrainDataOptions:
    """Splits for training."""

    train_split: str = option("train", "name of the training split")
    val_split: str = option("validation", "name of the validation split; empty for none")
    val_fraction: float = option(
        0.0,
        "not in timm: validate on this fraction of the training split instead, held out by a "
        "choice that is the same in every run",
        bounds=FRACTION,
    )
    test_split: str = option(
        "", "not in timm: split that the best weights are tested on, once, at the end"
    )
    max_broken_fraction: float = option(
        0.01,
        "not in timm: stop if more than this fraction of an epoch's images cannot be read; up to "
        "it they are named, and replaced by others (folders, tars and hfds data; in validation a "
        "corrupt image is always an error)",
        bounds=FRACTION,
    )
    train_num_samples: int | None = option(
        None,
        "training images: the length of a stream; else as many of the split, at random",
        bounds=AT_LEAST_1,
    )
    val_num_samples: int | None = option(
        None, "validation images, as --train-num-samples", bounds=AT_LEAST_1
    )
    epoch_repeats: float = option(
        0.0, "passes over an iterable training split per epoch", bounds=AT_LEAST_0
    )


@dataclass
class ModelOptions:
    """Model."""

    model: str = option("resnet50_emax", "name of a timm model, or a run (in timm: resnet50)")
    pretrained: bool = option(False, "start from the model's published weights")
    pretrained_path: str | None = option(
        None, "start from this file, or run, as if it held the published weights"
    )
    initial_checkpoint: str = option(
        "", "load this file, or this run's best weights, into the finished model"
    )
    num_classes: int | None = option(
        None,
        "number of classes (unlike timm, default: that of the data, where it is known)",
        bounds=AT_LEAST_1,
    )
    gp: str | None = option(None, "global pooling: avg, max, avgmax, catavgmax, fast")
    model_kwargs: dict[str, Any] = option({}, "keyword arguments of the model")
    head_init_scale: float | None = option(None, "factor on the classifier's initial weights")
    head_init_bias: float | None = option(None, "initial value of the classifier's bias")
    grad_checkpointing: bool = option(False, "recompute activations instead of storing them")
    torchcompile: str | None = option(
        None, "torch.compile backend", nargs="?", const="inductor", metavar="BACKEND"
    )
    torchcompile_mode: str | None = option(None, "torch.compile mode")
    drop: float = option(0.0, "dropout before the classifier", bounds=FRACTION)
    drop_path: float | None = option(None, "stochastic depth", bounds=FRACTION)
    drop_block: float | None = option(None, "drop block", bounds=FRACTION)
    bn_momentum: float | None = option(None, "momentum of the batch norms", bounds=FRACTION)
    bn_eps: float | None = option(None, "epsilon of the batch norms", bounds=AT_LEAST_0)
    sync_bn: bool = option(False, "batch norm statistics over all ranks")
    dist_bn: str = option(
        "reduce",
        "share running statistics between ranks after an epoch",
        choices=("reduce", "broadcast", ""),
    )
    no_ddp_bb: bool = option(False, "do not broadcast buffers between ranks")


@dataclass
class GroupingOptions:
    """Schedule of EMAX's dynamic grouping (not in timm; docs/emax.md)."""

    grouping_warmup: list[float] = option(
        [0.05, 0.2],
        "fractions of the training steps between which grouping changes from EMA's to the learned",
        nargs=2,
    )
    grouping_temperature: list[float] = option(
        [1.0, 0.5], "temperature of the choice at the first and at the last step", nargs=2
    )


@dataclass
class OptimizerOptions:
    """Optimizer."""

    opt: str = option("sgd", "name of a timm optimizer")
    opt_eps: float | None = option(None, "epsilon of the optimizer")
    opt_betas: list[float] | None = option(None, "betas of the optimizer")
    opt_kwargs: dict[str, Any] = option({}, "further keyword arguments of the optimizer")
    momentum: float = option(0.9, "momentum of the optimizer", bounds=FRACTION)
    weight_decay: float = option(
        2e-5, "weight decay; none on biases, norms and gates", bounds=AT_LEAST_0
    )
    clip_grad: float | None = option(
        None, "clip gradients at this norm or value", bounds=AT_LEAST_0
    )
    clip_mode: str = option("norm", "kind of clipping", choices=("norm", "value", "agc"))
    layer_decay: float | None = option(
        None, "layer-wise learning rate decay", bounds=(POSITIVE[0], 1)
    )
    layer_decay_min_scale: float = option(
        0.0, "lower bound of layer decay's scale", bounds=FRACTION
    )
    layer_decay_no_opt_scale: float | None = option(
        None, "freeze layers below this scale", bounds=FRACTION
    )
    batch_size: int = option(128, "images per rank and forward pass", "-b", bounds=AT_LEAST_1)
    grad_accum_steps: int = option(1, "forward passes per optimizer step", bounds=AT_LEAST_1)


@dataclass
class ScheduleOptions:
    """Learning rate schedule."""

    sched: str = option(
        "cosine",
        "timm's schedule",
        choices=(
            *("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt"),
            *("constant", "plateau", "none"),
        ),
    )
    sched_on_updates: bool = option(False, "step the schedule per optimizer step, not per epoch")
    lr: float | None = option(None, "learning rate; overrides --lr-base", bounds=AT_LEAST_0)
    lr_base: float = option(
        0.1, "learning rate = lr_base * global batch size / lr_base_size", bounds=AT_LEAST_0
    )
    lr_base_size: int = option(256, "divisor of the global batch size", bounds=AT_LEAST_1)
    lr_base_scale: str = option(
        "", "scaling with the batch size (by optimizer if empty)", choices=("", "linear", "sqrt")
    )
    lr_noise: list[float] | None = option(
        None, "fractions of the epochs with noise on and off", bounds=FRACTION
    )
    lr_noise_pct: float = option(0.67, "limit of the noise")
    lr_noise_std: float = option(1.0, "standard deviation of the noise")
    lr_cycle_mul: float = option(1.0, "factor on the length of each cycle", bounds=POSITIVE)
    lr_cycle_decay: float = option(
        0.5, "factor on the learning rate of each cycle", bounds=AT_LEAST_0
    )
    lr_cycle_limit: int = option(1, "number of cycles", bounds=AT_LEAST_1)
    lr_k_decay: float = option(1.0, "k-decay of cosine and poly", bounds=POSITIVE)
    lr_decay_fn: str | None = option(
        None,
        "form of the decay of wsd and rsqrt",
        choices=("linear", "1-sqrt", "cosine", "power", "exp"),
    )
    lr_stable_timescale: float | None = option(
        None, "timescale of rsqrt in epochs", bounds=POSITIVE
    )
    warmup_lr: float = option(1e-5, "learning rate at the start of warm-up", bounds=AT_LEAST_0)
    min_lr: float = option(0.0, "lower bound of the learning rate", bounds=AT_LEAST_0)
    epochs: int = option(300, "epochs to train", bounds=AT_LEAST_1)
    decay_milestones: list[int] = option(
        [90, 180, 270], "epochs of multistep's decays", bounds=AT_LEAST_1
    )
    decay_epochs: float = option(90.0, "epochs between decays", bounds=POSITIVE)
    warmup_epochs: int = option(5, "epochs of warm-up", bounds=AT_LEAST_0)
    warmup_prefix: bool = option(False, "warm-up comes on top of --epochs")
    cooldown_epochs: int = option(
        0, "epochs at the lowest rate on top of --epochs", bounds=AT_LEAST_0
    )
    patience_epochs: int = option(10, "patience of the plateau schedule", bounds=AT_LEAST_0)
    decay_rate: float = option(0.1, "factor of a decay", "--dr", bounds=AT_LEAST_0)


@dataclass
class AveragingOptions:
    """Exponential moving average of the weights."""

    model_ema: bool = option(False, "keep an average, validate it and publish it as the best")
    model_ema_decay: float = option(
        0.9998, "decay of the average per optimizer step", bounds=FRACTION
    )
    model_ema_warmup: bool = option(False, "warm the decay of the average up")


@dataclass
class RunOptions:
    """Run."""

    output: str = option("output/train", "folder for run directories (timm's default, spelt out)")
    experiment: str = option("", "name of the run directory in it (default: time-model-size)")
    resume: str = option(
        "",
        "continue the run in this folder, where it stood; auto: the run of "
        "--experiment if there is one, else start it",
    )
    recovery_interval: int = option(
        0, "optimizer steps between checkpoints within an epoch; 0 for none", bounds=AT_LEAST_0
    )
    recovery_minutes: float = option(
        0.0,
        "not in timm: minutes between checkpoints within an epoch; 0 for none",
        bounds=AT_LEAST_0,
    )
    checkpoint_hist: int = option(
        3,
        "newest checkpoints to keep, beside the best weights (in timm: 10, of the best)",
        bounds=AT_LEAST_1,
    )
    nonfinite: str = option(
        "stop",
        "not in timm: stop at a loss or gradient that is not finite, or skip the step",
        choices=("stop", "skip"),
    )
    loss_spike: float = option(
        0.0,
        "not in timm: a loss above this many times the median of the last 100 steps is a spike; "
        "0 for no such check",
        bounds=AT_LEAST_0,
    )
    on_spike: str = option(
        "warn",
        "not in timm: what happens at a spike of the loss; each choice names the samples",
        choices=("warn", "skip", "stop"),
    )
    seed: int = option(42, "seed of everything random", bounds=(0, 2**32 - 1))
    validation_batch_size: int | None = option(
        None,
        "images per rank and forward pass in validation (default: --batch-size)",
        "-vb",
        bounds=AT_LEAST_1,
    )
    val_interval: int = option(1, "epochs between validations", bounds=AT_LEAST_1)
    eval_metric: str = option(
        "top1", "metric by which weights are the best", choices=("top1", "top5", "loss")
    )
    log_interval: int = option(50, "optimizer steps between log lines", bounds=AT_LEAST_1)
    log_to: list[str] = option(
        [],
        "not in timm: trackers to log to as well, each a package to install",
        nargs="*",
        choices=("tensorboard", "trackio", "wandb"),
    )

    def __post_init__(self) -> None:
        self.output = self.output or "output/train"  # as timm reads an empty one


@dataclass
class TrainConfig(
    RunOptions,
    AveragingOptions,
    AugmentationOptions,
    ScheduleOptions,
    OptimizerOptions,
    GroupingOptions,
    ModelOptions,
    DeviceOptions,
    InputOptions,
    TrainDataOptions,
    DataOptions,
):
    """Train an image classifier; the options are those of timm's train.py."""
