"""The report of a study in Markdown: the primary comparison first, then all methods."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..tables import heading, row
from ..training.config import to_yaml
from .costs import cost_table
from .grouping_report import Groupings, grouping_report
from .results import Results
from .statistics import Difference, holm, paired, signed, unpaired
from .study import Study

__all__ = ["difference", "is_paired", "report", "summary", "values_of"]

UNITS = {"top1": ("top-1 (%)", 2), "top5": ("top-5 (%)", 2), "loss": ("loss", 4)}


def report(
    study: Study,
    results: Results,
    costs: dict[str, Any],
    groupings: dict[str, Groupings],
    made_by: str,
    declared: str,
) -> str:
    """Write the report.

    Args:
        study: The study.
        results: The results so far; there must be one.
        costs: What `costs.measure` has measured, if it has.
        groupings: For each backbone what `grouping.analyse` has found.
        made_by: The command, as it was typed.
        declared: Says when the primary comparison was declared.
    """
    wanted = len(study.runs())
    parts = [f"# {study.name}", "", f"Made by `{made_by}`: {len(results)} of {wanted} runs."]
    parts += ["", *_primary(study, results, declared)]
    for backbone in study.backbones:
        if any(key[0] == backbone for key in results):
            parts += ["", f"## {backbone}"]
            for metric in study.file.metrics:
                parts += ["", *_methods(study, results, backbone, metric)]
            parts += ["", *cost_table(study, results, costs, backbone)]
            parts += _slices(study, results, backbone)
            parts += grouping_report(groupings.get(backbone, {}))
    parts += ["", *_diverged(results), "## How it was made", "", *_origin(study, results)]
    return "\n".join(parts) + "\n"


def summary(study: Study, results: Results, made_by: str, declared: str) -> str:
    """Write the primary comparison, and the table of the methods on its backbone.

    Args:
        study, results, made_by, declared: As for `report`.
    """
    (_, _, *primary), origin = _primary(study, results, declared), _facts(study, results)
    names = "processor time of all runs", "finished between", "devices", "commits", "seeds"
    parts = [f"Made by `{made_by}`: {len(results)} of {len(study.runs())} runs.", "", *primary, ""]
    parts += [*_methods(study, results, study.primary.backbone, study.primary.metric), ""]
    parts += [f"- {name}: {origin[name]}" for name in names]
    return "\n".join(parts) + "\n"


def values_of(results: Results, backbone: str, method: str, metric: str) -> dict[int, float]:
    """Return the test metric of each run of a cell, by its seed."""
    return {
        seed: content["test"][metric]
        for (name, kind, seed), content in results.items()
        if (name, kind) == (backbone, method)
    }


def difference(
    study: Study,
    results: Results,
    backbone: str,
    method: str,
    reference: str,
    value: Callable[[dict[str, Any]], float],
) -> Difference | None:
    """Compare a method with a reference over their common seeds; None without a common one."""
    first, second = (
        {seed: value(content) for (b, m, seed), content in results.items() if (b, m) == cell}
        for cell in ((backbone, method), (backbone, reference))
    )
    seeds = [seed for seed in study.file.seeds if seed in first and seed in second]
    if not seeds:
        return None
    together = all(is_paired(study, backbone, name) for name in (method, reference))
    if not together:
        return unpaired(list(first.values()), list(second.values()))
    return paired([first[seed] for seed in seeds], [second[seed] for seed in seeds])


def is_paired(study: Study, backbone: str, method: str) -> bool:
    """Tell whether the runs of a method start from the backbone's weights of their seed."""
    cell = study.cell(backbone, method)
    return cell is not None and cell.paired


def _of(metric: str) -> Callable[[dict[str, Any]], float]:
    return lambda content: content["test"][metric]


def _primary(study: Study, results: Results, said: str) -> list[str]:
    declared = study.primary
    title, digits = UNITS[declared.metric]
    against = " and against ".join(declared.against)
    apart = [
        other
        for other in declared.against
        if not all(is_paired(study, declared.backbone, name) for name in (declared.method, other))
    ]
    welch = f", but Welch's t against {', '.join(apart)}, which is not paired" if apart else ""
    lines = [
        "## Primary comparison",
        "",
        f"{said}: {title} of {declared.method} against {against}, on "
        f"{declared.backbone}, over {_count(len(study.file.seeds), 'seed')} with the same initial "
        "weights of the backbone and the same order of the data. The interval is Student's t over "
        f"the differences of each seed, at 95 %{welch}; p is Holm's, over "
        f"{_count(len(declared.against), 'comparison')}.",
        "",
        *heading(["against", "seeds", "difference", "95 % interval", "p"]),
    ]
    found = {
        other: difference(
            study, results, declared.backbone, declared.method, other, _of(declared.metric)
        )
        for other in declared.against
    }
    corrected = _corrected(found)
    for other, result in found.items():
        if result is None:
            lines.append(row([other, "0", "no common seed yet", "", ""]))
            continue
        low_high = ""
        if result.half_width is not None:
            low, high = result.mean - result.half_width, result.mean + result.half_width
            low_high = f"{low:+.{digits}f} to {high:+.{digits}f}"
        cells = [other, str(result.size), f"{result.mean:+.{digits}f}", low_high]
        lines.append(row([*cells, _p(corrected.get(other))]))
    seeds = {
        cell.method: len(cell.seeds) for cell in study.cells if cell.backbone == declared.backbone
    }
    if any(
        result is None or result.size < min(seeds[declared.method], seeds[other])
        for other, result in found.items()
    ):
        lines += ["", "**It is not complete: some of its runs have not been made yet.**"]
    return lines


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _corrected(found: dict[str, Difference | None]) -> dict[str, float]:
    """Return Holm's p-values of the differences that have one, over all that there are."""
    p_values = {k: d.p_value for k, d in found.items() if d is not None and d.p_value is not None}
    return dict(zip(p_values, holm(list(p_values.values()), len(found)), strict=True))


def _methods(study: Study, results: Results, backbone: str, metric: str) -> list[str]:
    title, digits = UNITS[metric]
    present = _present(study, results, backbone)
    references = [name for name in study.file.references if name in present]
    columns: dict[str, dict[str, Difference | None]] = {
        reference: {
            method: difference(study, results, backbone, method, reference, _of(metric))
            for method in present
            if method != reference
        }
        for reference in references
    }
    corrected = {reference: _corrected(found) for reference, found in columns.items()}
    lines = heading(
        ["method", "runs", title, *(f"difference to {name} (p)" for name in references)]
    )
    for method in present:
        values = list(values_of(results, backbone, method, metric).values())
        cells = [_name(study, backbone, method), str(len(values)), _spread(values, digits)]
        for reference in references:
            found = columns[reference].get(method)
            p_value = _p(corrected[reference].get(method))
            cells.append(signed(found, digits) + (f" ({p_value})" if p_value else ""))
        lines.append(row(cells))
    if references:
        lines += [
            "",
            f"Mean ± standard deviation of the runs; differences to {', '.join(references)} ± half "
            "the width of their 95 % interval, which is Student's t over the seeds that both have, "
            "not corrected. p is Holm's over the methods of the column; in another column the same "
            "comparison may have another.",
        ]
    return lines


def _name(study: Study, backbone: str, method: str) -> str:
    return method if is_paired(study, backbone, method) else f"{method} (not paired: Welch's t)"


def _present(study: Study, results: Results, backbone: str) -> list[str]:
    return [name for name in study.methods if any(key[:2] == (backbone, name) for key in results)]


def _spread(values: Sequence[float], digits: int) -> str:
    mean = statistics.mean(values)
    if len(values) == 1 or not math.isfinite(mean):
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _p(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def _slices(study: Study, results: Results, backbone: str) -> list[str]:
    """Compare the accuracy on each slice of the test set, such as a size of the object."""
    slices: dict[str, dict[str, Any]] = {}
    with_slices = {}  # a method that is tested on other images has others, or none
    for key, content in results.items():
        if key[0] == backbone and content["slices"]:
            slices = slices or content["slices"]
            if content["slices"].keys() == slices.keys():
                with_slices[key] = content
    if not slices:
        return []
    results, present = with_slices, _present(study, with_slices, backbone)
    reference = next((name for name in study.file.references if name in present), None)
    names = [f"{name} ({content['images']})" for name, content in slices.items()]
    lines = ["", *heading(["top-1 (%) by slice (images)", *names])]
    for method in present:
        cells = []
        for name in slices:

            def top1(content: dict[str, Any], name: str = name) -> float:
                return content["slices"][name]["top1"]

            runs = [c for key, c in results.items() if key[:2] == (backbone, method)]
            cell = _spread([top1(content) for content in runs], 2)
            if reference is not None and method != reference:
                found = difference(study, results, backbone, method, reference, top1)
                cell += f" ({signed(found, 2)})"
            cells.append(cell)
        lines.append(row([method, *cells]))
    if reference is not None:
        lines += ["", f"In parentheses: the difference to {reference}, as above, without a test."]
    return lines


def _diverged(results: Results) -> list[str]:
    """Name the runs that diverged; they count with the weights that they had."""
    lines = [
        f"- {'/'.join(key[:2])}, seed {key[2]}: {content['diverged']}"
        for key, content in results.items()
        if content["diverged"]
    ]
    if not lines:
        return []
    return [
        "## Runs that diverged",
        "",
        "They are counted above, with the best weights of the epochs before or, in the first "
        "epoch, with those that they had, and not repeated.",
        "",
        *lines,
        "",
    ]


def _facts(study: Study, results: Results) -> dict[str, str]:
    contents = list(results.values())

    def of(*keys: str) -> str:
        return ", ".join(
            sorted({" ".join(str(c[key] or "unknown") for key in keys) for c in contents})
        )

    hours = sum(content["seconds"] for content in contents) / 3600
    # Results of an earlier version do not have it.
    cores = sum(content.get("processor_seconds", content["seconds"]) for content in contents) / 3600
    dates = sorted(content["date"] for content in contents)
    return {
        "training time of all runs": f"{hours:.2f} hours, each run on one device or core",
        "processor time of all runs": f"{cores:.2f} core-hours, with their tests",
        "finished between": f"{dates[0]} and {dates[-1]}",
        "devices": of("device", "machine"),
        "backends of EMAX": of("backend"),
        "commits": of("commit"),
        "versions": f"emax_timm {of('emax_timm')}; torch {of('torch')}; timm {of('timm')}",
        "seeds": ", ".join(map(str, study.file.seeds)),
    }


def _origin(study: Study, results: Results) -> list[str]:
    lines = [f"- {name}: {value}" for name, value in _facts(study, results).items()]
    lines += ["", "The hash of each configuration, which its runs carry:", ""]
    lines += heading(["backbone/method", "hash", "tuned values"])
    for cell in study.cells:
        values = study.values(cell.backbone, cell.method)
        tuned = ", ".join(f"{key}: {value}" for key, value in values.items())
        lines.append(row([str(cell.folder), cell.hash, tuned]))
    lines += ["", "The study file:", "", "```yaml", to_yaml(study.file).rstrip(), "```"]
    return lines
