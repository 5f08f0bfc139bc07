"""What `emax tune` has found: recipes, the values for the study file, and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..files import replace_file, write_text, writing_to
from ..tables import heading, row
from .plot import NEEDED
from .results import RESULT, read_json
from .search import Search, candidates, listed, load_optuna
from .study import Study

__all__ = ["TUNED", "write_results"]

TUNED = "tuned.yaml"


def write_results(study: Study, searches: Sequence[Search], folder: Path) -> str:
    """Write what each method's best trial chose into the folder of the trials.

    tuned.yaml has the values, for the key `tuned` of a study file, beside those that the study has
    already; BACKBONE-METHOD.yaml is a recipe for train.py; trials.md lists all trials;
    importance.png shows which option mattered.

    Returns:
        The text of trials.md.
    """
    tuned = dict(study.tuned)
    for search in searches:
        if (best := search.best()) is None:
            continue
        values = _values(search, best.params)
        tuned[search.cell.as_posix()] = values
        cell = search.cell_with(values, tuning=False)
        name = "-".join(search.cell.parts)
        recipe = {**cell.settings, "seed": study.file.seeds[0], "experiment": name}
        head = (
            f"# {study.name}: {cell.method} on {cell.backbone}, with the values of the best of\n"
            f"# {search.options.trials} trials ({search.options.metric} {best.value:.6g} on "
            "held-out training data).\n"
        )
        if cell.init or cell.experiment:
            head += "# Its init or experiment is no option of train.py, and so not here.\n"
        write_text(folder / f"{name}.yaml", head + yaml.safe_dump(recipe, sort_keys=False))
    write_text(folder / TUNED, yaml.safe_dump(tuned, sort_keys=False))
    text = "\n".join(_table(search) for search in searches) + _cost(searches, folder)
    write_text(folder / "trials.md", f"# {study.name}: trials\n\n{text}")
    try:
        _draw(searches, folder / "importance.png")
    except ImportError:
        text += f"\nthere is no plot: {NEEDED}\n"
    return text


def _cost(searches: Sequence[Search], folder: Path) -> str:
    """Say how much processor time the trials took."""
    paths = [p for search in searches for p in (folder / search.cell).glob(f"trial-*/{RESULT}")]
    seconds = [read_json(path).get("processor_seconds") for path in paths]
    noted = [value for value in seconds if value is not None]
    return f"\nProcessor time of {len(noted)} trials: {sum(noted) / 3600:.2f} core-hours.\n"


def _values(search: Search, params: dict[str, Any]) -> dict[str, Any]:
    """Return a trial's values as the space lists them."""
    return {
        key: listed(search.space[key], chosen) if isinstance(search.space[key], list) else chosen
        for key, chosen in params.items()
    }


def _table(search: Search) -> str:
    """Return the trials of a search in Markdown."""
    best, keys = search.best(), list(search.space)
    lines = heading(["trial", *keys, f"validation {search.options.metric}", "state"])
    for trial in search.study.get_trials():
        found = list(trial.intermediate_values.values())
        value = trial.value if trial.value is not None else (found[-1] if found else None)
        cells = [str(trial.params.get(key, "")) for key in keys]
        shown = "" if value is None else f"{value:.6g}"
        lines.append(row([str(trial.number), *cells, shown, trial.state.name.lower()]))
    text = f"## {search.cell.as_posix()}\n\n" + "\n".join(lines) + "\n"
    if best is None:
        return text + "\nNo trial ended without diverging, so there is no best one.\n"
    return text + f"\nBest: {_values(search, best.params)}.{_at_the_end(search, best.params)}\n"


def _at_the_end(search: Search, params: dict[str, Any]) -> str:
    """Say which numbers are the greatest or least of the space: a better one may lie beyond."""
    ends = []
    for key, value in params.items():
        ends_of = candidates(search.space[key], key)
        numbers = all(type(v) in (int, float) for v in ends_of)
        if numbers and len(ends_of) > 1 and value in (min(ends_of), max(ends_of)):
            ends.append(key)
    return f" At the end of its range: {', '.join(ends)}." if ends else ""


def _draw(searches: Sequence[Search], path: Path) -> None:
    """Draw how much each option mattered to each method (PED-ANOVA), as far as it can be told."""
    from matplotlib.figure import Figure

    importance = load_optuna().importance
    figure = Figure(figsize=(7, 1 + 1.2 * len(searches)), layout="constrained")
    axes = figure.subplots(len(searches), 1, squeeze=False, sharex=True)[:, 0]
    for axis, search in zip(axes, searches, strict=True):
        axis.set_title(search.cell.as_posix(), fontsize=9)
        axis.set_xlim(0, 1)
        try:
            found = importance.get_param_importances(
                search.study, evaluator=importance.PedAnovaImportanceEvaluator()
            )
        except (RuntimeError, ValueError):  # too few trials were made to their ends
            found = {}
        axis.barh(list(found), list(found.values()))
    axes[-1].set_xlabel("importance for the validation metric")
    with writing_to(path):
        replace_file(path, lambda file: figure.savefig(file, format="png", dpi=100))
