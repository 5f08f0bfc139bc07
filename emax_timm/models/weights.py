"""Pretrained weights: the index of those that the package knows, their download and verification.

`weights.json` beside this file is a list of entries, as `WeightsEntry` describes them. An unknown
value is null and never invented; `emax weights pin` asks the Hugging Face Hub for it. The
pretrained configs of the models are made from the index, so a tag exists if its weights do.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import safetensors
import torch
from huggingface_hub import HfApi, hf_hub_download
from timm.models import PretrainedCfg
from torch import Tensor

from ..attention import EMAX, GatedAttention
from ..files import read_sums, replace_file, sha256_of
from .hub_errors import hub_problem

__all__ = [
    "INDEX",
    "INDEX_FILE",
    "PICKLES",
    "WEIGHTS",
    "Located",
    "WeightsEntry",
    "fetch",
    "locate",
    "pin",
    "read_index",
    "safe_name",
    "warm_start",
    "write_index",
]

INDEX_FILE = Path(__file__).with_name("weights.json")
# The file of weights in a repository or a folder. No other is read, because it might be a pickle.
WEIGHTS = "model.safetensors"
# Suffixes of files that other programs read as pickles.
PICKLES = (".bin", ".pt", ".pth", ".pth.tar", ".pkl", ".pickle", ".ckpt")


@dataclasses.dataclass(frozen=True)
class WeightsEntry:
    """An entry of the weights index: a file on the Hugging Face Hub or in this package."""

    model: str
    """The model of the weights: one of this package, or a baseline, timm's model without attention,
    whose weights give the `_warm` tags."""
    tag: str
    """The tag of the weights; for a baseline, its tag in timm."""
    repo: str | None
    """The repository ORG/NAME on the hub; None if the file is in this package."""
    file: str
    """The name of a safetensors file in the repository, or beside the index."""
    revision: str | None
    """The commit, 40 hexadecimal digits; None takes the newest."""
    sha256: str | None
    """The sha256 of the file; None leaves it unverified."""
    license: str
    """The licence of the weights."""
    metrics: dict[str, float] | None = None
    """The figures that the publisher measured, such as test_top1 in per cent."""
    cfg: dict[str, Any] | None = None
    """For a model of this package, what its pretrained config has beyond that of its baseline, such
    as the number of classes and the input size."""

    def __post_init__(self) -> None:
        if not safe_name(self.file).endswith(".safetensors"):
            raise ValueError(f"{self.name}: weights are safetensors files, not {self.file}")
        if self.cfg is not None and self.sha256 is None:
            raise ValueError(f"{self.name}: weights of the package's own have a sha256")
        if self.repo is None and self.cfg is None:
            raise ValueError(f"{self.name}: it names neither a repo nor a file of the package")

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"

    @property
    def path(self) -> Path:
        """The path of a file that is in this package."""
        return INDEX_FILE.parent / self.file


def safe_name(name: str) -> str:
    """Return a file name from a repository or a config, which must stay inside its folder.

    Raises:
        ValueError: If it leads out of the folder.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\0]", name):
        raise ValueError(f"{name!r} is no name of a file inside its folder")
    return name


def read_index(path: Path = INDEX_FILE) -> list[WeightsEntry]:
    """Read the entries of an index file.

    Raises:
        ValueError: If the file is not an index of weights.
    """
    try:
        entries = json.loads(path.read_text())
        if not isinstance(entries, list):
            raise TypeError("it holds no list")
        return [WeightsEntry(**entry) for entry in entries]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no index of weights: {error}") from None


def write_index(entries: Iterable[WeightsEntry], path: Path = INDEX_FILE) -> None:
    """Replace an index file, with one line per entry and without optional values that are null."""
    optional = {field.name for field in dataclasses.fields(WeightsEntry) if field.default is None}
    rows = [
        {k: v for k, v in dataclasses.asdict(entry).items() if v is not None or k not in optional}
        for entry in entries
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    replace_file(path, lambda temporary: temporary.write_text(f"[\n{lines}\n]\n"))


INDEX = read_index()


class Located(NamedTuple):
    """Weights that were found on this machine or downloaded to it."""

    path: Path
    source: str
    """The origin of the weights, for messages."""
    entry: WeightsEntry | None
    """The entry of the index, if there is one for these weights."""
    verified: bool
    """Whether the weights match a sha256 that was known beforehand."""


def locate(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Located | None:
    """Find or download the weights that a pretrained config names, and verify them.

    Args:
        cfg: timm's config of a tag, an `hf-hub:` repository or a `local-dir:` folder.
        cache_dir: The cache folder; None is that of the hub's client.

    Returns:
        The weights, or None if the config names a file, a state dict or a URL of the user.

    Raises:
        RuntimeError: If they cannot be obtained, are no safetensors, or are not those of the index.
    """
    if cfg.source == "local-dir":
        return _checked(_in_folder(Path(str(cfg.file))))
    if cfg.source != "hf-hub" and (cfg.state_dict or cfg.file):
        shipped = (e for e in INDEX if e.repo is None and str(e.path) == cfg.file)
        entry = next(shipped, None)
        if entry is None or cfg.state_dict:
            return None
        _verify(entry.path, entry.sha256, entry.name)
        return Located(entry.path, "this package", entry, True)
    if not cfg.hf_hub_id:
        return None
    repo, _, revision = cfg.hf_hub_id.partition("@")
    entry = next((e for e in INDEX if e.repo == repo and revision in ("", e.revision)), None)
    if entry is not None:
        path = fetch(repo, entry.file, entry.revision, entry.sha256, cache_dir)
        return _checked(Located(path, repo, entry, entry.sha256 is not None))
    path = fetch(repo, cfg.hf_hub_filename or WEIGHTS, revision or None, None, cache_dir)
    return _checked(Located(path, repo, None, False))


def _checked(located: Located) -> Located:
    """Return the same if the file is complete, because timm's error for others does not name it."""
    try:
        with safetensors.safe_open(located.path, "pt"):
            return located
    except (OSError, safetensors.SafetensorError) as error:
        raise RuntimeError(f"{located.path} is no complete safetensors file: {error}") from None


def _in_folder(folder: Path) -> Located:
    path = folder / WEIGHTS
    if not path.is_file():
        raise RuntimeError(f"{folder} has no {WEIGHTS}; weights of other formats are not read")
    try:
        expected = read_sums(folder).get(WEIGHTS, set())
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    if expected and sha256_of(path) not in expected:
        raise RuntimeError(f"{path} is damaged: its sha256 is not the one in SHA256SUMS beside it")
    return Located(path, str(folder), None, bool(expected))


def fetch(
    repo: str,
    file: str,
    revision: str | None = None,
    sha256: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """Download a safetensors file to the hub's cache, or find it there, and verify it.

    The sha256 that the hub reports for a large file, which its cache keeps, is compared as well,
    because the hub's client compares the size alone. A file with another sha256 is removed from the
    cache.

    Args:
        repo: The repository ORG/NAME on the hub.
        file: The name of the file there.
        revision: A commit, branch or tag; None is the newest commit.
        sha256: The sha256 that the file must have; None is any.
        cache_dir: The cache folder; None is that of the hub's client.

    Raises:
        RuntimeError: If the file cannot be obtained or has another sha256, in one line.
    """
    try:
        if not safe_name(file).endswith(".safetensors"):
            raise ValueError("weights are read from safetensors files only")
        path = Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # from the client, its HTTP library or the file system
        raise RuntimeError(f"cannot get {file} of {repo}: {hub_problem(error)}") from error
    blob = Path(os.path.realpath(path))
    if re.fullmatch("[0-9a-f]{64}", blob.name) and sha256_of(blob) != blob.name:
        for broken in {path, blob}:
            broken.unlink(missing_ok=True)
        raise RuntimeError(
            f"cannot get {file} of {repo}: what has come is damaged (its sha256 is not the hub's) "
            "and has been removed; try again"
        )
    _verify(path, sha256, f"{file} of {repo}")
    return path


def _verify(path: Path, sha256: str | None, what: str) -> None:
    try:
        digest = sha256_of(path) if sha256 else None
    except OSError as error:
        raise RuntimeError(f"cannot read {path}: {error.strerror}") from None
    if digest != sha256:
        raise RuntimeError(
            f"{path} is not the {what} that the index lists: its sha256 is {digest}, not {sha256}"
        )


def warm_start(state_dict: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Make the weights of a baseline fit the model with attention, with closed residual gates.

    It adds the attention's parameters only if all of them are absent; weights with some of them
    are left as they are, and do not load. timm calls it as its `pretrained_filter_fn`.

    Args:
        state_dict: The weights of the baseline, or of a model with attention.
        model: The model that the weights are for.

    Returns:
        The weights for the model.

    Raises:
        RuntimeError: If keys other than those of the classifier are missing or unknown. timm itself
            would accept that where the number of classes differs.
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
    # Weights from old versions of torch lack these keys, which load_state_dict accepts.
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
    """Ask the hub for the revisions and the sha256 that an index lacks, and write them to it.

    Values that are known stay. The file is rewritten once, after the hub was asked for all entries.

    Returns:
        A line for each entry that could not be pinned.
    """
    entries, problems = read_index(path), []
    for position, entry in enumerate(entries):
        if entry.repo is None or (entry.revision is not None and entry.sha256 is not None):
            continue
        try:
            info = HfApi().model_info(entry.repo, revision=entry.revision, files_metadata=True)
        except Exception as error:  # from the client or its HTTP library
            problems.append(f"{entry.repo}: {hub_problem(error)}")
            continue
        file = next((f for f in info.siblings or () if f.rfilename == entry.file), None)
        if file is None or file.lfs is None or info.sha is None:
            problems.append(f"{entry.repo}: it has no {entry.file} with a sha256")
            continue
        entries[position] = dataclasses.replace(entry, revision=info.sha, sha256=file.lfs.sha256)
    write_index(entries, path)
    return problems
