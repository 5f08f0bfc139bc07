"""Put a run's best weights into the package, as a pretrained tag that loads without the Hub.

    python -m emax_timm.hub.ship RUN --tag fashion_mnist

This is for maintainers, in a checkout. It writes emax_timm/models/pretrained/MODEL.TAG.safetensors
and the entry in weights.json; `python tests/models/golden.py` then adds the golden logits.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import check_target, replace_file, writing_to
from ..models.weights_index import INDEX_FILE, WEIGHTS
from ..runner import command
from ..training.config import UsageError, from_mapping, option, parse_settings
from ..training.distributed import open_distributed_context
from ..training.sources import run_folder
from .publish import put_in_index
from .release import make_release

__all__ = ["ship"]

FOLDER = "pretrained"
LARGEST = 2_000_000  # bytes; larger weights belong on the Hub


@dataclass
class ShipConfig:
    """Put the best weights of a run into the package, as a pretrained tag."""

    run: str | None = option(None, "run directory", positional=True, metavar="RUN")
    tag: str = option("", "tag of the weights")
    license: str | None = option(None, "licence of the weights (default: as for emax publish)")
    index: str = option(
        str(INDEX_FILE), "index file; the weights are put beside it", metavar="FILE"
    )


@command("python -m emax_timm.hub.ship")
def ship(argv: Sequence[str], prog: str) -> int:
    """Put the weights of a run into the package, and return the exit status."""
    settings = parse_settings(ShipConfig, argv, prog)
    config = from_mapping(ShipConfig, settings, "the command line")
    if config.run is None or not config.tag:
        raise UsageError("nothing to ship: give RUN --tag TAG")
    check_target(Path(config.index))
    check_target(Path(config.index).parent / FOLDER / config.tag, folder=True)
    with open_distributed_context() as context:
        release = make_release(
            run_folder(config.run), "emax-timm/package", config.tag, config.license, context, {}
        )
    content = release.files[WEIGHTS]
    if len(content) > LARGEST:
        raise UsageError(f"the weights have {len(content)} bytes; at most {LARGEST} are shipped")
    if not release.default_architecture:
        raise UsageError(f"{release.model} was given arguments; its name alone must build it")
    file = f"{FOLDER}/{release.model}.{release.tag}.safetensors"
    index = Path(config.index)
    path = index.parent / file
    with writing_to(path):
        path.parent.mkdir(exist_ok=True)
        replace_file(path, lambda temporary: temporary.write_bytes(content))
    try:
        put_in_index(release.entry(repo=None, file=file, revision=None), index)
    except ValueError as error:  # from an index that is none
        raise UsageError(str(error)) from error
    print(f"{path}: {len(content)} bytes, {release.metrics}")
    return 0


if __name__ == "__main__":
    sys.exit(ship())
