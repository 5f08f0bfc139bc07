"""The search of one method's options: its trials, kept by Optuna."""

import importlib
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..training.config import UsageError
from ..training.journal import LOG, read_rows
from .cells import Cell, Run
from .command import job_of
from .results import RESULT, read_json
from .workers import Workers, has_result

__all__ = ["Search", "candidates", "listed", "load_optuna"]

NEEDED = "emax tune needs the package optuna: pip install 'emax-timm[tune]'"


def load_optuna() -> Any:
    """Import Optuna, which is an extra.

    Raises:
        UsageError: If it is missing.
    """
    try:
        return importlib.import_module("optuna")
    except ImportError:
        raise UsageError(NEEDED) from None


def candidates(values: Any, source: str) -> list[Any]:
    """Return the listed values of an option, or the two ends of its range.

    Raises:
        UsageError: If it is neither a list of different values nor a range.
    """
    if isinstance(values, list) and values:
        if len({_stored(value) for value in values}) == len(values):
            return values
    elif isinstance(values, dict) and {"low", "high"} <= values.keys() <= {"low", "high", "log"}:
        low, high, log = values["low"], values["high"], values.get("log", False)
        numbers = all(type(value) in (int, float) and math.isfinite(value) for value in (low, high))
        if numbers and low < high and isinstance(log, bool) and not (log and low <= 0):
            return [low, high]
    raise UsageError(
        f"{source} must be a list of different values, or a range "
        "{low: …, high: …, log: true or false} "
        f"with low < high, not {values!r}"
    )


class Search:
    """The trials of a cell, one after the other.

    Args:
        cell: The folder of the cell: backbone/method.
        space: By option a list of values, or a range.
        cell_with: Makes the cell with given values, as a trial or (False) as in the study.
        options: The `TuneOptions`.
        folder: The folder of all trials.

    Attributes:
        folder: The run directory of the trial that is being made; None between trials.
        epochs: The number of its epochs that Optuna knows.
        done: The number of trials that have ended, one way or another.
    """

    def __init__(
        self,
        cell: Path,
        space: dict[str, Any],
        cell_with: Callable[..., Cell],
        options: Any,
        folder: Path,
    ) -> None:
        self.cell, self.space, self.cell_with = cell, space, cell_with
        self.options, self.root = options, folder
        self.folder: Path | None = None
        self.epochs = self.done = 0
        self.study: Any = None  # of Optuna, as is the trial
        self.trial: Any = None

    def open(self, storage: str, prune: dict[str, Any]) -> None:
        """Open the trials in Optuna's storage; a pruner stops them by the declared rule."""
        optuna = load_optuna()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        pruner = optuna.pruners.NopPruner()
        if prune["rule"] == "median":
            pruner = optuna.pruners.MedianPruner(prune["trials"], prune["epochs"])
        direction = "minimize" if self.options.metric == "loss" else "maximize"
        self.study = optuna.create_study(
            study_name=str(self.cell),
            storage=storage,
            pruner=pruner,
            direction=direction,
            load_if_exists=True,
        )
        if self.options.sampler == "grid":
            for point in itertools.product(*self.space.values()):
                values = map(_stored, point)
                values = dict(zip(self.space, values, strict=True))
                self.study.enqueue_trial(values, skip_if_exists=True)
        self._count()

    def left(self) -> bool:
        """Return whether there are trials to make."""
        return self.done < self.options.trials

    def _count(self) -> None:
        trials = self.study.get_trials(deepcopy=False)
        self.done = sum(trial.state.is_finished() for trial in trials)

    def start(self, workers: Workers, device: str, data_dir: str | None) -> None:
        """Start the next trial, or go on with the one that was interrupted."""
        optuna = load_optuna()
        running = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        if running:
            self.trial = optuna.Trial(self.study, running[0]._trial_id)
        else:
            # A sampler of its own for each trial, so that a search that is continued does not
            # draw the same numbers again.
            seed = self.options.seed + len(self.study.get_trials(deepcopy=False))
            kind = optuna.samplers
            tpe = self.options.sampler == "tpe"
            self.study.sampler = kind.TPESampler(seed=seed) if tpe else kind.RandomSampler(seed)
            self.trial = self.study.ask()
        values = {key: self._suggest(key, choices) for key, choices in self.space.items()}
        cell = self.cell_with(values)
        self.folder = self.root / self.cell / f"trial-{self.trial.number:03}"
        self.epochs = 0
        if has_result(self.folder):  # it had ended, but that was not noted
            self.finish()
        else:
            job = job_of(Run(cell, self.options.seed), str(self.root), device, data_dir)
            workers.start({self.folder: job})

    def _suggest(self, key: str, values: Any) -> Any:
        if isinstance(values, list):
            chosen = self.trial.suggest_categorical(key, [_stored(value) for value in values])
            return listed(values, chosen)
        log = bool(values.get("log"))
        if isinstance(values["low"], int) and isinstance(values["high"], int):
            return self.trial.suggest_int(key, values["low"], values["high"], log=log)
        return self.trial.suggest_float(key, values["low"], values["high"], log=log)

    def best(self) -> Any:
        """Return the best trial that was made to its end; None if there is none."""
        finished = [trial for trial in self.study.get_trials() if trial.state.name == "COMPLETE"]
        return self.study.best_trial if finished else None

    def watch(self, workers: Workers) -> None:
        """Report the epochs that the trial has finished, and stop it if the rule says so."""
        if self.folder is None or self.folder not in workers.running:
            return
        if len(read_rows(self.folder / LOG)) == self.epochs:
            return  # nothing new, and each question to Optuna takes milliseconds
        if self._report() and self.folder not in workers.asked and self._should_stop():
            workers.end(self.folder)

    def _should_stop(self) -> bool:
        return self.trial.should_prune()

    def _report(self) -> list[float]:
        """Report the metric of the epochs so far to Optuna; returns them."""
        assert self.folder is not None
        rows = read_rows(self.folder / LOG)
        self.epochs = len(rows)
        metrics = [row[f"val_{self.options.metric}"] for row in rows]
        known = self.study.get_trials(deepcopy=False)[self.trial.number].intermediate_values
        for epoch, value in enumerate(metrics, 1):
            if value is not None and epoch not in known:
                self.trial.report(value, epoch)
        return [value for value in metrics if value is not None]

    def finish(self) -> None:
        """Tell Optuna how the trial has ended."""
        optuna = load_optuna()
        assert self.folder is not None
        values = self._report()
        state = optuna.trial.TrialState
        best, how = None, "diverged"
        if not has_result(self.folder):
            how = "stopped early"
            self.study.tell(self.trial, state=state.PRUNED)
        elif not values or read_json(self.folder / RESULT)["diverged"]:
            self.study.tell(self.trial, state=state.FAIL)
        else:
            best = min(values) if self.options.metric == "loss" else max(values)
            self.study.tell(self.trial, best)
        shown = f"{self.options.metric} {best:.4f}" if best is not None else how
        print(f"{self.folder.relative_to(self.root)}: {shown}", flush=True)
        self.folder = self.trial = None
        self._count()


def listed(values: list[Any], chosen: Any) -> Any:
    """Return which of the listed values Optuna has chosen, as it stores it."""
    return next(value for value in values if _stored(value) == chosen)


def _stored(value: Any) -> Any:
    """Return a value as Optuna stores it, which takes no lists."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value
