"""The statistics against scipy and by hand."""

import numpy as np
import pytest
from scipy import stats

from emax_timm.compare.statistics import holm, paired, t_p_value, t_quantile, unpaired


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 9, 10, 57])
def test_t_distribution(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom))
    for t in (-3.7, 0.0, 0.4, 2.3, 40.0):
        expected = 2 * stats.t.sf(abs(t), freedom)
        assert t_p_value(t, freedom) == pytest.approx(expected, abs=1e-12)


def test_paired_difference() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=10), random.normal(size=10)
    found, expected = paired(a.tolist(), b.tolist()), stats.ttest_rel(a, b)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx((a - b).mean())
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.size == 10


def test_unpaired_difference_has_rather_too_wide_an_interval() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=10), random.normal(1.0, 3.0, size=6)
    found = unpaired(a.tolist(), b.tolist())
    low, high = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found.mean == pytest.approx(a.mean() - b.mean())
    assert found.half_width is not None
    assert (high - low) / 2 <= found.half_width <= 1.1 * (high - low) / 2


def test_a_single_pair_has_no_interval_and_equal_pairs_have_no_difference() -> None:
    assert paired([2.0], [1.5])[:3] == (0.5, None, None)
    assert paired([2.0, 3.0], [2.0, 3.0])[:3] == (0.0, 0.0, 1.0)
    assert paired([2.0, 3.0], [1.0, 2.0])[:3] == (1.0, 0.0, 0.0)
    assert unpaired([2.0], [1.0])[:3] == (1.0, None, None)


def test_holm() -> None:
    # 0.01 x 4, 0.02 x 3, then the greatest so far, at most 1.
    assert holm([0.03, 0.01, 0.9, 0.02]) == pytest.approx([0.06, 0.04, 0.9, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([0.03, 0.01], 4) == pytest.approx([0.09, 0.04])
    assert holm([]) == []
