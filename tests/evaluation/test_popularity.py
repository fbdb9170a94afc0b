"""The day-1 baseline: shrunk engagement rates from counters alone."""

from collections.abc import Sequence

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from freshrank.evaluation.popularity import popularity
from tests.judging import schema_of

CLICK = schema_of({"click": 1.0})
TWO = schema_of({"click": 1.0, "save": 2.0})


def counters(
    impressions: Sequence[int | None], positives: Sequence[int | None], rates: Sequence[float | None]
) -> pl.DataFrame:
    return pl.DataFrame(
        {"item_impressions_28d": impressions, "item_click_28d": positives, "item_click_rate_28d": rates},
        schema={
            "item_impressions_28d": pl.Float32,
            "item_click_28d": pl.Float32,
            "item_click_rate_28d": pl.Float32,
        },
    )


def test_rates_are_pulled_towards_the_average_by_twenty_observations() -> None:
    """Average (30 + 1) / (80 + 2); an item of 30 in 60 becomes (30 + 20 average) / 80."""
    probabilities, score = popularity(counters([60, 20], [30, 0], [0.5, 0.0]), CLICK)
    average = 31 / 82
    assert probabilities[:, 0] == pytest.approx([(30 + 20 * average) / 80, 20 * average / 40])
    assert score == pytest.approx(probabilities[:, 0])


def test_an_item_without_history_is_average() -> None:
    """Null counters, zero counters and a rate never observed read alike."""
    probabilities, _ = popularity(counters([100, None, 0, 7], [40, None, 0, 0], [0.4, None, None, None]), CLICK)
    assert probabilities[1:, 0] == pytest.approx([41 / 102] * 3)


def test_impressions_whose_label_was_not_observed_do_not_count() -> None:
    """100 impressions, 10 observed, 5 clicked: the rate rests on 10."""
    probabilities, _ = popularity(counters([100], [5], [0.5]), CLICK)
    assert probabilities[0, 0] == pytest.approx((5 + 20 * 0.5) / 30)


def test_without_any_history_everything_is_one_half() -> None:
    """The first day of all: no information, no order."""
    probabilities, _ = popularity(counters([None, 0], [None, 0], [None, None]), CLICK)
    assert probabilities[:, 0].tolist() == [0.5, 0.5]


def test_the_score_weighs_actions_by_utility() -> None:
    """click + 2 save."""
    saves = {"item_save_28d": [10.0, 0.0], "item_save_rate_28d": [0.1, 0.0]}
    items = counters([100, 100], [10, 30], [0.1, 0.3]).with_columns(**{n: pl.Series(v) for n, v in saves.items()})
    probabilities, score = popularity(items, TWO)
    assert score == pytest.approx(probabilities @ [1.0, 2.0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.floats(0, 1)), min_size=1, max_size=20))
def test_probabilities_are_finite_and_inside_the_unit_interval(items: list[tuple[int, float]]) -> None:
    """For any counters."""
    impressions = [n for n, _ in items]
    positives = [int(n * share) for n, share in items]
    rates = [p / n if n else None for p, n in zip(positives, impressions, strict=True)]
    probabilities, score = popularity(counters(impressions, positives, rates), CLICK)
    assert ((probabilities > 0) & (probabilities < 1)).all()
    assert np.isfinite(score).all()
