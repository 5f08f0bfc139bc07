"""The `emax weights verify` command: verification of weights and releases by their sha256."""

import os
import re
from pathlib import Path

import timm
from huggingface_hub import hf_hub_download

from ..files import SUMS, read_sums, sha256_of
from ..models.download import fetch, locate
from ..models.hub_errors import hub_problem
from ..models.weights_index import INDEX, PICKLES, WEIGHTS, safe_name
from ..training.checkpoint import MODEL_CONFIG, load_weights
from ..training.config import UsageError, nearest
from ..training.loading import create_model
from ..training.model_config import read_model_config
from ..training.sources import run_folder

__all__ = ["check_folder", "verify_weights"]


def verify_weights(target: str | None) -> list[str]:
    """Verify published weights by their sha256.

    Args:
        target: A release folder, a release repository (ORG/NAME or ORG/NAME@REVISION), or
            MODEL.TAG of the weights index; None for all weights in this package.

    Returns:
        One line for each verified file of a release, or for each verified MODEL.TAG.

    Raises:
        UsageError: At the first file that is missing, damaged or cannot be verified.
    """
    if target is None:
        shipped = [entry.name for entry in INDEX if entry.repo is None]
        return [_verify_tag(name) for name in shipped]
    if (folder := run_folder(target)).is_dir():
        return check_folder(folder)
    if timm.is_model_pretrained(target):
        return [_verify_tag(target)]
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", target):
        return _verify_repo(*target.partition("@")[::2])
    raise UsageError(
        f"{target} is no folder, no ORG/NAME and no model with weights; the nearest of these is "
        f"{nearest(target, timm.list_pretrained())}"
    )


def check_folder(folder: Path) -> list[str]:
    """Verify a release folder: its checksums, and that its weights fit its config.json strictly.

    Returns:
        One line for each file that SHA256SUMS names, with its sha256.

    Raises:
        UsageError: At the first file that is missing, damaged, linked from outside the folder or
            possibly a pickle, or if the weights do not fit the model.
    """
    lines = _check_sums(folder)
    if not {WEIGHTS, MODEL_CONFIG} <= lines.keys():
        raise UsageError(f"{folder / SUMS} lacks {WEIGHTS} or {MODEL_CONFIG}")
    for path in sorted(folder.iterdir()):
        if path.name.endswith(PICKLES):
            raise UsageError(f"{path} may be a pickle; a release holds safetensors alone")
    _check_model(folder)
    return [f"{name}: {value}" for name, value in lines.items()]


def _check_sums(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file that a folder's SHA256SUMS names, after verifying all."""
    try:
        sums = read_sums(folder)
        if not sums:
            raise ValueError(f"{folder} is no folder of a release: it has no {SUMS}")
        for name in sums:
            safe_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from None
    found = {}
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise UsageError(f"{path} is missing")
        # A snapshot in the Hub's cache consists of links to blobs in the repository's cache folder.
        if not _is_inside(path, folder):
            raise UsageError(f"{path} is a link out of its folder")
        found[name] = sha256_of(path)
        if found[name] not in expected:
            raise UsageError(f"{path} is damaged: its sha256 is not the one in {SUMS}")
    return found


def _is_inside(path: Path, folder: Path) -> bool:
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if home.parent.name == "snapshots":
        home = home.parent.parent
    return real.is_relative_to(home)


def _check_model(folder: Path) -> None:
    config = read_model_config(folder, "num_classes")
    name = str(config["architecture"])
    if ":" in name:
        raise UsageError(f"{folder / MODEL_CONFIG} does not describe a model: {name!r} is no name")
    arguments = {**config.get("model_args", {}), "num_classes": config["num_classes"]}
    load_weights(create_model(name, **arguments), folder / WEIGHTS)


def _verify_tag(name: str) -> str:
    cfg = timm.get_pretrained_cfg(name)
    try:
        located = cfg and locate(cfg)
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    if not located or not located.verified:
        raise UsageError(f"{name}: unverified, for no sha256 of its weights is in the index")
    return f"{name}: {sha256_of(located.path)}"


def _verify_repo(repo: str, revision: str) -> list[str]:
    """Download all files of a release from one commit, and verify them."""
    sums = _download(repo, SUMS, revision or None)
    folder = sums.parent
    try:
        names = [safe_name(name) for name in read_sums(folder)]
    except ValueError as error:
        raise UsageError(f"{repo}: {error}") from None
    for name in names:
        _download(repo, name, folder.name)
    return check_folder(folder)


def _download(repo: str, name: str, revision: str | None) -> Path:
    try:
        if name == WEIGHTS:
            return fetch(repo, name, revision)
        return Path(hf_hub_download(repo, name, revision=revision))
    except RuntimeError as error:
        raise UsageError(str(error)) from None
    except Exception as error:  # from the client or its HTTP library
        raise UsageError(f"cannot get {name} of {repo}: {hub_problem(error)}") from None
