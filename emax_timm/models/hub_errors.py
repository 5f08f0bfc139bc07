"""Messages of one line for the errors of the Hugging Face Hub's client."""

import os
from collections.abc import Iterator

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

__all__ = ["hub_problem"]

# Parts of the messages of the client for a file that is shorter than the hub announced.
_SHORT = ("Consistency check failed", "incomplete", "peer closed", "IncompleteRead")
_UNREACHABLE = ("Connect", "Timeout", "NetworkError", "ProtocolError", "MaxRetry", "ReadError")


def hub_problem(error: BaseException) -> str:
    """Explain an error of the hub's client in one line, and say what to do about it.

    The client wraps its errors, so a 403 may arrive as a file that is not in the cache. The
    innermost error that says something counts.
    """
    chain = list(_chain(error))
    statuses = [status for status in map(_status, chain) if status]
    for found in chain:
        if isinstance(found, OfflineModeIsEnabled) or _is_offline(found):
            return "it is not in the cache, and the hub's client is offline (HF_HUB_OFFLINE)"
        if isinstance(found, GatedRepoError):
            return "access to it must be asked for on the hub, and `hf auth login` (gated)"
        if isinstance(found, RevisionNotFoundError):
            return "the repository has no such revision (404)"
        if isinstance(found, RepositoryNotFoundError):
            status = _status(found) or 404
            return f"no such repository, or a private one: `hf auth login` ({status})"
        if isinstance(found, EntryNotFoundError) and not isinstance(found, LocalEntryNotFoundError):
            return "the repository has no such file (404)"
    if statuses:
        return _of_status(statuses[-1])
    for found in chain:
        if any(part in str(found) for part in _SHORT):
            return "the download is incomplete; try again"
    for found in chain:
        if any(part in type(found).__name__ for part in _UNREACHABLE):
            return f"the hub at {constants.ENDPOINT} cannot be reached"
    for found in chain:
        if isinstance(found, HFValidationError):
            return "it is no name of a repository, which is ORG/NAME"
    innermost = chain[-1]
    text = " ".join(str(innermost).split())
    return text or type(innermost).__name__


def _of_status(status: int) -> str:
    if status == 401:
        return "the hub does not know your token: `hf auth login` (401)"
    if status == 403:
        return "the hub forbids it to your token (403)"
    if status == 412:
        return "somebody else has changed the repository meanwhile: try again (412)"
    if status == 429:
        return "the hub has had too many requests from here: wait and try again (429)"
    if status >= 500:
        return f"the hub is out of order: try again later ({status})"
    return f"the hub refuses it ({status})"


def _chain(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_offline(error: BaseException) -> bool:
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    return offline and isinstance(error, LocalEntryNotFoundError)
