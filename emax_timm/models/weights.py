"""Weights: the index of those the package knows, their download and verification.

`weights.json` beside this file is a list of entries, as `WeightsEntry` describes them. What is not
known is null, never invented; `emax weights pin` asks the Hugging Face Hub for it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from timm.models import PretrainedCfg
from torch import Tensor

from ..attention import EMAX, GatedAttention
from ..files import replace_file

__all__ = ["INDEX", "INDEX_FILE", "WeightsEntry", "fetch", "find", "pin", "warm_start"]

INDEX_FILE = Path(__file__).with_name("weights.json")


@dataclasses.dataclass(frozen=True)
class WeightsEntry:
    """A file of weights on the Hugging Face Hub."""

    model: str
    """The model in timm that they are of: a plain twin, whose `_warm` tags they give."""
    tag: str
    """The twin's tag in timm."""
    repo: str
    """ORG/NAME on the hub."""
    file: str
    """A safetensors file in it."""
    revision: str | None
    """The commit, 40 hex digits; None takes the newest."""
    sha256: str | None
    """Of the file; None leaves it unverified."""
    license: str
    """Of the weights."""

    def __post_init__(self) -> None:
        if not self.file.endswith(".safetensors"):
            raise ValueError(f"{self.repo}: weights are safetensors files, not {self.file}")


def read_index(path: Path = INDEX_FILE) -> list[WeightsEntry]:
    """The entries of an index file.

    Raises:
        ValueError: If the file is no index.
    """
    try:
        entries = json.loads(path.read_text())
        if not isinstance(entries, list):
            raise TypeError("it holds no list")
        return [WeightsEntry(**entry) for entry in entries]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no index of weights: {error}") from None


INDEX = read_index()


def find(cfg: PretrainedCfg) -> WeightsEntry | None:
    """The entry that a pretrained config takes its weights from, if from one at all."""
    if cfg.file or cfg.state_dict or cfg.url:
        return None
    return next((entry for entry in INDEX if entry.repo == cfg.hf_hub_id), None)


def fetch(entry: WeightsEntry, cache_dir: str | Path | None = None) -> Path:
    """Download the file of an entry to the hub's cache, or find it there, and verify it.

    Args:
        cache_dir: Instead of the hub client's cache folder.

    Raises:
        RuntimeError: If the file cannot be had or is another one than the index says.
    """
    try:
        path = hf_hub_download(entry.repo, entry.file, revision=entry.revision, cache_dir=cache_dir)
    except (HfHubHTTPError, OSError) as error:
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise RuntimeError(f"cannot get {entry.file} of {entry.repo}: {reason}") from error
    if entry.sha256 is not None:
        with Path(path).open("rb") as file:
            digest = _sha256(file)
        if digest != entry.sha256:
            raise RuntimeError(
                f"{path} is not {entry.file} of {entry.repo}: its sha256 is {digest}, not "
                f"{entry.sha256}; delete it to have it downloaded again"
            )
    return Path(path)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def warm_start(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Make a plain twin's weights fit a model with attention, whose gates it closes.

    Only where all attention parameters are absent; weights with some of them are left as they are,
    and do not load. Used as timm's `pretrained_filter_fn`.

    Args:
        state_dict: Of a plain twin, or of such a model.
        model: The model that they are for.

    Raises:
        RuntimeError: If, classifier apart, keys are missing or unknown. timm itself would let that
            pass where the number of classes differs.
    """
    own = model.state_dict()
    attention = {
        f"{name}.{key}": value
        for name, module in model.named_modules()
        if isinstance(module, EMAX | GatedAttention)
        for key, value in module.state_dict().items()
    }
    if attention and not attention.keys() & state_dict.keys():
        closed = {
            key: torch.zeros_like(value) if key.endswith(".residual_gate") else value
            for key, value in attention.items()
        }
        state_dict = {**state_dict, **closed}
    classifier = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{name}." for name in _names(classifier))
    # Weights of old versions of torch lack these, which load_state_dict allows for.
    lacking = {key for key in own.keys() - state_dict if not key.endswith("num_batches_tracked")}
    for keys, what in ((lacking, "lack"), (state_dict.keys() - own, "are for a model with")):
        if found := sorted(key for key in keys if not key.startswith(heads)):
            architecture = model.pretrained_cfg.get("architecture", "this model")
            more = f" and {len(found) - 1} more keys" if len(found) > 1 else ""
            raise RuntimeError(
                f"the weights do not fit {architecture}: they {what} {found[0]}{more}"
            )
    return state_dict


def _names(names: str | Iterable[str]) -> Iterable[str]:
    return (names,) if isinstance(names, str) else names


def pin(path: Path = INDEX_FILE) -> list[str]:
    """Fill in the revision and sha256 that an index does not know, from the hub.

    What is pinned stays. The file is rewritten once, when every entry has been asked for.

    Returns:
        A line for each entry that could not be pinned.
    """
    entries, problems = read_index(path), []
    for position, entry in enumerate(entries):
        if entry.revision is not None and entry.sha256 is not None:
            continue
        try:
            info = HfApi().model_info(entry.repo, revision=entry.revision, files_metadata=True)
        except (HfHubHTTPError, OSError) as error:
            reason = str(error.__cause__ or error).strip().split("\n")[0]
            problems.append(f"{entry.repo}: {reason}")
            continue
        file = next((f for f in info.siblings or () if f.rfilename == entry.file), None)
        if file is None or file.lfs is None or info.sha is None:
            problems.append(f"{entry.repo}: it has no {entry.file} with a sha256")
            continue
        entries[position] = dataclasses.replace(entry, revision=info.sha, sha256=file.lfs.sha256)
    lines = ",\n".join(f"  {json.dumps(dataclasses.asdict(entry))}" for entry in entries)
    replace_file(path, lambda temporary: temporary.write_text(f"[\n{lines}\n]\n"))
    return problems
