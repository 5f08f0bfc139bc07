"""The commands behind train.py, validate.py and `emax`."""

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..runner import command
from . import checkpoint
from .build import build_trainer
from .config import (
    InputOptions,
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
    check_labels,
    class_names,
    data_config_of,
    evaluation_loader,
    hold_out,
    image_mode,
    left_out,
    open_split,
    same_classes,
    several_classes,
)
from .distributed import DistributedContext, open_distributed_context
from .evaluate import Metrics, evaluate, half_precision
from .loading import create_model
from .model_config import read_model_config
from .progress import Progress, working
from .signals import Stopped, catch_signals
from .sources import find_source, run_folder, weights_file

__all__ = ["read_run", "train", "validate", "validate_with"]

# The options of a run that its config.json answers, in the form that its model was trained in.
_OF_MODEL = {"model", "num_classes", "gp", "model_kwargs"} | {f.name for f in fields(InputOptions)}


@command("train.py")
def train(argv: Sequence[str], prog: str) -> int:
    """Train a model as the command line says.

    Returns:
        The exit status: 0, or 128 plus the number of the signal that stopped the run.
    """
    settings = parse_settings(TrainConfig, argv, prog)
    if settings.get("model"):
        settings["model"] = _architecture(str(settings["model"]))
    if settings.get("resume"):
        settings = _resumed(settings)
    config = from_mapping(TrainConfig, settings, "the configuration")
    try:
        with open_distributed_context(config.device, config.dist_timeout) as context:
            with working("opening the data and the model", context.is_primary):
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
    settings, run, labels = _of_run(settings, tested)
    config = from_mapping(ValidateConfig, settings, "the command line")
    if config.model is None:
        raise UsageError("nothing to validate: give --checkpoint RUN, or --model NAME --pretrained")
    arguments = {
        "num_classes": config.num_classes,
        "in_chans": config.input_size[0] if config.input_size else config.in_chans,
        "global_pool": config.gp,
        **config.model_kwargs,
    }
    arguments = {name: value for name, value in arguments.items() if value is not None}
    check_input(config, config)
    check_model(config.model, arguments)
    dataset, split = _open_data(config, run), config.split or "validation"
    if not config.class_map:
        same_classes(labels, class_names(dataset), split)
    if config.num_classes is not None:
        _check_classes(dataset, config.num_classes, split)
    # Without a checkpoint, validate the published weights, for random ones are of no interest.
    model = create_model(config.model, config.pretrained or not config.checkpoint, **arguments)
    if config.checkpoint:
        checkpoint.load_weights(model, Path(config.checkpoint))
    if config.num_classes is None:
        _check_classes(dataset, model.num_classes, split)
    check_labels(dataset, model.num_classes, split)
    if context.is_primary:
        for line in left_out(dataset):
            print(f"warning: {line}", file=sys.stderr, flush=True)
    data_config = data_config_of(config, model)
    model.to(context.device)
    loader = evaluation_loader(config, dataset, data_config, config.batch_size or 256, context)
    progress = Progress("validation", len(loader), interval=50, enabled=context.is_primary)
    amp, amp_dtype = bool(config.amp), config.amp_dtype or half_precision(context.device)
    return evaluate(model, progress.track(loader), context, amp, amp_dtype, config.channels_last)


def _of_run(
    settings: dict[str, Any], tested: bool
) -> tuple[dict[str, Any], TrainConfig | None, list[str] | None]:
    """Complete the settings of a validation by what the run says that they name.

    The run's config.json gives the model, its input and the names of its classes; its
    configuration, which need not be there, the data, the split and the rest.

    Returns:
        The settings, the configuration of the run, and the names of the classes in training; the
        last two are None where they are unknown.
    """
    named, weights = settings.get("model"), settings.get("checkpoint")
    if weights and not named:
        folder = run_folder(str(weights))
        if (folder / checkpoint.CONFIG).is_file() and not _describes_model(folder):
            named = read_run(folder).model  # a copy of the weights and the configuration alone
    source = find_source(str(named or weights)) if named or weights else None
    if source is None or not (weights or source.folder):
        return settings, None, None
    own_model = not (named and weights)  # else the one of the flag has the weights of the run
    folder = (source.folder if own_model else None) or run_folder(str(weights))
    file = weights_file(str(weights or source.weights or folder))
    settings = {**settings, "model": source.model, "checkpoint": str(file)}
    run = read_run(folder) if (folder / checkpoint.CONFIG).is_file() else None
    described = read_model_config(folder) if own_model or _describes_model(folder) else {}
    defaults = _settings_of(run) if run else {}
    if own_model:
        size = described.get("pretrained_cfg", described).get("input_size", (3,))
        for name in _OF_MODEL & defaults.keys():
            del defaults[name]
        defaults["in_chans"] = size[0]
    if run and not tested:
        run = replace(run, test_split="")
    labels = described.get("label_names") if run or weights else None
    return layered(defaults, settings), run, labels if isinstance(labels, list) else None


def _describes_model(folder: Path) -> bool:
    return (folder / checkpoint.MODEL_CONFIG).is_file()


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
    folder = run_folder(str(path))
    named, saved = {path, *path.parents}, checkpoint.checkpoints(folder)
    if folder / checkpoint.CHECKPOINTS in named and not named & set(saved[:1]):
        raise UsageError(
            f"a run continues from its newest checkpoint: give --resume {folder}; "
            f"a new run starts from the weights of {path} with --initial-checkpoint"
        )
    before = _run_settings(folder)
    if (opt := settings.get("opt")) not in (None, before.get("opt", TrainConfig.opt)):
        raise UsageError(
            f"{folder} was trained with --opt {before.get('opt', TrainConfig.opt)}, whose state "
            f"{opt} cannot take over; a new run starts from its weights with --initial-checkpoint"
        )
    if any(name.startswith("lr_base") for name in settings):
        before.pop("lr", None)  # it followed from them
    return layered(before, {**settings, "resume": str(folder)})


def _architecture(name: str) -> str:
    """Return timm's name of the model to train, which a run may define."""
    source = find_source(name)
    if source.weights is not None:
        raise UsageError(
            f"--model names a model or a run, not weights: give --model {source.folder}, and "
            f"{source.weights} with --initial-checkpoint"
        )
    # The run goes on elsewhere, too.
    return f"local-dir:{source.folder.absolute()}" if source.folder else source.model


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
    checkpoint.read_checked(path)
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


def _check_classes(dataset: Any, num_classes: int, split: str) -> None:
    found = class_names(dataset)
    several_classes(found, f"split {split!r}")
    if found is not None and len(found) > num_classes:
        raise UsageError(
            f"the data has {len(found)} classes, the model {num_classes}; "
            "is the data folder the one of a split, with a folder per class?"
        )
