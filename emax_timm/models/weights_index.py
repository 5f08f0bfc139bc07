"""The index of the weights that the package knows.

`weights.json` beside this file is a list of entries, as `WeightsEntry` describes them. What is not
known is null, never invented; `emax weights pin` asks the Hugging Face Hub for it. The models'
pretrained configs are made from it, so a tag exists if its weights do.
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
