"""The `emax export` command."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timm.models._features import FeatureGetterNet

from ..models.export_file import FORMATS, check_export, export_model
from ..runner import command
from ..training.config import (
    AT_LEAST_0,
    AT_LEAST_1,
    UsageError,
    from_mapping,
    option,
    parse_settings,
)
from ..training.loading import load_model
from ..training.progress import working
from ..training.sources import find_source

__all__ = ["ExportConfig", "export"]


@dataclass
class ExportConfig:
    """Export a timm model to a file that runs without this package, and verify the file."""

    model: str | None = option(
        None,
        "name of a timm model, run directory or checkpoint in one, or hf-hub:ORG/NAME",
        positional=True,
        metavar="MODEL",
    )
    output: str | None = option(None, "file to write", metavar="FILE")
    format: str | None = option(
        None,
        "onnx, or torch for torch.export's archive (default: by the suffix, .onnx or .pt2)",
        choices=tuple(FORMATS.values()),
    )
    checkpoint: str | None = option(
        None, "weights: a .safetensors file, or a run directory", metavar="FILE"
    )
    pretrained: bool = option(
        False, "published weights (always those of a run or from hf-hub:, without --checkpoint)"
    )
    num_classes: int | None = option(
        None, "number of classes; 0 for pooled features", bounds=AT_LEAST_0
    )
    img_size: int | None = option(
        None, "side of the images (default: as in the model's config)", bounds=AT_LEAST_1
    )
    model_kwargs: dict[str, Any] = option({}, "keyword arguments of the model")
    features_only: bool = option(False, "feature maps of all stages instead of logits")
    fixed_size: bool = option(False, "take images of this size only")
    fixed_batch: bool = option(False, "take one image at a time")
    overwrite: bool = option(False, "replace the file if there is one")


@command("emax export")
def export(argv: Sequence[str], prog: str) -> int:
    """Export a model as the command line says, and return the exit status.

    The status is 2 for an error that the user can fix, and 1 for a model that cannot be exported or
    whose file does not reproduce it. An error leaves no new file behind, and an existing file
    unchanged.
    """
    settings = parse_settings(ExportConfig, argv, prog)
    config = from_mapping(ExportConfig, settings, "the command line")
    if config.model is None or config.output is None:
        raise UsageError("nothing to export: give MODEL --output FILE")
    path = Path(config.output)
    # Check the target before any weights are downloaded.
    file_format = check_export(path, config.format, config.overwrite)
    with working(f"loading {config.model}") as progress:
        model, input_size, trained = _build(config)
        report = export_model(
            model,
            path,
            file_format,
            input_size=input_size,
            fixed_size=config.fixed_size,
            fixed_batch=config.fixed_batch,
            overwrite=config.overwrite,
            stage=progress.stage,
        )
    print(report)
    if not trained:
        print("The weights are initial ones; --checkpoint or --pretrained gives trained ones.")
    return 0


def _build(config: ExportConfig) -> tuple[Any, tuple[int, int, int], bool]:
    """Build the model; return it with its input size [c, h, w] and whether weights were loaded."""
    name = str(config.model)
    source = find_source(name)
    pretrained = config.pretrained or ":" in source.model
    model = load_model(name, pretrained, config.checkpoint, config.num_classes, config.model_kwargs)
    channels, *sides = model.pretrained_cfg["input_size"]
    if config.img_size is not None:
        sides = [config.img_size] * 2
    input_size = (config.model_kwargs.get("in_chans", channels), sides[0], sides[1])
    if config.features_only:
        if not hasattr(model, "forward_intermediates"):
            raise UsageError(f"model {name} does not give its feature maps")
        model = FeatureGetterNet(model, out_indices=tuple(range(len(model.feature_info))))
    return model.eval(), input_size, pretrained or bool(config.checkpoint)
