"""The index of the weights that the package knows.

`weights.json` beside this file is a list of entries, as `WeightsEntry` describes them. An unknown
value is null and never invented; `emax weights pin` asks the Hugging Face Hub for it. The
pretrained configs of the models are made from the index, so a tag exists if its weights do.
"""

import dataclasses
import json
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import HfApi

from ..files import replace_file
from .hub_errors import hub_problem

__all__ = [
    "INDEX",
    "INDEX_FILE",
    "PICKLES",
    "WEIGHTS",
    "WeightsEntry",
    "pin",
    "read_index",
    "safe_name",
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
