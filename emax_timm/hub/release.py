"""Releases: the files that publish a training run in a repository of the Hugging Face Hub."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import get_token
from torch import Tensor

from ..files import SUMS, sha256_of
from ..models.cost import count_macs
from ..models.weights_index import WEIGHTS, WeightsEntry
from ..training import checkpoint
from ..training.commands import read_run, validate_with
from ..training.config import TrainConfig, UsageError, model_arguments
from ..training.distributed import DistributedContext
from ..training.evaluate import Metrics
from ..training.loading import create_model
from ..training.model_config import read_model_config
from ..version import __version__
from .card import CardFacts, model_card

__all__ = ["Release", "make_release"]

CARD, LOG, SUMMARY = "README.md", "log.csv", "summary.json"
# Allowed change of top-1 in percentage points: rounding depends on the device and the threads.
TOLERANCE = 0.1
# The largest finite float16 value: users may run the model in float16.
HALF_MAX = torch.finfo(torch.float16).max
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{16,}|api_org_[A-Za-z0-9]{16,}")
# Options that describe the machine that trained; they are not published.
_PRIVATE = ("data", "data_dir", "output", "resume")


@dataclass(frozen=True)
class Release:
    """The files of a release by name, and the data for its entry in the weights index."""

    files: dict[str, bytes]
    model: str
    tag: str
    license: str
    metrics: dict[str, float]
    cfg: dict[str, Any]
    default_architecture: bool
    """Whether the model name alone, without arguments, builds the architecture."""

    @property
    def sha256(self) -> str:
        """The sha256 of the weights file, in hex."""
        return sha256_of(self.files[WEIGHTS])

    def entry(self, repo: str | None, file: str, revision: str | None) -> WeightsEntry:
        """Make the weights index entry of this release, published as `file` of `repo`.

        Args:
            repo: ORG/NAME on the Hub; None for weights in this package.
            file: The path of the weights in the repository or in the package.
            revision: The commit on the Hub; None for weights in this package.
        """
        return WeightsEntry(
            model=self.model,
            tag=self.tag,
            repo=repo,
            file=file,
            revision=revision,
            sha256=self.sha256,
            license=self.license,
            metrics=self.metrics,
            cfg=self.cfg,
        )


def make_release(
    run: Path,
    repo: str,
    tag: str,
    license: str | None,
    context: DistributedContext,
    data: dict[str, Any],
) -> Release:
    """Make a release of a run's best weights, after validating them once more.

    The release does not depend on when or where it is made: the same run gives the same bytes.

    Args:
        run: The run directory.
        repo: ORG/NAME of the repository, for the model card.
        tag: The pretrained tag of the weights in timm.
        license: The licence of the weights; None for Apache-2.0, or for that of the pretrained
            weights that training started from.
        context: The distributed context to validate in.
        data: Options of `ValidateConfig` that say where the data are and how they are read.

    Raises:
        UsageError: If the run has not ended, if its weights are damaged or not fit to be published,
            or if they do not reproduce the metrics in the run's summary.
    """
    config = read_run(run)
    names = ("best_epoch", "epochs", "validation", "test")
    summary = _read_json(run / SUMMARY, names, "the run has not ended; continue it with --resume")
    described = read_model_config(run, "num_classes", "pretrained_cfg")
    license = license or _license_of(config)
    model = _best_model(run, described)
    metrics = _validated(run, summary, context, data)
    described["pretrained_cfg"] |= {"tag": tag, "license": license}
    files = {
        WEIGHTS: checkpoint.serialized(model.state_dict()),
        checkpoint.MODEL_CONFIG: (json.dumps(described, indent=2) + "\n").encode(),
        checkpoint.CONFIG: _public(config, described).encode(),
        LOG: _read(run / LOG),
        CARD: model_card(_facts(config, model, described, summary, repo)).encode(),
    }
    _check_secrets(files)
    sums = "".join(f"{sha256_of(content)}  {name}\n" for name, content in files.items())
    return Release(
        files={**files, SUMS: sums.encode()},
        model=_model_name(config, described),
        tag=tag,
        license=license,
        metrics=metrics,
        cfg=_index_cfg(described),
        default_architecture=_is_default(described),
    )


def _best_model(run: Path, described: dict[str, Any]) -> Any:
    """Build the model of a config.json as its users will, and load the run's best weights.

    Loading is strict: every key and shape has to match, and every value has to be finite.
    """
    arguments = {**described.get("model_args", {}), "num_classes": described["num_classes"]}
    model = create_model(described["architecture"], **arguments)
    checkpoint.load_weights(model, run / checkpoint.BEST)
    _check_half(model.state_dict(), run / checkpoint.BEST)
    return model


def _facts(
    config: TrainConfig, model: Any, described: dict[str, Any], summary: dict[str, Any], repo: str
) -> CardFacts:
    cfg = described["pretrained_cfg"]
    channels, height, width = cfg["input_size"]
    return CardFacts(
        repo=repo,
        model=_model_name(config, described),
        config=config,
        license=cfg["license"],
        classes=model.num_classes,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=count_macs(model, torch.zeros(1, channels, height, width)),
        input_size=(channels, height, width),
        summary=summary,
        version=__version__,
    )


def _validated(
    run: Path, summary: dict[str, Any], context: DistributedContext, data: dict[str, Any]
) -> dict[str, float]:
    """Return the run's recorded metrics, after checking that its weights reproduce them."""
    split = "validation" if summary.get("validation") else "test"
    recorded = summary.get(split)
    if not recorded:
        raise UsageError(f"{run} was neither validated nor tested; there is nothing to publish")
    settings = {"checkpoint": str(run / checkpoint.BEST), **data}
    found: Metrics = validate_with(settings, context, tested=split == "test")
    if not abs(found.top1 - recorded["top1"]) <= TOLERANCE:
        raise UsageError(
            f"{run / checkpoint.BEST} gives a top-1 of {found.top1:.3f} in {split}, where the run "
            f"recorded {recorded['top1']:.3f}: these are other weights or other data"
        )
    return {
        f"{name}_{metric}": round(summary[name][metric], 3)
        for name in ("validation", "test")
        if summary.get(name)
        for metric in ("top1", "top5")
    }


def _license_of(config: TrainConfig) -> str:
    elsewhere = config.pretrained_path or config.initial_checkpoint or ":" in config.model
    if elsewhere:
        raise UsageError(
            "training started from weights of another origin; give the licence of the new ones, "
            "which depends on theirs, with --license"
        )
    if config.pretrained:
        model = create_model(config.model, **model_arguments(config, config.num_classes))
        license = model.pretrained_cfg.get("license")
        if not license:
            raise UsageError("the licence of the weights it started from is unknown: --license")
        return str(license)
    return "apache-2.0"


def _check_half(tensors: dict[str, Tensor], path: Path) -> None:
    for name, value in tensors.items():
        if value.is_floating_point() and value.numel() and value.abs().max() > HALF_MAX:
            raise UsageError(
                f"{path}: {name} has a value of {value.abs().max():.3g}, which float16 cannot hold "
                f"(at most {HALF_MAX:.0f}); users run models in it"
            )


def _model_name(config: TrainConfig, described: dict[str, Any]) -> str:
    """Return the name of the model in timm, which a run on another run's model does not have."""
    return str(described["architecture"]) if ":" in config.model else config.model


def _public(config: TrainConfig, described: dict[str, Any]) -> str:
    kept = {k: v for k, v in asdict(config).items() if k not in _PRIVATE}
    kept["model"] = _model_name(config, described)
    return yaml.safe_dump(kept, sort_keys=False)


def _check_secrets(files: dict[str, bytes]) -> None:
    """Raise UsageError if a file holds what looks like an access token."""
    token = get_token()
    for name, content in files.items():
        if name == WEIGHTS:
            continue
        text = content.decode(errors="replace")
        if _TOKEN.search(text) or (token and token in text):
            raise UsageError(f"{name} of the release would hold a token; it is not made")


def _index_cfg(described: dict[str, Any]) -> dict[str, Any]:
    """Select what the weights index needs of a config.json to make timm's pretrained config."""
    names = (
        *("num_classes", "input_size", "interpolation", "crop_pct", "crop_mode"),
        *("mean", "std"),
    )
    cfg = {"num_classes": described["num_classes"], **described["pretrained_cfg"]}
    cfg = {name: cfg.get(name) for name in names}
    if labels := described.get("label_names"):
        cfg["label_names"] = labels
    return cfg


def _is_default(described: dict[str, Any]) -> bool:
    """Tell whether a config's arguments build the architecture that the bare model name builds."""
    arguments = dict(described.get("model_args") or {})
    arguments.pop("in_chans", None)  # timm takes it from the config's input_size
    return arguments.pop("global_pool", "avg") == "avg" and not arguments


def _read_json(path: Path, names: Sequence[str], otherwise: str) -> dict[str, Any]:
    """Read a JSON object that must have the keys `names`; `otherwise` explains a missing file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"there is no {path}: {otherwise}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict) or not set(names) <= content.keys():
        raise UsageError(f"{path} must hold an object with {', '.join(names)}")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
