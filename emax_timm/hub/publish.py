"""The `emax publish` command."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import SUMS, check_target, lock_folder, remove, write_folder, writing_to
from ..models.weights_index import INDEX_FILE, WEIGHTS, WeightsEntry, read_index, write_index
from ..runner import command
from ..training.config import (
    AT_LEAST_0,
    AT_LEAST_1,
    UsageError,
    from_mapping,
    option,
    parse_settings,
)
from ..training.distributed import open_distributed_context
from ..training.progress import working
from ..training.sources import run_folder
from .integrity import check_folder
from .release import Release, make_release
from .space import check_space, write_space
from .upload import check_repo, upload

__all__ = ["publish", "put_in_index"]


@dataclass
class PublishConfig:
    """Make a release of a training run's best weights and, with --push, publish it on the hub."""

    run: str | None = option(None, "run directory, or a file in it", positional=True, metavar="RUN")
    repo: str = option("", "ORG/NAME on the hub")
    output: str | None = option(
        None, "folder for the release; replaced if it holds one (default: RUN/release)"
    )
    space: str | None = option(
        None,
        "folder to make for a Space of the hub that serves `emax demo` of the repository",
        metavar="DIR",
    )
    push: bool = option(False, "publish the release; without this flag, only the folder is made")
    private: bool = option(False, "make the repository private, if it does not exist")
    tag: str = option("", "tag of the weights (default: what follows the point in NAME)")
    license: str | None = option(
        None,
        "licence of the weights (default: apache-2.0, or that of the weights it started from)",
    )
    index: bool = option(False, "with --push: add the weights to the index of the package")
    index_file: str = option(
        str(INDEX_FILE),
        "index file to add the weights to, instead of the package's",
        metavar="FILE",
    )
    data_dir: str | None = option(None, "where the run's data are now")
    device: str = option(
        "", "device to validate on: cpu, cuda, … (default: cuda if there is one, else cpu)"
    )
    batch_size: int | None = option(
        None, "images per forward pass (default: as the run)", "-b", bounds=AT_LEAST_1
    )
    workers: int | None = option(
        None, "processes that load images (default: as the run)", "-j", bounds=AT_LEAST_0
    )


@command("emax publish")
def publish(argv: Sequence[str], prog: str) -> int:
    """Make a release of a run, publish it if --push is given, and return the exit status."""
    try:
        settings = parse_settings(PublishConfig, argv, prog)
        config = from_mapping(PublishConfig, settings, "the command line")
        _check(config)
        run = run_folder(str(config.run))
        folder = Path(config.output) if config.output else run / "release"
        check_target(folder, folder=True, hint="choose another place with --output")
        release = _make(config, run)
        with writing_to(folder):
            _write(release, folder)
        check_folder(folder)
        print(f"{folder}: {', '.join(release.files)}")
        print(f"{release.model}.{release.tag or '(no tag)'}  {_figures(release)}")
        if config.space:
            with writing_to(Path(config.space)):
                write_space(Path(config.space), config.repo, release.license)
            print(f"{config.space}: a Space that serves a page for hf-hub:{config.repo}")
        if not config.push:
            print(f"nothing is published; --push would publish it as {config.repo}")
            return 0
        title = f"{release.model}.{release.tag}" if release.tag else release.model
        with working(f"publishing {config.repo}"):
            done = upload(release.files, config.repo, f"Release {title}", config.private)
        state = "published" if done.new else "was published before"
        print(f"{done.repo} {done.version} {state}: commit {done.commit}")
        if config.index:
            entry = release.entry(done.repo, WEIGHTS, done.commit)
            with writing_to(Path(config.index_file)):
                put_in_index(entry, Path(config.index_file))
            print(f"{release.model}.{release.tag} is in {config.index_file}")
    except ValueError as error:  # from an index or the files of a release
        raise UsageError(str(error)) from error
    return 0


def _check(config: PublishConfig) -> None:
    if config.run is None or not config.repo:
        raise UsageError("nothing to publish: give RUN --repo ORG/NAME")
    check_repo(config.repo)
    if not run_folder(config.run).is_dir():
        raise UsageError(f"there is no run {config.run}")
    if config.space is not None:
        check_space(Path(config.space))
    if config.index and not config.push:
        raise UsageError("--index needs --push: a tag exists only if its weights do")
    if config.index:
        read_index(Path(config.index_file))
        check_target(Path(config.index_file))
    if config.tag and not config.tag.replace("_", "").replace("-", "").isalnum():
        raise UsageError(f"--tag takes letters, digits, _ and -, not {config.tag!r}")


def _make(config: PublishConfig, run: Path) -> Release:
    data: dict[str, Any] = {
        name: value
        for name in ("data_dir", "device", "batch_size", "workers")
        if (value := getattr(config, name)) not in (None, "")
    }
    # By convention a repository is named MODEL.TAG, such as resnet50_emax.fashion_mnist.
    tag = config.tag or config.repo.partition("/")[2].partition(".")[2]
    with open_distributed_context(config.device) as context, lock_folder(run, reading=True) as free:
        if not free:
            raise UsageError(f"a process is training in {run}; wait for its end")
        release = make_release(run, config.repo, tag, config.license, context, data)
    if config.index and not release.tag:
        raise UsageError("--index needs a --tag for the weights")
    if config.index and not release.default_architecture:
        raise UsageError(
            f"--index takes models that their name alone builds; {release.model} was given "
            "arguments. Without --index it is published for hf-hub:, which knows them"
        )
    return release


def _write(release: Release, folder: Path) -> None:
    if folder.exists():
        if not (folder / SUMS).is_file() or not (folder / WEIGHTS).is_file():
            raise UsageError(f"{folder} is there and is no release; choose another --output")
        if all(
            (folder / name).is_file() and (folder / name).read_bytes() == content
            for name, content in release.files.items()
        ) and len(list(folder.iterdir())) == len(release.files):
            return
        remove(folder)
    with contextlib.suppress(FileExistsError):
        folder.parent.mkdir(parents=True)
    write_folder(folder, release.files)


def _figures(release: Release) -> str:
    figures = [f"{name} {value:.3f}" for name, value in release.metrics.items()]
    return "  ".join([*figures, f"sha256 {release.sha256}"])


def put_in_index(entry: WeightsEntry, path: Path) -> None:
    """Add an entry to an index file, or replace the entry with the same model and tag.

    Raises:
        ValueError: If the file is not a weights index.
    """
    entries = read_index(path)
    names = [other.name for other in entries]
    if entry.name in names:
        entries[names.index(entry.name)] = entry
    else:
        entries.append(entry)
    write_index(entries, path)
