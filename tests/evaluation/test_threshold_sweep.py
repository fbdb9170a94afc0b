"""The threshold sweep: which ages, and that each is judged as if it had been the schema's own."""

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from freshrank.config import EvaluationConfig
from freshrank.evaluation.evaluate import compare
from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.evaluation.results import FRESH, Comparison, MetricName
from freshrank.evaluation.threshold_sweep import ages, with_thresholds
from tests.judging import judged_of, logit, schema_of, with_logits, world

TWO = schema_of()
ONE = schema_of({"click": 1.0})
CONFIG = EvaluationConfig(bootstrap=100)
CHALLENGER = world(lists=200)
NOISE = np.random.default_rng(0).normal(size=CHALLENGER.labels.shape)
BASELINE = with_logits(CHALLENGER, logit(CHALLENGER.probabilities) + NOISE, TWO.utilities)


def swept(challenger: JudgedRows, baseline: JudgedRows, config: EvaluationConfig = CONFIG) -> Comparison:
    schema = ONE if challenger.labels.shape[1] == 1 else TWO
    return with_thresholds(compare(challenger, baseline, schema, config), challenger, baseline, schema, config)


@pytest.mark.parametrize(
    "further, expected",
    [
        pytest.param(None, [3.5, 7, 14], id="half and double of the schema's 7 days"),
        pytest.param((30, 2), [2, 7, 30], id="those asked for beside the schema's, ascending"),
        pytest.param((7,), [7], id="the schema's own is swept once"),
        pytest.param((), [7], id="none further"),
    ],
)
def test_the_schema_s_threshold_is_swept_with_two_others(
    further: tuple[float, ...] | None, expected: list[float]
) -> None:
    """Unless other ones are asked for."""
    config = EvaluationConfig(bootstrap=20, fresh_thresholds=further)
    assert ages(TWO, config) == expected
    assert [row.fresh_days for row in swept(CHALLENGER, BASELINE, config).thresholds] == expected


def test_each_threshold_is_compared_as_if_it_were_the_schema_s() -> None:
    """The same Hits@k, matched and not, and the same intervals as from a schema with that fresh_days."""
    for row in swept(CHALLENGER, BASELINE).thresholds:
        alone = compare(CHALLENGER, BASELINE, schema_of(fresh_days=row.fresh_days), CONFIG)
        hits = [row_ for row_ in row.differences if row_.metric is not MetricName.LOG_LOSS]
        assert hits == [row_ for row_ in alone.rows if row_.slice == FRESH]
        assert row.fresh_share == alone.fresh_share
        assert row.rows == (CHALLENGER.age_days < row.fresh_days).sum()


def test_log_loss_at_a_threshold_is_that_of_the_younger_items() -> None:
    """Below 7 days lies a row predicted 0.5 and 0.8, below 14 days also one predicted 0.5 and 0.4; both clicked."""
    ours = judged_of([[(0.8, 1, 5), (0.4, 1, 10), (0.3, 0, 30), (0.2, 0, 30)]])
    theirs = replace(ours, probabilities=np.array([[0.5], [0.5], [0.3], [0.2]]), score=np.array([0.5, 0.5, 0.3, 0.2]))
    first, own, last = (row.get(MetricName.LOG_LOSS, "click") for row in swept(ours, theirs).thresholds)
    assert (first.difference, first.note) == (None, "no fresh row has 'click' observed")
    assert own.difference is not None
    assert last.difference is not None
    assert own.difference.value == pytest.approx(-np.log(0.8 / 0.5))
    assert last.difference.value == pytest.approx(-(np.log(0.8 / 0.5) + np.log(0.4 / 0.5)) / 2)
    assert (own.items, last.items) == (1, 2)


def test_a_model_compared_with_itself_differs_by_nothing_at_any_threshold() -> None:
    """The draws of items are in pairs too."""
    for threshold in swept(CHALLENGER, CHALLENGER).thresholds:
        for row in threshold.differences:
            assert row.difference is not None
            assert (row.difference.value, row.difference.low, row.difference.high) == (0.0, 0.0, 0.0)


def test_a_better_model_is_better_at_every_threshold() -> None:
    """The challenger predicts the truth, the baseline adds noise: intervals of log loss below 0 throughout."""
    for threshold in swept(CHALLENGER, BASELINE).thresholds:
        difference = threshold.get(MetricName.LOG_LOSS, "click").difference
        assert difference is not None
        assert difference.high < 0


def test_nothing_is_swept_where_nothing_could_be_compared() -> None:
    """The comparison says why."""
    assert swept(judged_of([]), judged_of([])).thresholds == []


def test_a_sweep_survives_json() -> None:
    """It is part of comparison.json; a comparison of before the sweep still reads."""
    comparison = swept(CHALLENGER, BASELINE)
    assert Comparison.model_validate_json(comparison.model_dump_json()) == comparison
    assert Comparison.model_validate(comparison.model_dump(exclude={"thresholds"})).thresholds == []


@pytest.mark.parametrize(
    "change, message",
    [
        ({"warm_up_buckets": (10, 3)}, "warm_up_buckets\\n.*ascending order"),
        ({"age_buckets": (1, 1)}, "age_buckets\\n.*ascending order"),
        ({"fresh_thresholds": (0,)}, "fresh_thresholds.0\\n.*greater than 0"),
    ],
)
def test_edges_and_thresholds_that_mean_nothing_are_refused(change: dict[str, object], message: str) -> None:
    """The field is named; a configuration that says nothing about them is as valid as before."""
    with pytest.raises(ValidationError, match=message):
        EvaluationConfig.model_validate(change)
    assert EvaluationConfig.model_validate({"k": 3, "lists": "user"}).fresh_thresholds is None
