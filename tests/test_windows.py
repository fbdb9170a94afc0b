"""Which days a run learns from, calibrates on and judges."""

from datetime import date, timedelta
from itertools import product

from freshrank.config import WindowConfig
from freshrank.dates import days

RUN_DATE = date(2024, 3, 2)


def test_the_parts_of_a_window_follow_each_other_without_a_day_in_common_and_end_before_the_run() -> None:
    """Of any lengths, over a month's end: together they are the days up to the run's date, each once."""
    for lengths in product((1, 3, 27), (1, 2), (1, 4)):
        split = WindowConfig(train_days=lengths[0], calibration_days=lengths[1], evaluation_days=lengths[2]).split(
            RUN_DATE
        )
        parts = (split.train, split.calibration, split.evaluation)
        assert tuple(map(len, parts)) == lengths
        together = [day for part in parts for day in part]
        assert together == list(days(RUN_DATE - timedelta(days=sum(lengths)), RUN_DATE - timedelta(days=1)))


def test_by_default_the_day_before_the_run_is_judged_and_the_one_before_that_calibrates() -> None:
    """27 days are trained on, up to the third day before the run's date."""
    split = WindowConfig().split(RUN_DATE)
    assert (split.evaluation, split.calibration) == ((date(2024, 3, 1),), (date(2024, 2, 29),))
    assert (split.train[0], split.train[-1]) == (date(2024, 2, 2), date(2024, 2, 28))
