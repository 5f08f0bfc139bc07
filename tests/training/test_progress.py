"""What a run says of its speed."""

import time
from collections.abc import Iterator

import pytest

from emax_timm.training.progress import Timing


class Clock:
    """Stands still but for `pass_`."""

    def __init__(self) -> None:
        self.now = 0.0

    def pass_(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def test_timing_splits_wait_from_compute(clock: Clock) -> None:
    def batches() -> Iterator[int]:
        for number in range(3):
            clock.pass_(1)
            yield number
        clock.pass_(1)  # to find that there are no more

    timing, seen = Timing(), []
    for batch in timing.waiting(batches()):
        with timing.computing(images=8):
            clock.pass_(3)
            seen.append(batch)
        clock.pass_(100)  # a checkpoint
    assert seen == [0, 1, 2]
    assert (timing.images, timing.wait, timing.compute) == (24, 4, 9)
    assert timing.images_per_second == 24 / 13
    assert timing.data_wait == 4 / 13


def test_timing_of_nothing_is_zero() -> None:
    assert (Timing().images_per_second, Timing().data_wait) == (0, 0)


def test_step_that_fails_is_not_counted(clock: Clock) -> None:
    timing = Timing()
    with pytest.raises(ValueError, match="no"), timing.computing(images=8):
        raise ValueError("no")
    assert timing == Timing()
