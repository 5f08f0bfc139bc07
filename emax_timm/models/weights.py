"""Weights: the index of those the package knows, where they are had, and their verification.

`weights.json` beside this file is a list of entries, as `WeightsEntry` describes them. What is not
known is null, never invented; `emax weights pin` asks the Hugging Face Hub for it. The models'
pretrained configs are made from it, so a tag exists if its weights do.
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
# The one file of weights in a repository or a folder. No other is looked for: it might be a pickle.
WEIGHTS = "model.safetensors"
# Names of files that others read as pickles.
PICKLES = (".bin", ".pt", ".pth", ".pth.tar", ".pkl", ".pickle", ".ckpt")


@dataclasses.dataclass(frozen=True)
class WeightsEntry:
    """A file of weights on the Hugging Face Hub, or in this package."""

    model: str
    """The model that they are of: one of the package's, or a plain twin of timm's, whose `_warm`
    tags they give."""
    tag: str
    """The model's tag; of a twin, its tag in timm."""
    repo: str | None
    """ORG/NAME on the hub; None if the file is in this package."""
    file: str
    """A safetensors file in it, or beside the index."""
    revision: str | None
    """The commit, 40 hex digits; None takes the newest."""
    sha256: str | None
    """Of the file; None leaves it unverified."""
    license: str
    """Of the weights."""
    metrics: dict[str, float] | None = None
    """What its publisher measured, such as test_top1 in per cent."""
    cfg: dict[str, Any] | None = None
    """Of a model of the package: what its pretrained config has beyond its twin's, such as the
    number of classes and the input size."""

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
        """Of a file in this package."""
        return INDEX_FILE.parent / self.file


def safe_name(name: str) -> str:
    """A file name from a repository or a config, which must stay in its folder.

    Raises:
        ValueError: If it would not.
    """
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or re.search(r"[\\:\0]", name):
        raise ValueError(f"{name!r} is no name of a file inside its folder")
    return name


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


def write_index(entries: Iterable[WeightsEntry], path: Path = INDEX_FILE) -> None:
    """Replace an index file, an entry a line; what may be left out and is null is left out."""
    optional = {field.name for field in dataclasses.fields(WeightsEntry) if field.default is None}
    rows = [
        {k: v for k, v in dataclasses.asdict(entry).items() if v is not None or k not in optional}
        for entry in entries
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    replace_file(path, lambda temporary: temporary.write_text(f"[\n{lines}\n]\n"))


INDEX = read_index()


class Located(NamedTuple):
    """Weights on this machine."""

    path: Path
    source: str
    """Where they are from, for people."""
    entry: WeightsEntry | None
    """That of the index, if they are in it."""
    verified: bool
    """Whether a sha256 that was given beforehand fits them."""


def locate(cfg: PretrainedCfg, cache_dir: str | Path | None = None) -> Located | None:
    """Find or download the weights that a pretrained config names, and verify them.

    Args:
        cfg: timm's, as of a tag, an `hf-hub:` repository or a `local-dir:` folder.
        cache_dir: Instead of the hub client's cache folder.

    Returns:
        Where they are; None if the config names a file, a state dict or a URL of the user's.

    Raises:
        RuntimeError: If they cannot be had, are no safetensors, or are not those of the index.
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
    """The same, if the file is a whole one; timm's error for another does not name it."""
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

    The hub's own sha256 of a large file, which its cache keeps, is compared too: the hub's client
    looks at the size alone. A file that is not that is taken out of the cache.

    Args:
        repo: ORG/NAME on the hub.
        file: Its name there.
        revision: A commit, branch or tag; None for the newest commit.
        sha256: What it must be.
        cache_dir: Instead of the hub client's cache folder.

    Raises:
        RuntimeError: In one line, if it cannot be had or is another one.
    """
    try:
        if not safe_name(file).endswith(".safetensors"):
            raise ValueError("weights are read from safetensors files only")
        path = Path(hf_hub_download(repo, file, revision=revision, cache_dir=cache_dir))
    except Exception as error:  # of the client, its HTTP library, the file system
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
        if entry.repo is None or (entry.revision is not None and entry.sha256 is not None):
            continue
        try:
            info = HfApi().model_info(entry.repo, revision=entry.revision, files_metadata=True)
        except Exception as error:  # of the client, its HTTP library
            problems.append(f"{entry.repo}: {hub_problem(error)}")
            continue
        file = next((f for f in info.siblings or () if f.rfilename == entry.file), None)
        if file is None or file.lfs is None or info.sha is None:
            problems.append(f"{entry.repo}: it has no {entry.file} with a sha256")
            continue
        entries[position] = dataclasses.replace(entry, revision=info.sha, sha256=file.lfs.sha256)
    write_index(entries, path)
    return problems
