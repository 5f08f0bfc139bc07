"""The commands behind train.py, validate.py and `emax`."""

import json
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..runner import command
from . import checkpoint
from .build import build_trainer
from .config import (
    TrainConfig,
    UsageError,
    ValidateConfig,
    from_mapping,
    layered,
    parse_settings,
    read_yaml,
)
from .config.checks import check_model
from .config.combinations import check_input
from .data import (
    class_names,
    data_config_of,
    evaluation_loader,
    hold_out,
    image_mode,
    open_split,
    same_classes,
)
from .distributed import DistributedContext, open_distributed_context
from .evaluate import Metrics, evaluate, half_precision
from .loading import create_model
from .progress import Progress
from .signals import Stopped, catch_signals

__all__ = ["read_run", "train", "validate", "validate_with"]


@command("train.py")
def train(argv: Sequence[str], prog: str) -> int:
    """Train a model as the command line says.

    Returns:
        The exit status: 0, or 128 plus the number of the signal that stopped the run.
    """
    settings = parse_settings(TrainConfig, argv, prog)
    if settings.get("resume"):
        settings = _resumed(settings)
    config = from_mapping(TrainConfig, settings, "the configuration")
    try:
        with open_distributed_context(config.device, config.dist_timeout) as context:
            trainer = build_trainer(config, context)
            with catch_signals() as trainer.stop:
                trainer.run()
    except Stopped as stopped:  # a signal asked for it, which is no error
        print(f"{prog}: {stopped}; continue with --resume", file=sys.stderr)
        return 128 + stopped.number
    return 0


@command("validate.py")
def validate(argv: Sequence[str], prog: str) -> int:
    """Validate a model as the command line says; returns the exit status."""
    settings = parse_settings(ValidateConfig, argv, prog)
    given = from_mapping(ValidateConfig, settings, "the command line")
    with open_distributed_context(given.device, given.dist_timeout) as context:
        metrics = validate_with(settings, context)
        if context.is_primary:
            print(metrics)
    return 0


def validate_with(
    settings: dict[str, Any], context: DistributedContext, tested: bool = True
) -> Metrics:
    """Return the metrics of a model or of a run's checkpoint.

    Args:
        settings: Options of `ValidateConfig` that were given; a run's configuration beside the
            checkpoint fills in the others.
        context: The distributed context, whose ranks share the images.
        tested: Use the run's test split if it has one; False uses its validation split.

    Raises:
        UsageError: If the settings, the data or the checkpoint are invalid.
    """
    run = _run_of(settings)
    if run is not None:
        run = run if tested else replace(run, test_split="")
        settings = layered(_settings_of(run), settings)
    config = from_mapping(ValidateConfig, settings, "the command line")
    if config.model is None:
        raise UsageError(
            "nothing to validate: give --checkpoint FILE, or --model NAME --pretrained"
        )
    arguments = {
        "num_classes": config.num_classes,
        "in_chans": config.input_size[0] if config.input_size else config.in_chans,
        "global_pool": config.gp,
        **config.model_kwargs,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    check_input(config, config)
    check_model(config.model, arguments)
    dataset = _open_data(config, run)
    if config.num_classes is not None:
        _check_classes(config, dataset, config.num_classes)
    # Without a checkpoint, validate the published weights, for random ones are of no interest.
    model = create_model(config.model, config.pretrained or not config.checkpoint, **arguments)
    if config.checkpoint:
        checkpoint.load_weights(model, Path(config.checkpoint))
    if config.num_classes is None:
        _check_classes(config, dataset, model.num_classes)
    data_config = data_config_of(config, model)
    model.to(context.device)
    loader = evaluation_loader(config, dataset, data_config, config.batch_size or 256, context)
    progress = Progress("validation", len(loader), interval=50, enabled=context.is_primary)
    amp, amp_dtype = bool(config.amp), config.amp_dtype or half_precision(context.device)
    return evaluate(model, progress.track(loader), context, amp, amp_dtype, config.channels_last)


def _run_of(settings: dict[str, Any]) -> TrainConfig | None:
    """Return the configuration beside the checkpoint to validate; None if there is none."""
    checkpoint_file = settings.get("checkpoint")
    if not checkpoint_file:
        return None
    if not Path(checkpoint_file).is_file():
        raise UsageError(f"there is no checkpoint {checkpoint_file}")
    folder = Path(checkpoint_file).parent
    if (folder / checkpoint.CONFIG).is_file():
        return read_run(folder)
    if "model" not in settings:
        raise UsageError(
            f"there is no {checkpoint.CONFIG} beside {checkpoint_file}; "
            "name the model with --model, and its classes with --num-classes"
        )
    return None


def _resumed(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run to resume, overridden by those given."""
    if settings["resume"] == "auto":
        if not settings.get("experiment"):
            raise UsageError("--resume auto needs the name of the run: --experiment NAME")
        output = from_mapping(TrainConfig, settings, "the configuration").output
        path = Path(output, settings["experiment"])
        if not checkpoint.checkpoints(path):
            return settings  # there is nothing to resume: a new run starts
    else:
        path = Path(settings["resume"])
    folder = path.parent if path.is_file() else path  # timm's --resume takes a file
    return layered(_run_settings(folder), {**settings, "resume": str(folder)})


def read_run(folder: Path) -> TrainConfig:
    """Return the resolved configuration of the run in a folder.

    Raises:
        UsageError: If the folder has no configuration of a run, or an invalid one.
    """
    return from_mapping(TrainConfig, _run_settings(folder), str(folder / checkpoint.CONFIG))


def _run_settings(folder: Path) -> dict[str, Any]:
    path = folder / checkpoint.CONFIG
    if not path.is_file():
        raise UsageError(f"{folder} is not a run directory: it has no {checkpoint.CONFIG}")
    return read_yaml(path)


def _settings_of(run: TrainConfig) -> dict[str, Any]:
    """Return the settings that a validation takes over from its run."""
    shared = {field.name for field in fields(ValidateConfig)} & {
        f.name for f in fields(TrainConfig)
    }
    settings = {name: getattr(run, name) for name in shared - {"pretrained"}}
    settings["batch_size"] = run.validation_batch_size or run.batch_size
    return settings


def _open_data(config: ValidateConfig, run: TrainConfig | None) -> Any:

    own_data = run is not None and config.data_dir == run.data_dir

    def split(name: str) -> Any:
        return open_split(
            config,
            name,
            must_exist=own_data or config.split is not None,
            input_img_mode=image_mode(config),
            training=False,
            batch_size=config.batch_size or 256,
            num_samples=config.num_samples,
        )

    if config.split is not None:
        return split(config.split)
    if run is None:
        return split("validation")
    if run.test_split:
        return split(run.test_split)
    if run.val_fraction:
        return hold_out(split(run.train_split), run.val_fraction)[1]
    return split(run.val_split)


def _check_classes(config: ValidateConfig, dataset: Any, num_classes: int) -> None:
    found = class_names(dataset)
    described = Path(config.checkpoint).parent / checkpoint.MODEL_CONFIG
    if config.checkpoint and described.is_file() and not config.class_map:
        try:
            names = json.loads(described.read_text(encoding="utf-8")).get("label_names")
        except (AttributeError, ValueError) as error:
            raise UsageError(f"{described} does not describe a model: {error}") from None
        same_classes(names, found, config.split or "validation")
    if found is not None and len(found) > num_classes:
        raise UsageError(
            f"the data has {len(found)} classes, the model {num_classes}; "
            "is the data folder the one of a split, with a folder per class?"
        )
