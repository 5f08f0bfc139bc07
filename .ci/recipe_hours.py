"""Write the estimates at the head of the recipes for ImageNet: `python .ci/recipe_hours.py`.

The hours follow from the speeds in `emax_timm/training/speeds.py`, the memory from `emax plan`.
"""

import re
import textwrap
from pathlib import Path

import emax_timm  # noqa: F401  (registers the models)
from emax_timm.training import TrainConfig
from emax_timm.training.config import from_mapping, read_yaml
from emax_timm.training.plan import Plan, make_plan
from emax_timm.training.speeds import SIZE, TRAINING

__all__ = ["ESTIMATE", "GPUS", "with_estimate"]

FOLDER = Path(__file__).resolve().parents[1] / "configs" / "imagenet"
GPUS = 8
ESTIMATE = re.compile(r"^# Estimates, not measurements: .*?(?=^#$)", re.MULTILINE | re.DOTALL)


def with_estimate(path: Path) -> str:
    """Return the text of a recipe with the estimate that follows from the measured speeds."""
    text = path.read_text(encoding="utf-8")
    made = make_plan(from_mapping(TrainConfig, read_yaml(path), str(path)), GPUS)
    lines = textwrap.wrap(_estimate(made), 98, break_on_hyphens=False)
    changed, times = ESTIMATE.subn(lambda _: "".join(f"# {line}\n" for line in lines), text)
    if times != 1:
        raise ValueError(f"{path} must have one paragraph of estimates, and has {times}")
    return changed


def _estimate(made: Plan) -> str:
    gigabytes = (made.fixed_bytes + made.batch_bytes / 2) / 1e9
    if made.hours is None or made.images_per_second is None:
        hours = f"unknown hours, as the speed of {made.model} was not measured"
    else:
        hours = f"about {_rounded(made.hours)} hours on {GPUS} GPUs such as the {made.card}, "
        hours += f"of which one was measured to train {TRAINING[made.model].images:,} images/s of "
        hours += f"{SIZE} pixels at batch 128"
        if tuple(made.input_size[1:]) != (SIZE, SIZE):
            hours += f", taken as {made.images_per_second / GPUS:,.0f} of {made.input_size[-1]}"
    return (
        f"Estimates, not measurements: {hours}; about {gigabytes:.0f} GB per GPU, from `emax "
        "plan`: weights, gradients, states, and half of its float32 activations, as --amp keeps "
        "them in 16 bits. Loading has to keep up: 8 workers per GPU are a guess."
    )


def _rounded(hours: float) -> str:
    return f"{hours:.1f}" if hours < 10 else f"{hours:.0f}"


if __name__ == "__main__":
    for path in sorted(FOLDER.glob("*.yaml")):
        path.write_text(with_estimate(path), encoding="utf-8")
