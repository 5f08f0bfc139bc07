"""What `.ci/gpu` tells: a page of Markdown, and the counts of tests."""

import json
import re
from typing import Any

__all__ = ["markdown", "outcomes"]

# Of `pytest -v`, with and without pytest-xdist.
PATTERNS = (
    re.compile(r"^\[gw\d+\] \[ *\d+%\] (?P<how>[A-Z]+) (?P<test>\S.*?) *$", re.MULTILINE),
    re.compile(r"^(?P<test>\S+::.*?) (?P<how>PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE),
)
SHOWN = 3000  # characters of a result without a report


def outcomes(output: str) -> dict[str, Any] | None:
    """Count the tests in the output of `pytest -v` by how they ended, and name the failed ones."""
    counts: dict[str, int] = {}
    failed = []
    for pattern in PATTERNS:
        for match in pattern.finditer(output):
            how = match["how"].lower()
            counts[how] = counts.get(how, 0) + 1
            if how in ("failed", "error"):
                failed.append(match["test"])
    return {**counts, "which": failed} if counts else None


def markdown(found: dict[str, Any]) -> str:
    """Format the results as a page: the machine, a table of parts, and their reports."""
    machine = {key: value for key, value in found["machine"].items() if key != "modules"}
    lines = ["# On a GPU", "", *(f"- {key}: {value}" for key, value in machine.items()), ""]
    lines += ["| part | | seconds | limit | what it shows | |", "| --- " * 6 + "|"]
    for name, one in found["parts"].items():
        message = one["message"].replace("|", "/")[:300]
        cells = [name, f"**{one['status']}**", f"{one['seconds']:.0f}", str(one["limit"])]
        lines.append(f"| {' | '.join([*cells, one['text'], message])} |")
    lines += ["", f"{found.get('seconds', 0):.0f} seconds in all."]
    for name, one in found["parts"].items():
        lines += ["", f"## {name}: {one['text']}"]
        if one["message"]:
            lines += ["", f"{one['status']}: {one['message']}"]
        for report, result in zip(one["reports"], one["results"], strict=True):
            if report:
                lines += ["", report.strip()]
            elif result is not None:
                lines += ["", "```", json.dumps(result, indent=1)[:SHOWN], "```"]
    return "\n".join(lines) + "\n"
