"""Put a run's best weights into the package, as a pretrained tag that loads without the Hub.

    python -m emax_timm.hub.ship RUN --tag fashion_mnist

This is for maintainers, in a checkout. It writes emax_timm/models/pretrained/MODEL.TAG.safetensors
and the entry in weights.json; `python tests/models/golden.py` then adds the golden logits.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..files import replace_file
from ..models.weights_index import INDEX_FILE, WEIGHTS
from ..training.config import UsageError
from ..training.distributed import open_world
from .publish import put_in_index
from .release import make_release

__all__ = ["ship"]

FOLDER = "pretrained"
LARGEST = 2_000_000  # bytes; larger weights belong on the Hub


def ship(argv: Sequence[str] | None = None) -> int:
    """Put the weights of a run into the package, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m emax_timm.hub.ship")
    parser.add_argument("run", type=Path)
    parser.add_argument("--tag", required=True)
    parser.add_argument("--license", help="of the weights (default: as for emax publish)")
    parser.add_argument("--index", type=Path, default=INDEX_FILE, metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        with open_world() as world:
            release = make_release(
                arguments.run, "emax-timm/package", arguments.tag, arguments.license, world, {}
            )
        content = release.files[WEIGHTS]
        if len(content) > LARGEST:
            raise UsageError(
                f"the weights have {len(content)} bytes; at most {LARGEST} are shipped"
            )
        if not release.default_architecture:
            raise UsageError(f"{release.model} was given arguments; its name alone must build it")
    except UsageError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    file = f"{FOLDER}/{release.model}.{release.tag}.safetensors"
    entry = release.entry(repo=None, file=file, revision=None)
    path = arguments.index.parent / file
    path.parent.mkdir(exist_ok=True)
    replace_file(path, lambda temporary: temporary.write_bytes(content))
    put_in_index(entry, arguments.index)
    print(f"{path}: {len(content)} bytes, {release.metrics}")
    return 0


if __name__ == "__main__":
    sys.exit(ship())
