"""`emax list`: a table of the registered models, with their size, cost and weights.

The numbers follow from the shapes of tensors on the meta device, which hold no data, so that no
large model is run; only a model whose computation depends on values is.
"""

import dataclasses
import json
import math
import os
import pkgutil
import shlex
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from tqdm import tqdm

from .. import models
from ..models.cost import BATCH, activation_bytes, count_macs, estimated_cost
from ..runner import command
from ..tables import marks, text_around, write_between
from ..training.config import Parser, UsageError, nearest

__all__ = ["ModelRow", "list_models", "markdown", "measure", "model_names", "plain_text"]

REFERENCE = "swin_tiny_patch4_window7_224"
COMPARISON = "timm's own, for comparison"
MARK = "models"
NUMBERS = ("Parameters (M)", "MACs (G)", "Activations (MB)")
COLUMNS = ("Model", *NUMBERS, "Input", "Pretrained tags", "Licence of the weights")
NOTE = (
    "MACs are the multiply-accumulates of one image in evaluation, those of convolutions and "
    "matrix products; pooling, sigmoid, norms and other elementwise work count nothing. "
    "Activations are what autograd keeps for the backward pass of float32 training, in MB (10^6 "
    f"bytes) per image in a batch of {BATCH}, the image included, without parameters, buffers, "
    "gradients and short-lived memory; they are those of torch's CPU kernels and may vary a little "
    "with the version of torch and with the device."
)


@dataclasses.dataclass(frozen=True)
class ModelRow:
    """A row of the table: a model with its default arguments.

    Args:
        model: The name of the model.
        parameters: The number of its parameters.
        macs: Multiply-accumulates of one image in evaluation.
        activation_bytes: Bytes that autograd keeps for the backward pass, per image.
        input_size: Channels, height and width.
        tags: The tags of its pretrained weights in timm's registry.
        licences: The licence of the weights of each tag.
        reference: Whether it is a timm model that is listed for comparison.
    """

    model: str
    parameters: int
    macs: int
    activation_bytes: int
    input_size: tuple[int, ...]
    tags: tuple[str, ...]
    licences: tuple[str, ...]
    reference: bool


@command("emax list")
def list_models(argv: Sequence[str], prog: str) -> int:
    """Print the table of models, and return the exit status."""
    options = _parser(prog).parse_args(argv)
    if options.write is not None:
        text_around(options.write, MARK)  # refuses a bad file before anything is measured
    names = model_names(options.filter)
    # disable=None shows the progress bar on a terminal only.
    rows = [measure(name) for name in tqdm(names, leave=False, disable=None)]
    if options.write is not None:
        words = [options.filter] if options.filter else []
        made_by = shlex.join([*prog.split(), *words, "--write", os.path.relpath(options.write)])
        write_between(options.write, MARK, f"Made by `{made_by}`:\n\n{markdown(rows)}\n")
    table = markdown if options.markdown else plain_text
    objects = [dataclasses.asdict(row) for row in rows]
    print(json.dumps(objects, indent=2) if options.json else table(rows))
    return 0


def model_names(pattern: str = "") -> list[str]:
    """List the package's models that match a pattern, and last `REFERENCE` if it matches too.

    Args:
        pattern: As in `timm.list_models`; "" for all models.

    Raises:
        UsageError: If no model matches.
    """
    modules = [m.name for m in pkgutil.iter_modules(models.__path__) if m.name.startswith("emax_")]
    names = timm.list_models(pattern, module=modules)
    names += [name for name in timm.list_models(pattern) if name == REFERENCE]
    if not names:
        spelt = nearest(pattern.strip("*?"), [*timm.list_models(module=modules), REFERENCE])
        raise UsageError(f"no model matches {pattern}; the nearest name is {spelt}")
    return names


def measure(name: str) -> ModelRow:
    """Measure a model with its default arguments at its default input size."""
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name)
        size = resolve_model_data_config(model)["input_size"]
        macs, kept = estimated_cost(model, size)
    except RuntimeError:  # the computation depends on values, which meta tensors lack
        model = timm.create_model(name)
        size = resolve_model_data_config(model)["input_size"]
        macs = count_macs(model, torch.zeros(1, *size))
        # A batch of one is too small for some norms.
        kept = activation_bytes(model, torch.zeros(2, *size)) / 2
    weights = timm.list_models(name, pretrained=True)
    cfgs = map(timm.get_pretrained_cfg, weights)
    return ModelRow(
        model=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        macs=macs,
        activation_bytes=round(kept),
        input_size=tuple(size),
        tags=tuple(tagged.partition(".")[2] or "untagged" for tagged in weights),
        licences=tuple(getattr(cfg, "license", None) or "not stated" for cfg in cfgs),
        reference=name == REFERENCE,
    )


def markdown(rows: Sequence[ModelRow]) -> str:
    """Format the table as Markdown, with a note that defines its columns."""
    lines = [list(COLUMNS), ["---:" if column in NUMBERS else "---" for column in COLUMNS]]
    for row in rows:
        name, *cells = _cells(row)
        lines.append([f"`{name}`" + f" ({COMPARISON})" * row.reference, *cells])
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{textwrap.fill(NOTE, 100)}"


def plain_text(rows: Sequence[ModelRow]) -> str:
    """Format the table as aligned columns."""
    columns = []
    for head, *cells in zip(COLUMNS, *map(_cells, rows), strict=True):
        width = max(map(len, [head, *cells]))
        align = str.rjust if head in NUMBERS else str.ljust
        columns.append([align(cell, width) for cell in [head, *cells]])
    lines = ["  ".join(cells).rstrip() for cells in zip(*columns, strict=True)]
    return "\n".join(lines + [f"{row.model}: {COMPARISON}" for row in rows if row.reference])


def _cells(row: ModelRow) -> list[str]:
    figures = (row.parameters / 1e6, row.macs / 1e9, row.activation_bytes / 1e6)
    licences = row.licences if len(set(row.licences)) > 1 else row.licences[:1]
    size = " x ".join(map(str, row.input_size))
    lists = [", ".join(words) or "-" for words in (row.tags, licences)]
    return [row.model, *map(_rounded, figures), size, *lists]


def _rounded(value: float) -> str:
    """Format a number with three significant digits and without an exponent."""
    value = float(f"{value:.3g}")
    return f"{value:.{max(0, 2 - math.floor(math.log10(value or 1)))}f}"


def _parser(prog: str) -> Parser:
    parser = Parser(prog, description="List the models.", epilog=NOTE, allow_abbrev=False)
    parser.add_argument("filter", nargs="?", default="", metavar="FILTER", help='as "resnet*"')
    formats = parser.add_mutually_exclusive_group()
    formats.add_argument("--json", action="store_true", help="print objects, not rounded")
    formats.add_argument("--markdown", action="store_true", help="print a Markdown table")
    begin, end = marks(MARK)
    text = f"also put the Markdown table between the lines {begin} and {end} of FILE"
    parser.add_argument("--write", type=Path, metavar="FILE", help=text)
    return parser
