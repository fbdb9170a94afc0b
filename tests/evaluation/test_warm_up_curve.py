"""The warm-up curve: hand-made buckets, intervals that count items and not rows, and when an item is warm."""

from dataclasses import replace

import numpy as np
import pytest

from freshrank.config import EvaluationConfig
from freshrank.evaluation import bootstrap
from freshrank.evaluation.evaluate import evaluate
from freshrank.evaluation.judged_rows import JudgedRows
from freshrank.evaluation.results import MetricName, WarmUpCurve, Weighting
from freshrank.evaluation.warm_up_curve import CURVES, warm_up, with_warm_up
from tests.judging import judged_of, logit, schema_of, with_logits, world

TWO = schema_of()
CONFIG = EvaluationConfig(exposure_buckets=(0, 19, 1000), warm_up_buckets=(0, 19, 1000))


def curve(
    judged: JudgedRows,
    metric: MetricName,
    weighting: Weighting = Weighting.IMPRESSION,
    config: EvaluationConfig = CONFIG,
) -> WarmUpCurve:
    curves = [one for one in warm_up(judged, TWO, config) if one.key == (metric, "click", weighting)]
    assert len(curves) == 1
    return curves[0]


@pytest.mark.parametrize("metric, weighting", CURVES)
def test_a_point_is_the_metric_of_the_bucket(metric: MetricName, weighting: Weighting) -> None:
    """With the edges of the exposure slices the curve passes through the slices' values, inside its interval."""
    judged = world(lists=300)
    evaluation = evaluate(judged, TWO, CONFIG)
    points = curve(judged, metric, weighting).points
    assert [point.bucket for point in points] == ["0", "1-19", "20-1000", "1001+"]
    for point in points:
        expected = evaluation.get(metric, f"exposures:{point.bucket}", "click", weighting)
        assert point.interval is not None
        assert point.interval.value == pytest.approx(expected.value)
        assert point.interval.low <= point.interval.value <= point.interval.high
        assert (point.support.items, point.support.positives) == (
            evaluation.get(metric, f"exposures:{point.bucket}", "click", Weighting.ITEM).support.items,
            expected.support.positives,
        )


def test_ten_copies_of_every_row_leave_the_interval_as_wide_as_it_was() -> None:
    """What is drawn is an item with all its rows: rows that repeat each other are no evidence."""
    judged = world(lists=300)
    tenfold = replace(judged, **{name: np.repeat(value, 10, axis=0) for name, value in vars(judged).items()})
    for metric in (MetricName.LOG_LOSS, MetricName.PR_AUC, MetricName.AUC):
        for once, often in zip(curve(judged, metric).points, curve(tenfold, metric).points, strict=True):
            assert once.interval is not None
            assert often.interval is not None
            assert list(vars(often.interval).values()) == pytest.approx(list(vars(once.interval).values()))


def test_the_interval_is_that_of_drawing_items_one_by_one() -> None:
    """Weighting rows by how often their item is drawn agrees with gathering the rows of every drawn item."""
    rng = np.random.default_rng(5)
    items, values = rng.integers(0, 40, 300), rng.random(300)
    drawn = bootstrap.item_draws(40, 300, 1)
    fast = bootstrap.drawn_means(drawn, items, values, np.ones(300))
    slow = [np.concatenate([np.tile(values[items == i], n) for i, n in enumerate(draw)]).mean() for draw in drawn]
    assert fast == pytest.approx(slow)
    assert drawn.sum(axis=1).tolist() == [40] * 300


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    """Items differ in their level: 95% intervals over 60 items hold the true mean in some 95 of 100 worlds."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        items = np.repeat(np.arange(60), 8)
        values = rng.normal(size=60)[items] + 0.3 * rng.normal(size=480)
        draws = bootstrap.drawn_means(bootstrap.item_draws(60, 200, seed), items, values, np.ones(480))
        low, high = np.quantile(draws, (0.025, 0.975))
        held += low <= 0 <= high
    assert 86 <= held < 100


def test_an_item_is_warm_from_the_bucket_on_that_is_not_clearly_worse() -> None:
    """Predictions of items shown at most 19 times are blurred: they become as good as the warmest after that."""
    judged = world(lists=600)
    young = judged.exposures <= 19
    noise = 3 * np.random.default_rng(0).normal(size=judged.labels.shape) * young[:, None]
    blurred = with_logits(judged, logit(judged.probabilities) + noise, TWO.utilities)
    for metric in (MetricName.AUC, MetricName.LOG_LOSS):
        assert curve(blurred, metric).warm_from == "20-1000"
        assert curve(judged, metric).warm_from == "0"


def test_a_good_start_does_not_make_an_item_warm_while_worse_buckets_follow() -> None:
    """Only those of 1-19 impressions are blurred: warm from the bucket after them, not from the first."""
    judged = world(lists=600)
    middle = (judged.exposures >= 1) & (judged.exposures <= 19)
    noise = 3 * np.random.default_rng(0).normal(size=judged.labels.shape) * middle[:, None]
    blurred = with_logits(judged, logit(judged.probabilities) + noise, TWO.utilities)
    assert curve(blurred, MetricName.AUC).warm_from == "20-1000"


def test_a_bucket_of_few_items_has_no_point_but_says_how_few() -> None:
    """Nine items do not make an interval; a bucket nobody reached has none either."""
    judged = replace(world(lists=20), exposures=np.full(200, 5))
    few = replace(judged, item_id=np.arange(200) % 9)
    empty, reached, *_ = curve(few, MetricName.AUC).points
    assert (reached.interval, reached.support.items) == (None, 9)
    assert reached.note == "rests on 9 items; 10 are needed"
    assert (empty.interval, empty.support.rows) == (None, 0)
    assert curve(few, MetricName.AUC).warm_from is None


def test_an_action_nobody_took_has_log_loss_but_no_area_and_no_hits() -> None:
    """Nothing is made up."""
    judged = world(lists=400)
    judged = replace(judged, labels=np.zeros_like(judged.labels))
    for metric, weighting in CURVES:
        points = curve(judged, metric, weighting).points
        assert all((point.interval is not None) == (metric is MetricName.LOG_LOSS) for point in points)
    assert curve(judged, MetricName.HITS).points[0].note == "rests on 0 lists; 10 are needed"
    assert curve(judged, MetricName.AUC).points[0].note == "every row has the action, or none has"


def test_the_curves_travel_with_the_evaluation_as_json() -> None:
    """Every one of them; where nothing can be judged there is none."""
    judged = world(lists=60)
    evaluation = with_warm_up(evaluate(judged, TWO, CONFIG), judged, TWO, CONFIG)
    assert [one.key for one in evaluation.warm_up] == [(m, a, w) for a in TWO.actions for m, w in CURVES]
    assert type(evaluation).model_validate_json(evaluation.model_dump_json()) == evaluation
    broken = judged_of([])
    assert with_warm_up(evaluate(broken, schema_of({"click": 1.0}), CONFIG), broken, TWO, CONFIG).warm_up == []
