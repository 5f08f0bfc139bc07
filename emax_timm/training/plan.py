"""`emax plan`: estimate the memory, the steps and the time that a training run will need.

The figures follow from the options and from a model without data (torch's meta device); no GPU
and no images are used.
"""

import dataclasses
import math
from collections.abc import Sequence

from ..runner import command
from .config import (
    Parser,
    TrainConfig,
    UsageError,
    from_mapping,
    learning_rate,
    parse_settings,
)
from .config.checks import check_config
from .plan_costs import model_costs, optimizer_and_epochs
from .speeds import SETTING, SIZE, measured_speed

__all__ = ["Plan", "make_plan", "plan", "report"]

IMAGENET_IMAGES = 1_281_167
IMAGE_BYTES = 110_000  # an estimate: 141 GB of ImageNet's training images over their number
FLOAT = 4  # bytes; weights, gradients and states are float32 under --amp too


@dataclasses.dataclass(frozen=True)
class Plan:
    """The memory, the steps, the data and the time that a training run needs.

    Args:
        input_size: Channels, height and width of the input.
        macs: Multiply-accumulates per image in evaluation.
        activation_bytes: Bytes per image that autograd keeps for the backward pass in float32.
        weight_bytes: Bytes of the parameters and buffers.
        gradient_bytes: Bytes of the gradients, with the copy that several ranks send each other.
        optimizer_bytes: Bytes of the optimizer's states.
        average_bytes: Bytes of the averaged weights, 0 without averaging.
        gpus: Number of GPUs, with one rank on each.
        batch_size: Images per rank and forward pass.
        global_batch: Images per optimizer step, over all ranks.
        learning_rate: Learning rate after scaling, at the end of warm-up.
        epochs: Number of epochs, with those that the schedule adds to --epochs.
        images_per_epoch: Training images read in an epoch, over all ranks.
        images_per_second: Training speed in total, over all GPUs; None if it is unknown.
        card: The card that this speed was measured on; None if it was given or is unknown.
        hours: Hours of training, without validation; None if the speed is unknown.
    """

    model: str
    num_classes: int
    input_size: tuple[int, ...]
    parameters: int
    macs: int
    activation_bytes: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    average_bytes: int
    gpus: int
    batch_size: int
    grad_accum_steps: int
    global_batch: int
    learning_rate: float
    epochs: int
    steps_per_epoch: int
    images_per_epoch: int
    images_per_second: float | None
    card: str | None
    hours: float | None

    @property
    def fixed_bytes(self) -> int:
        """Bytes per GPU that do not depend on the batch size."""
        parts = (self.weight_bytes, self.gradient_bytes, self.optimizer_bytes, self.average_bytes)
        return sum(parts)

    @property
    def batch_bytes(self) -> int:
        """Bytes of activations in float32, per GPU."""
        return self.activation_bytes * self.batch_size

    @property
    def images(self) -> int:
        """Training images read in all epochs, over all ranks."""
        return self.images_per_epoch * self.epochs


@command("emax plan")
def plan(argv: Sequence[str], prog: str) -> int:
    """Print what a configuration will need, as the command line says; returns the exit status."""
    options, flags = _parser(prog).parse_known_args(argv)
    settings = parse_settings(TrainConfig, ["-c", options.config, *flags], prog)
    config = from_mapping(TrainConfig, settings, source="the command line")
    print(report(make_plan(config, options.gpus, options.train_images, options.images_per_second)))
    return 0


def make_plan(
    config: TrainConfig,
    gpus: int,
    train_images: int = IMAGENET_IMAGES,
    images_per_second: float | None = None,
) -> Plan:
    """Estimate what a training run will need.

    Args:
        gpus: Number of GPUs, with one rank on each.
        train_images: Number of images in the training split.
        images_per_second: Training speed in total, over all GPUs; None for that of `speeds`, if the
            model is there.

    Raises:
        UsageError: If the configuration is invalid, or the numbers are too small for a run.
    """
    _check_numbers(gpus, train_images, images_per_second)
    check_config(config, gpus)
    if ":" in config.model:
        raise UsageError(f"a plan needs the name of a registered model, not {config.model}")

    ranks_batch = config.batch_size * gpus
    batches = _kept(config, train_images) // ranks_batch  # the remainder is dropped
    if batches == 0:
        raise UsageError(
            f"{train_images} training images make no batch of {config.batch_size} "
            f"on {gpus} GPUs; lower --batch-size"
        )
    config = dataclasses.replace(config, lr=learning_rate(config, gpus))
    steps = -(-batches // config.grad_accum_steps)
    states, epochs = optimizer_and_epochs(config, steps)
    model, costs = model_costs(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    weights = FLOAT * (parameters + sum(buffer.numel() for buffer in model.buffers()))
    images = batches * ranks_batch
    speed, card = _speed(config, gpus, costs["input_size"], images_per_second)
    return Plan(
        **costs,
        model=config.model,
        parameters=parameters,
        weight_bytes=weights,
        gradient_bytes=FLOAT * parameters * (2 if gpus > 1 else 1),
        optimizer_bytes=round(FLOAT * parameters * states),
        average_bytes=weights if config.model_ema else 0,
        gpus=gpus,
        batch_size=config.batch_size,
        grad_accum_steps=config.grad_accum_steps,
        global_batch=ranks_batch * config.grad_accum_steps,
        learning_rate=config.lr or 0.0,
        epochs=epochs,
        steps_per_epoch=steps,
        images_per_epoch=images,
        images_per_second=speed,
        card=card,
        hours=None if speed is None else images * epochs / speed / 3600,
    )


def _speed(
    config: TrainConfig, gpus: int, size: tuple[int, ...], given: float | None
) -> tuple[float | None, str | None]:
    """Return images per second over all GPUs, and the card on which they were measured."""
    if given is not None or config.model_kwargs:  # which may make another model of it
        return given, None
    _, height, width = size
    one = measured_speed(config.model, height, width)
    return (None, None) if one is None else (gpus * one.images, one.card)


def _check_numbers(gpus: int, train_images: int, images_per_second: float | None) -> None:
    for name, value in (("--gpus", gpus), ("--train-images", train_images)):
        if value < 1:
            raise UsageError(f"{name} must be at least 1, not {value}")
    if images_per_second is not None and not 0 < images_per_second < math.inf:
        raise UsageError(f"--images-per-second must be positive, not {images_per_second}")


def _kept(config: TrainConfig, train_images: int) -> int:
    """Return the number of training images without those held out for validation."""
    return train_images - round(train_images * config.val_fraction)


def _rows(made: Plan) -> list[tuple[str, ...]]:
    """Return the lines of the report: a name, a value and what the value means."""
    gpus = "1 GPU" if made.gpus == 1 else f"{made.gpus} GPUs"
    batch = f"{gpus} x {made.batch_size} images x {made.grad_accum_steps}"
    volume = made.images_per_epoch * IMAGE_BYTES
    sends = " and the copy that is sent" if made.gpus > 1 else ""
    speed = hours = "unknown", "time an epoch, then give --images-per-second: see below"
    if made.hours is not None and made.images_per_second is not None:
        where = f"measured on one {made.card}, times {made.gpus}" if made.card else "as given"
        speed = f"{made.images_per_second:,.0f}", where
        hours = f"{made.hours:.1f}", "of training, without validation"
    return [
        ("model", made.model, f"{made.num_classes} classes"),
        ("input", " x ".join(map(str, made.input_size)), ""),
        ("parameters", f"{made.parameters / 1e6:.2f} M", ""),
        ("MACs", f"{made.macs / 1e9:.3f} G", "of one image in evaluation"),
        ("", "", ""),
        ("memory of a GPU:", "", ""),
        ("  weights", _giga(made.weight_bytes), "float32, with buffers"),
        ("  gradients", _giga(made.gradient_bytes), f"float32{sends}"),
        ("  optimizer", _giga(made.optimizer_bytes), "its states"),
        ("  average", _giga(made.average_bytes), "the averaged weights"),
        ("  activations", _giga(made.batch_bytes), _activation_note(made)),
        ("  total", _giga(made.fixed_bytes + made.batch_bytes), "without short-lived memory"),
        ("", "", ""),
        ("global batch", f"{made.global_batch:,}", f"{batch} forward passes"),
        ("learning rate", f"{made.learning_rate:g}", "after warm-up and scaling"),
        ("epochs", f"{made.epochs:,}", "with those that the schedule adds"),
        ("steps per epoch", f"{made.steps_per_epoch:,}", "of the optimizer"),
        ("steps", f"{made.steps_per_epoch * made.epochs:,}", "in all"),
        ("", "", ""),
        ("images per epoch", f"{made.images_per_epoch:,}", "a last incomplete batch is dropped"),
        ("images", f"{made.images:,}", "in all, without validation"),
        ("data per epoch", _giga(volume), f"an estimate: {IMAGE_BYTES // 1000} kB per image"),
        ("data", f"{volume * made.epochs / 1e12:.1f} TB", "an estimate too"),
        ("images/s", *speed),
        ("hours", *hours),
    ]


def report(made: Plan) -> str:
    """Format the plan as aligned lines: a name, a value and what the value means."""
    rows = _rows(made)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    lines = [
        f"{name:<{widths[0]}}  {value:>{widths[1]}}  {note}".rstrip() for name, value, note in rows
    ]
    if made.card:
        lines += [
            "",
            f"That speed is of {SETTING},",
            f"images of {SIZE} x {SIZE} pixels (others by their pixels) that need no loading, and",
            "GPUs that do not wait for each other. Other cards and small batches take longer.",
        ]
    if made.hours is None or made.card:
        lines += [
            "",
            "To measure the speed, train on these GPUs with --epochs 2 --val-split '': it is the",
            "images per epoch over the seconds of the second epoch in the run's log.csv.",
        ]
    return "\n".join(lines)


def _activation_note(made: Plan) -> str:
    return f"float32, {made.activation_bytes / 1e6:.0f} MB per image; --amp about halves it"


def _giga(amount: float) -> str:
    return f"{amount / 1e9:.2f} GB"


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog,
        description="Work out what a training run will need, without a GPU or data.",
        epilog="Further flags are those of train, and take precedence over the file.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file or name of a recipe")
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of all hosts")
    parser.add_argument(
        "--images-per-second",
        type=float,
        metavar="X",
        help="training speed in total, over all GPUs, as measured",
    )
    parser.add_argument(
        "--train-images",
        type=int,
        default=IMAGENET_IMAGES,
        metavar="N",
        help="images of the training split (default: ImageNet's %(default)s)",
    )
    return parser
