"""The log of a run: a row per epoch in its directory, lines on the terminal, and its summary.

log.csv and log.jsonl hold the same rows. Spreadsheets and pandas open the first, and a release on
the Hugging Face Hub has it; the second distinguishes numbers, nulls and text, so that commands such
as `emax curves` read back what was written. layers.jsonl has rows of nested values, for which CSV
has no form.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..files import lock_folder, remove_partial, replace_file, writing_to
from . import checkpoint
from .config import UsageError, to_yaml
from .evaluate import Metrics
from .model_config import save_model_config
from .run import Run
from .statistics import scalars
from .trackers import open_trackers

__all__ = [
    "LAYERS",
    "LOG",
    "RunLog",
    "closing_line",
    "open_log",
    "read_rows",
    "record_epoch",
    "write_summary",
]

LOG, LAYERS, SUMMARY = "log.jsonl", "layers.jsonl", "summary.json"

COLUMNS = [
    *("epoch", "step", "lr", "train_loss", "broken", "val_loss", "val_top1", "val_top5"),
    *("seconds", "images_per_second", "data_wait"),
]


class RunLog:
    """The files log.csv, log.jsonl and layers.jsonl of a run, to which every epoch appends.

    Args:
        folder: The run directory.
        columns: The keys of every row.
        rows, layers: The rows of earlier epochs; anything else in the files is dropped.
        track: Called with the epoch and the numbers of every row that is written.
    """

    def __init__(
        self,
        folder: Path,
        columns: list[str],
        rows: Sequence[dict[str, Any]],
        layers: Sequence[dict[str, Any]],
        track: Callable[[int, dict[str, float]], object],
    ) -> None:
        self.csv, self.jsonl, self.layers = folder / "log.csv", folder / LOG, folder / LAYERS
        self.columns, self.track = columns, track
        header = self._csv_line(dict(zip(columns, columns, strict=True)))
        past = {
            self.csv: header + "".join(map(self._csv_line, rows)),
            self.jsonl: "".join(map(_json_line, rows)),
            self.layers: "".join(map(_json_line, layers)),
        }
        for path, text in past.items():
            if text:
                replace_file(path, lambda file, text=text: file.write_bytes(text.encode()))
            else:
                path.unlink(missing_ok=True)

    def write(self, row: dict[str, Any], layers: dict[str, Any]) -> None:
        """Append the row of an epoch, and give its numbers to the trackers.

        Args:
            row: The values of the columns.
            layers: The epoch and, by its name, the statistics of each EMAX layer; empty for none.

        Raises:
            ValueError: If a key of `row` is not a column.
        """
        _append(self.csv, self._csv_line(row))
        _append(self.jsonl, _json_line(row))
        if layers:
            _append(self.layers, _json_line(layers))
        # Trackers get the epoch as their step.
        numbers = {k: v for k, v in row.items() if v is not None and k not in ("epoch", "step")}
        by_name = {name: values for name, values in layers.items() if name != "epoch"}
        self.track(row["epoch"], numbers | scalars(by_name))

    def _csv_line(self, row: dict[str, Any]) -> str:
        line = io.StringIO()
        csv.DictWriter(line, self.columns).writerow(row)
        return line.getvalue()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a .jsonl file; there are none if there is no file.

    An incomplete last line, which a run that was killed leaves, is dropped.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


def _append(path: Path, line: str) -> None:
    with path.open("ab") as file:
        file.write(line.encode())


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(_finite(row)) + "\n"


def _finite(value: Any) -> Any:
    """Return the value with None for every number that is not finite, also in nested dicts."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def open_log(run: Run, stack: ExitStack) -> RunLog | None:
    """Create and lock the run directory, and write its configuration.

    Returns the log on rank 0, and None on the others, which do nothing here.

    Args:
        run: The run, whose epochs so far are written to the log anew.
        stack: Holds the directory's lock and the trackers.

    Raises:
        UsageError: If the directory cannot be written to, or another process is training in it.
    """
    if not run.context.is_primary:
        return None
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        if not stack.enter_context(lock_folder(run.folder)):
            raise UsageError(f"another process is training in {run.folder}")
        for folder in (run.folder, run.folder / checkpoint.CHECKPOINTS):
            remove_partial(folder)
        replace_file(
            run.folder / checkpoint.CONFIG,
            lambda file: file.write_text(to_yaml(run.config)),
        )
        save_model_config(
            run.model,
            run.folder / checkpoint.MODEL_CONFIG,
            run.config.model_kwargs,
            run.data_config,
            run.classes,
        )
        track = open_trackers(run.config.log_to, run.folder, asdict(run.config), run.epoch)
        track = stack.enter_context(track)
        return RunLog(run.folder, COLUMNS, run.rows, run.layers, track)
    except OSError as error:
        raise UsageError(f"cannot write to {run.folder}: {error.strerror}") from None


def record_epoch(
    run: Run,
    log: RunLog | None,
    loss: float,
    metrics: Metrics | None,
    lr: float,
    seconds: float,
) -> None:
    """Record a finished epoch in the run's rows, its log and on the terminal.

    Args:
        run: The run; its `epoch` already counts the finished epoch.
        log: The log files; None on all ranks but the primary one.
        loss: Mean training loss of the epoch.
        metrics: Metrics of the epoch's validation, if there was one.
        lr: The learning rate at the end of the epoch.
        seconds: Time of training and validation.
    """
    values = metrics._asdict() if metrics is not None else {}
    row = {
        "epoch": run.epoch - 1,
        "step": run.step,
        "lr": lr,
        "train_loss": loss,
        "broken": run.guard.corrupt,
        **{f"val_{name}": values.get(name) for name in Metrics._fields},
        "seconds": round(seconds, 3),
        "images_per_second": round(run.timing.images_per_second, 1),
        "data_wait": round(run.timing.data_wait, 3),
    }
    run.rows.append(row)
    if log is None:
        return
    layers = run.statistics.measure(run.published)
    if layers:
        run.layers.append({"epoch": run.epoch - 1, **layers})
    with writing_to(run.folder):
        log.write(row, run.layers[-1] if layers else {})
    parts = [f"epoch {run.epoch}/{run.epochs}", f"loss: {loss:.4f}"]
    if run.guard.corrupt:
        parts.append(f"corrupt images: {run.guard.corrupt}")
    if metrics:
        parts.append(f"validation loss: {metrics.loss:.4f} {metrics}")
    print("  ".join([*parts, f"{seconds:.1f} s"]), flush=True)


def write_summary(run: Run, test: Metrics | None) -> None:
    """Write summary.json with the results of a run that has ended."""
    summary = {
        "model": run.config.model,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "epochs": run.epoch,
        "best_epoch": run.best_epoch,
        "validation": run.best and run.best._asdict(),
        "test": test and test._asdict(),
        "seconds": round(run.seconds, 1),
    }
    text = json.dumps(summary, indent=2) + "\n"
    with writing_to(run.folder):
        replace_file(run.folder / SUMMARY, lambda file: file.write_text(text))


def closing_line(run: Run, test: Metrics | None) -> str:
    """Return the last line on the terminal: the file of the best weights and their metrics."""
    parts = [f"{run.folder / checkpoint.BEST}  {run.seconds:.0f} s"]
    if run.best is not None:
        parts.append(f"validation (epoch {run.best_epoch}) {run.best}")
    if test is not None:
        parts.append(f"test {test}")
    return "  ".join(parts)
