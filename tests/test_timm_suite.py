"""timm's own model tests pass; see timm_suite.py, which records a run on all models."""

import re
from collections import Counter
from pathlib import Path

import pytest
import timm_suite

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_timm_suite_passes_on_the_smallest_model(tmp_path: Path) -> None:
    suite = timm_suite.fetch(tmp_path)
    counts = timm_suite.run(suite, timm_suite.SMALL, output=True, workers="0")
    for name, counter in counts.items():
        assert counter["passed"] >= 9, name
        # None skipped either.
        assert set(counter) == {"passed"}, name


def test_timm_suite_record_is_of_all_models_and_none_failed() -> None:
    record = (ROOT / "docs" / "timm_suite.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (\d+) \|$", record, flags=re.MULTILINE)
    assert sorted(row[0] for row in rows) == sorted(timm_suite.ALL)
    assert all(int(passed) >= 9 and failed == "0" for _, passed, failed, _ in rows)


def test_timm_suite_counts_what_failed() -> None:
    record = timm_suite.markdown({"a": Counter(passed=2), "b": Counter(passed=1, failed=1)})
    assert "| b | 1 | 1 | 0 |\n| all 2 | 3 | 1 | 0 |" in record
