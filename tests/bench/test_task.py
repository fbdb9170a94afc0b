"""Judging: list sums give the evaluation's own numbers, and what a constant can and cannot do."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from freshrank.bench.paper.evidence_data import LabelledRows
from freshrank.bench.paper.task import BOOSTS, MEASURES, chosen_boost, judged_of, list_sums
from freshrank.config import EvaluationConfig
from freshrank.evaluation import evaluate
from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.evaluation.results import ALL, FRESH, MetricName
from freshrank.features.frames import Frame
from tests.judging import logit, schema_of, with_logits, world

pytestmark = pytest.mark.integration

SCHEMA = schema_of()
CONFIG = EvaluationConfig(age_buckets=(), exposure_buckets=())
UTILITIES = np.asarray(SCHEMA.utilities, np.float64)


def too_low(seed: int = 0) -> JudgedRows:
    """A world whose model scores fresh items 0.8 too low as a group."""
    judged = world(seed=seed)
    fresh = judged.age_days < SCHEMA.fresh_days
    return with_logits(judged, logit(judged.probabilities) - 0.8 * fresh[:, None], SCHEMA.utilities)


def rows_of(judged: JudgedRows) -> LabelledRows:
    """The rows of ``judged`` without its predictions."""
    table = pl.DataFrame(
        {
            "judged_age_days": judged.age_days,
            "exposures": judged.exposures,
            "item_id": judged.item_id,
            "user_id": judged.list_id,
            "event_timestamp": np.arange(len(judged.score)),
        }
    ).with_columns(pl.Series(name, judged.labels[:, i]) for i, name in enumerate(SCHEMA.actions))
    frame = Frame(pl.DataFrame(), pl.DataFrame(), table)
    return LabelledRows(frame, judged.labels, judged.list_id, judged.age_days < SCHEMA.fresh_days)


def test_list_sums_add_up_to_the_metrics_of_the_evaluation() -> None:
    """Every measure that is resampled is the very one that is reported."""
    judged = world()
    sums = list_sums(judged, SCHEMA, CONFIG)
    metrics = evaluate.evaluate(judged, SCHEMA, CONFIG)
    averages = sums["sums"].sum(0, dtype=np.float64) / sums["counts"].sum(0, dtype=np.float64)
    expected = [metrics.get(metric, name, action).value for metric, name in MEASURES for action in SCHEMA.actions]
    assert averages == pytest.approx(expected, rel=1e-6)


def test_lists_too_short_to_be_ranked_count_for_the_log_loss_only() -> None:
    """All lists of three: no Hits@3, yet all rows have a log loss."""
    judged = world(lists=50, candidates=3)
    counts = list_sums(judged, SCHEMA, CONFIG)["counts"]
    columns = dict(zip(MEASURES, np.split(counts, len(MEASURES), axis=1), strict=True))
    assert not columns[MetricName.HITS, ALL].any()
    assert columns[MetricName.LOG_LOSS, FRESH].sum() == 2 * (judged.age_days < SCHEMA.fresh_days).sum()


def test_a_constant_boost_lifts_fresh_hits_but_not_those_at_equal_exposure() -> None:
    """It moves the group and tells no two fresh items apart."""
    judged = too_low()
    rows, logits = rows_of(judged), logit(judged.probabilities)
    boost = chosen_boost(rows_of(too_low(seed=1)), logit(too_low(seed=1).probabilities), UTILITIES, SCHEMA, CONFIG)
    plain, boosted = (
        evaluate.evaluate(judged_of(rows, logits, UTILITIES, constant), SCHEMA, CONFIG) for constant in (0.0, boost)
    )
    for action in SCHEMA.actions:
        raw = [e.get(MetricName.HITS, FRESH, action).value for e in (plain, boosted)]
        matched = [e.get(MetricName.MATCHED_HITS, FRESH, action).value for e in (plain, boosted)]
        assert raw[1] > 1.1 * raw[0]
        assert matched[1] == pytest.approx(matched[0], abs=0.005)


def test_the_boost_may_not_cost_more_than_half_a_percent_of_overall_hits_on_the_rows_it_is_chosen_on() -> None:
    """Where fresh items are scored rightly already, an unbounded constant would win fresh Hits@3 and ruin the rest."""
    judged = world(seed=3)
    rows, logits = rows_of(judged), logit(judged.probabilities)
    boost = chosen_boost(rows, logits, UTILITIES, SCHEMA, CONFIG)

    def overall(constant: float) -> float:
        found = evaluate.evaluate(judged_of(rows, logits, UTILITIES, constant), SCHEMA, CONFIG)
        return float(np.mean([found.get(MetricName.HITS, ALL, action).value for action in SCHEMA.actions]))

    assert overall(boost) >= 0.995 * overall(0.0)
    assert overall(BOOSTS[-1]) < 0.995 * overall(0.0)
    assert 0 <= boost < BOOSTS[-1]


def test_rows_without_a_fresh_positive_choose_no_boost() -> None:
    """There is nothing to choose by."""
    judged = world(lists=40)
    rows = rows_of(replace(judged, age_days=np.full(len(judged.score), 30.0)))
    assert chosen_boost(rows, logit(judged.probabilities), UTILITIES, SCHEMA, CONFIG) == 0.0


def test_the_fingerprint_of_judged_rows_sees_order_labels_and_missing_rows() -> None:
    """Models are paired only where it agrees."""
    rows = rows_of(world(lists=5))
    table = rows.frame.rows
    changed = {
        "reversed": table.reverse(),
        "shorter": table.head(-1),
        "relabelled": table.with_columns(click=1 - pl.col("click")),
    }
    same = rows.fingerprint(SCHEMA.actions)
    for what, other in changed.items():
        frame = Frame(rows.frame.users, rows.frame.items, other)
        assert replace(rows, frame=frame).fingerprint(SCHEMA.actions) != same, what
    assert replace(rows).fingerprint(SCHEMA.actions) == same
