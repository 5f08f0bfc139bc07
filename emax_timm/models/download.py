"""Where the weights that a pretrained config names are had, and their verification."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import safetensors
from huggingface_hub import hf_hub_download
from timm.models import PretrainedCfg

from ..files import check_sum, sha256_of
from .hub_errors import hub_problem
from .weights_index import INDEX, WEIGHTS, WeightsEntry, safe_name

__all__ = ["Located", "check_folder_config", "fetch", "locate"]


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


def check_folder_config(folder: Path) -> None:
    """Verify the config.json of a `local-dir:` folder, from which timm builds the model.

    Raises:
        RuntimeError: If its sha256 is not the one in the folder's `SHA256SUMS`.
    """
    try:
        if (path := folder / "config.json").is_file():
            check_sum(path)
    except (OSError, ValueError) as error:
        raise RuntimeError(str(error)) from None


def _in_folder(folder: Path) -> Located:
    path = folder / WEIGHTS
    if not path.is_file():
        raise RuntimeError(f"{folder} has no {WEIGHTS}; weights of other formats are not read")
    try:
        verified = check_sum(path)
    except ValueError as error:
        raise RuntimeError(str(error)) from None
    return Located(path, str(folder), None, verified)


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
