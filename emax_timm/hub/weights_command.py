"""The `emax weights` command."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ..files import check_target
from ..models.weights_index import INDEX_FILE, pin, read_index
from ..runner import command
from ..training.config import Parser, UsageError
from .integrity import verify_weights

__all__ = ["weights"]


@command("emax weights")
def weights(argv: Sequence[str], prog: str) -> int:
    """Run `emax weights verify` or `emax weights pin`, and return the exit status."""
    arguments = _parser(prog).parse_args(argv)
    try:
        if arguments.command == "verify":
            for line in verify_weights(arguments.target):
                print(line)
            print("verified")
            return 0
        return _pin(arguments.index, f"{prog} pin")
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from error


def _pin(index: Path, prog: str) -> int:
    check_target(index)
    problems = pin(index)
    for problem in problems:
        print(f"{prog}: {problem}", file=sys.stderr)
    entries = read_index(index)
    pinned = sum(entry.sha256 is not None for entry in entries)
    print(f"{pinned} of {len(entries)} files are pinned in {index}")
    return 1 if problems else 0


def _parser(prog: str) -> Parser:
    parser = Parser(prog, description="The weights that the package knows.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    verify = commands.add_parser(
        "verify",
        help="compare weights with their sha256",
        description="Verify every file of a release by its sha256, and that the weights fit the "
        "model strictly.",
    )
    verify.add_argument(
        "target",
        nargs="?",
        metavar="TARGET",
        help="a folder, ORG/NAME on the Hugging Face Hub, or MODEL.TAG of the index; the weights "
        "in the package unless given",
    )
    pin_parser = commands.add_parser(
        "pin",
        help="fill in what the index does not know",
        description="Ask the Hugging Face Hub for the commit and the sha256 of every file of "
        "weights for which the index has null. What is pinned stays.",
    )
    pin_parser.add_argument(
        "--index",
        type=Path,
        default=INDEX_FILE,
        metavar="FILE",
        help="an index file; the package's own unless given",
    )
    return parser
