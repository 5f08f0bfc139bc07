"""What the dynamic grouping of a study's trained networks does on the test split.

Beside the result of each run it writes which group counts the EMAX layers choose, by class and by
slice of the test set, the accuracy with every layer forced to a count, and the gradients of the
controllers that the run has recorded.
"""

import contextlib
import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..attention import EMAX
from ..attention.schedule import set_grouping
from ..files import sha256_of
from ..models.capture import capture_attention
from ..training import checkpoint
from ..training.config import UsageError, nearest
from ..training.distributed import DistributedContext, open_distributed_context
from ..training.journal import read_rows
from ..training.progress import working
from ..training.trainer import Trainer
from .cells import Run, machine_options, train_config
from .gradients import GRADIENTS, choosing_layers
from .outcome import outcomes, slices_of
from .provenance import environment
from .results import GROUPING, read_json, write_json
from .run import RESULT, trainer_of
from .study import Study

__all__ = [
    "AS_TRAINED",
    "MOST_FREQUENT",
    "analyse",
    "check_methods",
    "force_counts",
]

AS_TRAINED, MOST_FREQUENT = "as trained", "each layer's most frequent"


def check_methods(study: Study, methods: list[str]) -> None:
    """Check that the study has the methods.

    Raises:
        UsageError: If it does not.
    """
    for name in methods:
        if name not in study.methods:
            raise UsageError(
                f"--grouping: unknown method {name}; the nearest of {', '.join(study.methods)} "
                f"is {nearest(name, study.methods)}"
            )


def analyse(
    study: Study, folder: Path, methods: list[str], device: str, data_dir: str | None
) -> None:
    """Write `GROUPING` beside the result of every run of the methods that has ended.

    A run whose file is of the same weights is left out.

    Raises:
        UsageError: If a run has no weights, or no layer that chooses its group count.
    """
    ended = [run for run in study.runs() if (folder / run.folder / RESULT).exists()]
    todo = [run for run in ended if run.cell.method in methods and _is_due(folder / run.folder)]
    with open_distributed_context(device) as context:
        for number, run in enumerate(todo, 1):
            path = folder / run.folder
            settings = machine_options(device, data_dir)
            with working(f"{run}: group counts"):
                content = _of_run(run, path, settings, context)
            write_json(path / GROUPING, content, indent=None)
            print(f"{number}/{len(todo)} {run}: group counts", flush=True)


def _is_due(folder: Path) -> bool:
    weights, path = folder / checkpoint.BEST, folder / GROUPING
    if not weights.exists():
        if path.exists():  # made elsewhere, and merged
            return False
        if read_json(folder / RESULT).get("diverged"):  # before its first weights were saved
            return False
        raise UsageError(
            f"{folder} has no {weights.name}; give the folder that its run was made in"
        )
    return not path.exists() or read_json(path).get("weights") != sha256_of(weights)


def _of_run(
    run: Run, folder: Path, settings: dict[str, Any], context: DistributedContext
) -> dict[str, Any]:
    config = train_config(run.cell, seed=run.seed, output=str(folder), **settings)
    with contextlib.redirect_stdout(io.StringIO()):  # what its data are
        trainer = trainer_of(config, run.cell.experiment, context)
    weights = folder / checkpoint.BEST
    checkpoint.load_weights(trainer.model, weights)
    layers = choosing_layers(trainer.model)
    if not layers:
        raise UsageError(f"{run.cell.folder}: no layer chooses its group count")
    if trainer.test_loader is None:
        raise UsageError(f"{run.cell.folder} has no test split")
    top1, found = _choices(trainer, layers)
    accuracy = {AS_TRAINED: top1}
    frequent = {
        name: own["group_counts"][max(range(len(own["chosen"])), key=own["chosen"].__getitem__)]
        for name, own in found.items()
    }
    every = sorted({count for layer in layers.values() for count in layer.candidates})
    forced = {str(count): dict.fromkeys(layers, count) for count in every}
    for name, counts in {MOST_FREQUENT: frequent, **forced}.items():
        force_counts(trainer.model, counts)
        accuracy[name] = outcomes(trainer, trainer.test_loader)[0]["top1"]
    return {
        "weights": sha256_of(weights),
        **environment(context),
        "top1": accuracy,
        "layers": found,
        "gradients": _gradients(folder / GRADIENTS),
    }


@torch.no_grad()
def force_counts(model: nn.Module, counts: Mapping[str, int]) -> None:
    """Make EMAX layers use a group count for every image, in place; their controllers are lost.

    Args:
        model: The model, in which the full warm-up is set.
        counts: The group counts by the names of the layers. A layer that does not have a count as
            a candidate gets the greatest below it, or else its smallest.
    """
    set_grouping(model, warmup=1.0)
    layers = choosing_layers(model)
    for name, count in counts.items():
        layer, controller = layers[name], layers[name].group_controller
        below = [k for k, candidate in enumerate(layer.candidates) if candidate <= count]
        controller.weight.zero_()  # type: ignore[union-attr]
        controller.bias.zero_()  # type: ignore[union-attr]
        controller.bias[below[-1] if below else 0] = 1.0  # type: ignore[union-attr]


def _choices(trainer: Trainer, layers: dict[str, EMAX]) -> tuple[float, dict[str, Any]]:
    """Test the model as it is; return its top-1, and which counts each layer chooses."""
    loader, labels = trainer.test_loader, []
    chosen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, targets in loader:
            labels.append(targets.cpu())
            yield images, targets

    with capture_attention(trainer.model) as maps:

        def note(*_: Any) -> None:
            for name, counts in chosen.items():
                counts.append(maps[name].group_count)  # type: ignore[union-attr]

        handle = trainer.model.register_forward_hook(note)
        try:
            metrics, _ = outcomes(trainer, batches())
        finally:
            handle.remove()
    target, found = torch.cat(labels), {}
    classes = trainer.classes or [str(label) for label in range(int(target.max()) + 1)]
    for name, layer in layers.items():
        one_hot = torch.cat(chosen[name])[:, None] == torch.tensor(layer.candidates)  # [n, K]
        found[name] = {
            "group_counts": list(layer.candidates),
            "chosen": one_hot.sum(0).tolist(),
            "by_class": {
                label: one_hot[target == index].sum(0).tolist()
                for index, label in enumerate(classes)
            },
            "by_slice": {
                part: one_hot[torch.from_numpy(indices)].sum(0).tolist()
                for part, indices in slices_of(loader.dataset).items()
            },
        }
    return metrics["top1"], found


def _gradients(path: Path) -> dict[str, Any]:
    """Return the columns of the rows that `record_gradients` has written; empty without any."""
    rows = read_rows(path)
    if not rows:
        return {}

    def column(*keys: str) -> list[float]:
        values = []
        for value in rows:
            for key in keys:
                value = value[key]
            values.append(float(f"{value:.4g}"))
        return values

    return {
        "step": [row["step"] for row in rows],
        "network": column("network"),
        "layers": {
            name: {kind: column("layers", name, kind) for kind in ("controller", "other")}
            for name in rows[0]["layers"]
        },
    }
