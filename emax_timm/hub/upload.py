"""Upload of releases to the Hugging Face Hub: one commit each, tagged v1, v2 and so on."""

import re
from dataclasses import dataclass

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.utils import validate_repo_id

from ..models.hub_errors import hub_problem
from ..models.weights_index import PICKLES
from ..training.config import UsageError

__all__ = ["Published", "UploadError", "check_repo", "upload"]


class UploadError(RuntimeError):
    """The Hub did not accept a release; the message is one line."""

    exit_code = 1


@dataclass(frozen=True)
class Published:
    """A release on the Hub."""

    repo: str
    commit: str
    version: str
    """The tag of the commit, such as v1."""
    new: bool
    """Whether this upload tagged it; False if the same release was there already."""


def check_repo(repo: str) -> None:
    """Check that the name of a repository has the form ORG/NAME.

    Raises:
        UsageError: If it does not; the message gives an example.
    """
    try:
        validate_repo_id(repo)
        right = repo.count("/") == 1
    except ValueError:
        right = False
    if not right:
        raise UsageError(f"--repo is ORG/NAME on the hub, such as me/resnet50_emax, not {repo!r}")


def upload(files: dict[str, bytes], repo: str, message: str, private: bool = False) -> Published:
    """Upload files to a repository in one commit, and tag it; a tagged commit keeps its tag.

    All files appear at once, with the commit. Another call completes an upload that was
    interrupted, before or after the commit.

    Args:
        files: The contents of the files by name.
        repo: ORG/NAME; created if it does not exist.
        message: The commit message.
        private: Whether a repository that has to be created is private.

    Raises:
        UploadError: If the Hub refuses the upload, or if somebody else commits in the meantime, in
            which case the files in the repository are unchanged.
    """
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        before = api.model_info(repo)
        names = [file.rfilename for file in before.siblings or ()]
        if pickles := [name for name in names if name.endswith(PICKLES)]:
            raise UploadError(
                f"{repo} holds {pickles[0]}, which may be a pickle and would be loaded where "
                "safetensors are not; delete it there first"
            )
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        # Because of parent_commit, the Hub refuses this commit if there is a newer one by then.
        commit = api.create_commit(
            repo, operations=operations, commit_message=message, parent_commit=before.sha
        ).oid
        tags = {tag.name: tag.target_commit for tag in api.list_repo_refs(repo).tags}
        version = next((name for name, target in tags.items() if target == commit), None)
        if version is None:
            version = _next_version(tags)
            api.create_tag(repo, tag=version, revision=commit)
            return Published(repo, commit, version, new=True)
    except UploadError:
        raise
    except Exception as error:  # from the client or its HTTP library
        raise UploadError(f"cannot publish to {repo}: {hub_problem(error)}") from error
    return Published(repo, commit, version, new=False)


def _next_version(tags: dict[str, str]) -> str:
    numbers = [int(match[1]) for tag in tags if (match := re.fullmatch(r"v(\d+)", tag))]
    return f"v{max(numbers, default=0) + 1}"
